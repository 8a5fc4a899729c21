"""Sessions as their users see them: created, named, handed over, edited, deleted, listed; and their documents."""

from __future__ import annotations

import inspect
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import anyio
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import UNSET

from agent_runtime import (
    AgentContext,
    AgentSwitch,
    Document,
    InvalidInput,
    Message,
    NewMessage,
    Page,
    Runtime,
    RuntimeClosed,
    Session,
    SessionExists,
    SessionHandle,
    SessionNotFound,
    hookimpl,
    open_runtime,
    open_runtime_blocking,
)
from places import (
    SHORT,
    Place,
    at_every_stage,
    everything,
    forget_what_is_stored,
    in_memory,
    objects,
    place_fixture,
    texts,
)

pytestmark = pytest.mark.anyio

Call: TypeAlias = Callable[[SessionHandle], Awaitable[object]]

place = place_fixture()
memory = place_fixture(("memory",))


# --- creating ---------------------------------------------------------------------------------------------------------


async def test_a_session_begins_with_its_defaults(place: Place) -> None:
    async def look(runtime: Runtime) -> list[Any]:
        session = await runtime.get_session("s1")
        assert await session.messages() == Page([], None)
        assert await session.history() == []
        assert await session.switches() == []
        return [await session.record(), await session.context()]

    before = datetime.now(UTC)
    record, context = await at_every_stage(place, lambda runtime: runtime.create_session("s1"), look)
    assert before <= record.created_at <= datetime.now(UTC)
    assert record.created_at.tzinfo is UTC
    assert record == Session(
        session_id="s1",
        user_id=None,
        title=None,
        description=None,
        metadata={},
        created_at=record.created_at,
        last_activity=record.created_at,
        message_count=0,
        incarnation=record.incarnation,
    )
    assert context == AgentContext(
        session_id="s1",
        current_agent="orchestrator",
        switch_count=0,
        last_switch_at=None,
        metadata={},
        created_at=record.created_at,
        updated_at=record.created_at,
    )


@pytest.mark.parametrize("create", [Runtime.create_session, Runtime.get_or_create_session])
async def test_a_session_begins_with_what_is_given(place: Place, create: Any) -> None:
    given = {
        "user_id": "ada@example.org",
        "title": "Trip",
        "description": "to Porto",
        "metadata": {"z": 1, "a": [None]},
    }

    async def write(runtime: Runtime) -> None:
        session = await create(runtime, "säss ion", system_prompt="Be kind.", agent="travel agent", **given)
        assert session.created
        assert session.session_id == "säss ion"
        assert repr(session) == "<SessionHandle 'säss ion'>"

    async def look(runtime: Runtime) -> list[Any]:
        session = await runtime.get_session("säss ion")
        return [await session.record(), (await session.messages()).items, await session.context()]

    record, [message], context = await at_every_stage(place, write, look)
    assert {name: getattr(record, name) for name in given} == given
    assert list(record.metadata) == ["z", "a"]
    assert record.message_count == 1
    assert message == Message(seq=1, id=message.id, role="system", content="Be kind.", created_at=record.created_at)
    assert context.current_agent == "travel agent"
    assert context.switch_count == 0


async def test_without_an_id_a_session_gets_a_new_one(place: Place) -> None:
    async with place.open() as runtime:
        handles = [await runtime.create_session() for _ in range(20)]
        ids = [handle.session_id for handle in handles]
        assert len(set(ids)) == 20
        assert all(uuid.UUID(each).version == 7 for each in ids)
        assert await (await runtime.get_session(ids[3])).record() == await handles[3].record()


async def test_a_taken_id_is_refused_wherever_the_session_is(place: Place) -> None:
    async def look(runtime: Runtime) -> list[Any]:
        accepted = runtime.watermarks.accepted
        with pytest.raises(SessionExists, match="'s1' exists already") as caught:
            await runtime.create_session("s1", title="other")
        assert caught.value.session_id == "s1"
        assert runtime.watermarks.accepted == accepted
        same = await runtime.get_or_create_session("s1", title="other", agent="other")
        assert not same.created
        assert same.incarnation == (await runtime.get_session("s1")).incarnation
        assert runtime.watermarks.accepted == accepted
        return await everything(same)

    [record, *_] = await at_every_stage(place, lambda runtime: runtime.create_session("s1", title="first"), look)
    assert record.title == "first"


