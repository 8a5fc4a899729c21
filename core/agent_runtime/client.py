"""What is asked of sessions from outside of the process that has them: a part of `Runtime`, over whatever wire.

A runtime in this process is one, so that a command may be written once for both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeAlias

from .records import AgentContext, AgentSwitch, Durability, Message, Order, Page, PurgedSession, Session

if TYPE_CHECKING:
    from .status import Status

__all__ = ["ClientFactory", "SessionClient", "SessionsClient"]


class SessionClient(Protocol):
    """One session, as a `SessionHandle` is."""

    async def record(self) -> Session:
        """The session's record."""

    async def context(self) -> AgentContext:
        """Which agent holds the session."""

    async def switches(self) -> Sequence[AgentSwitch]:
        """All hand-overs, oldest first."""

    async def messages(self, *, after: int | None = None, limit: int = 100, order: Order = "asc") -> Page[Message]:
        """A page of messages in order of seq, behind the seq `after`."""

    def scan_messages(self, *, after: int | None = None) -> AsyncIterator[Message]:
        """All messages behind the seq `after`, oldest first."""

    async def delete(self, *, durability: Durability | None = None) -> None:
        """Delete the session and all it has."""


class SessionsClient(Protocol):
    """Sessions, as a `Runtime` has them. Raises what that raises; StorageUnavailable if a server can't be reached."""

    async def list_sessions(
        self, *, user_id: str | None = None, limit: int = 50, cursor: str | None = None, order: Order = "desc"
    ) -> Page[Session]:
        """A page of sessions (of one user)."""

    async def get_session(self, session_id: str) -> SessionClient:
        """The session with this id."""

    async def purge_sessions(
        self, session_ids: Sequence[str], *, idle_longer_than: timedelta | None = None, dry_run: bool = False
    ) -> list[PurgedSession]:
        """Delete sessions so that nothing of them is left; returns those that were there."""

    async def flush(self) -> None:
        """Wait until every change acknowledged so far is stored."""

    def status(self) -> Status | Awaitable[Status]:
        """The figures of this moment. A server has to be asked for them, a runtime has them at once."""


ClientFactory: TypeAlias = Callable[[str], AbstractAsyncContextManager[SessionsClient]]
"""Connects to the server at a URL."""
