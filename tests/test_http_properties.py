"""Any request at all, at every route: it is done or refused as documented, and what is refused has changed nothing."""

from __future__ import annotations

import json
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_runtime_http.application import OPERATIONS
from http_rig import App, opened, runtime_of

pytestmark = pytest.mark.anyio

DOCUMENTED = {200, 201, 204, 400, 404, 405, 409, 413, 415, 422}
LIMIT = 4096


class Request(NamedTuple):
    """A request to be made."""

    method: str
    target: str
    headers: dict[str, str]
    chunks: list[bytes]


def quoted(text: str) -> str:
    return quote(text, safe="")


ids = st.sampled_from(["s1", "s2", "ü ☃", "%", "a+b", ".."]) | st.text(st.characters(codec="utf-8"), max_size=5)
raw_segments = st.sampled_from(
    ["", "%2F", "a%2fb", "%FF", "%zz", "%00", ".", "%2e%2e", "x" * 300, "batch", "pop", "1", "-1", "9" * 20]
)
segments = ids.map(quoted) | raw_segments
numbers = st.sampled_from(["1", "2", "0", "-1", "1001", "x", "", "9" * 30, "1e3"]) | st.integers().map(str)
parameters = {
    "limit": numbers,
    "after": numbers,
    "cursor": segments,
    "user_id": segments,
    "order": st.sampled_from(["asc", "desc", "up", ""]),
    "durability": st.sampled_from(["buffered", "stored", "journaled", "safe", ""]),
    "unknown": segments,
    "%FF": st.just("%ff"),
}
texts = st.sampled_from(["hi", "", "a\0b", "\ud800", "☃", "x" * 600]) | st.text(max_size=10)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just(10**400)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
roles = st.sampled_from(["user", "assistant", "tool", "system", "robot"]) | values
calls = st.lists(st.fixed_dictionaries({"id": texts | values}, optional={"function": values}), max_size=2) | values
message = st.fixed_dictionaries(
    {"role": roles},
    optional={
        "content": texts | values,
        "name": texts | values,
        "tool_calls": calls,
        "tool_call_id": texts | values,
        "token_count": st.integers() | values,
        "metadata": values,
        "extra": values,
        "id": texts | values,
        "created_at": st.sampled_from(["2025-01-31T12:00:00Z", "2025-01-31", "9999-12-31T23:59:59-23:59"]) | values,
        "refusal": values,
        "seq": values,
    },
)
members = st.fixed_dictionaries(
    {},
    optional={
        "session_id": ids | values,
        "user_id": ids | values,
        "system_prompt": texts | values,
        "title": texts | values,
        "description": texts | values,
        "metadata": values,
        "agent": texts | values,
        "reason": texts | values,
        "messages": st.lists(message | values, max_size=3) | values,
        "call_id": texts | values,
        "tool_name": texts | values,
        "result": values,
    },
)


@st.composite
def of_members(draw: st.DrawFn) -> Any:
    """Some of the members that bodies have, often just those of one kind of body."""
    body = draw(members)
    wanted = draw(
        st.sampled_from(
            [
                ("messages",),
                ("call_id", "tool_name", "result"),
                ("agent", "reason"),
                ("metadata",),
                ("title", "description", "metadata"),
                ("user_id", "title", "agent", "system_prompt"),
                tuple(body),
            ]
        )
    )
    return {name: value for name, value in body.items() if name in wanted}


texts_of_json = (message | of_members() | values).map(lambda value: json.dumps(value).encode())
bodies = (
    texts_of_json
    | st.binary(max_size=20)
    | st.sampled_from(
        [b"", b"{", b"[" * 5000, b"\xff", b'{"role":"user","content":"\xed\xa0\x80"}', b" " * (LIMIT + 1)]
    )
)
media_types = st.sampled_from(
    ["application/json"] * 6 + ["application/merge-patch+json", "text/plain", "image/png", "\x00"]
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    path = draw(st.sampled_from(sorted(OPERATIONS)))
    methods = [
        *OPERATIONS[path],
        *OPERATIONS[path],
        "GET",
        "HEAD",
        "POST",
        "PUT",
        "PATCH",
        "DELETE",
        "OPTIONS",
        "TRACE",
    ]
    method = draw(st.sampled_from(methods))
    for name in ("session_id", "collection", "key", "seq"):
        usual = st.just("1" if name == "seq" else "s1")
        path = path.replace(f"{{{name}}}", draw(usual | segments))
    names = draw(st.lists(st.sampled_from(sorted(parameters)), max_size=2)) if draw(st.booleans()) else []
    query = "&".join(f"{name}={draw(parameters[name])}" for name in names)
    headers = {"content-type": draw(media_types)} if draw(st.integers(0, 9)) else {}
    body = draw(bodies)
    cut = draw(st.integers(0, len(body)))
    chunks = [body] if draw(st.booleans()) else [body[:cut], body[cut:]]
    return Request(method, f"{path}?{query}" if query else path, headers, chunks)


@given(st.lists(requests(), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
async def test_whatever_comes_is_done_or_refused(requests: list[Request]) -> None:
    async with opened(http={"body_bytes_max": LIMIT}) as app:
        runtime = runtime_of(app)
        await app("PUT", "/v1/sessions/s1", {"system_prompt": "Be kind."})
        for request in requests:
            before = runtime.watermarks.accepted
            reply = await app(request.method, request.target, headers=request.headers, chunks=request.chunks)
            assert reply.status in DOCUMENTED
            if reply.status >= 400 or request.method in ("GET", "HEAD", "OPTIONS", "TRACE"):
                assert runtime.watermarks.accepted == before
            if reply.status == 422 and request.method != "HEAD":
                assert reply.pointers
        await everything_can_be_read(app)
        assert (await app("POST", "/v1/flush")).status == 200


async def everything_can_be_read(app: App) -> None:
    """What was let in comes out, and through every read."""
    for item in (await app("GET", "/v1/sessions?limit=1000")).json["items"]:
        session = f"/v1/sessions/{quoted(item['session_id'])}"
        assert (await app("GET", session)).json == item
        listed = (await app("GET", f"{session}/messages?limit=1000")).json["items"]
        assert len(listed) == item["message_count"]
        for target in ("history", "context"):
            assert (await app("GET", f"{session}/{target}")).status == 200
