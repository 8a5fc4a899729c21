"""`Idempotency-Key`: a write that is sent again is answered as it was at first, and has its effect once."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_runtime.storage import StorageConfig
from agent_runtime.testing import Faults, faulty_plugin
from agent_runtime_http.application import OPERATIONS
from agent_runtime_http.keys import HEADER, read_key
from agent_runtime_http.operations import takes_key
from agent_runtime_http.problems import Refusal
from agent_runtime_memory import MemoryDatabase
from http_rig import App, Reply, free_port, opened, runtime_of, serving

pytestmark = pytest.mark.anyio

S1 = "/v1/sessions/s1"
MESSAGE = {"role": "user", "content": "hi"}
HAIRY = {"z": 1.0, "a": [1e300, 123456789012345678901234567890, None, {"ü": "\u2028"}], "m": -0.0}

WRITES: dict[str, tuple[str, str, Any, Any]] = {
    "POST /v1/sessions": ("POST", "/v1/sessions", {"system_prompt": "hi", "metadata": HAIRY}, {"system_prompt": "ho"}),
    "PATCH /v1/sessions/{session_id}": ("PATCH", S1, {"title": "x", "metadata": HAIRY}, {"title": "y"}),
    "POST /v1/sessions/{session_id}/messages": (
        "POST",
        f"{S1}/messages",
        MESSAGE | {"refusal": "no", "metadata": HAIRY},
        MESSAGE | {"refusal": "yes", "metadata": HAIRY},
    ),
    "POST /v1/sessions/{session_id}/messages/batch": (
        "POST",
        f"{S1}/messages/batch",
        {"messages": [MESSAGE, MESSAGE | {"x": HAIRY}]},
        {"messages": [MESSAGE]},
    ),
    "POST /v1/sessions/{session_id}/messages/pop": ("POST", f"{S1}/messages/pop", None, None),
    "POST /v1/sessions/{session_id}/tool-results": (
        "POST",
        f"{S1}/tool-results",
        {"call_id": "c", "tool_name": "f", "result": HAIRY},
        {"call_id": "c", "tool_name": "g", "result": HAIRY},
    ),
    "PATCH /v1/sessions/{session_id}/context": (
        "PATCH",
        f"{S1}/context",
        {"metadata": HAIRY},
        {"metadata": {"a": 1}},
    ),
    "POST /v1/sessions/{session_id}/agent": ("POST", f"{S1}/agent", {"agent": "coder"}, {"agent": "writer"}),
}


def test_every_post_and_patch_that_writes_takes_a_key() -> None:
    keyed = {
        f"{method} {path}"
        for path, operations in OPERATIONS.items()
        for method, operation in operations.items()
        if takes_key(method, operation)
    }
    assert keyed == WRITES.keys()
    posts = {f"POST {path}" for path, operations in OPERATIONS.items() if "POST" in operations}
    assert posts - keyed == {"POST /v1/flush", "POST /v1/purge"}


def same(first: Reply, again: Reply) -> bool:
    return (first.status, first.headers, first.body) == (again.status, again.headers, again.body)


async def all_there_is(app: App) -> list[bytes]:
    paths = ["/v1/sessions", S1, f"{S1}/context", f"{S1}/messages", f"{S1}/history"]
    return [(await app("GET", path)).body for path in paths]


async def test_what_is_sent_again_is_answered_as_at_first(tmp_path: Path) -> None:
    """Each write at once, after all the others, and after a restart; another body or another route is a conflict."""
    storage = f"sqlite:///{tmp_path / 'sessions.db'}"
    first: dict[str, Reply] = {}
    async with opened(storage) as app:
        await app("PUT", S1)
        for message in range(3):
            await app("POST", f"{S1}/messages", {"role": "user", "content": str(message)})
        for name, (method, target, body, _) in WRITES.items():
            first[name] = await app(method, target, body, headers={HEADER: f'"{name}"'})
            assert first[name].status < 300
            assert same(first[name], await app(method, target, body, headers={HEADER: f'"{name}"'}))
        assert first["POST /v1/sessions"].headers["location"].startswith("/v1/sessions/")
        made = first["POST /v1/sessions"].headers["location"]
        await app("POST", f"{made}/messages", MESSAGE)
        await app("DELETE", made)
    for durability in ("", "?durability=stored"):
        async with opened(storage) as app:
            before = await all_there_is(app), runtime_of(app).watermarks.accepted
            for name, (method, target, body, other) in WRITES.items():
                key = {HEADER: f'"{name}"'}
                assert same(first[name], await app(method, target + durability, body, headers=key))
                conflicts = [] if other is None else [(method, target, other)]
                for route, (another, place, whole, _) in WRITES.items():
                    if route != name and (place == "/v1/sessions") == (target == "/v1/sessions"):
                        conflicts.append((another, place, whole))
                for request in conflicts:
                    conflict = await app(*request, headers=key)
                    assert (request, conflict.status, conflict.slug) == (request, 409, "idempotency-conflict")
            assert (await all_there_is(app), runtime_of(app).watermarks.accepted) == before


async def test_a_pop_that_found_nothing_finds_nothing_again() -> None:
    async with opened() as app:
        await app("PUT", S1)
        for _ in range(2):
            assert (await app("POST", f"{S1}/messages/pop", headers={HEADER: "k"})).slug == "message-not-found"
            await app("POST", f"{S1}/messages", MESSAGE)
        assert len((await app("GET", f"{S1}/messages")).json["items"]) == 2


async def test_a_refusal_is_not_kept() -> None:
    async with opened() as app:
        key = {HEADER: "k"}
        assert (await app("POST", f"{S1}/messages", MESSAGE, headers=key)).slug == "session-not-found"
        await app("PUT", S1)
        assert (await app("POST", f"{S1}/messages", {"role": "robot"}, headers=key)).slug == "invalid-input"
        assert (await app("POST", f"{S1}/messages", MESSAGE, headers=key)).status == 201
        taken = {"session_id": "s1"}
        assert (await app("POST", "/v1/sessions", taken, headers=key)).slug == "session-exists"
        await app("DELETE", S1)
        assert (await app("POST", f"{S1}/messages", MESSAGE, headers=key)).slug == "session-not-found"
        for _ in range(2):
            assert (await app("POST", "/v1/sessions", taken, headers=key)).status == 201
        assert (await app("POST", f"{S1}/messages", MESSAGE, headers=key)).json["seq"] == 1


async def test_a_504_with_a_key_may_be_sent_again() -> None:
    faults = Faults()
    plugin = faulty_plugin(lambda _: MemoryDatabase().open(StorageConfig(url="memory:")), faults)
    waits = {"durability_timeout_s": 0.05, "interval_s": 0.01}
    async with opened("faulty:memory:", plugins=[plugin], write_behind=waits) as app:
        gate = faults.hold("apply")
        for path, body in (("/v1/sessions", {"session_id": "s1"}), (f"{S1}/messages", MESSAGE)):
            late = await app("POST", f"{path}?durability=stored", body, headers={HEADER: "k"})
            assert (late.status, late.json["applied"]) == (504, True)
            again = await app("POST", f"{path}?durability=stored", body, headers={HEADER: "k"})
            assert (again.status, again.json["outcome"]) == (504, late.json["outcome"])
        accepted = runtime_of(app).watermarks.accepted
        gate.open()
        await runtime_of(app).flush()
        reached = await app("POST", f"{S1}/messages?durability=stored", MESSAGE, headers={HEADER: "k"})
        assert (reached.status, reached.json) == (201, late.json["outcome"])
        assert runtime_of(app).watermarks.accepted == accepted == 2


# --- the header -------------------------------------------------------------------------------------------------------


def read(*values: bytes) -> str | None:
    return read_key({"headers": [(b"host", b"x"), *((b"idempotency-key", value) for value in values)]})


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=255))
def test_any_string_is_read_as_it_was_meant(key: str) -> None:
    quoted = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    for value in (quoted, f" {quoted}\t", f"{quoted};a=1", f"{quoted} ; b"):
        assert read(value.encode()) == key
    if not set(key) & set('",;\\ '):
        assert read(key.encode()) == key


@given(st.binary(max_size=40))
def test_whatever_is_sent_is_read_or_refused(value: bytes) -> None:
    try:
        key = read(value)
    except Refusal as refusal:
        assert refusal.kind.status in (400, 422)
        assert [fault.pointer for fault in refusal.errors] == [HEADER]
    else:
        assert key
        assert key.isascii()
        assert key.isprintable()


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ([b'"a'], 400),
        ([b'a"'], 400),
        ([b'"a"b"'], 400),
        ([b'"a\\x"'], 400),
        ([b'"a" "b"'], 400),
        ([b"a b"], 400),
        ([b"a, b"], 400),
        ([b"a;b"], 400),
        ([b"\xc3\xbc"], 400),
        ([b'"\xc3\xbc"'], 400),
        ([b"a", b"a"], 400),
        ([b""], 422),
        ([b'""'], 422),
        ([b"x" * 256], 422),
        ([b'"' + b"x" * 256 + b'"'], 422),
    ],
)
def test_what_is_no_key_is_refused(values: list[bytes], status: int) -> None:
    with pytest.raises(Refusal) as caught:
        read(*values)
    assert caught.value.kind.status == status


def test_a_key_with_and_without_quotes_is_one() -> None:
    assert read(b"x" * 255) == read(b'"' + b"x" * 255 + b'"') == "x" * 255
    assert read(b"8e03978e-40d5+/=") == read(b'"8e03978e-40d5+/="') == "8e03978e-40d5+/="
    assert read() is None


async def test_a_bad_key_changes_nothing_and_is_not_looked_at_where_it_means_nothing() -> None:
    async with opened() as app:
        await app("PUT", S1)
        accepted = runtime_of(app).watermarks.accepted
        for method, target, body, _ in WRITES.values():
            refused = await app(method, target, body, headers={HEADER: '"'})
            assert (refused.status, refused.slug, refused.pointers) == (400, "malformed", [HEADER])
        assert runtime_of(app).watermarks.accepted == accepted
        for method, target in (("GET", S1), ("PUT", S1), ("POST", "/v1/flush"), ("DELETE", S1)):
            assert (await app(method, target, headers={HEADER: '"'})).status < 300


# --- callers that do not give up --------------------------------------------------------------------------------------

BODIES = {"/v1/sessions": {"title": "t"}, f"{S1}/messages": MESSAGE}


async def insist(client: httpx.AsyncClient, target: str, replies: list[httpx.Response], answered: anyio.Event) -> None:
    """Send one request until it is answered: what a client does whose server went away."""
    while True:
        try:
            reply = await client.post(target, json=BODIES[target], headers={HEADER: '"one"'})
        except httpx.TransportError:
            await anyio.sleep(0.02)
            continue
        if reply.status_code != 503:
            replies.append(reply)
            answered.set()
            return
        await anyio.sleep(0.02)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_50_callers_with_one_key_and_a_kill_between_make_one_message_and_one_session(tmp_path: Path) -> None:
    storage = ("--storage", f"sqlite:///{tmp_path / 'sessions.db'}")
    port = free_port()
    replies: dict[str, list[httpx.Response]] = {target: [] for target in BODIES}
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, limits=limits) as client:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:

                def call(count: int, answered: anyio.Event) -> None:
                    for target in [*BODIES] * count:
                        tasks.start_soon(insist, client, target, replies[target], answered)

                with serving(*storage, port=port) as server:
                    (await client.put(S1)).raise_for_status()
                    answered = anyio.Event()
                    call(40, answered)
                    await answered.wait()  # the others are on their way
                    server.signal(signal.SIGKILL)
                    server.ended()
                call(10, answered)
                with serving(*storage, port=port):
                    while sum(map(len, replies.values())) < 100:
                        await anyio.sleep(0.01)
                    items = (await client.get(f"{S1}/messages")).json()["items"]
                    sessions = (await client.get("/v1/sessions")).json()["items"]
    for each in replies.values():
        first = each[0].status_code, each[0].headers.get("location"), each[0].content
        assert first[0] == 201
        assert [(reply.status_code, reply.headers.get("location"), reply.content) for reply in each] == [first] * 50
    assert items == [replies[f"{S1}/messages"][0].json()]
    assert {session["session_id"] for session in sessions} == {"s1", replies["/v1/sessions"][0].json()["session_id"]}
