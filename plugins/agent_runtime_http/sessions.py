"""Sessions: made, listed, shown, changed, deleted."""

from __future__ import annotations

from typing import Any, Final, cast
from urllib.parse import quote

from agent_runtime import DurabilityNotReached, SessionHandle

from .answers import NO_CONTENT, Answer, json_answer
from .bodies import MERGE_PATCH
from .resources import Call, Operations, operation

__all__ = ["OPERATIONS"]

_FIELDS: Final = ("user_id", "system_prompt", "title", "description", "metadata", "agent")
_PATCHED: Final = ("title", "description", "metadata")


@operation(user_id=str, limit=int, cursor=str, order=str)
async def list_sessions(call: Call) -> Answer:
    """A page of sessions, of all users or of one."""
    return json_answer(await call.runtime.list_sessions(**call.options))


@operation(durability=str)
async def create(call: Call) -> Answer:
    """Create a session; 201 with its record and its Location, 409 if its id is taken."""
    given = _given(await call.members(optional=("session_id", *_FIELDS)))
    try:
        session = await call.runtime.create_session(**given, **call.options)
    except DurabilityNotReached as error:
        raise _recorded(error) from None
    location = f"{call.root}/v1/sessions/{quote(session.session_id, safe='')}"
    return json_answer(session.first_record, 201, [(b"location", location.encode())])


@operation(durability=str)
async def get_or_create(call: Call) -> Answer:
    """The session with this id: 201 if it was made for this request, 200 if it was there."""
    given = _given(await call.members(optional=_FIELDS, may_be_empty=True))
    try:
        session = await call.runtime.get_or_create_session(call.path["session_id"], **given, **call.options)
    except DurabilityNotReached as error:
        raise _recorded(error) from None
    return json_answer(session.first_record, 201 if session.created else 200)


@operation()
async def show(call: Call) -> Answer:
    """The record of a session."""
    return json_answer(await (await call.session()).record())


@operation(durability=str)
async def patch(call: Call) -> Answer:
    """Merge a patch (RFC 7396) into title, description and metadata; 200 and the record."""
    given = await call.members(optional=_PATCHED, types=MERGE_PATCH)
    return json_answer(await (await call.session()).merge(given, **call.options))


@operation(durability=str)
async def delete(call: Call) -> Answer:
    """Delete a session with all it has; 204."""
    await (await call.session()).delete(**call.options)
    return NO_CONTENT


def _given(members: dict[str, Any]) -> dict[str, Any]:
    """Null is as absent."""
    return {name: value for name, value in members.items() if value is not None}


def _recorded(error: DurabilityNotReached) -> DurabilityNotReached:
    """The same error, with the session's record as the outcome."""
    error.outcome = cast("SessionHandle", error.outcome).first_record
    return error


OPERATIONS: Final[Operations] = {
    "/v1/sessions": {"GET": list_sessions, "POST": create},
    "/v1/sessions/{session_id}": {"GET": show, "PUT": get_or_create, "PATCH": patch, "DELETE": delete},
}
