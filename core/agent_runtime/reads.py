"""Reads: what the database has, with the changes in memory laid over it.

Guarantees: every read shows every change acknowledged before it began, and the state of one moment; what is wholly in
memory is answered without an await. The overlay works like this: before the database is asked, the resident is pinned,
so that no change is let go that the view may lack (residents.py). After the last await, in one synchronous step, the
rows are cut to what memory does not hold (`tail_from`), and pending removals, the floor and the tail are applied as
they are now.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Raw

from .door import Door
from .errors import InvalidInput, SessionNotFound
from .history import leading_message, limited_history
from .records import AgentSwitch, Document, Message, Order, Page, Session
from .residents import Resident, encode_to_keep, message_bytes
from .rows import DocumentRow, MessageRow, SessionRow, SwitchRow
from .storage import MessagesRead, SessionKey, Snapshot
from .validation import check_id, check_time

__all__ = ["Reads", "document_record", "read_message"]

_CHUNK: Final = 500
T = TypeVar("T")

read_message: Final[Callable[[Raw | bytes | str], Message]] = msgspec.json.Decoder(Message).decode
_decode: Final[Callable[[str], Any]] = msgspec.json.Decoder().decode


def _message(row: MessageRow) -> Message:
    decode = _decode
    return Message(
        seq=row.seq,
        id=row.id,
        role=row.role,  # type: ignore[arg-type]  # checked at the door
        content=row.content if row.parts is None else decode(row.parts),
        name=row.name,
        tool_calls=None if row.tool_calls is None else decode(row.tool_calls),
        tool_call_id=row.tool_call_id,
        token_count=row.token_count,
        metadata=None if row.metadata is None else decode(row.metadata),
        extra=None if row.extra is None else decode(row.extra),
        created_at=row.created_at,
    )


def _switch(row: SwitchRow) -> AgentSwitch:
    return AgentSwitch(
        from_agent=row.from_agent,
        to_agent=row.to_agent,
        reason=row.reason,
        switched_at=row.switched_at,
        metadata=None if row.metadata is None else msgspec.json.decode(row.metadata),
    )


def document_record(row: DocumentRow) -> Document:
    """The document of a row."""
    return Document(
        collection=row.collection,
        key=row.key,
        value=row.data if row.value is None else msgspec.json.decode(row.value),
        media_type=row.media_type,
        updated_at=row.updated_at,
    )


def _session(row: SessionRow) -> Session:
    return Session(
        session_id=row.session_id,
        user_id=row.user_id,
        title=row.title,
        description=row.description,
        metadata=msgspec.json.decode(row.metadata),
        created_at=row.created_at,
        last_activity=row.last_activity,
        message_count=row.message_count,
        incarnation=row.incarnation,
    )


def _removed(resident: Resident) -> set[int]:
    """The seqs of messages that a view of the database may still have."""
    return {seq for change in resident.changes for seq in change.removed}


def _foreseen(
    incarnation: str,
    resident: Resident | None,
    *,
    after: int = 0,
    before: int | None = None,
    limit: int,
    order: Order = "asc",
) -> MessagesRead:
    """What a span will read first, or more than that: of a session that is not in memory it is not known how much."""
    if resident is not None and (before is None or before > resident.tail_from):
        before = resident.tail_from + 1
    return MessagesRead(incarnation=incarnation, after=after, before=before, limit=limit, order=order)


class _Span:
    """Messages of one session below its tail, read in one view: all there are from the first to `high`.

    `ceiling` is a seq above which nothing is wanted.
    """

    def __init__(self, snapshot: Snapshot, resident: Resident, *, ceiling: int | None = None) -> None:
        self._snapshot = snapshot
        self._resident = resident
        self._ceiling = ceiling
        self._messages: list[Message] = []
        self.high = self._goal
        self.more = self.high > resident.floor

    @property
    def _goal(self) -> int:
        tail_from = self._resident.tail_from
        return tail_from if self._ceiling is None else min(tail_from, self._ceiling)

    async def read_older(self, count: int) -> None:
        """Put up to `count` older messages before those read; `more` tells whether there may be others."""
        rows = await self._snapshot.messages(
            self._resident.incarnation,
            after=self._resident.floor,
            before=self._messages[0].seq if self._messages else self.high + 1,
            limit=count,
            order="desc",
        )
        self._messages[:0] = map(_message, reversed(rows))
        self.more = len(rows) == count
        while self.high < (goal := self._goal):  # some left the tail meanwhile: close the gap
            rows = await self._snapshot.messages(
                self._resident.incarnation, after=self.high, before=goal + 1, limit=_CHUNK
            )
            self._messages.extend(map(_message, rows))
            self.high = rows[-1].seq if len(rows) == _CHUNK else goal

    async def read_newer(self, after: int, count: int) -> None:
        """Add up to `count` messages behind `after` and those read; `more` tells whether there may be others."""
        goal = self._goal
        last = max(self._messages[-1].seq, after) if self._messages else after
        rows = await self._snapshot.messages(self._resident.incarnation, after=last, before=goal + 1, limit=count)
        self._messages.extend(map(_message, rows))
        self.more = len(rows) == count or self._goal > goal

    def visible(self) -> list[Message]:
        """The messages that are still there now and not in the tail."""
        resident = self._resident
        removed = _removed(resident)
        floor, tail_from = resident.floor, resident.tail_from
        messages = self._messages
        if not removed and (not messages or (floor < messages[0].seq and messages[-1].seq <= tail_from)):
            return messages.copy()
        return [each for each in messages if floor < each.seq <= tail_from and each.seq not in removed]


class Reads:
    """The reads of all handles."""

    def __init__(self, door: Door, *, tail_messages: int) -> None:
        self._door = door
        self._tail_messages = tail_messages

    async def messages(
        self, session_id: str, incarnation: str, *, after: int | None, limit: int, order: Order
    ) -> Page[Message]:
        """A page of messages, in order of seq; `after` is the seq that the page comes behind."""
        page, resident = None, self._door.find(session_id, incarnation)
        if resident is not None:
            page = self._newer(resident, after or 0, limit) if order == "asc" else self._older(resident, after, limit)
        if page is None:
            if order == "asc":
                first = _foreseen(incarnation, resident, after=after or 0, limit=limit + 1)
            else:
                first = _foreseen(incarnation, resident, before=after, limit=limit + 1, order=order)
            async with self._door.reading(session_id, incarnation, resident, [first]) as (resident, snapshot):
                page = await (
                    self._read_newer(snapshot, resident, after or 0, limit)
                    if order == "asc"
                    else self._read_older(snapshot, resident, after, limit)
                )
        items = page[:limit]
        return Page(items, items[-1].seq if len(page) > limit else None)

    @staticmethod
    def _newer(resident: Resident, after: int, limit: int) -> list[Message] | None:
        """Up to `limit` + 1 messages behind `after`, if all are in memory."""
        if max(after, resident.floor) < resident.tail_from:
            return None
        start = bisect_right(resident.tail_seqs, after)
        return [read_message(raw) for raw in resident.tail[start : start + limit + 1]]

    @staticmethod
    def _older(resident: Resident, before: int | None, limit: int) -> list[Message] | None:
        """Up to `limit` + 1 messages before `before`, newest first, if all are in memory."""
        end = len(resident.tail) if before is None else bisect_left(resident.tail_seqs, before)
        if end <= limit and resident.floor < resident.tail_from:
            return None
        return [read_message(raw) for raw in reversed(resident.tail[max(0, end - limit - 1) : end])]

    async def _read_newer(self, snapshot: Snapshot, resident: Resident, after: int, limit: int) -> list[Message]:
        span = _Span(snapshot, resident)
        found: list[Message] = []
        while span.more and len(found) <= limit:
            await span.read_newer(max(after, resident.floor), limit + 1)
            found = span.visible()
        self._check(resident)
        if len(found) <= limit:
            start = bisect_right(resident.tail_seqs, after)
            found += map(read_message, resident.tail[start : start + limit + 1 - len(found)])
        return found

    async def _read_older(
        self, snapshot: Snapshot, resident: Resident, before: int | None, limit: int
    ) -> list[Message]:
        span = _Span(snapshot, resident, ceiling=None if before is None else before - 1)
        while True:
            end = len(resident.tail) if before is None else bisect_left(resident.tail_seqs, before)
            found = [each for each in span.visible() if before is None or each.seq < before]
            if not span.more or len(found) + end > limit:
                break
            await span.read_older(limit + 1)
        self._check(resident)
        found += map(read_message, resident.tail[:end])
        if before is None:
            self._warm(resident, span)
        return found[: -limit - 2 : -1]

    async def message(self, session_id: str, incarnation: str, seq: int) -> Message | None:
        """One message; None when there is none with this seq."""
        page = await self.messages(session_id, incarnation, after=seq - 1, limit=1, order="asc")
        return page.items[0] if page.items and page.items[0].seq == seq else None

    async def history(self, session_id: str, incarnation: str, limit: int | None) -> list[dict[str, Any]]:
        """The history in chat format, valid for a model; with `limit`, its newest whole tool groups."""
        resident = self._door.find(session_id, incarnation)
        return await self._read_history(session_id, incarnation, resident, limit, lambda _resident, history: history)

    async def history_json(self, session_id: str, incarnation: str, limit: int | None) -> bytes:
        """The history as JSON text; kept with the resident until its messages change."""
        resident = self._door.find(session_id, incarnation)
        if resident is not None and resident.chat is not None and resident.chat[0] == limit:
            return resident.chat[1]

        def encode(resident: Resident, history: list[dict[str, Any]]) -> bytes:
            data = encode_to_keep(history)
            self._door.residents.keep_chat(resident, limit, data)
            return data

        return await self._read_history(session_id, incarnation, resident, limit, encode)

    async def _read_history(
        self,
        session_id: str,
        incarnation: str,
        resident: Resident | None,
        limit: int | None,
        finish: Callable[[Resident, list[dict[str, Any]]], T],
    ) -> T:
        """What `finish` makes of the history, in the step in which it is true, and while the resident is in memory.

        `resident` is what the door found of it just now.
        """
        if resident is not None:
            whole = resident.tail_from <= resident.floor
            if whole or (limit is not None and resident.lead_known):
                history = self._history(resident, [], limit, at_start=whole)
                if history is not None:
                    return finish(resident, history)
        chunk = _CHUNK if limit is None else max(limit, 50)
        first = _foreseen(incarnation, resident, limit=chunk, order="desc")
        async with self._door.reading(session_id, incarnation, resident, [first]) as (resident, snapshot):
            span = _Span(snapshot, resident)
            while True:
                if span.more:
                    await span.read_older(chunk)
                if span.more and limit is None:
                    continue
                if span.more and not resident.lead_known:
                    self._learn_lead(resident, await self._first(snapshot, resident))
                    await span.read_older(1)
                self._check(resident)
                whole = not span.more or resident.tail_from <= resident.floor
                if not whole and not resident.lead_known:
                    continue  # it was removed meanwhile
                history = self._history(resident, span.visible(), limit, at_start=whole)
                if history is not None:
                    self._warm(resident, span)
                    return finish(resident, history)

    @staticmethod
    async def _first(snapshot: Snapshot, resident: Resident) -> Message | None:
        """The first message of a history that begins below the tail."""
        while True:
            floor, count = resident.floor, 1 + len(_removed(resident))
            rows = await snapshot.messages(resident.incarnation, after=floor, limit=count)
            removed = _removed(resident)
            left = [row for row in rows if row.seq not in removed]
            if resident.floor == floor and (left or len(rows) < count):
                return _message(left[0]) if left else None

    def _learn_lead(self, resident: Resident, first: Message | None) -> None:
        """`first` is the first message below the tail; None: there is none, so the tail begins the history."""
        before = resident.bytes
        if first is None:
            resident.warm([], [], tail_from=resident.floor)
        else:
            lead = leading_message(first)
            resident.learn_lead(None if lead is None else Raw(encode_to_keep(lead)))
        self._door.residents.resize(resident, before)

    @staticmethod
    def _history(
        resident: Resident, older: list[Message], limit: int | None, *, at_start: bool
    ) -> list[dict[str, Any]] | None:
        window = [*older, *map(read_message, resident.tail)]
        lead = None if resident.lead is None else read_message(resident.lead)
        return limited_history(window, limit, at_start=at_start, leading=lead)

    async def warm(self, resident: Resident) -> None:
        """Load the newest messages, at least one if there are any, into the tail."""
        async with self._door.view(resident) as snapshot:
            span = _Span(snapshot, resident)
            while span.more and not resident.tail and not span.visible():
                await span.read_older(max(1, self._tail_messages // 4) + len(_removed(resident)))
            self._check(resident)
            self._warm(resident, span, least=1)

    def _warm(self, resident: Resident, span: _Span, *, least: int = 0) -> None:
        """Keep in the tail what was read just below it, as far as there is room; at least the `least` newest."""
        residents = self._door.residents
        room = 0 if residents.crowded else self._tail_messages - len(resident.tail)
        room_bytes = residents.share_bytes - resident.tail_bytes
        messages = span.visible()
        kept: list[Message] = []
        encoded: list[Raw] = []
        for message in reversed(messages):
            raw = Raw(encode_to_keep(message))
            room_bytes -= message_bytes(raw)
            if len(kept) >= least and (len(kept) >= room or room_bytes < 0):
                break
            kept.append(message)
            encoded.append(raw)
        whole = not span.more and len(kept) == len(messages)
        if (kept or whole) and not resident.deleted:
            before = resident.bytes
            resident.warm(
                encoded[::-1],
                [each.seq for each in reversed(kept)],
                tail_from=resident.floor if whole else kept[-1].seq - 1,
            )
            residents.resize(resident, before)

    async def switches(self, session_id: str, incarnation: str) -> list[AgentSwitch]:
        """All hand-overs, oldest first."""
        resident = self._door.find(session_id, incarnation)
        if resident is not None and resident.context.switch_count == 0:
            return []
        async with self._door.reading(session_id, incarnation, resident) as (resident, snapshot):
            stored = await snapshot.switches(incarnation) if resident.context.switch_count else ()
            rows = {row.number: row for row in stored}
            rows.update((row.number, row) for change in resident.changes for row in change.switches)
            self._check(resident)
            return [_switch(rows[number]) for number in sorted(rows)]

    async def document(self, session_id: str, incarnation: str, collection: str, key: str) -> Document | None:
        """One document."""
        row, _ = await self.document_row(session_id, incarnation, collection, key)
        return None if row is None else document_record(row)

    async def document_row(
        self, session_id: str, incarnation: str, collection: str, key: str
    ) -> tuple[DocumentRow | None, int]:
        """One document's row, and the resident's `documents_at` for which that holds."""
        resident = self._door.find(session_id, incarnation)
        if resident is not None:
            known, row = self._pending_document(resident, collection, key)
            if known:
                return row, resident.documents_at
        async with self._door.reading(session_id, incarnation, resident) as (resident, snapshot):
            stored = await snapshot.document(incarnation, collection, key)
            self._check(resident)
            known, row = self._pending_document(resident, collection, key)
            return (row if known else stored), resident.documents_at

    @staticmethod
    def _pending_document(resident: Resident, collection: str, key: str) -> tuple[bool, DocumentRow | None]:
        for changes in (reversed(resident.pending), reversed(resident.held)):
            for change in changes:
                if (collection, key) in change.discarded:
                    return True, None
                for row in change.documents:
                    if row.collection == collection and row.key == key:
                        return True, row
        return False, None

    async def documents(
        self, session_id: str, incarnation: str, collection: str, *, cursor: str | None, limit: int
    ) -> Page[Document]:
        """A page of a collection, in order of key; `cursor` is the key that it comes behind."""
        after = cursor or ""
        found = self._door.find(session_id, incarnation)
        async with self._door.reading(session_id, incarnation, found) as (resident, snapshot):
            stored: list[DocumentRow] = []
            more = True
            while True:
                rows = {row.key: row for row in stored}
                for change in resident.changes:
                    for row in change.documents:
                        if row.collection == collection and row.key > after:
                            rows[row.key] = row
                    for discarded_from, key in change.discarded:
                        if discarded_from == collection:
                            rows.pop(key, None)
                keys = sorted(key for key in rows if not more or (stored and key <= stored[-1].key))
                if not more or len(keys) > limit:
                    break
                chunk = await snapshot.documents(
                    incarnation, collection, after=stored[-1].key if stored else after, limit=limit + 1
                )
                more = len(chunk) == limit + 1
                stored.extend(chunk)
            self._check(resident)
            items = [document_record(rows[key]) for key in keys[:limit]]
            return Page(items, items[-1].key if len(keys) > limit else None)

    async def sessions(self, *, user_id: str | None, limit: int, cursor: str | None, order: Order) -> Page[Session]:
        """A page of sessions in order of (created_at, incarnation)."""
        after = None if cursor is None else _read_cursor(cursor)
        residents = self._door.residents
        async with self._door.view(None) as snapshot:
            stored: list[SessionRow] = []
            more = True
            while True:
                last = SessionKey(stored[-1].created_at, stored[-1].incarnation) if stored else after
                found: dict[tuple[Any, str], Session] = {}
                for row in stored:
                    dirty = residents.dirty.get(row.incarnation)
                    if dirty is None:
                        found[row.created_at, row.incarnation] = _session(row)
                    elif not dirty.deleted:
                        found[row.created_at, row.incarnation] = dirty.record()
                self._add_born(
                    found, user_id, after, last if more else None, limit + 1, order, nothing=more and not stored
                )
                if not more or len(found) > limit:
                    break
                chunk = await snapshot.sessions(user_id=user_id, after=last, limit=limit + 1, order=order)
                more = len(chunk) == limit + 1
                stored.extend(chunk)
            keys = sorted(found, reverse=order == "desc")
            items = [found[key] for key in keys[:limit]]
            return Page(items, _write_cursor(items[-1]) if len(keys) > limit else None)

    def _add_born(
        self,
        found: dict[tuple[Any, str], Session],
        user_id: str | None,
        after: SessionKey | None,
        until: SessionKey | None,
        count: int,
        order: Order,
        *,
        nothing: bool,
    ) -> None:
        """Add sessions that the database may not have yet: behind `after`, up to `until`, the first `count`."""
        if nothing:
            return
        residents = self._door.residents
        born = residents.born
        low, high = (after, until) if order == "asc" else (until, after)
        start = 0 if low is None else _position(born, low, behind=order == "asc")
        end = len(born) if high is None else _position(born, high, behind=order == "asc")
        span = range(start, end) if order == "asc" else range(end - 1, start - 1, -1)
        for index in span:
            resident = residents.dirty[born[index].incarnation]
            if not resident.deleted and (user_id is None or resident.user_id == user_id):
                found[resident.created_at, resident.incarnation] = resident.record()
                count -= 1
                if count == 0:
                    return

    @staticmethod
    def _check(resident: Resident) -> None:
        """The session may have been deleted while the database was asked."""
        if resident.deleted:
            raise SessionNotFound(resident.session_id)


def _position(born: list[SessionKey], key: SessionKey, *, behind: bool) -> int:
    bisect = bisect_right if behind else bisect_left
    return bisect(born, (key.created_at, key.incarnation), key=lambda each: (each.created_at, each.incarnation))


def _write_cursor(session: Session) -> str:
    key = msgspec.json.encode((session.created_at, session.incarnation))
    return b64encode(key, b"-_").decode().rstrip("=")


def _read_cursor(cursor: str) -> SessionKey:
    try:
        data = b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True)
        created_at, incarnation = msgspec.json.decode(data, type=tuple[datetime, str])
        return SessionKey(check_time("cursor", created_at), check_id("cursor", incarnation))
    except (TypeError, ValueError, msgspec.MsgspecError, InvalidInput):
        raise InvalidInput("cursor", "is not one that a list gave: hand in `next` of the page before") from None
