"""Sessions: made, listed, shown, changed, deleted."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final, cast
from urllib.parse import quote

from agent_runtime import DurabilityNotReached, InvalidInput, Session, SessionHandle

from .answers import NO_CONTENT, Answer, json_answer
from .bodies import MERGE_PATCH
from .operations import Gives, Operations, Takes, operation
from .queries import CURSOR, DURABILITY, USER_ID, limit, order
from .resources import Call
from .shapes import IDLE_S_MAX, NewSession, NewSessionWithId, Purge, PurgedSessions, SessionPage, SessionPatch

__all__ = ["OPERATIONS"]

_NEW: Final = {"user_id": "ada", "system_prompt": "You are a travel agent.", "metadata": {"channel": "web"}}


@operation(Gives(200, SessionPage), user_id=USER_ID, limit=limit(50), cursor=CURSOR, order=order("desc"))
async def list_sessions(call: Call) -> Answer:
    """List sessions, of all users or of one.

    In the order they were made in. A list that is read while it changes repeats nothing, and misses nothing that was
    there all the time.
    """
    return json_answer(await call.runtime.list_sessions(**call.options))


@operation(
    Gives(201, Session, headers=["Location"]),
    takes=Takes(NewSessionWithId, example={"session_id": "porto", **_NEW}),
    refuses=["session-exists"],
    durability=DURABILITY,
)
async def create_session(call: Call) -> Answer:
    """Create a session.

    The answer is its record, and `Location` where it is found. An id that is taken is refused.
    """
    given = _given(call.members())
    try:
        session = await call.runtime.create_session(**given, **call.options)
    except DurabilityNotReached as error:
        raise _recorded(error) from None
    location = f"{call.root}/v1/sessions/{quote(session.session_id, safe='')}"
    return json_answer(session.first_record, 201, [(b"location", location.encode())])


@operation(
    Gives(200, Session),
    Gives(201, Session),
    takes=Takes(NewSession, example=_NEW, may_be_empty=True),
    durability=DURABILITY,
)
async def get_or_create_session(call: Call) -> Answer:
    """Get a session, or create it if there is none.

    201 if it was made for this request; 200 if it was there, and then the body changes nothing. It may be left out.
    """
    given = _given(call.members())
    try:
        session = await call.runtime.get_or_create_session(call.path["session_id"], **given, **call.options)
    except DurabilityNotReached as error:
        raise _recorded(error) from None
    return json_answer(session.first_record, 201 if session.created else 200)


@operation(Gives(200, Session))
async def get_session(call: Call) -> Answer:
    """Get the record of a session."""
    return json_answer(await (await call.session()).record())


@operation(
    Gives(200, Session),
    takes=Takes(SessionPatch, example={"title": "To Porto", "metadata": {"channel": None}}, media_types=MERGE_PATCH),
    durability=DURABILITY,
)
async def update_session(call: Call) -> Answer:
    """Change title, description or metadata of a session.

    The body is a merge patch (RFC 7396): what is absent stays, null removes.
    """
    given = call.members()
    return json_answer(await (await call.session()).merge(given, **call.options))


@operation(Gives(204), durability=DURABILITY)
async def delete_session(call: Call) -> Answer:
    """Delete a session, with its messages and documents.

    It is gone from every read at once. Its id may be used again, for another session.
    """
    await (await call.session()).delete(**call.options)
    return NO_CONTENT


@operation(
    Gives(200, PurgedSessions),
    takes=Takes(Purge, example={"session_ids": ["porto"], "dry_run": True}),
    refuses=["quarantined"],
)
async def purge_sessions(call: Call) -> Answer:
    """Delete sessions so that nothing of them is left.

    The answer, which comes once they are gone from the database's rows and from the journal, has those that were there
    and idle for as long as is asked for, with what was taken of each.
    """
    given = call.members()
    session_ids, idle_s, dry_run = given["session_ids"], given.get("idle_longer_than_s"), given.get("dry_run")
    if not isinstance(dry_run, bool | None):  # an empty value is no false: it would purge
        raise InvalidInput("dry_run", "must be true or false")
    idle = None if idle_s is None else _length(idle_s)
    purged = await call.runtime.purge_sessions(session_ids, idle_longer_than=idle, dry_run=bool(dry_run))
    return json_answer({"items": purged})


def _length(seconds: object) -> timedelta:
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds <= IDLE_S_MAX:
        return max(timedelta(seconds=seconds), timedelta.resolution)
    raise InvalidInput("idle_longer_than_s", f"must be a number of seconds above 0, at most {IDLE_S_MAX}")


def _given(members: dict[str, Any]) -> dict[str, Any]:
    """Null is as absent."""
    return {name: value for name, value in members.items() if value is not None}


def _recorded(error: DurabilityNotReached) -> DurabilityNotReached:
    """The same error, with the session's record as the outcome."""
    error.outcome = cast("SessionHandle", error.outcome).first_record
    return error


OPERATIONS: Final[Operations] = {
    "/v1/sessions": {"GET": list_sessions, "POST": create_session},
    "/v1/purge": {"POST": purge_sessions},
    "/v1/sessions/{session_id}": {
        "GET": get_session,
        "PUT": get_or_create_session,
        "PATCH": update_session,
        "DELETE": delete_session,
    },
}
