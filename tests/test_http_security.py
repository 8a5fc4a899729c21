"""Who may come in: tokens, pages of other sites, names of other hosts; and what is held and said of them."""

from __future__ import annotations

import hashlib
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from agent_runtime import Config, ConfigError, InvalidInput, hookimpl
from agent_runtime_http import create_app
from agent_runtime_http.application import OPERATIONS
from agent_runtime_http.client import authorization
from agent_runtime_http.commands import token
from agent_runtime_http.guard import is_local
from agent_runtime_http.serve import _only_name
from http_rig import App, opened, run, runtime_of, serving

pytestmark = pytest.mark.anyio

S1 = "/v1/sessions/s1"
TOKEN = "correct-horse~battery/staple+1=="
OTHER = "an0ther.token"
PUBLIC = ("/health", "/livez", "/readyz")


def bearer(token: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"authorization": f"{scheme} {token}"}


def digest(token: str) -> str:
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [TOKEN, digest(TOKEN)])
async def test_who_has_a_token_comes_in_everywhere_and_who_has_none_nowhere(kept: str) -> None:
    async with opened(http={"tokens": [OTHER, kept]}) as app:
        for token in (TOKEN, OTHER):
            assert (await app("PUT", S1, headers=bearer(token))).status in (200, 201)
            assert (await app("GET", S1, headers=bearer(token, "bEARER"))).status == 200
        accepted = runtime_of(app).watermarks.accepted
        for path, operations in OPERATIONS.items():
            target = path.format(session_id="s1", seq=1, collection="c", key="k")
            for method in (*operations, "OPTIONS"):
                for headers in ({}, bearer("wrong"), bearer(TOKEN[:-1]), bearer(kept[:-1]), bearer(TOKEN, "Basic")):
                    reply = await app(method, target, headers=headers)
                    if path in PUBLIC:
                        assert reply.status in (200, 204)
                        continue
                    assert (method, target, reply.status) == (method, target, 401)
                    challenge = 'Bearer error="invalid_token"' if headers else "Bearer"
                    assert reply.headers["www-authenticate"] == challenge
        for target in ("/metrics", "/nowhere", "/v1/sessions//x"):
            assert (await app("GET", target)).status == 401
            assert (await app("GET", target, headers=bearer(TOKEN))).status in (200, 404, 422)
        assert runtime_of(app).watermarks.accepted == accepted


async def test_a_hash_is_no_token_and_two_tokens_are_none() -> None:
    async with opened(http={"tokens": [TOKEN]}) as app:
        for headers in (bearer(digest(TOKEN)), bearer(digest(TOKEN).removeprefix("sha256:")), bearer("")):
            assert (await app("GET", "/v1/sessions", headers=headers)).status == 401
        scope: Any = {"headers": [(b"authorization", f"Bearer {TOKEN}".encode())] * 2}
        tokens = app.app.state.service.tokens  # type: ignore[attr-defined]
        assert tokens.admit(scope) is None
        assert tokens.admit({"headers": scope["headers"][:1]}) == f"token:{digest(TOKEN)[7:19]}"


async def test_before_the_runtime_is_open_tokens_are_asked_for_as_well() -> None:
    app = App(create_app("memory:"))
    assert (await app("GET", "/v1/status")).status == 503
    app = App(create_app(Config.of("memory:", http={"tokens": [TOKEN]})))
    assert (await app("GET", "/v1/status")).status == 401
    assert (await app("GET", "/v1/status", headers=bearer(TOKEN))).status == 503


class Cookies:
    @hookimpl
    def agent_runtime_http_authenticate(self, scope: Any) -> str | None:
        return "bob" if (b"cookie", b"bob") in scope["headers"] else None

    @hookimpl
    def agent_runtime_http_routes(self) -> list[Route]:
        async def who(request: Request) -> Response:
            return PlainTextResponse(str(request.scope["agent_runtime.principal"]))

        return [Route("/who", who)]


async def test_plugins_are_asked_about_who_has_no_token() -> None:
    async with opened(plugins=[Cookies()], http={"tokens": [TOKEN]}) as app:
        assert (await app("GET", "/who", headers=bearer(TOKEN))).body == f"token:{digest(TOKEN)[7:19]}".encode()
        assert (await app("GET", "/who", headers={"cookie": "bob"})).body == b"bob"
        assert (await app("GET", "/who", headers={"cookie": "bob"} | bearer("wrong"))).body == b"bob"
        assert (await app("GET", "/who")).status == (await app("GET", "/who", headers=bearer("wrong"))).status == 401


