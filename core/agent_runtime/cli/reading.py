"""A look at a database without the lease: while another process has the sessions open, and without any change."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import anyio

from ..config import Config
from ..errors import AgentRuntimeError, JournalError
from ..journal.still import StillFiles
from ..plugins import PluginManager
from ..storage import Storage, StorageConfig
from .running import with_place

__all__ = ["opened", "read", "still", "undisturbed"]

T = TypeVar("T")


def read(config: Config, work: Callable[[Storage], Awaitable[T]]) -> T:
    """Do the work with the database."""

    async def done() -> T:
        async with opened(config) as storage:
            return await work(storage)

    return anyio.run(done)


@asynccontextmanager
async def opened(config: Config) -> AsyncIterator[Storage]:
    """The database of the configuration. Its errors name the key that is to be mended, and where that is set."""
    try:
        plugins = PluginManager(disabled=config.plugins.disabled)
        plugins.load()
        factory = plugins.storage_for(config.storage.url)
        async with factory(StorageConfig(url=config.storage.url, options=dict(config.storage.options))) as storage:
            yield storage
    except AgentRuntimeError as error:
        raise with_place(error, config) from error


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
