"""Every endpoint does what it should, on both event loops."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from agent_runtime import NewMessage
from http_rig import App, opened, runtime_of

pytestmark = pytest.mark.anyio

CALL = {"id": "c1", "type": "function", "function": {"name": "trains", "arguments": "{}"}}


def is_time(value: str) -> bool:
    """RFC 3339, in UTC."""
    return value.endswith("Z") and datetime.fromisoformat(value).tzinfo is not None


async def test_health() -> None:
    async with opened() as app:
        health = await app("GET", "/health")
        assert health.status == 200
        assert health.json == {"status": "ok", "service": "agent-runtime", "version": "0.1.0"}
        assert (await app("GET", "/livez")).json == {"status": "ok"}
        assert (await app("GET", "/readyz")).json["status"] == "ready"


async def test_a_session_is_created_shown_patched_and_deleted() -> None:
    async with opened() as app:
        given = {
            "session_id": "s 1",
            "user_id": "ada",
            "title": "T",
            "description": "D",
            "metadata": {"b": 1, "a": 2.5},
        }
        created = await app("POST", "/v1/sessions", given | {"system_prompt": "Be kind.", "agent": "guide"})
        assert created.status == 201
        assert created.headers["location"] == "/v1/sessions/s%201"
        record = created.json
        assert {name: record[name] for name in given} == given
        assert list(record["metadata"]) == ["b", "a"]
        assert record["message_count"] == 1
        assert is_time(record["created_at"])
        assert (await app("GET", created.headers["location"])).json == record

        again = await app("POST", "/v1/sessions", {"session_id": "s 1"})
        assert (again.status, again.slug) == (409, "session-exists")

        for media_type in ("application/merge-patch+json", "application/json", "application/json; charset=UTF-8"):
            patch = {"title": None, "metadata": {"a": None, "c": {"d": 1}}}
            patched = await app("PATCH", "/v1/sessions/s%201", patch, headers={"content-type": media_type})
            assert patched.status == 200
            assert patched.json["title"] is None
            assert patched.json["description"] == "D"
            assert patched.json["metadata"] == {"b": 1, "c": {"d": 1}}

        assert (await app("DELETE", "/v1/sessions/s%201")).status == 204
        gone = await app("GET", "/v1/sessions/s%201")
        assert (gone.status, gone.slug) == (404, "session-not-found")
        assert (await app("DELETE", "/v1/sessions/s%201")).status == 404
        assert (await app("GET", "/v1/sessions")).json == {"items": [], "next": None}


async def test_a_session_without_an_id_gets_one_and_null_is_as_absent() -> None:
    async with opened() as app:
        fields = ("session_id", "user_id", "system_prompt", "title", "description", "metadata", "agent")
        for body in ({}, dict.fromkeys(fields)):
            created = await app("POST", "/v1/sessions", body)
            assert created.status == 201
            shown = await app("GET", created.headers["location"])
            assert shown.json == created.json
            assert shown.json["message_count"] == 0
        assert len((await app("GET", "/v1/sessions")).json["items"]) == 2


async def test_put_gets_or_creates() -> None:
    async with opened() as app:
        first = await app("PUT", "/v1/sessions/s1", {"title": "first"})
        assert (first.status, first.json["title"]) == (201, "first")
        second = await app("PUT", "/v1/sessions/s1", {"title": "second"})
        assert (second.status, second.json) == (200, first.json)
        assert (await app("PUT", "/v1/sessions/s1")).json == first.json
        assert (await app("PUT", "/v1/sessions/%c3%bcn%C3%AF%e2%98%83")).status == 201
        assert (await app("GET", "/v1/sessions/%C3%BCn%C3%AF%E2%98%83")).status == 200
        stored = await app("PUT", "/v1/sessions/s1?durability=stored")
        assert stored.status == 200
        assert runtime_of(app).watermarks.stored >= 1


async def test_sessions_are_listed_by_user_and_page_by_page() -> None:
    async with opened() as app:
        for number in range(5):
            await app("PUT", f"/v1/sessions/s{number}", {"user_id": "ada" if number % 2 else "bob"})
        found: list[str] = []
        target = "/v1/sessions?limit=2&order=asc"
        cursor: str | None = ""
        while cursor is not None:
            page = (await app("GET", target + (f"&cursor={cursor}" if cursor else ""))).json
            found += [item["session_id"] for item in page["items"]]
            cursor = page["next"]
        assert found == ["s0", "s1", "s2", "s3", "s4"]
        of_ada = await app("GET", "/v1/sessions?user_id=ada")
        assert [item["session_id"] for item in of_ada.json["items"]] == ["s3", "s1"]


async def test_messages_go_in_and_come_out() -> None:
    async with opened() as app:
        await app("PUT", "/v1/sessions/s1")
        message = {"role": "user", "content": "hi ☃", "name": "ada", "token_count": 3, "metadata": {"b": 1, "a": 1.0}}
        appended = await app("POST", "/v1/sessions/s1/messages", message | {"annotations": [1], "refusal": None})
        assert appended.status == 201
        first = appended.json
        assert first == message | {
            "seq": 1,
            "id": first["id"],
            "created_at": first["created_at"],
            "extra": {"annotations": [1], "refusal": None},
        }
        assert list(first["metadata"]) == ["b", "a"]
        assert is_time(first["created_at"])
        batch = [
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "user", "content": [{"type": "text", "text": "still there?"}], "id": "mine"},
        ]
        many = await app("POST", "/v1/sessions/s1/messages/batch", {"messages": batch})
        assert many.status == 201
        assert [item["seq"] for item in many.json["items"]] == [2, 3]
        assert many.json["items"][1]["id"] == "mine"
        result = {"call_id": "c1", "tool_name": "trains", "result": {"departs": "09:30"}}
        answered = await app("POST", "/v1/sessions/s1/tool-results", result)
        assert answered.status == 201
        assert answered.json["content"] == '{"departs":"09:30"}'

        everything = [first, *many.json["items"], answered.json]
        listed = await app("GET", "/v1/sessions/s1/messages")
        assert listed.json == {"items": everything, "next": None}
        page = await app("GET", "/v1/sessions/s1/messages?limit=2&after=1")
        assert page.json == {"items": everything[1:3], "next": 3}
        newest = await app("GET", "/v1/sessions/s1/messages?limit=1&order=desc")
        assert newest.json == {"items": everything[3:], "next": 4}
        assert (await app("GET", "/v1/sessions/s1/messages/2")).json == everything[1]
        missing = await app("GET", "/v1/sessions/s1/messages/9")
        assert (missing.status, missing.slug) == (404, "message-not-found")

        chat = [
            {"role": "user", "content": "hi ☃", "name": "ada", "annotations": [1], "refusal": None},
            batch[0],
            {"role": "tool", "content": '{"departs":"09:30"}', "name": "trains", "tool_call_id": "c1"},
            {"role": "user", "content": [{"type": "text", "text": "still there?"}]},
        ]
        assert (await app("GET", "/v1/sessions/s1/history")).json == {"session_id": "s1", "messages": chat}
        limited = await app("GET", "/v1/sessions/s1/history?limit=1")
        assert limited.json["messages"] == chat[-1:]

        popped = await app("POST", "/v1/sessions/s1/messages/pop")
        assert (popped.status, popped.json) == (200, answered.json)
        assert (await app("DELETE", "/v1/sessions/s1/messages")).status == 204
        empty = await app("POST", "/v1/sessions/s1/messages/pop")
        assert (empty.status, empty.slug) == (404, "message-not-found")
        assert (await app("GET", "/v1/sessions/s1/history")).json["messages"] == []


async def test_the_history_that_is_kept_is_never_old() -> None:
    """Each change of the messages shows in the next history, whatever was asked before."""
    async with opened() as app:
        await app("PUT", "/v1/sessions/s1", {"system_prompt": "Be kind."})
        session = await runtime_of(app).get_session("s1")

        async def check() -> None:
            for limit in (None, 2, 2, None):
                shown = await app("GET", "/v1/sessions/s1/history" + (f"?limit={limit}" if limit else ""))
                assert shown.json["messages"] == await session.history(limit)

        await check()
        await session.append("user", "one")
        await check()
        await session.append_many([NewMessage(role="assistant", tool_calls=[CALL]), {"role": "user", "content": "two"}])
        await check()
        await session.append_tool_result("c1", "trains", "late")
        await check()
        await session.update(title="no message")
        await check()
        await session.pop()
        await check()
        await session.clear()
        await check()
        await session.delete()
        assert (await app("GET", "/v1/sessions/s1/history")).status == 404


async def test_the_context_is_shown_handed_over_and_patched() -> None:
    async with opened() as app:
        await app("PUT", "/v1/sessions/s1")
        context = (await app("GET", "/v1/sessions/s1/context")).json
        assert context == {
            "session_id": "s1",
            "current_agent": "orchestrator",
            "switch_count": 0,
            "last_switch_at": None,
            "metadata": {},
            "created_at": context["created_at"],
            "updated_at": context["created_at"],
            "agent_history": [],
        }
        switched = await app("POST", "/v1/sessions/s1/agent", {"agent": "coder", "reason": "it is code"})
        assert (switched.status, switched.json["current_agent"], switched.json["switch_count"]) == (200, "coder", 1)
        same = await app("POST", "/v1/sessions/s1/agent", {"agent": "coder"})
        assert same.json == switched.json
        for media_type in ("application/json", "application/merge-patch+json"):
            patch = {"metadata": {"a": 1, "b": {"c": None, "d": 2}}}
            patched = await app("PATCH", "/v1/sessions/s1/context", patch, headers={"content-type": media_type})
            assert (patched.status, patched.json["metadata"]) == (200, {"a": 1, "b": {"d": 2}})
        unpatched = await app("PATCH", "/v1/sessions/s1/context", {})
        assert unpatched.json == patched.json | {"updated_at": unpatched.json["updated_at"]}
        shown = (await app("GET", "/v1/sessions/s1/context")).json
        [switch] = shown.pop("agent_history")
        assert shown == unpatched.json
        assert switch == {
            "from": "orchestrator",
            "to": "coder",
            "reason": "it is code",
            "timestamp": shown["last_switch_at"],
        }
        assert is_time(switch["timestamp"])
        unheard = await app("PATCH", "/v1/sessions/s1/context?durability=safe", {})
        assert (unheard.status, unheard.pointers) == (422, ["?durability"])
        removed = await app("PATCH", "/v1/sessions/s1/context", {"metadata": None})
        assert removed.json["metadata"] == {}


@pytest.mark.parametrize("value", [{"b": [1, 2.5, None], "a": "☃"}, [], "text", 0, None, True])
async def test_json_documents(value: Any) -> None:
    async with opened() as app:
        await app("PUT", "/v1/sessions/s1")
        target = "/v1/sessions/s1/documents/notes/k%20%C3%BC"
        missing = await app("GET", target)
        assert (missing.status, missing.slug) == (404, "document-not-found")
        put = await app(
            "PUT", target, b"null" if value is None else value, headers={"content-type": "application/json"}
        )
        assert put.status == 200
        assert {**put.json, "updated_at": None} == {
            "collection": "notes",
            "key": "k ü",
            "media_type": None,
            "updated_at": None,
        }
        got = await app("GET", target)
        assert (got.status, got.headers["content-type"], got.json) == (200, "application/json", value)
        listed = (await app("GET", "/v1/sessions/s1/documents/notes")).json
        assert [item["value"] for item in listed["items"]] == [value]
        assert (await app("DELETE", target)).status == 204
        assert (await app("DELETE", target)).status == 404


@pytest.mark.parametrize("media_type", ["image/png", "text/html; charset=latin-1", "application/vnd.x+json", "a/b"])
async def test_documents_of_bytes_come_back_with_their_type_and_are_not_shown_by_browsers(media_type: str) -> None:
    data = bytes(range(256))
    async with opened() as app:
        await app("PUT", "/v1/sessions/s1")
        target = "/v1/sessions/s1/documents/files/f"
        put = await app("PUT", target, data, headers={"content-type": media_type})
        assert (put.status, put.json["media_type"]) == (200, media_type)
        got = await app("GET", target)
        assert (got.body, got.headers["content-type"]) == (data, media_type)
        assert got.headers["x-content-type-options"] == "nosniff"
        assert got.headers["content-disposition"] == "attachment"
        assert (await app("GET", "/v1/sessions/s1/documents/files")).json["items"][0]["media_type"] == media_type


async def test_a_media_type_that_is_no_header_is_not_sent() -> None:
    async with opened() as app:
        await app("PUT", "/v1/sessions/s1")
        session = await runtime_of(app).get_session("s1")
        await session.put_document("files", "f", b"data", media_type="text/html\r\nset-cookie: a=b")
        assert (await app("GET", "/v1/sessions/s1/documents/files/f")).headers[
            "content-type"
        ] == "application/octet-stream"


async def test_documents_are_listed_page_by_page() -> None:
    async with opened() as app:
        await app("PUT", "/v1/sessions/s1")
        for key in "cab":
            await app("PUT", f"/v1/sessions/s1/documents/notes/{key}", {"key": key})
        page = (await app("GET", "/v1/sessions/s1/documents/notes?limit=2")).json
        assert [item["key"] for item in page["items"]] == ["a", "b"]
        last = (await app("GET", f"/v1/sessions/s1/documents/notes?limit=2&cursor={page['next']}")).json
        assert ([item["key"] for item in last["items"]], last["next"]) == (["c"], None)
        assert (await app("GET", "/v1/sessions/s1/documents/none")).json == {"items": [], "next": None}


async def test_status_and_flush() -> None:
    async with opened() as app:
        await app("PUT", "/v1/sessions/s1")
        status = (await app("GET", "/v1/status")).json
        assert status["state"] == "running"
        assert status["watermarks"] == {"accepted": 1, "journaled": None, "synced": None, "stored": 0}
        assert {"pending", "flush", "residents", "pool", "lease", "quarantine"} <= status.keys()
        flushed = await app("POST", "/v1/flush")
        assert flushed.status == 200
        assert flushed.json["watermarks"]["stored"] == 1


WRITES: list[tuple[str, str, Any]] = [
    ("POST", "/v1/sessions", {}),
    ("PUT", "/v1/sessions/s2", {}),
    ("PATCH", "/v1/sessions/s1", {"title": "T"}),
    ("POST", "/v1/sessions/s1/messages", {"role": "user", "content": "hi"}),
    ("POST", "/v1/sessions/s1/messages/batch", {"messages": [{"role": "user", "content": "hi"}]}),
    ("POST", "/v1/sessions/s1/tool-results", {"call_id": "c", "tool_name": "t", "result": 1}),
    ("POST", "/v1/sessions/s1/messages/pop", None),
    ("DELETE", "/v1/sessions/s1/messages", None),
    ("PATCH", "/v1/sessions/s1/context", {"metadata": {"a": 1}}),
    ("POST", "/v1/sessions/s1/agent", {"agent": "coder"}),
    ("PUT", "/v1/sessions/s1/documents/c/k", {"a": 1}),
    ("DELETE", "/v1/sessions/s1/documents/c/k", None),
    ("DELETE", "/v1/sessions/s1", None),
]


@pytest.mark.parametrize(("method", "path", "body"), WRITES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("level", ["buffered", "stored"])
async def test_every_write_waits_for_the_level_it_names(method: str, path: str, body: Any, level: str) -> None:
    async with opened(write_behind={"interval_s": 1000.0}) as app:
        await app("PUT", "/v1/sessions/s1", {"system_prompt": "Be kind."})
        await app("PUT", "/v1/sessions/s1/documents/c/k", {"a": 1})
        before = runtime_of(app).watermarks
        assert (await app(method, f"{path}?durability={level}", body)).status < 300
        after = runtime_of(app).watermarks
        assert after.accepted == before.accepted + 1
        assert after.stored == (before.stored if level == "buffered" else after.accepted)


async def test_head_and_options() -> None:
    async with opened() as app:
        await app("PUT", "/v1/sessions/s1")
        got = await app("GET", "/v1/sessions/s1")
        head = await app("HEAD", "/v1/sessions/s1")
        assert (head.status, head.headers, head.body) == (200, got.headers, b"")
        assert (await app("HEAD", "/v1/sessions/s2")).status == 404
        for target, allowed in {
            "/v1/sessions/s1": "DELETE, GET, HEAD, OPTIONS, PATCH, PUT",
            "/v1/sessions/s1/messages": "DELETE, GET, HEAD, OPTIONS, POST",
            "/v1/sessions/s1/messages/batch": "OPTIONS, POST",
            "/v1/sessions/s1/messages/7": "GET, HEAD, OPTIONS",
            "/health": "GET, HEAD, OPTIONS",
        }.items():
            options = await app("OPTIONS", target)
            assert (options.status, options.headers["allow"]) == (204, allowed)
            refused = await app("TRACE", target)
            assert (refused.status, refused.slug, refused.headers["allow"]) == (405, "method-not-allowed", allowed)
        assert (await app("GET", "/v1/sessions/s1/messages/pop")).headers["allow"] == "OPTIONS, POST"


async def test_mounted_below_a_prefix() -> None:
    async with opened() as app:
        mounted = App(Starlette(routes=[Mount("/agents", app.app)]), root="/agents")
        created = await mounted("POST", "/v1/sessions", {"session_id": "s1"})
        assert created.headers["location"] == "/agents/v1/sessions/s1"
        assert (await mounted("POST", "/v1/sessions/s1/messages", {"role": "user", "content": "hi"})).status == 201
        assert (await mounted("GET", "/v1/sessions/s1/history")).json["messages"] == [{"role": "user", "content": "hi"}]
        assert (await mounted("GET", "/v1/sessions/a%2Fb")).status == 422
        assert (await mounted("GET", "/health")).status == 200
