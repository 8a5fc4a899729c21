"""The runtimes behind the old managers: each on an asyncio loop in a thread of its own.

That is why the managers can be called from anywhere: a plain thread, a task of asyncio or of trio, the loop of a web
application. Whoever calls, waits for another thread, which waits for nobody; so no call can wait for itself. (One
place is left: hooks of plugins run on the runtime's own thread, and a call from there is refused with a RuntimeError.)

`open_managers` opens one. The managers use the one that is open in this process, unless they are handed one; where
several are open they must be.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from threading import Lock
from typing import Final, TypeVar

import anyio
import anyio.to_thread

from agent_runtime import BlockingRuntime, Config, RuntimeClosed, load_config, open_runtime_blocking

__all__ = ["NotOpened", "Shared", "current", "on_a_thread", "open_managers"]

T = TypeVar("T")


class NotOpened(RuntimeClosed):
    """There is no runtime for the managers, or more than one."""

    def __init__(self, problem: str) -> None:
        Exception.__init__(self, problem)


_open: Final[list[BlockingRuntime]] = []
"""The runtimes that are open, in this process."""


@contextmanager
def open_managers(config: Config | str | None = None, *, plugins: Iterable[object] = ()) -> Iterator[BlockingRuntime]:
    """Open the runtime that the managers of this process use: `with open_managers("sqlite:///data/agent_runtime.db")`.

    `config` is a configuration or the URL of a storage; None reads the environment, the old service's variables too.
    What it gives is the runtime with its new calls, for threads. At the end all that is unstored is stored.

    Raises what `agent_runtime.open_runtime` raises.
    """
    with open_runtime_blocking(load_config() if config is None else config, plugins=plugins) as runtime:
        _open.append(runtime)
        try:
            yield runtime
        finally:
            _open.remove(runtime)


def current() -> BlockingRuntime:
    """The runtime that is open.

    Raises:
        NotOpened: there is none, or more than one.
    """
    match _open[:]:
        case [runtime]:
            return runtime
        case []:
            raise NotOpened(
                "no runtime is open: enter open_managers(…), or await initialize() of an async manager, first"
            )
    raise NotOpened("several runtimes are open in this process: hand one to the manager, as SessionManager(runtime)")


class Shared:
    """The runtime that asynchronous managers open by `initialize`: one for all, until the last has shut down."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
        self._stack = ExitStack()

    def acquire(self) -> None:
        """Open one, from the environment, unless one is open. Blocks; raises what `open_runtime` raises."""
        with self._lock:
            if not _open:
                self._stack.enter_context(open_managers())
            self._users += 1

    def release(self) -> None:
        """The end of an `acquire`: the last one closes it. Blocks; raises what closing a runtime raises."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stack.close()


@asynccontextmanager
async def on_a_thread(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """A context manager that blocks, entered and left on a worker thread; neither is ever cut short."""
    with anyio.CancelScope(shield=True):
        value = await anyio.to_thread.run_sync(manager.__enter__)
    try:
        yield value
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(manager.__exit__, None, None, None)
