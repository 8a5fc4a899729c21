"""What goes over the wire as JSON beside the records of the core: bodies that come in, answers that go out.

A struct of a body says which members there may be; the runtime checks their values and names what is wrong. Both kinds
are what the OpenAPI document has as schemas, so limits stand here in the words of JSON Schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from agent_runtime import AgentContext, Document, Message, PurgedSession, Session, Watermarks
from agent_runtime.durations import LENGTH_MAX
from agent_runtime.plans import TITLE_CHARS_MAX
from agent_runtime.records import DEFAULT_AGENT, Role, Time
from agent_runtime.session import DESCRIPTION_CHARS_MAX, PAGE_ITEMS_MAX, REASON_CHARS_MAX
from agent_runtime.validation import ID_CHARS_MAX, TOKEN_COUNT_MAX

from .queries import ID

__all__ = [
    "IDLE_S_MAX",
    "AgentHandOver",
    "ChatMessage",
    "Check",
    "ContextPatch",
    "ContextWithHistory",
    "DocumentPage",
    "DocumentRecord",
    "Flushed",
    "Health",
    "History",
    "Id",
    "Live",
    "MessagePage",
    "Messages",
    "NewChatMessage",
    "NewMessages",
    "NewSession",
    "NewSessionWithId",
    "PastHandOver",
    "Purge",
    "PurgedSessions",
    "Readiness",
    "SessionPage",
    "SessionPatch",
    "ToolResult",
]

_RESERVED: Final = ["role", "content", "name", "tool_calls", "tool_call_id", "token_count", "metadata", "extra", "id"]

IDLE_S_MAX: Final = int(LENGTH_MAX.total_seconds())

Id: TypeAlias = Annotated[str, Meta(extra_json_schema=dict(ID))]
Name: TypeAlias = Annotated[
    str, Meta(min_length=1, max_length=ID_CHARS_MAX, pattern=r"^[^\u0000-\u001f\u007f-\u009f]+$")
]
Label: TypeAlias = Annotated[str, Meta(min_length=1, max_length=ID_CHARS_MAX)]
Title: TypeAlias = Annotated[str, Meta(max_length=TITLE_CHARS_MAX)]
Description: TypeAlias = Annotated[str, Meta(max_length=DESCRIPTION_CHARS_MAX)]
Reason: TypeAlias = Annotated[str, Meta(max_length=REASON_CHARS_MAX)]
Object: TypeAlias = dict[str, Any]


# --- sessions ---------------------------------------------------------------------------------------------------------


class NewSession(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A session to be made; null is as absent. `system_prompt` becomes its first message."""

    user_id: Id | None = None
    system_prompt: str | None = None
    title: Title | None = None
    description: Description | None = None
    metadata: Object | None = None
    agent: Annotated[Name | None, Meta(description=f"Who holds it at first; {DEFAULT_AGENT!r} unless given.")] = None


class NewSessionWithId(NewSession, forbid_unknown_fields=True, kw_only=True):
    """A session to be made; null is as absent. Without `session_id` it gets a UUIDv7; `system_prompt` becomes its first
    message.
    """

    session_id: Id | None = None


class SessionPatch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A merge patch (RFC 7396): what is absent stays, null removes, and so inside of `metadata`."""

    title: Title | UnsetType | None = UNSET
    description: Description | UnsetType | None = UNSET
    metadata: Object | UnsetType | None = UNSET


class SessionPage(msgspec.Struct, kw_only=True):
    """A part of the list of sessions. `next` is the `cursor` of the following part; null at the end."""

    items: list[Session]
    next: str | None


class Purge(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which sessions are to be purged: of these ids, and where so given those in which nothing has changed for longer.
    With `dry_run` nothing is deleted.
    """

    session_ids: Annotated[list[Id], Meta(min_length=1, max_length=PAGE_ITEMS_MAX)]
    idle_longer_than_s: Annotated[float, Meta(gt=0, le=IDLE_S_MAX)] | None = None
    dry_run: bool | None = None


class PurgedSessions(msgspec.Struct, kw_only=True):
    """The sessions that were purged, or would be."""

    items: list[PurgedSession]


