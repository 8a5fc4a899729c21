"""The same API for threads without an event loop.

`open_runtime_blocking` runs a runtime on an event loop in a thread of its own; the calls here hand theirs over to it
and wait, from any number of threads. What each does is said at its twin in `session` and `runtime`. A thread that runs
an event loop may call them too, but blocks its loop meanwhile; and trio can't wait for trio in this way.
Tasks of such a loop have `BlockingRuntime.call_async`, which blocks nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from threading import Condition
from typing import Any, Literal, ParamSpec, TypeVar

from anyio import NoEventLoopError
from anyio.from_thread import BlockingPortal, start_blocking_portal
from anyio.lowlevel import current_token
from msgspec import UNSET, UnsetType

from .approvals import Approval, ApprovalStatus, Decision
from .config import Config
from .errors import DurabilityNotReached, InvalidInput, RuntimeClosed
from .journal import JournalFiles
from .quarantine import Quarantine
from .quarantined import QuarantinedChange
from .records import (
    DEFAULT_AGENT,
    AgentContext,
    AgentSwitch,
    Document,
    Durability,
    Message,
    NewMessage,
    Order,
    Page,
    PurgedSession,
    Role,
    Session,
    Watermarks,
)
from .runtime import Runtime, open_runtime
from .session import PAGE_ITEMS_MAX, SessionHandle
from .status import Status

P = ParamSpec("P")
T = TypeVar("T")

__all__ = ["BlockingQuarantine", "BlockingRuntime", "BlockingSessionHandle", "open_runtime_blocking"]


class _Loop:
    """The runtime's event loop, in its thread. It ends once the runtime is closed and every call has come back."""

    __slots__ = ("_calls", "_portal", "_returned", "_stopped")

    def __init__(self, portal: BlockingPortal) -> None:
        self._portal = portal
        self._stopped = False
        self._calls = 0
        self._returned = Condition()

    @contextmanager
    def portal(self) -> Iterator[BlockingPortal]:
        """The way to it, for one call."""
        portal = self.enter()
        try:
            yield portal
        finally:
            self.leave()

    def enter(self) -> BlockingPortal:
        """The same, until `leave`."""
        with self._returned:
            if self._stopped:
                raise RuntimeClosed
            self._calls += 1
        return self._portal

    def leave(self) -> None:
        with self._returned:
            self._calls -= 1
            self._returned.notify_all()

    def stop(self) -> None:
        """The runtime is closed: there is nobody to call. Waits for the calls that are under way."""
        with self._returned:
            self._stopped = True
            self._returned.wait_for(lambda: not self._calls)


