"""Keeps sessions in DuckDB: `duckdb:///data/sessions.duckdb`.

One table of keys and values. The engine gives each transaction a snapshot, syncs each commit to the disk, and lets one
process at a time have the file open.
"""

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from threading import Lock
from typing import Any, TypeVar

import anyio
import duckdb

from agent_runtime import InvalidInput, StorageFatal, StorageUnavailable, hookimpl
from agent_runtime.keyed import KeyedStorage, View
from agent_runtime.storage import Abilities, PoolFigures, Storage, StorageConfig, StorageFactory

T = TypeVar("T")
OPENING = Lock()
TABLE = "CREATE TABLE IF NOT EXISTS items (key BLOB PRIMARY KEY, value BLOB)"
GET = "SELECT key, value FROM items WHERE key IN (SELECT unnest($1::BLOB[]))"
SCAN = "SELECT key, value FROM items WHERE key >= $1 AND key < $2 ORDER BY key {order} LIMIT $3"
DELETE = "DELETE FROM items WHERE key IN (SELECT unnest($1::BLOB[]))"
PUT = "INSERT OR REPLACE INTO items SELECT unnest($1::BLOB[]), unnest($2::BLOB[])"


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Call in a thread. A call that is cancelled ends first, so that no statement is left running."""
    try:
        return await anyio.to_thread.run_sync(function, *arguments)
    except duckdb.Error as error:  # its message may hold values
        raise StorageUnavailable(f"DuckDB raised {type(error).__name__}") from None


class DuckDBView:
    """A transaction that only reads."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection

    async def get(self, keys: Collection[bytes]) -> Mapping[bytes, bytes]:
        return dict(await in_thread(self._rows, GET, [*keys]))

    async def scan(
        self, start: bytes, end: bytes, *, limit: int, reverse: bool = False
    ) -> Sequence[tuple[bytes, bytes]]:
        query = SCAN.format(order="DESC" if reverse else "ASC")
        return await in_thread(self._rows, query, start, end, limit)

    def _rows(self, query: str, *parameters: object) -> list[Any]:
        return self._connection.execute(query, parameters).fetchall()


class DuckDBEngine:
    """One opening of a file. Each view and each commit has a connection of its own."""

    def __init__(self, path: str) -> None:
        self.abilities = Abilities(survives="power", journal_directory=f"{path}.journal")
        with OPENING:  # two that make the table at once would be in conflict
            self._database = duckdb.connect(path)
            self._database.execute(TABLE)
        self._views = 0

    def close(self) -> None:
        self._database.close()

    @asynccontextmanager
    async def view(self) -> AsyncIterator[View]:
        connection = await in_thread(self._begin)
        self._views += 1
        try:
            yield DuckDBView(connection)
        finally:
            self._views -= 1
            connection.close()

    def _begin(self) -> duckdb.DuckDBPyConnection:
        connection = self._database.cursor().begin()
        connection.execute("SELECT 1 FROM items LIMIT 1")  # the snapshot is taken by the first query
        return connection

    async def commit(
        self, guard: bytes, expected: bytes | None, puts: Mapping[bytes, bytes], deletes: Collection[bytes]
    ) -> bool:
        return await in_thread(self._commit, guard, expected, puts, [*deletes])

    def _commit(self, guard: bytes, expected: bytes | None, puts: Mapping[bytes, bytes], deletes: list[bytes]) -> bool:
        with closing(self._database.cursor()) as connection:
            try:
                connection.begin()
                if dict(connection.execute(GET, [[guard]]).fetchall()).get(guard) != expected:
                    return False
                connection.execute(DELETE, [deletes])
                connection.execute(PUT, [[*puts], [*puts.values()]])
                connection.commit()
            except (duckdb.TransactionException, duckdb.ConstraintException):  # another one wrote the guard meanwhile
                return False
            return True

    def figures(self) -> PoolFigures:
        return PoolFigures(size=self._views, in_use=self._views)


@asynccontextmanager
async def open_duckdb(config: StorageConfig) -> AsyncIterator[Storage]:
    scheme, _, path = config.url.partition(":///")
    if not path:
        raise InvalidInput("storage.url", f"names no file: {scheme}:///data/sessions.duckdb")
    for name in config.options:
        raise InvalidInput(f"storage.options.{name}", "DuckDB has no options here")
    try:
        engine = await anyio.to_thread.run_sync(DuckDBEngine, path)
    except duckdb.Error as error:
        raise StorageFatal(f"{path} can't be opened: {error}") from error
    try:
        yield KeyedStorage(engine)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(engine.close)


@hookimpl
def agent_runtime_storages() -> Mapping[str, StorageFactory]:
    return {"duckdb": open_duckdb}
