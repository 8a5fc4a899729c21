"""The old codelab agent-runtime service's users: its data, its HTTP API and its calls, on the new runtime.

Importing it is cheap, since whoever opens a runtime does: what it stands on comes with the first use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from agent_runtime import hookimpl
from agent_runtime.formats import ImportFormat

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from agent_runtime_http.hookspecs import Middleware


@hookimpl
def agent_runtime_import_formats() -> Mapping[str, ImportFormat]:
    """`agent-runtime import --format codelab URL`: the databases of the old service."""
    from .source import open_source

    return {"codelab": open_source}


@hookimpl(optionalhook=True)
def agent_runtime_http_routes() -> Sequence[BaseRoute]:
    """The HTTP API of the old service."""
    from .routes import old_routes

    return old_routes()


@hookimpl(optionalhook=True)
def agent_runtime_http_middleware() -> Sequence[Middleware]:
    """The old service's key, while it is set."""
    from .key import internal_key

    key = internal_key()
    return [] if key is None else [key.around]