# --- messages ---------------------------------------------------------------------------------------------------------


class ToolCall(msgspec.Struct, kw_only=True):
    """A tool call of the assistant, with whatever else the provider says of it."""

    id: Label


class NewChatMessage(msgspec.Struct, kw_only=True):
    """A message in chat format. Keys that are not named here are the provider's own (refusal, annotations, …): kept as
    `extra`, and given back in the history. `seq` is given by the runtime.
    """

    role: Role
    content: str | list[Object] | None = None
    name: Label | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Label | None = None
    token_count: Annotated[int, Meta(ge=0, le=TOKEN_COUNT_MAX)] | None = None
    metadata: Object | None = None
    extra: Object | None = None
    id: Annotated[Id | None, Meta(description="A UUIDv7 unless given.")] = None
    created_at: Annotated[Time | None, Meta(description="Now unless given.")] = None


class NewMessages(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Messages to append: all of them or none."""

    messages: Annotated[list[NewChatMessage], Meta(min_length=1)]


class ToolResult(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The result of a tool call. A string is kept as it is, any other JSON value as its text."""

    call_id: Label
    tool_name: Label
    result: Any


class Messages(msgspec.Struct, kw_only=True):
    """Messages as they are kept."""

    items: list[Message]


class MessagePage(msgspec.Struct, kw_only=True):
    """A part of the messages of a session. `next` is the `after` of the following part; null at the end."""

    items: list[Message]
    next: int | None


class ChatMessage(msgspec.Struct, kw_only=True):
    """A message in chat format, with whatever else the provider has said."""

    role: Role
    content: str | list[Object] | None
    name: str | UnsetType = UNSET
    tool_calls: list[Object] | UnsetType = UNSET
    tool_call_id: str | UnsetType = UNSET


class History(msgspec.Struct, kw_only=True):
    """A conversation, valid for a model: every tool call is followed by its results."""

    session_id: str
    messages: list[ChatMessage]


# --- agents -----------------------------------------------------------------------------------------------------------


class AgentHandOver(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """To which agent a session is handed over, and why."""

    agent: Name
    reason: Reason | None = None


class ContextPatch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A merge patch (RFC 7396) of the metadata: what is absent stays, null removes."""

    metadata: Object | UnsetType | None = UNSET


class PastHandOver(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A hand-over from one agent to another."""

    from_agent: str = msgspec.field(name="from")
    to_agent: str = msgspec.field(name="to")
    reason: str | None
    timestamp: Time
    metadata: Object | UnsetType = UNSET


class ContextWithHistory(AgentContext, frozen=True, kw_only=True):
    """Which agent holds the session, and every hand-over, the oldest first."""

    agent_history: list[PastHandOver]


# --- documents --------------------------------------------------------------------------------------------------------


class DocumentRecord(msgspec.Struct, frozen=True):
    """What is known of a document, without its value. `media_type` is null for JSON."""

    collection: str
    key: str
    media_type: str | None
    updated_at: Time


class DocumentPage(msgspec.Struct, kw_only=True):
    """A part of a collection. `next` is the `cursor` of the following part; null at the end. Bytes are in Base64."""

    items: list[Document]
    next: str | None


# --- the service ------------------------------------------------------------------------------------------------------


class Health(msgspec.Struct, kw_only=True):
    """That the process answers."""

    status: Literal["ok"] = "ok"
    service: Literal["agent-runtime"] = "agent-runtime"
    version: str


class Live(msgspec.Struct, kw_only=True):
    """That the process answers."""

    status: Literal["ok"] = "ok"


class Check(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One thing that was looked at. `fail` makes the service not ready, `warn` wants somebody to look; `since` when."""

    name: Literal["runtime", "storage", "lease", "quarantine", "journal"]
    status: Literal["ok", "warn", "fail"]
    detail: str
    since: Time | None = None


class Readiness(msgspec.Struct, kw_only=True):
    """Whether requests are served, and each check."""

    status: Literal["ready", "not ready"]
    checks: list[Check]


class Flushed(msgspec.Struct, kw_only=True):
    """How far the log has come, once all that was acknowledged is stored."""

    watermarks: Watermarks
