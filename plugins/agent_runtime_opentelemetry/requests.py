"""Pure ASGI middleware: a span around each request, below the one that the client names in its headers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from opentelemetry.propagate import extract
from opentelemetry.trace import SpanKind, StatusCode, Tracer
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["traced"]

_UNTRACED: Final = frozenset({"/health", "/livez", "/readyz", "/metrics"})
"""What is asked for every few seconds by machines."""

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def traced(tracer: Tracer) -> Callable[[ASGIApp], ASGIApp]:
    """The middleware. Names and attributes are those of OpenTelemetry's conventions for HTTP servers, version 1."""

    def around(app: ASGIApp) -> ASGIApp:
        async def called(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or (route := _route(scope)) in _UNTRACED:
                await app(scope, receive, send)
                return
            method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
            with tracer.start_as_current_span(
                f"{method} {route}" if route else method,
                context=extract({name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}),
                kind=SpanKind.SERVER,
                attributes={"http.request.method": method, "url.scheme": scope["scheme"]},
                record_exception=False,  # its text is for the log
                set_status_on_exception=False,
            ) as span:
                if route:
                    span.set_attribute("http.route", route)

                async def sending(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        status: int = message["status"]
                        span.set_attribute("http.response.status_code", status)
                        if status >= 500:
                            span.set_attribute("error.type", str(status))
                            span.set_status(StatusCode.ERROR)
                    await send(message)

                try:
                    await app(scope, receive, sending)
                except Exception as error:
                    span.set_attribute("error.type", type(error).__name__)
                    raise

        return called

    return around


def _route(scope: Scope) -> str:
    """The path with the names of its parts in place of what the client sent; nothing where there is no such route."""
    routes: list[BaseRoute] = scope["app"].routes
    return next((str(getattr(it, "path", "")) for it in routes if it.matches(scope)[0] is not Match.NONE), "")
