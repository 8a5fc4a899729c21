"""Nothing of what is said in sessions, and no secret, comes out anywhere but in the answers that are to have it.

A server at DEBUG, on a real database, is sent canaries in every place of every request, good and bad; plugins raise what
they were given, the database refuses rows and says which. Then all that was logged, and every refusal, is searched.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from agent_runtime_http.application import OPERATIONS
from agent_runtime_http.operations import takes_key
from http_rig import Server, install, run, serving
from postgres_server import migrated_schema, server, url_of

CANARY = "c4n4ry"
TOKEN = f"{CANARY}-token"
S1 = "/v1/sessions/s1"

PLUGIN = '''
"""Raises what it is given."""

from starlette.responses import StreamingResponse
from starlette.routing import Route

from agent_runtime import InvalidInput, hookimpl


async def boom(request):
    raise KeyError((await request.body()).decode())


async def groups(request):
    text = (await request.body()).decode()
    try:
        raise ValueError(text)
    except ValueError:
        raise ExceptionGroup(text, [OSError(text), RuntimeError(text)])


async def half(request):
    text = (await request.body()).decode()

    async def parts():
        yield b"half"
        raise ValueError(text)

    return StreamingResponse(parts())


def meddling(app):
    async def wrapped(scope, receive, send):
        for name, value in scope["headers"]:
            if name == b"x-boom":
                raise ValueError(value.decode())
        await app(scope, receive, send)

    return wrapped


@hookimpl
def agent_runtime_http_routes():
    return [Route(f"/{each.__name__}", each, methods=["POST"]) for each in (boom, groups, half)]


@hookimpl
def agent_runtime_http_middleware():
    return [meddling]


@hookimpl
def agent_runtime_http_authenticate(scope):
    for name, value in scope["headers"]:
        if name == b"authorization" and value.endswith(b"boom"):
            raise ValueError(value.decode())


@hookimpl
def agent_runtime_before_append(message):
    if "boom" in str(message.content):
        raise ValueError(message.content)
    if "rude" in str(message.content):
        raise InvalidInput("content", "is too rude")


@hookimpl
def agent_runtime_flush_failed(batch, error, attempt):
    raise ValueError(repr(batch))


@hookimpl
def agent_runtime_change_quarantined(change, error):
    raise ValueError(repr(change))
'''


def told(place: str) -> dict[str, Any]:
    """Metadata with canaries at its ends."""
    return {"a": {"b": [f"{CANARY} in {place}"]}}


MESSAGE = {
    "role": "assistant",
    "content": f"{CANARY} content",
    "name": f"{CANARY}-name",
    "tool_calls": [{"id": "c", "function": {"name": f"{CANARY}-call", "arguments": f'{{"x": "{CANARY}"}}'}}],
    "metadata": told("a message"),
    "refusal": f"{CANARY} refusal",
}
SESSION = {
    "title": f"{CANARY} title",
    "description": f"{CANARY} description",
    "system_prompt": f"{CANARY} prompt",
    "metadata": told("a session"),
}
BODIES: dict[str, Any] = {
    "POST /v1/sessions": SESSION,
    "PUT /v1/sessions/{session_id}": SESSION,
    "PATCH /v1/sessions/{session_id}": {"title": f"{CANARY} title", "metadata": told("a patch")},
    "POST /v1/sessions/{session_id}/messages": MESSAGE,
    "POST /v1/sessions/{session_id}/messages/batch": {"messages": [MESSAGE, MESSAGE]},
    "POST /v1/sessions/{session_id}/tool-results": {"call_id": "c", "tool_name": "f", "result": told("a result")},
    "PATCH /v1/sessions/{session_id}/context": {"metadata": told("a context")},
    "POST /v1/sessions/{session_id}/agent": {"agent": "coder", "reason": f"{CANARY} reason"},
    "PUT /v1/sessions/{session_id}/documents/{collection}/{key}": told("a document"),
}
WRONG = [f"{CANARY}\0", [f"{CANARY}", 5], {"a": f"{CANARY}\ud800"}, {"role": CANARY}, [{"role": [CANARY]}], 1e400]
DELETION = ("DELETE", S1)


def requests() -> Iterator[tuple[str, str, bytes, dict[str, str]]]:
    """Each operation as it should be, then in many ways that it should not."""
    typed = {"content-type": "application/json"}
    for path, operations in OPERATIONS.items():
        target = path.format(session_id="s1", seq=1, collection="c", key="k", approval_id="a")
        for method, operation in operations.items():
            name = f"{method} {path}"
            body = BODIES.get(name, {})
            data = json.dumps(body).encode()
            key = {"idempotency-key": f"{CANARY}-{name.replace(' ', '')}"} if takes_key(method, operation) else {}
            yield method, target, data, typed | key
            yield method, target, json.dumps({"role": "user"}).encode(), typed | key
            yield method, target, data, typed | {"idempotency-key": f'"{CANARY}'}
            yield method, target, data, typed | {"authorization": f"Bearer {CANARY}-wrong"}
            yield method, target, data, typed | {"authorization": f"Bearer {CANARY}-boom"}
            yield method, target, data, typed | {"x-boom": CANARY}
            yield method, target, data, typed | {"origin": f"https://{CANARY}"}
            yield method, target, data[:-1], typed
            yield method, target, data + b'"\xff"', typed
            yield method, target, data + b" " * 100_000, typed
            yield method, target, data, {"content-type": f"text/{CANARY}"}
            yield method, f"{target}?limit={CANARY}&cursor={CANARY}&after={CANARY}", data, typed
            for member in body:
                for wrong in WRONG:
                    yield method, target, json.dumps(body | {member: wrong}).encode(), typed
    yield "PUT", f"{S1}/documents/c/bytes", CANARY.encode(), {"content-type": "text/plain"}
    for content in ("boom", "rude"):
        yield "POST", f"{S1}/messages", json.dumps({"role": "user", "content": CANARY + content}).encode(), typed
    for name in ("boom", "groups", "half"):
        yield "POST", f"/{name}", CANARY.encode(), {}


class Searched:
    """A client that searches every refusal."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=20)
        self.statuses: dict[int, int] = {}

    def __enter__(self) -> Searched:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def __call__(self, method: str, target: str, body: bytes | dict[str, Any], headers: Mapping[str, str] = {}) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = headers if isinstance(body, bytes) else {"content-type": "application/json"}
        try:
            reply = self._client.request(method, target, content=data, headers=given)
        except httpx.RemoteProtocolError:  # it broke off in the middle
            assert target == "/half"
            return None
        self.statuses[reply.status_code] = self.statuses.get(reply.status_code, 0) + 1
        if reply.status_code >= 400:
            problem = reply.json()
            problem.pop("outcome", None)  # what the answer would have been: whoever asks sent it
            # A conflict names its key, to whom has sent it.
            shown = json.dumps(problem).replace(headers.get("idempotency-key", "\0"), "")
            assert CANARY not in shown + str(reply.headers), (method, target, data[:500])
        return reply

    def all_of_it(self) -> None:
        self("PUT", S1, b"")
        for method, target, body, headers in requests():
            self(method, target, body, headers)
            if (method, target) == DELETION:
                self("PUT", S1, b"")
        for status in (200, 201, 400, 401, 403, 404, 409, 413, 415, 422, 500):
            assert self.statuses.get(status), status
        self("PUT", "/v1/sessions/s2", {})
        assert self("POST", "/v1/flush", b"").status_code == 200

    def poison(self) -> None:
        """A message that the database refuses."""
        reply = self(
            "POST", "/v1/sessions/s2/messages?durability=stored", {"role": "user", "content": f"{CANARY} poison"}
        )
        assert (reply.status_code, reply.json()["type"].split(":")[-1]) == (409, "quarantined")
        assert CANARY not in self("GET", "/v1/status", b"").text
        assert self("POST", "/v1/sessions/s2/messages", {"role": "user", "content": CANARY}).status_code == 409


