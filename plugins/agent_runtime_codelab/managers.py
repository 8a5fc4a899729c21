"""The old service's managers, on the new runtime: for threads, and for tasks.

    with open_managers("sqlite:///data/agent_runtime.db"):
        session_manager.get_or_create("s1")
        session_manager.append_message("s1", "user", "hello")

`SessionManager` and `AgentContextManager` may be called from any thread, also one that runs an event loop, asyncio's or
trio's, which stands still meanwhile. `AsyncSessionManager` and `AsyncAgentContextManager` have the same calls for
tasks of either, and hold up nothing. What each call acknowledges is kept, at the level that the configuration names: by
default it is in the journal. `opened` says which runtime is used, and why nobody waits for himself.

What is marked as deprecated names the call of the new interface that takes its place. Nothing warns at run time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from threading import Lock
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread
from typing_extensions import deprecated

from agent_runtime import BlockingRuntime, Runtime
from agent_runtime.records import DEFAULT_AGENT

from .calls import ContextCalls, SessionCalls
from .contexts import AgentContext, SessionState
from .opened import Shared, current

__all__ = [
    "AgentContextManager",
    "AsyncAgentContextManager",
    "AsyncSessionManager",
    "SessionManager",
    "agent_context_manager",
    "get_agent_context_manager",
    "get_session_manager",
    "session_manager",
]

T = TypeVar("T")
_shared: Final = Shared()


class _Manager:
    """`runtime` is the one to use; None: the one that is open when a call is made."""

    def __init__(self, runtime: BlockingRuntime | None = None) -> None:
        self._given = runtime

    @property
    def _runtime(self) -> BlockingRuntime:
        return current() if self._given is None else self._given


class _AsyncManager(_Manager):
    """The same. `initialize` opens a runtime, from the environment, where none is open."""

    def __init__(self, runtime: BlockingRuntime | None = None) -> None:
        super().__init__(runtime)
        self._lock = Lock()
        self._initialized = False

    @deprecated("use open_managers(), or open_runtime() where no old call is left", category=None)
    async def initialize(self) -> None:
        """See that a runtime is open. Nothing is loaded. Raises what `open_runtime` raises."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._begin)

    @deprecated("leave the block of open_managers(), or of open_runtime()", category=None)
    async def shutdown(self) -> None:
        """The end of `initialize`. The last manager that does this closes the runtime: what is unstored is stored.

        Raises:
            DrainIncomplete: not all of it could be stored; it is in the journal.
        """
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._end)

    def _begin(self) -> None:
        with self._lock:
            if self._given is None and not self._initialized:
                _shared.acquire()
                self._initialized = True

    def _end(self) -> None:
        with self._lock:
            if self._initialized:
                self._initialized = False
                _shared.release()


@deprecated("use the runtime that open_runtime_blocking gives", category=None)
class SessionManager(_Manager):
    """The sessions, for threads."""

    @deprecated("use runtime.get_session(session_id), which raises SessionNotFound", category=None)
    def exists(self, session_id: str) -> bool:
        """Whether there is such a session."""
        return self._run(lambda calls: calls.exists(session_id))

    @deprecated("use runtime.get_session(session_id)", category=None)
    def get(self, session_id: str) -> SessionState | None:
        """The session; None when there is none."""
        return self._run(lambda calls: calls.get(session_id))

    @deprecated("use session.history(), which is valid for a model, or session.messages()", category=None)
    def get_history(self, session_id: str) -> list[dict[str, Any]]:
        """The messages in chat format, as they are stored; none when there is no such session."""
        return self._run(lambda calls: calls.get_history(session_id))

    @deprecated("use runtime.list_sessions() or runtime.scan_sessions()", category=None)
    def all_sessions(self) -> list[SessionState]:
        """All sessions, the oldest first."""
        return self._run(lambda calls: calls.all_sessions())

    @deprecated("use runtime.create_session(session_id, system_prompt=system_prompt)", category=None)
    def create(self, session_id: str, system_prompt: str | None = None) -> SessionState:
        """Create a session.

        Raises:
            ValueError: the id is taken.
        """
        return self._run(lambda calls: calls.create(session_id, system_prompt))

    @deprecated("use runtime.get_or_create_session(session_id, system_prompt=system_prompt)", category=None)
    def get_or_create(self, session_id: str, system_prompt: str | None = None) -> SessionState:
        """The session, created if there is none. However many ask at once, one creates it."""
        return self._run(lambda calls: calls.get_or_create(session_id, system_prompt))

    @deprecated("use session.append(role, content, name=name)", category=None)
    def append_message(self, session_id: str, role: str, content: str, name: str | None = None) -> None:
        """Append a message.

        Raises:
            ValueError: there is no such session.
        """
        self._run(lambda calls: calls.append_message(session_id, role, content, name))

    @deprecated("use session.append_tool_result(call_id, tool_name, result)", category=None)
    def append_tool_result(self, session_id: str, call_id: str, tool_name: str, result: str) -> None:
        """Append a tool's result.

        Raises:
            ValueError: there is no such session.
        """
        self._run(lambda calls: calls.append_tool_result(session_id, call_id, tool_name, result))

    @deprecated("use session.delete()", category=None)
    def delete(self, session_id: str) -> None:
        """Delete a session, with its context. Where there is none, nothing happens."""
        self._run(lambda calls: calls.delete(session_id))

    def _run(self, call: Callable[[SessionCalls], Awaitable[T]]) -> T:
        threads = self._runtime
        return threads.call(lambda runtime: call(SessionCalls(runtime, threads)))


