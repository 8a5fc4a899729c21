"""The storage on an engine: a write is planned on a view, and committed if the guard still is what that showed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final, TypeVar

from ..changes import Batch, Receipt
from ..errors import LeaseLost, StorageUnavailable
from ..storage import Abilities, Claim, Fence, FirstReads, Grant, LeaseDesk, PoolFigures, Snapshot
from .batches import plan_batch, plan_purge
from .engine import Engine, View
from .layout import Writes, key, unpack
from .snapshot import KeyedSnapshot
from .standing import Standing, advanced, fenced, granted, released, renewed

__all__ = ["KeyedStorage"]

T = TypeVar("T")
_TRIES: Final = 100
"""A batch meets a renewal now and then; more than a few tries in a row is an engine that never commits."""


class KeyedStorage:
    """A storage, and its lease desk. What opens and closes the engine is the author's."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def abilities(self) -> Abilities:
        return self._engine.abilities

    @property
    def leases(self) -> LeaseDesk:
        return self

    @asynccontextmanager
    async def snapshot(self, partition: int = 0, first: FirstReads = ()) -> AsyncIterator[Snapshot]:
        async with self._engine.view() as view:
            _, standing = await _standing_of(view, partition)
            yield KeyedSnapshot(view, partition, standing)

    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        async def plan(view: View, standing: Standing | None, writes: Writes) -> tuple[Standing, Receipt]:
            after = advanced(standing, batch, fence)
            await plan_batch(view, fence.partition, batch, writes)
            return after, batch.receipt()

        return await self._write(fence.partition, plan)

    async def purge(self, fence: Fence, *, now: datetime, rows_max: int) -> int:
        async def plan(view: View, standing: Standing | None, writes: Writes) -> tuple[Standing, int]:
            return fenced(standing, fence), await plan_purge(view, fence.partition, now, rows_max, writes)

        return await self._write(fence.partition, plan)

    def figures(self) -> PoolFigures:
        return self._engine.figures()

    async def acquire(self, claim: Claim) -> Grant:
        async def plan(_: View, standing: Standing | None, __: Writes) -> tuple[Standing, Grant]:
            after = granted(standing, claim)
            fence = Fence(partition=claim.partition, epoch=after.epoch, journal_id=claim.journal_id)
            return after, Grant(fence=fence, database_id=after.database_id, sequence=after.sequence)

        return await self._write(claim.partition, plan)

    async def renew(self, fence: Fence, duration_s: float) -> None:
        async def plan(_: View, standing: Standing | None, __: Writes) -> tuple[Standing, None]:
            return renewed(standing, fence, duration_s), None

        await self._write(fence.partition, plan)

    async def release(self, fence: Fence) -> None:
        async def plan(_: View, standing: Standing | None, __: Writes) -> tuple[Standing, None]:
            return released(standing, fence), None

        try:
            await self._write(fence.partition, plan)
        except LeaseLost:
            return

    async def _write(
        self, partition: int, plan: Callable[[View, Standing | None, Writes], Awaitable[tuple[Standing, T]]]
    ) -> T:
        guard = key(partition, "standing")
        for _ in range(_TRIES):
            writes = Writes()
            async with self._engine.view() as view:
                expected, standing = await _standing_of(view, partition)
                after, result = await plan(view, standing, writes)
            writes.put(guard, after)
            if await self._engine.commit(guard, expected, writes.puts, writes.deletes - writes.puts.keys()):
                return result
        raise StorageUnavailable("others write to the same partition all the time")


async def _standing_of(view: View, partition: int) -> tuple[bytes | None, Standing | None]:
    guard = key(partition, "standing")
    value = (await view.get([guard])).get(guard)
    return value, None if value is None else unpack(value, Standing)
