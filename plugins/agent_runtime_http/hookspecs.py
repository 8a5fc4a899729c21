"""The hooks of the HTTP surface: more routes, middleware around all of it, and who may come in.

As the core's they are synchronous and may not block. A plugin that should also load where this one is disabled marks
its implementations with `@hookimpl(optionalhook=True)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from agent_runtime import Runtime
from agent_runtime.hookspecs import hookspec

if TYPE_CHECKING:
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Scope

__all__ = ["AUTHENTICATE", "MIDDLEWARE", "ROUTES", "HttpHookSpecs", "Middleware"]

Middleware: TypeAlias = "Callable[[ASGIApp], ASGIApp]"
"""Makes an ASGI application out of the one that it is to be put around."""

ROUTES = "agent_runtime_http_routes"
MIDDLEWARE = "agent_runtime_http_middleware"
AUTHENTICATE = "agent_runtime_http_authenticate"


class HttpHookSpecs:
    """The signatures. An implementation may leave out arguments that it does not use."""

    @hookspec
    def agent_runtime_http_routes(self, runtime: Runtime) -> Sequence[BaseRoute]:  # type: ignore[empty-body]
        """Routes besides the ones of the surface, which come first. Called each time the runtime has been opened.

        What they raise is answered as the surface answers it. A stream ends itself when `stopping(scope)` is set.
        """

    @hookspec
    def agent_runtime_http_middleware(self, runtime: Runtime) -> Sequence[Middleware]:  # type: ignore[empty-body]
        """Pure ASGI middleware around every request while the runtime is open, the first one outermost.

        What it raises is answered as the surface answers it. `token_of(scope)` tells who has a token.
        """

    @hookspec
    def agent_runtime_http_authenticate(self, scope: Scope) -> object | None:
        """Who makes this request: a principal, of any kind; None if this plugin can't tell, and the next one is asked.

        Raises `Unauthenticated` or `Forbidden` to refuse. If any plugin implements this hook, a request that none of
        them knows is refused; health checks are never asked, nor is who has a token of the configuration. The principal
        is `scope["agent_runtime.principal"]`.
        """
