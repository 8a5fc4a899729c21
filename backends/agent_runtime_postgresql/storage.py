"""Opens the database, and puts the parts together into a `Storage`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from typing import Final

import anyio

from agent_runtime.bridge import AsyncioBridge
from agent_runtime.changes import Batch, Receipt
from agent_runtime.errors import StorageFatal, StorageUnavailable
from agent_runtime.storage import (
    Abilities,
    Fence,
    FirstReads,
    LeaseDesk,
    PoolFigures,
    Snapshot,
    StorageConfig,
    Survival,
)
from agent_runtime_sql.apply import apply_batch, purge
from agent_runtime_sql.schema import not_current

from .database import Database
from .lease import PostgresqlLeases
from .migration import is_current, migrate_alone
from .settings import parse_settings
from .snapshot import Readers
from .transaction import WRITES, PostgresqlTransaction
from .writer import Writer

__all__ = ["PostgresqlStorage", "open_storage"]

logger: Final = logging.getLogger(__name__)
_SETTINGS: Final = ("synchronous_commit", "fsync", "server_encoding", "transaction_read_only")


class PostgresqlStorage:
    """A PostgreSQL database. See `agent_runtime.storage.Storage`."""

    def __init__(self, database: Database, writer: Writer, survives: Survival) -> None:
        self._abilities = Abilities(survives=survives)
        self._size = database.settings.pool_size
        self._writer = writer
        self._readers = Readers(database)
        self._leases = PostgresqlLeases(writer)

    @property
    def abilities(self) -> Abilities:
        return self._abilities

    @property
    def leases(self) -> LeaseDesk:
        return self._leases

    def snapshot(self, partition: int = 0, first: FirstReads = ()) -> AbstractAsyncContextManager[Snapshot]:
        return self._readers.snapshot(partition, first)

    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        return await self._writer.run(apply_batch, batch, fence, datetime.now(UTC), WRITES)

    async def purge(self, fence: Fence, *, now: datetime, rows_max: int) -> int:
        return await self._writer.run(purge, fence, now, rows_max)

    def figures(self) -> PoolFigures:
        return PoolFigures(size=self._size, in_use=self._readers.in_use + self._writer.in_use)


@asynccontextmanager
async def open_storage(config: StorageConfig) -> AsyncIterator[PostgresqlStorage]:
    """Connect to the database of the URL, check it, and make its tables where they are missing.

    Raises InvalidInput for the URL or an option; StorageFatal for what a person must mend (credentials, TLS, no such
    database, tables of somebody else or of a newer agent-runtime); StorageUnavailable when waiting may help.
    """
    settings = parse_settings(config)
    async with AsyncioBridge.open(name="agent-runtime-postgresql") as bridge:
        database = Database(bridge, settings)
        try:
            writer = Writer(database)
            survives, current = await writer.run(_look, database)
            if config.existing and not current:
                raise not_current(database.name)
            if not current:
                await database.run(migrate_alone, settings, database.begin_writing())
            yield PostgresqlStorage(database, writer, survives)
        finally:
            with anyio.CancelScope(shield=True):
                await database.close()


async def _look(transaction: PostgresqlTransaction, database: Database) -> tuple[Survival, bool]:
    """What a stored batch survives, as the server says what it runs with; and whether the tables are there."""
    query = "SELECT " + ", ".join(f"current_setting('{name}') AS {name}" for name in _SETTINGS)
    found = await transaction.driver.fetchrow(query)
    if found["transaction_read_only"] != "off":
        raise StorageUnavailable(f"{database.name} can't be written: it is a standby, or set to read only")
    if found["server_encoding"] != "UTF8":
        raise StorageFatal(f"{database.name} is encoded in {found['server_encoding']}: make one with ENCODING 'UTF8'")
    if (answer := found["synchronous_commit"]) != "on":
        raise StorageFatal(f"{database.name} can't have synchronous_commit=on, it answers {answer}")
    return _survives(database, fsync=found["fsync"]), await is_current(transaction.driver)


def _survives(database: Database, *, fsync: str) -> Survival:
    """The loss of this machine too, when the server is on another one."""
    if fsync != "on":
        logger.warning("%s runs with fsync=%s: what it stores does not survive power loss", database.name, fsync)
        return "nothing"
    return "power" if database.settings.local else "machine"
