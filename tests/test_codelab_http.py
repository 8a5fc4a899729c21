"""The HTTP API of the old service: each path with its shapes, the internal key, and no clash with what is new.

And the guide for its users, whose examples run.
"""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI, Request

from agent_runtime import Config, ConfigError, open_runtime
from agent_runtime.formats import ImportRequest
from agent_runtime.transfer import import_sessions
from agent_runtime_codelab.key import VARIABLES, internal_key
from agent_runtime_codelab.routes import old_routes
from agent_runtime_codelab.source import open_source
from agent_runtime_http import lifespan
from http_rig import App, Reply, opened, runtime_of, serving
from old_database import sample, sample_given

pytestmark = pytest.mark.anyio

KEY = "correct-horse"
TOKEN = "battery-staple-0123456789abcdefghij"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """The header that has the key, which is set."""
    monkeypatch.setenv(VARIABLES[0], KEY)
    return {"x-internal-auth": KEY}


@asynccontextmanager
async def with_sample(directory: Path) -> AsyncIterator[App]:
    """An application that has imported the sample."""
    old = sample("sqlite", directory)
    async with opened() as app:
        with open_source(ImportRequest(source=old.url)) as source:
            async with aclosing(source.entries) as entries:
                await import_sessions(runtime_of(app), entries, refused=pytest.fail)
        yield app


def is_time(text: str) -> bool:
    return datetime.fromisoformat(text).utcoffset() is not None


# --- shapes -----------------------------------------------------------------------------------------------------------


async def test_what_was_imported_is_told_as_before(tmp_path: Path) -> None:
    sessions = [given for given in sample_given() if not given["deleted"]]
    async with with_sample(tmp_path) as request:
        listed = (await request("GET", "/sessions")).json
        assert listed["total"] == len(sessions)
        assert [each["session_id"] for each in listed["sessions"]] == [given["session_id"] for given in sessions[::-1]]
        for given, told in zip(sessions[::-1], listed["sessions"], strict=True):
            context = given["agent_context"] or {
                "current_agent": "orchestrator",
                "agent_history": [],
                "switch_count": 0,
            }
            assert told | {"title": 0, "created_at": 0} == {
                "session_id": given["session_id"],
                "message_count": len(given["messages"]),
                "last_activity": given["last_activity"],
                "current_agent": context["current_agent"],
                "title": 0,
                "description": None,
                "created_at": 0,
            }
            assert is_time(told["created_at"])
            path = httpx.URL(f"/sessions/{given['session_id']}").raw_path.decode()
            current = (await request("GET", path.replace("/sessions", "/agents") + "/current")).json
            assert current == {
                "session_id": given["session_id"],
                "current_agent": context["current_agent"],
                "agent_history": context["agent_history"],
                "switch_count": context["switch_count"],
            }
            history = (await request("GET", f"{path}/history")).json
            assert history == {
                "session_id": given["session_id"],
                "messages": [
                    {name: value for name, value in message.items() if name != "metadata"}
                    for message in given["messages"]
                ],
                "message_count": len(given["messages"]),
                "last_activity": given["last_activity"],
                "current_agent": context["current_agent"],
                "agent_history": context["agent_history"],
            }
            pending = (await request("GET", f"{path}/pending-approvals")).json
            assert all(is_time(each.pop("created_at")) for each in pending["pending_approvals"])
            assert pending == {
                "session_id": given["session_id"],
                "pending_approvals": given["approvals"],
                "count": len(given["approvals"]),
            }


async def test_a_new_session_is_told_of_everywhere() -> None:
    async with opened() as request:
        created = await request("POST", "/sessions")
        assert created.status == 200
        assert set(created.json) == {"session_id", "message_count", "current_agent", "created_at"}
        assert (created.json["message_count"], created.json["current_agent"]) == (0, "orchestrator")
        assert is_time(created.json["created_at"])
        session_id = created.json["session_id"]
        path = f"/v1/sessions/{session_id}"
        assert (await request("POST", f"{path}/messages", {"role": "user", "content": "hi"})).status == 201
        assert (await request("POST", f"{path}/agent", {"agent": "coder", "reason": "code"})).status == 200
        session = await runtime_of(request).get_session(session_id)
        await session.request_approval("c1", "write_file", {"path": "a"}, reason="why")
        [listed] = (await request("GET", "/sessions")).json["sessions"]
        assert (listed["message_count"], listed["current_agent"], listed["title"]) == (1, "coder", "hi")
        history = (await request("GET", f"/sessions/{session_id}/history")).json
        assert history["messages"] == [{"role": "user", "content": "hi"}]
        [switch] = history["agent_history"]
        assert is_time(switch.pop("timestamp"))
        assert switch == {"from": "orchestrator", "to": "coder", "reason": "code"}
        assert (await request("GET", f"/sessions/{session_id}/pending-approvals")).json["count"] == 1


