"""Whatever is wrong is refused with the documented status, names the field, and changes nothing."""

from __future__ import annotations

import gzip
import json
import logging
from typing import Any

import anyio
import pytest

from agent_runtime import (
    IdempotencyConflict,
    InvalidInput,
    JournalFull,
    LeaseLost,
    NewMessage,
    StorageFatal,
    StorageUnavailable,
    hookimpl,
)
from agent_runtime.storage import StorageConfig
from agent_runtime.testing import writes_message
from agent_runtime_http import create_app, lifespan
from agent_runtime_http.problems import FAILURES, answer_to
from agent_runtime_memory import MemoryDatabase
from http_rig import JSON, App, Outage, Reply, checks, opened, runtime_of

pytestmark = pytest.mark.anyio

S1 = "/v1/sessions/s1"
MESSAGES = f"{S1}/messages"
MESSAGE = {"role": "user", "content": "hi"}
SECRET = "hunter2"
LONG = "x" * 5000


async def refused(app: App, method: str, target: str, body: Any = None, **options: Any) -> Reply:
    """A request that is refused, and has changed nothing."""
    before = runtime_of(app).watermarks.accepted
    reply = await app(method, target, body, **options)
    assert 400 <= reply.status < 500
    assert runtime_of(app).watermarks.accepted == before
    return reply


def of_type(media_type: str) -> dict[str, str]:
    return {"content-type": media_type}


# --- what can't be read -----------------------------------------------------------------------------------------------

NOT_JSON = [
    b"",
    b"{",
    b"{'role': 'user'}",
    b'{"role": "user"} x',
    b'\xef\xbb\xbf{"role": "user"}',
    b'{"role": "user", "content": "\xff"}',
    b'{"role": "user", "content": "\xed\xa0\x80"}',
    b'{"role": "user", "content": "a\x00"}',
    b"[" * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"role": "user", "token_count": ' + b"1" * 5000 + b"}",
    b'{"role": "user", "content": "\\x"}',
    b'{"role": "user", "content": truthy}',
]
BODIES = [
    ("POST", "/v1/sessions"),
    ("PUT", "/v1/sessions/s2"),
    ("PATCH", S1),
    ("POST", MESSAGES),
    ("POST", f"{MESSAGES}/batch"),
    ("POST", f"{S1}/tool-results"),
    ("PATCH", f"{S1}/context"),
    ("POST", f"{S1}/agent"),
    ("PUT", f"{S1}/documents/c/k"),
]


@pytest.mark.parametrize(("method", "target"), BODIES)
async def test_a_body_that_is_no_json_text_is_malformed(method: str, target: str) -> None:
    async with opened() as app:
        await app("PUT", S1)
        for body in NOT_JSON:
            if body or method != "PUT" or "documents" in target:
                reply = await refused(app, method, target, body, headers=JSON)
                assert (reply.status, reply.slug, reply.pointers) == (400, "malformed", [""])


@pytest.mark.parametrize(("method", "target"), BODIES)
async def test_a_body_of_another_type_is_refused_with_a_hint(method: str, target: str) -> None:
    async with opened() as app:
        await app("PUT", S1)
        types = ["text/plain", "application/x-www-form-urlencoded", "application/json-patch+json", "", "json"]
        if method != "PATCH":
            types.append("application/merge-patch+json")
        if "documents" in target:
            types = ["", "json", "text", "a/b/c", "text/ü", "a/b\x01"]
        types.append("application/json; charset=utf-16")
        for media_type in types:
            reply = await refused(app, method, target, b"{}", headers=of_type(media_type))
            assert (reply.status, reply.slug) == (415, "unsupported-media-type")
            assert "Content-Type: application/json" in reply.json["detail"] or "charset" in reply.json["detail"]
        assert (await app("POST", "/v1/sessions", b"{}")).status == 201  # what says nothing of itself is taken for JSON


@pytest.mark.parametrize(("method", "target"), [*BODIES, ("PUT", f"{S1}/documents/c/bytes")])
async def test_a_body_over_the_limit_is_not_read_to_its_end(method: str, target: str) -> None:
    async with opened(http={"body_bytes_max": 2048}) as app:
        await app("PUT", S1)
        headers = of_type("image/png" if target.endswith("bytes") else "application/json")
        whole = await refused(app, method, target, b" " * 2049, headers=headers)
        assert (whole.status, whole.slug) == (413, "too-large")
        assert "2048" in whole.json["detail"]
        announced = await refused(app, method, target, headers=headers | {"content-length": "9" * 30}, chunks=[])
        assert announced.status == 413
        chunks = iter([b" " * 1000] * 9)
        chunked = await refused(app, method, target, headers=headers, chunks=chunks)
        assert chunked.status == 413