async def test_no_token_is_held(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(OTHER)
    async with opened(http={"tokens": [TOKEN], "tokens_file": str(path)}) as app:
        service = app.app.state.service  # type: ignore[attr-defined]
        assert (await app("GET", "/v1/sessions", headers=bearer(OTHER))).status == 200
        held = repr(vars(service.tokens)) + repr(service.config.http.tokens)
        assert (digest(TOKEN) in held, digest(OTHER) in held, TOKEN in held, OTHER in held) == (
            True,
            True,
            False,
            False,
        )


# --- the file ---------------------------------------------------------------------------------------------------------


def refusal(path: Path, text: bytes) -> str:
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        create_app(Config.of("memory:", http={"tokens_file": str(path)}))
    [line] = caught.value.problems
    return line.replace(str(path), "FILE")


def test_a_file_of_tokens_that_can_not_be_used(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    assert refusal(path, b"# one\n\nhunter 2\n").startswith("http.tokens_file: FILE:3: must be a token (")
    assert refusal(path, b"good\r\nhunter2\xff\r\n").startswith("http.tokens_file: FILE:2: must be a token (")
    assert refusal(path, b"sha256:hunter2").startswith("http.tokens_file: FILE:1: must have 64 hexadecimal digits")
    for text in (b"", b"\n# nothing\n   \n"):
        assert refusal(path, text) == "http.tokens_file: FILE holds no token; put one a line, or unset the key"
    missing = tmp_path / "missing"
    with pytest.raises(ConfigError, match=f"^http.tokens_file: {missing} can't be read: No such file or directory$"):
        create_app(Config.of("memory:", http={"tokens_file": str(missing)}))


async def test_a_file_of_tokens_may_be_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# ours\n{TOKEN}  # ada's\r\n\n\t{digest(OTHER)}\n")

    async with opened(http={"tokens_file": str(path), "tokens": ["always"]}) as app:

        async def let_in() -> list[str]:
            given = {"TOKEN": TOKEN, "OTHER": OTHER, "always": "always", "new": "new"}
            statuses = {
                name: (await app("GET", "/v1/status", headers=bearer(each))).status for name, each in given.items()
            }
            assert set(statuses.values()) <= {200, 401}
            return [name for name, status in statuses.items() if status == 200]

        tokens = app.app.state.service.tokens  # type: ignore[attr-defined]
        assert await let_in() == ["TOKEN", "OTHER", "always"]
        path.write_text("new\n")
        assert await let_in() == ["TOKEN", "OTHER", "always"]
        caplog.set_level("INFO")
        tokens.reload()
        assert await let_in() == ["always", "new"]
        assert caplog.messages == [f"read 1 token(s) from {path} again"]
        for broken in (b"good\nhunter2 x", b"", b"\xff\xfe"):
            caplog.clear()
            path.write_bytes(broken)
            tokens.reload()
            assert await let_in() == ["always", "new"]
            [line] = caplog.messages
            assert line.startswith(f"http.tokens_file: {path}")
            assert line.endswith("; the tokens stay as they were")
            assert "hunter2" not in line
        path.unlink()
        tokens.reload()
        assert await let_in() == ["always", "new"]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_server_beyond_this_machine_with_tokens_and_a_command_that_has_one(tmp_path: Path) -> None:
    """Made by the command, put into a file, sent by a command, taken away with SIGHUP."""
    made = run("token")
    given, entry = made.stdout.splitlines()
    assert (made.returncode, made.stderr, entry) == (0, "", digest(given))
    path = tmp_path / "tokens"
    path.write_text(f"{entry}\n")
    storage = ("--storage", f"sqlite:///{tmp_path / 'sessions.db'}")
    environ = {"AGENT_RUNTIME__HTTP__TOKENS_FILE": str(path)}
    with serving(*storage, "--host", "0.0.0.0", environ=environ) as server:
        url = f"http://127.0.0.1:{server.port}"

        def status(sent: str) -> int:
            return httpx.get(f"{url}/v1/sessions", headers=bearer(sent) | {"host": "any.example"}).status_code

        assert (status(given), status("wrong")) == (200, 401)
        listing = ("sessions", "list", "--server", url)
        assert run(*listing, environ={"AGENT_RUNTIME_TOKEN": given}).returncode == 0
        refused = run(*listing, environ={"AGENT_RUNTIME_TOKEN": "wrong"})
        expected = f"agent-runtime: {url} answers 401: the token is not known here; set AGENT_RUNTIME_TOKEN\n"
        assert (refused.returncode, refused.stderr) == (1, expected)
        path.write_text("broken token\n")
        server.signal(signal.SIGHUP)
        until(lambda: f"{path}:1: must be a token" in server.errors())
        assert (status(given), status("other")) == (200, 401)
        path.write_text("other\n")
        server.signal(signal.SIGHUP)
        until(lambda: status("other") == 200)
        assert status(given) == 401
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
        assert given not in server.errors()


def test_what_a_command_sends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("AGENT_RUNTIME_TOKEN", raising=False)
    assert authorization() == {}
    monkeypatch.setenv("AGENT_RUNTIME_TOKEN", TOKEN)
    assert authorization() == {"Authorization": f"Bearer {TOKEN}"}
    for wrong in ("hunter2\r\nhost: x", "hunter2\n", "hünter2"):
        monkeypatch.setenv("AGENT_RUNTIME_TOKEN", wrong)
        with pytest.raises(InvalidInput, match=r"^AGENT_RUNTIME_TOKEN: holds no token") as caught:
            authorization()
        assert "nter2" not in str(caught.value)
    made = set()
    for _ in range(100):
        token()
        given, entry = capsys.readouterr().out.splitlines()
        assert (len(given), entry) == (43, digest(given))
        made.add(given)
    assert len(made) == 100


# --- pages of other sites ---------------------------------------------------------------------------------------------

OWN = [
    {},
    {"origin": "http://testserver:1", "host": "testserver:1"},
    {"origin": "https://TESTSERVER", "host": "testserver"},
    {"origin": "http://127.0.0.1:8001", "sec-fetch-site": "same-origin", "host": "behind.a.proxy"},
    {"sec-fetch-site": "none"},
    {"origin": "https://console.example", "sec-fetch-site": "cross-site"},
    {"origin": "https://CONSOLE.example"},
]
FOREIGN = [
    {"origin": "https://evil.example", "host": "testserver"},
    {"origin": "null", "host": "testserver"},
    {"origin": "http://testserver:2", "host": "testserver:1"},
    {"origin": "http://testserver", "sec-fetch-site": "cross-site", "host": "testserver"},
    {"origin": "http://testserver", "sec-fetch-site": "same-site", "host": "testserver"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "whatever"},
    {"origin": "https://evil.console.example"},
    {"origin": "https://console.example.evil"},
]


async def test_pages_of_other_sites_may_not_write() -> None:
    async with opened(http={"origins": ["https://Console.example"]}) as app:
        for headers in OWN:
            assert (headers, (await app("PUT", S1, headers=headers)).status) in [(headers, 200), (headers, 201)]
        await app("POST", f"{S1}/messages", {"role": "user", "content": "hi"})
        accepted = runtime_of(app).watermarks.accepted
        for headers in FOREIGN:
            for path, operations in OPERATIONS.items():
                target = path.format(session_id="s1", seq=1, collection="c", key="k")
                for method in {*operations, "DELETE"} - {"GET"}:
                    reply = await app(method, target, headers=headers)
                    if path not in PUBLIC:
                        assert (method, target, reply.status, reply.slug) == (method, target, 403, "cross-origin")
            assert (await app("GET", S1, headers=headers)).status == 200  # which the page can't read
            assert (await app("OPTIONS", S1, headers=headers)).status == 204
        assert runtime_of(app).watermarks.accepted == accepted


async def test_pages_of_other_sites_may_not_open_a_websocket() -> None:
    async with opened() as app:

        async def connect(*headers: tuple[bytes, bytes]) -> int:
            sent: list[Any] = []

            async def receive() -> Any:
                return {"type": "websocket.connect"}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "websocket", "path": "/x", "raw_path": b"/x", "query_string": b"", "headers": [*headers]}
            await app.app(scope, receive, send)
            code: int = sent[0]["code"]
            return code

        host = (b"host", b"here:1")
        assert await connect(host, (b"origin", b"http://here:1")) == 1000  # no route there
        assert await connect(host, (b"origin", b"http://evil.example")) == 1008


# --- names of other hosts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST:80", True),
        ("a.localhost:80", True),
        ("127.0.0.1:8001", True),
        ("127.9.9.9", True),
        ("[::1]:8001", True),
        ("[::1]", True),
        ("box:8001", True),
        ("evil.example", False),
        ("evil.example:8001", False),
        ("localhost.evil.example", False),
        ("evil-localhost", False),
        ("127.0.0.1.evil.example", False),
        ("10.0.0.1:8001", False),
        ("", False),
        (":8001", False),
    ],
)
def test_names_of_this_machine(host: str, expected: bool) -> None:
    assert is_local(host.encode("latin-1"), "Box") == expected


