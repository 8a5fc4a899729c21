"""The reads of a storage, on a view."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TypeVar

from ..records import Order
from ..rows import ContextRow, DocumentRow, MessageRow, OutcomeRow, QuarantineRow, SessionRow, SwitchRow
from ..storage import HeadRows, JournalRow, LeaseRow, SessionKey
from .engine import View
from .layout import behind, key, span, unpack
from .standing import Standing, lease_row

__all__ = ["KeyedSnapshot"]

T = TypeVar("T")
_ALL = 2**31 - 1


class KeyedSnapshot:
    """A snapshot. The guard was read when the view began, and says its watermark."""

    def __init__(self, view: View, partition: int, standing: Standing | None) -> None:
        self._view = view
        self._partition = partition
        self._standing = standing

    @property
    def watermark(self) -> int:
        return self._standing.sequence if self._standing is not None else 0

    async def head(self, session_id: str, *, outcomes_max: int) -> HeadRows | None:
        pointer = key(self._partition, "id", session_id)
        place = (await self._view.get([pointer])).get(pointer)
        if place is None:
            return None
        session = unpack((await self._view.get([place]))[place], SessionRow)
        context = key(self._partition, "context", session.incarnation)
        found = await self._rows(OutcomeRow, span(key(self._partition, "outcome", session.incarnation)), _ALL)
        now = datetime.now(UTC)
        lasting = sorted((row for row in found if row.expires_at > now), key=lambda row: -row.sequence)
        return HeadRows(
            session=session,
            context=unpack((await self._view.get([context]))[context], ContextRow),
            outcomes=lasting[:outcomes_max],
        )

    async def messages(
        self, incarnation: str, *, after: int = 0, before: int | None = None, limit: int, order: Order = "asc"
    ) -> Sequence[MessageRow]:
        end = span(key(self._partition, "message", incarnation))[1]
        if before is not None:
            end = key(self._partition, "message", incarnation, before)
        start = behind(key(self._partition, "message", incarnation, after))
        return await self._belongings(MessageRow, incarnation, (start, end), limit, order)

    async def switches(self, incarnation: str) -> Sequence[SwitchRow]:
        return await self._belongings(SwitchRow, incarnation, span(key(self._partition, "switch", incarnation)), _ALL)

    async def document(self, incarnation: str, collection: str, key: str) -> DocumentRow | None:
        found = await self._belongings(
            DocumentRow, incarnation, self._exactly("document", incarnation, collection, key)
        )
        return found[0] if found else None

    async def documents(
        self, incarnation: str, collection: str, *, after: str = "", limit: int
    ) -> Sequence[DocumentRow]:
        start, end = span(key(self._partition, "document", incarnation, collection))
        if after:
            start = behind(key(self._partition, "document", incarnation, collection, after))
        return await self._belongings(DocumentRow, incarnation, (start, end), limit)

    async def collections(self, incarnation: str) -> Sequence[str]:
        names: list[str] = []
        start, end = span(key(self._partition, "document", incarnation))
        while found := await self._belongings(DocumentRow, incarnation, (start, end)):
            names.append(found[0].collection)
            start = behind(key(self._partition, "document", incarnation, names[-1]))
        return names

    async def sessions(
        self, *, user_id: str | None = None, after: SessionKey | None = None, limit: int, order: Order = "asc"
    ) -> Sequence[SessionRow]:
        beginning: tuple[str, ...] = ("session",) if user_id is None else ("user", user_id)
        start, end = span(key(self._partition, *beginning))
        if after is not None:
            place = key(self._partition, *beginning, after.created_at, after.incarnation)
            start, end = (behind(place), end) if order == "asc" else (start, place)
        found = await self._view.scan(start, end, limit=limit, reverse=order == "desc")
        values = [value for _, value in found]
        if user_id is not None:
            rows = await self._view.get(values)
            values = [rows[place] for place in values]
        return [unpack(value, SessionRow) for value in values]

    async def outcome(self, scope: str, key: str) -> OutcomeRow | None:
        found = await self._rows(OutcomeRow, self._exactly("outcome", scope, key), 1)
        return found[0] if found else None

    async def outcomes(self, *, after: tuple[str, str] | None = None, limit: int) -> Sequence[OutcomeRow]:
        start, end = span(key(self._partition, "outcome"))
        if after is not None:
            start = behind(key(self._partition, "outcome", *after))
        return await self._rows(OutcomeRow, (start, end), limit)

    async def quarantine(self, *, after: int = 0, limit: int) -> Sequence[QuarantineRow]:
        end = span(key(self._partition, "quarantine"))[1]
        return await self._rows(QuarantineRow, (behind(key(self._partition, "quarantine", after)), end), limit)

    async def lease(self) -> LeaseRow | None:
        return lease_row(self._standing, self._partition)

    async def journal(self, journal_id: str) -> JournalRow | None:
        return None if self._standing is None else self._standing.journals.get(journal_id)

    def _exactly(self, kind: str, *parts: str) -> tuple[bytes, bytes]:
        place = key(self._partition, kind, *parts)
        return place, behind(place)

    async def _belongings(
        self, kind: type[T], incarnation: str, bounds: tuple[bytes, bytes], limit: int = 1, order: Order = "asc"
    ) -> list[T]:
        """Rows of a session, if it is there: those of a deleted one are only purged in time."""
        pointer = key(self._partition, "incarnation", incarnation)
        return await self._rows(kind, bounds, limit, order) if await self._view.get([pointer]) else []

    async def _rows(self, kind: type[T], bounds: tuple[bytes, bytes], limit: int, order: Order = "asc") -> list[T]:
        found = await self._view.scan(*bounds, limit=limit, reverse=order == "desc")
        return [unpack(value, kind) for _, value in found]
