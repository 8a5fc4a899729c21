"""What is in memory of the sessions: for each resident its head, its tail of messages, and its unstored changes.

Guarantees:
- A resident with unstored changes, one that is being read, and one that is held by quarantine is never evicted; of the
  others the least recently used go first once they all exceed `bytes_max`. If that is not enough, those that stay keep
  no more than they must. No session has more than a part of the whole room for its tail, nor for its outcomes.
- A change is kept until no read can meet a view of the database without it: until it is stored, and every read that was
  under way before that has ended. Then it has settled, and only then its bytes are given back to the budget, so that
  changes which wait for a slow read are counted. A change in quarantine is counted for as long as it is there.
- The tail holds every message above `tail_from` that is there, at least all that are unstored.
- That an id has no session is remembered like a session, and evicted like one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, Final

import msgspec
from msgspec import Raw

from .changes import Change, Details
from .history import leading_message
from .records import DEFAULT_AGENT, AgentContext, Message, Session
from .rows import ContextRow, OutcomeRow
from .storage import HeadRows, SessionKey

__all__ = [
    "OUTCOMES_MAX",
    "UNKNOWN",
    "Resident",
    "Residents",
    "Unknown",
    "View",
    "encode_to_keep",
    "message_bytes",
    "text_bytes",
]

OUTCOMES_MAX: Final = 128
"""How many outcomes of idempotent calls stay in memory with a head."""

# Measured, with a little on top for what the allocator rounds up: tests/benchmarks/test_memory.py.
_HEAD_BYTES: Final = 2400
_ABSENT_BYTES: Final = 400  # besides the id
_MESSAGE_BYTES: Final = 130  # what Python adds to the JSON of a message in the tail
_OUTCOME_BYTES: Final = 500
_SHARE: Final = 16  # the part of the whole room that one session's tail, outcomes or kept history may take

_encode: Final = msgspec.json.Encoder().encode


def encode_to_keep(value: object) -> bytes:
    """The value as JSON, in as much memory as that takes: msgspec leaves half as much again allocated behind it."""
    return b"".join((_encode(value), b""))  # a copy: the encoder's own bytes look as short, but stay as large


class Unknown:
    """The answer for an id of which memory knows nothing."""


UNKNOWN: Final = Unknown()


class Resident:
    """A session in memory, as of its last acknowledged change."""

    __slots__ = (
        "bytes",
        "chat",
        "context",
        "created_at",
        "deleted",
        "description",
        "documents_at",
        "floor",
        "held",
        "held_bytes",
        "idle",
        "incarnation",
        "last_activity",
        "lead",
        "lead_known",
        "message_count",
        "metadata",
        "next_seq",
        "outcomes",
        "outcomes_bytes",
        "outcomes_complete",
        "pending",
        "pins",
        "replaced",
        "sequence",
        "session_id",
        "tail",
        "tail_bytes",
        "tail_from",
        "tail_seqs",
        "title",
        "unborn",
        "user_id",
    )

    def __init__(self, session_id: str, incarnation: str) -> None:
        self.session_id = session_id
        self.incarnation = incarnation
        self.user_id: str | None = None
        self.title: str | None = None
        self.description: str | None = None
        self.metadata = "{}"
        self.created_at: datetime
        self.last_activity: datetime
        self.message_count = 0
        self.next_seq = 1
        self.floor = 0
        self.sequence = 0
        self.context: ContextRow
        self.tail: list[Raw] = []
        self.tail_seqs: list[int] = []
        self.tail_bytes = 0
        self.tail_from = 0
        self.lead: Raw | None = None  # the leading message, if it lies below the tail and is known
        self.lead_known = False
        self.chat: tuple[int | None, bytes] | None = None  # the history that was last asked for: its limit, its JSON
        self.pending: deque[Change] = deque()
        self.held: list[Change] = []
        self.held_bytes = 0  # what those take of the budget for unstored changes
        self.outcomes: dict[str, OutcomeRow] = {}
        self.outcomes_bytes = 0
        self.outcomes_complete = True
        self.deleted = False
        self.documents_at = 0  # the sequence of the last change that touched documents, as far as memory knows
        self.unborn: int | None = None  # the sequence of the creation, while a view may lack it
        self.pins = 0
        self.replaced = False  # only reads that were under way before another took its place still use it
        self.idle = False
        self.bytes = _HEAD_BYTES + self._details_bytes

    @classmethod
    def from_rows(cls, rows: HeadRows) -> Resident:
        """A resident as the database has it, without messages."""
        session = rows.session
        resident = cls(session.session_id, session.incarnation)
        resident.user_id = session.user_id
        resident.title = session.title
        resident.description = session.description
        resident.metadata = session.metadata
        resident.created_at = session.created_at
        resident.last_activity = session.last_activity
        resident.message_count = session.message_count
        resident.next_seq = session.next_seq
        resident.floor = session.floor
        resident.sequence = resident.documents_at = session.sequence
        resident.context = rows.context
        resident.tail_from = session.next_seq - 1
        for row in reversed(rows.outcomes):
            resident._keep_outcome(row)
        resident.outcomes_complete = len(rows.outcomes) < OUTCOMES_MAX
        resident.bytes = _HEAD_BYTES + resident._details_bytes + text_bytes(rows.context.metadata)
        resident.bytes += resident.outcomes_bytes
        return resident

    def salvage(self, change: Change) -> None:
        """Begin with the first change that is left of a session whose creation was lost: to be shown, never stored."""
        self.created_at = change.last_activity
        self.context = ContextRow(
            incarnation=self.incarnation,
            current_agent=DEFAULT_AGENT,
            switch_count=0,
            last_switch_at=None,
            metadata="{}",
            created_at=change.last_activity,
            updated_at=change.last_activity,
        )
        self.bytes += len(self.context.metadata)

    @property
    def _details_bytes(self) -> int:
        return text_bytes(self.title) + text_bytes(self.description) + text_bytes(self.metadata)

    @property
    def key(self) -> SessionKey:
        """The session's place in lists."""
        return SessionKey(self.created_at, self.incarnation)

    @property
    def changes(self) -> Iterator[Change]:
        """The changes that a view of the database may lack, in order."""
        yield from self.held
        yield from self.pending

    def record(self) -> Session:
        """The session's record, for callers."""
        return Session(
            session_id=self.session_id,
            user_id=self.user_id,
            title=self.title,
            description=self.description,
            metadata=msgspec.json.decode(self.metadata),
            created_at=self.created_at,
            last_activity=self.last_activity,
            message_count=self.message_count,
            incarnation=self.incarnation,
        )

    def agent_context(self) -> AgentContext:
        """Which agent holds the session, for callers."""
        context = self.context
        return AgentContext(
            session_id=self.session_id,
            current_agent=context.current_agent,
            switch_count=context.switch_count,
            last_switch_at=context.last_switch_at,
            metadata=msgspec.json.decode(context.metadata),
            created_at=context.created_at,
            updated_at=context.updated_at,
        )

    def details(self, **changed: Any) -> Details:
        """The details as they are, but for what is given."""
        return msgspec.structs.replace(Details(self.title, self.description, self.metadata), **changed)

    def apply(self, change: Change) -> None:
        """Take over the effect of a change."""
        if self.chat is not None and (change.messages or change.removed or change.floor is not None):
            self.forget_chat()
        next_seq = self.next_seq
        self.sequence = change.sequence
        self.last_activity = change.last_activity
        self.message_count = change.message_count
        self.next_seq = change.next_seq
        if change.birth is not None:
            self.user_id = change.birth.user_id
            self.created_at = change.birth.created_at
        if change.details is not None:
            self.bytes -= self._details_bytes
            self.title = change.details.title
            self.description = change.details.description
            self.metadata = change.details.metadata
            self.bytes += self._details_bytes
        if change.context is not None:
            self.bytes += text_bytes(change.context.metadata)
            if change.birth is None:
                self.bytes -= text_bytes(self.context.metadata)
            self.context = change.context
        if change.floor is not None:
            self._drop_tail(bisect_right(self.tail_seqs, change.floor))
            self.floor = change.floor
            self.forget_lead()
        for seq in change.removed:
            self._remove(seq)
        if change.messages:
            self._extend_tail(change, known=change.next_seq == next_seq + 1)
        if change.documents or change.discarded:
            self.documents_at = change.sequence
        if change.outcome is not None and change.outcome.scope == self.incarnation:
            self._forget_outcome(change.outcome.key)
            self._keep_outcome(change.outcome)
        self.deleted = change.deleted

    def forget_chat(self) -> None:
        """The history is another one now, or there is no room for it."""
        if self.chat is not None:
            self.bytes -= len(self.chat[1])
            self.chat = None

    def _extend_tail(self, change: Change, *, known: bool) -> None:
        """`known`: there is one message, under the seq that was next."""
        messages = change.messages
        if known:
            self.tail.append(messages[0])
            self.tail_seqs.append(change.next_seq - 1)
            size = message_bytes(messages[0])
        else:
            self.tail.extend(messages)
            self.tail_seqs.extend(map(_seq, messages))
            size = sum([message_bytes(raw) for raw in messages])
        self._count_tail(size)

    def _remove(self, seq: int) -> None:
        index = bisect_left(self.tail_seqs, seq)
        if index < len(self.tail_seqs) and self.tail_seqs[index] == seq:
            self._count_tail(-message_bytes(self.tail[index]))
            del self.tail[index], self.tail_seqs[index]
        if seq <= self.tail_from or not self.tail:
            self.forget_lead()

    def learn_lead(self, lead: Raw | None) -> None:
        """Keep the leading message, or that there is none, for as long as that stays true."""
        self.forget_lead()
        self.lead_known = True
        if lead is not None:
            self.lead = lead
            self.bytes += len(memoryview(lead))

    def forget_lead(self) -> None:
        """What leads the history may have changed."""
        if self.lead is not None:
            self.bytes -= len(memoryview(self.lead))
        self.lead = None
        self.lead_known = False

    def _drop_tail(self, count: int) -> None:
        """Let go of the `count` oldest messages of the tail."""
        if count:
            if self.tail_from <= self.floor:
                first = msgspec.json.decode(self.tail[0], type=Message)
                self.learn_lead(self.tail[0] if leading_message(first) is not None else None)
            self._count_tail(-sum([message_bytes(raw) for raw in self.tail[:count]]))
            self.tail_from = self.tail_seqs[count - 1]
            del self.tail[:count], self.tail_seqs[:count]

    def warm(self, encoded: list[Raw], seqs: list[int], *, tail_from: int) -> None:
        """Put older messages, all that there are between the new and the old `tail_from`, before the tail."""
        self.tail[:0] = encoded
        self.tail_seqs[:0] = seqs
        self._count_tail(sum([message_bytes(raw) for raw in encoded]))
        self.tail_from = tail_from

    def _count_tail(self, difference: int) -> None:
        self.tail_bytes += difference
        self.bytes += difference

    def settle(self, sequence: int, *, tail_messages: int, bytes_max: int) -> None:
        """Every view of the database that is in use, or will be, has the changes up to `sequence`.

        Of what the database has by now stay `tail_messages` in at most `bytes_max`, and outcomes in at most as much.
        """
        pending = self.pending
        while pending and pending[0].sequence <= sequence:
            pending.popleft()
        self._trim_tail(tail_messages, bytes_max)
        self.trim_outcomes(bytes_max)

    def _trim_tail(self, messages_max: int, bytes_max: int) -> None:
        if len(self.tail) <= messages_max and self.tail_bytes <= bytes_max:
            return
        unsettled = next((_seq(change.messages[0]) for change in self.changes if change.messages), self.next_seq)
        settled = bisect_left(self.tail_seqs, unsettled)  # what follows is not even looked at, however much it is
        excess = max(0, min(settled, len(self.tail) - messages_max))
        size = self.tail_bytes - sum([message_bytes(raw) for raw in self.tail[:excess]])
        while size > bytes_max and excess < settled:
            size -= message_bytes(self.tail[excess])
            excess += 1
        self._drop_tail(excess)

    def trim_outcomes(self, bytes_max: int) -> None:
        """Let go of the oldest outcomes that the database has, until there are few enough, and small enough."""
        if self.outcomes_bytes <= bytes_max and len(self.outcomes) <= OUTCOMES_MAX:
            return
        unstored = {change.outcome.key for change in self.changes if change.outcome is not None}
        for key in [key for key in self.outcomes if key not in unstored]:
            if self.outcomes_bytes <= bytes_max and len(self.outcomes) <= OUTCOMES_MAX:
                break
            self._forget_outcome(key)
            self.outcomes_complete = False

    def _keep_outcome(self, outcome: OutcomeRow) -> None:
        self.outcomes[outcome.key] = outcome
        self.outcomes_bytes += _outcome_bytes(outcome)
        self.bytes += _outcome_bytes(outcome)

    def _forget_outcome(self, key: str) -> None:
        outcome = self.outcomes.pop(key, None)
        if outcome is not None:
            self.outcomes_bytes -= _outcome_bytes(outcome)
            self.bytes -= _outcome_bytes(outcome)


