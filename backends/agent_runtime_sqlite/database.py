"""The open file: its connections, the loop they live on, and the way to both."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeVar, TypeVarTuple, cast

from sqlalchemy import QueuePool
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agent_runtime.bridge import AsyncioBridge
from agent_runtime.errors import StorageUnavailable
from agent_runtime.storage import PoolFigures
from agent_runtime_sql.schema import is_current

from .engine import connected, driver_of, plain_engine, readers_engine, writer_engine
from .errors import translated
from .settings import Settings

__all__ = ["Database"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
logger: Final = logging.getLogger(__name__)


class Database:
    """Two engines on one file. `name` is for messages, `readers_max` how many connections read."""

    def __init__(self, bridge: AsyncioBridge, settings: Settings) -> None:
        self.name: Final = f"the database {settings.path}"
        self.readers_max: Final = settings.readers
        self._settings = settings
        self._bridge = bridge
        self._writer = writer_engine(settings)
        self._readers = readers_engine(settings)
        self._closed = False

    async def run(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Await `function(*args)` on the loop of the connections, its errors translated."""
        if self._closed:
            raise StorageUnavailable(f"{self.name} is closed")
        return await self._bridge.run(self._translated, function, args)

    async def _translated(self, function: Callable[[*Ts], Awaitable[T]], args: tuple[*Ts]) -> T:
        with translated(self.name):
            return await function(*args)

    def writer(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """The connection that writes; for functions that `run` runs."""
        return connected(self._writer)

    async def reader(self) -> AsyncConnection:
        """A connection that reads, likewise. To be closed; neither may be cancelled."""
        return await self._readers.connect()

    async def is_current(self) -> bool:
        """Whether the tables are those of this code. To be asked before `connect`."""
        plain = plain_engine(self._settings)
        try:
            async with connected(plain) as connection:
                return await connection.run_sync(is_current, self.name)
        finally:
            await plain.dispose()

    async def connect(self) -> None:
        """Connect in both ways, and so check both. This changes a new file for good, to a write-ahead log."""
        async with connected(self._writer), connected(self._readers):
            """That they could be opened is all."""

    def figures(self) -> PoolFigures:
        """Both pools together."""
        pools = [_pool(self._writer), _pool(self._readers)]
        return PoolFigures(size=sum(pool.size() for pool in pools), in_use=sum(pool.checkedout() for pool in pools))

    async def close(self) -> None:
        """Close every connection, the writer's last: it leaves the whole database in its one file."""
        if not self._closed:
            self._closed = True
            await self._bridge.run(self._dispose)

    async def _dispose(self) -> None:
        await self._readers.dispose()
        if _pool(self._writer).checkedin():
            await self._truncate_log()
        await self._writer.dispose()

    async def truncate_log(self) -> None:
        """Take the write-ahead log into the file and leave nothing in it, for a function that `run` runs.

        Raises StorageUnavailable when others are reading for longer than `busy_timeout_s`.
        """
        async with self.writer() as connection:
            driver = await driver_of(connection)
            cursor = await driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            found = await cursor.fetchone()
            await cursor.close()
        if found is None or found[0]:
            raise StorageUnavailable(f"{self.name} is being read: its write-ahead log can't be emptied now")

    async def _truncate_log(self) -> None:
        try:
            async with self.writer() as connection:
                driver = await driver_of(connection)
                for statement in ("PRAGMA busy_timeout=0", "PRAGMA wal_checkpoint(TRUNCATE)"):
                    await (await driver.execute(statement)).close()
        except Exception as exc:  # noqa: BLE001 - then the next one to open the file does it
            logger.debug("the write-ahead log of %s stays as it is: %r", self.name, exc)


def _pool(engine: AsyncEngine) -> QueuePool:
    return cast("QueuePool", engine.sync_engine.pool)
