"""When the server is killed in each cycle, and how it is configured: all of it drawn by the seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle
from random import Random
from typing import Any, Final

import msgspec

__all__ = ["POINTS", "Plan", "plans"]

_MOMENTS: Final = {"start": (2, 0.0, 1.0), "recovery": (3, 0.0, 1.0), "reading": (1, 0.0, 0.15), "load": (9, 0.0, 0.8)}
_STOP: Final = (2, 0.0, 0.2)
_STOP_WORK_S: Final = 0.4
_TIMED: Final = 2  # cycles with a kill at a moment, for each one with a kill at a point
_TORN: Final = "journal.write:torn"
_FALLBACK_S: Final = 1.0

POINTS: Final[Mapping[str, int]] = {
    _TORN: 150,
    "journal.write:before": 150,
    "journal.write:after": 150,
    "journal.sync:before": 6,
    "journal.sync:after": 6,
    "journal.create:before": 3,
    "journal.create:after": 3,
    "journal.truncate:before": 1,
    "journal.truncate:after": 1,
    "journal.unlink:before": 2,
    "journal.unlink:after": 2,
    "journal.sync_directory:before": 3,
    "journal.sync_directory:after": 3,
    "storage.apply:before": 5,
    "storage.apply:after": 5,
    "storage.acquire:after": 1,
}
"""Where servers kill themselves (see `agent_runtime.testing.failpoints`), and the most times that they come there."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one server.

    `kind` is the phase in which it is killed: `start` (up to listening), `recovery` (up to being ready), `reading`,
    `load`, `stop` (after SIGTERM). `delay_s` counts from the phase's beginning; in `start` and `recovery` it is a share
    of what the last start took. `work_s` is how long there is load before a stop.
    """

    kind: str
    delay_s: float = 0.0
    work_s: float = 0.0
    failpoint: str | None = None
    settings: Mapping[str, Any] = {}


def plans(seed: int, *, failpoints: bool) -> Iterator[Plan]:
    """The plans of all cycles. With `failpoints`, in every third cycle the server kills itself at a named point."""
    random = Random(f"{seed}/plans")  # noqa: S311 — no secret
    points = [*POINTS]
    random.shuffle(points)
    coming = cycle(points)
    while True:
        for _ in range(_TIMED):
            yield _timed(random)
        if failpoints:
            point = next(coming)
            if point.startswith("journal.truncate"):  # there must be something to be cut
                yield _at(_TORN, random)
            yield _at(point, random)


def _timed(random: Random) -> Plan:
    moments = {**_MOMENTS, "stop": _STOP}
    kind = random.choices([*moments], [weight for weight, _, _ in moments.values()])[0]
    _, earliest, latest = moments[kind]
    return Plan(
        kind=kind,
        delay_s=random.uniform(earliest, latest),
        work_s=random.uniform(0, _STOP_WORK_S),
        settings=_settings(random),
    )


def _at(point: str, random: Random) -> Plan:
    nth = random.randint(1, POINTS[point])
    return Plan(kind="load", delay_s=_FALLBACK_S, failpoint=f"{point}:{nth}", settings=_settings(random))


def _settings(random: Random) -> dict[str, Any]:
    """Small segments, quick and slow batches, little memory: what makes things happen often."""
    return {
        "journal.segment_bytes": random.choice((4096, 16_384, 65_536)),
        "journal.sync_interval_s": random.choice((0.02, 0.2)),
        "write_behind.interval_s": random.choice((0.02, 0.1, 0.5, 5.0)),
        "write_behind.batch_changes": random.choice((7, 100, 1000)),
        "residents.bytes_max": random.choice((65_536, 268_435_456)),
        "residents.tail_messages": random.choice((3, 200)),
    }
