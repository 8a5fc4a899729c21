"""What each call on a session does: from the session's state, the change that has the call's effect, and its result.

Pure but for the identifiers and times that messages are given. Each function returns a `Plan`; a plan without a change
leaves everything as it is. Nothing here waits, checks input, or changes a resident.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from .archive import Archive
from .changes import Birth, Change, Details
from .door import Plan
from .errors import InvalidInput, SessionExists, SessionNotFound
from .identifiers import Identifiers
from .records import AgentContext, Document, Message, NewMessage, Session
from .residents import Resident, encode_to_keep
from .rows import ContextRow, DocumentRow, OutcomeRow, SwitchRow

__all__ = [
    "MESSAGE_BYTES_MAX",
    "TITLE_CHARS_MAX",
    "NewSession",
    "NotInTail",
    "Planner",
    "Stale",
    "only",
]

TITLE_CHARS_MAX: Final = 500
MESSAGE_BYTES_MAX: Final = 16 * 1024 * 1024

_encode: Final = msgspec.json.Encoder().encode


class NotInTail(Exception):
    """The plan needs the newest message, which is not in memory."""


class Stale(Exception):
    """What was read for the plan may have changed since."""


class NewSession(msgspec.Struct, frozen=True, kw_only=True):
    """What a session is created with. `metadata` is JSON text."""

    session_id: str
    agent: str
    user_id: str | None = None
    title: str | None = None
    description: str | None = None
    metadata: str = "{}"
    messages: Sequence[NewMessage] = ()
    created_at: datetime | None = None


class Planner:
    """Plans changes; `sequence` gives the sequence that the next change will have."""

    def __init__(self, *, sequence: Callable[[], int], identifiers: Identifiers, now: Callable[[], datetime]) -> None:
        self._sequence = sequence
        self._identifiers = identifiers
        self._now = now

    def identifier(self) -> str:
        """A new one, for what a plan is about to make."""
        return self._identifiers.new()

    def _change(self, resident: Resident, **parts: Any) -> Change:
        fields: dict[str, Any] = {
            "last_activity": self._now(),
            "message_count": resident.message_count,
            "next_seq": resident.next_seq,
        }
        return Change(
            sequence=self._sequence(),
            previous=resident.sequence,
            session_id=resident.session_id,
            incarnation=resident.incarnation,
            **(fields | parts),
        )

    def _message(self, new: NewMessage, seq: int, now: datetime, where: str = "message") -> tuple[Message, Raw]:
        message = Message(
            seq=seq,
            id=new.id or self._identifiers.new(),
            role=new.role,
            content=new.content,
            name=new.name,
            tool_calls=new.tool_calls,
            tool_call_id=new.tool_call_id,
            token_count=new.token_count,
            metadata=new.metadata,
            extra=new.extra,
            created_at=new.created_at or now,
        )
        encoded = encode_to_keep(message)
        if len(encoded) > MESSAGE_BYTES_MAX:
            raise InvalidInput(where, f"takes {len(encoded)} bytes as JSON, the most is {MESSAGE_BYTES_MAX}")
        return message, Raw(encoded)

    def _messages(self, new: Sequence[NewMessage], now: datetime, first_seq: int) -> list[tuple[Message, Raw]]:
        if len(new) == 1:
            return [self._message(new[0], first_seq, now)]
        return [self._message(each, first_seq + index, now, f"messages[{index}]") for index, each in enumerate(new)]

    def append(self, resident: Resident, new: Sequence[NewMessage]) -> Plan[list[Message]]:
        """Messages at the end; the first text of a user names a session that has no title."""
        now = self._now()
        made = self._messages(new, now, resident.next_seq)
        change = self._appended(resident, new, tuple([encoded for _, encoded in made]), now)
        return Plan(change, [message for message, _ in made])

    def append_one(self, resident: Resident, new: NewMessage) -> Plan[Message]:
        """As `append`, one message."""
        now = self._now()
        message, encoded = self._message(new, resident.next_seq, now)
        return Plan(self._appended(resident, (new,), (encoded,), now), message)

    def append_json(self, resident: Resident, new: NewMessage) -> Plan[Raw]:
        """As `append`, one message; the result is its JSON text."""
        now = self._now()
        _, encoded = self._message(new, resident.next_seq, now)
        return Plan(self._appended(resident, (new,), (encoded,), now), encoded)

    def _appended(
        self, resident: Resident, new: Sequence[NewMessage], encoded: tuple[Raw, ...], now: datetime
    ) -> Change:
        details = None
        if resident.title is None:
            title = _title(new)
            if title is not None:
                details = resident.details(title=title)
        count = len(encoded)
        return Change(
            sequence=self._sequence(),
            previous=resident.sequence,
            session_id=resident.session_id,
            incarnation=resident.incarnation,
            last_activity=now,
            message_count=resident.message_count + count,
            next_seq=resident.next_seq + count,
            details=details,
            messages=encoded,
        )

    def create(self, new: NewSession, current: Resident | None, *, exist_ok: bool) -> Plan[Session]:
        """A session that is not there yet; the result is its record, or that of the one that is there."""
        if current is not None and not current.deleted:
            if exist_ok:
                return Plan(None, current.record())
            raise SessionExists(current.session_id)
        now = self._now()
        created_at = new.created_at or now
        incarnation = self._identifiers.new()
        encoded = tuple([encoded for _, encoded in self._messages(new.messages, now, 1)])
        title = new.title if new.title is not None else _title(new.messages)
        change = Change(
            sequence=self._sequence(),
            previous=0,
            session_id=new.session_id,
            incarnation=incarnation,
            last_activity=now,
            message_count=len(encoded),
            next_seq=len(encoded) + 1,
            birth=Birth(created_at, new.user_id),
            details=Details(title, new.description, new.metadata),
            context=ContextRow(
                incarnation=incarnation,
                current_agent=new.agent,
                switch_count=0,
                last_switch_at=None,
                metadata="{}",
                created_at=created_at,
                updated_at=created_at,
            ),
            messages=encoded,
        )
        record = Session(
            session_id=new.session_id,
            user_id=new.user_id,
            title=title,
            description=new.description,
            metadata=msgspec.json.decode(new.metadata),
            created_at=created_at,
            last_activity=now,
            message_count=len(encoded),
            incarnation=incarnation,
        )
        return Plan(change, record)

    def encode(self, new: NewMessage, seq: int) -> Raw:
        """A message as a change holds it, under a seq of the caller's choice."""
        return self._message(new, seq, self._now())[1]

    def restore(
        self, current: Resident | None, archive: Archive, messages: Sequence[Raw], next_seq: int
    ) -> Plan[tuple[str, int]]:
        """A session as the archive has it, but with `messages`, the first of them; its incarnation and sequence."""
        if current is not None and not current.deleted:
            raise Stale
        incarnation = self._identifiers.new()
        context = archive.context
        title = _title(archive.messages) if archive.title is UNSET else archive.title
        change = Change(
            sequence=self._sequence(),
            previous=0,
            session_id=archive.session_id,
            incarnation=incarnation,
            last_activity=archive.last_activity,
            message_count=len(messages),
            next_seq=next_seq,
            birth=Birth(archive.created_at, archive.user_id),
            details=Details(title, archive.description, _text(archive.metadata)),
            context=ContextRow(
                incarnation=incarnation,
                current_agent=context.current_agent,
                switch_count=context.switch_count,
                last_switch_at=context.last_switch_at,
                metadata=_text(context.metadata),
                created_at=context.created_at,
                updated_at=context.updated_at,
            ),
            messages=tuple(messages),
            switches=tuple(
                SwitchRow(
                    incarnation=incarnation,
                    number=number,
                    from_agent=switch.from_agent,
                    to_agent=switch.to_agent,
                    reason=switch.reason,
                    switched_at=switch.switched_at,
                    metadata=None if switch.metadata is None else _text(switch.metadata),
                )
                for number, switch in enumerate(archive.switches, 1)
            ),
            documents=tuple(_document_row(incarnation, document) for document in archive.documents),
        )
        return Plan(change, (incarnation, change.sequence))

    def restore_more(
        self,
        current: Resident | None,
        archive: Archive,
        messages: Sequence[Raw],
        next_seq: int,
        seen: tuple[str, int],
    ) -> Plan[tuple[str, int]]:
        """More messages of the archive, at the end of a session that is still as `seen`: incarnation and sequence."""
        if current is None or current.deleted or (current.incarnation, current.sequence) != seen:
            raise Stale
        title = _title(archive.messages) if current.title is None and archive.title is UNSET else None
        change = self._change(
            current,
            last_activity=max(current.last_activity, archive.last_activity),
            message_count=current.message_count + len(messages),
            next_seq=next_seq,
            details=None if title is None else current.details(title=title),
            messages=tuple(messages),
        )
        return Plan(change, (current.incarnation, change.sequence))

    def pop(self, resident: Resident) -> Plan[Message | None]:
        """The newest message away."""
        if not resident.message_count:
            return Plan(None, None)
        if not resident.tail:
            raise NotInTail
        message = msgspec.json.decode(resident.tail[-1], type=Message)
        change = self._change(resident, removed=(message.seq,), message_count=resident.message_count - 1)
        return Plan(change, message)

    def clear(self, resident: Resident) -> Plan[None]:
        """All messages away."""
        if not resident.message_count:
            return Plan(None, None)
        return Plan(self._change(resident, floor=resident.next_seq - 1, message_count=0), None)

    def update(
        self,
        resident: Resident,
        *,
        title: str | UnsetType | None,
        description: str | UnsetType | None,
        metadata: str | UnsetType,
    ) -> Plan[Session]:
        """Details replaced, but for those that are not given."""
        given = {"title": title, "description": description, "metadata": metadata}
        details = resident.details(**{name: value for name, value in given.items() if value is not UNSET})
        change = self._change(resident, details=details)
        record = msgspec.structs.replace(
            resident.record(),
            title=details.title,
            description=details.description,
            metadata=msgspec.json.decode(details.metadata),
            last_activity=change.last_activity,
        )
        return Plan(change, record)

    def delete(self, resident: Resident) -> Plan[None]:
        """The session away, with all it has."""
        return Plan(self._change(resident, deleted=True), None)

    def delete_idle(self, current: Resident | None, incarnation: str, before: datetime) -> Plan[bool]:
        """The session away if this incarnation is there, nothing has happened in it since, and it is not held."""
        if current is None or current.incarnation != incarnation or current.deleted or current.held:
            return Plan(None, False)
        if current.last_activity >= before:
            return Plan(None, False)
        return Plan(self.delete(current).change, True)

    def delete_unchanged(self, seen: int, current: Resident | None) -> Plan[int | None]:
        """The session away if its last change is the one with the sequence `seen`.

        The result is the sequence of the deletion; None: something else has happened.
        """
        if current is None or current.deleted or current.sequence != seen:
            return Plan(None, None)
        deletion = self._change(current, deleted=True)
        return Plan(deletion, deletion.sequence)

    def forget(self, outcome: OutcomeRow, seen: int, current: Resident | None) -> Plan[int | None]:
        """An outcome overwritten by one that says nothing and has expired, if the session's last change is `seen`.

        The result is the sequence of the session's last change then; None: something else has happened.
        """
        if current is None or current.deleted or current.sequence != seen:
            return Plan(None, None)
        sequence = self._sequence()
        nothing = msgspec.structs.replace(
            outcome, route="", body_hash="", outcome="null", sequence=sequence, expires_at=self._now()
        )
        return Plan(self._change(current, last_activity=current.last_activity, outcome=nothing), sequence)

    def switch_agent(
        self, resident: Resident, agent: str, reason: str | None, metadata: str | None
    ) -> Plan[AgentContext]:
        """The session handed to `agent`; nothing if it has it."""
        context = resident.context
        if context.current_agent == agent:
            return Plan(None, resident.agent_context())
        now = self._now()
        row = msgspec.structs.replace(
            context, current_agent=agent, switch_count=context.switch_count + 1, last_switch_at=now, updated_at=now
        )
        switch = SwitchRow(
            incarnation=resident.incarnation,
            number=row.switch_count,
            from_agent=context.current_agent,
            to_agent=agent,
            reason=reason,
            switched_at=now,
            metadata=metadata,
        )
        change = self._change(resident, context=row, switches=(switch,), last_activity=now)
        return Plan(change, _context(resident, row))

    def update_context(self, resident: Resident, metadata: str) -> Plan[AgentContext]:
        """The metadata of the context replaced."""
        now = self._now()
        row = msgspec.structs.replace(resident.context, metadata=metadata, updated_at=now)
        return Plan(self._change(resident, context=row, last_activity=now), _context(resident, row))

    def put_document(self, resident: Resident, document: Document, text: str | None) -> Plan[Document]:
        """A document written or replaced; `text` is its value as JSON, None for bytes."""
        now = self._now()
        row = DocumentRow(
            incarnation=resident.incarnation,
            collection=document.collection,
            key=document.key,
            value=text,
            data=document.value if text is None else None,
            media_type=document.media_type,
            updated_at=now,
        )
        change = self._change(resident, documents=(row,), last_activity=now)
        return Plan(change, msgspec.structs.replace(document, updated_at=now))

    def delete_document(self, resident: Resident, collection: str, key: str) -> Plan[bool]:
        """A document away that is there."""
        return Plan(self._change(resident, discarded=((collection, key),)), True)