async def test_a_body_of_just_the_limit_in_many_chunks_is_read() -> None:
    body = json.dumps(MESSAGE | {"content": "x" * 1500}).encode()
    async with opened(http={"body_bytes_max": len(body)}) as app:
        await app("PUT", S1)
        reply = await app("POST", MESSAGES, headers=JSON, chunks=[body[at : at + 1] for at in range(len(body))])
        assert (reply.status, reply.json["content"]) == (201, "x" * 1500)


async def test_a_body_of_just_the_limit_that_says_so_is_read() -> None:
    body = json.dumps(MESSAGE | {"content": "x" * 1500}).encode()
    async with opened(http={"body_bytes_max": len(body)}) as app:
        await app("PUT", S1)
        for chunk, status in ((body, 201), (body + b" ", 413)):
            length = {"content-length": str(len(chunk))}
            assert (await app("POST", MESSAGES, headers=JSON | length, chunks=[chunk])).status == status


@pytest.mark.parametrize(("method", "target"), BODIES)
async def test_who_hangs_up_within_a_body_has_changed_nothing(method: str, target: str) -> None:
    async with opened() as app:
        await app("PUT", S1)
        accepted = runtime_of(app).watermarks.accepted
        for chunks in ([], [b'{"role": "user", '], [b"{}"]):
            await app(method, target, headers=JSON, chunks=chunks, hang_up=True)
        assert runtime_of(app).watermarks.accepted == accepted


# --- paths ------------------------------------------------------------------------------------------------------------


PATHS = [
    ("/v1/sessions/a%2Fmessages", 422, "{path}"),
    ("/v1/sessions/a%2fb", 422, "{path}"),
    ("/v1/sessions//messages", 422, "{session_id}"),
    ("/v1/sessions/", 422, "{path}"),
    ("/v1/sessions/s1/", 422, "{path}"),
    ("/v1//sessions", 422, "{path}"),
    ("/v1/sessions/s1/documents//k", 422, "{path}"),
    ("/v1/sessions/%FF", 400, "{path}"),
    ("/v1/sessions/%ed%a0%80", 400, "{path}"),
    ("/v1/sessions/a%", 400, "{path}"),
    ("/v1/sessions/a%zz", 400, "{path}"),
    ("/v1/sessions/..", 422, "{session_id}"),
    ("/v1/sessions/%2e%2e", 422, "{session_id}"),
    ("/v1/sessions/.", 422, "{session_id}"),
    ("/v1/sessions/a%00b", 422, "{session_id}"),
    ("/v1/sessions/a%0Ab", 422, "{session_id}"),
    (f"/v1/sessions/{LONG}", 422, "{session_id}"),
    (f"/v1/sessions/{LONG}/messages", 422, "{session_id}"),
    (f"/v1/sessions/s1/documents/{LONG}/k", 422, "{collection}"),
    ("/v1/sessions/s1/documents/c/..", 422, "{key}"),
    ("/v1/sessions/s1/messages/x", 422, "{seq}"),
    ("/v1/sessions/s1/messages/-1", 422, "{seq}"),
    ("/v1/sessions/s1/messages/1.0", 422, "{seq}"),
    ("/v1/sessions/s1/messages/%D9%A1", 422, "{seq}"),
    (f"/v1/sessions/s1/messages/{2**53 + 1}", 422, "{seq}"),
    (f"/v1/sessions/s1/messages/{'9' * 5000}", 422, "{seq}"),
]


async def test_a_path_that_is_wrong_is_named() -> None:
    async with opened() as app:
        await app("PUT", S1)
        await app("POST", MESSAGES, MESSAGE)
        for target, status, pointer in PATHS:
            told = []
            for method in ("GET", "DELETE", "PUT", "POST", "PATCH"):
                reply = await refused(app, method, target, MESSAGE if method == "POST" else {})
                if reply.status != 405:
                    told.append((target, reply.status, reply.pointers))
            assert told == [(target, status, [pointer])] * len(told)
            assert told
        assert (await app("GET", MESSAGES)).json["items"]