@pytest.mark.parametrize("exist_ok", [True, False])
async def test_of_50_who_create_one_session_one_does(place: Place, exist_ok: bool) -> None:
    handles: list[SessionHandle] = []
    refused: list[SessionExists] = []
    async with place.open() as runtime:

        async def create(number: int) -> None:
            call = runtime.get_or_create_session if exist_ok else runtime.create_session
            try:
                handles.append(await call("s1", system_prompt=f"of caller {number}", durability="stored"))
            except SessionExists as error:
                refused.append(error)

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(create, number)
        assert (len(handles), len(refused)) == ((50, 0) if exist_ok else (1, 49))
        assert len({handle.incarnation for handle in handles}) == 1
        assert sum(handle.created for handle in handles) == 1
        assert runtime.watermarks.accepted == 1
        assert len((await handles[0].messages()).items) == 1


async def test_there_is_no_session_that_was_not_created(place: Place) -> None:
    async with place.open() as runtime:
        for _ in range(2):  # from the database, then from memory
            with pytest.raises(SessionNotFound, match="there is no session 'nobody'") as caught:
                await runtime.get_session("nobody")
            assert caught.value.session_id == "nobody"
        assert await runtime.create_session("nobody")
        assert await runtime.get_session("nobody")


# --- titles -----------------------------------------------------------------------------------------------------------


parts = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, texts),
    st.sampled_from([{"type": "image_url", "image_url": {"url": "x"}}, {"text": 5}, {}]),
)
openings = st.lists(
    st.builds(
        NewMessage,
        role=st.sampled_from(["user", "user", "assistant", "system", "developer"]),
        content=st.none() | texts | st.just(" \n") | texts.map(lambda text: text * 60) | st.lists(parts, max_size=3),
    ),
    min_size=1,
    max_size=5,
)


def title_of(messages: Sequence[NewMessage]) -> str | None:
    for message in messages:
        text = message.content or ""
        if isinstance(text, list):
            text = " ".join(part["text"] for part in text if isinstance(part.get("text"), str))
        if message.role == "user" and text.strip():
            return text[:500]
    return None


@given(openings)
@example([NewMessage(role="user", content=" \n"), NewMessage(role="user", content="hi")])
@SHORT
async def test_the_first_text_of_a_user_is_the_title(messages: list[NewMessage]) -> None:
    async with in_memory().open() as runtime:
        at_once, one_by_one = await runtime.create_session("a"), await runtime.create_session("b")
        await at_once.append_many(messages)
        for message in messages:
            await one_by_one.append_many([message])
        for session in (at_once, one_by_one):
            assert (await session.record()).title == title_of(messages)


async def test_a_title_that_is_there_stays_until_it_is_removed(memory: Place) -> None:
    async with memory.open() as runtime:
        session = await runtime.create_session("s1", title="")
        await session.append("user", "hi")
        assert (await session.record()).title == ""
        await session.update(title=None)
        assert (await session.record()).title is None
        await session.append("user", "é" * 501)
        assert (await session.record()).title == "é" * 500


# --- the agent --------------------------------------------------------------------------------------------------------


async def test_switching_hands_the_session_over_and_records_it(place: Place) -> None:
    contexts: list[AgentContext] = []

    async def write(runtime: Runtime) -> None:
        session = await runtime.create_session("s1")
        contexts.append(await session.update_context(metadata={"b": 1, "a": 2}))
        contexts.append(await session.switch_agent("coder", reason="code", metadata={"why": [1]}))
        contexts.append(await session.switch_agent("coder", reason="to itself"))
        contexts.append(await session.switch_agent("orchestrator"))
        contexts.append(await session.update_context(metadata={}))
        assert runtime.watermarks.accepted == 5

    async def look(runtime: Runtime) -> list[Any]:
        session = await runtime.get_session("s1")
        return [await session.context(), *await session.switches()]

    context, *switches = await at_every_stage(place, write, look)
    first, second, third, fourth, fifth = contexts
    assert list(first.metadata) == ["b", "a"]
    assert (first.current_agent, first.switch_count, first.last_switch_at) == ("orchestrator", 0, None)
    assert (second.current_agent, second.switch_count, second.metadata) == ("coder", 1, first.metadata)
    assert second.last_switch_at == second.updated_at > first.updated_at
    assert third == second
    assert (fourth.current_agent, fourth.switch_count) == ("orchestrator", 2)
    assert fifth == context
    assert (context.metadata, context.last_switch_at) == ({}, fourth.last_switch_at)
    assert second.last_switch_at is not None
    assert fourth.last_switch_at is not None
    assert switches == [
        AgentSwitch(
            from_agent="orchestrator",
            to_agent="coder",
            reason="code",
            switched_at=second.last_switch_at,
            metadata={"why": [1]},
        ),
        AgentSwitch(
            from_agent="coder", to_agent="orchestrator", reason=None, switched_at=fourth.last_switch_at, metadata=None
        ),
    ]


