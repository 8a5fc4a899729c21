"""A session, whole, and the line of JSON that it is exported as and imported from.

    {"session_id": …, "messages": [{"role": …, "content": …, …}, …]}

is a complete line. `messages` are in chat format, exactly as they were put in; of a message's own fields `token_count`
and `metadata` stand there too. These keys may come besides, each restored to the letter; without them a session is as
one that was just created:

- `user_id`, `title` (absent: made of the first user's text; null: none), `description`, `metadata`, `created_at`,
  `last_activity`, and `next_seq`, the seq of the next message, as no seq is ever used again.
- `message_details`: for each of `messages` its {seq, id, created_at}.
- `context`: {current_agent, switch_count, last_switch_at, metadata, created_at, updated_at}.
- `switches`: [{from_agent, to_agent, reason, switched_at, metadata}], all of them, oldest first.
- `documents`: [{collection, key, updated_at, value}], with {data, media_type} instead of `value` for bytes, in base64.

`archive_line` writes all keys in one fixed order, without spaces, with unicode as it is and times in UTC: equal
sessions give equal bytes. `parse_line` refuses keys that it does not know, as what they hold would be lost. Both are
pure functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

from .errors import InvalidInput
from .records import DEFAULT_AGENT, AgentContext, AgentSwitch, Document, NewMessage
from .validation import SEQ_MAX, parse_message

__all__ = ["Archive", "archive_line", "parse_line"]


class Archive(msgspec.Struct, frozen=True, kw_only=True):
    """A session with all it has, but for the outcomes of idempotent calls and what is in quarantine.

    `seqs` are those of `messages`; None while they are to be numbered as by appending. `next_seq` None is the one
    behind the last message. `title` UNSET is what appending the messages would make it.
    """

    session_id: str
    user_id: str | None = None
    title: str | UnsetType | None = UNSET
    description: str | None = None
    metadata: dict[str, Any] = {}
    created_at: datetime
    last_activity: datetime
    context: AgentContext
    switches: Sequence[AgentSwitch] = ()
    documents: Sequence[Document] = ()
    next_seq: int | None = None
    messages: Sequence[NewMessage] = ()
    seqs: Sequence[int] | None = None


# --- the format: the keys in their order ------------------------------------------------------------------------------

_Time = Annotated[datetime, Meta(tz=True)]
_Count = Annotated[int, Meta(ge=0, le=SEQ_MAX)]
_Seq = Annotated[int, Meta(ge=1, le=SEQ_MAX)]


class _ContextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    current_agent: str | None = None
    switch_count: _Count | None = None
    last_switch_at: _Time | None = None
    metadata: dict[str, Any] | None = None
    created_at: _Time | None = None
    updated_at: _Time | None = None


class _SwitchPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    from_agent: str
    to_agent: str
    reason: str | None = None
    switched_at: _Time
    metadata: dict[str, Any] | None = None


class _DocumentPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    collection: str
    key: str
    updated_at: _Time | None = None
    value: Any = UNSET
    data: bytes | UnsetType = UNSET
    media_type: str | UnsetType | None = UNSET


class _DetailPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    seq: _Seq
    id: str | None = None
    created_at: _Time | None = None


class _Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    session_id: str
    user_id: str | None = None
    title: str | UnsetType | None = UNSET
    description: str | None = None
    metadata: dict[str, Any] | None = None
    created_at: _Time | None = None
    last_activity: _Time | None = None
    context: _ContextPart | None = None
    switches: list[_SwitchPart] | None = None
    documents: list[_DocumentPart] | None = None
    next_seq: _Seq | None = None
    messages: list[dict[str, Any]]
    message_details: list[_DetailPart] | None = None


class _PlainLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    session_id: str
    messages: list[dict[str, Any]]


# --- writing ----------------------------------------------------------------------------------------------------------

_encode: Final = msgspec.json.Encoder().encode


def archive_line(archive: Archive, *, plain: bool = False) -> bytes:
    """The line of a session, with its line feed; `plain`: only its id and the messages in chat format."""
    messages = [_chat(message) for message in archive.messages]
    if plain:
        return _encode(_PlainLine(session_id=archive.session_id, messages=messages)) + b"\n"
    line = _Line(
        session_id=archive.session_id,
        user_id=archive.user_id,
        title=archive.title,
        description=archive.description,
        metadata=archive.metadata,
        created_at=archive.created_at,
        last_activity=archive.last_activity,
        context=_ContextPart(**{name: getattr(archive.context, name) for name in _ContextPart.__struct_fields__}),
        switches=[_SwitchPart(**msgspec.structs.asdict(switch)) for switch in archive.switches],
        documents=[_document_part(document) for document in archive.documents],
        next_seq=archive.next_seq,
        messages=messages,
        message_details=None
        if archive.seqs is None
        else [
            _DetailPart(seq=seq, id=message.id, created_at=message.created_at)
            for seq, message in zip(archive.seqs, archive.messages, strict=True)
        ],
    )
    return _encode(line) + b"\n"


def _chat(message: NewMessage) -> dict[str, Any]:
    """The message in chat format, with those of its own fields that an import takes from there."""
    chat: dict[str, Any] = {"role": message.role, "content": message.content}
    for name in ("name", "tool_calls", "tool_call_id", "token_count", "metadata"):
        value = getattr(message, name)
        if value is not None:
            chat[name] = value
    return chat | (message.extra or {})


def _document_part(document: Document) -> _DocumentPart:
    part = _DocumentPart(collection=document.collection, key=document.key, updated_at=document.updated_at)
    if document.media_type is None:
        return msgspec.structs.replace(part, value=document.value)
    return msgspec.structs.replace(part, data=document.value, media_type=document.media_type)


# --- reading ----------------------------------------------------------------------------------------------------------

_decode_line: Final = msgspec.json.Decoder(_Line).decode
_AT: Final = re.compile(r" - at `\$\.?(.*)`$")
_WORDS: Final = (
    (re.compile(r"Object missing required field `(.*)`"), "is missing"),
    (
        re.compile(r"Object contains unknown field `(.*)`"),
        "is not a key that can stand here; what it holds would be lost, so take it out",
    ),
)


def parse_line(data: bytes, now: datetime) -> Archive:
    """The session that a line describes. `now` stands for the times that it does not give.

    Only the format is checked; whether the session can be stored, `Archives.restore` finds out.

    Raises:
        InvalidInput: `path` is the place in the line, as in `messages[3].role`; "line" for all of it.
    """
    try:
        line = _decode_line(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        line = _explained(data)
    created_at = line.created_at or now
    messages = [parse_message(f"messages[{index}]", each) for index, each in enumerate(line.messages)]
    if line.message_details is not None:
        messages = _detailed(messages, line.message_details)
    return Archive(
        session_id=line.session_id,
        user_id=line.user_id,
        title=line.title,
        description=line.description,
        metadata=line.metadata or {},
        created_at=created_at,
        last_activity=line.last_activity or now,
        context=_context(line, created_at),
        switches=[AgentSwitch(**msgspec.structs.asdict(part)) for part in line.switches or ()],
        documents=[_document(f"documents[{index}]", part, now) for index, part in enumerate(line.documents or ())],
        next_seq=line.next_seq,
        messages=messages,
        seqs=None if line.message_details is None else [detail.seq for detail in line.message_details],
    )


def _explained(data: bytes) -> _Line:
    """A line that is not as it should be: raises what is wrong with it, in words and with its place.

    Returns the line if nothing is found: then it holds values that JSON has no form for (NaN, lone surrogates, numbers
    out of range). Those are refused when the session is checked, which can name their place.
    """
    problem: str
    path = "line"
    try:
        return msgspec.convert(json.loads(data.decode()), _Line)
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start + 1})"
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg} (character {error.pos + 1})"
    except RecursionError:
        problem = "is nested too deeply"
    except msgspec.ValidationError as error:
        path, problem = _placed(str(error))
    except ValueError:
        problem = "holds a number with too many digits"
    raise InvalidInput(path, problem)


def _placed(message: str) -> tuple[str, str]:
    """The place and the problem that an error of msgspec names."""
    at = _AT.search(message)
    path = at[1] if at else ""
    problem = _AT.sub("", message)
    for pattern, words in _WORDS:
        if key := pattern.fullmatch(problem):
            return f"{path}.{key[1]}".lstrip("."), words
    return path or "line", problem


def _detailed(messages: list[NewMessage], details: list[_DetailPart]) -> list[NewMessage]:
    """The messages with their ids and times."""
    if len(details) != len(messages):
        raise InvalidInput("message_details", f"has {len(details)} entries for {len(messages)} messages")
    detailed = []
    for index, (message, detail) in enumerate(zip(messages, details, strict=True)):
        given = {"id": detail.id, "created_at": detail.created_at}
        for name, value in given.items():
            if value is not None and getattr(message, name) is not None:
                raise InvalidInput(f"message_details[{index}].{name}", "is given twice: here and in the message")
        set_here = {name: value for name, value in given.items() if value is not None}
        detailed.append(msgspec.structs.replace(message, **set_here))
    return detailed


def _context(line: _Line, created_at: datetime) -> AgentContext:
    part = line.context or _ContextPart()
    begun_at = part.created_at or created_at
    return AgentContext(
        session_id=line.session_id,
        current_agent=DEFAULT_AGENT if part.current_agent is None else part.current_agent,
        switch_count=part.switch_count or 0,
        last_switch_at=part.last_switch_at,
        metadata=part.metadata or {},
        created_at=begun_at,
        updated_at=part.updated_at or begun_at,
    )


def _document(path: str, part: _DocumentPart, now: datetime) -> Document:
    if (part.value is UNSET) == (part.data is UNSET):
        raise InvalidInput(path, "must have either a value (JSON) or data (bytes in base64)")
    if part.data is UNSET and part.media_type:
        raise InvalidInput(f"{path}.media_type", "goes with data only; a JSON value has none")
    return Document(
        collection=part.collection,
        key=part.key,
        value=part.value if part.data is UNSET else part.data,
        media_type=None if part.data is UNSET else part.media_type or "application/octet-stream",
        updated_at=part.updated_at or now,
    )
