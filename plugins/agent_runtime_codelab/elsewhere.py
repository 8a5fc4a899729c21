"""The runtime that threads use, for the tasks of any event loop: with the calls of `Runtime`, unchanged.

While old calls and new ones are used side by side there is one runtime, on a thread of its own, as a database has no
room for two. `runtime_elsewhere` gives it to tasks: each call is made on the runtime's event loop, and the caller's,
asyncio's or trio's, goes on meanwhile. Sessions come back as stand-ins of the same kind.

Nothing is written down twice: a stand-in asks the object that it stands for what it has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any, cast

from agent_runtime import BlockingRuntime, DurabilityNotReached, Runtime, SessionHandle
from agent_runtime.quarantine import Quarantine

__all__ = ["runtime_elsewhere"]


def runtime_elsewhere(threads: BlockingRuntime) -> Runtime:
    """A stand-in for the runtime behind `threads`.

    Its calls cost a change of threads more than the runtime's own, there and back. `status()` and `watermarks`, which
    are not awaited, hold up the caller's loop for as long.
    """

    async def itself(runtime: Runtime) -> Runtime:
        return runtime

    return cast("Runtime", _StandIn(threads.call(itself), threads))


class _StandIn:
    def __init__(self, target: object, threads: BlockingRuntime) -> None:
        self._target = target
        self._threads = threads

    def __repr__(self) -> str:
        return f"{self._target!r} elsewhere"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self._target).__name__} has no public attribute {name!r}")
        call = getattr(type(self._target), name, None)
        if inspect.iscoroutinefunction(call):
            return self._awaited(getattr(self._target, name))
        if inspect.isasyncgenfunction(call):
            return MethodType(call, self)  # it only asks its object for pages: so it can run here, and ask the stand-in
        if inspect.isfunction(call):
            return self._at_once(getattr(self._target, name))
        if isinstance(call, property):
            return self._at_once(lambda: getattr(self._target, name))()
        return getattr(self._target, name)

    def _awaited(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        async def awaited(*args: Any, **options: Any) -> Any:
            try:
                return self._brought(await self._threads.call_async(lambda _: call(*args, **options)))
            except DurabilityNotReached as error:
                error.outcome = self._brought(error.outcome)
                raise

        return awaited

    def _at_once(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def called(*args: Any, **options: Any) -> Any:
            async def run(_: Runtime) -> Any:
                return call(*args, **options)

            return self._brought(self._threads.call(run))

        return called

    def _brought(self, value: Any) -> Any:
        """What a call gives, with a stand-in for what has calls itself."""
        return _StandIn(value, self._threads) if isinstance(value, SessionHandle | Quarantine) else value
