"""The spans of what the runtime has done. It tells of that afterwards: a span is begun and ended at once."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from time import time_ns
from typing import TypeAlias

from opentelemetry.context import Context
from opentelemetry.trace import Status, StatusCode, TracerProvider, get_tracer
from opentelemetry.util.types import AttributeValue

from agent_runtime.changes import Batch, Receipt
from agent_runtime.records import Durability

__all__ = ["Spans"]

_Attributes: TypeAlias = Mapping[str, AttributeValue]


class Spans:
    """Makes spans with `tracer`."""

    def __init__(self, provider: TracerProvider | None) -> None:
        self.tracer = get_tracer("agent_runtime", version("agent-runtime"), tracer_provider=provider)

    def appended(self, session_id: str, messages: int, durability: Durability, duration_s: float) -> None:
        """An append that has ended now, below the span of the task that made it."""
        attributes: _Attributes = {
            "agent_runtime.session_id": session_id,
            "agent_runtime.messages": messages,
            "agent_runtime.durability": durability,
        }
        self._ended("agent_runtime.append", attributes, duration_s)

    def flushed(self, receipt: Receipt) -> None:
        """A batch that was stored just now; nobody's call, so it has no span above it."""
        attributes: _Attributes = {
            "agent_runtime.changes": receipt.changes,
            "agent_runtime.sessions": receipt.sessions,
            "agent_runtime.messages": receipt.messages,
            "agent_runtime.sequence": receipt.last,
            "agent_runtime.attempt": receipt.attempt,
        }
        self._ended("agent_runtime.flush", attributes, receipt.duration_s, context=Context())

    def failed(self, batch: Batch, error: Exception, attempt: int) -> None:
        """A batch that was not stored. Of the error there is its type: its text is for the log."""
        attributes: _Attributes = {
            "agent_runtime.changes": batch.changes,
            "agent_runtime.sequence": batch.last,
            "agent_runtime.attempt": attempt,
            "error.type": type(error).__name__,
        }
        self._ended("agent_runtime.flush", attributes, 0.0, context=Context(), status=Status(StatusCode.ERROR))

    def _ended(
        self,
        name: str,
        attributes: _Attributes,
        duration_s: float,
        *,
        context: Context | None = None,
        status: Status | None = None,
    ) -> None:
        now = time_ns()
        start = now - int(duration_s * 1e9)
        span = self.tracer.start_span(name, context=context, attributes=attributes, start_time=start)
        if status is not None:
            span.set_status(status)
        span.end(now)