async def test_the_last_used_session_comes_first() -> None:
    async with opened() as request:
        ids = [(await request("POST", "/sessions")).json["session_id"] for _ in range(3)]

        async def listed() -> list[str]:
            return [each["session_id"] for each in (await request("GET", "/sessions")).json["sessions"]]

        assert await listed() == ids[::-1]
        await request("POST", f"/v1/sessions/{ids[1]}/messages", {"role": "user", "content": "hi"})
        assert await listed() == [ids[1], ids[2], ids[0]]


@pytest.mark.parametrize(
    "path",
    [
        "/agents/nobody/current",
        "/sessions/nobody/history",
        "/sessions/nobody/pending-approvals",
        "/sessions/../history",
    ],
)
async def test_a_session_that_is_not_there_is_an_error(path: str) -> None:
    async with opened() as request:
        reply = await checked(request, "GET", path)
        assert (reply.status, set(reply.json)) == (404, {"error"})


async def checked(app: App, method: str, path: str, headers: Mapping[str, str] = {}) -> Reply:
    """A request whose refusal is the old service's, which is no problem document."""
    check, app._check = app._check, lambda reply, *, is_head: None  # type: ignore[method-assign]
    try:
        return await app(method, path, headers=dict(headers))
    finally:
        app._check = check  # type: ignore[method-assign]


async def test_nothing_of_the_new_api_is_in_the_way() -> None:
    async with opened() as request:
        for method, path in (("DELETE", "/sessions"), ("POST", "/sessions/x/history")):
            reply = await request(method, path)
            assert (reply.status, reply.slug) == (405, "method-not-allowed")
        assert (await request("DELETE", "/sessions")).headers["allow"] == "GET, HEAD, POST"
        assert (await request("GET", "/sessions/x")).slug == "not-found"
        assert (await request("GET", "/v1/sessions")).json == {"items": [], "next": None}
        document = (await request("GET", "/openapi.json")).json
        assert document["paths"]["/sessions"]["post"]["operationId"] == "old_create_session"
        assert document["paths"]["/agents/{session_id}/current"]["get"]["operationId"] == "current_agent"


# --- the key ----------------------------------------------------------------------------------------------------------

OLD_PATHS = ["/sessions", "/agents/x/current", "/sessions/x/history", "/sessions/x/pending-approvals"]
UNAUTHORIZED = (401, {"detail": "unauthorized"})


@pytest.mark.parametrize("path", [*OLD_PATHS, "/v1/sessions", "/v1/status", "/nowhere"])
async def test_without_the_key_nothing_is_told(path: str, key: Mapping[str, str]) -> None:
    wrong: list[dict[str, str]] = [
        {},
        {"x-internal-auth": ""},
        {"x-internal-auth": KEY[:-1]},
        {"x-internal-auth": KEY + "x"},
        {"x-internal-auth": "\xff"},
        {"authorization": f"Bearer {KEY}"},
    ]
    async with opened() as app:
        for headers in wrong:
            reply = await checked(app, "GET", path, headers)
            assert reply.status == 401
            assert reply.headers["www-authenticate"] == "x-internal-auth"
            if path in OLD_PATHS:
                assert (reply.status, reply.json) == UNAUTHORIZED
            else:
                assert reply.slug == "unauthenticated"
        assert (await checked(app, "GET", path, key)).status in (200, 404)


async def test_a_session_is_not_created_without_the_key(key: Mapping[str, str]) -> None:
    async with opened() as app:
        reply = await checked(app, "POST", "/sessions")
        assert (reply.status, reply.json) == UNAUTHORIZED
        assert (await app("GET", "/sessions", headers=dict(key))).json == {"sessions": [], "total": 0}
        assert (await app("POST", "/sessions", headers=dict(key))).status == 200


async def test_health_is_told_to_anybody(key: Mapping[str, str]) -> None:
    async with opened() as app:
        for path in ("/health", "/livez", "/readyz"):
            assert (await app("GET", path)).status == 200


async def test_there_is_no_key_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES[0], "")
    assert internal_key() is None
    async with opened() as app:
        assert (await app("GET", "/sessions")).status == 200


def test_the_key_has_two_names() -> None:
    assert internal_key({VARIABLES[1]: KEY}) is not None
    assert internal_key({VARIABLES[0]: KEY, VARIABLES[1]: KEY}) is not None
    assert internal_key({VARIABLES[0]: KEY, VARIABLES[1]: ""}) is not None
    with pytest.raises(ConfigError, match="differs from AGENT_RUNTIME__INTERNAL_API_KEY") as caught:
        internal_key({VARIABLES[0]: KEY, VARIABLES[1]: "other"})
    assert KEY not in str(caught.value)