async def test_a_compressed_body_is_neither_read_nor_kept_as_what_it_is_not() -> None:
    document = f"{S1}/documents/notes/a"
    async with opened() as app:
        await app("PUT", S1)
        for method, target, body in (
            ("POST", MESSAGES, b'{"role": "user", "content": "hi"}'),
            ("PUT", document, b'{"a": 1}'),
            ("PUT", document, b"hello"),
        ):
            headers = {"content-type": "text/plain" if body == b"hello" else "application/json"}
            for coding in ("gzip", "GZIP", "br", "identity, gzip"):
                coded = {**headers, "content-encoding": coding}
                reply = await refused(app, method, target, gzip.compress(body), headers=coded)
                assert (reply.status, reply.slug) == (415, "unsupported-media-type")
                assert "Content-Encoding" in reply.json["detail"]
                assert reply.headers["accept-encoding"] == "identity"
            plain = {**headers, "content-encoding": "identity"}
            assert (await app(method, target, body, headers=plain)).status in (200, 201)


async def test_what_is_nowhere_is_not_found() -> None:
    async with opened() as app:
        for target in ("/", "/v2/sessions", "/v1", "/v1/session", f"{S1}/nothing", f"{S1}/messages/1/2", "/health/x"):
            reply = await refused(app, "GET", target)
            assert (reply.status, reply.slug) == (404, "not-found")


# --- queries ----------------------------------------------------------------------------------------------------------


QUERIES = [
    ("GET", "/v1/sessions?limt=1", ["?limt"]),
    ("GET", "/v1/sessions?limit=1&limit=2", ["?limit"]),
    ("GET", "/v1/sessions?limit=x&order=up&x=", ["?limit", "?x"]),
    ("GET", "/v1/sessions?limit=0", ["?limit"]),
    ("GET", "/v1/sessions?limit=1001", ["?limit"]),
    ("GET", "/v1/sessions?limit=-1", ["?limit"]),
    ("GET", "/v1/sessions?limit=", ["?limit"]),
    ("GET", "/v1/sessions?limit=1.0", ["?limit"]),
    ("GET", "/v1/sessions?limit=%D9%A1", ["?limit"]),
    ("GET", f"/v1/sessions?limit={'9' * 5000}", ["?limit"]),
    ("GET", "/v1/sessions?order=up", ["?order"]),
    ("GET", "/v1/sessions?cursor=x", ["?cursor"]),
    ("GET", "/v1/sessions?cursor=", ["?cursor"]),
    ("GET", "/v1/sessions?cursor=WyIyMDI1Il0", ["?cursor"]),
    ("GET", "/v1/sessions?user_id=", ["?user_id"]),
    ("GET", "/v1/sessions?user_id=a%2Fb", ["?user_id"]),
    ("GET", f"{MESSAGES}?after=-1", ["?after"]),
    ("GET", f"{MESSAGES}?after=x", ["?after"]),
    ("GET", f"{MESSAGES}?order=up", ["?order"]),
    ("GET", f"{MESSAGES}?limit=1001", ["?limit"]),
    ("GET", f"{S1}/history?limit=0", ["?limit"]),
    ("GET", f"{S1}/documents/c?limit=0", ["?limit"]),
    ("GET", f"{S1}/documents/c?cursor=", ["?cursor"]),
    ("GET", f"{S1}/documents/c?cursor=a%2Fb", ["?cursor"]),
    ("GET", f"{S1}?x", ["?x"]),
    ("GET", "/health?x=1", ["?x"]),
    ("POST", f"{MESSAGES}?durability=safe", ["?durability"]),
    ("POST", f"{MESSAGES}?durability=synced", ["?durability"]),
    ("POST", f"{MESSAGES}?durability=", ["?durability"]),
    ("POST", f"{MESSAGES}?limit=1", ["?limit"]),
    ("DELETE", f"{S1}?durability=safe", ["?durability"]),
    ("POST", "/v1/flush?now=1", ["?now"]),
]


async def test_a_parameter_that_is_wrong_is_named() -> None:
    async with opened() as app:
        await app("PUT", S1)
        for method, target, pointers in QUERIES:
            reply = await refused(app, method, target, MESSAGE if method == "POST" else None)
            assert (target, reply.status, reply.slug, reply.pointers) == (target, 422, "invalid-input", pointers)


