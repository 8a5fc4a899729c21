"""Spans of requests, appends and flushes, for OpenTelemetry; with the extra `opentelemetry`.

Where a span goes is not decided here: to the tracer provider that the process has set up, or to the one that `Tracing`
was given. A span has no content: nothing of messages, documents or metadata, and no path but the route.

The entry point gives `Tracing` to runtimes that are opened once there is a provider. Until then, and without the extra,
it gives a plugin that does nothing, so that an append pays nothing for spans that nobody wants.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from agent_runtime import hookimpl
from agent_runtime.changes import Batch, Receipt
from agent_runtime.records import Durability

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from agent_runtime_http.hookspecs import Middleware

    from .spans import Spans

__all__ = ["Tracing"]


class Tracing:
    """The plugin. `provider` takes the spans; None: the one that the process has set up."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider

    @cached_property
    def _spans(self) -> Spans:
        from .spans import Spans  # imported with the first use: whoever opens a runtime imports this module

        return Spans(self._provider)

    @hookimpl(optionalhook=True)
    def agent_runtime_http_middleware(self) -> Sequence[Middleware]:
        """A span around every request."""
        from .requests import traced

        return [traced(self._spans.tracer)]

    @hookimpl
    def agent_runtime_appended(self, session_id: str, messages: int, durability: Durability, duration_s: float) -> None:
        """A span of an append, within that of its request."""
        self._spans.appended(session_id, messages, durability, duration_s)

    @hookimpl
    def agent_runtime_batch_stored(self, receipt: Receipt) -> None:
        """A span of a flush."""
        self._spans.flushed(receipt)

    @hookimpl
    def agent_runtime_flush_failed(self, batch: Batch, error: Exception, attempt: int) -> None:
        """A span, of no length, of a flush that failed."""
        self._spans.failed(batch, error, attempt)


class _Idle:
    """The plugin where nobody wants spans."""

    @hookimpl(optionalhook=True)
    def agent_runtime_http_middleware(self) -> Sequence[Middleware]:
        """None."""
        return []


def __getattr__(name: str) -> object:
    if name != "plugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trace = sys.modules.get("opentelemetry.trace")  # who has set up a provider has imported it
    wanted = trace is not None and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    return Tracing() if wanted else _Idle()
