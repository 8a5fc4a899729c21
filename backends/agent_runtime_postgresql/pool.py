"""Connections that wait for their next transaction; and the statements that each has run, as the server described them.

The driver has a pool of its own, but forgets with every turn what it knows of a statement, and asks again. Here a
statement is described once a connection. Where the connection is the server's own, the server keeps it too, parsed and
planned, which is 0.1 to 0.25 ms of each. Through a pooler (PgBouncer) it stays unnamed: its text goes along with its
parameters, in one message, each time, so that the next server need not know it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, TypeAlias

import asyncpg

__all__ = ["Connection", "Driver", "Pool", "statement_name"]

Driver: TypeAlias = Any
"""A connection of asyncpg, which has no types."""

_IDLE_S: Final = 300.0
"""After so long unused, a connection is not trusted any more: something on the way may have forgotten it."""
_PLANS_S: Final = 10.0
"""A plan made for an empty table reads all of a large one; the server itself makes it anew only after an ANALYZE."""
_CLOSE_TIMEOUT_S: Final = 5.0
_USELESS: Final = (asyncpg.InvalidCachedStatementError, asyncpg.InvalidSQLStatementNameError)
"""What is said of a prepared statement whose tables were altered; that was forgotten, as by DISCARD or DEALLOCATE."""


def statement_name(sql: str, number: int) -> str:
    """What a connection calls the statement that it prepares as its `number`th.

    It tells the statement too: should something on the way mix connections up, its name is unknown there, or taken by
    the same one, and never another's.
    """
    return f"agent_runtime_{hashlib.sha256(sql.encode()).hexdigest()[:16]}_{number}"


class Connection:
    """A connection and its statements. `prepares`: the server keeps them, with their plans."""

    def __init__(self, driver: Driver, *, prepares: bool) -> None:
        self.driver: Final = driver
        self._prepares = prepares
        self.idle_since = 0.0
        self._described: dict[str, Any] = {}
        self._numbers = itertools.count(1)  # none twice: of a statement that was cancelled its name may be taken
        self._planned_at = time.monotonic()

    def opening(self, begin: str) -> str:
        """What begins a transaction: `begin`, and now and then that plans are made anew, as tables grow under them."""
        now = time.monotonic()
        if not self._prepares or now < self._planned_at + _PLANS_S:
            return begin
        self._planned_at = now
        return f"{begin}; DISCARD PLANS"

    async def fetch(self, sql: str, values: list[Any]) -> list[Any]:
        """The rows that a statement finds."""
        _, rows = await self._run(sql, values)
        return rows

    async def change(self, sql: str, values: list[Any]) -> int:
        """Run a statement; the number of rows that it changed."""
        statement, _ = await self._run(sql, values)
        return _count(statement.get_statusmsg())

    async def copy(self, table: str, names: Sequence[str], records: AsyncIterable[tuple[Any, ...]]) -> int:
        """Insert rows into a table; how many.

        Raises TypeError, ValueError or OverflowError for a value that the driver can't encode.
        """
        try:
            tag: str = await self.driver.copy_records_to_table(table, columns=names, records=records)
        except asyncpg.PostgresError:  # the table may have been altered, and the driver goes by what it has kept of it
            self.drop()
            raise
        return _count(tag)

    async def _run(self, sql: str, values: list[Any]) -> tuple[Any, list[Any]]:
        statement = self._described.get(sql)
        if statement is None:
            name = statement_name(sql, next(self._numbers)) if self._prepares else ""
            statement = self._described[sql] = await self.driver.prepare(sql, name=name)
        try:
            return statement, await statement.fetch(*values)
        except _USELESS:  # and so are all its other statements
            self.drop()
            raise

    def drop(self) -> None:
        """Close it without a word to the server."""
        self.driver.terminate()

    async def close(self) -> None:
        """Take leave of the server; where that fails or takes long, without a word."""
        try:
            with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                await self.driver.close(timeout=_CLOSE_TIMEOUT_S)
        finally:
            self.drop()


def _count(tag: str) -> int:
    """The number of rows in what a statement is answered with, as in `INSERT 0 7`."""
    return int(tag.rpartition(" ")[2])


class Pool:
    """How many connections there are is for its users to see to, who take so many at most at a time."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        self._connect = connect
        self._idle: list[Connection] = []
        self._returning: set[asyncio.Task[None]] = set()
        self._closed = False

    async def take(self) -> Connection:
        """The connection that was used last, or one that is being put back, or a new one. To be put back."""
        while True:
            while self._idle:
                connection = self._idle.pop()
                if not connection.driver.is_closed() and time.monotonic() < connection.idle_since + _IDLE_S:
                    return connection
                connection.drop()
            if not self._returning:
                return await self._connect()
            await asyncio.wait(self._returning, return_when=asyncio.FIRST_COMPLETED)

    def put_after(self, ending: Coroutine[Any, Any, None]) -> None:
        """`ending` puts a connection back, when it has ended its transaction; nobody else waits for that."""
        task = asyncio.create_task(ending)
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)

    def put(self, connection: Connection) -> None:
        """Give a connection back, closed or outside of any transaction."""
        if self._closed:
            connection.drop()
        elif not connection.driver.is_closed():
            connection.idle_since = time.monotonic()
            self._idle.append(connection)

    async def close(self) -> None:
        """Take leave of the server; connections in use are closed when they are put back."""
        if self._returning:
            await asyncio.wait(self._returning)
        self._closed = True
        idle, self._idle = self._idle, []
        await asyncio.gather(*(connection.close() for connection in idle))
