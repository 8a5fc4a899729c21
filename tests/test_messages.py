"""Messages as their users see them: appended, taken away, read page by page and as a history."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_runtime import (
    InvalidInput,
    Message,
    NewMessage,
    Page,
    Runtime,
    SessionHandle,
    StorageUnavailable,
)
from agent_runtime.storage import Snapshot
from places import (
    SHORT,
    Place,
    at_every_stage,
    everything,
    fill,
    forget,
    forget_what_is_stored,
    in_file,
    in_memory,
    place_fixture,
)
from writes import WRITES, begin

pytestmark = pytest.mark.anyio

place = place_fixture()
memory = place_fixture(("memory",))


async def test_a_database_that_shows_what_was_before_is_not_read(place: Place) -> None:
    """As one does that is asked at a replica, or through a pool that keeps transactions open."""
    async with place.open() as runtime:
        session = await runtime.create_session("s1", durability="stored")
        storage = runtime._door.storage
        async with storage.snapshot() as before:
            await session.append("user", "hi", durability="stored")
            forget(runtime)

            @asynccontextmanager
            async def lagging(**_: object) -> AsyncIterator[Snapshot]:
                yield before

            with patch.object(storage, "snapshot", lagging):
                for read in (session.messages, session.history, runtime.list_sessions):
                    with pytest.raises(StorageUnavailable, match="answers from 1, 2 is stored already"):
                        await read()
        assert len((await session.messages()).items) == 1


# --- appending --------------------------------------------------------------------------------------------------------


async def test_a_message_comes_back_as_it_was_appended(place: Place) -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    appended: list[Message] = []

    async def write(runtime: Runtime) -> None:
        session = await runtime.create_session("s1")
        appended.append(await session.append("developer", "Be brief."))
        appended.append(await session.append("assistant", tool_calls=calls, name="coder", token_count=7))
        appended.append(await session.append("tool", "42", tool_call_id="c1", name="f", metadata={"ms": 1.50}))
        appended.append(await session.append("user", [{"type": "text", "text": "hi"}], token_count=0, metadata={}))
        appended.append(await session.append("user", ""))
        appended.append(await session.append("assistant"))
        appended.append(await session.append("user", []))

    async def look(runtime: Runtime) -> list[Message]:
        session = await runtime.get_session("s1")
        assert (await session.record()).message_count == 7
        return (await session.messages()).items

    before = datetime.now(UTC)
    assert await at_every_stage(place, write, look) == appended
    assert [message.seq for message in appended] == [1, 2, 3, 4, 5, 6, 7]
    assert all(uuid.UUID(message.id).version == 7 for message in appended)
    assert all(before <= message.created_at <= datetime.now(UTC) for message in appended)
    first, second, third, fourth, fifth, sixth, seventh = appended
    assert first == Message(seq=1, id=first.id, role="developer", content="Be brief.", created_at=first.created_at)
    assert (second.content, second.tool_calls, second.name, second.token_count) == (None, calls, "coder", 7)
    assert (third.tool_call_id, third.name, third.metadata) == ("c1", "f", {"ms": 1.5})
    assert (fourth.content, fourth.token_count, fourth.metadata) == ([{"type": "text", "text": "hi"}], 0, {})
    assert [message.content for message in (fifth, sixth, seventh)] == ["", None, []]


async def test_a_message_is_told_as_the_json_that_is_kept(memory: Place) -> None:
    async with memory.open() as runtime:
        session = await runtime.create_session("s1")
        chats: list[dict[str, Any]] = [{"role": "user", "content": "é\n"}, {"role": "tool", "name": "f", "x": [1.5]}]
        for number, chat in enumerate(chats, 1):
            text = await session.append_json(chat)
            message = await session.message(number)
            assert message is not None
            assert message.to_chat() == {"content": None, **chat}
            assert text == msgspec.json.encode(message)


async def test_many_messages_are_one_change_and_keep_what_they_have(place: Place) -> None:
    at = datetime(2024, 5, 1, 12, 0, 0, 250, tzinfo=timezone(timedelta(hours=2)))
    given: list[Any] = [
        {"role": "assistant", "content": None, "refusal": "no", "annotations": [{"b": 1, "a": 2}], "id": "m1"},
        MappingProxyType({"role": "user", "content": "hi", "created_at": "2024-05-01T10:00:00Z", "token_count": 3}),
        NewMessage(role="user", content="ho", id="m1", created_at=at, extra={"x": None}),
    ]
    appended: list[Message] = []

    async def write(runtime: Runtime) -> None:
        session = await runtime.create_session("s1")
        appended.extend(await session.append_many(given))
        assert runtime.watermarks.accepted == 2

    async def look(runtime: Runtime) -> list[Any]:
        session = await runtime.get_session("s1")
        return [*(await session.messages()).items, await session.history()]

    *messages, history = await at_every_stage(place, write, look)
    assert messages == appended
    assert [message.seq for message in messages] == [1, 2, 3]
    assert [message.id for message in messages] == ["m1", messages[1].id, "m1"]
    assert messages[0].extra == {"refusal": "no", "annotations": [{"b": 1, "a": 2}]}
    assert messages[1].created_at == datetime(2024, 5, 1, 10, tzinfo=UTC)
    assert messages[1].token_count == 3
    assert messages[2].created_at == at
    assert messages[2].created_at.tzinfo is UTC
    assert history == [
        {"role": "assistant", "content": None, "refusal": "no", "annotations": [{"b": 1, "a": 2}]},
        {"role": "user", "content": "hi"},
        {"role": "user", "content": "ho", "x": None},
    ]


BAD_MESSAGES: list[tuple[Any, str]] = [
    ({"content": "hi"}, ".role"),
    ({"role": "usr", "content": "hi"}, ".role"),
    ({"role": "user", "content": 5}, ".content"),
    ({"role": "user", "content": "a\0"}, ".content"),
    ({"role": "user", "content": ["hi"]}, ".content[0]"),
    ({"role": "user", "content": "hi", "metadata": {"a": {"b": [float("nan")]}}}, ".metadata.a.b[0]"),
    ({"role": "user", "content": "hi", "seq": 3}, ".seq"),
    ({"role": "assistant", "tool_calls": [{"function": {}}]}, ".tool_calls[0].id"),
    ({"role": "user", "content": "hi", "x": b"bytes"}, ".extra.x"),
    ({"role": "user", "content": "hi", "created_at": datetime(2024, 5, 1)}, ".created_at"),  # noqa: DTZ001
    (NewMessage(role="user", content="\ud800"), ".content"),
    (NewMessage(role="user", token_count=-1), ".token_count"),
    ("hi", ""),
]


@given(index=st.integers(0, 4), bad=st.sampled_from(BAD_MESSAGES))
@SHORT
async def test_many_messages_are_appended_all_or_none(index: int, bad: tuple[Any, str]) -> None:
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        await fill(session, 2)
        before = await everything(session), runtime.watermarks
        messages: list[Any] = [{"role": "user", "content": f"good {number}"} for number in range(4)]
        messages.insert(index, bad[0])
        with pytest.raises(InvalidInput) as caught:
            await session.append_many(messages)
        assert caught.value.path == f"messages[{index}]{bad[1]}"
        assert (await everything(session), runtime.watermarks) == before


async def test_a_tool_result_is_text_or_becomes_json(memory: Place) -> None:
    results: list[tuple[Any, str]] = [
        ("as it is", "as it is"),
        ("", ""),
        ({"b": [1, 2.0, None], "a": "é"}, '{"b":[1,2.0,null],"a":"é"}'),
        (None, "null"),
        (False, "false"),
        (10**30, "1" + "0" * 30),
    ]
    async with memory.open() as runtime:
        session = await runtime.create_session("s1")
        for result, content in results:
            message = await session.append_tool_result("c1", "search", result)
            assert (message.role, message.content, message.name, message.tool_call_id) == (
                "tool",
                content,
                "search",
                "c1",
            )
        assert [message.content for message in (await session.messages()).items] == [text for _, text in results]


# --- taking away ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
async def test_pop_gives_the_newest_and_no_seq_is_used_again(place: Place, stored: bool) -> None:
    async def settle(runtime: Runtime) -> None:
        if stored:
            await runtime.flush()
            forget(runtime)

    async with place.open() as runtime:
        session = await runtime.create_session("s1")
        assert await session.pop() is None
        first, second, third = await fill(session, 3)
        await settle(runtime)
        assert await session.pop() == third
        await settle(runtime)
        assert await session.pop() == second
        assert (await session.messages()).items == [first]
        assert (await session.record()).message_count == 1
        assert (await session.append("user", "next")).seq == 4
        await settle(runtime)
        await session.clear()
        assert await session.messages() == Page([], None)
        assert await session.history() == []
        assert (await session.record()).message_count == 0
        assert await session.pop() is None
        await settle(runtime)
        assert await session.messages() == Page([], None)
    async with place.open() as runtime:
        session = await runtime.get_session("s1")
        assert await session.pop() is None
        assert (await session.append("user", "after the reopen")).seq == 5
        assert (await session.record()).message_count == 1


async def test_what_changes_nothing_is_no_change(memory: Place) -> None:
    async with memory.open() as runtime:
        session = await runtime.create_session("s1")
        context = await session.switch_agent("coder")
        before = await everything(session), runtime.watermarks
        assert await session.pop() is None
        await session.clear()
        assert await session.switch_agent("coder", reason="again", metadata={"a": 1}) == context
        assert not await session.delete_document("notes", "nothing")
        await runtime.get_or_create_session("s1")
        assert (await everything(session), runtime.watermarks) == before


# --- reading messages -------------------------------------------------------------------------------------------------


async def take(session: SessionHandle, step: str | int, there: list[Message]) -> None:
    """Take a step (a number: append so many messages); `there` is what there is after it."""
    if isinstance(step, int):
        there += await fill(session, step)
    elif step == "pop":
        assert await session.pop() == (there.pop() if there else None)
    else:
        await session.clear()
        there.clear()


async def check_every_page(runtime: Runtime, there: list[Message]) -> None:
    """Page through all messages of `s1` in every way, each from the database if nothing is unstored."""
    session = await runtime.get_session("s1")
    assert (await session.record()).message_count == len(there)
    for order, expected in (("asc", there), ("desc", there[::-1])):
        for limit in (1, 3, len(there) or 1, 1000):
            left, after = expected, None
            forget_what_is_stored(runtime)
            while True:
                page = await session.messages(after=after, limit=limit, order=order)  # type: ignore[arg-type]
                assert page.items == left[:limit]
                left = left[limit:]
                assert page.next == (page.items[-1].seq if left else None)
                if not left:
                    break
                after = page.next
    for seq in range((there[-1].seq if there else 0) + 2):
        if seq % 5 == 0:
            forget_what_is_stored(runtime)
        assert await session.message(seq) == next((message for message in there if message.seq == seq), None)
        behind = [message for message in there if message.seq > seq]
        assert [message async for message in session.scan_messages(after=seq)] == behind


async def check_pages(place: Place, steps: Sequence[str | int]) -> None:
    """Take the steps; then page through what there is while the last are unstored, then stored, then reopened."""
    there: list[Message] = []
    async with place.open(residents={"tail_messages": 2}) as runtime:
        session = await runtime.create_session("s1")
        for step in steps:
            if step == "store":
                await runtime.flush()
                forget(runtime)
            else:
                await take(session, step, there)
        await check_every_page(runtime, there)
        await runtime.flush()
        await check_every_page(runtime, there)
    async with place.open() as runtime:
        await check_every_page(runtime, there)


@given(st.lists(st.sampled_from(["store", "pop", "clear"]) | st.integers(1, 9), min_size=1, max_size=9))
@example([7, "store", "pop", "pop", 1, "pop"])
@example([7, "store", "clear", 2, "store", "pop", 1])
@SHORT
async def test_pages_give_every_message_once_in_order(steps: list[str | int]) -> None:
    await check_pages(in_memory(), steps)


async def test_pages_of_a_file_give_every_message_once_in_order(tmp_path: Path) -> None:
    await check_pages(in_file(tmp_path), [1, "clear", 7, "store", "pop", "pop", 2, "pop"])


async def test_a_scan_goes_from_page_to_page(place: Place) -> None:
    async with place.open() as runtime:
        session = await runtime.create_session("s1")
        await fill(session, 1001)
        await runtime.flush()
        forget(runtime)
        seqs = []
        async for message in session.scan_messages():
            seqs.append(message.seq)
            if message.seq == 5:
                await fill(session, 3)
        assert seqs == list(range(1, 1005))


async def test_a_history_is_valid_and_limited_by_whole_groups(place: Place) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    async def write(runtime: Runtime) -> None:
        session = await runtime.create_session("s1", system_prompt="Be kind.")
        for _ in range(60):
            await session.append("user", "go")
            await session.append("assistant", tool_calls=[call])
            await session.append_tool_result("c", "f", "done")
        await session.append("assistant", tool_calls=[call])

    group = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done", "name": "f", "tool_call_id": "c"},
    ]
    last = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {
            "role": "tool",
            "tool_call_id": "c",
            "name": "f",
            "content": "interrupted: no result was recorded for this call",
        },
    ]
    whole = [{"role": "system", "content": "Be kind."}, *group * 60, *last]

    async def look(runtime: Runtime) -> None:
        session = await runtime.get_session("s1")
        assert await session.history() == whole
        for limit, kept in ((1, 2), (3, 2), (4, 2), (5, 4), (6, 5), (7, 5), (8, 7), (100, 98), (182, 181), (183, 182)):
            forget_what_is_stored(runtime)
            assert await session.history(limit) == [whole[0], *whole[-kept:]]
            for _ in range(2):
                assert msgspec.json.decode(await session.history_json(limit)) == [whole[0], *whole[-kept:]]
        assert await session.history(10_000) == whole
        assert (await session.record()).message_count == 182

    await at_every_stage(place, write, look)


@pytest.mark.parametrize("limit", [None, 2])
async def test_the_history_as_json_is_that_of_the_moment(limit: int | None) -> None:
    """It is kept from one call to the next, but not over a change."""
    async with in_memory().open() as runtime:
        session = await begin(runtime)
        for write in WRITES[:-1]:
            before = await session.history_json(limit)
            assert await session.history_json(limit) is before
            await write.call(runtime, session)
            assert msgspec.json.decode(await session.history_json(limit)) == await session.history(limit)


async def test_a_message_may_be_as_large_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        size = len(await session.append_json({"role": "user", "content": "x" * 500}))
        monkeypatch.setattr("agent_runtime.plans.MESSAGE_BYTES_MAX", size)
        assert len(await session.append_json({"role": "user", "content": "x" * 500})) == size
        for content, where in (("x" * 501, "message"), ("x" * 499 + "é", "message")):
            with pytest.raises(InvalidInput, match=f"^{where}: takes {size + 1} bytes as JSON, the most is {size}$"):
                await session.append("user", content)
        with pytest.raises(InvalidInput, match=r"^messages\[1\]: takes"):
            await session.append_many([{"role": "user"}, {"role": "user", "content": "x" * 501}])
        assert (await session.record()).message_count == 2
