"""Connections: one that writes, a few that read, each configured and checked before it is used.

In SQLite's write-ahead log readers and the writer don't wait for one another, as long as each has a connection of its
own. So there are two engines on one file. They connect when first used.

The drivers' defaults begin no transaction before a read and a deferred one before a write, which loses updates. So the
driver is told to leave transactions alone, and they are begun here: BEGIN IMMEDIATE to write, BEGIN to read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import aiosqlite
from sqlalchemy import URL, Connection, event
from sqlalchemy.engine import AdaptedConnection
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from agent_runtime.errors import StorageFatal

from .settings import Settings

__all__ = ["connected", "driver_of", "plain_engine", "readers_engine", "writer_engine"]

# The order counts: the timeout is for the pragmas after it.
_WRITER: Final[Mapping[str, object]] = {
    "journal_mode": "wal",
    "synchronous": 2,  # FULL: a commit has reached the disk when it returns
    "fullfsync": 1,  # and on macOS the disk's platters too
    "foreign_keys": 1,
    "secure_delete": 1,  # what was deleted is overwritten, not only forgotten
}
_READER: Final[Mapping[str, object]] = {"journal_mode": "wal", "query_only": 1}


def writer_engine(settings: Settings) -> AsyncEngine:
    """The engine with the one connection that ever writes."""
    return _engine(settings, _WRITER, "BEGIN IMMEDIATE", connections=1)


def plain_engine(settings: Settings) -> AsyncEngine:
    """An engine whose connection leaves the file as it is: for a look at what it holds."""
    return _engine(settings, {}, "BEGIN", connections=1)


def readers_engine(settings: Settings) -> AsyncEngine:
    """The engine with the connections that read."""
    return _engine(settings, _READER, "BEGIN", connections=settings.readers)


def _engine(settings: Settings, pragmas: Mapping[str, object], begin: str, *, connections: int) -> AsyncEngine:
    # mode=rw: a file that has gone is an error, not a new, empty database that anyone may read.
    url = URL.create("sqlite+aiosqlite", database=settings.path.as_uri(), query={"uri": "true", "mode": "rw"})
    engine = create_async_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=settings.busy_timeout_s,
        hide_parameters=True,  # they are what people said
        connect_args={"isolation_level": None, "timeout": settings.busy_timeout_s},
    )
    wanted = {"busy_timeout": round(settings.busy_timeout_s * 1000), **pragmas}

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _record: object) -> None:
        for name, value in wanted.items():
            _set_pragma(settings, connection, name, value)

    @event.listens_for(engine.sync_engine, "checkout")
    def check(adapted: AdaptedConnection, _record: object, _proxy: object) -> None:
        """Statements run below SQLAlchemy, which does not see when the driver's connection is closed with one."""
        try:
            _ = adapted.driver_connection.in_transaction
        except ValueError:
            raise DisconnectionError from None

    @event.listens_for(engine.sync_engine, "begin")
    def begin_transaction(connection: Connection) -> None:
        adapted = cast("AdaptedConnection", connection.connection.dbapi_connection)
        adapted.run_async(lambda driver: driver.execute_fetchall(begin))

    return engine


def _set_pragma(settings: Settings, connection: Any, name: str, value: object) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA {name}={value}")
        cursor.execute(f"PRAGMA {name}")
        (found,) = cursor.fetchone()
    finally:
        cursor.close()
    if found != value:
        raise StorageFatal(
            f"the database {settings.path} can't have {name}={value}, SQLite answers {found!r}: "
            "choose a path on a local disk"
        )


@asynccontextmanager
async def connected(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A connection, for a block. A cancellation waits for its opening and its closing: the driver, cancelled half-way,
    loses the open file.
    """
    connection = engine.connect()
    try:
        await _whole(connection.start())
        yield connection
    finally:
        if connection.sync_connection is not None:
            await _whole(connection.close())


async def _whole(part: Coroutine[Any, Any, object]) -> None:
    task = asyncio.create_task(part)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def driver_of(connection: AsyncConnection) -> aiosqlite.Connection:
    """The driver's connection below."""
    raw = await connection.get_raw_connection()
    driver = raw.driver_connection
    if not isinstance(driver, aiosqlite.Connection):
        raise TypeError(f"a connection of aiosqlite was expected, not {type(driver).__name__}")
    return driver