@deprecated("use the runtime that open_runtime_blocking gives", category=None)
class AgentContextManager(_Manager):
    """The agent contexts, for threads. A session and its context are created, and deleted, together."""

    @deprecated("use runtime.get_or_create_session(session_id, agent=initial_agent)", category=None)
    def get_or_create(self, session_id: str, initial_agent: str | Enum = DEFAULT_AGENT) -> AgentContext:
        """The context; where there is no such session, one is created, with `initial_agent`."""
        return self._run(lambda calls: calls.get_or_create(session_id, initial_agent))

    @deprecated("use runtime.get_session(session_id), then session.context()", category=None)
    def get(self, session_id: str) -> AgentContext | None:
        """The context; None when there is no such session."""
        return self._run(lambda calls: calls.get(session_id))

    @deprecated("use runtime.get_session(session_id), which raises SessionNotFound", category=None)
    def exists(self, session_id: str) -> bool:
        """Whether there is such a session: each has a context."""
        return self._run(lambda calls: calls.exists(session_id))

    @deprecated("use runtime.list_sessions() or runtime.scan_sessions()", category=None)
    def get_all_sessions(self) -> list[str]:
        """The ids of all sessions, the oldest first."""
        return self._run(lambda calls: calls.get_all_sessions())

    @deprecated("use runtime.scan_sessions()", category=None)
    def get_session_count(self) -> int:
        """How many sessions there are. All are looked at."""
        return self._run(lambda calls: calls.get_session_count())

    @deprecated("use session.delete()", category=None)
    def delete(self, session_id: str) -> bool:
        """Delete the session: its context and its messages. Returns whether there was one."""
        return self._run(lambda calls: calls.delete(session_id))

    @deprecated("use the configuration's retention.max_idle", category=None)
    def cleanup_old_sessions(self, max_age_hours: float = 24) -> int:
        """Delete the sessions in which nothing has happened for so many hours, messages and all. Returns how many."""
        return self._run(lambda calls: calls.cleanup_old_sessions(max_age_hours))

    def _run(self, call: Callable[[ContextCalls], Awaitable[T]]) -> T:
        threads = self._runtime
        return threads.call(lambda runtime: call(ContextCalls(runtime, threads)))