@pytest.mark.parametrize("query", ["user_id=%FF", "%ff=1", "user_id=\xff", "&".join(f"a{n}=1" for n in range(101))])
async def test_a_query_that_can_not_be_read_is_malformed(query: str) -> None:
    async with opened() as app:
        reply = await refused(app, "GET", f"/v1/sessions?{query}")
        assert (reply.status, reply.slug) == (400, "malformed")


# --- members of the body ----------------------------------------------------------------------------------------------

NAN, SURROGATE = b'{"role": "user", "metadata": {"a~/b": [1, NaN]}}', b'{"role": "user", "content": "\\ud800"}'


MEMBERS: list[tuple[str, str, Any, list[str]]] = [
    ("POST", "/v1/sessions", [], [""]),
    ("POST", "/v1/sessions", "text", [""]),
    ("POST", "/v1/sessions", b"null", [""]),
    ("POST", "/v1/sessions", {"sesion_id": "s2"}, ["/sesion_id"]),
    ("POST", "/v1/sessions", {"a/b": 1, "c~d": 2, "": 3}, ["/a~1b", "/c~0d", "/"]),
    ("POST", "/v1/sessions", {"session_id": "a/b"}, ["/session_id"]),
    ("POST", "/v1/sessions", {"session_id": ""}, ["/session_id"]),
    ("POST", "/v1/sessions", {"session_id": LONG}, ["/session_id"]),
    ("POST", "/v1/sessions", {"session_id": 5}, ["/session_id"]),
    ("POST", "/v1/sessions", {"user_id": ".."}, ["/user_id"]),
    ("POST", "/v1/sessions", {"title": "x" * 501}, ["/title"]),
    ("POST", "/v1/sessions", {"title": ["x"]}, ["/title"]),
    ("POST", "/v1/sessions", {"description": "\0"}, ["/description"]),
    ("POST", "/v1/sessions", {"metadata": ["x"]}, ["/metadata"]),
    ("POST", "/v1/sessions", b'{"metadata": {"x": {"y.z": [1, -Infinity]}}}', ["/metadata/x/y.z/1"]),
    ("POST", "/v1/sessions", {"agent": 5}, ["/agent"]),
    ("POST", "/v1/sessions", {"agent": ""}, ["/agent"]),
    ("POST", "/v1/sessions", {"system_prompt": 5}, ["/system_prompt"]),
    ("POST", "/v1/sessions", {"system_prompt": ["x"]}, ["/system_prompt"]),
    ("POST", "/v1/sessions", {"system_prompt": "\0"}, ["/system_prompt"]),
    ("PUT", "/v1/sessions/s2", {"session_id": "s2"}, ["/session_id"]),
    ("PUT", "/v1/sessions/s2", {"user_id": "a/b"}, ["/user_id"]),
    ("PATCH", S1, {"user_id": "x", "message_count": 0}, ["/user_id", "/message_count"]),
    ("PATCH", S1, {"title": 5}, ["/title"]),
    ("PATCH", S1, {"metadata": [1]}, ["/metadata"]),
    ("PATCH", S1, b'{"metadata": {"a": "\\ud800"}}', ["/metadata/a"]),
    ("POST", MESSAGES, [MESSAGE], [""]),
    ("POST", MESSAGES, {}, ["/role"]),
    ("POST", MESSAGES, {"role": "robot"}, ["/role"]),
    ("POST", MESSAGES, {"role": ["user"]}, ["/role"]),
    ("POST", MESSAGES, {"role": "user", "content": 5}, ["/content"]),
    ("POST", MESSAGES, {"role": "user", "content": "a\0"}, ["/content"]),
    ("POST", MESSAGES, {"role": "user", "content": [{"text": "\0"}]}, ["/content/0/text"]),
    ("POST", MESSAGES, {"role": "user", "content": ["x"]}, ["/content/0"]),
    ("POST", MESSAGES, {"role": "user", "seq": 5}, ["/seq"]),
    ("POST", MESSAGES, {"role": "user", "token_count": 1.5}, ["/token_count"]),
    ("POST", MESSAGES, {"role": "user", "token_count": -1}, ["/token_count"]),
    ("POST", MESSAGES, {"role": "user", "created_at": "today"}, ["/created_at"]),
    ("POST", MESSAGES, {"role": "user", "created_at": "2025-01-01T00:00:00"}, ["/created_at"]),
    ("POST", MESSAGES, {"role": "user", "id": "a/b"}, ["/id"]),
    ("POST", MESSAGES, {"role": "user", "metadata": 5}, ["/metadata"]),
    ("POST", MESSAGES, NAN, ["/metadata/a~0~1b/1"]),
    ("POST", MESSAGES, NAN.replace(b"NaN", b"1e999"), ["/metadata/a~0~1b/1"]),
    ("POST", MESSAGES, SURROGATE, ["/content"]),
    ("POST", MESSAGES, b'{"role": "user", "metadata": {"\\ud800": 1}}', ["/metadata/\\ud800"]),
    ("POST", MESSAGES, {"role": "user", "refusal": "\0"}, ["/refusal"]),
    ("POST", MESSAGES, {"role": "user", "extra": {"refusal": "\0"}, "other": 1}, ["/extra/refusal"]),
    ("POST", MESSAGES, {"role": "user", "extra": {"a": 1}, "refusal": {"extra": "\0"}}, ["/refusal/extra"]),
    ("POST", MESSAGES, {"role": "user", "extra": {"a": 1}, "a": 2}, ["/extra/a"]),
    ("POST", MESSAGES, {"role": "user", "extra": 5}, ["/extra"]),
    ("POST", MESSAGES, {"role": "user", "extra": {"role": "x"}}, ["/extra/role"]),
    ("POST", MESSAGES, {"role": "user", "metadata": {"extra": "\0"}}, ["/metadata/extra"]),
    ("POST", MESSAGES, {"role": "user", "metadata": {"a": {"extra": {"b": "\0"}}}}, ["/metadata/a/extra/b"]),
    ("POST", MESSAGES, {"role": "user", "metadata": {LONG: "\0"}}, ["/metadata"]),
    ("POST", MESSAGES, {"role": "assistant", "tool_calls": [{}]}, ["/tool_calls/0/id"]),
    ("POST", MESSAGES, {"role": "assistant", "tool_calls": {}}, ["/tool_calls"]),
    ("POST", MESSAGES, {"role": "user", "content": json.loads("[" * 70 + "]" * 70)}, ["/content" + "/0" * 64]),
    ("POST", f"{MESSAGES}/batch", {}, ["/messages"]),
    ("POST", f"{MESSAGES}/batch", {"messages": [MESSAGE], "x": 1}, ["/x"]),
    ("POST", f"{MESSAGES}/batch", {"messages": []}, ["/messages"]),
    ("POST", f"{MESSAGES}/batch", {"messages": "text"}, ["/messages"]),
    ("POST", f"{MESSAGES}/batch", {"messages": [MESSAGE, "text"]}, ["/messages/1"]),
    (
        "POST",
        f"{MESSAGES}/batch",
        {"messages": [MESSAGE] * 3 + [{"role": "user", "content": 5}]},
        ["/messages/3/content"],
    ),
    ("POST", f"{MESSAGES}/batch", {"messages": [MESSAGE, {"role": "user", "x": "\0"}]}, ["/messages/1/x"]),
    ("POST", f"{S1}/tool-results", {"call_id": "c"}, ["/tool_name", "/result"]),
    ("POST", f"{S1}/tool-results", {"call_id": None, "tool_name": "t", "result": 1}, ["/call_id"]),
    ("POST", f"{S1}/tool-results", {"call_id": "c", "tool_name": "", "result": 1}, ["/tool_name"]),
    ("POST", f"{S1}/tool-results", b'{"call_id": "c", "tool_name": "t", "result": {"a": NaN}}', ["/result/a"]),
    ("PATCH", f"{S1}/context", {"current_agent": "x"}, ["/current_agent"]),
    ("PATCH", f"{S1}/context", {"metadata": "x"}, ["/metadata"]),
    ("PATCH", f"{S1}/context", {"metadata": {"a": {"b": "\0"}}}, ["/metadata/a/b"]),
    ("POST", f"{S1}/agent", {"reason": "x"}, ["/agent"]),
    ("POST", f"{S1}/agent", {"agent": None}, ["/agent"]),
    ("POST", f"{S1}/agent", {"agent": "x", "reason": 5}, ["/reason"]),
    ("PUT", f"{S1}/documents/c/k", b'{"a": [{"b": NaN}]}', ["/a/0/b"]),
    ("PUT", f"{S1}/documents/c/k", b"NaN", [""]),
]


