"""Drivers that need asyncio, on any event loop.

Many drivers (aiosqlite, asyncpg, SQLAlchemy's asyncio engine) run on asyncio only. `AsyncioBridge` lets a storage use
them whatever its caller runs on: on asyncio a call stays on the caller's loop; on trio the bridge keeps an asyncio loop
in a thread of its own, and a call is handed over to it, context variables included.

What it guarantees, on both:

- Each call runs in an asyncio task of its own, which is cancelled **once**. That is asyncio's cancellation, the one
  such drivers clean up after. anyio's own would cancel again at every step until the caller is left: the driver's
  clean-up never finishes, queries go on running on the server, threads and connections are lost.
- A cancelled caller is held until the task has ended, with its connection given back. Hooks that the call registered by
  `on_cancel` run at once, to end what a cancelled task can't (a statement running in a thread).
- The wait is bounded. A task that has not ended `grace_s` after its cancellation is left behind with a warning: the
  caller goes on, while what the task holds stays taken until it ends. Closing the bridge cancels those left behind once
  more and grants them `grace_s` again; what still runs then is abandoned (on trio with its thread, a daemon, which
  doesn't keep the process from exiting).
- An exception of the call reaches the caller as itself, with the frames of both sides in its traceback. SystemExit and
  KeyboardInterrupt as well, but past the asyncio loop, which would die of them. A cancellation that did not come from
  the caller is a `StorageUnavailable`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextvars import Context, ContextVar, copy_context
from typing import Any, Final, Generic, TypeAlias, TypeVar, TypeVarTuple

import anyio.lowlevel
from anyio.from_thread import BlockingPortal, start_blocking_portal

from .errors import StorageUnavailable

__all__ = ["AsyncioBridge", "on_cancel"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
CancelHook: TypeAlias = Callable[[], Awaitable[object]]

logger: Final = logging.getLogger(__name__)
_hooks: Final[ContextVar[list[CancelHook]]] = ContextVar("agent_runtime_bridge_hooks")


@contextlib.contextmanager
def on_cancel(hook: CancelHook) -> Iterator[None]:
    """Within this block, have `hook` called and awaited when the caller of the present bridge call is cancelled.

    It runs on the asyncio loop, beside the cancelled task and before that task's next step. For SQLite it is the
    connection's `interrupt`: the cancelled task stops to wait for its statement, and only this stops the statement.

    Raises RuntimeError outside of `AsyncioBridge.run`.
    """
    hooks = _hooks.get(None)
    if hooks is None:
        raise RuntimeError("on_cancel() has a meaning only inside of a call made by AsyncioBridge.run()")
    hooks.append(hook)
    try:
        yield
    finally:
        hooks.remove(hook)


class _Carried(Exception):
    """Carries an exception that would end the asyncio loop (SystemExit, KeyboardInterrupt) past it."""

    def __init__(self, exception: BaseException) -> None:
        super().__init__(repr(exception))
        self.exception = exception


async def _guarded(hooks: list[CancelHook], function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    _hooks.set(hooks)
    try:
        return await function(*args)
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as exc:
        raise _Carried(exc) from exc


class _Call(Generic[T]):
    """A call, made on the asyncio loop: its task, and the hooks it has registered."""

    def __init__(self, function: Callable[[*Ts], Awaitable[T]], args: tuple[*Ts]) -> None:
        self.hooks: Final[list[CancelHook]] = []
        name = getattr(function, "__qualname__", None)
        self.task: Final[asyncio.Task[T]] = asyncio.create_task(_guarded(self.hooks, function, *args), name=name)

    def result(self) -> T:
        if self.task.cancelled():
            raise StorageUnavailable("the call was cancelled on the database's side: its event loop is shutting down")
        return self.task.result()


class _Thread:
    """An asyncio loop in a thread of its own. `context` is what the portal adds to the context of calls to it."""

    def __init__(self, portal: BlockingPortal, loop: asyncio.AbstractEventLoop, context: Mapping[ContextVar[Any], Any]):
        self.portal: Final = portal
        self._loop: Final = loop
        self._context: Final = context

    @classmethod
    async def of(cls, portal: BlockingPortal) -> _Thread:
        here = copy_context()

        async def look() -> tuple[asyncio.AbstractEventLoop, Context]:
            return asyncio.get_running_loop(), copy_context()

        loop, there = await portal.call_async(look)
        return cls(portal, loop, {var: value for var, value in there.items() if here.get(var) is not value})

    def call_soon(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Call a function there, with a copy of this context, without waiting for it."""
        context = copy_context()
        for var, value in self._context.items():
            context.run(var.set, value)
        self._loop.call_soon_threadsafe(function, *args, context=context)