# --- the record -------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "title": st.none() | texts,
                "description": st.none() | texts,
                "metadata": st.none() | objects,
            },
        ),
        max_size=4,
    )
)
@SHORT
async def test_an_update_replaces_what_is_given_and_nothing_else(updates: list[dict[str, Any]]) -> None:
    expected = {"title": "t", "description": "d", "metadata": {"m": 1}}

    async def write(runtime: Runtime) -> None:
        session = await runtime.create_session("s1", **expected)  # type: ignore[arg-type]
        for update in updates:
            record = await session.update(**update)
            expected.update(update)
            expected["metadata"] = expected["metadata"] or {}
            assert record == await session.record()

    async def look(runtime: Runtime) -> dict[str, Any]:
        record = await (await runtime.get_session("s1")).record()
        return {name: getattr(record, name) for name in expected}

    assert repr(await at_every_stage(in_memory(), write, look)) == repr(expected)


RFC_7396 = [  # section 3 and appendix A, as far as both are objects
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    (
        {"title": "Goodbye!", "author": {"givenName": "John", "familyName": "Doe"}, "tags": ["a"], "content": "x"},
        {"title": "Hello!", "phoneNumber": "+01", "author": {"familyName": None}, "tags": ["b"]},
        {"title": "Hello!", "author": {"givenName": "John"}, "tags": ["b"], "content": "x", "phoneNumber": "+01"},
    ),
]


@pytest.mark.parametrize(("target", "patch", "merged"), RFC_7396)
async def test_a_merge_patches_metadata(memory: Place, target: Any, patch: Any, merged: Any) -> None:
    async with memory.open() as runtime:
        session = await runtime.create_session("s1", title="t", description="d", metadata=target)
        await session.update_context(metadata=target)
        record = await session.merge({"metadata": patch})
        assert record == await session.record()
        assert (record.title, record.description) == ("t", "d")
        context = await session.merge_context(patch)
        assert context == await session.context()
        assert repr(record.metadata) == repr(context.metadata) == repr(merged)


async def test_a_merge_patches_the_record(memory: Place) -> None:
    async with memory.open() as runtime:
        session = await runtime.create_session("s1", title="t", description="d", metadata={"a": 1})
        record = await session.merge({"title": None, "description": "e"})
        assert (record.title, record.description, record.metadata) == (None, "e", {"a": 1})
        record = await session.merge({"metadata": None, "title": "u"})
        assert (record.title, record.description, record.metadata) == ("u", "e", {})
        accepted = runtime.watermarks.accepted
        refused: list[tuple[str, dict[str, Any]]] = [
            ("titel", {"title": "x", "titel": "x"}),
            ("title", {"title": 5, "description": "x"}),
            ("description", {"title": "x", "description": []}),
            ("metadata", {"title": "x", "metadata": []}),
            ("metadata.a[0]", {"title": "x", "metadata": {"a": [(1,)]}}),
        ]
        for path, patch in refused:
            with pytest.raises(InvalidInput) as caught:
                await session.merge(patch)
            assert caught.value.path == path
        with pytest.raises(InvalidInput) as caught:
            await session.merge_context({"a": float("nan")})
        assert caught.value.path == "metadata.a"
        assert await session.record() == record
        assert runtime.watermarks.accepted == accepted