async def test_a_member_that_is_wrong_is_named() -> None:
    async with opened() as app:
        await app("PUT", S1)
        for method, target, body, pointers in MEMBERS:
            reply = await refused(app, method, target, body, headers=JSON)
            assert (target, reply.status, reply.slug, reply.pointers) == (target, 422, "invalid-input", pointers)


async def test_of_many_faults_the_first_are_told() -> None:
    async with opened() as app:
        reply = await refused(app, "POST", "/v1/sessions", {f"x{number}": 1 for number in range(1000)})
        assert len(reply.pointers) == 20
        assert len(reply.body) < 10_000


# --- what the runtime refuses -----------------------------------------------------------------------------------------


async def test_what_is_not_there() -> None:
    async with opened() as app:
        for method, path in [*BODIES[2:], ("GET", S1), ("GET", MESSAGES), ("POST", f"{MESSAGES}/pop")]:
            body = {"role": "user", "messages": [MESSAGE], "call_id": "c", "tool_name": "t", "result": 1, "agent": "x"}
            known = {"batch": ["messages"], "tool-results": ["call_id", "tool_name", "result"], "agent": ["agent"]}
            names = known.get(path.rpartition("/")[2], ["role"] if path == MESSAGES else [])
            reply = await refused(app, method, path, {name: body[name] for name in names})
            assert (reply.status, reply.slug) == (404, "session-not-found")