def _context(resident: Resident, row: ContextRow) -> AgentContext:
    return AgentContext(
        session_id=resident.session_id,
        current_agent=row.current_agent,
        switch_count=row.switch_count,
        last_switch_at=row.last_switch_at,
        metadata=msgspec.json.decode(row.metadata),
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def _text(value: object) -> str:
    return _encode(value).decode()


def _document_row(incarnation: str, document: Document) -> DocumentRow:
    is_json = document.media_type is None
    return DocumentRow(
        incarnation=incarnation,
        collection=document.collection,
        key=document.key,
        value=_text(document.value) if is_json else None,
        data=None if is_json else document.value,
        media_type=document.media_type,
        updated_at=document.updated_at,
    )


def _title(messages: Sequence[NewMessage]) -> str | None:
    """The text of the first message of a user that has any, cut."""
    for message in messages:
        if message.role == "user":
            content = message.content
            if isinstance(content, list):
                texts = (part.get("text") for part in content if isinstance(part, dict))
                content = " ".join(text for text in texts if isinstance(text, str))
            if content and content.strip():
                return content[:TITLE_CHARS_MAX]
    return None


def only(current: Resident | None, session_id: str, incarnation: str) -> Resident:
    """The session that a handle means."""
    if current is None or current.incarnation != incarnation or current.deleted:
        raise SessionNotFound(session_id)
    return current
