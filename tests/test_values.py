"""What went in comes out to the letter; what could not is refused, naming the field."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_runtime import (
    InvalidInput,
    NewMessage,
    Runtime,
    SessionHandle,
)
from places import (
    KINDS,
    SHORT,
    Place,
    at_every_stage,
    everything,
    fill,
    forget_what_is_stored,
    objects,
    place_fixture,
    place_of,
    texts,
)

pytestmark = pytest.mark.anyio

Call: TypeAlias = Callable[[Runtime, SessionHandle], Awaitable[object]]

ANY: Any = object()

place = place_fixture()
memory = place_fixture(("memory",))


# --- what is refused --------------------------------------------------------------------------------------------------


SECRET = "hunter2"
LONG = "x" * 256
REFUSED: list[tuple[str, Call]] = [
    ("session_id", lambda runtime, _: runtime.create_session("")),
    ("session_id", lambda runtime, _: runtime.create_session(f"{SECRET}/x")),
    ("session_id", lambda runtime, _: runtime.create_session("..")),
    ("session_id", lambda runtime, _: runtime.create_session(LONG)),
    ("session_id", lambda runtime, _: runtime.create_session(ANY)),
    ("session_id", lambda runtime, _: runtime.get_or_create_session("")),
    ("session_id", lambda runtime, _: runtime.get_or_create_session(None)),  # type: ignore[arg-type]
    ("session_id", lambda runtime, _: runtime.get_session("\n")),
    ("user_id", lambda runtime, _: runtime.create_session("new", user_id=f"{SECRET}/")),
    ("system_prompt", lambda runtime, _: runtime.create_session("new", system_prompt=f"{SECRET}\0")),
    ("title", lambda runtime, _: runtime.create_session("new", title="x" * 501)),
    ("description", lambda runtime, _: runtime.create_session("new", description="x" * 20_001)),
    ("metadata.a", lambda runtime, _: runtime.create_session("new", metadata={"a": {SECRET}})),
    ("metadata", lambda runtime, _: runtime.get_or_create_session("new", metadata=[SECRET])),  # type: ignore[arg-type]
    ("agent", lambda runtime, _: runtime.create_session("new", agent="")),
    ("idempotency_key", lambda runtime, _: runtime.create_session("new", idempotency_key="")),
    ("user_id", lambda runtime, _: runtime.list_sessions(user_id="")),
    ("limit", lambda runtime, _: runtime.list_sessions(limit=0)),
    ("limit", lambda runtime, _: runtime.list_sessions(limit=1001)),
    ("limit", lambda runtime, _: runtime.list_sessions(limit=True)),
    ("order", lambda runtime, _: runtime.list_sessions(order="up")),  # type: ignore[arg-type]
    ("role", lambda _, session: session.append("robot", SECRET)),  # type: ignore[arg-type]
    ("role", lambda _, session: session.append([], SECRET)),  # type: ignore[arg-type]
    ("content", lambda _, session: session.append("user", f"{SECRET}\0")),
    ("content", lambda _, session: session.append("user", {"type": SECRET})),  # type: ignore[arg-type]
    ("content[0].n", lambda _, session: session.append("user", [{"n": float("inf")}])),
    ("name", lambda _, session: session.append("user", SECRET, name="")),
    ("tool_calls[0].id", lambda _, session: session.append("assistant", tool_calls=[{"name": SECRET}])),
    ("tool_call_id", lambda _, session: session.append("tool", SECRET, tool_call_id="")),
    ("token_count", lambda _, session: session.append("user", SECRET, token_count=-1)),
    ("metadata.a", lambda _, session: session.append("user", SECRET, metadata={"a": (1, 2)})),
    ("message", lambda _, session: session.append("user", "x" * (16 * 1024 * 1024))),
    ("idempotency_key", lambda _, session: session.append("user", SECRET, idempotency_key=f"{SECRET}\n")),
    ("content", lambda _, session: session.append_message({"role": "user", "content": f"{SECRET}\0"})),
    ("role", lambda _, session: session.append_message({"content": SECRET})),
    ("message", lambda _, session: session.append_message(SECRET)),  # type: ignore[arg-type]
    ("messages", lambda _, session: session.append_many([])),
    ("messages", lambda _, session: session.append_many({"role": "user"})),  # type: ignore[arg-type]
    ("messages", lambda _, session: session.append_many(SECRET)),  # type: ignore[arg-type]
    ("messages", lambda _, session: session.append_many(iter([{"role": "user"}]))),  # type: ignore[arg-type]
    ("call_id", lambda _, session: session.append_tool_result("", "f", SECRET)),
    ("tool_name", lambda _, session: session.append_tool_result("c1", "", SECRET)),
    ("result.a", lambda _, session: session.append_tool_result("c1", "f", {"a": datetime.now(UTC)})),
    ("after", lambda _, session: session.messages(after=-1)),
    ("after", lambda _, session: session.messages(after="1")),  # type: ignore[arg-type]
    ("limit", lambda _, session: session.messages(limit=0)),
    ("order", lambda _, session: session.messages(order="")),  # type: ignore[arg-type]
    ("seq", lambda _, session: session.message(-1)),
    ("limit", lambda _, session: session.history(0)),
    ("agent", lambda _, session: session.switch_agent("a\x1b")),
    ("reason", lambda _, session: session.switch_agent("coder", reason="x" * 20_001)),
    ("metadata.a", lambda _, session: session.switch_agent("coder", metadata={"a": b"x"})),
    ("metadata", lambda _, session: session.update_context(metadata=SECRET)),  # type: ignore[arg-type]
    ("title", lambda _, session: session.update(title=5)),  # type: ignore[arg-type]
    ("description", lambda _, session: session.update(description=f"{SECRET}\0")),
    ("metadata", lambda _, session: session.update(metadata=[])),  # type: ignore[arg-type]
    ("collection", lambda _, session: session.put_document("", "k", SECRET)),
    ("key", lambda _, session: session.put_document("c", "a/b", SECRET)),
    ("value.a[0]", lambda _, session: session.put_document("c", "k", {"a": [b"x"]})),
    ("media_type", lambda _, session: session.put_document("c", "k", SECRET, media_type="text/plain")),
    ("media_type", lambda _, session: session.put_document("c", "k", b"x", media_type="x" * 256)),
    ("key", lambda _, session: session.get_document("c", ".")),
    ("collection", lambda _, session: session.list_documents("c/d")),
    ("cursor", lambda _, session: session.list_documents("c", cursor="")),
    ("limit", lambda _, session: session.list_documents("c", limit=1001)),
    ("key", lambda _, session: session.delete_document("c", "")),
    ("idempotency_key", lambda _, session: session.delete(idempotency_key=LONG)),
]


async def test_what_can_not_be_kept_is_refused_naming_the_field(memory: Place) -> None:
    async with memory.open() as runtime:
        session = await runtime.create_session("s1")
        await fill(session, 2)
        before = await everything(session), runtime.watermarks
        for number, (path, call) in enumerate(REFUSED):
            with pytest.raises(InvalidInput) as caught:
                await call(runtime, session)
            assert (number, caught.value.path) == (number, path)
            assert str(caught.value) == f"{path}: {caught.value.problem}"
            assert SECRET not in str(caught.value)
        assert (await everything(session), runtime.watermarks) == before
        assert [each async for each in runtime.scan_sessions()] == [await session.record()]


async def test_a_call_that_no_budget_could_hold_is_refused(memory: Place) -> None:
    async with memory.open(write_behind={"pending_bytes_max": 65_536}) as runtime:
        session = await runtime.create_session("s1")
        with pytest.raises(InvalidInput, match="split the call") as caught:
            await session.append("user", "x" * 70_000)
        assert caught.value.path == "call"
        assert (await session.record()).message_count == 0


# --- what went in comes out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(objects, min_size=1, max_size=6), st.binary(max_size=50), texts)
@settings(SHORT, max_examples=6)
async def test_what_went_in_comes_out_to_the_letter(
    kind: str, given: list[dict[str, Any]], data: bytes, text: str
) -> None:
    async def write(runtime: Runtime) -> None:
        for number, each in enumerate(given):
            session = await runtime.create_session(f"s{number}", metadata=each, system_prompt=text, description=text)
            await session.append("user", [{"part": each}, each], metadata=each)
            await session.append("assistant", text, tool_calls=[{"id": "c", "arguments": each}])
            await session.append_many([{"role": "user", "content": text, "provider": each}])
            await session.update_context(metadata=each)
            await session.switch_agent("coder", reason=text, metadata=each)
            await session.put_document("notes", "json", each)
            await session.put_document("notes", "bytes", data, media_type="x/y")

    async def look(runtime: Runtime) -> str:
        shown = []
        for number in range(len(given)):
            session = await runtime.get_session(f"s{number}")
            record, context, [switch] = await session.record(), await session.context(), await session.switches()
            first, second, third, fourth = (await session.messages()).items
            json_document = await session.get_document("notes", "json")
            raw_document = await session.get_document("notes", "bytes")
            assert json_document is not None
            assert raw_document is not None
            assert (second.content, third.tool_calls) == (
                [{"part": given[number]}, given[number]],
                [{"id": "c", "arguments": given[number]}],
            )
            assert third.content == fourth.content == switch.reason == first.content == record.description == text
            assert (raw_document.value, raw_document.media_type) == (data, "x/y")
            shown += [
                record.metadata,
                second.metadata,
                context.metadata,
                switch.metadata,
                json_document.value,
                *[part for message in await session.history() for part in message.get("provider", {}).items()],
            ]
        return repr(shown)  # tells 1 from 1.0 and True, 0.0 from -0.0, and one order of keys from another

    expected = [part for each in given for part in (each, each, each, each, each, *each.items())]
    with TemporaryDirectory() as directory:
        assert await at_every_stage(place_of(kind, Path(directory)), write, look) == repr(expected)


async def test_changing_a_value_later_changes_nothing_that_is_kept(place: Place) -> None:
    def value() -> dict[str, Any]:
        return {"list": [1, {"deep": "x"}], "text": "x"}

    def spoil(given: Any) -> None:
        if isinstance(given, dict):
            for inner in list(given.values()):
                spoil(inner)
            given.clear()
            given["spoilt"] = True
        elif isinstance(given, (list, bytearray)):
            for inner in given:
                spoil(inner)
            given.clear()
        elif isinstance(given, msgspec.Struct):
            for name in given.__struct_fields__:
                spoil(getattr(given, name))

    async with place.open() as runtime:
        content, metadata, calls, extra = [value()], value(), [value() | {"id": "c"}], value()
        chat = {"role": "user", "content": [value()], "provider": extra}
        messages: list[Any] = [chat, NewMessage(role="user", content=[value()], extra=value())]
        raw = bytearray(b"bytes")
        document, record, context, switched = value(), value(), value(), value()
        session = await runtime.create_session("s1", metadata=record)
        await session.update(metadata=record)
        given = [content, metadata, calls, messages, raw, document, record, context, switched]
        returned = [
            await session.append("user", content, metadata=metadata),
            await session.append("assistant", tool_calls=calls, idempotency_key="k"),
            await session.append_many(messages),
            await session.append_tool_result("c", "f", document),
            await session.update_context(metadata=context),
            await session.switch_agent("coder", metadata=switched),
            await session.put_document("notes", "json", document),
            await session.put_document("notes", "raw", raw),
        ]
        before = copy.deepcopy(await everything(session, "notes"))
        assert before[0].metadata == value()
        for each in (*given, *returned):
            spoil(each)
        for _ in ("unstored", "stored", "evicted"):
            found = await everything(session, "notes")
            assert found == before
            for each in found:
                spoil(each)
            spoil((await runtime.list_sessions()).items)
            spoil(await session.append("assistant", tool_calls=[value() | {"id": "c"}], idempotency_key="k"))
            await runtime.flush()
            forget_what_is_stored(runtime)
    async with place.open() as runtime:
        assert await everything(await runtime.get_session("s1"), "notes") == before
