"""What a late change is on top of what there is now: pure functions. The rules stand at the head of `late`."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from .changes import Change, Details, EncodedMessage, Late
from .door import CREATION_SCOPE
from .records import LATE
from .residents import Resident
from .rows import DocumentRow, OutcomeRow

__all__ = ["Found", "Story", "reborn", "rebuilt"]

_decode_message: Final = msgspec.json.Decoder(EncodedMessage).decode
_EFFECTS: Final = frozenset(
    {"messages", "removed", "documents", "discarded", "floor", "details", "context", "switches", "outcome", "deleted"}
)


class Story(msgspec.Struct):
    """What a journal tells of a session from where it was overtaken on: what had been stored, what becomes of the rest.

    `base` is the highest seq that was stored, `previous` the sequence of the session's last change then. `key` is the
    idempotency key of the call that created the session, if that was `born` there. `began_at` is the time of its first
    change, `details` and `documents` have the sequences of the last changes of those. In the end it may be `deleted`.
    `changed`: others have changed it since.
    """

    session_id: str
    incarnation: str
    base: int
    previous: int
    born: bool
    key: str | None
    began_at: datetime
    changed: bool = False
    deleted: bool = False
    floor: int = 0
    details: int = 0
    removed: set[int] = msgspec.field(default_factory=set)
    documents: dict[tuple[str, str], int] = msgspec.field(default_factory=dict)

    @classmethod
    def begun_by(cls, change: Change) -> Story:
        """The story that begins with a change; which is still to be added."""
        first = _decode_message(change.messages[0]).seq if change.messages else change.next_seq
        key = None if change.birth is None or change.outcome is None else change.outcome.key
        return cls(
            session_id=change.session_id,
            incarnation=change.incarnation,
            base=first - 1,
            previous=change.previous,
            born=change.birth is not None,
            key=key,
            began_at=change.last_activity,
        )

    def add(self, change: Change) -> None:
        """The next change of the session."""
        self.removed.update(change.removed)
        self.documents.update(dict.fromkeys(change.discarded, change.sequence))
        self.documents.update(((row.collection, row.key), change.sequence) for row in change.documents)
        if change.details is not None:
            self.details = change.sequence
        if change.floor is not None:
            self.floor = max(self.floor, change.floor)
        if change.deleted:
            self.deleted = True
            self.floor = change.next_seq - 1

    def alone(self, current: Resident) -> bool:
        """Whether nobody else has changed the session since: then everything is as the journal knew it."""
        return current.incarnation == self.incarnation and not self.changed

    def saw(self, row: DocumentRow) -> bool:
        """Whether a document that is there was there before the journal's changes, as far as its time tells."""
        return not self.born and row.updated_at <= self.began_at

    def gone_document(self, row: DocumentRow, sequence: int) -> bool:
        """Whether a document that was put under a sequence is removed or replaced later on."""
        return self.deleted or sequence < self.documents.get((row.collection, row.key), 0)

    def gone(self, seq: int) -> bool:
        """Whether a message that was not stored is removed later on."""
        return seq <= self.floor or seq in self.removed


class Found(msgspec.Struct):
    """What of a change has its place: stored messages, documents, a floor and the number of messages above it."""

    removed: list[int] = []
    floor: int | None = None
    left: int = 0
    documents: list[DocumentRow] = []
    discarded: list[tuple[str, str]] = []


def reborn(change: Change, story: Story, sequence: int, late: Late) -> Change:
    """A session that nobody knows: as it was, without what is removed later on."""
    messages = tuple(raw for raw in change.messages if not story.gone(_decode_message(raw).seq))
    return replace(
        change,
        sequence=sequence,
        messages=messages,
        message_count=len(messages),
        documents=tuple(row for row in change.documents if not story.gone_document(row, change.sequence)),
        outcome=None if change.outcome is None else replace(change.outcome, sequence=sequence),
        late=late,
    )


def rebuilt(change: Change, story: Story, found: Found, current: Resident, sequence: int, late: Late) -> Change | None:
    """The change as it is on top of what there is now; None: nothing is left of it."""
    alone = story.alone(current)
    messages, next_seq = _placed(change, story, current)
    count = current.message_count if found.floor is None else found.left
    parts: dict[str, Any] = {"message_count": count + len(messages) - len(found.removed), "next_seq": next_seq}
    if change.deleted and alone:
        parts = {"message_count": current.message_count, "next_seq": next_seq, "deleted": True}
    else:
        parts |= {
            "messages": tuple(messages.values()),
            "removed": tuple(found.removed),
            "documents": tuple(found.documents),
            "discarded": tuple(found.discarded),
            "details": _details(change, story, current),
            **_context(change, story, current),
        }
        if found.floor is not None and found.floor > current.floor:
            parts["floor"] = found.floor
    if change.outcome is not None:
        parts["outcome"] = _answer(change, change.outcome, current, messages, sequence)
    has_effect = next_seq != current.next_seq or any(parts[name] for name in parts.keys() & _EFFECTS)
    if not alone and not has_effect:
        return None
    return Change(
        sequence=sequence,
        previous=current.sequence,
        session_id=current.session_id,
        incarnation=current.incarnation,
        last_activity=change.last_activity if alone else max(current.last_activity, change.last_activity),
        late=late,
        **parts,
    )


