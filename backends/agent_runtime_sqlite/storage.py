"""Opens the file, and puts the parts together into a `Storage`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import anyio

from agent_runtime.bridge import AsyncioBridge
from agent_runtime.changes import Batch, Receipt
from agent_runtime.filesystems import MOUNTS
from agent_runtime.process import boot_clock
from agent_runtime.storage import (
    Abilities,
    Fence,
    FirstReads,
    LeaseDesk,
    PoolFigures,
    Snapshot,
    StorageConfig,
)
from agent_runtime_sql.apply import apply_batch, purge
from agent_runtime_sql.schema import migrate, not_current

from .database import Database
from .filesystem import find_file, prepare_file
from .lease import Clock, SqliteLeases
from .settings import parse_settings
from .snapshot import Readers
from .transaction import WRITES, SqliteTransaction
from .writer import Writer

__all__ = ["SqliteStorage", "open_storage"]


class SqliteStorage:
    """A SQLite file. See `agent_runtime.storage.Storage`."""

    def __init__(self, path: Path, database: Database, writer: Writer, clock: Clock) -> None:
        self._abilities = Abilities(survives="power", journal_directory=f"{path}.journal", scrubs=True)
        self._database = database
        self._writer = writer
        self._readers = Readers(database, clock)
        self._leases = SqliteLeases(writer, clock)

    @property
    def abilities(self) -> Abilities:
        return self._abilities

    @property
    def leases(self) -> LeaseDesk:
        return self._leases

    def snapshot(self, partition: int = 0, first: FirstReads = ()) -> AbstractAsyncContextManager[Snapshot]:
        return self._readers.snapshot(partition)

    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        return await self._writer.run(apply_batch, batch, fence, datetime.now(UTC), WRITES)

    async def purge(self, fence: Fence, *, now: datetime, rows_max: int) -> int:
        return await self._writer.run(purge, fence, now, rows_max)

    async def scrub(self) -> None:
        await self._writer.truncate_log()  # it still has pages as they were; in the file they are overwritten

    def figures(self) -> PoolFigures:
        return self._database.figures()


@asynccontextmanager
async def open_storage(
    config: StorageConfig, *, clock: Clock = boot_clock, mounts: Path = MOUNTS
) -> AsyncIterator[SqliteStorage]:
    """Open the database of the URL; make the file (mode 0600), its directory and its tables where they are missing.

    `clock` counts the seconds of leases, `mounts` is the table of mounted filesystems.

    Raises InvalidInput for the URL or an option; StorageFatal for what a person must mend (the path, a network
    filesystem, a damaged file, one of another program or of a newer agent-runtime); StorageUnavailable when the file is
    locked.
    """
    settings = parse_settings(config)
    await anyio.to_thread.run_sync(find_file if config.existing else prepare_file, settings.path, mounts)
    async with AsyncioBridge.open(name="agent-runtime-sqlite") as bridge:
        database = Database(bridge, settings)
        try:
            writer = Writer(database)
            current = await database.run(database.is_current)
            if config.existing and not current:
                raise not_current(database.name)
            await database.run(database.connect)
            if not current:
                await writer.run(_migrate, database.name)
            yield SqliteStorage(settings.path, database, writer, clock)
        finally:
            with anyio.CancelScope(shield=True):
                await database.close()


async def _migrate(transaction: SqliteTransaction, name: str) -> None:
    await transaction.connection.run_sync(migrate, name)
