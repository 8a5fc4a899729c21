"""The hooks of the surface, and the application within others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from agent_runtime import InvalidInput, PluginError, Runtime, hookimpl
from agent_runtime_http import Forbidden, Unauthenticated, create_app, lifespan, stopping
from agent_runtime_http.hookspecs import HttpHookSpecs
from http_rig import App, opened

pytestmark = pytest.mark.anyio

SECRET = "hunter2"


def plugin(**hooks: Callable[..., object]) -> object:
    """A plugin of some hooks of the surface, named without their prefix."""
    namespace = type("Plugin", (), {})()
    for name, function in hooks.items():
        setattr(namespace, f"agent_runtime_http_{name}", hookimpl(function))
    return namespace


# --- routes -----------------------------------------------------------------------------------------------------------


class Counting:
    """Routes with a runtime, as plugins have them."""

    @hookimpl
    def agent_runtime_http_routes(self, runtime: Runtime) -> Sequence[BaseRoute]:
        async def count(_: Request) -> Response:
            return JSONResponse({"sessions": len((await runtime.list_sessions()).items)})

        async def missing(_: Request) -> Response:
            await runtime.get_session("nobody")
            raise AssertionError

        async def invalid(_: Request) -> Response:
            raise InvalidInput("messages[3].content", "is too rude")

        async def teapot(_: Request) -> Response:
            raise HTTPException(418, "short and stout", headers={"X-Kind": "tea"})

        async def broken(_: Request) -> Response:
            raise ValueError(SECRET)

        async def half(request: Request) -> Response:
            async def parts() -> AsyncIterator[bytes]:
                yield b"half"
                raise ValueError(SECRET)

            return StreamingResponse(parts())

        endpoints = (count, missing, invalid, teapot, broken, half)
        return [Route(f"/x/{each.__name__}", each) for each in endpoints] + [Route("/v1/sessions", broken)]


async def test_routes_of_a_plugin_are_served_and_their_errors_answered(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app("memory:", plugins=[Counting()])
    for _ in range(2):  # each opening has the routes of its own runtime
        async with lifespan(app):
            request = App(app)
            await request("PUT", "/v1/sessions/s1")
            assert (await request("GET", "/x/count")).json == {"sessions": 1}
            assert (await request("GET", "/v1/sessions")).json["items"]
            assert (await request("GET", "/x/missing")).slug == "session-not-found"
            invalid = await request("GET", "/x/invalid")
            assert (invalid.status, invalid.pointers) == (422, ["/messages/3/content"])
            teapot = await request("GET", "/x/teapot")
            assert (teapot.status, teapot.json["detail"], teapot.headers["x-kind"]) == (418, "short and stout", "tea")
            refused = await request("POST", "/x/count")
            assert (refused.status, refused.slug) == (405, "method-not-allowed")
            assert sorted(refused.headers["allow"].split(", ")) == ["GET", "HEAD"]
            assert (await request("GET", "/x/none")).status == 404
            assert (await request("GET", "/x/broken")).slug == "internal-error"
            assert (await request("GET", "/x%2Fcount")).status == 422
        closed = await App(app)("GET", "/x/count")  # it may be there when the runtime is open: that is no 404
        assert (closed.status, closed.slug, closed.headers["retry-after"]) == (503, "runtime-closed", "5")
    assert SECRET not in caplog.text


async def test_a_stream_that_breaks_off_is_not_answered_twice(caplog: pytest.LogCaptureFixture) -> None:
    async with opened(plugins=[Counting()]) as app:
        sent: list[Message] = []

        async def receive() -> Message:
            await anyio.sleep_forever()
            raise AssertionError

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/x/half", "raw_path": b"/x/half", "query_string": b""}
        await app.app({**scope, "headers": [], "asgi": {"spec_version": "2.3"}}, receive, send)
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        assert "a request failed: " in caplog.text
        assert SECRET not in caplog.text


@pytest.mark.parametrize("found", [None, ["no route"], lambda: None])
async def test_what_is_no_route_is_refused_when_it_opens(found: object) -> None:
    with pytest.raises(PluginError, match="'Plugin', hook agent_runtime_http_routes: "):
        async with opened(plugins=[plugin(routes=lambda: found)]):
            raise AssertionError


async def test_a_plugin_that_fails_to_give_its_routes_is_named() -> None:
    def routes() -> None:
        raise ValueError("no routes today")

    with pytest.raises(PluginError, match=r"'Plugin', hook agent_runtime_http_routes: .*no routes today"):
        async with opened(plugins=[plugin(routes=routes)]):
            raise AssertionError


def test_hooks_of_the_surface_that_are_misspelt_or_wrong_are_refused() -> None:
    from agent_runtime.plugins import PluginManager

    for wrong, problem in {
        "route": "there is no such hook; did you mean agent_runtime_http_routes?",
        "routes": r"Argument\(s\) {'runtimes'} are declared",
    }.items():
        with pytest.raises(PluginError, match=f"^plugin 'Plugin'.*{problem}"):
            PluginManager().load([plugin(**{wrong: lambda runtimes: []})])
    specified = {name for name in vars(HttpHookSpecs) if name.startswith("agent_runtime_http_")}
    assert specified == {f"agent_runtime_http_{name}" for name in ("routes", "middleware", "authenticate")}


# --- middleware -------------------------------------------------------------------------------------------------------


def marking(name: str) -> Callable[[ASGIApp], ASGIApp]:
    """Middleware that adds its name to a header of what is answered."""

    def wrap(app: ASGIApp) -> ASGIApp:
        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    seen = dict(message["headers"]).get(b"x-seen", b"")
                    kept = [(key, value) for key, value in message["headers"] if key != b"x-seen"]
                    message["headers"] = [*kept, (b"x-seen", seen + name.encode())]
                await send(message)

            await app(scope, receive, sending)

        return wrapped

    return wrap


async def test_middleware_is_around_every_request_the_first_one_outermost() -> None:
    plugins = [
        ("a", plugin(middleware=lambda: [marking("1"), marking("2")])),
        ("b", plugin(middleware=lambda: [marking("3")])),
    ]
    async with opened(plugins=plugins) as app:
        for method, target, body, status in (
            ("PUT", "/v1/sessions/s1", None, 201),
            ("POST", "/v1/sessions/s1/messages", {"role": "user", "content": "hi"}, 201),
            ("GET", "/v1/sessions/s1/history", None, 200),
            ("GET", "/health", None, 200),
            ("GET", "/nowhere", None, 404),
        ):
            reply = await app(method, target, body)
            assert (reply.status, reply.headers["x-seen"]) == (status, "321")
        # What is refused is refused by the outermost layer, which no middleware is around.
        assert "x-seen" not in (await app("GET", "/v1/sessions/a%2Fb")).headers


async def test_middleware_that_fails_is_answered_and_after_the_start_it_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing(app: ASGIApp) -> ASGIApp:
        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/health":
                await app(scope, receive, send)
            raise ValueError(SECRET)

        return wrapped

    async with opened(plugins=[plugin(middleware=lambda: [failing])]) as app:
        assert (await app("GET", "/v1/sessions")).slug == "internal-error"
        assert (await app("GET", "/health")).status == 200
    assert SECRET not in caplog.text


# --- authentication ---------------------------------------------------------------------------------------------------


def header(scope: Scope, name: bytes) -> bytes | None:
    return dict(scope["headers"]).get(name)


class Tokens:
    @hookimpl
    def agent_runtime_http_authenticate(self, scope: Scope) -> str | None:
        token = header(scope, b"authorization")
        if token == b"Bearer wrong":
            raise Unauthenticated("the token is wrong", challenge='Bearer error="invalid_token"')
        if token == b"Bearer banned":
            raise Forbidden("you are banned")
        if token == b"Bearer broken":
            raise ValueError(SECRET)
        return "ada" if token == b"Bearer good" else None

    @hookimpl
    def agent_runtime_http_routes(self) -> Sequence[BaseRoute]:
        async def who(request: Request) -> Response:
            return PlainTextResponse(str(request.scope["agent_runtime.principal"]))

        async def echo(socket: WebSocket) -> None:
            await socket.accept()
            await socket.send_text(str(socket.scope["agent_runtime.principal"]))
            await socket.close()

        return [Route("/who", who), WebSocketRoute("/socket", echo)]


class Cookies:
    @hookimpl
    def agent_runtime_http_authenticate(self, scope: Scope) -> str | None:
        return "bob" if header(scope, b"cookie") == b"bob" else None


async def test_who_may_come_in(caplog: pytest.LogCaptureFixture) -> None:
    async with opened(plugins=[Tokens(), Cookies()]) as app:
        for headers, status in (
            ({"authorization": "Bearer good"}, 200),
            ({"cookie": "bob"}, 200),
            ({}, 401),
            ({"authorization": "Bearer other"}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": "Bearer banned"}, 403),
            ({"authorization": "Bearer broken"}, 500),
        ):
            for method, target, body in (
                ("GET", "/v1/sessions", None),
                ("POST", "/v1/sessions/s1/messages", {"role": "user", "content": "hi"}),
                ("GET", "/nowhere", None),
                ("GET", "/who", None),
            ):
                reply = await app(method, target, body, headers=headers)
                expected = status if status != 200 or target in ("/v1/sessions", "/who") else 404
                assert (headers, target, reply.status) == (headers, target, expected)
            for target in ("/health", "/livez", "/readyz"):
                assert (await app("GET", target, headers=headers)).status == 200
        assert (await app("GET", "/who", headers={"authorization": "Bearer good"})).body == b"ada"
        assert (await app("GET", "/who", headers={"cookie": "bob"})).body == b"bob"
        assert (await app("GET", "/who")).headers["www-authenticate"] == "Bearer"
        wrong = await app("GET", "/who", headers={"authorization": "Bearer wrong"})
        assert (wrong.slug, wrong.headers["www-authenticate"]) == ("unauthenticated", 'Bearer error="invalid_token"')
    assert SECRET not in caplog.text


async def test_websockets_are_authenticated_as_well() -> None:
    async with opened(plugins=[Tokens()]) as app:

        async def connect(headers: list[tuple[bytes, bytes]]) -> list[Message]:
            sent: list[Message] = []

            async def receive() -> Message:
                return {"type": "websocket.connect"}

            async def send(message: Message) -> None:
                sent.append(message)

            scope = {
                "type": "websocket",
                "path": "/socket",
                "raw_path": b"/socket",
                "query_string": b"",
                "headers": headers,
            }
            await app.app(scope, receive, send)
            return sent

        accepted = await connect([(b"authorization", b"Bearer good")])
        assert [message["type"] for message in accepted] == ["websocket.accept", "websocket.send", "websocket.close"]
        assert accepted[1]["text"] == "ada"
        [refused] = await connect([])
        assert (refused["type"], refused["code"]) == ("websocket.close", 1008)


# --- in another application -------------------------------------------------------------------------------------------


def fastapi(app: Starlette) -> FastAPI:
    """A FastAPI application with ours in it."""

    @asynccontextmanager
    async def parents(_: FastAPI) -> AsyncIterator[None]:
        async with lifespan(app):
            yield

    parent = FastAPI(lifespan=parents)

    @parent.get("/own")
    async def own() -> dict[str, int]:
        runtime: Runtime = app.state.service.running()
        return {"sessions": len((await runtime.list_sessions()).items)}

    parent.mount("/agents", app)
    return parent


def starlette(app: Starlette) -> Starlette:
    """A Starlette application with ours in it."""

    async def own(_: Request) -> Response:
        runtime: Runtime = app.state.service.running()
        return JSONResponse({"sessions": len((await runtime.list_sessions()).items)})

    return Starlette(routes=[Route("/own", own), Mount("/agents", app)], lifespan=lambda _: lifespan(app))


@pytest.mark.parametrize("parent", [fastapi, starlette])
async def test_mounted_with_its_lifespan(parent: Callable[[Starlette], Starlette]) -> None:
    outer = parent(create_app("memory:"))
    inside = App(outer, root="/agents")
    assert (await inside("GET", "/readyz")).status == 503
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(outer.router.lifespan_context(outer))
        created = await inside("POST", "/v1/sessions", {"session_id": "s1"})
        assert created.headers["location"] == "/agents/v1/sessions/s1"
        assert (await inside("POST", "/v1/sessions/s1/messages", {"role": "user", "content": "hi"})).status == 201
        history = await inside("GET", "/v1/sessions/s1/history")
        assert history.json["messages"] == [{"role": "user", "content": "hi"}]
        assert (await App(outer)("GET", "/own")).json == {"sessions": 1}
        assert (await inside("GET", "/v1/sessions/a%2Fb")).slug == "invalid-input"
        assert (await inside("GET", "/nowhere")).slug == "not-found"
    assert (await inside("GET", "/readyz")).status == 503


async def test_middleware_of_who_embeds_it_is_around_all() -> None:
    app = create_app("memory:")
    app.add_middleware(lambda app: marking("outer")(app))
    async with lifespan(app):
        assert (await App(app)("PUT", "/v1/sessions/s1")).headers["x-seen"] == "outer"
        assert (await App(app)("GET", "/v1/sessions/a%2Fb")).headers["x-seen"] == "outer"


async def test_streams_are_told_when_the_runtime_closes() -> None:
    told = anyio.Event()

    class Streaming:
        @hookimpl
        def agent_runtime_http_routes(self) -> Sequence[BaseRoute]:
            async def stream(request: Request) -> Response:
                await stopping(request.scope).wait()
                told.set()
                return PlainTextResponse("bye")

            return [Route("/stream", stream)]

    app = create_app("memory:", plugins=[Streaming()])
    async with anyio.create_task_group() as tasks:
        async with lifespan(app):
            tasks.start_soon(App(app), "GET", "/stream")
            await anyio.wait_all_tasks_blocked()
            assert not told.is_set()
        with anyio.fail_after(5):
            await told.wait()


def test_a_configuration_that_is_wrong_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from agent_runtime import ConfigError

    monkeypatch.setenv("AGENT_RUNTIME__HTTP__PORT", "many")
    with pytest.raises(ConfigError, match="AGENT_RUNTIME__HTTP__PORT"):
        create_app()
    monkeypatch.setenv("AGENT_RUNTIME__HTTP__PORT", "80")
    config: Any = create_app().state.service.config
    assert config.http.port == 80
