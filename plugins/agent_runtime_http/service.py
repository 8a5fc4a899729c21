"""The runtime behind an application: from before it is opened until after it is closed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias

import anyio

from agent_runtime import Config, Runtime, RuntimeClosed, open_runtime

from .extensions import Extensions
from .guard import Guard
from .tokens import Tokens

__all__ = ["Service", "State"]

State: TypeAlias = Literal["closed", "opening", "running", "stopping"]

_NOT_RUNNING: Final[dict[State, str]] = {
    "closed": "the runtime is not open: the lifespan of this application was not entered, or has been left",
    "opening": "the runtime is being opened",
    "stopping": "the runtime is being closed",
}


class NotRunning(RuntimeClosed):
    """The runtime is not open, or not open any more."""

    def __init__(self, state: State) -> None:
        Exception.__init__(self, _NOT_RUNNING[state])


class Service:
    """Opens the runtime of an application, and knows how far it is. Used for one runtime at a time.

    `state` is what it does, and it does so `since`. `address` is where others find it, for the lease. `stopping` is set
    as soon as it is known that the runtime will close: what streams should end then.
    """

    def __init__(self, config: Config, *, plugins: Iterable[object], address: str | None) -> None:
        self.config: Final = config
        self.body_bytes_max: Final = config.http.body_bytes_max
        self.state: State = "closed"
        self.since = datetime.now(UTC)
        self.runtime: Runtime | None = None
        self.extensions = Extensions()
        self.tokens: Final = Tokens(config.http)
        self.guard: Final = Guard(config.http.origins)
        self.stopping = anyio.Event()
        self.address = address
        self._plugins = tuple(plugins)

    def running(self) -> Runtime:
        """The runtime.

        Raises:
            RuntimeClosed: it is not open.
        """
        if self.runtime is None:
            raise NotRunning(self.state)
        return self.runtime

    def stop(self) -> None:
        """The runtime will close soon: requests are still served, streams should end, and readiness says so."""
        self.stopping.set()
        if self.state == "running":
            self._enter("stopping")

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Runtime]:
        """Open the runtime; at the end drain it. Raises what `agent_runtime.open_runtime` raises."""
        if self.state != "closed":
            raise RuntimeError("this application is open already: its lifespan was entered twice")
        self._enter("opening")
        self.stopping = anyio.Event()
        try:
            async with open_runtime(self.config, plugins=self._plugins, address=self.address) as runtime:
                self.extensions = Extensions(runtime)
                self.runtime = runtime
                self._enter("running")
                try:
                    yield runtime
                finally:
                    self.stop()
                    self.runtime = None
        finally:
            self.extensions = Extensions()
            self._enter("closed")

    def _enter(self, state: State) -> None:
        self.state = state
        self.since = datetime.now(UTC)
