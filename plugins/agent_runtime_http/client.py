"""The other end of the wire: what commands ask of a server. With the standard library, in a thread.

A server that asks for a token is sent the one in the variable `AGENT_RUNTIME_TOKEN`.
"""

from __future__ import annotations

import http.client
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from http import HTTPStatus
from typing import Any, Final, TypeVar
from urllib.parse import quote, unquote, urlencode, urlsplit

import anyio.to_thread
import msgspec

from agent_runtime import (
    AgentContext,
    AgentRuntimeError,
    AgentSwitch,
    InvalidInput,
    Message,
    Page,
    PurgedSession,
    Session,
    SessionNotFound,
    Status,
    StorageUnavailable,
)
from agent_runtime.client import SessionsClient
from agent_runtime.records import Durability, Order

__all__ = ["authorization", "connect"]

T = TypeVar("T")
_VARIABLE: Final = "AGENT_RUNTIME_TOKEN"
"""Where commands find the token for a server. Not a key of the configuration, which is the server's."""

_TIMEOUT_S: Final = 60.0
_PAGE_ITEMS: Final = 1000


class _HandOver(msgspec.Struct, frozen=True):
    """A member of `agent_history`."""

    from_agent: str = msgspec.field(name="from")
    to_agent: str = msgspec.field(name="to")
    reason: str | None
    timestamp: datetime
    metadata: dict[str, Any] | None = None


class _Context(AgentContext, frozen=True, kw_only=True):
    agent_history: list[_HandOver]


class _Purged(msgspec.Struct, frozen=True):
    items: list[PurgedSession]


class _Problem(msgspec.Struct, frozen=True):
    type: str
    detail: str


def authorization() -> dict[str, str]:
    """The header that says who asks; none where no token is set.

    Raises:
        InvalidInput: the variable holds what can't be sent.
    """
    token = os.environ.get(_VARIABLE, "")
    if not (token.isascii() and token.isprintable()):
        raise InvalidInput(_VARIABLE, "holds no token: it is one line of ASCII characters")
    return {"Authorization": f"Bearer {token}"} if token else {}


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[SessionsClient]:
    """The sessions of the server at a URL, which may have a path that the server is mounted at.

    Raises:
        InvalidInput: it is not the URL of a server, or `AGENT_RUNTIME_TOKEN` is no token.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
        raise InvalidInput("server", "is not the URL of a server, such as http://127.0.0.1:8001")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, port, timeout=_TIMEOUT_S)
    try:
        yield _Sessions(
            _Wire(connection, parts.path.rstrip("/"), f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")
        )
    finally:
        connection.close()


class _Wire:
    """A connection to the server, and what its answers mean."""

    def __init__(self, connection: http.client.HTTPConnection, root: str, shown: str) -> None:
        self._connection = connection
        self._root = root
        self._shown = shown
        self._headers = authorization()

    async def ask(self, method: str, path: str, kind: type[T], *, body: object = None, **query: object) -> T:
        """Make a request, with a body of JSON if one is given; its answer as `kind`."""
        given = urlencode({name: value for name, value in query.items() if value is not None})
        target = f"{self._root}{path}?{given}" if given else self._root + path
        exchange = partial(self._exchange, method, target, None if body is None else msgspec.json.encode(body))
        status, answer = await anyio.to_thread.run_sync(exchange, abandon_on_cancel=True)
        try:
            if status < 300:
                return msgspec.json.decode(answer or b"null", type=kind)
            problem = msgspec.json.decode(answer, type=_Problem)
        except msgspec.MsgspecError:
            raise StorageUnavailable(f"{self._shown} answers {status}, and not as a server of agent-runtime") from None
        if problem.type.endswith(":session-not-found"):
            raise SessionNotFound(unquote(path.split("/")[3]))
        way_out = f"; set {_VARIABLE}" if status == HTTPStatus.UNAUTHORIZED else ""
        raise AgentRuntimeError(f"{self._shown} answers {status}: {problem.detail}{way_out}")

    def _exchange(self, method: str, target: str, body: bytes | None) -> tuple[int, bytes]:
        headers = self._headers if body is None else {**self._headers, "Content-Type": "application/json"}
        try:
            self._connection.request(method, target, body, headers)
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise StorageUnavailable(f"the server at {self._shown} can't be reached: {reason}") from None


class _Sessions:
    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    async def list_sessions(
        self, *, user_id: str | None = None, limit: int = 50, cursor: str | None = None, order: Order = "desc"
    ) -> Page[Session]:
        return await self._wire.ask(
            "GET", "/v1/sessions", Page[Session], user_id=user_id, limit=limit, cursor=cursor, order=order
        )

    async def get_session(self, session_id: str) -> _Session:
        session = _Session(self._wire, session_id)
        await session.record()
        return session

    async def purge_sessions(
        self, session_ids: Sequence[str], *, idle_longer_than: timedelta | None = None, dry_run: bool = False
    ) -> list[PurgedSession]:
        body = {"session_ids": session_ids, "dry_run": dry_run}
        if idle_longer_than is not None:
            body["idle_longer_than_s"] = idle_longer_than.total_seconds()
        return (await self._wire.ask("POST", "/v1/purge", _Purged, body=body)).items

    async def flush(self) -> None:
        await self._wire.ask("POST", "/v1/flush", object)

    async def status(self) -> Status:
        return await self._wire.ask("GET", "/v1/status", Status)


class _Session:
    def __init__(self, wire: _Wire, session_id: str) -> None:
        self._wire = wire
        self._path = f"/v1/sessions/{quote(session_id, safe='')}"

    async def record(self) -> Session:
        return await self._wire.ask("GET", self._path, Session)

    async def context(self) -> AgentContext:
        return await self._wire.ask("GET", f"{self._path}/context", AgentContext)

    async def switches(self) -> list[AgentSwitch]:
        context = await self._wire.ask("GET", f"{self._path}/context", _Context)
        return [
            AgentSwitch(
                from_agent=each.from_agent,
                to_agent=each.to_agent,
                reason=each.reason,
                switched_at=each.timestamp,
                metadata=each.metadata,
            )
            for each in context.agent_history
        ]

    async def messages(self, *, after: int | None = None, limit: int = 100, order: Order = "asc") -> Page[Message]:
        return await self._wire.ask(
            "GET", f"{self._path}/messages", Page[Message], after=after, limit=limit, order=order
        )

    async def scan_messages(self, *, after: int | None = None) -> AsyncIterator[Message]:
        while True:
            page = await self.messages(after=after, limit=_PAGE_ITEMS)
            for message in page.items:
                yield message
            if page.next is None:
                return
            after = page.next

    async def delete(self, *, durability: Durability | None = None) -> None:
        await self._wire.ask("DELETE", self._path, object, durability=durability)
