"""A look at a database without the lease: while another process has the sessions open, and without any change."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import anyio

from ..config import Config
from ..errors import JournalError
from ..journal.still import StillFiles
from ..storage import Storage
from .running import opened

__all__ = ["read", "still", "undisturbed"]

T = TypeVar("T")


def read(config: Config, work: Callable[[Storage], Awaitable[T]]) -> T:
    """Do the work with the database."""

    async def done() -> T:
        async with opened(config) as storage:
            return await work(storage)

    return anyio.run(done)


def still(place: Path) -> StillFiles | None:
    """The journal's directory as it is now; None: there is none. To be closed.

    Raises:
        JournalError: it can't be read.
    """
    try:
        return StillFiles(place)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(f"the journal's directory {place} can't be read: {error.strerror or error}") from error


@contextmanager
def undisturbed(name: str) -> Iterator[None]:
    """Without what this logger, not those below it, has to say: the command itself is about to tell it."""
    logger = logging.getLogger(name)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