def _placed(change: Change, story: Story, current: Resident) -> tuple[dict[int, Raw], int]:
    """The messages by the seq that they had, each with the one that it gets; and the session's next one.

    Those that are removed later on take theirs with them, so that what follows is late if they would have been.
    """
    if not change.messages:
        return {}, current.next_seq
    had = {_decode_message(raw).seq: raw for raw in change.messages}
    joins = change.birth is not None
    if min(had) == current.next_seq and not joins:
        return {seq: raw for seq, raw in had.items() if not story.gone(seq)}, change.next_seq
    placed: dict[int, Raw] = {}
    next_seq = current.next_seq
    for seq, raw in had.items():
        message = _decode_message(raw)
        leads = joins and seq == 1 and message.role in {"system", "developer"}  # it has one of its own
        if leads:
            continue
        if not story.gone(seq):
            placed[seq] = _marked(message, next_seq)
        next_seq += 1
    return placed, next_seq


def _answer(
    change: Change, outcome: OutcomeRow, current: Resident, messages: dict[int, Raw], sequence: int
) -> OutcomeRow:
    """What a repetition of the call is told from now on."""
    text = outcome.outcome
    if change.birth is not None and outcome.scope == CREATION_SCOPE:
        text = msgspec.json.encode(current.record()).decode()
    elif messages:  # a call that appends tells the message, or the messages, that it has appended
        are_many = text.startswith("[")
        given = msgspec.json.decode(text, type=list[Raw]) if are_many else [Raw(text.encode())]
        told = [messages.get(_decode_message(raw).seq, raw) for raw in given]
        text = msgspec.json.encode(told if are_many else told[0]).decode()
    scope = outcome.scope if outcome.scope == CREATION_SCOPE else current.incarnation
    return replace(outcome, scope=scope, outcome=text, sequence=sequence)


def _marked(message: EncodedMessage, seq: int) -> Raw:
    """The message under another seq, marked as late with the one that it had."""
    metadata: dict[str, Raw] = {}
    if bytes(message.metadata) not in (b"", b"null"):
        metadata = msgspec.json.decode(message.metadata, type=dict[str, Raw])
    metadata[LATE] = Raw(msgspec.json.encode({"seq": message.seq}))
    return Raw(msgspec.json.encode(replace(message, seq=seq, metadata=Raw(msgspec.json.encode(metadata)))))


def _details(change: Change, story: Story, current: Resident) -> Details | None:
    """The details of a change, if they are the journal's last ones. Where others have changed the session, the later of
    theirs and these, by their times, and of the other ones what those don't give."""
    details = change.details
    if details is None or story.deleted or change.sequence < story.details:
        return None
    there = current.details()
    if not story.alone(current):
        older = change.birth is not None or current.last_activity > change.last_activity
        details = _filled(there, details) if older else _filled(details, there)
    return None if details == there else details


def _filled(first: Details, second: Details) -> Details:
    return Details(
        first.title if first.title is not None else second.title,
        first.description if first.description is not None else second.description,
        first.metadata if first.metadata != "{}" else second.metadata,
    )


def _context(change: Change, story: Story, current: Resident) -> dict[str, Any]:
    """The context, unless a newer one is there: a switch of agents or other metadata, whichever the call brought."""
    row, there = change.context, current.context
    if row is None or change.birth is not None or story.deleted:
        return {}
    if there.updated_at > row.updated_at and not story.alone(current):
        return {}
    if not change.switches:
        return {"context": replace(there, metadata=row.metadata, updated_at=row.updated_at)}
    if there.current_agent == row.current_agent:
        return {}
    switch = replace(
        change.switches[-1],
        incarnation=current.incarnation,
        number=there.switch_count + 1,
        from_agent=there.current_agent,
    )
    moved = replace(
        there,
        current_agent=switch.to_agent,
        switch_count=switch.number,
        last_switch_at=switch.switched_at,
        updated_at=row.updated_at,
    )
    return {"context": moved, "switches": (switch,)}