async def test_merges_of_one_moment_all_count(place: Place) -> None:
    async with place.open() as runtime:
        session = await runtime.create_session("s1")
        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(session.merge, {"metadata": {str(number): number}})
                tasks.start_soon(session.merge_context, {str(number): number})
        expected = {str(number): number for number in range(50)}
        assert (await session.record()).metadata == (await session.context()).metadata == expected


async def test_a_context_is_changed_by_what_a_function_makes_of_it(place: Place) -> None:
    def added(context: dict[str, Any]) -> dict[str, Any]:
        context["sum"] = context.get("sum", 0) + 1
        return context

    async with place.open() as runtime:
        session = await runtime.create_session("s1")
        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(session.change_context, added)
                tasks.start_soon(session.merge_context, {str(number): None})
        changed = await session.change_context(lambda context: {**context, "null": None, "inner": {"a": 1}})
        assert changed.metadata == {"sum": 50, "null": None, "inner": {"a": 1}}
        assert (await session.change_context(lambda context: {"inner": {}})).metadata == {"inner": {}}
        accepted = runtime.watermarks.accepted
        with pytest.raises(KeyError):
            await session.change_context(lambda context: {"x": context["nothing"]})
        with pytest.raises(InvalidInput) as caught:
            await session.change_context(lambda context: {"x": float("nan")})
        assert caught.value.path == "metadata.x"
        assert runtime.watermarks.accepted == accepted
    async with place.open() as runtime:
        assert (await (await runtime.get_session("s1")).context()).metadata == {"inner": {}}


async def test_unset_is_not_given(memory: Place) -> None:
    async with memory.open() as runtime:
        session = await runtime.create_session("s1", title="t", description="d", metadata={"m": 1})
        record = await session.update(title=UNSET, description=UNSET, metadata=UNSET)
        assert (record.title, record.description, record.metadata) == ("t", "d", {"m": 1})


async def test_any_mapping_is_metadata(memory: Place) -> None:
    frozen = MappingProxyType({"b": 1, "a": {}})
    async with memory.open() as runtime:
        session = await runtime.create_session("s1", metadata=frozen)
        await session.update_context(metadata=frozen)
        assert (await session.record()).metadata == (await session.context()).metadata == frozen


async def test_every_change_is_an_activity(memory: Place) -> None:
    async with memory.open() as runtime:
        session = await runtime.create_session("s1")
        record = await session.record()
        changes: list[Awaitable[object]] = [
            session.append("user", "hi"),
            session.append_many([{"role": "user"}]),
            session.append_tool_result("c", "f", 1),
            session.pop(),
            session.clear(),
            session.update(description="d"),
            session.switch_agent("coder"),
            session.update_context(metadata={"a": 1}),
            session.merge({"title": "t"}),
            session.merge_context({"b": 1}),
            session.put_document("c", "k", 1),
            session.delete_document("c", "k"),
        ]
        for change in changes:
            await anyio.sleep(0.000_01)
            await change
            later = await session.record()
            assert later.last_activity > record.last_activity
            assert (later.created_at, later.incarnation) == (record.created_at, record.incarnation)
            record = later


# --- documents --------------------------------------------------------------------------------------------------------


async def test_documents_are_json_or_bytes_by_key(place: Place) -> None:
    put: list[Document] = []

    async def write(runtime: Runtime) -> None:
        session = await runtime.create_session("s1")
        await session.put_document("notes", "a", "replaced")
        put.append(await session.put_document("notes", "a", {"z": 1, "a": [1.0, None]}))
        put.append(await session.put_document("notes", "b", None))
        put.append(await session.put_document("notes", "c", b"\0\xff", media_type="image/png"))
        put.append(await session.put_document("notes", "d", bytearray(b"")))
        put.append(await session.put_document("notes", "é", memoryview(b"abc")[::2]))
        await session.put_document("notes", "gone", 1)
        assert await session.delete_document("notes", "gone") is True
        assert await session.delete_document("notes", "gone") is False
        await session.put_document("other", "a", "of another collection")

    async def look(runtime: Runtime) -> list[Document]:
        session = await runtime.get_session("s1")
        for key in ("gone", "never"):
            assert await session.get_document("notes", key) is None
        assert await session.get_document("nothing", "a") is None
        assert await session.list_documents("nothing") == Page([], None)
        documents = (await session.list_documents("notes")).items
        for document in documents:
            assert await session.get_document("notes", document.key) == document
        for limit in (1, 2, 5):
            left, cursor = documents, None
            while left:
                page = await session.list_documents("notes", cursor=cursor, limit=limit)
                assert page.items == left[:limit]
                left = left[limit:]
                assert page.next == (page.items[-1].key if left else None)
                cursor = page.next
        assert (await session.list_documents("notes", cursor="bb")).items == documents[2:]
        return documents

    assert await at_every_stage(place, write, look) == put
    assert [(document.key, document.value, document.media_type) for document in put] == [
        ("a", {"z": 1, "a": [1.0, None]}, None),
        ("b", None, None),
        ("c", b"\0\xff", "image/png"),
        ("d", b"", "application/octet-stream"),
        ("é", b"ac", "application/octet-stream"),
    ]
    assert list(put[0].value) == ["z", "a"]


