"""One consistent view of a partition in memory."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import islice, takewhile

import anyio
from anyio.lowlevel import checkpoint

from agent_runtime.errors import StorageFatal
from agent_runtime.records import Order
from agent_runtime.rows import DocumentRow, MessageRow, OutcomeRow, QuarantineRow, SessionRow, SwitchRow
from agent_runtime.storage import HeadRows, JournalRow, LeaseRow, SessionKey

from .partition import ALL, Partition
from .tables import View

__all__ = ["MemorySnapshot"]


class MemorySnapshot:
    """Reads through a view, until that is closed. `now` tells which outcomes have expired."""

    def __init__(self, partition: Partition, view: View, now: Callable[[], datetime], database_id: str) -> None:
        self._database_id = database_id
        self._partition = partition
        self._view = view
        self._now = now
        self._watermark = partition.standing(view).sequence
        self._closed = False

    @property
    def watermark(self) -> int:
        return self._watermark

    def close(self) -> None:
        """Nothing can be read any more."""
        self._closed = True

    async def head(self, session_id: str, *, outcomes_max: int) -> HeadRows | None:
        await self._checkpoint()
        incarnation = self._view.get(self._partition.names, (session_id,))
        if incarnation is None:
            return None
        session = self._view.get(self._partition.sessions, (incarnation,))
        context = self._view.get(self._partition.contexts, (incarnation,))
        if session is None or context is None:
            raise StorageFatal(f"the session with the incarnation {incarnation!r} is stored without its head")
        now = self._now()
        outcomes = (row for _, row in self._view.scan(self._partition.outcomes, incarnation) if row.expires_at > now)
        newest = heapq.nlargest(outcomes_max, outcomes, key=lambda row: row.sequence)
        return HeadRows(session=session, context=context, outcomes=newest)

    async def messages(
        self, incarnation: str, *, after: int = 0, before: int | None = None, limit: int, order: Order = "asc"
    ) -> Sequence[MessageRow]:
        await self._checkpoint()
        if not self._is_there(incarnation):
            return []
        found = self._view.scan(
            self._partition.messages,
            incarnation,
            after=(incarnation, after),
            before=None if before is None else (incarnation, before),
            backwards=order == "desc",
        )
        return [row for _, row in islice(found, limit)]

    async def switches(self, incarnation: str) -> Sequence[SwitchRow]:
        await self._checkpoint()
        if not self._is_there(incarnation):
            return []
        return [row for _, row in self._view.scan(self._partition.switches, incarnation)]

    async def document(self, incarnation: str, collection: str, key: str) -> DocumentRow | None:
        await self._checkpoint()
        if not self._is_there(incarnation):
            return None
        return self._view.get(self._partition.documents, (incarnation, collection, key))

    async def documents(
        self, incarnation: str, collection: str, *, after: str = "", limit: int
    ) -> Sequence[DocumentRow]:
        await self._checkpoint()
        if not self._is_there(incarnation):
            return []
        found = self._view.scan(self._partition.documents, incarnation, after=(incarnation, collection, after))
        of_collection = takewhile(lambda row: row.collection == collection, (row for _, row in found))
        return list(islice(of_collection, limit))

    async def collections(self, incarnation: str) -> Sequence[str]:
        await self._checkpoint()
        if not self._is_there(incarnation):
            return []
        return sorted({row.collection for _, row in self._view.scan(self._partition.documents, incarnation)})

    async def sessions(
        self, *, user_id: str | None = None, after: SessionKey | None = None, limit: int, order: Order = "asc"
    ) -> Sequence[SessionRow]:
        await self._checkpoint()
        group = ALL if user_id is None else user_id
        place = None if after is None else (group, after.created_at, after.incarnation)
        if order == "asc":
            found = self._view.scan(self._partition.listing, group, after=place)
        else:
            found = self._view.scan(self._partition.listing, group, before=place, backwards=True)
        rows = (self._view.get(self._partition.sessions, (incarnation,)) for _, incarnation in islice(found, limit))
        return [row for row in rows if row is not None]

    async def outcome(self, scope: str, key: str) -> OutcomeRow | None:
        await self._checkpoint()
        return self._view.get(self._partition.outcomes, (scope, key))

    async def outcomes(self, *, after: tuple[str, str] | None = None, limit: int) -> Sequence[OutcomeRow]:
        await self._checkpoint()
        keys = (key for _, key in self._view.scan(self._partition.expiries, ALL) if after is None or key > after)
        rows = (self._view.get(self._partition.outcomes, key) for key in heapq.nsmallest(limit, keys))
        return [row for row in rows if row is not None]

    async def quarantine(self, *, after: int = 0, limit: int) -> Sequence[QuarantineRow]:
        await self._checkpoint()
        found = self._view.scan(self._partition.quarantine, ALL, after=(ALL, after))
        return [row for _, row in islice(found, limit)]

    async def lease(self) -> LeaseRow | None:
        await self._checkpoint()
        standing = self._partition.standing(self._view)
        if not standing.epoch:
            return None
        expires_at = standing.expires_at
        return LeaseRow(
            partition=self._partition.number,
            database_id=self._database_id,
            epoch=standing.epoch,
            holder=standing.holder,
            host=standing.host,
            pid=standing.pid,
            address=standing.address,
            journal_id=standing.journal_id,
            acquired_at=standing.acquired_at,
            expires_in_s=None if expires_at is None else expires_at - anyio.current_time(),
        )

    async def journal(self, journal_id: str) -> JournalRow | None:
        await self._checkpoint()
        return self._view.get(self._partition.journals, (journal_id,))

    def _is_there(self, incarnation: str) -> bool:
        return self._view.get(self._partition.sessions, (incarnation,)) is not None

    async def _checkpoint(self) -> None:
        await checkpoint()
        if self._closed:
            raise StorageFatal("the snapshot is closed")
