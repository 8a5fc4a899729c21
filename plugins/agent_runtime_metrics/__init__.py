"""What a runtime does, for Prometheus: `GET /metrics` beside the HTTP surface, or a registry to be served otherwise.

README.md names every figure. Nothing is counted here: the runtime counts, and is asked when somebody collects. Each
runtime has a registry of its own, never the global one of prometheus_client.

Importing it is cheap, since whoever opens a runtime does: prometheus_client comes with the first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from agent_runtime import Runtime, hookimpl

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from starlette.routing import BaseRoute

__all__ = ["registry_of"]


def registry_of(runtime: Runtime) -> CollectorRegistry:
    """A new registry of the runtime's figures, and of its process's. To be collected on the runtime's event loop."""
    from .collector import make_registry

    return make_registry(runtime)


@hookimpl(optionalhook=True)
def agent_runtime_http_routes(runtime: Runtime) -> Sequence[BaseRoute]:
    """`GET /metrics`."""
    from .route import metrics_route

    return [metrics_route(registry_of(runtime))]