class _Caller:
    """Calls on the runtime's event loop, waited for."""

    __slots__ = ("_loop",)

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop

    def _call(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        with self._loop.portal() as portal:
            return portal.call(partial(function, *args, **kwargs))


class BlockingSessionHandle(_Caller):
    """`SessionHandle` for threads."""

    __slots__ = ("_session", "created", "first_record", "incarnation", "session_id")

    def __init__(self, session: SessionHandle, loop: _Loop) -> None:
        self.session_id = session.session_id
        self.incarnation = session.incarnation
        self.created = session.created
        self.first_record = session.first_record
        self._session = session
        super().__init__(loop)

    def __repr__(self) -> str:
        return f"<BlockingSessionHandle {self.session_id!r}>"

    def record(self) -> Session:
        return self._call(self._session.record)

    def update(
        self,
        *,
        title: str | UnsetType | None = UNSET,
        description: str | UnsetType | None = UNSET,
        metadata: Mapping[str, Any] | UnsetType | None = UNSET,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Session:
        return self._call(
            self._session.update,
            title=title,
            description=description,
            metadata=metadata,
            durability=durability,
            idempotency_key=idempotency_key,
        )

    def merge(
        self,
        patch: Mapping[str, Any],
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Session:
        return self._call(self._session.merge, patch, durability=durability, idempotency_key=idempotency_key)

    def delete(self, *, durability: Durability | None = None, idempotency_key: str | None = None) -> None:
        self._call(self._session.delete, durability=durability, idempotency_key=idempotency_key)

    def append(
        self,
        role: Role,
        content: str | list[Any] | None = None,
        *,
        name: str | None = None,
        tool_calls: list[dict[str, Any]] | None = None,
        tool_call_id: str | None = None,
        token_count: int | None = None,
        metadata: dict[str, Any] | None = None,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Message:
        return self._call(
            self._session.append,
            role,
            content,
            name=name,
            tool_calls=tool_calls,
            tool_call_id=tool_call_id,
            token_count=token_count,
            metadata=metadata,
            durability=durability,
            idempotency_key=idempotency_key,
        )

    def append_message(
        self,
        message: NewMessage | Mapping[str, Any],
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Message:
        return self._call(self._session.append_message, message, durability=durability, idempotency_key=idempotency_key)

    def append_json(
        self,
        message: NewMessage | Mapping[str, Any],
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> bytes:
        return self._call(self._session.append_json, message, durability=durability, idempotency_key=idempotency_key)

    def append_many(
        self,
        messages: Sequence[NewMessage | Mapping[str, Any]],
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> list[Message]:
        return self._call(self._session.append_many, messages, durability=durability, idempotency_key=idempotency_key)

    def append_tool_result(
        self,
        call_id: str,
        tool_name: str,
        result: Any,
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Message:
        return self._call(
            self._session.append_tool_result,
            call_id,
            tool_name,
            result,
            durability=durability,
            idempotency_key=idempotency_key,
        )

    def pop(self, *, durability: Durability | None = None, idempotency_key: str | None = None) -> Message | None:
        return self._call(self._session.pop, durability=durability, idempotency_key=idempotency_key)

    def clear(self, *, durability: Durability | None = None, idempotency_key: str | None = None) -> None:
        self._call(self._session.clear, durability=durability, idempotency_key=idempotency_key)

    def messages(self, *, after: int | None = None, limit: int = 100, order: Order = "asc") -> Page[Message]:
        return self._call(self._session.messages, after=after, limit=limit, order=order)

    def message(self, seq: int) -> Message | None:
        return self._call(self._session.message, seq)

    def scan_messages(self, *, after: int | None = None) -> Iterator[Message]:
        while True:
            page = self.messages(after=after, limit=PAGE_ITEMS_MAX)
            yield from page.items
            if page.next is None:
                return
            after = page.next

    def history(self, limit: int | None = None) -> list[dict[str, Any]]:
        return self._call(self._session.history, limit)

    def history_json(self, limit: int | None = None) -> bytes:
        return self._call(self._session.history_json, limit)

    def context(self) -> AgentContext:
        return self._call(self._session.context)

    def switches(self) -> list[AgentSwitch]:
        return self._call(self._session.switches)

    def switch_agent(
        self,
        agent: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> AgentContext:
        return self._call(
            self._session.switch_agent,
            agent,
            reason=reason,
            metadata=metadata,
            durability=durability,
            idempotency_key=idempotency_key,
        )

    def update_context(
        self,
        *,
        metadata: Mapping[str, Any],
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> AgentContext:
        return self._call(
            self._session.update_context, metadata=metadata, durability=durability, idempotency_key=idempotency_key
        )

    def merge_context(
        self,
        patch: Mapping[str, Any],
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> AgentContext:
        return self._call(self._session.merge_context, patch, durability=durability, idempotency_key=idempotency_key)

    def change_context(
        self,
        change: Callable[[dict[str, Any]], Mapping[str, Any]],
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> AgentContext:
        return self._call(self._session.change_context, change, durability=durability, idempotency_key=idempotency_key)

    def put_document(
        self,
        collection: str,
        key: str,
        value: Any,
        *,
        media_type: str | None = None,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Document:
        return self._call(
            self._session.put_document,
            collection,
            key,
            value,
            media_type=media_type,
            durability=durability,
            idempotency_key=idempotency_key,
        )

    def get_document(self, collection: str, key: str) -> Document | None:
        return self._call(self._session.get_document, collection, key)

    def list_documents(self, collection: str, *, cursor: str | None = None, limit: int = 100) -> Page[Document]:
        return self._call(self._session.list_documents, collection, cursor=cursor, limit=limit)

    def delete_document(
        self,
        collection: str,
        key: str,
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> bool:
        return self._call(
            self._session.delete_document, collection, key, durability=durability, idempotency_key=idempotency_key
        )

    def request_approval(
        self,
        call_id: str,
        tool_name: str,
        arguments: Any,
        *,
        reason: str | None = None,
        expires_in_s: float | None = None,
        durability: Durability | None = "stored",
        idempotency_key: str | None = None,
    ) -> Approval:
        return self._call(
            self._session.request_approval,
            call_id,
            tool_name,
            arguments,
            reason=reason,
            expires_in_s=expires_in_s,
            durability=durability,
            idempotency_key=idempotency_key,
        )

    def approvals(self, *, status: ApprovalStatus | None = "pending") -> list[Approval]:
        return self._call(self._session.approvals, status=status)

    def approval(self, approval_id: str) -> Approval:
        return self._call(self._session.approval, approval_id)

    def decide_approval(
        self,
        approval_id: str,
        decision: Decision,
        *,
        arguments: Any = None,
        reason: str | None = None,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Approval:
        return self._call(
            self._session.decide_approval,
            approval_id,
            decision,
            arguments=arguments,
            reason=reason,
            durability=durability,
            idempotency_key=idempotency_key,
        )


class BlockingQuarantine(_Caller):
    """`Quarantine` for threads."""

    def __init__(self, quarantine: Quarantine, loop: _Loop) -> None:
        self._quarantine = quarantine
        super().__init__(loop)

    def entries(self) -> list[QuarantinedChange]:
        return self._call(self._quarantine.entries)

    def replay(self, session_id: str) -> int:
        return self._call(self._quarantine.replay, session_id)

    def drop(self, session_id: str) -> int:
        return self._call(self._quarantine.drop, session_id)


class BlockingRuntime(_Caller):
    """`Runtime` for threads."""

    def __init__(self, runtime: Runtime, loop: _Loop) -> None:
        self.config = runtime.config
        self.plugins = runtime.plugins
        self._runtime = runtime
        super().__init__(loop)

    def create_session(
        self,
        session_id: str | None = None,
        *,
        user_id: str | None = None,
        system_prompt: str | None = None,
        title: str | None = None,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        agent: str = DEFAULT_AGENT,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> BlockingSessionHandle:
        return self._create(
            self._runtime.create_session,
            session_id,
            user_id=user_id,
            system_prompt=system_prompt,
            title=title,
            description=description,
            metadata=metadata,
            agent=agent,
            durability=durability,
            idempotency_key=idempotency_key,
        )

    def get_or_create_session(
        self,
        session_id: str,
        *,
        user_id: str | None = None,
        system_prompt: str | None = None,
        title: str | None = None,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        agent: str = DEFAULT_AGENT,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> BlockingSessionHandle:
        return self._create(
            self._runtime.get_or_create_session,
            session_id,
            user_id=user_id,
            system_prompt=system_prompt,
            title=title,
            description=description,
            metadata=metadata,
            agent=agent,
            durability=durability,
            idempotency_key=idempotency_key,
        )

    def get_session(self, session_id: str) -> BlockingSessionHandle:
        return self._handle(self._call(self._runtime.get_session, session_id))

    def list_sessions(
        self, *, user_id: str | None = None, limit: int = 50, cursor: str | None = None, order: Order = "desc"
    ) -> Page[Session]:
        return self._call(self._runtime.list_sessions, user_id=user_id, limit=limit, cursor=cursor, order=order)

    def purge_sessions(
        self, session_ids: Sequence[str], *, idle_longer_than: timedelta | None = None, dry_run: bool = False
    ) -> list[PurgedSession]:
        return self._call(self._runtime.purge_sessions, session_ids, idle_longer_than=idle_longer_than, dry_run=dry_run)

    def scan_sessions(self, *, user_id: str | None = None, order: Order = "asc") -> Iterator[Session]:
        cursor = None
        while True:
            page = self.list_sessions(user_id=user_id, limit=PAGE_ITEMS_MAX, cursor=cursor, order=order)
            yield from page.items
            if page.next is None:
                return
            cursor = page.next

    @property
    def watermarks(self) -> Watermarks:
        with self._loop.portal() as portal:
            return portal.call(lambda: self._runtime.watermarks)

    def flush(self) -> None:
        self._call(self._runtime.flush)

    def status(self) -> Status:
        with self._loop.portal() as portal:
            return portal.call(self._runtime.status)

    @property
    def quarantine(self) -> BlockingQuarantine:
        return BlockingQuarantine(self._runtime.quarantine, self._loop)

    def call(self, function: Callable[[Runtime], Awaitable[T]]) -> T:
        """Await `function(runtime)` on the runtime's event loop: several calls in one go.

        Raises RuntimeError on that loop's own thread, where a plugin's hooks run: it would wait for itself.
        """
        return self._call(function, self._runtime)

    async def call_async(self, function: Callable[[Runtime], Awaitable[T]]) -> T:
        """The same from any event loop, asyncio's or trio's, which goes on meanwhile.

        A cancellation goes over to `function`, and is waited for.
        """
        portal, arrived = self._loop.enter(), False

        async def run() -> T:
            nonlocal arrived
            arrived = True
            try:
                return await function(self._runtime)
            finally:
                self._loop.leave()  # here: who closes the runtime may be what keeps the caller from going on

        try:
            return await portal.call_async(run)
        finally:
            if not arrived:
                self._loop.leave()

    def _create(
        self, function: Callable[P, Awaitable[SessionHandle]], *args: P.args, **kwargs: P.kwargs
    ) -> BlockingSessionHandle:
        try:
            return self._handle(self._call(function, *args, **kwargs))
        except DurabilityNotReached as error:
            error.outcome = self._handle(error.outcome)
            raise

    def _handle(self, session: SessionHandle) -> BlockingSessionHandle:
        return BlockingSessionHandle(session, self._loop)


@contextmanager
def open_runtime_blocking(
    config: Config | str,
    *,
    plugins: Iterable[object] = (),
    address: str | None = None,
    files: JournalFiles | None = None,
    loop: Literal["asyncio", "trio"] = "asyncio",
) -> Iterator[BlockingRuntime]:
    """`open_runtime` for threads: `with open_runtime_blocking("sqlite:///data/agent_runtime.db") as runtime`.

    `loop` is the kind of event loop that runs in the thread. Raises what `open_runtime` raises.
    """
    if loop == "trio" and _runs_trio():
        raise InvalidInput("loop", "this thread runs trio, which can't wait for another trio: use 'asyncio'")
    opened = open_runtime(config, plugins=plugins, address=address, files=files)
    with start_blocking_portal(loop, name="agent-runtime") as portal:
        running = _Loop(portal)
        try:
            with portal.wrap_async_context_manager(opened) as runtime:
                yield BlockingRuntime(runtime, running)
        finally:
            running.stop()


def _runs_trio() -> bool:
    """Whether this thread runs an event loop that is trio's."""
    try:
        return not isinstance(current_token().native_token, asyncio.AbstractEventLoop)
    except NoEventLoopError:
        return False
