"""The HTTP API of the old service: its paths, its shapes, its way to say that there is no such session.

Times are ISO 8601 with an offset. Everything else that is refused or fails is answered as the surface answers it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from typing import Any, TypeAlias

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent_runtime import AgentSwitch, InvalidInput, Runtime, Session, SessionHandle, SessionNotFound
from agent_runtime_http.answers import json_answer

from .rows import FIRST_FROM

__all__ = ["history_of", "old_routes"]


def old_routes() -> list[Route]:
    """The routes; which runtime they are of, a request's application says."""
    return [
        Route("/agents/{session_id}/current", current_agent),
        Route("/sessions", Sessions),
        Route("/sessions/{session_id}/history", old_history),
        Route("/sessions/{session_id}/pending-approvals", pending_approvals),
    ]


def history_of(switches: Sequence[AgentSwitch]) -> list[dict[str, Any]]:
    """Hand-overs as the old service told them; a first one that it imported may be from nobody."""
    return [
        {
            "from": None if FIRST_FROM in (switch.metadata or {}) else switch.from_agent,
            "to": switch.to_agent,
            "reason": switch.reason,
            "timestamp": switch.switched_at.isoformat(),
        }
        for switch in switches
    ]


Told: TypeAlias = Callable[[SessionHandle], Awaitable[dict[str, Any]]]


def _of_session(told: Told) -> Callable[[Request], Awaitable[Response]]:
    """What is asked of one session: its id, and what is told of it; 404 with {"error"} if it is not there."""

    @wraps(told)
    async def endpoint(request: Request) -> Response:
        session_id = request.path_params["session_id"]
        try:
            session = await _runtime(request).get_session(session_id)
            return _answer({"session_id": session_id} | await told(session))
        except (SessionNotFound, InvalidInput):  # an id that none can have is not there either
            return _answer({"error": f"Session {session_id} not found"}, 404)

    return endpoint


@_of_session
async def current_agent(session: SessionHandle) -> dict[str, Any]:
    """Which agent holds a session (the old service's API)."""
    context = await session.context()
    return {
        "current_agent": context.current_agent,
        "agent_history": history_of(await session.switches()),
        "switch_count": context.switch_count,
    }


@_of_session
async def old_history(session: SessionHandle) -> dict[str, Any]:
    """The messages of a session as they are stored (the old service's API)."""
    messages = [message.to_chat() async for message in session.scan_messages()]
    return {
        "messages": messages,
        "message_count": len(messages),
        "last_activity": (await session.record()).last_activity.isoformat(),
        "current_agent": (await session.context()).current_agent,
        "agent_history": history_of(await session.switches()),
    }


@_of_session
async def pending_approvals(session: SessionHandle) -> dict[str, Any]:
    """The tool calls of a session that wait for a person (the old service's API)."""
    approvals = [
        {
            "call_id": approval.call_id,
            "tool_name": approval.tool_name,
            "arguments": approval.arguments,
            "reason": approval.reason,
            "created_at": approval.created_at.isoformat(),
        }
        for approval in await session.approvals()
    ]
    return {"pending_approvals": approvals, "count": len(approvals)}


class Sessions(HTTPEndpoint):
    """One route for both methods: two on one path would name only one of them in a 405."""

    async def get(self, request: Request) -> Response:
        """All sessions, the last used first (the old service's API).

        All at once, as the old service gave them: `/v1/sessions` gives them page by page.
        ---
        operationId: old_sessions
        """
        runtime = _runtime(request)
        found = [record async for record in runtime.scan_sessions()]
        found.sort(key=lambda record: (record.last_activity, record.created_at), reverse=True)
        told = [each for record in found if (each := await _told(runtime, record)) is not None]
        return _answer({"sessions": told, "total": len(told)})

    async def post(self, request: Request) -> Response:
        """A new session, under a new id (the old service's API).
        ---
        operationId: old_create_session
        """
        session = await _runtime(request).create_session()
        record = await session.record()
        return _answer(
            {
                "session_id": record.session_id,
                "message_count": record.message_count,
                "current_agent": (await session.context()).current_agent,
                "created_at": record.created_at.isoformat(),
            }
        )


async def _told(runtime: Runtime, record: Session) -> dict[str, Any] | None:
    """A session of the list; None if it was deleted meanwhile."""
    try:
        context = await (await runtime.get_session(record.session_id)).context()
    except SessionNotFound:
        return None
    return {
        "session_id": record.session_id,
        "message_count": record.message_count,
        "last_activity": record.last_activity.isoformat(),
        "current_agent": context.current_agent,
        "title": record.title,
        "description": record.description,
        "created_at": record.created_at.isoformat(),
    }


def _runtime(request: Request) -> Runtime:
    runtime: Runtime = request.app.state.service.running()
    return runtime


def _answer(value: object, status: int = 200) -> Response:
    return json_answer(value, status)  # type: ignore[return-value]  # an ASGI application, which is all that is asked for