# --- deleting ---------------------------------------------------------------------------------------------------------


EVERY_CALL: list[Call] = [
    lambda handle: handle.append("user", "too late"),
    lambda handle: handle.append_message({"role": "user"}),
    lambda handle: handle.append_json({"role": "user"}),
    lambda handle: handle.append_many([{"role": "user"}]),
    lambda handle: handle.append_tool_result("c", "f", 1),
    lambda handle: handle.pop(),
    lambda handle: handle.clear(),
    lambda handle: handle.record(),
    lambda handle: handle.update(title="too late"),
    lambda handle: handle.merge({"title": "too late"}),
    lambda handle: handle.delete(),
    lambda handle: handle.messages(),
    lambda handle: handle.messages(order="desc", after=1),
    lambda handle: handle.message(0),
    lambda handle: handle.message(1),
    lambda handle: handle.history(),
    lambda handle: handle.history(1),
    lambda handle: handle.history_json(),
    lambda handle: handle.context(),
    lambda handle: handle.switches(),
    lambda handle: handle.switch_agent("late"),
    lambda handle: handle.switch_agent("coder"),
    lambda handle: handle.update_context(metadata={}),
    lambda handle: handle.merge_context({}),
    lambda handle: handle.change_context(lambda context: context),
    lambda handle: handle.put_document("c", "k", 1),
    lambda handle: handle.get_document("c", "k"),
    lambda handle: handle.list_documents("c"),
    lambda handle: handle.delete_document("c", "k"),
    lambda handle: handle.delete_document("c", "nothing"),
    lambda handle: handle.request_approval("c", "f", {}),
    lambda handle: handle.approvals(),
    lambda handle: handle.approval("nothing"),
    lambda handle: handle.decide_approval("nothing", "approve"),
]


def test_every_call_is_tried() -> None:
    names = {name for call in EVERY_CALL for name in call.__code__.co_names}
    methods = inspect.getmembers(SessionHandle, inspect.isfunction)
    assert names == {name for name, _ in methods if not name.startswith("_")} - {"scan_messages"}


@pytest.mark.parametrize("recreated", [False, True])
async def test_a_handle_of_a_deleted_session_finds_nothing(place: Place, recreated: bool) -> None:
    async with place.open() as runtime:
        session = await runtime.create_session("s1", user_id="ada", system_prompt="first")
        await session.append("user", "hi")
        await session.switch_agent("coder")
        await session.put_document("c", "k", 1)
        await runtime.flush()
        stale = [session, await runtime.get_session("s1")]
        await session.delete()
        fresh = await runtime.create_session("s1") if recreated else None
        for _ in ("unstored", "stored", "evicted"):
            for number, call in enumerate(EVERY_CALL):
                with pytest.raises(SessionNotFound) as caught:
                    await call(stale[number % 2])
                assert caught.value.session_id == "s1"
            with pytest.raises(SessionNotFound):
                [message async for message in session.scan_messages()]
            await runtime.flush()
            forget_what_is_stored(runtime)
        if fresh is not None:
            assert fresh.incarnation != session.incarnation
            assert (await fresh.context()).current_agent == "orchestrator"
            assert await fresh.messages() == Page([], None)
            assert await fresh.switches() == []
            assert await fresh.get_document("c", "k") is None
            assert (await fresh.append("user", "anew")).seq == 1
        assert [each.user_id async for each in runtime.scan_sessions()] == ([None] if recreated else [])
    async with place.open() as runtime:
        if recreated:
            [message] = (await (await runtime.get_session("s1")).messages()).items
            assert message.content == "anew"
        else:
            with pytest.raises(SessionNotFound):
                await runtime.get_session("s1")
            assert (await runtime.list_sessions()).items == []


