"""The old managers' calls, each as one coroutine on the runtime's own event loop.

Here is what an old call means in terms of the new ones; `managers` has them in both forms, for threads and for tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, cast

from agent_runtime import BlockingRuntime, Runtime, SessionExists, SessionHandle, SessionNotFound
from agent_runtime.records import Role

from .contexts import AgentContext, SessionState, agent_name, messages_of

__all__ = ["ContextCalls", "SessionCalls"]


class _Calls:
    """Calls on a runtime; `threads` is the same one as threads have it, for what is handed out."""

    def __init__(self, runtime: Runtime, threads: BlockingRuntime) -> None:
        self._runtime = runtime
        self._threads = threads

    async def exists(self, session_id: str) -> bool:
        with suppress(SessionNotFound):
            await self._runtime.get_session(session_id)
            return True
        return False


class SessionCalls(_Calls):
    """Of SessionManager."""

    async def get(self, session_id: str) -> SessionState | None:
        with suppress(SessionNotFound):
            return await self._state(await self._runtime.get_session(session_id))
        return None

    async def get_history(self, session_id: str) -> list[dict[str, Any]]:
        with suppress(SessionNotFound):
            return await messages_of(await self._runtime.get_session(session_id))
        return []

    async def all_sessions(self) -> list[SessionState]:
        return [SessionState(self._threads, record) async for record in self._runtime.scan_sessions()]

    async def create(self, session_id: str, system_prompt: str | None) -> SessionState:
        try:
            return await self._state(
                await self._runtime.create_session(session_id, system_prompt=system_prompt or None)
            )
        except SessionExists as error:
            raise ValueError(f"Session {session_id} already exists") from error

    async def get_or_create(self, session_id: str, system_prompt: str | None) -> SessionState:
        return await self._state(
            await self._runtime.get_or_create_session(session_id, system_prompt=system_prompt or None)
        )

    async def append_message(self, session_id: str, role: str, content: str, name: str | None) -> None:
        with _needed(session_id):
            session = await self._runtime.get_session(session_id)
            await session.append(cast("Role", role), content, name=name)

    async def append_tool_result(self, session_id: str, call_id: str, tool_name: str, result: str) -> None:
        with _needed(session_id):
            session = await self._runtime.get_session(session_id)
            await session.append_tool_result(call_id, tool_name, result)

    async def delete(self, session_id: str) -> None:
        with suppress(SessionNotFound):
            await (await self._runtime.get_session(session_id)).delete()

    async def _state(self, session: SessionHandle) -> SessionState:
        return SessionState(self._threads, await session.record())


@contextmanager
def _needed(session_id: str) -> Iterator[None]:
    """Where there is no such session, the old error."""
    try:
        yield
    except SessionNotFound as error:
        raise ValueError(f"Session {session_id} not found") from error


class ContextCalls(_Calls):
    """Of AgentContextManager."""

    async def get_or_create(self, session_id: str, initial_agent: str | Enum) -> AgentContext:
        session = await self._runtime.get_or_create_session(session_id, agent=agent_name(initial_agent))
        return AgentContext(self._threads, session)

    async def get(self, session_id: str) -> AgentContext | None:
        with suppress(SessionNotFound):
            return AgentContext(self._threads, await self._runtime.get_session(session_id))
        return None

    async def get_all_sessions(self) -> list[str]:
        return [record.session_id async for record in self._runtime.scan_sessions()]

    async def get_session_count(self) -> int:
        return len(await self.get_all_sessions())

    async def delete(self, session_id: str) -> bool:
        with suppress(SessionNotFound):
            await (await self._runtime.get_session(session_id)).delete()
            return True
        return False

    async def cleanup_old_sessions(self, max_age_hours: float) -> int:
        if not max_age_hours >= 0:
            raise ValueError(f"max_age_hours must be 0 or more, not {max_age_hours}")
        try:
            before = datetime.now(UTC) - timedelta(hours=max_age_hours)
        except OverflowError:  # before the year 1: nothing is that old
            return 0
        deleted = 0
        for record in [record async for record in self._runtime.scan_sessions() if record.last_activity < before]:
            with suppress(SessionNotFound):
                session = await self._runtime.get_session(record.session_id)
                if (await session.record()).last_activity < before:  # else it was used since the list was made
                    await session.delete()
                    deleted += 1
        return deleted
