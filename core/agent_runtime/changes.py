"""Changes and batches: what the log holds, and what a database is given.

A Change is one call's effect on one session. It states the result, not the intention (remove message 57, not "pop"), so
it can be applied to memory, to a journal and to a database alike. A Batch is a contiguous range of changes, coalesced:
the last context, session update and document of a session wins, messages never merge, and a deletion swallows what it
deletes. Everything here is a pure function of its input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any, Final

import msgspec
from msgspec import Raw

from .rows import ContextRow, DocumentRow, MessageRow, OutcomeRow, QuarantineRow, SessionRow, SwitchRow

__all__ = [
    "Batch",
    "Birth",
    "Change",
    "Coalescer",
    "Details",
    "EncodedMessage",
    "Late",
    "Receipt",
    "Touch",
    "coalesce",
    "decode_change",
    "encode_change",
    "encoded_message",
    "message_row",
]

NO_JSON: Final = Raw()
_NOTHING: Final[Mapping[int, str]] = {}


class EncodedMessage(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A `records.Message` on the wire, its JSON values left encoded. Field for field the same JSON."""

    seq: int
    id: str
    role: str
    content: Raw
    name: str | None = None
    tool_calls: Raw = NO_JSON
    tool_call_id: str | None = None
    token_count: int | None = None
    metadata: Raw = NO_JSON
    extra: Raw = NO_JSON
    created_at: datetime = msgspec.field(default_factory=datetime.now)


