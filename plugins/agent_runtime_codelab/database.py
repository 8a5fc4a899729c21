"""Old databases, read at one moment and never written to.

SQLite's file is opened by mode=ro, which holds for everything that SQLite itself would write too; PostgreSQL's session
is one READ ONLY transaction in REPEATABLE READ. All reads of one import see the same moment, while the old service may
go on writing.

Drivers are used as they are, on a thread and on the bridge: what is read has to come as it stands in the old tables,
also where it is no valid time, JSON or UTF-8.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias
from urllib.parse import unquote, urlsplit

import anyio.to_thread

from agent_runtime import InvalidInput, StorageError, StorageFatal, StorageUnavailable
from agent_runtime.bridge import AsyncioBridge

__all__ = ["OldDatabase", "Opener", "Row", "opener"]

Row: TypeAlias = Mapping[str, Any]

_CONNECT_TIMEOUT_S: Final = 10.0
_BUSY_TIMEOUT_S: Final = 10.0
_FORMS: Final = "write sqlite:///old.db or postgresql://user:password@host:5432/database"


class OldDatabase(Protocol):
    """A moment of an old database."""

    @property
    def position(self) -> str:
        """The name of what orders rows by when they were inserted."""

    async def columns(self, table: str) -> Sequence[str]:
        """The columns of a table; none if it is not there."""

    async def rows(self, statement: str, *values: object) -> Sequence[Row]:
        """What a SELECT gives; a `?` in it stands for each of the values.

        Raises:
            StorageError: the database can't be read.
        """


class Opener:
    """How to open an old database. `name` is what it is called in reports, without secrets."""

    def __init__(self, name: str, function: Callable[[], AbstractAsyncContextManager[OldDatabase]]) -> None:
        self.name = name
        self.open = function


def opener(url: str) -> Opener:
    """How to open the database at a URL, in the forms that the configuration takes too, or SQLite's in a file.

    Raises:
        InvalidInput: the URL is none of these, or there is no such file.
    """
    scheme, _, rest = url.partition(":")
    match scheme.lower().partition("+")[0]:
        case "sqlite" if rest.startswith("///"):
            path = Path(unquote(rest.removeprefix("///").partition("?")[0]))
            if not path.is_file():
                raise InvalidInput("source", f"there is no file {path}")
            return Opener(str(path), partial(_sqlite, path))
        case "postgresql" | "postgres" if rest.startswith("//"):
            dsn = f"postgresql:{rest}"
            parts = urlsplit(dsn)
            host = parts.netloc.rpartition("@")[2] or "the local socket"
            return Opener(f"database {parts.path.lstrip('/')} at {host}", partial(_postgresql, dsn))
        case _ if Path(url).is_file():
            return Opener(url, partial(_sqlite, Path(url)))
    raise InvalidInput("source", f"is not a URL of an old database; {_FORMS}")


# --- SQLite -----------------------------------------------------------------------------------------------------------


class _SQLite:
    position: Final = "rowid"

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection

    async def columns(self, table: str) -> Sequence[str]:
        return [row["name"] for row in await self.rows("SELECT name FROM pragma_table_info(?)", table)]

    async def rows(self, statement: str, *values: object) -> Sequence[Row]:
        return await anyio.to_thread.run_sync(self._rows, statement, values)

    def _rows(self, statement: str, values: Sequence[object]) -> Sequence[Row]:
        try:
            return [dict(row) for row in self._connection.execute(statement, values)]
        except sqlite3.Error as error:
            raise _sqlite_error(self._path, error) from error


@asynccontextmanager
async def _sqlite(path: Path) -> AsyncIterator[OldDatabase]:
    connection = await anyio.to_thread.run_sync(_connected, path)
    with closing(connection):
        yield _SQLite(path, connection)


def _connected(path: Path) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        connection = sqlite3.connect(
            uri, uri=True, isolation_level=None, timeout=_BUSY_TIMEOUT_S, check_same_thread=False
        )
    except sqlite3.Error as error:
        raise _sqlite_error(path, error) from error
    connection.row_factory = sqlite3.Row
    # What is no UTF-8 can still be told of, and kept: as lone surrogates, which JSON can escape.
    connection.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
    try:
        connection.execute("BEGIN")
        connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall()  # the moment that all reads see is now
    except sqlite3.Error as error:
        connection.close()
        raise _sqlite_error(path, error) from error
    return connection


def _sqlite_error(path: Path, error: sqlite3.Error) -> StorageError:
    match getattr(error, "sqlite_errorname", ""):
        case "SQLITE_BUSY":
            return StorageUnavailable(f"{path}: another process keeps it locked: {error}")
        case "SQLITE_READONLY_ROLLBACK" | "SQLITE_READONLY_RECOVERY":
            return StorageFatal(
                f"{path}: a process died while it wrote; start the old service once, or `sqlite3` on a copy: {error}"
            )
    return StorageFatal(f"{path}: can't be read: {error}")


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


class _PostgreSQL:
    position: Final = "ctid"

    def __init__(self, bridge: AsyncioBridge, connection: Any) -> None:
        self._bridge = bridge
        self._connection = connection

    async def columns(self, table: str) -> Sequence[str]:
        statement = (
            "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(?) AND attnum > 0 AND NOT attisdropped "
            "ORDER BY attnum"
        )
        return [row["attname"] for row in await self.rows(statement, table)]

    async def rows(self, statement: str, *values: object) -> Sequence[Row]:
        for number in range(1, len(values) + 1):
            statement = statement.replace("?", f"${number}", 1)
        return await self._bridge.run(self._rows, statement, values)

    async def _rows(self, statement: str, values: Sequence[object]) -> Sequence[Row]:
        from asyncpg import InterfaceError, PostgresError

        try:
            return [dict(row) for row in await self._connection.fetch(statement, *values)]
        except (OSError, InterfaceError, PostgresError) as error:
            raise StorageUnavailable(f"the old database can't be read: {error}") from error


@asynccontextmanager
async def _postgresql(dsn: str) -> AsyncIterator[OldDatabase]:
    async with AsyncioBridge.open(name="agent-runtime-codelab") as bridge:
        connection = await bridge.run(_begun, dsn)
        try:
            yield _PostgreSQL(bridge, connection)
        finally:
            with anyio.CancelScope(shield=True):
                await bridge.run(_ended, connection)


async def _begun(dsn: str) -> Any:
    """A connection within a transaction that reads."""
    import asyncpg

    try:
        connection = await asyncpg.connect(
            dsn, timeout=_CONNECT_TIMEOUT_S, server_settings={"application_name": "agent-runtime import"}
        )
        # Silence is no fault here: while sessions are being written, nothing is read.
        await connection.execute("SET idle_in_transaction_session_timeout = 0")
        await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    except (OSError, ValueError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise StorageUnavailable(f"the old database can't be opened: {type(error).__name__}: {error}") from error
    return connection


async def _ended(connection: Any) -> None:
    await connection.close(timeout=_CONNECT_TIMEOUT_S)