async def test_tokens_guard_what_is_new_and_open_what_is_old(key: Mapping[str, str]) -> None:
    token, unknown = {"authorization": f"Bearer {TOKEN}"}, {"authorization": "Bearer x"}
    async with opened(http={"tokens": [TOKEN]}) as app:
        assert (await app("GET", "/v1/sessions", headers=token)).status == 200
        for headers in ({}, unknown, dict(key)):
            assert (await app("GET", "/v1/sessions", headers=headers)).slug == "unauthenticated"
        assert (await app("GET", "/sessions", headers=dict(key))).status == 200
        assert (await app("GET", "/sessions", headers=dict(token))).status == 200
        assert (await app("GET", "/sessions", headers=unknown)).slug == "unauthenticated"
        reply = await checked(app, "GET", "/sessions")
        assert (reply.status, reply.json) == UNAUTHORIZED


async def test_without_a_key_tokens_guard_everything() -> None:
    async with opened(http={"tokens": [TOKEN]}) as app:
        assert (await app("GET", "/sessions")).slug == "unauthenticated"
        assert (await app("GET", "/sessions", headers={"authorization": f"Bearer {TOKEN}"})).status == 200


async def test_the_key_stands_nowhere(key: Mapping[str, str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with opened() as app:
        await checked(app, "GET", "/sessions", {"x-internal-auth": "wrong-key"})
        await app("GET", "/sessions", headers=dict(key))
        runtime = runtime_of(app)
        held = internal_key()
        for text in (caplog.text, repr(vars(held)), repr(runtime.config)):
            assert KEY not in text
            assert "wrong-key" not in text


async def test_without_the_http_plugin_the_rest_is_there() -> None:
    async with open_runtime(Config.of("memory:", plugins={"disabled": ["http"]})) as runtime:
        assert "codelab" in [each.name for each in runtime.plugins.describe()]


def test_served_for_clients_of_the_old_service(tmp_path: Path) -> None:
    """A process, as the old deployment starts it: by its variables."""
    environ = {
        "AGENT_RUNTIME__DB_URL": f"sqlite+aiosqlite:///{tmp_path}/agent_runtime.db",
        "AGENT_RUNTIME__INTERNAL_API_KEY": KEY,
    }
    with serving(environ=environ) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/sessions").json() == {"detail": "unauthorized"}
        headers = {"x-internal-auth": KEY}
        session_id = client.post("/sessions", headers=headers).json()["session_id"]
        history: dict[str, Any] = client.get(f"/sessions/{session_id}/history", headers=headers).json()
        assert (history["messages"], history["agent_history"]) == ([], [])
        assert KEY not in server.errors()


# --- the guide --------------------------------------------------------------------------------------------------------

GUIDE = (Path(__file__).parent.parent / "plugins" / "agent_runtime_codelab" / "README.md").read_text()
OLD_CALLS = {
    "session_manager": "exists get get_history all_sessions create get_or_create append_message append_tool_result delete",
    "agent_context_manager": "get_or_create get exists get_all_sessions get_session_count delete cleanup_old_sessions",
    "context": "switch_agent get_agent_history add_metadata get_metadata current_agent switch_count last_switch_at created_at",
}


def guide(kind: str) -> list[str]:
    """The blocks of Python that begin with this comment."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    return [block for block in blocks if block.startswith(f"# {kind}\n")]


def test_every_old_call_stands_in_the_guide() -> None:
    before = guide("before")
    for name, calls in OLD_CALLS.items():
        for call in calls.split():
            assert any(re.search(rf"\b{name}\.{call}\b", block) for block in before), (name, call)
    for block in before:
        compile(block, "before", "exec")


def test_what_the_guide_says_of_each_call_runs(tmp_path: Path, anyio_backend: str) -> None:
    names: dict[str, Any] = {"datetime": datetime, "UTC": UTC, "timedelta": timedelta}
    blocks = guide("after")
    assert len(blocks) == len(guide("before")) - 1
    for number, block in enumerate(blocks):
        exec(f"async def program_{number}(runtime):\n{textwrap.indent(block, '    ')}", names)

    async def run() -> None:
        async with open_runtime(f"sqlite:///{tmp_path}/sessions.db") as runtime:
            for number in range(len(blocks)):
                await names[f"program_{number}"](runtime)
            assert [record.session_id async for record in runtime.scan_sessions()] == ["s2", "s1"]

    anyio.run(run, backend=anyio_backend)


async def test_the_endpoint_of_the_guide_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [block] = guide("app")
    names: dict[str, Any] = {
        "Any": Any,
        "AsyncIterator": AsyncIterator,
        "FastAPI": FastAPI,
        "Request": Request,
        "asynccontextmanager": asynccontextmanager,
        "open_runtime": open_runtime,
    }
    exec(compile(block, "app", "exec", dont_inherit=True), names)
    app = names["app"]
    async with lifespan(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        for number in (1, 2):
            answer = await client.post("/say/s1", params={"text": "hello"})
            assert answer.json() == {"history": [{"role": "user", "content": "hello"}] * number}


def test_every_path_stands_in_the_guide() -> None:
    for route in old_routes():
        assert route.path.replace("session_id", "id") in GUIDE
