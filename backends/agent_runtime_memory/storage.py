"""The storage protocol over tables in memory.

Everything a call does happens between two checkpoints, in one synchronous step: a call that is cancelled has happened
whole or not at all, and other tasks run before and after it, as they would with a database.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import count
from typing import Final

from anyio.lowlevel import checkpoint

from agent_runtime.changes import Batch, Receipt
from agent_runtime.errors import InvalidInput, SequenceMismatch, StorageFatal
from agent_runtime.storage import (
    Abilities,
    Claim,
    Fence,
    FirstReads,
    Grant,
    LeaseDesk,
    PoolFigures,
    Snapshot,
    Storage,
    StorageConfig,
)

from . import leases
from .partition import Partition, purge, write
from .snapshot import MemorySnapshot
from .tables import Transaction, View

__all__ = ["MemoryDatabase"]

_ABILITIES: Final = Abilities(survives="nothing")


def _utc_now() -> datetime:
    return datetime.now(UTC)


class _Contents:
    """What all openings of a database work on."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self.now = now
        self.database_id = str(uuid.uuid4())
        self.partitions: dict[int, Partition] = {}
        self.views: set[View] = set()
        self.openings: set[int] = set()


class MemoryDatabase:
    """What one or several openings of `memory:` share: it lives as long as this object.

    Leases run by the event loop's clock; one that was taken through an opening that is closed by now is free, whatever
    the time. `now` tells which outcomes have expired.
    """

    def __init__(self, *, now: Callable[[], datetime] = _utc_now) -> None:
        self._contents = _Contents(now)
        self._opening_numbers = count(1)

    @asynccontextmanager
    async def open(self, config: StorageConfig) -> AsyncIterator[Storage]:
        """Open this database: a `StorageFactory`.

        Raises:
            InvalidInput: the URL is more than a scheme, as in `memory:`, or there are options.
        """
        scheme, _, rest = config.url.partition(":")
        if rest:
            raise InvalidInput("storage.url", f"the memory storage takes nothing behind the colon: use {scheme}:")
        for name in config.options:
            raise InvalidInput(f"storage.options.{name}", "the memory storage has no options")
        await checkpoint()
        opening = next(self._opening_numbers)
        self._contents.openings.add(opening)
        try:
            yield _MemoryStorage(self._contents, opening)
        finally:
            self._contents.openings.discard(opening)


class _MemoryStorage:
    """One opening of a database: the storage, and its lease desk."""

    def __init__(self, contents: _Contents, opening: int) -> None:
        self._contents = contents
        self._opening = opening

    @property
    def abilities(self) -> Abilities:
        return _ABILITIES

    @property
    def leases(self) -> LeaseDesk:
        return self

    @asynccontextmanager
    async def snapshot(self, partition: int = 0, first: FirstReads = ()) -> AsyncIterator[Snapshot]:
        await checkpoint()
        view = View()
        snapshot = MemorySnapshot(self._partition(partition), view, self._contents.now, self._contents.database_id)
        self._contents.views.add(view)
        try:
            await checkpoint()
            yield snapshot
        finally:
            self._contents.views.discard(view)
            snapshot.close()

    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        async with self._transaction(fence.partition) as (partition, transaction):
            standing = leases.fenced(partition, transaction, fence)
            if standing.sequence != batch.after:
                raise SequenceMismatch(batch.after, standing.sequence)
            leases.advance(partition, transaction, fence, batch.last)
            leases.replayed(partition, transaction, batch.replayed)
            write(partition, transaction, batch)
        return batch.receipt()

    async def purge(self, fence: Fence, *, now: datetime, rows_max: int) -> int:
        async with self._transaction(fence.partition) as (partition, transaction):
            leases.fenced(partition, transaction, fence)
            return purge(partition, transaction, now, rows_max)

    def figures(self) -> PoolFigures:
        return PoolFigures(size=0, in_use=0)

    async def acquire(self, claim: Claim) -> Grant:
        contents = self._contents
        async with self._transaction(claim.partition) as (partition, transaction):
            standing = leases.acquire(
                partition, transaction, claim, now=contents.now(), opening=self._opening, open_now=contents.openings
            )
        fence = Fence(partition=claim.partition, epoch=standing.epoch, journal_id=standing.journal_id)
        return Grant(fence=fence, database_id=contents.database_id, sequence=standing.sequence)

    async def renew(self, fence: Fence, duration_s: float) -> None:
        async with self._transaction(fence.partition) as (partition, transaction):
            leases.renew(partition, transaction, fence, duration_s)

    async def release(self, fence: Fence) -> None:
        async with self._transaction(fence.partition) as (partition, transaction):
            leases.release(partition, transaction, fence)

    @asynccontextmanager
    async def _transaction(self, number: int) -> AsyncIterator[tuple[Partition, Transaction]]:
        """One call: a checkpoint, a step without one that is committed unless it raises, another checkpoint."""
        await checkpoint()
        transaction = Transaction()
        yield self._partition(number), transaction
        transaction.commit(self._contents.views)
        await checkpoint()

    def _partition(self, number: int) -> Partition:
        if self._opening not in self._contents.openings:
            raise StorageFatal("the storage is closed")
        partitions = self._contents.partitions
        if number not in partitions:
            partitions[number] = Partition(number)
        return partitions[number]