class AsyncioBridge:
    """Runs coroutine functions that need asyncio. Made by `AsyncioBridge.open`; used by any number of tasks at once."""

    def __init__(self, thread: _Thread | None, grace_s: float) -> None:
        self._thread = thread
        self._grace_s = grace_s
        self._left_behind: set[asyncio.Task[Any]] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, *, name: str = "agent-runtime-asyncio", grace_s: float = 10.0) -> AsyncIterator[AsyncioBridge]:
        """A bridge to this event loop if it is asyncio's, else to an asyncio loop in a new thread called `name`.

        `grace_s` is how long a cancelled caller waits for the end of its call. Leave the block when all calls are done.
        """
        if isinstance(anyio.lowlevel.current_token().native_token, asyncio.AbstractEventLoop):
            bridge = cls(None, grace_s)
            try:
                yield bridge
            finally:
                with anyio.CancelScope(shield=True):
                    await bridge._settle(set(bridge._left_behind), set())
            return
        thread = start_blocking_portal("asyncio", name=name)
        with anyio.CancelScope(shield=True):
            portal = await anyio.to_thread.run_sync(thread.__enter__)
            bridge = cls(await _Thread.of(portal), grace_s)
        try:
            yield bridge
        finally:
            with anyio.CancelScope(shield=True):
                await portal.call_async(bridge._settle, set(bridge._left_behind), set())
                with anyio.move_on_after(grace_s if bridge._left_behind else None):
                    await anyio.to_thread.run_sync(thread.__exit__, None, None, None, abandon_on_cancel=True)

    async def run(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Await `function(*args)` on the asyncio loop.

        Cancelling the caller cancels the call once and waits for its end (see the head of this module).

        Raises whatever the call raises; StorageUnavailable when something else than the caller cancelled it.
        """
        try:
            return await (
                self._call(function, args) if self._thread is None else self._hand_over(self._thread, function, args)
            )
        except _Carried as carried:
            exception = carried.exception
        raise exception

    def call_soon(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Call a plain function on the asyncio loop, before any call that is made after this, and don't wait for it."""
        if self._thread is None:
            function(*args)
        else:
            self._thread.call_soon(function, *args)

    async def _call(self, function: Callable[[*Ts], Awaitable[T]], args: tuple[*Ts]) -> T:
        call = _Call(function, args)
        try:
            await asyncio.wait({call.task})
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await self._give_up(call)
            raise
        return call.result()

    async def _hand_over(self, thread: _Thread, function: Callable[[*Ts], Awaitable[T]], args: tuple[*Ts]) -> T:
        """`_call`, from another thread. A way there and one back: the portal's own calls take twice as long."""
        ended = anyio.Event()
        trio: Any = anyio.lowlevel.current_token().native_token
        calls: list[_Call[T]] = []
        given_up: list[asyncio.Task[None]] = []

        def tell(_task: asyncio.Task[Any]) -> None:
            trio.run_sync_soon(ended.set)

        def begin() -> None:
            calls.append(_Call(function, args))
            calls[0].task.add_done_callback(tell)

        def give_up() -> None:
            if calls[0].task.remove_done_callback(tell):
                given_up.append(asyncio.create_task(self._give_up(calls[0])))
                given_up[0].add_done_callback(tell)
            else:  # it has ended meanwhile
                _take_note(calls[0].task)

        thread.call_soon(begin)
        try:
            await ended.wait()
        except BaseException:
            thread.call_soon(give_up)
            with anyio.CancelScope(shield=True):
                await ended.wait()
            raise
        return calls[0].result()

    async def _give_up(self, call: _Call[Any]) -> None:
        # The hooks are scheduled before the task's next step: they meet the statement that the caller gave up, not one
        # of the clean-up.
        ending = {asyncio.create_task(_called(hook)) for hook in call.hooks}
        await self._settle({call.task}, ending)

    async def _settle(self, tasks: set[asyncio.Task[Any]], hooks: set[asyncio.Task[None]]) -> None:
        """Cancel `tasks` once; wait for them and for `hooks` while the grace lasts, whoever cancels us meanwhile."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._grace_s
        for task in tasks:
            task.cancel()
        pending: set[asyncio.Task[Any]] = tasks | hooks
        while pending and (left_s := deadline - loop.time()) > 0:
            with contextlib.suppress(asyncio.CancelledError):
                _, pending = await asyncio.wait(pending, timeout=left_s)
        for task in pending & hooks:
            task.cancel()
        for task in tasks - self._left_behind:
            task.add_done_callback(_take_note)
            if task in pending:
                logger.warning("%s, cancelled, still runs after %g s: left behind", task.get_name(), self._grace_s)
                self._left_behind.add(task)
                task.add_done_callback(self._left_behind.discard)


async def _called(hook: CancelHook) -> None:
    try:
        await hook()
    except Exception as exc:  # noqa: BLE001 - the cancellation goes on without the hook's help
        logger.debug("a cancellation hook failed: %r", exc)


def _take_note(task: asyncio.Task[Any]) -> None:
    """How a cancelled call ended is nobody's business any more; asyncio wants its exception looked at all the same."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.debug("%s, cancelled, ended with %r", task.get_name(), error)