@deprecated("use the runtime that open_runtime gives", category=None)
class AsyncSessionManager(_AsyncManager):
    """The sessions, for tasks."""

    @deprecated("use runtime.get_session(session_id), which raises SessionNotFound", category=None)
    async def exists(self, session_id: str) -> bool:
        """Whether there is such a session."""
        return await self._run(lambda calls: calls.exists(session_id))

    @deprecated("use runtime.get_session(session_id)", category=None)
    async def get(self, session_id: str) -> SessionState | None:
        """The session; None when there is none."""
        return await self._run(lambda calls: calls.get(session_id))

    @deprecated("use session.history(), which is valid for a model, or session.messages()", category=None)
    async def get_history(self, session_id: str) -> list[dict[str, Any]]:
        """The messages in chat format, as they are stored; none when there is no such session."""
        return await self._run(lambda calls: calls.get_history(session_id))

    @deprecated("use runtime.list_sessions() or runtime.scan_sessions()", category=None)
    async def all_sessions(self) -> list[SessionState]:
        """All sessions, the oldest first."""
        return await self._run(lambda calls: calls.all_sessions())

    @deprecated("use runtime.create_session(session_id, system_prompt=system_prompt)", category=None)
    async def create(self, session_id: str, system_prompt: str | None = None) -> SessionState:
        """Create a session.

        Raises:
            ValueError: the id is taken.
        """
        return await self._run(lambda calls: calls.create(session_id, system_prompt))

    @deprecated("use runtime.get_or_create_session(session_id, system_prompt=system_prompt)", category=None)
    async def get_or_create(self, session_id: str, system_prompt: str | None = None) -> SessionState:
        """The session, created if there is none. However many ask at once, one creates it."""
        return await self._run(lambda calls: calls.get_or_create(session_id, system_prompt))

    @deprecated("use session.append(role, content, name=name)", category=None)
    async def append_message(self, session_id: str, role: str, content: str, name: str | None = None) -> None:
        """Append a message.

        Raises:
            ValueError: there is no such session.
        """
        await self._run(lambda calls: calls.append_message(session_id, role, content, name))

    @deprecated("use session.append_tool_result(call_id, tool_name, result)", category=None)
    async def append_tool_result(self, session_id: str, call_id: str, tool_name: str, result: str) -> None:
        """Append a tool's result.

        Raises:
            ValueError: there is no such session.
        """
        await self._run(lambda calls: calls.append_tool_result(session_id, call_id, tool_name, result))

    @deprecated("use session.delete()", category=None)
    async def delete(self, session_id: str) -> None:
        """Delete a session, with its context. Where there is none, nothing happens."""
        await self._run(lambda calls: calls.delete(session_id))

    async def _run(self, call: Callable[[SessionCalls], Awaitable[T]]) -> T:
        threads = self._runtime

        async def run(runtime: Runtime) -> T:
            return await call(SessionCalls(runtime, threads))

        return await threads.call_async(run)


@deprecated("use the runtime that open_runtime gives", category=None)
class AsyncAgentContextManager(_AsyncManager):
    """The agent contexts, for tasks. A session and its context are created, and deleted, together."""

    @deprecated("use runtime.get_or_create_session(session_id, agent=initial_agent)", category=None)
    async def get_or_create(self, session_id: str, initial_agent: str | Enum = DEFAULT_AGENT) -> AgentContext:
        """The context; where there is no such session, one is created, with `initial_agent`."""
        return await self._run(lambda calls: calls.get_or_create(session_id, initial_agent))

    @deprecated("use runtime.get_session(session_id), then session.context()", category=None)
    async def get(self, session_id: str) -> AgentContext | None:
        """The context; None when there is no such session."""
        return await self._run(lambda calls: calls.get(session_id))

    @deprecated("use runtime.get_session(session_id), which raises SessionNotFound", category=None)
    async def exists(self, session_id: str) -> bool:
        """Whether there is such a session: each has a context."""
        return await self._run(lambda calls: calls.exists(session_id))

    @deprecated("use runtime.list_sessions() or runtime.scan_sessions()", category=None)
    async def get_all_sessions(self) -> list[str]:
        """The ids of all sessions, the oldest first."""
        return await self._run(lambda calls: calls.get_all_sessions())

    @deprecated("use runtime.scan_sessions()", category=None)
    async def get_session_count(self) -> int:
        """How many sessions there are. All are looked at."""
        return await self._run(lambda calls: calls.get_session_count())

    @deprecated("use session.delete()", category=None)
    async def delete(self, session_id: str) -> bool:
        """Delete the session: its context and its messages. Returns whether there was one."""
        return await self._run(lambda calls: calls.delete(session_id))

    @deprecated("use the configuration's retention.max_idle", category=None)
    async def cleanup_old_sessions(self, max_age_hours: float = 24) -> int:
        """Delete the sessions in which nothing has happened for so many hours, messages and all. Returns how many."""
        return await self._run(lambda calls: calls.cleanup_old_sessions(max_age_hours))

    async def _run(self, call: Callable[[ContextCalls], Awaitable[T]]) -> T:
        threads = self._runtime

        async def run(runtime: Runtime) -> T:
            return await call(ContextCalls(runtime, threads))

        return await threads.call_async(run)


session_manager: Final = SessionManager()
agent_context_manager: Final = AgentContextManager()


@deprecated("use the runtime that open_runtime_blocking gives", category=None)
def get_session_manager() -> SessionManager:
    """The manager of whichever runtime is open."""
    return session_manager


@deprecated("use the runtime that open_runtime_blocking gives", category=None)
def get_agent_context_manager() -> AgentContextManager:
    """The manager of whichever runtime is open."""
    return agent_context_manager
