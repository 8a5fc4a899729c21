"""Sessions in plain dicts and lists: what every call on the runtime must do and give. Nothing is
stored, cached or awaited.

A call is made on the runtime first, and told to the model with what it returned: the model checks it against its own
result, and takes over what only the runtime can know (ids and times). From then on every read must equal the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from agent_runtime import AgentContext, AgentSwitch, Document, Message, NewMessage, Page, Session, SessionHandle
from agent_runtime.history import chat_history

TITLE_CHARS_MAX = 500


class Outcome(NamedTuple):
    """What a call with an idempotency key gave."""

    route: str
    arguments: object
    result: object


def title_of(message: NewMessage) -> str | None:
    """What a message calls a session that has no title."""
    if message.role != "user" or not message.content:
        return None
    text = message.content if isinstance(message.content, str) else " ".join(part["text"] for part in message.content)
    return text[:TITLE_CHARS_MAX]


@dataclass
class ModelSession:
    """One incarnation of a session. `record` and `context` are as the runtime gave them after the last change."""

    session_id: str
    incarnation: str
    user_id: str | None
    title: str | None
    description: str | None
    metadata: dict[str, Any]
    agent: str
    record: Session = field(init=False)
    context: AgentContext = field(init=False)
    context_metadata: dict[str, Any] = field(default_factory=dict)
    next_seq: int = 1
    messages: list[Message] = field(default_factory=list)
    switches: list[AgentSwitch] = field(default_factory=list)
    documents: dict[tuple[str, str], Document] = field(default_factory=dict)

    # What calls do

    def append(self, new: Sequence[NewMessage], got: Sequence[Message]) -> None:
        assert len(got) == len(new)
        for given, message in zip(new, got, strict=True):
            self.messages.append(
                Message(
                    seq=self.next_seq,
                    id=given.id or message.id,
                    role=given.role,
                    content=given.content,
                    name=given.name,
                    tool_calls=given.tool_calls,
                    tool_call_id=given.tool_call_id,
                    token_count=given.token_count,
                    metadata=given.metadata,
                    extra=given.extra,
                    created_at=given.created_at or message.created_at,
                )
            )
            self.next_seq += 1
            if self.title is None:
                self.title = title_of(given)
        assert list(got) == self.messages[len(self.messages) - len(new) :]

    def pop(self, got: Message | None) -> None:
        assert got == (self.messages.pop() if self.messages else None)

    def clear(self) -> None:
        self.messages.clear()

    def switch(self, agent: str, reason: str | None, got: AgentContext) -> None:
        if agent != self.agent:
            assert got.last_switch_at is not None
            self.switches.append(
                AgentSwitch(from_agent=self.agent, to_agent=agent, reason=reason, switched_at=got.last_switch_at)
            )
            self.agent = agent

    def put(self, collection: str, key: str, value: object, media_type: str | None, got: Document) -> None:
        document = Document(
            collection=collection, key=key, value=value, media_type=media_type, updated_at=got.updated_at
        )
        assert got == document
        self.documents[collection, key] = document

    async def settle(self, handle: SessionHandle) -> None:
        """After a change: check the record and the context, and keep the times in them."""
        record = await handle.record()
        began = getattr(self, "record", record)
        assert record == Session(
            session_id=self.session_id,
            user_id=self.user_id,
            title=self.title,
            description=self.description,
            metadata=self.metadata,
            created_at=began.created_at,
            last_activity=record.last_activity,
            message_count=len(self.messages),
            incarnation=self.incarnation,
        )
        context = await handle.context()
        assert context == AgentContext(
            session_id=self.session_id,
            current_agent=self.agent,
            switch_count=len(self.switches),
            last_switch_at=self.switches[-1].switched_at if self.switches else None,
            metadata=self.context_metadata,
            created_at=began.created_at,
            updated_at=context.updated_at,
        )
        self.record, self.context = record, context

    # What reads give

    def page(self, after: int | None, limit: int, order: str) -> Page[Message]:
        if order == "asc":
            found = [message for message in self.messages if message.seq > (after or 0)]
        else:
            found = [message for message in reversed(self.messages) if after is None or message.seq < after]
        return Page(found[:limit], found[limit - 1].seq if len(found) > limit else None)

    def message(self, seq: int) -> Message | None:
        return next((message for message in self.messages if message.seq == seq), None)

    def history(self, limit: int | None) -> list[dict[str, Any]]:
        return chat_history(self.messages, limit)

    def document_page(self, collection: str, after: str | None, limit: int) -> Page[Document]:
        keys = sorted(key for of, key in self.documents if of == collection and (after is None or key > after))
        found = [self.documents[collection, key] for key in keys]
        return Page(found[:limit], found[limit - 1].key if len(found) > limit else None)

    def copy(self) -> ModelSession:
        """The session as it is now, whatever happens later."""
        copied = replace(self, messages=[*self.messages], switches=[*self.switches], documents={**self.documents})
        copied.record, copied.context = self.record, self.context
        return copied


@dataclass
class Model:
    """All sessions that are there, by id, and the outcomes of calls with an idempotency key, by scope and key."""

    sessions: dict[str, ModelSession] = field(default_factory=dict)
    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)

    async def create(
        self,
        handle: SessionHandle,
        *,
        user_id: str | None = None,
        system_prompt: str | None = None,
        title: str | None = None,
        description: str | None = None,
        metadata: dict[str, Any] | None = None,
        agent: str = "orchestrator",
    ) -> ModelSession:
        assert handle.session_id not in self.sessions
        session = ModelSession(
            session_id=handle.session_id,
            incarnation=handle.incarnation,
            user_id=user_id,
            title=title,
            description=description,
            metadata=metadata or {},
            agent=agent,
        )
        if system_prompt is not None:
            session.append([NewMessage(role="system", content=system_prompt)], (await handle.messages()).items)
        await session.settle(handle)
        self.sessions[handle.session_id] = session
        return session

    def listing(self, user_id: str | None, order: str, behind: Session | None = None) -> list[Session]:
        """The records of all sessions (of a user) in order of creation, behind one of them."""
        records = [each.record for each in self.sessions.values() if user_id is None or each.user_id == user_id]
        records.sort(key=place, reverse=order == "desc")
        if behind is None:
            return records
        if order == "desc":
            return [record for record in records if place(record) < place(behind)]
        return [record for record in records if place(record) > place(behind)]

    def copy(self) -> Model:
        """Everything as it is now, whatever happens later."""
        return Model({name: session.copy() for name, session in self.sessions.items()}, dict(self.outcomes))


def place(record: Session) -> tuple[Any, str]:
    """Where a session stands in lists."""
    return record.created_at, record.incarnation
