"""The internal key of the old service: the header `x-internal-auth`, against AGENT_RUNTIME__INTERNAL_API_KEY.

While the variable is set (there is no default), who sends the key is served on the paths of the old API, and nobody
else is but who has a token of `http.tokens`. Where there are such tokens, they guard all other paths, and the key opens
none of those; where there are none, the key guards these too, so that nothing that the old service protected lies open.
Health checks are always answered.

Only the SHA-256 of the key is held. What is sent is hashed and compared in constant time; neither is ever logged or
repeated.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import sha256
from hmac import compare_digest
from typing import Final

from starlette.routing import Match, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from agent_runtime import ConfigError
from agent_runtime_http import Unauthenticated
from agent_runtime_http.answers import json_answer

from .routes import old_routes

__all__ = ["VARIABLES", "InternalKey", "internal_key"]

VARIABLES: Final = ("AGENT_RUNTIME__INTERNAL_API_KEY", "INTERNAL_API_KEY")
"""Two names for one thing."""

_HEADER: Final = b"x-internal-auth"
_CHALLENGE: Final = "x-internal-auth"
_UNAUTHORIZED: Final = json_answer({"detail": "unauthorized"}, 401, [(b"www-authenticate", _CHALLENGE.encode())])
_PUBLIC: Final = frozenset({"/health", "/livez", "/readyz"})


def internal_key(environ: Mapping[str, str] = os.environ) -> InternalKey | None:
    """The key that is set; None: there is none. An empty variable counts as not set.

    Raises:
        ConfigError: the two variables differ.
    """
    keys = {environ[name] for name in VARIABLES if environ.get(name)}
    if len(keys) > 1:
        raise ConfigError([f"{VARIABLES[1]}: differs from {VARIABLES[0]}, of which it is another name; unset one"])
    return InternalKey(keys.pop()) if keys else None


class InternalKey:
    """Asks for the key, before anything else does."""

    def __init__(self, key: str) -> None:
        self._digest = sha256(key.encode(errors="surrogateescape")).digest()
        self._old = Router(old_routes(), redirect_slashes=False)

    def around(self, app: ASGIApp) -> ASGIApp:
        """Middleware of the surface."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if _path(scope) in _PUBLIC:
                await app(scope, receive, send)
                return
            is_old = any(route.matches(scope)[0] is not Match.NONE for route in self._old.routes)
            if self._is_sent(scope):
                await (self._old if is_old else app)(scope, receive, send)
            elif scope["app"].state.service.tokens and (_has_token(scope) or not is_old):
                await app(scope, receive, send)  # whether it is one of ours is looked at there
            elif is_old:
                await _UNAUTHORIZED(scope, receive, send)
            else:
                raise Unauthenticated("send the key, with the header x-internal-auth", challenge=_CHALLENGE)

        return guarded

    def _is_sent(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == _HEADER]
        return len(given) == 1 and compare_digest(sha256(given[0]).digest(), self._digest)


def _has_token(scope: Scope) -> bool:
    return any(name == b"authorization" for name, _ in scope["headers"])


def _path(scope: Scope) -> str:
    """The path below where the application is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path
