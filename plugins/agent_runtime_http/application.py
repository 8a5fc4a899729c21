"""The application: Starlette with our routes, and the runtime as its lifespan."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from agent_runtime import Config, load_config

from . import agents, documents, health, messages, sessions
from .documentation import PAGES, documented
from .operations import Operations
from .problems import answer_to
from .resources import Resource
from .service import Service
from .surface import Surface

__all__ = ["OPERATIONS", "create_app", "lifespan", "stopping", "token_of"]

OPERATIONS: Final[Operations] = documented(
    {
        **sessions.OPERATIONS,
        **messages.OPERATIONS,
        **agents.OPERATIONS,
        **documents.OPERATIONS,
        **health.OPERATIONS,
    }
)
SERVED: Final[Operations] = {**OPERATIONS, **PAGES}
"""These and the pages for people."""
_BELOW_SESSION: Final = "/v1/sessions/{session_id}/"


class _Application(Starlette):
    """Starlette whose outermost layer, and answer to every error, is our surface."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._resources = {path: Resource(service, operations) for path, operations in SERVED.items()}
        super().__init__(
            routes=[Route(path, resource) for path, resource in self._resources.items()], lifespan=_Application._opened
        )
        self.router.redirect_slashes = False
        self.state.service = service

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        routes = [*self.routes]
        async with self._service.open():
            self.routes.extend(route for _, route in self._service.extensions.routes)
            try:
                yield
            finally:
                self.routes[:] = routes

    def build_middleware_stack(self) -> ASGIApp:
        hot = {
            path.removeprefix(_BELOW_SESSION): resource
            for path, resource in self._resources.items()
            if path.startswith(_BELOW_SESSION)
        }
        stack: ASGIApp = ExceptionMiddleware(self.router, handlers={HTTPException: self._refused})
        public = [path for path, methods in SERVED.items() if all(each.public for each in methods.values())]
        stack = Surface(stack, self._service, hot, public)
        for added, args, kwargs in reversed(self.user_middleware):
            stack = added(stack, *args, **kwargs)
        return stack

    async def _refused(self, _request: Request, error: Exception) -> Response:
        """What Starlette's router and plugins' routes refuse, in our form."""
        if isinstance(error, HTTPException) and error.status_code == HTTPStatus.NOT_FOUND:
            self._service.running()  # until it runs a plugin's routes are missing, which is no reason to say: never was
        return answer_to(error)  # type: ignore[return-value]  # an ASGI application, which is all that is asked for


def create_app(
    config: Config | str | None = None, *, plugins: Iterable[object] = (), address: str | None = None
) -> Starlette:
    """The HTTP surface of a runtime, as an ASGI application.

    `config` is a configuration or the URL of a storage; None reads the environment. `plugins` and `address` are
    `open_runtime`'s. The runtime opens and drains in the application's lifespan, and is `app.state.service.runtime` in
    between. Mounted in another application it needs that one to enter `lifespan(app)` in its own.

    Raises:
        ConfigError: the configuration can't be used.
    """
    if not isinstance(config, Config):
        config = load_config() if config is None else Config.of(config)
    return _Application(Service(config, plugins=plugins, address=address))


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Keep the runtime of an application open, for one that is mounted in another:

    agents = create_app("sqlite:///data/agent_runtime.db")

    @asynccontextmanager
    async def parents(parent):
        async with lifespan(agents):
            yield

    parent = FastAPI(lifespan=parents)
    parent.mount("/agents", agents)
    """
    async with app.router.lifespan_context(app):
        yield


def stopping(scope: Scope) -> anyio.Event:
    """Set when the server is about to stop: for streams of plugins' routes, which then should end."""
    service: Service = scope["app"].state.service
    return service.stopping


def token_of(scope: Scope) -> str | None:
    """Who has one of the tokens of the configuration, as `token:` and the beginning of its hash; for middleware."""
    service: Service = scope["app"].state.service
    return service.tokens.admit(scope)
