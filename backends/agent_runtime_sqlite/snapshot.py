"""Reading: a snapshot is a transaction on a connection that only reads.

In the write-ahead log a transaction's view is fixed by its first statement. Here that is the one that reads the
sequence, so the watermark is exactly that of the view.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import aiosqlite
import anyio

from agent_runtime.bridge import on_cancel
from agent_runtime.errors import StorageUnavailable
from agent_runtime.process import this_process
from agent_runtime_sql.reads import SELECT_PARTITION
from agent_runtime_sql.snapshot import Foreseen, SqlSnapshot, foresee
from agent_runtime_sql.transaction import Transaction

from .database import Database
from .engine import driver_of
from .lease import Clock, remaining_s
from .transaction import SqliteTransaction

__all__ = ["Readers"]

T = TypeVar("T")
P = ParamSpec("P")


class _View:
    """The transaction of one snapshot. A read that is cancelled gives up the connection; it is of no use after it."""

    def __init__(self, database: Database, transaction: SqliteTransaction, driver: aiosqlite.Connection) -> None:
        self._database = database
        self._transaction = transaction
        self._driver = driver
        self._closed = False

    async def call(
        self, function: Callable[Concatenate[Transaction, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if self._closed:
            raise StorageUnavailable(f"a snapshot of {self._database.name} is used after it was closed")

        async def interruptible() -> T:
            with on_cancel(self._driver.interrupt):
                return await function(self._transaction, *args, **kwargs)

        return await self._database.run(interruptible)

    async def close(self) -> None:
        """Give the connection back."""
        self._closed = True
        await self._database.run(self._transaction.connection.close)


class Readers:
    """Lends the connections that read, one a snapshot."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._free = anyio.Semaphore(database.readers_max, fast_acquire=True)

    @asynccontextmanager
    async def snapshot(self, partition: int) -> AsyncIterator[SqlSnapshot]:
        """Wait for a free connection, and fix a view. Only the wait can be cancelled; the rest takes no time."""
        async with self._free:
            with anyio.CancelScope(shield=True):
                view, foreseen = await self._database.run(self._open, partition)
            try:
                yield SqlSnapshot(view.call, partition, foreseen, lease=SELECT_PARTITION, remaining=self._remaining)
            finally:
                with anyio.CancelScope(shield=True):
                    await view.close()

    def _remaining(self, row: Mapping[str, Any]) -> float | None:
        return remaining_s(row, this_process().boot_id, self._clock())

    async def _open(self, partition: int) -> tuple[_View, Foreseen]:
        connection = await self._database.reader()
        try:
            driver = await driver_of(connection)
            await connection.begin()
            transaction = SqliteTransaction(connection, driver)
            foreseen = await foresee(transaction, partition)
        except BaseException:
            await connection.invalidate()
            await connection.close()
            raise
        return _View(self._database, transaction, driver), foreseen