async def test_a_session_lives_many_times_in_one_batch(place: Place) -> None:
    async with place.open() as runtime:
        for number in range(5):
            session = await runtime.create_session("s1", system_prompt=f"life {number}")
            await session.append("user", "hi")
            if number < 4:
                await session.delete()
        await runtime.flush()
    async with place.open() as runtime:
        messages = (await (await runtime.get_session("s1")).messages()).items
        assert [(message.seq, message.content) for message in messages] == [(1, "life 4"), (2, "hi")]


# --- lists ------------------------------------------------------------------------------------------------------------


async def test_lists_give_the_sessions_of_a_user_in_order_of_creation(place: Place) -> None:
    async def write(runtime: Runtime) -> None:
        for number, user_id in enumerate(["ada", "bob", None, "ada", "bob", "ada", None]):
            await runtime.create_session(f"s{number}", user_id=user_id)
        await (await runtime.get_session("s0")).append("user", "an activity moves nothing")
        await (await runtime.get_session("s4")).delete()

    async def look(runtime: Runtime) -> list[Session]:
        records = [await (await runtime.get_session(f"s{number}")).record() for number in (0, 1, 2, 3, 5, 6)]
        for user_id in (None, "ada", "bob", "nobody"):
            mine = [record for record in records if user_id in (None, record.user_id)]
            assert [record async for record in runtime.scan_sessions(user_id=user_id)] == mine
            assert [record async for record in runtime.scan_sessions(user_id=user_id, order="desc")] == mine[::-1]
            assert await runtime.list_sessions(user_id=user_id) == Page(mine[::-1], None)
            for order, expected in (("asc", mine), ("desc", mine[::-1])):
                for limit in (1, 2, len(mine) or 1):
                    left, cursor = expected, None
                    while True:
                        page = await runtime.list_sessions(
                            user_id=user_id,
                            limit=limit,
                            cursor=cursor,
                            order=order,  # type: ignore[arg-type]
                        )
                        assert page.items == left[:limit]
                        left, cursor = left[limit:], page.next
                        assert (cursor is None) == (not left)
                        if cursor is None:
                            break
        return records

    await at_every_stage(place, write, look)


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_paging_misses_and_repeats_no_session_that_stays(place: Place, order: Any) -> None:
    async with place.open() as runtime:
        for number in range(8):
            await runtime.create_session(f"s{number}")
        await runtime.flush()
        ids, cursor = [], None
        for step in range(100):
            page = await runtime.list_sessions(limit=2, cursor=cursor, order=order)
            ids += [record.session_id for record in page.items]
            if page.next is None:
                break
            cursor = page.next
            if step == 0:  # of those that were given, of those to come, the one that the cursor names; and new ones
                for session_id in (ids[0], ids[1], "s5"):
                    await (await runtime.get_session(session_id)).delete()
                await (await runtime.get_session("s3")).append("user", "an activity moves nothing")
                await runtime.create_session("new")
            if step == 1:
                await runtime.flush()
        expected = [f"s{number}" for number in range(8) if number != 5]
        assert ids == ([*expected, "new"] if order == "asc" else expected[::-1])


def cursor_of(*content: object) -> str:
    return urlsafe_b64encode(msgspec.json.encode(content)).decode().rstrip("=")


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "é",
        "not a cursor",
        5,
        b"x",
        cursor_of(),
        cursor_of("2024-05-01T10:00:00Z"),
        cursor_of("2024-05-01T10:00:00", "no time zone"),
        cursor_of("1824-05-01T10:00:00Z", "too early"),
        cursor_of("2024-05-01T10:00:00Z", "a\0"),
        cursor_of("2024-05-01T10:00:00Z", 5),
        cursor_of("yesterday", "x"),
    ],
)
async def test_a_cursor_that_no_list_gave_is_refused(memory: Place, cursor: Any) -> None:
    async with memory.open() as runtime:
        with pytest.raises(InvalidInput, match=r"^cursor: is not one that a list gave") as caught:
            await runtime.list_sessions(cursor=cursor)
        assert caught.value.path == "cursor"


