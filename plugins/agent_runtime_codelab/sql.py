"""Connections for an application's own queries, in the database that the sessions are in.

On either event loop: what SQLAlchemy runs on asyncio only goes over the core's bridge on trio. Each statement is a call
of its own there, which is cancelled as drivers can bear it; so code that is written against `SqlConnection` is the same
on both, and leaves nothing behind when its request is given up.

**What is yours are your own tables**, beside those of the runtime. The runtime's tables (`sessions`, `contexts`,
`messages`, `switches`, `documents`, `outcomes`, `quarantine`, `partitions`, `journals`, `purges`, and the schema's
version) may be read, and must not be written to, altered or locked: what the runtime has in memory would overwrite it,
or its batches be refused. What is read there is what is *stored*: it may be some seconds old, and `runtime.flush()`
brings it up to date. Give your tables a prefix: names without one may be taken by a later version.

In SQLite there is one writer at a time. A connection that writes has the database from its first statement up to its
commit, and the runtime's batches wait meanwhile (nothing is lost, they are tried again). So commit soon, and wait for
nothing slow in between, a model least of all. Connections that only read are in nobody's way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar, cast
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import anyio
from sqlalchemy import URL, Connection, CursorResult, Executable, ScalarResult, event, make_url
from sqlalchemy.engine import AdaptedConnection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from agent_runtime import Config, InvalidInput, StorageFatal
from agent_runtime.bridge import AsyncioBridge

__all__ = ["SqlConnection", "SqlDatabase"]

T = TypeVar("T")
Parameters: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None

_TIMEOUT_S: Final = 10.0
_INTERRUPT_AGAIN_S: Final = 0.05
_CONNECTIONS_MAX: Final = 5
_OURS: Final = frozenset({"pool_size", "schema", "connect_timeout", "fallback_application_name"})
"""What a URL of PostgreSQL says to the storage, beside what ends in `_s`."""
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
        return await self._run(lambda: self._connection.execute(statement, parameters))

    async def scalar(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Any:
        """The first column of the first row; None if there is none."""
        return await self._run(lambda: self._connection.scalar(statement, parameters))

    async def scalars(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> ScalarResult[Any]:
        """The first column of all rows."""
        return await self._run(lambda: self._connection.scalars(statement, parameters))

    async def run_sync(self, function: Callable[..., T], *args: Any) -> T:
        """`function(connection, *args)` with SQLAlchemy's synchronous connection: `create_all`, a session of the ORM.

        It runs on the event loop of the connections and may block on nothing but this one.
        """
        return await self._run(lambda: self._connection.run_sync(function, *args))

    async def commit(self) -> None:
        """Commit. It is done, or not begun, whoever is cancelled meanwhile."""
        with anyio.CancelScope(shield=True):
            await self._bridge.run(self._connection.commit)

    async def rollback(self) -> None:
        """Take back everything since the last commit."""
        with anyio.CancelScope(shield=True):
            await self._bridge.run(self._connection.rollback)

    async def _run(self, statement: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await (statement() if self._interrupt is None else _interruptible(statement, self._interrupt))

        return await self._bridge.run(run)


async def _interruptible(statement: Callable[[], Awaitable[T]], interrupt: Callable[[], Awaitable[object]]) -> T:
    """A statement that runs in SQLite's thread. Given up, it is interrupted and waited for.

    SQLAlchemy must not see the cancellation: it would throw the connection away as it is, with its lock on the file.
    """
    task = asyncio.ensure_future(statement())
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():  # an interrupt that comes before the thread has begun means nothing
            await interrupt()
            await asyncio.wait({task}, timeout=_INTERRUPT_AGAIN_S)
        if not task.cancelled():
            task.exception()  # looked at: it is what the interrupt made of the statement
        raise


class SqlDatabase:
    """Connections to one database, at most five at once. Made by `SqlDatabase.open`, used from its loop."""

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
        make = _engine_for(config)
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


def _engine_for(config: Config) -> Callable[[], AsyncEngine]:
    url = config.storage.url
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
            return lambda: _postgresql(f"postgresql:{rest}", config.storage.options.get("schema"))
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
        adapted.run_async(lambda driver: driver.execute_fetchall(f"PRAGMA query_only={int(read_only)}"))
        adapted.run_async(lambda driver: driver.execute_fetchall("BEGIN" if read_only else "BEGIN IMMEDIATE"))

    return engine


def _postgresql(url: str, schema: str | None) -> AsyncEngine:
    """By the driver's own reading of the URL, which is libpq's; without what is said in it to the storage.

    Where that has a schema, it is the one that names without a schema mean here too.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    schema = schema or query.get("schema")
    kept = {name: value for name, value in query.items() if name not in _OURS and not name.endswith("_s")}
    dsn = urlunsplit(parts._replace(query=urlencode(kept, quote_via=quote)))
    settings = {} if schema is None else {"search_path": f'"{schema}"'}

    async def connect() -> Any:
        import asyncpg

        return await asyncpg.connect(dsn, timeout=_TIMEOUT_S, server_settings=settings)

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_size=_CONNECTIONS_MAX,
        max_overflow=0,
        pool_timeout=_TIMEOUT_S,
        pool_pre_ping=True,
        hide_parameters=True,
    )
