"""Messages: appended, listed, removed; the history for a model.

Appending and the history are the hot paths.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from agent_runtime import DurabilityNotReached, InvalidInput, Message

from .answers import NO_CONTENT, Answer, json_answer
from .operations import Gives, Operations, Takes, operation
from .problems import Refusal
from .queries import AFTER, DURABILITY, Parameter, limit, order
from .resources import Call
from .shapes import History, MessagePage, Messages, NewChatMessage, NewMessages, ToolResult

__all__ = ["OPERATIONS"]

_QUESTION: Final = {"role": "user", "content": "Find me a train to Porto."}
_CALL: Final = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "trains", "arguments": '{"to": "Porto"}'}}
    ],
}
_NEWEST: Final = Parameter(
    int, "At most that many of the newest, in whole tool groups.", {"minimum": 1, "maximum": 2**31}
)

_is_seq: Final = re.compile(r"[0-9]{1,18}").fullmatch


@operation(Gives(201, Message), takes=Takes(NewChatMessage, example=_QUESTION), durability=DURABILITY)
async def append_message(call: Call) -> Answer:
    """Append a message in chat format.

    The answer is the message as it is kept, with its `seq`.
    """
    message = call.object()
    session = await call.session()
    try:
        return Answer(await session.append_json(message, **call.options), 201)
    except InvalidInput as error:
        raise _as_sent(error, message, 0) from None
    except DurabilityNotReached as error:
        error.outcome = msgspec.Raw(error.outcome)
        raise


@operation(
    Gives(201, Messages), takes=Takes(NewMessages, example={"messages": [_QUESTION, _CALL]}), durability=DURABILITY
)
async def append_messages(call: Call) -> Answer:
    """Append several messages, all of them or none."""
    given = call.members()
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


@operation(Gives(200, MessagePage), after=AFTER, limit=limit(100), order=order("asc"))
async def list_messages(call: Call) -> Answer:
    """List messages, in order of seq."""
    return json_answer(await (await call.session()).messages(**call.options))


@operation(Gives(200, Message), refuses=["message-not-found"])
async def get_message(call: Call) -> Answer:
    """Get one message, by its seq."""
    seq = call.path["seq"]
    if not _is_seq(seq):
        raise InvalidInput("seq", "must be a whole number")
    message = await (await call.session()).message(int(seq))
    if message is None:
        raise Refusal("message-not-found", f"the session has no message {seq}, or not any more")
    return json_answer(message)


@operation(Gives(204), durability=DURABILITY)
async def clear_messages(call: Call) -> Answer:
    """Remove all messages.

    No `seq` is used again.
    """
    await (await call.session()).clear(**call.options)
    return NO_CONTENT


@operation(Gives(200, Message), refuses=["message-not-found"], durability=DURABILITY)
async def pop_message(call: Call) -> Answer:
    """Remove the last message.

    The answer is the message that was removed.
    """
    message = await (await call.session()).pop(**call.options)
    if message is None:
        raise Refusal("message-not-found", "the session has no messages")
    return json_answer(message)


@operation(Gives(200, History), limit=_NEWEST)
async def get_history(call: Call) -> Answer:
    """Get the conversation in chat format, valid for a model.

    Every tool call is followed by its results; one that has none gets a result that says it was interrupted. A limit
    keeps the leading system message and cuts no tool group.
    """
    session = await call.session()
    messages = await session.history_json(**call.options)
    return Answer(b'{"session_id":%b,"messages":%b}' % (msgspec.json.encode(session.session_id), messages))


@operation(
    Gives(201, Message),
    takes=Takes(ToolResult, example={"call_id": "call_1", "tool_name": "trains", "result": {"departs": "09:30"}}),
    durability=DURABILITY,
)
async def append_tool_result(call: Call) -> Answer:
    """Append the result of a tool call.

    It is a message of the role `tool`.
    """
    given = call.members()
    session = await call.session()
    return json_answer(await session.append_tool_result(**given, **call.options), 201)


OPERATIONS: Final[Operations] = {
    "/v1/sessions/{session_id}/messages": {"POST": append_message, "GET": list_messages, "DELETE": clear_messages},
    "/v1/sessions/{session_id}/history": {"GET": get_history},
    "/v1/sessions/{session_id}/tool-results": {"POST": append_tool_result},
    "/v1/sessions/{session_id}/messages/batch": {"POST": append_messages},
    "/v1/sessions/{session_id}/messages/pop": {"POST": pop_message},
    "/v1/sessions/{session_id}/messages/{seq}": {"GET": get_message},
}
