"""Spans: what there is one of, what it is below, what it tells, and that nobody's words are in it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

import agent_runtime_opentelemetry
import rig
from agent_runtime import Config, StorageUnavailable, hookimpl
from agent_runtime.testing import Faults
from agent_runtime_http import create_app, lifespan
from agent_runtime_http.hookspecs import Middleware
from agent_runtime_memory import MemoryDatabase
from agent_runtime_opentelemetry import Tracing
from http_rig import App, opened, runtime_of

pytestmark = pytest.mark.anyio
README = Path(agent_runtime_opentelemetry.__file__).with_name("README.md").read_text(encoding="utf-8")
SECRET = "the quick brown fox"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Sink:
    """Where spans go. `plugin` makes them."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._provider = TracerProvider()
        self._provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.plugin = ("tracing", Tracing(self._provider))

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, pattern: str) -> list[ReadableSpan]:
        return [span for span in self.spans if re.fullmatch(pattern, span.name)]


@asynccontextmanager
async def traced(sink: Sink, *plugins: object) -> AsyncIterator[App]:
    config = Config.of("memory:", plugins={"disabled": ["opentelemetry"]}, write_behind={"interval_s": 1e6})
    async with opened(config, [sink.plugin, *plugins]) as app:
        yield app


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


async def test_a_request_has_a_span_with_its_append_below() -> None:
    sink = Sink()
    async with traced(sink) as app:
        await app("PUT", "/v1/sessions/s1")
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        reply = await app("POST", "/v1/sessions/s1/messages", {"role": "user", "content": "hi"}, headers=headers)
        assert reply.status == 201
        await app("POST", "/v1/sessions/s1/messages/batch", {"messages": [{"role": "user", "content": "a"}] * 3})
    [request] = sink.named("POST /v1/sessions/{session_id}/messages")
    assert request.kind is SpanKind.SERVER
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/v1/sessions/{session_id}/messages",
        "http.response.status_code": 201,
        "url.scheme": "http",
    }
    assert request.parent is not None
    assert (f"{request.parent.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, PARENT)
    append, batch = sink.named("agent_runtime.append")
    assert append.parent == request.context
    assert attributes(append) == {
        "agent_runtime.session_id": "s1",
        "agent_runtime.messages": 1,
        "agent_runtime.durability": "buffered",
    }
    assert attributes(batch)["agent_runtime.messages"] == 3
    for span in (append, request):
        assert span.start_time is not None
        assert span.end_time is not None
        assert 0 <= span.end_time - span.start_time < 10e9
    assert (request.start_time or 0) <= (append.start_time or 0) + 1_000_000  # two clocks


async def test_what_is_refused_and_what_is_not_there() -> None:
    sink = Sink()
    async with traced(sink) as app:
        assert (await app("GET", "/v1/sessions/nobody")).status == 404
        assert (await app("GET", "/nowhere/at/all")).status == 404
        assert (await app("BREW", "/v1/sessions")).status == 405
        for path in ("/health", "/livez", "/readyz", "/metrics"):
            await app("GET", path)
    [known, unknown, wrong] = sink.spans
    assert (known.name, attributes(known)["http.response.status_code"]) == ("GET /v1/sessions/{session_id}", 404)
    assert (unknown.name, "http.route" in attributes(unknown)) == ("GET", False)
    assert (wrong.name, attributes(wrong)["http.request.method"]) == ("_OTHER /v1/sessions", "_OTHER")
    assert {span.status.status_code for span in sink.spans} == {StatusCode.UNSET}


async def test_a_server_that_fails() -> None:
    sink = Sink()
    async with traced(sink) as app:
        await app("PUT", "/v1/sessions/s1")
        runtime_of(app)._door.close(StorageUnavailable(SECRET))
        assert (await app("POST", "/v1/sessions/s1/messages", {"role": "user", "content": "hi"})).status == 503
    [request] = sink.named("POST .*")
    assert request.status.status_code is StatusCode.ERROR
    assert (attributes(request)["http.response.status_code"], attributes(request)["error.type"]) == (503, "503")
    assert sink.named("agent_runtime.append") == []


async def test_a_flush_has_a_span_of_its_own_and_one_for_each_failure() -> None:
    sink, faults = Sink(), Faults()
    faults.fail("apply", nth=1)
    async with rig.opened(rig.config(), MemoryDatabase().open, faults, sink.plugin) as runtime:
        session = await runtime.create_session("s1", system_prompt=SECRET)
        await session.append("user", SECRET, durability="stored")
    failed, stored = sink.named("agent_runtime.flush")
    assert failed.parent is stored.parent is None
    assert failed.status.status_code is StatusCode.ERROR
    assert attributes(failed) == {
        "agent_runtime.changes": 2,
        "agent_runtime.sequence": 2,
        "agent_runtime.attempt": 1,
        "error.type": "StorageUnavailable",
    }
    assert attributes(stored) == {
        "agent_runtime.changes": 2,
        "agent_runtime.sessions": 1,
        "agent_runtime.messages": 2,
        "agent_runtime.sequence": 2,
        "agent_runtime.attempt": 2,
    }
    [append] = sink.named("agent_runtime.append")
    assert attributes(append)["agent_runtime.durability"] == "stored"
    assert (append.end_time or 0) - (append.start_time or 0) > (stored.end_time or 0) - (stored.start_time or 0)


async def test_nobody_s_words_are_in_a_span() -> None:
    class Rude:
        """Middleware that has something to say."""

        @hookimpl(optionalhook=True)
        def agent_runtime_http_middleware(self) -> Sequence[Middleware]:
            def around(app: ASGIApp) -> ASGIApp:
                async def failing(scope: Scope, receive: Receive, send: Send) -> None:
                    if scope["method"] == "PATCH":
                        raise RuntimeError(SECRET)
                    await app(scope, receive, send)

                return failing

            return [around]

    sink = Sink()
    async with traced(sink, Rude()) as app:
        assert (await app("PATCH", "/v1/sessions/s1", {"title": "T"})).status == 500
        await app("PUT", "/v1/sessions/s1", {"title": SECRET, "metadata": {"a": SECRET}})
        await app("POST", "/v1/sessions/s1/messages", {"role": "user", "content": SECRET})
        await app("POST", "/v1/sessions/s1/messages", {"role": SECRET, "content": SECRET})
        await app("PUT", f"/v1/sessions/s1/documents/notes/{SECRET.replace(' ', '%20')}", {"a": SECRET})
        await app("GET", f"/{SECRET.replace(' ', '%20')}?q={SECRET.replace(' ', '+')}")
        await runtime_of(app).flush()
    told = "".join(span.to_json() for span in sink.spans)
    assert len(sink.spans) == 8
    assert "fox" not in told


async def test_a_mounted_application_names_its_own_routes() -> None:
    sink = Sink()
    config = Config.of("memory:", plugins={"disabled": ["opentelemetry"]})
    inner = create_app(config, plugins=[sink.plugin])
    async with lifespan(inner):
        await App(Starlette(routes=[Mount("/agents", inner)]))("GET", "/agents/v1/sessions")
    assert [span.name for span in sink.spans] == ["GET /v1/sessions"]


async def test_every_span_stands_in_the_readme_with_its_attributes() -> None:
    rows = [line.split("|")[1:-1] for line in README.splitlines() if line.startswith("| `")]
    described = {re.findall(r"`([^`]+)`", name)[0]: set(re.findall(r"`([^`]+)`", told)) for name, _, told in rows}
    sink = Sink()
    async with traced(sink) as app:
        await app("PUT", "/v1/sessions/s1", {"system_prompt": "hi"})
        await app("POST", "/v1/sessions/s1/messages", {"role": "user", "content": "hi"})
        await runtime_of(app).flush()
    found: dict[str, set[str]] = {}
    for span in sink.spans:
        name = "{method} {route}" if span.kind is SpanKind.SERVER else span.name
        found.setdefault(name, set()).update(attributes(span))
    assert {name: told - {"error.type"} for name, told in described.items()} == found


PROGRAM = """
import sys
from agent_runtime import open_runtime_blocking

def opened():
    with open_runtime_blocking("memory:") as runtime:
        runtime.create_session("s1").append("user", "hi")
        return runtime._runtime.plugins.watching

assert not opened()
assert "opentelemetry.trace" not in sys.modules
"""


@pytest.mark.parametrize("extra", [True, False])
def test_it_does_nothing_until_there_is_a_provider(extra: bool) -> None:
    program = PROGRAM
    if extra:
        program += """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

assert not opened()
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
assert opened()
assert [span.name for span in exporter.get_finished_spans()] == ["agent_runtime.append", "agent_runtime.flush"]
"""
    else:
        program = "import sys; sys.modules['opentelemetry'] = None\n" + program
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