async def test_applied_but_not_at_the_level_yet() -> None:
    outage = Outage()
    async with outage.opened() as app:
        gate = outage.faults.hold("apply")
        outcomes = {}
        for method, path, body in (
            ("POST", "/v1/sessions", {"session_id": "s1"}),
            ("PUT", "/v1/sessions/s2", {}),
            ("PATCH", S1, {"title": "T"}),
            ("POST", MESSAGES, MESSAGE),
            ("POST", f"{MESSAGES}/batch", {"messages": [MESSAGE]}),
            ("POST", f"{S1}/tool-results", {"call_id": "c", "tool_name": "t", "result": 1}),
            ("POST", f"{MESSAGES}/pop", None),
            ("PATCH", f"{S1}/context", {"metadata": {"a": 1}}),
            ("POST", f"{S1}/agent", {"agent": "coder"}),
            ("PUT", f"{S1}/documents/c/k", {"a": 1}),
            ("DELETE", MESSAGES, None),
            ("DELETE", "/v1/sessions/s2", None),
        ):
            before = runtime_of(app).watermarks.accepted
            reply = await app(method, f"{path}?durability=stored", body)
            assert (reply.status, reply.slug) == (504, "durability-not-reached")
            assert "retry-after" not in reply.headers
            problem = reply.json
            assert problem["applied"] is True
            assert (problem["sequence"], problem["wanted"], problem["reached"]) == (before + 1, "stored", "buffered")
            outcomes[method, path] = problem["outcome"]
        assert outcomes["POST", "/v1/sessions"]["session_id"] == "s1"
        assert outcomes["PUT", "/v1/sessions/s2"]["session_id"] == "s2"
        assert outcomes["PATCH", S1]["title"] == "T"
        assert outcomes["POST", MESSAGES]["seq"] == 1
        assert [item["seq"] for item in outcomes["POST", f"{MESSAGES}/batch"]["items"]] == [2]
        assert outcomes["POST", f"{S1}/tool-results"]["seq"] == outcomes["POST", f"{MESSAGES}/pop"]["seq"] == 3
        assert outcomes["PATCH", f"{S1}/context"]["metadata"] == {"a": 1}
        assert outcomes["POST", f"{S1}/agent"]["current_agent"] == "coder"
        assert outcomes["PUT", f"{S1}/documents/c/k"]["key"] == "k"
        assert outcomes["DELETE", MESSAGES] is outcomes["DELETE", "/v1/sessions/s2"] is None
        waiting = await app("POST", "/v1/flush")
        assert (waiting.status, waiting.slug, waiting.headers["retry-after"]) == (503, "storage-unavailable", "5")
        gate.open()
        assert (await app("PUT", "/v1/sessions/s3?durability=buffered")).status == 201


