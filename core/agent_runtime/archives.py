"""Reading sessions whole, and putting whole sessions back.

Guarantees: an archive shows a session at one moment. A session that is restored is checked from end to end before any
of it is there. Then it is one change, unless it is large: the first change creates it with all it has and the first of
its messages, others append the rest. So whatever interrupts that, restoring it again appends what is missing. What is
there already is never altered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final, Literal, NamedTuple, TypeAlias

import msgspec
from anyio.lowlevel import checkpoint
from msgspec import Raw

from .archive import Archive
from .archive_check import check_archive
from .changes import encode_change, encoded_message
from .door import CREATION_SCOPE, Door
from .errors import InvalidInput, SessionExists, SessionNotFound
from .plans import Planner, Stale
from .reads import Reads, document_record, read_message
from .records import AgentSwitch, Message, NewMessage
from .residents import Resident
from .rows import DocumentRow, SwitchRow
from .session import PAGE_ITEMS_MAX, Hooks
from .storage import Snapshot
from .validation import check_id, check_message, parse_message

__all__ = ["Archives", "Restored"]

Restored: TypeAlias = Literal["created", "resumed", "unchanged"]

_PART_MESSAGES: Final = 500
_PART_BYTES: Final = 4 * 1024 * 1024
_MARGIN_BYTES: Final = 4096  # more than what a change takes of the budget besides what is in it
_PAGE: Final = 200  # messages that are read between two yields to the loop
_TURN: Final = 20  # messages that are checked and encoded between two

_encode: Final = msgspec.json.Encoder().encode


class _Part(NamedTuple):
    """What one change brings: encoded messages, and the seq of the next one behind them."""

    messages: Sequence[Raw]
    next_seq: int


class Archives:
    """Reads and restores sessions. `bytes_max` is the budget for unstored changes."""

    def __init__(self, *, door: Door, planner: Planner, reads: Reads, hooks: Hooks, bytes_max: int) -> None:
        self._door = door
        self._planner = planner
        self._reads = reads
        self._hooks = hooks
        self._bytes_max = bytes_max
        self._part_bytes = min(_PART_BYTES, bytes_max // 4)

    # Reading

    async def read(self, session_id: str) -> Archive:
        """The session, whole.

        Raises:
            SessionNotFound: there is none.
        """
        check_id("session_id", session_id)
        while True:
            resident = await self._door.locate(session_id)
            if resident is None or resident.deleted:
                raise SessionNotFound(session_id)
            async with self._door.view(resident) as snapshot:
                rows = await _rows_of(snapshot, resident.incarnation)
                if not resident.deleted:  # meanwhile; then perhaps there is another one
                    return _laid_over(resident, rows)

    # Restoring

    async def restore(self, archive: Archive) -> Restored:
        """Make the session that the archive describes, with its ids, seqs and times; in memory when this returns.

        A session that is there is left as it is if its messages begin with the archive's; if they are the first of the
        archive's, the others are appended.

        Raises:
            InvalidInput: the archive holds what can't be stored; nothing was changed. `path` is the place in its line.
            SessionExists: there is a session under the id, with other messages; nothing was changed.
            Overloaded: unstored changes fill their budget. Flush, and call again.
            SessionHeld, StorageUnavailable: as for any write.
        """
        archive = await self._checked(archive)
        while True:
            try:
                return await self._restore(archive)
            except (Stale, SessionNotFound):
                continue  # somebody else wrote to the session: look again

    async def _restore(self, archive: Archive) -> Restored:
        session_id = archive.session_id
        current = await self._door.locate(session_id)
        if current is None or current.deleted:
            seqs = archive.seqs or range(1, len(archive.messages) + 1)
            first, *parts = await self._parts(archive, seqs, 0, self._first_bytes(archive))
            create = partial(self._planner.restore, archive=archive, messages=first.messages, next_seq=first.next_seq)
            seen = await self._door.write(session_id, CREATION_SCOPE, create, durability="buffered")
            restored: Restored = "created"
        else:
            seen, next_seq = (current.incarnation, current.sequence), current.next_seq
            start = await self._compare(archive, current.incarnation)
            if start == len(archive.messages):
                return "unchanged"
            seqs = archive.seqs or range(next_seq - start, next_seq - start + len(archive.messages))
            if seqs[start] < next_seq:
                raise SessionExists(session_id)
            parts = await self._parts(archive, seqs, start, self._part_bytes)
            restored = "resumed"
        for part in parts:
            if not part.messages:
                continue
            append = partial(
                self._planner.restore_more,
                archive=archive,
                messages=part.messages,
                next_seq=part.next_seq,
                seen=seen,
            )
            seen = await self._door.write(session_id, seen[0], append, durability="buffered")
        return restored

    async def _compare(self, archive: Archive, incarnation: str) -> int:
        """How many messages the session and the archive have in common: all of the one or all of the other."""
        wanted = archive.messages
        count = 0
        after: int | None = None
        while count < len(wanted):
            page = await self._reads.messages(
                archive.session_id, incarnation, after=after, limit=PAGE_ITEMS_MAX, order="asc"
            )
            for message, new in zip(page.items, wanted[count:], strict=False):
                seq = None if archive.seqs is None else archive.seqs[count]
                if not _is_same(message, new, seq):
                    raise SessionExists(archive.session_id)
                count += 1
            after = page.next
            if after is None:
                break
        return count

    async def _parts(self, archive: Archive, seqs: Sequence[int], start: int, first_bytes: int) -> list[_Part]:
        """The messages from `start` on, encoded and cut to changes; the first of them may be empty."""
        parts: list[_Part] = []
        messages: list[Raw] = []
        room = first_bytes
        next_seq = seqs[start - 1] + 1 if start else 1
        for index in range(start, len(archive.messages)):
            if index % _TURN == 0:
                await checkpoint()
            encoded = self._encoded(index, archive.messages[index], seqs[index])
            size = len(memoryview(encoded))
            if len(messages) == _PART_MESSAGES or (size > room and (messages or not parts)):
                parts.append(_Part(messages, next_seq))
                messages, room = [], self._part_bytes
            messages.append(encoded)
            room -= size
            next_seq = seqs[index] + 1
        parts.append(_Part(messages, max(next_seq, archive.next_seq or 0)))
        return parts

    def _encoded(self, index: int, message: NewMessage, seq: int) -> Raw:
        try:
            encoded = self._planner.encode(message, seq)
        except InvalidInput as error:
            raise InvalidInput(f"messages[{index}]", error.problem) from None
        self._check_size(f"messages[{index}]", len(memoryview(encoded)))
        return encoded

    def _first_bytes(self, archive: Archive) -> int:
        """The room that the change which creates the session has for messages."""
        change = self._planner.restore(None, archive, (), 1).change
        size = 0 if change is None else len(encode_change(change))
        self._check_size("documents", size)
        return self._part_bytes - size

    def _check_size(self, path: str, size: int) -> None:
        if size + _MARGIN_BYTES > self._bytes_max:
            raise InvalidInput(
                path,
                f"takes {size} bytes that go in at once or not at all; for that, write_behind.pending_bytes_max "
                f"({self._bytes_max}) is too small",
            )

    async def _checked(self, archive: Archive) -> Archive:
        """The archive as it can be stored: seen by the plugins, then checked, its times in UTC."""
        check_id("session_id", archive.session_id)
        messages = []
        for index, message in enumerate(archive.messages):
            if index % _TURN == 0:
                await checkpoint()
            messages.append(self._checked_message(f"messages[{index}]", archive.session_id, message))
        return check_archive(msgspec.structs.replace(archive, messages=messages))

    def _checked_message(self, path: str, session_id: str, message: NewMessage) -> NewMessage:
        message = parse_message(path, message)
        if self._hooks.appending:
            try:
                message = self._hooks.before_append(session_id, message)
            except InvalidInput as error:
                raise InvalidInput(f"{path}.{error.path}" if error.path else path, error.problem) from None
        check_message(path, message)
        return message


class _Rows(NamedTuple):
    """What the database has of a session besides its head."""

    messages: list[tuple[int, NewMessage]]
    switches: dict[int, SwitchRow]
    documents: dict[tuple[str, str], DocumentRow]


async def _rows_of(snapshot: Snapshot, incarnation: str) -> _Rows:
    switches = {row.number: row for row in await snapshot.switches(incarnation)}
    documents: dict[tuple[str, str], DocumentRow] = {}
    for collection in await snapshot.collections(incarnation):
        key = ""
        while page := await snapshot.documents(incarnation, collection, after=key, limit=PAGE_ITEMS_MAX):
            documents.update(((collection, row.key), row) for row in page)
            key = page[-1].key
    messages: list[tuple[int, NewMessage]] = []
    seq = 0
    while rows := await snapshot.messages(incarnation, after=seq, limit=_PAGE):
        messages.extend(_numbered(encoded_message(row)) for row in rows)
        seq = rows[-1].seq
    return _Rows(messages, switches, documents)


def _laid_over(resident: Resident, rows: _Rows) -> Archive:
    """The session as it is now: what of the rows still holds, and what memory has besides (see reads.py)."""
    removed: set[int] = set()
    for change in resident.changes:
        removed.update(change.removed)
        rows.switches.update((row.number, row) for row in change.switches)
        rows.documents.update(((row.collection, row.key), row) for row in change.documents)
        for place in change.discarded:
            rows.documents.pop(place, None)
    low, high = resident.floor, resident.tail_from
    messages = [(seq, message) for seq, message in rows.messages if low < seq <= high and seq not in removed]
    messages += map(_numbered, resident.tail)
    record = resident.record()
    return Archive(
        session_id=record.session_id,
        user_id=record.user_id,
        title=record.title,
        description=record.description,
        metadata=record.metadata,
        created_at=record.created_at,
        last_activity=record.last_activity,
        context=resident.agent_context(),
        switches=[_switch(rows.switches[number]) for number in sorted(rows.switches)],
        documents=[document_record(rows.documents[place]) for place in sorted(rows.documents)],
        next_seq=resident.next_seq,
        messages=[message for _, message in messages],
        seqs=[seq for seq, _ in messages],
    )


def _switch(row: SwitchRow) -> AgentSwitch:
    return AgentSwitch(
        from_agent=row.from_agent,
        to_agent=row.to_agent,
        reason=row.reason,
        switched_at=row.switched_at,
        metadata=None if row.metadata is None else msgspec.json.decode(row.metadata),
    )


def _numbered(encoded: Raw | bytes) -> tuple[int, NewMessage]:
    message = read_message(encoded)
    return message.seq, _new_message(message)


def _new_message(message: Message) -> NewMessage:
    return NewMessage(**{name: getattr(message, name) for name in NewMessage.__struct_fields__})


def _is_same(message: Message, new: NewMessage, seq: int | None) -> bool:
    """Whether a message is what was to be restored. Values are compared as JSON: 1, 1.0 and true are different."""
    mine = _new_message(message)
    given = {name: getattr(mine, name) for name in ("id", "created_at") if getattr(new, name) is None}
    return seq in (None, message.seq) and _encode(mine) == _encode(msgspec.structs.replace(new, **given))
