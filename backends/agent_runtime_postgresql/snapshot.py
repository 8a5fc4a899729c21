"""Reading: a snapshot is a transaction that only reads, at the isolation level REPEATABLE READ.

Its view is fixed by its first statement after BEGIN. Here that is the one that reads the sequence, so the watermark is
exactly that of the view.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Concatenate, ParamSpec, TypeVar

import anyio

from agent_runtime.errors import StorageUnavailable
from agent_runtime.storage import FirstReads
from agent_runtime_sql.snapshot import Foreseen, SqlSnapshot, foresee
from agent_runtime_sql.transaction import Transaction

from .database import Database
from .lease import SELECT_LEASE, remaining_s
from .pool import Connection
from .transaction import PostgresqlTransaction

__all__ = ["Readers"]

T = TypeVar("T")
P = ParamSpec("P")


class _View:
    """The transaction of one snapshot. A read that fails or is cancelled ends it; it is of no use after it.

    It keeps the connection itself: should the caller be cancelled while `open` returns, `close` still gives it back.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: Connection | None = None

    async def open(self, partition: int, first: FirstReads) -> Foreseen:
        """Take a connection, fix the view, and read what comes first, all in one call to the connection's loop."""
        return await self._database.run(self._open, partition, first)

    async def _open(self, partition: int, first: FirstReads) -> Foreseen:
        self._connection = await self._database.begun(self._database.begin_reading())
        return await foresee(PostgresqlTransaction(self._connection), partition, first)

    async def call(
        self, function: Callable[Concatenate[Transaction, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        connection = self._connection
        if connection is None:
            raise StorageUnavailable(f"a snapshot of {self._database.name} is used after it was closed")

        async def read() -> T:
            return await function(PostgresqlTransaction(connection), *args, **kwargs)

        return await self._database.run(read)

    async def close(self) -> None:
        """Give the connection back, and wait until nothing runs on it any more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._database.run(self._database.give_back, connection)

    def close_soon(self) -> None:
        """Give the connection back, on which nothing runs."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._database.give_back_soon(connection)


class Readers:
    """Lends the connections that read, one a snapshot."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._free = anyio.Semaphore(database.readers_max, fast_acquire=True)

    @property
    def in_use(self) -> int:
        """How many connections it has lent."""
        return self._database.readers_max - self._free.value

    @asynccontextmanager
    async def snapshot(self, partition: int, first: FirstReads) -> AsyncIterator[SqlSnapshot]:
        """Wait for a free connection, and fix a view."""
        async with self._free:
            view = _View(self._database)
            try:
                foreseen = await view.open(partition, first)
                yield SqlSnapshot(view.call, partition, foreseen, lease=SELECT_LEASE, remaining=remaining_s)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await view.close()
                raise
            view.close_soon()