async def test_overloaded() -> None:
    outage = Outage()
    async with outage.opened(write_behind={"pending_bytes_max": 65_536, "append_timeout_s": 0.01}) as app:
        await app("PUT", S1)
        gate = outage.faults.hold("apply")
        while (reply := await app("POST", MESSAGES, {"role": "user", "content": "x" * 9000})).status == 201:
            pass
        assert (reply.status, reply.slug, reply.headers["retry-after"]) == (503, "overloaded", "30")
        ready = await app("GET", "/readyz")
        assert ready.status == 200
        gate.open()


async def test_quarantined_and_held() -> None:
    outage = Outage()
    async with outage.opened(write_behind={"durability_timeout_s": 5.0}) as app:
        await app("PUT", S1)
        outage.faults.reject(writes_message("poison"))
        reply = await app("POST", f"{MESSAGES}?durability=stored", MESSAGE | {"id": "poison"})
        assert (reply.status, reply.slug, reply.json["applied"], reply.json["sequences"]) == (
            409,
            "quarantined",
            True,
            [2],
        )
        held = await refused(app, "POST", MESSAGES, MESSAGE)
        assert (held.status, held.slug) == (409, "session-held")
        assert len((await app("GET", MESSAGES)).json["items"]) == 1


@pytest.mark.parametrize(
    ("error", "slug", "again"),
    [(StorageUnavailable("away"), "storage-unavailable", True), (StorageFatal("corrupt"), "storage-fatal", False)],
)
async def test_the_database_is_needed_and_can_not_be_asked(error: Exception, slug: str, again: bool) -> None:
    outage = Outage()
    async with outage.opened() as app:
        fault = outage.faults.fail("head", error=error)
        for method, path, body in (("GET", S1, None), ("POST", MESSAGES, MESSAGE), ("PUT", S1, {})):
            reply = await app(method, path, body)
            assert (reply.status, reply.slug, "retry-after" in reply.headers) == (503, slug, again)
        fault.stop()
        assert (await app("PUT", S1)).status == 201


async def test_batches_that_fail_make_it_not_ready() -> None:
    outage = Outage()
    async with outage.opened(write_behind={"drain_timeout_s": 5.0}) as app:
        fault = outage.faults.fail("apply")
        assert (await app("PUT", f"{S1}?durability=stored")).status == 504
        ready = await app("GET", "/readyz")
        assert (ready.status, checks(ready)["storage"]) == (503, "fail")
        assert (await app("GET", "/livez")).status == (await app("GET", "/health")).status == 200
        fault.stop()


async def test_another_runtime_has_taken_over() -> None:
    outage = Outage()
    app = create_app("memory:")
    with pytest.raises(LeaseLost):
        async with outage.opened(lease={"duration_s": 1.0}) as app:
            outage.faults.fail("renew", error=LeaseLost("taken over"))
            with anyio.fail_after(5):
                await runtime_of(app).wait_fenced()
            for method, path, body in (("PUT", S1, {}), ("GET", "/v1/sessions", None), ("POST", MESSAGES, MESSAGE)):
                reply = await app(method, path, body)
                assert (reply.status, reply.slug, "retry-after" in reply.headers) == (503, "lease-lost", False)
            ready = await app("GET", "/readyz")
            assert (ready.status, checks(ready)["lease"]) == (503, "fail")
            assert (await app("GET", "/v1/status")).json["state"] == "fenced"


async def test_before_the_runtime_is_open_and_after() -> None:
    starlette = create_app("memory:")
    app = App(starlette)

    async def check(state: str) -> None:
        for method, path in (
            ("GET", "/v1/sessions"),
            ("POST", MESSAGES),
            ("GET", "/v1/status"),
            ("POST", "/v1/flush"),
            ("GET", "/metrics"),  # a plugin's, which has its routes from a runtime
        ):
            reply = await app(method, path, MESSAGE if path == MESSAGES else None)
            assert (reply.status, reply.slug, reply.headers["retry-after"]) == (503, "runtime-closed", "5")
        ready = await app("GET", "/readyz")
        assert (ready.status, checks(ready)) == (503, {"runtime": "fail"})
        assert ready.json["checks"][0]["detail"].startswith(state)
        assert (await app("GET", "/livez")).status == (await app("GET", "/health")).status == 200

    await check("closed")
    for _ in range(2):
        async with lifespan(starlette):
            assert (await app("GET", "/readyz")).status == 200
        await check("closed")

    reached, going_on = anyio.Event(), anyio.Event()

    class Slow:
        @hookimpl
        def agent_runtime_storages(self) -> dict[str, Any]:
            return {"slow": self._open}

        def _open(self, _: StorageConfig) -> Any:
            from contextlib import asynccontextmanager

            @asynccontextmanager
            async def opening() -> Any:
                reached.set()
                await going_on.wait()
                async with MemoryDatabase().open(StorageConfig(url="memory:")) as storage:
                    yield storage

            return opening()

    starlette = create_app("slow:", plugins=[Slow()])
    app = App(starlette)

    async def open_and_close() -> None:
        async with lifespan(starlette):
            pass

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_and_close)
        await reached.wait()
        await check("opening")
        going_on.set()