def message_bytes(raw: Raw) -> int:
    """What a message takes in a tail."""
    return _MESSAGE_BYTES + len(memoryview(raw))


def text_bytes(text: str | None) -> int:
    """What a text takes at most: one wide character makes all of them four bytes."""
    if text is None:
        return 0
    return len(text) if text.isascii() else 4 * len(text)


def _outcome_bytes(outcome: OutcomeRow) -> int:
    return _OUTCOME_BYTES + text_bytes(outcome.outcome)


def _absent_bytes(session_id: str) -> int:
    return _ABSENT_BYTES + text_bytes(session_id)


class _Seq(msgspec.Struct):
    seq: int


_decode_seq: Final = msgspec.json.Decoder(_Seq).decode


def _seq(raw: Raw) -> int:
    return _decode_seq(raw).seq


class View:
    """A read under way: from `start` on it needs the changes, and its resident must stay."""

    __slots__ = ("resident", "start")

    def __init__(self, resident: Resident | None, start: int) -> None:
        self.resident = resident
        self.start = start


class Residents:
    """All residents, by session id."""

    def __init__(self, *, bytes_max: int, tail_messages: int) -> None:
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.settled = 0
        self.born: list[SessionKey] = []
        self.dirty: dict[str, Resident] = {}
        self.bytes_max = bytes_max
        self.share_bytes = bytes_max // _SHARE
        self.on_settled: Callable[[int], None] = _nobody
        self._tail_messages = tail_messages
        self._entries: dict[str, Resident | None] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._views: OrderedDict[View, None] = OrderedDict()
        self._settling: deque[tuple[int, Iterable[Resident], int]] = deque()

    @property
    def count(self) -> int:
        """How many sessions are in memory, those known to be absent included."""
        return len(self._entries)

    @property
    def held(self) -> list[Resident]:
        """The sessions with changes in quarantine."""
        return [resident for resident in self.dirty.values() if resident.held]

    @property
    def crowded(self) -> bool:
        """Whether there is too little room although every session that could go has gone."""
        return self.bytes > self.bytes_max and not self._idle

    def find(self, session_id: str) -> Resident | Unknown | None:
        """The resident; None when it is known that there is no such session; UNKNOWN when it must be loaded."""
        entry: Resident | Unknown | None = self._entries.get(session_id, UNKNOWN)
        if isinstance(entry, Unknown):
            return entry
        self.hits += 1
        if entry is None:
            self._idle.move_to_end(session_id)
            return None
        if entry.idle:
            self._idle.move_to_end(session_id)
        return None if entry.deleted and not entry.held else entry

    def missed(self, *, cold: bool = False) -> None:
        """A session was not in memory; it is about to be found there, which is no hit. `cold`: and this no miss."""
        self.misses += not cold
        self.hits -= 1

    def admit(self, session_id: str, rows: HeadRows | None, *, cold: bool = False) -> None:
        """What was loaded of a session that was unknown. `cold`: it is the first to go, as nobody has asked for it."""
        if session_id in self._entries:
            raise ValueError(f"session {session_id!r} is in memory already")
        resident = None if rows is None else Resident.from_rows(rows)
        self._entries[session_id] = resident
        self._idle[session_id] = None
        if resident is not None:
            resident.idle = True
            resident.trim_outcomes(self.share_bytes)
        if cold:
            self._idle.move_to_end(session_id, last=False)
        self.bytes += _absent_bytes(session_id) if resident is None else resident.bytes
        self._evict(keep=session_id)

    def add(self, change: Change, resident: Resident) -> None:
        """A change was acknowledged: it shows from now on, and stays until it has settled."""
        session_id = change.session_id
        if change.birth is not None:
            if self._entries.get(session_id, UNKNOWN) is None:
                self.bytes -= _absent_bytes(session_id)
            self._idle.pop(session_id, None)
            self._entries[session_id] = resident
            self.bytes += resident.bytes
        elif resident.idle:
            resident.idle = False
            del self._idle[session_id]
        before = resident.bytes
        resident.apply(change)
        if not resident.pending:
            self.dirty[resident.incarnation] = resident
        resident.pending.append(change)
        if change.birth is not None:
            self._bear(resident, change)
        self.bytes += resident.bytes - before
        if self.bytes > self.bytes_max:
            self._evict()

    def hold(self, resident: Resident, change: Change, size: int) -> None:
        """A change of this session went to quarantine: it shows, and takes its room, for as long as it is there."""
        resident.held.append(change)
        resident.held_bytes += size

    def restore(self, changes: Iterable[Change], size: int, rows: HeadRows | None, *, succeeded: bool) -> None:
        """At open: a session with quarantined changes, laid over what the database has of it.

        `size` is what they take of the budget; `succeeded`: the session ends with its deletion, and the database has
        another one under its id.
        """
        held = list(changes)
        first = held[0]
        resident = Resident(first.session_id, first.incarnation) if rows is None else Resident.from_rows(rows)
        if rows is None and first.birth is None:
            resident.salvage(first)
        for change in held:
            resident.apply(change)
        resident.held = held
        resident.held_bytes = size
        if not succeeded:
            self._entries[resident.session_id] = resident
        self.dirty[resident.incarnation] = resident
        self.bytes += resident.bytes
        if first.birth is not None:
            self._bear(resident, first)

    def resubmit(self, resident: Resident, changes: Iterable[Change]) -> None:
        """The held changes of a session are in the log again, as `changes`; they show already."""
        resident.held = []
        resident.held_bytes = 0
        for change in changes:
            resident.sequence = change.sequence
            resident.pending.append(change)
            if change.birth is not None:
                resident.unborn = change.sequence

    def remake(self, resident: Resident, rows: HeadRows | None) -> Resident | None:
        """Take a held session out of memory, and put it back as the database has it, if it does, to be changed at once.

        Reads that are under way end on the resident as it was.
        """
        self.dirty.pop(resident.incarnation)
        if resident.unborn is not None:
            self._unbear(resident)
        resident.replaced = True
        remade = None
        if self._entries.get(resident.session_id) is resident:
            del self._entries[resident.session_id]  # without rows the id is unknown: an earlier session may have it
            if rows is not None:
                self.admit(resident.session_id, rows)
                remade = self._entries[resident.session_id]
        elif rows is not None:  # another session has the id by now, this one goes on to its deletion
            remade = Resident.from_rows(rows)
            self.bytes += remade.bytes
        self._rest(resident)
        return remade

    def open_view(self, resident: Resident | None, stored: int) -> View:
        """A read begins. To be closed whatever happens."""
        view = View(resident, stored)
        self._views[view] = None
        if resident is not None:
            resident.pins += 1
            if resident.idle:
                resident.idle = False
                del self._idle[resident.session_id]
        return view

    def close_view(self, view: View) -> None:
        """A read has ended. Its session stays for now, however little room there is: the reader may still use it."""
        del self._views[view]
        resident = view.resident
        if resident is not None:
            resident.pins -= 1
            self._rest(resident)
        self._settle(keep=None if resident is None else resident.session_id)

    def stored(self, sequence: int, residents: Iterable[Resident], size: int) -> None:
        """The changes up to `sequence` are in the database; `residents` are those they belong to.

        `size` is what they take of the budget: `on_settled` is told of it when they have settled.
        """
        self._settling.append((sequence, residents, size))
        self._settle()

    def keep_chat(self, resident: Resident, limit: int | None, data: bytes) -> None:
        """Keep the JSON of a history, as the resident has it now, unless it would crowd out the others."""
        if len(data) <= self.share_bytes:
            before = resident.bytes
            resident.bytes += len(data) - (0 if resident.chat is None else len(resident.chat[1]))
            resident.chat = (limit, data)
            self.resize(resident, before)
            self._evict(keep=resident.session_id)
            if self.crowded:
                before = resident.bytes
                resident.forget_chat()
                self.resize(resident, before)

    def resize(self, resident: Resident, before: int) -> None:
        """The resident's size has changed since it was `before` bytes."""
        self.bytes += resident.bytes - before

    def _settle(self, keep: str | None = None) -> None:
        oldest = next(iter(self._views), None)  # views are opened in the order of their starts
        while self._settling and (oldest is None or oldest.start >= self._settling[0][0]):
            sequence, residents, size = self._settling.popleft()
            self.settled = sequence
            for resident in residents:
                before = resident.bytes
                if self.crowded:
                    resident.settle(sequence, tail_messages=0, bytes_max=0)
                    resident.forget_chat()
                    resident.forget_lead()
                else:
                    resident.settle(sequence, tail_messages=self._tail_messages, bytes_max=self.share_bytes)
                if resident.unborn is not None and resident.unborn <= sequence and not resident.held:
                    self._unbear(resident)
                self.bytes += resident.bytes - before
                if not resident.pending and not resident.held:
                    self.dirty.pop(resident.incarnation, None)
                self._rest(resident)
            self.on_settled(size)
        self._evict(keep)

    def _rest(self, resident: Resident) -> None:
        """Make the resident evictable if nothing needs it."""
        if resident.pins or resident.idle or ((resident.pending or resident.held) and not resident.replaced):
            return
        current = self._entries.get(resident.session_id)
        if current is not resident:
            if resident.bytes:  # another has its id by now: it was kept for its unstored deletion, or for reads, only
                self.bytes -= resident.bytes
                resident.bytes = 0
            return
        if resident.deleted:
            self._entries[resident.session_id] = None
            self.bytes += _absent_bytes(resident.session_id) - resident.bytes
            resident.bytes = 0
        else:
            resident.idle = True
        self._idle[resident.session_id] = None
        if resident.deleted:  # hardly anyone asks for it again: the first to go
            self._idle.move_to_end(resident.session_id, last=False)

    def _bear(self, resident: Resident, change: Change) -> None:
        resident.unborn = change.sequence
        insort(self.born, resident.key, key=_order)

    def _unbear(self, resident: Resident) -> None:
        resident.unborn = None
        index = bisect_left(self.born, _order(resident.key), key=_order)
        if index < len(self.born) and self.born[index] == resident.key:
            del self.born[index]

    def _evict(self, keep: str | None = None) -> None:
        while self.bytes > self.bytes_max and self._idle:
            session_id = next(iter(self._idle))
            if session_id == keep:
                return
            del self._idle[session_id]
            resident = self._entries.pop(session_id)
            self.bytes -= _absent_bytes(session_id) if resident is None else resident.bytes
            self.evictions += 1


def _order(key: SessionKey) -> tuple[datetime, str]:
    return key.created_at, key.incarnation


def _nobody(_size: int) -> None:
    """Nobody counts the bytes of changes yet."""
