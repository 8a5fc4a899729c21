"""The HTTP surface of agent-runtime: an ASGI application, and `agent-runtime serve`.

app = create_app("sqlite:///data/agent_runtime.db")

Importing it is cheap, since whoever opens a runtime does: Starlette comes with the first use of a name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from agent_runtime import hookimpl
from agent_runtime.client import ClientFactory

from .hookspecs import HttpHookSpecs

if TYPE_CHECKING:
    import typer

    from .application import create_app, lifespan, stopping, token_of
    from .problems import Forbidden, Unauthenticated

__all__ = ["Forbidden", "Unauthenticated", "create_app", "lifespan", "stopping", "token_of"]

_PLACES: Final = {
    "Forbidden": "problems",
    "Unauthenticated": "problems",
    "create_app": "application",
    "lifespan": "application",
    "stopping": "application",
    "token_of": "application",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


@hookimpl
def agent_runtime_hookspecs() -> Sequence[type]:
    """The hooks of the surface, for other plugins."""
    return [HttpHookSpecs]


@hookimpl
def agent_runtime_clients() -> Mapping[str, ClientFactory]:
    """Servers at http:// and https:// URLs."""
    from .client import connect

    return {"http": connect, "https": connect}


@hookimpl
def agent_runtime_commands(app: typer.Typer) -> None:
    """The commands `serve`, `openapi`, `token` and `torture`."""
    from .commands import openapi, serve, token  # servers are loaded by who serves
    from .torture.command import command as torture

    app.command()(serve)
    app.command()(openapi)
    app.command()(token)
    app.command("torture")(torture)
