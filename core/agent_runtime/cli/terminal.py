"""Where a command writes: standard output for what it was asked for, standard error for what happens meanwhile.

Output goes through a thread: a reader that pauses (`| less`) must not stop the event loop, which renews the lease.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TextIO

import anyio.to_thread

from .text import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["console", "is_terminal", "output_is_terminal", "progress", "show", "write", "write_bytes"]

_LINE_INTERVAL_S: Final = 5.0


def is_terminal(stream: TextIO) -> bool:
    """Whether a person reads, or types, there."""
    return stream.isatty()


def output_is_terminal() -> bool:
    """Whether a person reads standard output."""
    return is_terminal(sys.stdout)


def console(stream: TextIO) -> Console:
    """A console that takes text as it is: no markup, no emoji codes, no guesses at numbers."""
    from rich.console import Console

    return Console(file=stream, markup=False, emoji=False, highlight=False)


async def write(text: str) -> None:
    """Write to standard output."""
    await anyio.to_thread.run_sync(_write, text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


async def write_bytes(data: bytes) -> None:
    """Write to standard output, as it is."""
    await anyio.to_thread.run_sync(_write_bytes, data)


def _write_bytes(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


async def show(*items: RenderableType) -> None:
    """Print to standard output, which is a terminal."""
    await anyio.to_thread.run_sync(lambda: console(sys.stdout).print(*items, sep="\n"))


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[str, int], None]]:
    """Tell on standard error how far the work is: a bar on a terminal, elsewhere a line every few seconds.

    Gives a function to be called with a text and how much of `total` (None: unknown) is done.
    """
    if is_terminal(sys.stderr):
        with _bar(visible(what), total) as tell:
            yield tell
        return
    told_at = time.monotonic()

    def tell_in_lines(text: str, done: int) -> None:
        nonlocal told_at
        now = time.monotonic()
        if now - told_at >= _LINE_INTERVAL_S:
            told_at = now
            share = f"{100 * done // total} %, " if total else ""
            sys.stderr.write(f"{visible(what)}: {share}{text}\n")
            sys.stderr.flush()

    yield tell_in_lines


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Callable[[str, int], None]]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn("{task.percentage:>3.0f} %", markup=False),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task(what, total=total, text="")
        yield lambda text, done: bar.update(task, completed=done, text=text)