def search(server: Server, *, failed: int = 50) -> None:
    """Look through all that a server has said, which has told of so many failures at least."""
    said = server.errors() + "\n".join(server.output)
    assert said.count("a request failed: ") >= failed
    hashed = hashlib.sha256(TOKEN.encode()).hexdigest()
    lines = [line for line in said.splitlines() if CANARY in line.lower() or hashed in line]
    assert lines == []


def environment(tmp_path: Path, log_format: str) -> dict[str, str]:
    return {
        "PYTHONPATH": install(tmp_path / "raising", "raising", PLUGIN),
        "AGENT_RUNTIME__HTTP__TOKENS": json.dumps([TOKEN]),
        "AGENT_RUNTIME__HTTP__BODY_BYTES_MAX": "50000",
        "AGENT_RUNTIME__LOGGING__LEVEL": "DEBUG",
        "AGENT_RUNTIME__LOGGING__FORMAT": log_format,
        "AGENT_RUNTIME__WRITE_BEHIND__INTERVAL_S": "0.2",
        "AGENT_RUNTIME__PLUGINS__CONFIG__HTTP__API_KEY": CANARY,
    }


def test_on_sqlite(tmp_path: Path) -> None:
    """A row is in the way of one that is to be stored."""
    database = tmp_path / "sessions.db"
    environ = environment(tmp_path, "text")
    with serving("--storage", f"sqlite:///{database}", environ=environ) as server:
        with Searched(server.url) as client:
            client.all_of_it()
            with closing(sqlite3.connect(database)) as connection, connection:
                connection.execute(
                    "INSERT INTO messages (incarnation, seq, id, role, created_at) "
                    "SELECT incarnation, 1, 'in the way', 'user', created_at FROM sessions WHERE session_id = 's2'"
                )
            client.poison()
        server.signal(signal.SIGTERM)
        server.ended()
        search(server)


def test_on_postgresql_with_a_password_a_kill_and_a_recovery(tmp_path: Path) -> None:
    """A check fails, of which PostgreSQL says: "Failing row contains (…)"."""
    schema = migrated_schema()
    parts = urlsplit(url_of(schema))
    if parts.password is None:  # then any will do
        parts = parts._replace(netloc=f"{parts.username}:{CANARY}@{parts.hostname}:{parts.port}")
    url = urlunsplit(parts)
    environ = environment(tmp_path, "json") | {"AGENT_RUNTIME__JOURNAL__DIRECTORY": str(tmp_path / "journal")}
    with serving("--storage", url, environ=environ) as first:
        with Searched(first.url) as client:
            client.all_of_it()
            server().execute(
                "ALTER TABLE messages ADD CONSTRAINT harmless CHECK (content NOT LIKE '%poison%') NOT VALID",
                schema=schema,
            )
            client.poison()
            assert client("POST", f"{S1}/messages", {"role": "user", "content": CANARY}).status_code == 201
        first.signal(signal.SIGKILL)
        first.ended()
        search(first)
    with serving("--storage", url, environ=environ) as second:
        with Searched(second.url) as client:
            client("GET", S1, b"")
        second.signal(signal.SIGTERM)
        second.ended()
        search(second, failed=0)
        assert "recovered" in second.errors()
    away = run("sessions", "list", "--storage", f"postgresql://ada:{CANARY}@127.0.0.1:1/x", environ=environ)
    assert away.returncode == 1
    assert CANARY not in away.stdout + away.stderr
