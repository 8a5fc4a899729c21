"""Measuring side by side: the sides of a ratio take turns in one run, so that what else the machine does strikes both.

Only ratios of medians have targets. The times beside them are for the reader, and are of this machine at that moment.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Final, TypeAlias

__all__ = ["Side", "compare", "figure", "seconds", "side_by_side", "spread"]

Side: TypeAlias = Callable[[], Awaitable[float]]
"""Does something once, and tells what is compared of it: mostly the seconds that it took."""

_UNITS: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_ATTEMPTS: Final = 4


async def seconds(call: Awaitable[object]) -> float:
    """The seconds that a call takes."""
    started = perf_counter()
    await call
    return perf_counter() - started


async def side_by_side(rounds: int, *sides: Side) -> list[list[float]]:
    """What each side gave in each round. Who goes first changes from round to round."""
    samples: list[list[float]] = [[] for _ in sides]
    order = list(range(len(sides)))
    for _ in range(rounds):
        for index in order:
            samples[index].append(await sides[index]())
        order.append(order.pop(0))
    return samples


async def compare(
    name: str,
    side: Side,
    reference: Side,
    *,
    rounds: int,
    unit: str = "s",
    at_most: float | None = None,
    at_least: float | None = None,
    difference: bool = False,
    warm_up: bool = True,
) -> None:
    """Print the ratio of the medians of two sides, or their difference, and fail when it misses its target.

    A first round, to warm up, does not count. While the target is missed there are more rounds, a few times as many: it
    is met or missed by the medians of all.
    """
    target = _target(at_most, at_least, unit if difference else None)
    if warm_up:
        await side_by_side(1, side, reference)
    samples: list[list[float]] = [[], []]
    for _ in range(_ATTEMPTS):
        for sample, more in zip(samples, await side_by_side(rounds, side, reference), strict=True):
            sample.extend(more)
        over, under = map(median, samples)
        value = over - under if difference else over / under
        met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        if met:
            break
    value_shown = _shown(value, unit) if difference else f"{value:.2f}"
    operator = "-" if difference else "/"
    print(f"\n  {value_shown:>8}  {target:8} {name}  ({_shown(over, unit)} {operator} {_shown(under, unit)})", end="")
    assert met, f"{name}: {value_shown}, the target is {target}"


def spread(name: str, samples: Sequence[float]) -> None:
    """Print the median, the 99th percentile and the maximum of seconds."""
    ordered = sorted(samples)
    p99 = ordered[int(len(ordered) * 0.99)]
    shown = ", ".join(_shown(value, "s") for value in (median(ordered), p99, ordered[-1]))
    print(f"\n  {'':8}  {'figure':8} {name}: p50, p99, max  {shown}", end="")


def figure(name: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
    """Print a number that is no ratio of medians; fail when it misses its target, if it has one."""
    target = _target(at_most, at_least)
    print(f"\n  {value:8.2f}  {target:8} {name}", end="")
    assert at_most is None or value <= at_most, f"{name}: {value:.2f}, the target is {target}"
    assert at_least is None or value >= at_least, f"{name}: {value:.2f}, the target is {target}"


def _target(at_most: float | None, at_least: float | None, unit: str | None = None) -> str:
    sign, value = ("≤", at_most) if at_most is not None else ("≥", at_least)
    if value is None:
        return "figure"
    return f"{sign} {value:g}" if unit is None else f"{sign} {_shown(value, unit)}"


def _shown(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:,.0f} {unit}"
    size, name = next(((size, name) for size, name in _UNITS if abs(value) >= size), _UNITS[-1])
    return f"{value / size:.3g} {name}"
