"""What a session consists of, as callers see it: frozen structs.

Times are aware and in UTC. JSON values (metadata, content parts, tool calls, a document's value) are the plain Python
objects that `json` would give: what went in comes out, key order and number forms included.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Generic, Literal, TypeAlias, TypeVar

import msgspec

__all__ = [
    "DEFAULT_AGENT",
    "LATE",
    "ROLES",
    "AgentContext",
    "AgentSwitch",
    "Document",
    "Durability",
    "Message",
    "NewMessage",
    "Order",
    "Page",
    "PurgedSession",
    "Role",
    "Session",
    "Time",
    "Watermarks",
]

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: Final = ("system", "developer", "user", "assistant", "tool")
Order: TypeAlias = Literal["asc", "desc"]
Durability: TypeAlias = Literal["buffered", "journaled", "synced", "stored"]
DEFAULT_AGENT: Final = "orchestrator"
"""Who holds a session at first, unless told otherwise."""
Time: TypeAlias = Annotated[datetime, msgspec.Meta(tz=True)]
"""A time with a time zone, which is UTC in what the runtime gives."""
LATE: Final = "agent_runtime_late"
"""The key of a message's metadata that marks it as late: `{"seq": 57}`, the seq under which it was acknowledged.

Such a message was acknowledged by a runtime that lost its lease before it was stored, and came in when another had
appended to the session.
"""
Item = TypeVar("Item")


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation.

    `incarnation` tells a session from an earlier one that was deleted under the same id. `message_count` counts the
    messages that are there now. `last_activity` is the time of the last change of any kind.
    """

    session_id: str
    user_id: str | None
    title: str | None
    description: str | None
    metadata: dict[str, Any]
    created_at: Time
    last_activity: Time
    message_count: int
    incarnation: str


class PurgedSession(msgspec.Struct, frozen=True, kw_only=True):
    """What a purge takes of a session: messages, documents, changes in quarantine, and the bytes of these, as JSON."""

    session_id: str
    messages: int
    documents: int
    quarantined: int
    bytes: int


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message. `seq` counts from 1 in each session and is never used again, whatever is removed.

    `extra` holds the keys of a chat message that are not ours (refusal, annotations, …), to be given back.
    """

    seq: int
    id: str
    role: Role
    content: str | list[Any] | None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    token_count: int | None = None
    metadata: dict[str, Any] | None = None
    extra: dict[str, Any] | None = None
    created_at: Time

    @property
    def late(self) -> bool:
        """Whether the message came in late: see `LATE`."""
        return self.metadata is not None and LATE in self.metadata

    def to_chat(self) -> dict[str, Any]:
        """The message in chat format: role, content, and what is set of name, tool_calls, tool_call_id and `extra`."""
        chat: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            chat["name"] = self.name
        if self.tool_calls is not None:
            chat["tool_calls"] = self.tool_calls
        if self.tool_call_id is not None:
            chat["tool_call_id"] = self.tool_call_id
        if self.extra:
            chat.update(self.extra)
        return chat


class NewMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message to append. `id` (default: a new UUIDv7) and `created_at` (default: now) may be given."""

    role: Role
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    token_count: int | None = None
    metadata: dict[str, Any] | None = None
    extra: dict[str, Any] | None = None
    id: str | None = None
    created_at: Time | None = None


class AgentContext(msgspec.Struct, frozen=True, kw_only=True):
    """Which agent holds the session. `updated_at` moves with every switch and every update of the metadata."""

    session_id: str
    current_agent: str
    switch_count: int
    last_switch_at: Time | None
    metadata: dict[str, Any]
    created_at: Time
    updated_at: Time


class AgentSwitch(msgspec.Struct, frozen=True, kw_only=True):
    """One hand-over from one agent to another."""

    from_agent: str
    to_agent: str
    reason: str | None
    switched_at: Time
    metadata: dict[str, Any] | None = None


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """A keyed value of a session: JSON (`media_type` is None), or bytes with their media type."""

    collection: str
    key: str
    value: Any
    media_type: str | None
    updated_at: Time


class Page(msgspec.Struct, Generic[Item], frozen=True):
    """A part of a list. `next` is what to hand in as `after` or `cursor` for the following part; None at the end."""

    items: list[Item]
    next: Any = None


class Watermarks(msgspec.Struct, frozen=True, kw_only=True):
    """How far the log of changes has come: `accepted` is the sequence of the last change that was acknowledged.

    Each of the others is a sequence up to which every change is at that level; they only grow. `journaled` and `synced`
    are None while there is no journal.
    """

    accepted: int
    journaled: int | None
    synced: int | None
    stored: int
