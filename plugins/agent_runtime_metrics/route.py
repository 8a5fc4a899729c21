"""`GET /metrics`, in the format that the collecting side asks for: OpenMetrics or Prometheus's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["metrics_route"]


def metrics_route(registry: CollectorRegistry) -> Route:
    """The route of a registry."""

    async def get_metrics(request: Request) -> Response:
        """Get the figures for Prometheus.

        In its own format, or in OpenMetrics if that is accepted.
        ---
        responses:
          "200":
            description: The figures.
            content:
              text/plain: {schema: {type: string}}
              application/openmetrics-text: {schema: {type: string}}
        """
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    return Route("/metrics", get_metrics)