async def test_a_cursor_with_another_offset_is_the_same_time(place: Place) -> None:
    async with place.open() as runtime:
        await runtime.create_session("s1")
        await runtime.flush()
        page = await runtime.list_sessions(order="asc", cursor=cursor_of("2024-05-01T10:00:00+02:00", "x"))
        assert [record.session_id for record in page.items] == ["s1"]


# --- the end ----------------------------------------------------------------------------------------------------------


async def test_a_closed_runtime_says_so(place: Place) -> None:
    async with place.open() as runtime:
        session = await runtime.create_session("s1")
    calls: list[Awaitable[object]] = [
        *[call(session) for call in EVERY_CALL],
        runtime.create_session("s2"),
        runtime.create_session(),
        runtime.get_or_create_session("s1"),
        runtime.get_session("s1"),
        runtime.list_sessions(),
        runtime.flush(),
        runtime.quarantine.entries(),
        runtime.quarantine.replay("s1"),
        runtime.quarantine.drop("s1"),
    ]
    for call in calls:
        with pytest.raises(RuntimeClosed, match="the runtime is closed"):
            await call
    with place.open_blocking() as blocking:
        handle = blocking.get_session("s1")
    blocking_calls: list[Callable[[], object]] = [
        handle.record,
        lambda: handle.append("user", "hi"),
        blocking.flush,
        blocking.status,
        lambda: blocking.watermarks,
        blocking.list_sessions,
        blocking.quarantine.entries,
    ]
    for blocking_call in blocking_calls:
        with pytest.raises(RuntimeClosed, match="the runtime is closed"):
            blocking_call()


@pytest.mark.parametrize("wrong", [None, Path("a.db"), {"storage": {"url": "memory:"}}])
async def test_what_is_neither_a_url_nor_a_configuration_opens_nothing(wrong: Any) -> None:
    with pytest.raises(InvalidInput, match=rf"config: must be a URL or a Config, .* not {type(wrong).__name__}"):
        async with open_runtime(wrong):
            raise AssertionError
    with pytest.raises(InvalidInput, match="config: must be a URL"), open_runtime_blocking(wrong):
        raise AssertionError


async def test_a_call_from_the_event_loop_of_another_thread_is_refused_and_changes_nothing(
    memory: Place, anyio_backend_name: str
) -> None:
    async with memory.open() as runtime:
        session = await runtime.create_session("s1")
        before = await everything(session)
        calls: list[Callable[[], Awaitable[object]]] = [
            *[partial(call, session) for call in EVERY_CALL],
            partial(runtime.create_session, "s2"),
            runtime.create_session,
            partial(runtime.get_or_create_session, "s1"),
            partial(runtime.get_session, "s1"),
            runtime.list_sessions,
            runtime.flush,
            runtime.quarantine.entries,
        ]

        async def refused() -> None:
            for call in calls:
                with pytest.raises(RuntimeError, match=r"another thread .* open_runtime_blocking"):
                    await call()

        await anyio.to_thread.run_sync(partial(anyio.run, refused, backend=anyio_backend_name))
        assert await everything(session) == before


async def test_an_error_inside_comes_out_as_it_is_and_loses_nothing(place: Place) -> None:
    with pytest.raises(ZeroDivisionError):
        async with place.open() as runtime:
            await runtime.create_session("s1")
            raise ZeroDivisionError
    async with place.open() as runtime:
        assert await runtime.get_session("s1")


async def test_plugins_see_the_system_prompt_too() -> None:
    class Redaction:
        @hookimpl
        def agent_runtime_before_append(self, message: NewMessage) -> NewMessage:
            return msgspec.structs.replace(message, content=str(message.content).replace("secret", "***"))

    async with open_runtime("memory:", plugins=[Redaction()]) as runtime:
        session = await runtime.create_session("s", system_prompt="the secret plan")
        assert await session.history() == [{"role": "system", "content": "the *** plan"}]
