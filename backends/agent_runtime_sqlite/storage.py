"""Opens the file, and puts the parts together into a `Storage`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import anyio
from sqlalchemy import QueuePool
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_runtime.bridge import AsyncioBridge
from agent_runtime.changes import Batch, Receipt
from agent_runtime.storage import Abilities, Fence, LeaseDesk, PoolFigures, Snapshot, StorageConfig
from agent_runtime_sql.schema import is_current, migrate

from .apply import apply_batch, purge
from .engine import Engines, make_engines
from .errors import translated
from .filesystem import MOUNTS, prepare_file
from .lease import Clock, SqliteLeases, boot_clock
from .settings import parse_settings
from .snapshot import Readers
from .writer import Writer

__all__ = ["SqliteStorage", "open_storage"]


class SqliteStorage:
    """A SQLite file. See `agent_runtime.storage.Storage`."""

    def __init__(self, engines: Engines, writer: Writer, readers: Readers, leases: SqliteLeases) -> None:
        self._engines = engines
        self._writer = writer
        self._readers = readers
        self._leases = leases

    @property
    def abilities(self) -> Abilities:
        return Abilities(survives="power")

    @property
    def leases(self) -> LeaseDesk:
        return self._leases

    def snapshot(self, partition: int = 0) -> AbstractAsyncContextManager[Snapshot]:
        return self._readers.snapshot(partition)

    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        return await self._writer.run(apply_batch, batch, fence, datetime.now(UTC))

    async def purge(self, fence: Fence, *, now: datetime, rows_max: int) -> int:
        return await self._writer.run(purge, fence, now, rows_max)

    def figures(self) -> PoolFigures:
        pools = [cast("QueuePool", engine.sync_engine.pool) for engine in self._engines]
        return PoolFigures(size=sum(pool.size() for pool in pools), in_use=sum(pool.checkedout() for pool in pools))


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
    path = settings.path
    await anyio.to_thread.run_sync(prepare_file, path, mounts)
    async with AsyncioBridge.open(name="agent-runtime-sqlite") as bridge:
        engines = make_engines(settings)
        try:
            writer = Writer(bridge, engines.writer, path)
            if not await bridge.run(_is_current, engines, path):
                await writer.run(_migrate, f"the database {path}")
            readers = Readers(bridge, engines.readers, path, clock, settings.readers)
            yield SqliteStorage(engines, writer, readers, SqliteLeases(writer, clock))
        finally:
            with anyio.CancelScope(shield=True):
                await bridge.run(engines.dispose)


async def _is_current(engines: Engines, path: Path) -> bool:
    """Whether the tables are those of this code. Opens a connection of each kind, and so checks both."""
    with translated(path):
        async with engines.writer.connect(), engines.readers.connect() as reader:
            return await reader.run_sync(is_current)


async def _migrate(connection: AsyncConnection, name: str) -> None:
    await connection.run_sync(migrate, name)