def test_a_server_of_this_machine_answers_to_its_names_only(tmp_path: Path) -> None:
    """As a page does whose host name was made to mean 127.0.0.1."""
    storage = ("--storage", f"sqlite:///{tmp_path / 'sessions.db'}")

    def status(port: int, host: str, path: str) -> int:
        return httpx.get(f"http://127.0.0.1:{port}{path}", headers={"host": host}).status_code

    with serving(*storage, "--host", "localhost") as server:
        for path, expected in (("/v1/sessions", 421), ("/v1/sessions/s1/history", 421), ("/readyz", 200)):
            assert status(server.port, f"evil.example:{server.port}", path) == expected
        assert status(server.port, f"localhost:{server.port}", "/v1/sessions") == 200


@pytest.mark.parametrize(
    ("address", "insecure", "asks", "name"),
    [
        ("127.0.0.1", False, False, "box"),
        ("::1", False, False, "box"),
        ("127.0.0.1", True, False, None),
        ("127.0.0.1", False, True, None),
        ("0.0.0.0", True, False, None),
    ],
)
def test_where_any_name_will_do(address: str, insecure: bool, asks: bool, name: str | None) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        config = Config.of("memory:", http={"host": "box", "insecure": insecure})
        assert _only_name(config, listener, asks=asks) == name
