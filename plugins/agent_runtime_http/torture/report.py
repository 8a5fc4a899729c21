"""What is said at the end: a table for people, lines with a tab for pipes, JSON for programs."""

from __future__ import annotations

import msgspec

from agent_runtime.cli.terminal import output_is_terminal, show, write

from .books import Figures

__all__ = ["report", "summary"]


def summary(figures: Figures) -> str:
    """How far it is, in a few words."""
    kills = sum(figures.kills.values())
    return f"{figures.acknowledged} acknowledged, {kills} kill(s), {len(figures.findings)} finding(s)"


async def report(figures: Figures, *, as_json: bool) -> None:
    """Say what was done, and what came of it."""
    if as_json:
        await write(msgspec.json.encode({"well": figures.well, **msgspec.structs.asdict(figures)}).decode() + "\n")
    elif output_is_terminal():
        await _show_table(_rows(figures))
    else:
        await write("".join(f"{name}\t{value}\n" for name, value in _rows(figures)))


def _rows(figures: Figures) -> list[tuple[str, str]]:
    rows = {
        "seed": figures.seed,
        "cycles": figures.cycles,
        "requests": figures.requests,
        "acknowledged": figures.acknowledged,
        "refused": figures.refused,
        "unknown": figures.unknown,
        "sessions compared": figures.compared,
        "lost": figures.lost,
        "doubled": figures.doubled,
        "out of order": figures.out_of_order,
        "torn": figures.torn,
        "invented": figures.invented,
        "failures": figures.failures,
        "recoveries": figures.recoveries,
        "changes recovered": figures.changes_recovered,
        "longest start (s)": f"{figures.longest_start_s:.2f}",
        **{f"killed in {where}": count for where, count in sorted(figures.kills.items())},
    }
    return [(name, str(value)) for name, value in rows.items()]


async def _show_table(rows: list[tuple[str, str]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    await show(table)
