"""A look at a database without the lease: while another process has the sessions open, and without any change."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TypeVar

import anyio

from ..config import Config
from ..errors import JournalError
from ..journal.still import StillFiles
from ..storage import Storage
from .running import opened

__all__ = ["pictures", "read", "undisturbed"]

T = TypeVar("T")


def read(config: Config, work: Callable[[Storage], Awaitable[T]]) -> T:
    """Do the work with the database."""

    async def done() -> T:
        async with opened(config) as storage:
            return await work(storage)

    return anyio.run(done)


@contextmanager
def pictures(places: Iterable[Path]) -> Iterator[list[StillFiles]]:
    """The journals' directories as they are now: of these places, those at which there is one.

    Raises:
        JournalError: one can't be read.
    """
    with ExitStack() as stack:
        taken = []
        for place in places:
            try:
                taken.append(stack.enter_context(closing(StillFiles(place))))
            except FileNotFoundError:
                continue
            except OSError as error:
                told = f"the journal's directory {place} can't be read: {error.strerror or error}"
                raise JournalError(told) from error
        yield taken


@contextmanager
def undisturbed(name: str) -> Iterator[None]:
    """Without what this logger, not those below it, has to say: the command itself is about to tell it."""
    logger = logging.getLogger(name)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
