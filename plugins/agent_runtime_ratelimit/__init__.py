"""A rate limit for the HTTP surface: so many requests a second of each client, and 429 for more.

Off unless `plugins.config.ratelimit` says how many. README.md has its keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from agent_runtime import Runtime, hookimpl

if TYPE_CHECKING:
    from agent_runtime_http.hookspecs import Middleware

__all__: list[str] = []


@hookimpl(optionalhook=True)
def agent_runtime_http_middleware(runtime: Runtime) -> Sequence[Middleware]:
    """The limit, if there is one."""
    options = runtime.config.plugins.config.get("ratelimit")
    if options is None:
        return []
    from .middleware import limiting
    from .options import read_options

    return [limiting(read_options(options))]
