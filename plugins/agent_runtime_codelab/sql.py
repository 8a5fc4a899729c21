"""Connections for an application's own queries, in the database that the sessions are in.

On either event loop: what SQLAlchemy runs on asyncio only goes over the core's bridge on trio. Each statement is a call
of its own there, which is cancelled as drivers can bear it; so code that is written against `SqlConnection` is the same
on both, and leaves nothing behind when its request is given up.

**What is yours are your own tables**, beside those of the runtime. The runtime's tables (`sessions`, `contexts`,
`messages`, `switches`, `documents`, `outcomes`, `quarantine`, `partitions`, `journals`, `purges`, and the version of the
schema) may be read, and must not be written to, altered or locked: what the runtime has in memory would overwrite it,
or its batches be refused. What is read there is what is *stored*: it may be some seconds old, and `runtime.flush()`
brings it up to date. Give your tables a prefix: names without one may be taken by a later version.

In SQLite there is one writer at a time. A connection that writes has the database from its first statement up to its
commit, and the runtime's batches wait meanwhile (nothing is lost, they are tried again). So commit soon, and wait for
nothing slow in between, a model least of all. Connections that only read are in nobody's way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar, TypeVarTuple, cast
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import anyio
from sqlalchemy import URL, Connection, CursorResult, Executable, ScalarResult, event, make_url
from sqlalchemy.engine import AdaptedConnection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from agent_runtime import Config, InvalidInput, StorageFatal
from agent_runtime.bridge import AsyncioBridge, on_cancel

__all__ = ["SqlConnection", "SqlDatabase"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Parameters: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None

_TIMEOUT_S: Final = 10.0
_CONNECTIONS_MAX: Final = 5
_PRAGMAS: Final[Mapping[str, object]] = {
    "busy_timeout": round(_TIMEOUT_S * 1000),
    "journal_mode": "wal",
    "synchronous": 2,  # FULL: what is committed survives a loss of power
    "foreign_keys": 1,
}


class SqlConnection:
    """A connection of SQLAlchemy, with the calls of its `AsyncConnection`, for either event loop.

    A transaction begins with the first statement; what is not committed at the end is rolled back. Errors are
    SQLAlchemy's. Use it in one task at a time.
    """

    def __init__(self, bridge: AsyncioBridge, connection: AsyncConnection, interrupt: Any) -> None:
        self._bridge = bridge
        self._connection = connection
        self._interrupt = interrupt

    async def execute(self, statement: Executable, parameters: Parameters = None) -> CursorResult[Any]:
        """Run a statement. Its rows are all there when it returns."""
        return await self._run(self._connection.execute, statement, parameters)

    async def scalar(self, statement: Executable, parameters: Parameters = None) -> Any:
        """The first column of the first row; None if there is none."""
        return await self._run(self._connection.scalar, statement, parameters)

    async def scalars(self, statement: Executable, parameters: Parameters = None) -> ScalarResult[Any]:
        """The first column of all rows."""
        return await self._run(self._connection.scalars, statement, parameters)

    async def run_sync(self, function: Callable[..., T], *args: Any) -> T:
        """`function(connection, *args)` with SQLAlchemy's synchronous connection: `metadata.create_all`, an ORM session.

        It runs on the event loop of the connections and may block on nothing but this one.
        """
        return await self._run(self._connection.run_sync, function, *args)

    async def commit(self) -> None:
        """Commit. It is done, or not begun, whoever is cancelled meanwhile."""
        with anyio.CancelScope(shield=True):
            await self._bridge.run(self._connection.commit)

    async def rollback(self) -> None:
        """Take back everything since the last commit."""
        with anyio.CancelScope(shield=True):
            await self._bridge.run(self._connection.rollback)

    async def _run(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        async def run() -> T:
            if self._interrupt is None:
                return await function(*args)
            with on_cancel(self._interrupt):
                return await function(*args)

        return await self._bridge.run(run)


class SqlDatabase:
    """Connections to one database, at most five at once. Made by `SqlDatabase.open`, used from the loop that opened it."""

    def __init__(self, bridge: AsyncioBridge, engine: AsyncEngine) -> None:
        self._bridge = bridge
        self._engine = engine

    @classmethod
    @asynccontextmanager
    async def open(cls, config: Config) -> AsyncIterator[SqlDatabase]:
        """The database of a configuration. It is connected to when a connection is asked for.

        Raises:
            InvalidInput: the storage is none that SQLAlchemy reaches.
        """
        make = _engine_for(config.storage.url)
        async with AsyncioBridge.open(name="agent-runtime-sql") as bridge:

            async def made() -> AsyncEngine:
                return make()

            engine = await bridge.run(made)
            try:
                yield cls(bridge, engine)
            finally:
                with anyio.CancelScope(shield=True):
                    await bridge.run(engine.dispose)

    @asynccontextmanager
    async def connect(self, *, read_only: bool = False) -> AsyncIterator[SqlConnection]:
        """A connection, for a block. `read_only`: writes are refused by the database."""
        with anyio.CancelScope(shield=True):  # cut short, drivers lose what they have opened
            connection, interrupt = await self._bridge.run(self._connected, read_only)
        try:
            yield SqlConnection(self._bridge, connection, interrupt)
        finally:
            with anyio.CancelScope(shield=True):
                await self._bridge.run(connection.close)

    async def _connected(self, read_only: bool) -> tuple[AsyncConnection, Any]:
        connection = await self._engine.connect()
        await connection.execution_options(agent_runtime_read_only=read_only, postgresql_readonly=read_only)
        if self._engine.dialect.name != "sqlite":
            return connection, None
        raw = await connection.get_raw_connection()
        return connection, cast("Any", raw.driver_connection).interrupt


def _engine_for(url: str) -> Callable[[], AsyncEngine]:
    scheme, _, rest = url.partition(":")
    match scheme.lower().partition("+")[0]:
        case "sqlite":
            try:
                database = make_url(url).database
            except (ArgumentError, ValueError):
                database = None
            if database and ":memory:" not in database:
                return lambda: _sqlite(Path(database).resolve())
        case "postgresql" | "postgres" if rest.startswith("//"):
            return lambda: _postgresql(f"postgresql:{rest}")
    raise InvalidInput("storage.url", "has no SQL: a connection needs sqlite:///… or postgresql://…")


def _sqlite(path: Path) -> AsyncEngine:
    # mode=rw: the file is the storage's to make.
    engine = create_async_engine(
        URL.create("sqlite+aiosqlite", database=path.as_uri(), query={"uri": "true", "mode": "rw"}),
        pool_size=_CONNECTIONS_MAX,
        max_overflow=0,
        pool_timeout=_TIMEOUT_S,
        hide_parameters=True,
        connect_args={"isolation_level": None, "timeout": _TIMEOUT_S},
    )

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        for name, wanted in _PRAGMAS.items():
            cursor.execute(f"PRAGMA {name}={wanted}")
            cursor.execute(f"PRAGMA {name}")
            (found,) = cursor.fetchone()
            if found != wanted:
                raise StorageFatal(f"the database {path} can't have {name}={wanted}, SQLite answers {found!r}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        """The driver would begin no transaction before a read, and updates would get lost."""
        read_only = connection.get_execution_options().get("agent_runtime_read_only", False)
        adapted = cast("AdaptedConnection", connection.connection.dbapi_connection)
        for statement in (f"PRAGMA query_only={int(read_only)}", "BEGIN" if read_only else "BEGIN IMMEDIATE"):
            adapted.run_async(lambda driver, statement=statement: driver.execute_fetchall(statement))

    return engine


def _postgresql(url: str) -> AsyncEngine:
    """By the driver's own reading of the URL, which is libpq's; without what is said in it to the storage."""
    parts = urlsplit(url)
    ours = {"pool_size", "schema"}
    query = [(name, value) for name, value in parse_qsl(parts.query) if name not in ours and not name.endswith("_s")]
    dsn = urlunsplit(parts._replace(query=urlencode(query, quote_via=quote)))

    async def connect() -> Any:
        import asyncpg

        return await asyncpg.connect(dsn, timeout=_TIMEOUT_S)

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_size=_CONNECTIONS_MAX,
        max_overflow=0,
        pool_timeout=_TIMEOUT_S,
        pool_pre_ping=True,
        hide_parameters=True,
    )