async def test_an_application_is_opened_once_at_a_time() -> None:
    starlette = create_app("memory:")
    async with lifespan(starlette):
        with pytest.raises(RuntimeError, match="entered twice"):
            async with lifespan(starlette):
                raise AssertionError


# --- what nobody expected ---------------------------------------------------------------------------------------------


class Failing:
    @hookimpl
    def agent_runtime_before_append(self, message: NewMessage) -> None:
        if message.content == "refuse":
            raise InvalidInput("content", "is too rude")
        if message.content != "hi":
            raise ValueError(SECRET)


async def test_a_plugin_that_fails_is_named_in_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    async with opened(plugins=[Failing()]) as app:
        await app("PUT", S1)
        reply = await app("POST", MESSAGES, {"role": "user", "content": SECRET})
        assert (reply.status, reply.slug) == (500, "internal-error")
        [record] = [each for each in caplog.records if each.name == "agent_runtime.http"]
        assert "'Failing', hook agent_runtime_before_append: ValueError" in record.getMessage()
        assert SECRET not in caplog.text + reply.body.decode()
        assert "Failing" not in reply.body.decode()

        refusal = await refused(app, "POST", MESSAGES, {"role": "user", "content": "refuse"})
        assert (refusal.status, refusal.pointers) == (422, ["/content"])
        batch = {"messages": [MESSAGE, {"role": "user", "content": "refuse"}]}
        assert (await refused(app, "POST", f"{MESSAGES}/batch", batch)).pointers == ["/messages/1/content"]


async def test_an_error_that_nobody_expected_tells_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened() as app:

        async def fail(**_: object) -> None:
            raise KeyError(SECRET)

        monkeypatch.setattr(runtime_of(app), "list_sessions", fail)
        reply = await app("GET", "/v1/sessions")
        assert (reply.status, reply.slug) == (500, "internal-error")
        [record] = caplog.records
        assert (record.name, record.levelno) == ("agent_runtime.http", logging.ERROR)
        assert record.getMessage().startswith("a request failed: KeyError at ")
        assert SECRET not in caplog.text + reply.body.decode()


def test_every_error_of_the_runtime_has_its_status() -> None:
    statuses = {kind.__name__: (each.status, each.slug, each.again) for kind, each in FAILURES.items()}
    assert statuses == {
        "InvalidInput": (422, "invalid-input", False),
        "SessionNotFound": (404, "session-not-found", False),
        "ApprovalNotFound": (404, "approval-not-found", False),
        "ApprovalDecided": (409, "approval-decided", False),
        "SessionExists": (409, "session-exists", False),
        "SessionHeld": (409, "session-held", False),
        "IdempotencyConflict": (409, "idempotency-conflict", False),
        "Quarantined": (409, "quarantined", False),
        "Overloaded": (503, "overloaded", True),
        "StorageUnavailable": (503, "storage-unavailable", True),
        "RuntimeClosed": (503, "runtime-closed", True),
        "StorageFatal": (503, "storage-fatal", False),
        "LeaseLost": (503, "lease-lost", False),
        "DurabilityNotReached": (504, "durability-not-reached", False),
        "JournalFull": (507, "journal-full", False),
        "JournalError": (503, "journal-unavailable", True),
    }
    for error in (JournalFull("12 bytes are free"), IdempotencyConflict("k1")):
        answer = answer_to(error)
        assert answer.status == FAILURES[type(error)].status
        assert json.loads(answer.body)["detail"] == str(error)
