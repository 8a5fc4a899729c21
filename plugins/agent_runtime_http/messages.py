"""Messages: appended, listed, removed; the history for a model. Appending and the history are the hot paths."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from agent_runtime import DurabilityNotReached, InvalidInput

from .answers import NO_CONTENT, Answer, json_answer
from .problems import Refusal
from .resources import Call, Operations, operation

__all__ = ["OPERATIONS"]

_is_seq: Final = re.compile(r"[0-9]{1,18}").fullmatch


@operation(durability=str)
async def append(call: Call) -> Answer:
    """Append one message in chat format; 201 and the message as it is kept."""
    message = await call.object()
    session = await call.session()
    try:
        return json_answer(await session.append_message(message, **call.options), 201)
    except InvalidInput as error:
        raise _as_sent(error, message, 0) from None


@operation(durability=str)
async def append_batch(call: Call) -> Answer:
    """Append messages, all or none; 201 and the messages."""
    given = await call.members(required=("messages",))
    session = await call.session()
    try:
        return json_answer({"items": await session.append_many(given["messages"], **call.options)}, 201)
    except InvalidInput as error:
        raise _as_sent(error, given, 2) from None
    except DurabilityNotReached as error:
        error.outcome = {"items": error.outcome}
        raise


def _as_sent(error: InvalidInput, body: Any, depth: int) -> InvalidInput:
    """The same refusal with the way through the body, where what is kept as `extra` stands beside the other members.

    `depth` is how many keys lead to a message.
    """
    keys = error.keys
    if len(keys) < depth + 2 or keys[depth] != "extra":
        return error
    for key in keys[:depth]:
        body = body[key]
    if keys[depth + 1] in (body.get("extra") or {}):
        return error
    return InvalidInput(error.path, error.problem, (*keys[:depth], *keys[depth + 1 :]))


@operation(after=int, limit=int, order=str)
async def list_messages(call: Call) -> Answer:
    """A page of messages in order of seq."""
    return json_answer(await (await call.session()).messages(**call.options))


@operation()
async def show(call: Call) -> Answer:
    """One message, by its seq."""
    seq = call.path["seq"]
    if not _is_seq(seq):
        raise InvalidInput("seq", "must be a whole number")
    message = await (await call.session()).message(int(seq))
    if message is None:
        raise Refusal("message-not-found", f"the session has no message {seq}, or not any more")
    return json_answer(message)


@operation(durability=str)
async def clear(call: Call) -> Answer:
    """Remove all messages; 204."""
    await (await call.session()).clear(**call.options)
    return NO_CONTENT


@operation(durability=str)
async def pop(call: Call) -> Answer:
    """Remove the last message; 200 and the message, 404 if there is none."""
    message = await (await call.session()).pop(**call.options)
    if message is None:
        raise Refusal("message-not-found", "the session has no messages")
    return json_answer(message)


@operation(limit=int)
async def history(call: Call) -> Answer:
    """The conversation in chat format, valid for a model."""
    session = await call.session()
    messages = await session.history_json(**call.options)
    return Answer(b'{"session_id":%b,"messages":%b}' % (msgspec.json.encode(session.session_id), messages))


@operation(durability=str)
async def append_tool_result(call: Call) -> Answer:
    """Append the result of a tool call; 201 and the message."""
    given = await call.members(required=("call_id", "tool_name", "result"))
    session = await call.session()
    return json_answer(await session.append_tool_result(**given, **call.options), 201)


OPERATIONS: Final[Operations] = {
    "/v1/sessions/{session_id}/messages": {"POST": append, "GET": list_messages, "DELETE": clear},
    "/v1/sessions/{session_id}/history": {"GET": history},
    "/v1/sessions/{session_id}/tool-results": {"POST": append_tool_result},
    "/v1/sessions/{session_id}/messages/batch": {"POST": append_batch},
    "/v1/sessions/{session_id}/messages/pop": {"POST": pop},
    "/v1/sessions/{session_id}/messages/{seq}": {"GET": show},
}
