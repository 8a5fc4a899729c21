"""The outermost layer of the application: nothing comes in or goes out but through here.

In order, for each request: the path as it was sent is looked at, before anyone acts on the decoded one, and whether it
may come from a page; then come the plugins' middleware; then tokens, and whoever else knows who asks; then the short
way to the hot paths of a session, else Starlette's router. Whatever is raised on the way is answered with a problem
document, here and nowhere else; to middleware that is an answer as any other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import Disconnected
from .extensions import PRINCIPAL, Extensions
from .problems import Fault, Refusal, answer_to, invalid
from .resources import Resource
from .service import Service
from .tokens import refusal

__all__ = ["Surface"]

_STARTED: Final = "agent_runtime.started"
_is_encoded: Final = re.compile(rb"(?:[^%]|%[0-9A-Fa-f]{2})*").fullmatch


class Surface:
    """Middleware of the Starlette application. `hot` are the resources below `/v1/sessions/{session_id}/`, by name;
    `public` are the paths that are answered to anybody.
    """

    def __init__(self, app: ASGIApp, service: Service, hot: Mapping[str, Resource], public: Collection[str]) -> None:
        self._app = _marking(app)
        self._service = service
        self._hot = hot
        self._public = frozenset(public)
        self._adopt(service.extensions)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._pass(scope, receive, send)
            return
        if self._extensions is not self._service.extensions:
            self._adopt(self._service.extensions)
        try:
            raw_path = scope.get("raw_path")
            if raw_path is not None and b"%" in raw_path:
                _check_encoding(raw_path)
            if _path(scope) not in self._public:
                self._service.guard.check(scope)
            await self._stack(scope, receive, send)
        except Disconnected:
            return
        except Exception as error:  # noqa: BLE001 — whatever it is, it is answered, and says no more than it may
            await _answer(error, scope, receive, send)

    def _adopt(self, extensions: Extensions) -> None:
        """Put the plugins of the runtime that was opened around the rest."""
        asks = extensions.authenticates or bool(self._service.tokens)
        stack: ASGIApp = self._authenticate if asks else self._route
        if extensions.middleware:
            stack = _answering(stack)  # here already, so that middleware sees what is answered, whatever that is
            for middleware in reversed(extensions.middleware):
                stack = middleware(stack)
            stack = _marking(stack)
        self._extensions = extensions
        self._stack = stack

    async def _authenticate(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _path(scope) not in self._public:
            self._admit(scope)
        await self._route(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        """Let in who has a token, or whom a plugin knows."""
        principal = self._service.tokens.admit(scope)
        if principal is not None:
            scope[PRINCIPAL] = principal
        elif self._service.extensions.authenticates:
            self._service.extensions.authenticate(scope)
        elif self._service.tokens:
            raise refusal(scope)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        segments = _path(scope).split("/")
        if len(segments) == 5 and segments[2] == "sessions" and segments[1] == "v1" and segments[4] in self._hot:
            await self._hot[segments[4]].respond({"session_id": segments[3]}, scope, receive, send)
        elif segments[1:2] == ["v1"] and "" in segments[2:]:
            raise invalid([Fault("{path}", "has an empty segment: ids, collections and keys have a character")])
        else:
            await self._app(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The lifespan, and the WebSockets of plugins."""
        if scope["type"] == "websocket":
            try:
                self._service.guard.check(scope)
                self._admit(scope)
            except Refusal:
                await send({"type": "websocket.close", "code": 1008})
                return
        await self._app(scope, receive, send)


async def _answer(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    answer = answer_to(error)
    if _STARTED not in scope:
        await answer(scope, receive, send)


def _answering(app: ASGIApp) -> ASGIApp:
    """The application, answering what it raises."""

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except Disconnected:
            raise
        except Exception as error:  # noqa: BLE001 — as above
            await _answer(error, scope, receive, send)

    return answering


def _marking(app: ASGIApp) -> ASGIApp:
    """The application, with its scope marked once it has begun to answer. (Our own operations answer in one go.)"""

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            scope[_STARTED] = True
            await send(message)

        await app(scope, receive, sending)

    return marked


def _path(scope: Scope) -> str:
    """The path below where the application is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path


def _check_encoding(raw_path: bytes) -> None:
    """Refuse what servers would decode to something else than the client meant: `a%2Fmessages` is one id to it."""
    if not _is_encoded(raw_path):
        raise _malformed("has a % that is not followed by two hexadecimal digits")
    if b"%2f" in raw_path.lower():
        raise invalid([Fault("{path}", "has an encoded slash (%2F): ids, collections and keys have no slash")])
    try:
        unquote_to_bytes(raw_path).decode()
    except UnicodeDecodeError:
        raise _malformed("is not percent-encoded UTF-8") from None


def _malformed(problem: str) -> Refusal:
    return Refusal("malformed", f"the path {problem}", [Fault("{path}", problem)])