class Birth(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a session has from its creation on and never changes."""

    created_at: datetime
    user_id: str | None = None


class Details(msgspec.Struct, frozen=True, omit_defaults=True):
    """What people edit of a session. `metadata` is JSON text."""

    title: str | None
    description: str | None
    metadata: str


class Late(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Where a change comes from that was overtaken: `sequence` is the one that it had in the journal `journal_id`.

    `orphaned` says why it goes to quarantine at once: its session is not there any more.
    """

    journal_id: str
    sequence: int
    orphaned: str | None = None


class Change(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """One call's effect on one session.

    `sequence` is its place in the log, `previous` the sequence of the session's change before it (0: none).
    `last_activity`, `message_count` and `next_seq` are the session's after it. The rest is what this call brought:
    `birth` creates, `floor` clears all messages up to it, `removed` names seqs, `messages` are encoded
    `records.Message`s in order of seq, `deleted` ends the incarnation. `resolves` is the sequence of the quarantined
    change that this one replays; with `void` it drops that one, and has no effect of its own. `late`: it brings in what
    another journal had, which is dealt with up to there once this one is stored.
    """

    sequence: int
    previous: int
    session_id: str
    incarnation: str
    last_activity: datetime
    message_count: int
    next_seq: int
    birth: Birth | None = None
    details: Details | None = None
    context: ContextRow | None = None
    messages: tuple[Raw, ...] = ()
    removed: tuple[int, ...] = ()
    floor: int | None = None
    switches: tuple[SwitchRow, ...] = ()
    documents: tuple[DocumentRow, ...] = ()
    discarded: tuple[tuple[str, str], ...] = ()
    deleted: bool = False
    outcome: OutcomeRow | None = None
    resolves: int | None = None
    void: bool = False
    late: Late | None = None

    @property
    def orphaned(self) -> str | None:
        """Why this change goes to quarantine at once, by itself; None: it doesn't."""
        return None if self.late is None else self.late.orphaned


class Touch(msgspec.Struct, frozen=True):
    """The columns of a session that move with every change."""

    incarnation: str
    last_activity: datetime
    message_count: int
    next_seq: int
    sequence: int


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What a stored batch reports: the changes with sequences above `after`, up to `last`.

    `duration_s` is the time of the successful attempt, the `attempt`-th.
    """

    after: int
    last: int
    changes: int
    sessions: int
    messages: int
    rows: int
    duration_s: float = 0.0
    attempt: int = 1


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A contiguous range of changes, coalesced into rows. To be applied in the order of the fields.

    It holds every change with a sequence above `after` (where the database must stand before it), up to `last`.

    - `discharged`: sequences whose quarantine rows go (they are replayed or dropped by this batch)
    - `deleted`: incarnations to mark as deleted (rows are purged later); their `session_id` is free again
    - `created`: sessions to insert, as they are at the end of the batch
    - `touched`, `edited`, `cleared`: columns of sessions that exist
    - `contexts`: to insert or replace; `switches`: to insert
    - `removed`: messages to delete, (incarnation, seq); `messages`: to insert, in order of (incarnation, seq)
    - `discarded`: documents to delete, (incarnation, collection, key); `documents`: to insert or replace
    - `outcomes`: to insert or replace (they outlive their session, until they expire); `quarantined`: to insert
    - `replayed`: journals whose changes come in late, (journal id, sequence): the rows of those that are known move
      there, whoever writes

    No row stands twice in one field.
    """

    after: int
    last: int
    changes: int
    sessions: int
    discharged: tuple[int, ...] = ()
    deleted: tuple[str, ...] = ()
    created: tuple[SessionRow, ...] = ()
    touched: tuple[Touch, ...] = ()
    edited: tuple[tuple[str, Details], ...] = ()
    cleared: tuple[tuple[str, int], ...] = ()
    contexts: tuple[ContextRow, ...] = ()
    switches: tuple[SwitchRow, ...] = ()
    removed: tuple[tuple[str, int], ...] = ()
    messages: tuple[MessageRow, ...] = ()
    discarded: tuple[tuple[str, str, str], ...] = ()
    documents: tuple[DocumentRow, ...] = ()
    outcomes: tuple[OutcomeRow, ...] = ()
    quarantined: tuple[QuarantineRow, ...] = ()
    replayed: tuple[tuple[str, int], ...] = ()

    def receipt(self) -> Receipt:
        """The receipt of this batch, with the number of rows it writes."""
        rows = sum(len(getattr(self, name)) for name in _ROW_FIELDS)
        return Receipt(
            after=self.after,
            last=self.last,
            changes=self.changes,
            sessions=self.sessions,
            messages=len(self.messages),
            rows=rows,
        )


_ROW_FIELDS: Final = tuple(
    name for name in Batch.__struct_fields__ if name not in {"after", "last", "changes", "sessions"}
)
_decode_message: Final = msgspec.json.Decoder(EncodedMessage).decode
_decode_text: Final = msgspec.json.Decoder(str).decode
_decode_change: Final = msgspec.json.Decoder(Change).decode
encode_change: Final = msgspec.json.Encoder().encode


def decode_change(data: bytes) -> Change:
    """The change that `encode_change` wrote."""
    return _decode_change(data)


def _text(raw: Raw) -> str | None:
    if raw is NO_JSON:  # most are
        return None
    text = str(raw, "utf-8")
    return None if text == "null" else text


def message_row(incarnation: str, raw: Raw | bytes) -> MessageRow:
    """The row of an encoded message."""
    message = _decode_message(raw)
    content, parts = None, _text(message.content)
    if parts is not None and parts[0] == '"':
        content, parts = _decode_text(parts), None
    return MessageRow(
        incarnation,
        message.seq,
        message.id,
        message.role,
        content,
        parts,
        message.name,
        _text(message.tool_calls),
        message.tool_call_id,
        message.token_count,
        _text(message.metadata),
        _text(message.extra),
        message.created_at,
    )


def _raw(text: str | None) -> Raw:
    return NO_JSON if text is None else Raw(text.encode())


def encoded_message(row: MessageRow) -> bytes:
    """The encoded message of a row: what `message_row` was given."""
    content = Raw(row.parts.encode() if row.parts is not None else msgspec.json.encode(row.content))
    return msgspec.json.encode(
        EncodedMessage(
            seq=row.seq,
            id=row.id,
            role=row.role,
            content=content,
            name=row.name,
            tool_calls=_raw(row.tool_calls),
            tool_call_id=row.tool_call_id,
            token_count=row.token_count,
            metadata=_raw(row.metadata),
            extra=_raw(row.extra),
            created_at=row.created_at,
        )
    )


class _SessionPart:
    """What a batch has gathered of one incarnation."""

    __slots__ = (
        "birth",
        "context",
        "deleted",
        "details",
        "documents",
        "floor",
        "last",
        "messages",
        "removed",
        "switches",
    )

    def __init__(self) -> None:
        self.birth: Birth | None = None
        self.details: Details | None = None
        self.context: ContextRow | None = None
        self.messages: dict[int, MessageRow] = {}
        self.removed: set[int] = set()
        self.floor: int | None = None
        self.switches: list[SwitchRow] = []
        self.documents: dict[tuple[str, str], DocumentRow | None] = {}
        self.deleted = False
        self.last: Change | None = None

    def add(self, change: Change) -> None:
        self.last = change
        if change.birth is not None:
            self.birth = change.birth
        if change.details is not None:
            self.details = change.details
        if change.context is not None:
            self.context = change.context
        for seq in change.removed:
            if self.messages.pop(seq, None) is None:
                self.removed.add(seq)
        if change.floor is not None:
            self.floor = floor = change.floor
            self.messages = {seq: row for seq, row in self.messages.items() if seq > floor}
            self.removed = {seq for seq in self.removed if seq > floor}
        for raw in change.messages:
            row = message_row(change.incarnation, raw)
            self.messages[row.seq] = row
        self.switches.extend(change.switches)
        for document in change.documents:
            self.documents[document.collection, document.key] = document
        for collection_key in change.discarded:
            self.documents[collection_key] = None
        self.deleted = self.deleted or change.deleted


class Coalescer:
    """Gathers consecutive changes into a batch, one at a time, so that the caller may yield between them.

    `after` is the sequence that the database stands at, `now` the time for quarantine rows.

    Changes of the incarnations in `held` are put into quarantine, queued behind the one that was rejected; `rejected`
    maps the sequence of a change that the database refuses to the error: it goes to quarantine, and so do the later
    changes of its session.
    """

    def __init__(
        self, after: int, now: datetime, *, held: Collection[str] = (), rejected: Mapping[int, str] = _NOTHING
    ) -> None:
        self._now = now
        self._held = held
        self._rejected = rejected
        self._parts: dict[str, _SessionPart] = {}
        self._after = after
        self._last = after
        self._changes = 0
        self._outcomes: dict[tuple[str, str], OutcomeRow] = {}
        self._rejecting: set[str] = set()
        self._quarantined: list[QuarantineRow] = []
        self._discharged: list[int] = []
        self._replayed: dict[str, int] = {}

    def add(self, change: Change) -> None:
        """Add the next change of the log."""
        if change.sequence <= self._last:
            raise ValueError(f"change {change.sequence} after {self._last}: not in the order of the log")
        self._last = change.sequence
        self._changes += 1
        if change.resolves is not None:
            self._discharged.append(change.resolves)
        if change.late is not None:
            self._replayed[change.late.journal_id] = change.late.sequence
        if change.void:
            return
        if change.orphaned is not None:
            self._quarantine(change, change.orphaned)
            return
        error = self._rejected.get(change.sequence)
        if error is not None:
            self._rejecting.add(change.incarnation)
        if change.incarnation in self._held or change.incarnation in self._rejecting:
            self._quarantine(change, error)
            return
        if change.outcome is not None:
            self._outcomes[change.outcome.scope, change.outcome.key] = change.outcome
        part = self._parts.get(change.incarnation)
        if part is None:
            part = self._parts[change.incarnation] = _SessionPart()
        part.add(change)

    def _quarantine(self, change: Change, error: str | None) -> None:
        self._quarantined.append(
            QuarantineRow(
                sequence=change.sequence,
                session_id=change.session_id,
                incarnation=change.incarnation,
                state="queued" if error is None else "rejected",
                error="waits behind an earlier change of its session" if error is None else error,
                change=encode_change(change),
                quarantined_at=self._now,
            )
        )

    def batch(self) -> Batch:
        """The batch of all changes added. It must not be empty."""
        if not self._changes:
            raise ValueError("a batch holds at least one change")
        fields: dict[str, list[Any]] = {name: [] for name in _ROW_FIELDS}
        for incarnation, part in self._parts.items():
            _collect(incarnation, part, fields)
        fields["messages"].sort(key=_by_session)
        fields["outcomes"].extend(self._outcomes.values())
        fields["quarantined"].extend(self._quarantined)
        fields["discharged"].extend(self._discharged)
        fields["replayed"].extend(self._replayed.items())
        return Batch(
            after=self._after,
            last=self._last,
            changes=self._changes,
            sessions=len(self._parts),
            **{name: tuple(rows) for name, rows in fields.items()},
        )


def _by_session(row: MessageRow) -> tuple[str, int]:
    return row.incarnation, row.seq


def _collect(incarnation: str, part: _SessionPart, fields: dict[str, list[Any]]) -> None:
    last = part.last
    if last is None:
        raise ValueError("a session part without a change")
    if part.deleted:
        if part.birth is None:
            fields["deleted"].append(incarnation)
        return
    if part.birth is not None:
        details = part.details or Details(None, None, "{}")
        fields["created"].append(
            SessionRow(
                incarnation=incarnation,
                session_id=last.session_id,
                user_id=part.birth.user_id,
                title=details.title,
                description=details.description,
                metadata=details.metadata,
                created_at=part.birth.created_at,
                last_activity=last.last_activity,
                message_count=last.message_count,
                next_seq=last.next_seq,
                floor=part.floor or 0,
                sequence=last.sequence,
            )
        )
    else:
        fields["touched"].append(
            Touch(incarnation, last.last_activity, last.message_count, last.next_seq, last.sequence)
        )
        if part.details is not None:
            fields["edited"].append((incarnation, part.details))
        if part.floor is not None:
            fields["cleared"].append((incarnation, part.floor))
    if part.context is not None:
        fields["contexts"].append(part.context)
    fields["switches"].extend(part.switches)
    fields["removed"].extend((incarnation, seq) for seq in sorted(part.removed))
    fields["messages"].extend(part.messages.values())
    for (collection, key), document in part.documents.items():
        if document is not None:
            fields["documents"].append(document)
        elif part.birth is None:
            fields["discarded"].append((incarnation, collection, key))


def coalesce(changes: Iterable[Change], after: int, now: datetime) -> Batch:
    """The batch of consecutive `changes` that follow the sequence `after`."""
    coalescer = Coalescer(after, now)
    for change in changes:
        coalescer.add(change)
    return coalescer.batch()
