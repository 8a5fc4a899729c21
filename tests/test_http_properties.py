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


def often(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The usual three times of four, so that what is odd is mostly the only odd thing of a request."""
    return st.integers(0, 3).flatmap(lambda number: usual if number else odd)


# Values: what is fine, and anything at all.

fine_texts = st.sampled_from(["hi", "", "☃ and more", "x" * 600])
fine_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | fine_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fine_texts, inner, max_size=3),
    max_leaves=4,
)
texts = st.sampled_from(["hi", "", "a\0b", "\ud800", "☃", "x" * 600]) | st.text(max_size=10)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just(10**400)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)

# Bodies: the members that each kind has.

fine_ids = st.sampled_from(["s1", "s2", "s3", "ü ☃", "%", "a+b"])
fine_objects = st.dictionaries(fine_texts, fine_values, max_size=3)
MEMBERS: dict[str, st.SearchStrategy[Any]] = {
    "session_id": fine_ids,
    "user_id": fine_ids,
    "system_prompt": fine_texts,
    "title": st.sampled_from(["T", "☃"]),
    "description": fine_texts,
    "metadata": fine_objects,
    "agent": st.sampled_from(["orchestrator", "coder"]),
    "reason": fine_texts,
    "call_id": st.sampled_from(["c1", "c2"]),
    "tool_name": st.sampled_from(["trains", "☃"]),
    "result": fine_values,
    "role": st.sampled_from(["user", "assistant", "tool", "system", "developer"]),
    "content": st.none() | fine_texts | st.lists(st.fixed_dictionaries({"type": fine_texts}), max_size=2),
    "name": st.sampled_from(["ada", "trains"]),
    "tool_calls": st.lists(st.fixed_dictionaries({"id": st.sampled_from(["c1", "c2"])}), max_size=2),
    "tool_call_id": st.sampled_from(["c1", "c2"]),
    "token_count": st.integers(0, 10),
    "created_at": st.sampled_from(["2025-01-31T12:00:00Z", "9999-12-31T23:59:59-23:59"]),
    "refusal": fine_values,
    "extra": st.dictionaries(st.sampled_from(["a", "b"]), fine_values, max_size=2),
}


@st.composite
def objects(draw: st.DrawFn, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    """An object of these members. Sometimes one of them is odd, or missing, or there is one more."""
    body = draw(
        st.fixed_dictionaries(
            {name: MEMBERS[name] for name in required}, optional={name: MEMBERS[name] for name in optional}
        )
    )
    if not draw(st.integers(0, 3)):
        name = draw(st.sampled_from([*required, *optional, "seq", "id", "☃"]))
        if draw(st.booleans()):
            body[name] = draw(values)
        else:
            body.pop(name, None)
    return body


messages = objects(
    ("role", "content"),
    ("name", "tool_calls", "tool_call_id", "token_count", "metadata", "created_at", "refusal", "extra"),
)
of_session = ("user_id", "system_prompt", "title", "description", "metadata", "agent")
BODIES: dict[str, st.SearchStrategy[Any]] = {
    "POST /v1/sessions": objects((), ("session_id", *of_session)),
    "PUT /v1/sessions/{session_id}": objects((), of_session),
    "PATCH /v1/sessions/{session_id}": objects((), ("title", "description", "metadata")),
    "POST /v1/sessions/{session_id}/messages": messages,
    "POST /v1/sessions/{session_id}/messages/batch": st.fixed_dictionaries(
        {"messages": st.lists(messages, min_size=1, max_size=3)}
    ),
    "POST /v1/sessions/{session_id}/tool-results": objects(("call_id", "tool_name", "result"), ()),
    "PATCH /v1/sessions/{session_id}/context": objects((), ("metadata",)),
    "POST /v1/sessions/{session_id}/agent": objects(("agent",), ("reason",)),
    "PUT /v1/sessions/{session_id}/documents/{collection}/{key}": often(fine_values, values),
}
NOT_JSON = [b"", b"{", b"[" * 5000, b"\xff", b'{"role":"user","content":"\xed\xa0\x80"}', b" " * (LIMIT + 1)]
SPLINTERS = [b"\xff", b"\xed\xa0\x80", b"\0", b"NaN", b"\\u0000", b"\\ud800", b"{", b'"']
odd_bodies = st.sampled_from(NOT_JSON) | st.binary(max_size=20) | values.map(lambda value: json.dumps(value).encode())

# Paths, queries and headers.

odd_segments = st.sampled_from(
    ["", "%2F", "a%2fb", "%FF", "%zz", "%00", ".", "..", "%2e%2e", "x" * 300, "batch", "pop", "1", "-1", "9" * 20]
) | st.text(st.characters(codec="utf-8"), max_size=5).map(lambda text: quote(text, safe=""))
segments = often(fine_ids.map(lambda text: quote(text, safe="")), odd_segments)
odd_numbers = st.sampled_from(["0", "-1", "1001", "x", "", "9" * 30, "1e3"]) | st.integers().map(str)
numbers = often(st.sampled_from(["1", "2", "1000"]), odd_numbers)
PARAMETERS: dict[str, st.SearchStrategy[str]] = {
    "limit": numbers,
    "after": numbers,
    "cursor": segments,
    "user_id": segments,
    "order": st.sampled_from(["asc", "desc", "up", ""]),
    "durability": st.sampled_from(["buffered", "stored", "stored", "safe", ""]),
    "unknown": segments,
    "%FF": st.just("%ff"),
}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
json_type = st.just("application/json")
odd_types = st.sampled_from(["application/merge-patch+json", "text/plain", "image/png", "\x00"])


@st.composite
def requests(draw: st.DrawFn) -> Request:
    route = draw(st.sampled_from(sorted(OPERATIONS)))
    method = draw(often(st.sampled_from(sorted(OPERATIONS[route])), st.sampled_from(METHODS)))
    path = route
    for name in ("session_id", "collection", "key", "seq"):
        usual = st.just("1") if name == "seq" else st.sampled_from(["s1", "s1", "s2"])
        path = path.replace(f"{{{name}}}", draw(often(usual, segments)))
    query = ""
    if draw(st.booleans()):
        known = [*(OPERATIONS[route][method].parameters if method in OPERATIONS[route] else ()), "unknown"]
        names = draw(st.lists(often(st.sampled_from(known), st.sampled_from(sorted(PARAMETERS))), max_size=2))
        query = "?" + "&".join(f"{name}={draw(PARAMETERS[name])}" for name in names)
    headers = {"content-type": draw(often(json_type, odd_types))} if draw(st.integers(0, 9)) else {}
    fine = BODIES.get(f"{method} {route}", st.none()).map(lambda value: json.dumps(value).encode())
    body = draw(often(fine, odd_bodies))
    if not draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.sampled_from(SPLINTERS)) + body[at:]
    cut = draw(st.integers(0, len(body)))
    return Request(method, path + query, headers, [body] if draw(st.booleans()) else [body[:cut], body[cut:]])


some = given(st.lists(requests(), min_size=10, max_size=30))
usual = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@some
@usual
async def test_whatever_comes_is_done_or_refused(requests: list[Request]) -> None:
    await done_or_refused(requests)


@pytest.mark.long
@pytest.mark.timeout(3600)
@some
@settings(usual, max_examples=5000)
async def test_whatever_comes_for_long(requests: list[Request]) -> None:
    await done_or_refused(requests)


async def done_or_refused(requests: list[Request]) -> None:
    """Make the requests, to an application of their own."""
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
        session = f"/v1/sessions/{quote(item['session_id'], safe='')}"
        assert (await app("GET", session)).json == item
        listed = (await app("GET", f"{session}/messages?limit=1000")).json["items"]
        assert len(listed) == item["message_count"]
        for target in ("history", "context"):
            assert (await app("GET", f"{session}/{target}")).status == 200
