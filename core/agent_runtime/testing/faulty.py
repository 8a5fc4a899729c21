"""The storage that a plan of faults strikes: every call goes through the plan to the storage inside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import cast

from msgspec.structs import replace

from agent_runtime.changes import Batch, Receipt
from agent_runtime.hookspecs import hookimpl
from agent_runtime.records import Order
from agent_runtime.rows import DocumentRow, MessageRow, OutcomeRow, QuarantineRow, SessionRow, SwitchRow
from agent_runtime.storage import (
    Abilities,
    Claim,
    Fence,
    FirstReads,
    Grant,
    HeadRows,
    JournalRow,
    LeaseDesk,
    LeaseRow,
    PoolFigures,
    Scrubs,
    SessionKey,
    Snapshot,
    Storage,
    StorageConfig,
    StorageFactory,
)

from .faults import Faults

__all__ = ["FaultyStorage", "faulty_plugin"]


class FaultyStorage:
    """A storage, its lease desk and its snapshots: those of `inner`, as far as `faults` lets them."""

    def __init__(self, inner: Storage, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self._leases = _FaultyLeases(inner.leases, faults)

    @property
    def abilities(self) -> Abilities:
        return self._inner.abilities

    @property
    def leases(self) -> LeaseDesk:
        return self._leases

    @asynccontextmanager
    async def snapshot(self, partition: int = 0, first: FirstReads = ()) -> AsyncIterator[Snapshot]:
        async with AsyncExitStack() as stack:
            inner = self._inner.snapshot(partition, first)
            snapshot = await self._faults.call("snapshot", lambda: stack.enter_async_context(inner))
            yield _FaultySnapshot(snapshot, self._faults)

    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        return await self._faults.call("apply", lambda: self._inner.apply(batch, fence), batch)

    async def purge(self, fence: Fence, *, now: datetime, rows_max: int) -> int:
        return await self._faults.call("purge", lambda: self._inner.purge(fence, now=now, rows_max=rows_max))

    async def scrub(self) -> None:
        await cast("Scrubs", self._inner).scrub()

    def figures(self) -> PoolFigures:
        return self._inner.figures()


class _FaultyLeases:
    def __init__(self, inner: LeaseDesk, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    async def acquire(self, claim: Claim) -> Grant:
        return await self._faults.call("acquire", lambda: self._inner.acquire(claim))

    async def renew(self, fence: Fence, duration_s: float) -> None:
        await self._faults.call("renew", lambda: self._inner.renew(fence, duration_s))

    async def release(self, fence: Fence) -> None:
        await self._faults.call("release", lambda: self._inner.release(fence))


class _FaultySnapshot:
    def __init__(self, inner: Snapshot, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    @property
    def watermark(self) -> int:
        return self._inner.watermark

    async def head(self, session_id: str, *, outcomes_max: int) -> HeadRows | None:
        return await self._faults.call("head", lambda: self._inner.head(session_id, outcomes_max=outcomes_max))

    async def messages(
        self, incarnation: str, *, after: int = 0, before: int | None = None, limit: int, order: Order = "asc"
    ) -> Sequence[MessageRow]:
        return await self._faults.call(
            "messages",
            lambda: self._inner.messages(incarnation, after=after, before=before, limit=limit, order=order),
        )

    async def switches(self, incarnation: str) -> Sequence[SwitchRow]:
        return await self._faults.call("switches", lambda: self._inner.switches(incarnation))

    async def document(self, incarnation: str, collection: str, key: str) -> DocumentRow | None:
        return await self._faults.call("document", lambda: self._inner.document(incarnation, collection, key))

    async def documents(
        self, incarnation: str, collection: str, *, after: str = "", limit: int
    ) -> Sequence[DocumentRow]:
        return await self._faults.call(
            "documents", lambda: self._inner.documents(incarnation, collection, after=after, limit=limit)
        )

    async def collections(self, incarnation: str) -> Sequence[str]:
        return await self._faults.call("collections", lambda: self._inner.collections(incarnation))

    async def sessions(
        self, *, user_id: str | None = None, after: SessionKey | None = None, limit: int, order: Order = "asc"
    ) -> Sequence[SessionRow]:
        return await self._faults.call(
            "sessions", lambda: self._inner.sessions(user_id=user_id, after=after, limit=limit, order=order)
        )

    async def outcome(self, scope: str, key: str) -> OutcomeRow | None:
        return await self._faults.call("outcome", lambda: self._inner.outcome(scope, key))

    async def outcomes(self, *, after: tuple[str, str] | None = None, limit: int) -> Sequence[OutcomeRow]:
        return await self._faults.call("outcomes", lambda: self._inner.outcomes(after=after, limit=limit))

    async def quarantine(self, *, after: int = 0, limit: int) -> Sequence[QuarantineRow]:
        return await self._faults.call("quarantine", lambda: self._inner.quarantine(after=after, limit=limit))

    async def lease(self) -> LeaseRow | None:
        return await self._faults.call("lease", self._inner.lease)

    async def journal(self, journal_id: str) -> JournalRow | None:
        return await self._faults.call("journal", lambda: self._inner.journal(journal_id))


class _FaultyPlugin:
    def __init__(self, inner_factory: StorageFactory, faults: Faults, scheme: str) -> None:
        self._inner_factory = inner_factory
        self._faults = faults
        self._scheme = scheme

    @hookimpl
    def agent_runtime_storages(self) -> Mapping[str, StorageFactory]:
        return {self._scheme: self._open}

    @asynccontextmanager
    async def _open(self, config: StorageConfig) -> AsyncIterator[Storage]:
        async with AsyncExitStack() as stack:
            inner = self._inner_factory(replace(config, url=config.url.removeprefix(f"{self._scheme}:")))
            storage = await self._faults.call("open", lambda: stack.enter_async_context(inner))
            yield FaultyStorage(storage, self._faults)


def faulty_plugin(inner_factory: StorageFactory, faults: Faults, *, scheme: str = "faulty") -> object:
    """A plugin whose URL is `faulty:` and the URL of `inner_factory`, whose storages it wraps: `faulty:memory:`."""
    return _FaultyPlugin(inner_factory, faults, scheme)
