"""The server: the connections to it, the loop they live on, and transactions on both.

A connection may be PgBouncer's, which lends out another one for each transaction (pool_mode = transaction): settings
are SET LOCAL, locks end with their transaction, and a pooler keeps no statement. The settings go along with BEGIN, in
one message. It is the pool's pre-ping at the same time: a connection that turns out dead there is replaced, as nothing
was done on it yet.

A transaction that only read is ended behind the reader's back, as nothing can come of that; the next user of the
connection waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar, TypeVarTuple

import asyncpg

from agent_runtime.bridge import AsyncioBridge
from agent_runtime.errors import StorageUnavailable

from .errors import is_lost, translated
from .pool import Connection, Driver, Pool
from .settings import Settings
from .transaction import PostgresqlTransaction

__all__ = ["Database", "connect"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
logger: Final = logging.getLogger(__name__)

_COPIED_TABLES_MAX: Final = 10
_CLEANUP_TIMEOUT_S: Final = 5.0
_CLIENT_MARGIN_S: Final = 5.0
_LEASE_PART: Final = 0.5
_LEAST_TIMEOUT_S: Final = 1.0


async def connect(settings: Settings, *, keeps: bool = False) -> Driver:
    """A new connection. `keeps`: what the driver asks of a table before each COPY into it, it asks once."""
    return await asyncpg.connect(
        settings.dsn,
        timeout=settings.connect_timeout_s,
        # The server ends a statement first; this is for a server that has fallen silent.
        command_timeout=settings.statement_timeout_s + _CLIENT_MARGIN_S,
        statement_cache_size=_COPIED_TABLES_MAX if keeps else 0,
        server_settings={"application_name": settings.application_name},
    )


class Database:
    """The pool. `name` is for messages, `readers_max` how many connections read."""

    def __init__(self, bridge: AsyncioBridge, settings: Settings) -> None:
        self.name: Final = settings.name
        self.settings: Final = settings
        self.readers_max: Final = settings.pool_size - 1
        self._bridge = bridge
        self._pool = Pool(self._connect)
        self._direct = False  # whether the last connection was the server's own
        self._lease_s: float | None = None
        self._closed = False

    async def _connect(self) -> Connection:
        """A new connection for the pool.

        A pooler makes up the process that it greets with, as it will be several: only the server's own tells its real
        one. The driver has to know before it connects, so the first one is made again.
        """
        if self.settings.prepared_statements == "never":
            return Connection(await connect(self.settings), prepares=False)
        while True:
            driver = await connect(self.settings, keeps=self._direct)
            try:
                direct = await driver.fetchval("SELECT pg_backend_pid()") == driver.get_server_pid()
            except BaseException:
                self._direct = False  # a pooler may not know the statement that the driver has kept
                driver.terminate()
                raise
            connection = Connection(driver, prepares=direct)
            if direct == self._direct:
                return connection
            self._direct = direct
            await connection.close()

    async def run(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Await `function(*args)` on the loop of the connections, its errors translated."""
        self._check_open()
        return await self._bridge.run(self._translated, function, args)

    def _check_open(self) -> None:
        if self._closed:
            raise StorageUnavailable(f"{self.name} is closed")

    async def _translated(self, function: Callable[[*Ts], Awaitable[T]], args: tuple[*Ts]) -> T:
        with translated(self.name):
            return await function(*args)

    def heed_lease(self, duration_s: float) -> None:
        """Keep what a hanging writer may hold others up for below the duration of its lease."""
        self._lease_s = duration_s

    def begin_writing(self) -> str:
        """BEGIN for a transaction that writes, and its settings."""
        settings = self.settings
        longest_s = float("inf") if self._lease_s is None else max(self._lease_s * _LEASE_PART, _LEAST_TIMEOUT_S)
        return (
            self._begin(
                "READ COMMITTED",
                statement_timeout=settings.statement_timeout_s,
                lock_timeout=min(settings.lock_timeout_s, longest_s),
                idle_in_transaction_session_timeout=min(settings.idle_in_transaction_timeout_s, longest_s),
            )
            + "; SET LOCAL synchronous_commit = on"
        )

    def begin_reading(self) -> str:
        """BEGIN for a transaction that sees one moment."""
        return self._begin(
            "REPEATABLE READ, READ ONLY",
            statement_timeout=self.settings.statement_timeout_s,
            idle_in_transaction_session_timeout=self.settings.snapshot_timeout_s,
        )

    def _begin(self, mode: str, **timeouts_s: float) -> str:
        statements = [f"BEGIN ISOLATION LEVEL {mode}"]
        statements += [f"SET LOCAL {name} = {max(1, round(value * 1000))}" for name, value in timeouts_s.items()]
        if self.settings.schema is not None:
            statements.append(f'SET LOCAL search_path = "{self.settings.schema}"')
        return "; ".join(statements)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[PostgresqlTransaction]:
        """A transaction that writes, for functions that `run` runs: committed at the end, undone by an error.

        A cancellation before the commit undoes it too; one during the commit waits for its end.
        """
        connection = await self.begun(self.begin_writing())
        try:
            yield PostgresqlTransaction(connection)
            await _whole(connection.driver.execute("COMMIT"))
        finally:
            await self.give_back(connection)

    async def begun(self, begin: str) -> Connection:
        """A connection of the pool in a new transaction. To be given back."""
        for left in reversed(range(self.settings.pool_size + 1)):
            connection = await self._pool.take()
            try:
                await connection.driver.execute(connection.opening(begin), timeout=self.settings.connect_timeout_s)
            except BaseException as exc:
                lost = is_lost(exc)
                if lost:
                    connection.drop()
                await self.give_back(connection, unsure=not lost)
                if not lost or not left:
                    raise
            else:
                return connection
        raise StorageUnavailable(f"{self.name} ends every connection at once")

    async def give_back(self, connection: Connection, *, unsure: bool = False) -> None:
        """Undo the transaction, if it is not committed, and put the connection back; drop it if that fails.

        It waits for what a cancellation has left running: the driver has asked the server to end it. `unsure`: that may
        be the BEGIN, of which the driver knows nothing before it is answered.
        """
        try:
            if unsure or connection.driver.is_in_transaction():
                await _whole(connection.driver.execute("ROLLBACK", timeout=_CLEANUP_TIMEOUT_S))
        except Exception as exc:  # noqa: BLE001 - what counts has failed or succeeded before
            logger.debug("a connection to %s is dropped: %s", self.name, type(exc).__name__)
            connection.drop()
        finally:
            self._pool.put(connection)

    def give_back_soon(self, connection: Connection) -> None:
        """Begin to `give_back`, from the caller's loop, and don't wait for it: the connection's next user does."""
        self._check_open()
        self._bridge.call_soon(lambda: self._pool.put_after(self.give_back(connection)))

    async def close(self) -> None:
        """Close every connection."""
        if not self._closed:
            self._closed = True
            await self._bridge.run(self._pool.close)


async def _whole(part: Coroutine[Any, Any, object]) -> None:
    """Await `part` to its end, also when cancelled."""
    task = asyncio.create_task(part)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
