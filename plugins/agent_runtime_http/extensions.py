"""What plugins bring for an application: routes, middleware, and who may come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from starlette.routing import BaseRoute
from starlette.types import Scope

from agent_runtime import PluginError, Runtime
from agent_runtime.plugins import HookCall, PluginManager, raised

from .hookspecs import AUTHENTICATE, MIDDLEWARE, ROUTES, Middleware
from .problems import Refusal, Unauthenticated

__all__ = ["PRINCIPAL", "Extensions"]

PRINCIPAL: Final = "agent_runtime.principal"
"""The key of the scope under which routes find who makes the request."""


class Extensions:
    """What the plugins of a runtime bring; without a runtime nothing.

    Raises:
        PluginError: a plugin failed, or brings something else than it should.
    """

    def __init__(self, runtime: Runtime | None = None) -> None:
        self.routes: Sequence[tuple[str, BaseRoute]] = ()
        self.middleware: Sequence[Middleware] = ()
        self.document: tuple[str, bytes] | None = None
        """The OpenAPI document with these routes, once it was asked for, and where the application was mounted then."""
        self._authenticators: Sequence[HookCall] = ()
        if runtime is not None:
            plugins = runtime.plugins
            self.routes = _gathered(plugins, ROUTES, lambda item: isinstance(item, BaseRoute), runtime=runtime)
            self.middleware = [each for _, each in _gathered(plugins, MIDDLEWARE, callable, runtime=runtime)]
            self._authenticators = plugins.calls(AUTHENTICATE)

    @property
    def authenticates(self) -> bool:
        """Whether any plugin asks who makes a request."""
        return bool(self._authenticators)

    def authenticate(self, scope: Scope) -> None:
        """Put into the scope who makes this request.

        Raises:
            Refusal: nobody knows, or a plugin refuses.
            PluginError: a plugin failed.
        """
        for call in self._authenticators:
            try:
                principal = call({"scope": scope})
            except Refusal:
                raise
            except Exception as error:
                raise PluginError(call.plugin, AUTHENTICATE, raised(error)) from error
            if principal is not None:
                scope[PRINCIPAL] = principal
                return
        raise Unauthenticated


def _gathered(
    plugins: PluginManager, hook: str, fits: Callable[[object], bool], **arguments: object
) -> list[tuple[str, Any]]:
    """What plugins bring, each with the name of its plugin."""
    gathered: list[tuple[str, Any]] = []
    for plugin, items in plugins.results(hook, **arguments):
        if not isinstance(items, Sequence) or not all(map(fits, items)):
            raise PluginError(plugin, hook, "returned something else than a sequence of what it should bring")
        gathered += [(plugin, item) for item in items]
    return gathered
