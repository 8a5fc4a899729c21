"""The same key with the same arguments gives the first call's result again, and has its effect once."""

from __future__ import annotations

import inspect
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from agent_runtime import (
    DurabilityNotReached,
    IdempotencyConflict,
    InvalidInput,
    Message,
    NewMessage,
    Overloaded,
    Runtime,
    SessionExists,
    SessionHandle,
    SessionNotFound,
    StorageUnavailable,
    door,
    hookimpl,
    open_runtime,
)
from agent_runtime.residents import OUTCOMES_MAX
from agent_runtime.storage import FirstReads, Snapshot, Storage, StorageConfig, StorageFactory
from agent_runtime.testing import Faults, FaultyStorage, faulty_plugin
from agent_runtime_memory import MemoryDatabase
from places import Place, everything, forget, in_file, place_fixture
from writes import WRITES, begin, methods_with

pytestmark = pytest.mark.anyio

place = place_fixture()
memory = place_fixture(("memory",))


async def all_there_is(runtime: Runtime) -> list[Any]:
    """What every session shows."""
    handles = [await runtime.get_session(record.session_id) async for record in runtime.scan_sessions()]
    return [await everything(handle, "c") for handle in handles]


def shown(result: object) -> object:
    """A result, so that two handles of one session are equal."""
    return (result.session_id, result.incarnation) if isinstance(result, SessionHandle) else result


def rows(place: Place, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(place.path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


async def test_a_repeated_write_gives_the_first_result_and_does_nothing(place: Place) -> None:
    """Every write with a key of its own; all again at once, from the database, and when the session is deleted."""
    results: list[object] = []

    async def make(runtime: Runtime, session: SessionHandle, number: int, **options: Any) -> object:
        return shown(await WRITES[number].call(runtime, session, idempotency_key=f"k{number}", **options))

    async def repeat(runtime: Runtime, session: SessionHandle, number: int) -> None:
        before = await all_there_is(runtime), runtime.watermarks.accepted
        method, _, other = WRITES[number]
        for durability in ("buffered", "stored"):
            assert (method, await make(runtime, session, number, durability=durability)) == (method, results[number])
            if runtime.watermarks.stored == 0:
                break
        if other is not None:
            with pytest.raises(IdempotencyConflict, match=f"'k{number}' was used before with another req") as caught:
                await other(runtime, session, idempotency_key=f"k{number}")
            assert caught.value.key == f"k{number}"
        creates = method.endswith("create_session")
        for write in WRITES:
            if write.method != method and write.method.endswith("create_session") == creates:
                with pytest.raises(IdempotencyConflict):
                    await write.call(runtime, session, idempotency_key=f"k{number}")
        assert (await all_there_is(runtime), runtime.watermarks.accepted) == before

    deletion = len(WRITES) - 1
    async with place.open() as runtime:
        session = await begin(runtime)
        for number in range(deletion):
            results.append(await make(runtime, session, number))
            await repeat(runtime, session, number)
        assert runtime.watermarks.stored == 0
    async with place.open() as runtime:
        again = await runtime.get_session(session.session_id)
        for number in range(deletion):
            forget(runtime)
            await repeat(runtime, again, number)
        results.append(await make(runtime, again, deletion))
        await repeat(runtime, again, deletion)
    async with place.open() as runtime:
        gone = runtime._handle(session.session_id, session.incarnation)  # of a deleted session there is no other way
        for number in range(len(WRITES)):
            forget(runtime)
            await repeat(runtime, gone, number)


@pytest.mark.parametrize("cold", [False, True])
async def test_of_50_callers_with_one_key_one_appends(place: Place, cold: bool) -> None:
    async with place.open() as runtime:
        session = await runtime.create_session("s1")
        if cold:
            await runtime.flush()
            forget(runtime)
        results: list[Message] = []

        async def append() -> None:
            results.append(await session.append("user", "hi", idempotency_key="k"))

        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(append)
        assert results == [results[0]] * 50
        assert (await session.messages()).items == [results[0]]


async def test_of_50_callers_with_one_key_one_creates(place: Place) -> None:
    async with place.open() as runtime:
        results: list[object] = []

        async def create() -> None:
            results.append(shown(await runtime.create_session(idempotency_key="k")))

        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(create)
        assert results == [results[0]] * 50
        assert len((await runtime.list_sessions()).items) == 1


class SlowToEnd(FaultyStorage):
    """A storage whose views take a moment to be given back, as a database's do."""

    @asynccontextmanager
    async def snapshot(self, partition: int = 0, first: FirstReads = ()) -> AsyncIterator[Snapshot]:
        async with super().snapshot(partition, first) as snapshot:
            yield snapshot
            for _ in range(3):
                await checkpoint()


class SlowPlugin:
    @hookimpl
    def agent_runtime_storages(self) -> Mapping[str, StorageFactory]:
        return {"slow": self.open}

    @asynccontextmanager
    async def open(self, _: StorageConfig) -> AsyncIterator[Storage]:
        async with MemoryDatabase().open(StorageConfig(url="memory:")) as inner:
            yield SlowToEnd(inner, Faults())


async def test_callers_that_look_a_key_up_at_one_moment_create_once() -> None:
    async with Place("slow:", SlowPlugin()).open() as runtime:
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(lambda: runtime.create_session(idempotency_key="k"))
        assert runtime.watermarks.accepted == 1


async def test_a_key_counts_in_its_session(memory: Place) -> None:
    async with memory.open() as runtime:
        first, second = await runtime.create_session(idempotency_key="k"), await runtime.create_session()
        for session in (first, second):
            assert (await session.append("user", session.session_id, idempotency_key="k")).seq == 1
        assert await runtime.get_or_create_session("s3", idempotency_key="other")
        with pytest.raises(IdempotencyConflict):
            await runtime.get_or_create_session("s4", idempotency_key="other")


async def test_the_order_of_keys_is_no_difference_but_a_type_is(memory: Place) -> None:
    async with memory.open() as runtime:
        session = await runtime.create_session("s1")
        first = await session.append("user", "hi", metadata={"a": 1, "b": [2]}, idempotency_key="k")
        assert await session.append("user", "hi", metadata={"b": [2], "a": 1}, idempotency_key="k") == first
        for metadata in ({"a": 1.0, "b": [2]}, {"a": 1}, {}, None):
            with pytest.raises(IdempotencyConflict):
                await session.append("user", "hi", metadata=metadata, idempotency_key="k")


CREATION = {
    "session_id": "other",
    "user_id": "ada",
    "system_prompt": "Be kind.",
    "title": "t",
    "description": "d",
    "metadata": {"a": 1},
    "agent": "coder",
}
MESSAGE = {
    "role": "assistant",
    "content": "ho",
    "name": "n",
    "tool_calls": [{"id": "c"}],
    "tool_call_id": "c",
    "token_count": 1,
    "metadata": {"a": 1},
}
CHAT = {**MESSAGE, "extra": {"refusal": "no"}, "id": "m1", "created_at": "2026-01-01T00:00:00Z"}
EVERY_ARGUMENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "create_session": ({}, CREATION),
    "get_or_create_session": ({"session_id": "s2"}, CREATION),
    "append": ({"role": "user", "content": "hi"}, MESSAGE),
    "append_tool_result": (
        {"call_id": "c", "tool_name": "f", "result": 1},
        {"call_id": "d", "tool_name": "g", "result": 2},
    ),
    "update": ({}, {"title": "t", "description": "d", "metadata": {}}),
    "merge": ({"patch": {}}, {"patch": {"description": None}}),
    "switch_agent": ({"agent": "a"}, {"agent": "b", "reason": "r", "metadata": {}}),
    "update_context": ({"metadata": {}}, {"metadata": {"a": 1}}),
    "merge_context": ({"patch": {"a": 1}}, {"patch": {"a": None}}),
    "put_document": (
        {"collection": "c", "key": "k", "value": b"1"},
        {"collection": "d", "key": "l", "value": b"2", "media_type": "x/y"},
    ),
    "delete_document": ({"collection": "c", "key": "k"}, {"collection": "d", "key": "l"}),
    "request_approval": (
        {"call_id": "c", "tool_name": "f", "arguments": {}},
        {"call_id": "d", "tool_name": "g", "arguments": {"a": 1}, "reason": "r", "expires_in_s": 60},
    ),
    "decide_approval": (
        {"approval_id": "a", "decision": "edit", "arguments": {"a": 1}},
        {"approval_id": "b", "decision": "approve", "arguments": {"a": 2}, "reason": "r"},
    ),
}
"""The arguments of each write, and others, any one of which makes another call of it."""


def parameters(method: str) -> set[str]:
    found = inspect.signature(getattr(Runtime, method, None) or getattr(SessionHandle, method)).parameters
    return set(found) - {"self", "durability", "idempotency_key"}


def test_every_argument_of_every_write_is_looked_at() -> None:
    assert methods_with("idempotency_key") == {
        *EVERY_ARGUMENT,
        "append_message",
        "append_json",
        "append_many",
        "pop",
        "clear",
        "delete",
        "change_context",
    }
    assert {method: set(others) for method, (_, others) in EVERY_ARGUMENT.items()} == {
        method: parameters(method) for method in EVERY_ARGUMENT
    }
    assert set(CHAT) == set(NewMessage.__struct_fields__)


@pytest.mark.parametrize("method", EVERY_ARGUMENT)
async def test_with_any_other_argument_it_is_another_call(memory: Place, method: str) -> None:
    arguments, others = EVERY_ARGUMENT[method]
    async with memory.open() as runtime:
        session = await begin(runtime)
        if "approval_id" in arguments:
            arguments = {**arguments, "approval_id": (await session.request_approval("c", "f", {})).approval_id}
        call = partial(getattr(runtime if "create" in method else session, method), idempotency_key="k")
        await call(**arguments)
        accepted = runtime.watermarks.accepted
        for name, value in others.items():
            changed = {**arguments, name: value}
            if changed.get("decision") == "approve":
                del changed["arguments"]
            with pytest.raises(IdempotencyConflict):
                await call(**changed)
        await call(**arguments)
        assert runtime.watermarks.accepted == accepted


@pytest.mark.parametrize("method", ["append_message", "append_json", "append_many"])
async def test_with_any_other_key_it_is_another_message(memory: Place, method: str) -> None:
    def body(**chat: Any) -> Any:
        return [chat] if method == "append_many" else chat

    async with memory.open() as runtime:
        session = await begin(runtime)
        call = partial(getattr(session, method), idempotency_key="k")
        await call(body(role="user", content="hi"))
        for name, value in CHAT.items():
            with pytest.raises(IdempotencyConflict):
                await call(body(**{"role": "user", "content": "hi", name: value}))


async def test_the_arguments_count_and_not_what_plugins_make_of_them(memory: Place) -> None:
    class Numbering:
        count = 0

        @hookimpl
        def agent_runtime_before_append(self, message: NewMessage) -> NewMessage:
            self.count += 1
            return NewMessage(role=message.role, content=f"{message.content} {self.count}")

    async with memory.open(plugins=[Numbering()]) as runtime:
        session = await runtime.create_session("s1")
        first = await session.append("user", "hi", idempotency_key="k")
        assert await session.append("user", "hi", idempotency_key="k") == first
        assert (await session.messages()).items == [first]


# --- failures ---------------------------------------------------------------------------------------------------------


async def test_a_failure_is_not_recorded(place: Place) -> None:
    async with place.open() as runtime:
        session = await begin(runtime)
        with pytest.raises(SessionExists):
            await runtime.create_session("s1", idempotency_key="k")
        with pytest.raises(InvalidInput):
            await session.append("user", "a\0", idempotency_key="k")
        await session.delete()
        with pytest.raises(SessionNotFound):
            await session.append("user", "too late", idempotency_key="k")
        again = await runtime.create_session("s1", idempotency_key="k")
        assert again.incarnation != session.incarnation
        assert (await again.append("user", "hi", idempotency_key="k")).seq == 1


async def test_a_call_that_found_no_room_may_be_repeated() -> None:
    faults = Faults()
    place = Place("faulty:memory:", faulty_plugin(MemoryDatabase().open, faults))
    async with place.open(write_behind={"pending_bytes_max": 65_536, "append_timeout_s": 0.01}) as runtime:
        session = await runtime.create_session("s1", durability="stored")
        gate = faults.hold("apply")
        await session.append("user", "x" * 60_000)
        with pytest.raises(Overloaded):
            await session.append("user", "y" * 10_000, idempotency_key="k")
        gate.open()
        await runtime.flush()
        message = await session.append("user", "y" * 10_000, idempotency_key="k")
        assert message.seq == 2
        assert await session.append("user", "y" * 10_000, idempotency_key="k") == message


async def test_many_with_one_key_that_wait_for_room_append_once() -> None:
    faults = Faults()
    place = Place("faulty:memory:", faulty_plugin(MemoryDatabase().open, faults))
    async with place.open(write_behind={"pending_bytes_max": 65_536}) as runtime:
        session = await runtime.create_session("s1", durability="stored")
        gate = faults.hold("apply")
        await session.append("user", "x" * 60_000)
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(lambda: session.append("user", "y" * 10_000, idempotency_key="k"))
            await anyio.wait_all_tasks_blocked()
            gate.open()
        assert (await session.record()).message_count == 2
        await runtime.flush()
        assert runtime.status().pending.bytes == 0


async def test_a_repeated_call_waits_for_the_level_of_the_first() -> None:
    faults = Faults()
    place = Place("faulty:memory:", faulty_plugin(MemoryDatabase().open, faults))
    async with place.open(write_behind={"durability_timeout_s": 0.01}) as runtime:
        session = await runtime.create_session("s1", durability="stored")
        gate = faults.hold("apply")
        for _ in range(2):
            with pytest.raises(DurabilityNotReached) as caught:
                await session.append("user", "hi", durability="stored", idempotency_key="k")
            assert caught.value.sequence == 2
            assert caught.value.outcome == await session.message(1)
        gate.open()
        with anyio.fail_after(10):
            while runtime.watermarks.stored < 2:
                await anyio.sleep(0.001)
        message = await session.append("user", "hi", durability="stored", idempotency_key="k")
        assert (await session.messages()).items == [message]


async def test_a_key_whose_outcome_can_not_be_looked_up_is_not_used() -> None:
    faults = Faults()
    place = Place("faulty:memory:", faulty_plugin(MemoryDatabase().open, faults))
    async with place.open() as runtime:
        outage = faults.fail("outcome")
        with pytest.raises(StorageUnavailable):
            await runtime.create_session("s1", idempotency_key="k")
        assert runtime.watermarks.accepted == 0
        outage.stop()
        session = await runtime.create_session("s1", idempotency_key="k")
        assert shown(await runtime.create_session("s1", idempotency_key="k")) == shown(session)


# --- how long a key lives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
async def test_a_key_outlives_its_message_and_its_session(place: Place, stored: bool) -> None:
    async with place.open() as runtime:

        async def settle() -> None:
            if stored:
                await runtime.flush()
                forget(runtime)

        session = await runtime.create_session("s1", idempotency_key="create")
        first = await session.append("user", "first", idempotency_key="first")
        second = await session.append("user", "second", idempotency_key="second")
        popped = await session.pop(idempotency_key="pop")
        await session.clear(idempotency_key="clear")
        await settle()

        async def repeat() -> None:
            assert await session.append("user", "first", idempotency_key="first") == first
            assert await session.append("user", "second", idempotency_key="second") == second
            assert await session.pop(idempotency_key="pop") == popped == second
            await session.clear(idempotency_key="clear")

        await repeat()
        assert (await session.record()).message_count == 0
        third = await session.append("user", "third")
        await repeat()
        assert (await session.messages()).items == [third]
        await session.put_document("c", "k", 1)
        assert await session.delete_document("c", "k", idempotency_key="document") is True
        await session.delete(idempotency_key="delete")
        await settle()
        await repeat()
        assert await session.delete_document("c", "k", idempotency_key="document") is True
        await session.delete(idempotency_key="delete")
        assert shown(await runtime.create_session("s1", idempotency_key="create")) == shown(session)
        with pytest.raises(SessionNotFound):
            await session.append("user", "new")
        await runtime.create_session("s1")
        await repeat()
        await session.delete(idempotency_key="delete")
        assert (await (await runtime.get_session("s1")).record()).message_count == 0


class Clock:
    """The door's clock, to be turned on."""

    def __init__(self, runtime: Runtime) -> None:
        self._real = runtime._door.now
        self.ahead = timedelta()
        runtime._door.now = self

    def __call__(self) -> datetime:
        return self._real() + self.ahead


@pytest.mark.parametrize("stored", [False, True])
async def test_a_key_expires_after_24_hours(place: Place, stored: bool) -> None:
    async with place.open() as runtime:
        clock = Clock(runtime)

        async def settle() -> None:
            if stored:
                await runtime.flush()
                forget(runtime)

        session = await runtime.create_session("s1")
        first = await session.append("user", "hi", idempotency_key="k")
        created = shown(await runtime.create_session(idempotency_key="k"))
        await settle()
        clock.ahead = timedelta(hours=23, minutes=59)
        assert await session.append("user", "hi", idempotency_key="k") == first
        assert shown(await runtime.create_session(idempotency_key="k")) == created
        await settle()
        clock.ahead = timedelta(hours=24, seconds=1)
        second = await session.append("user", "something else", idempotency_key="k")
        assert second.seq == 2
        assert shown(await runtime.create_session(title="x", idempotency_key="k")) != created
        await settle()
        assert await session.append("user", "something else", idempotency_key="k") == second
        with pytest.raises(IdempotencyConflict):
            await session.append("user", "hi", idempotency_key="k")
        assert (await session.messages()).items == [first, second]


async def test_of_callers_that_find_a_key_expired_at_one_moment_one_is_heard(tmp_path: Path) -> None:
    """The row is there until it is purged; what was decided before it was read is not true behind that any more."""
    place = in_file(tmp_path)
    async with place.open() as runtime:
        session = await runtime.create_session("s1", idempotency_key="k")
        for number in range(OUTCOMES_MAX + 2):
            await session.append("user", "old", idempotency_key=f"k{number}")
        seq = (await session.record()).message_count
    async with place.open() as runtime:
        Clock(runtime).ahead = timedelta(hours=25)
        session = await runtime.get_session("s1")
        made: list[object] = []

        async def append() -> None:
            made.append((await session.append("user", "new", idempotency_key="k0")).seq)

        async def create() -> None:
            made.append(shown(await runtime.create_session("s2", idempotency_key="k")))

        async with anyio.create_task_group() as tasks:
            for call in (append, create):
                for _ in range(20):
                    tasks.start_soon(call)
        await runtime.flush()
        assert {each: made.count(each) for each in made} == {seq + 1: 20, shown(await runtime.get_session("s2")): 20}


async def test_who_finds_a_key_expired_sees_who_came_before(tmp_path: Path) -> None:
    place = in_file(tmp_path)
    async with place.open() as runtime:
        await runtime.create_session("s1", idempotency_key="k")
    async with place.open() as runtime:
        Clock(runtime).ahead = timedelta(hours=25)
        with pytest.raises(SessionNotFound):
            await runtime.get_session("s2")  # from now on that is known
        taken: list[str] = []

        async def create(key: str | None) -> None:
            try:
                await runtime.create_session("s2", idempotency_key=key)
            except SessionExists as error:
                taken.append(error.session_id)

        async with anyio.create_task_group() as tasks:
            for key in ("k", None):
                tasks.start_soon(create, key)
        assert taken == ["s2"]
        await runtime.flush()


# --- how many keys ----------------------------------------------------------------------------------------------------


async def test_more_keys_than_stay_in_memory_all_count(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_CREATIONS_MAX", 8)
    count = 2 * OUTCOMES_MAX + 10
    keys = range(0, count, 9)
    async with place.open() as runtime:
        session = await runtime.create_session("s1", idempotency_key="s1")
        messages = [await session.append("user", "hi", idempotency_key=f"k{number}") for number in range(count)]
        created = [shown(await runtime.create_session(idempotency_key=f"c{number}")) for number in range(20)]
        for _ in range(2):
            for number in keys:
                assert await session.append("user", "hi", idempotency_key=f"k{number}") == messages[number]
            for number in range(20):
                assert shown(await runtime.create_session(idempotency_key=f"c{number}")) == created[number]
            await runtime.flush()
            await runtime.create_session(idempotency_key="makes room")
        [resident] = [each for each in runtime._residents._entries.values() if each and each.session_id == "s1"]
        assert len(resident.outcomes) <= OUTCOMES_MAX
        assert len(runtime._door._creations) <= 8
        assert (await session.record()).message_count == count
    async with place.open() as runtime:
        session = await runtime.get_session("s1")
        for number in keys:
            assert await session.append("user", "hi", idempotency_key=f"k{number}") == messages[number]
        assert (await session.record()).message_count == count


async def test_a_used_key_is_one_row(tmp_path: Path) -> None:
    place = in_file(tmp_path)
    async with place.open() as runtime:
        session = await begin(runtime)
        for number, write in enumerate(WRITES):
            for _ in range(2):
                await write.call(runtime, session, idempotency_key=f"k{number}")
    found = rows(place, "SELECT scope, key, route FROM outcomes")
    assert sorted(found) == sorted(
        ("create" if write.method.endswith("create_session") else session.incarnation, f"k{number}", write.method)
        for number, write in enumerate(WRITES)
    )
    in_23_hours = "strftime('%Y-%m-%dT%H:%M:%S', 'now', '+23 hours')"
    assert set(rows(place, f"SELECT expires_at > {in_23_hours}, length(body_hash) FROM outcomes")) == {(1, 64)}
    async with place.open() as runtime:
        again = runtime._handle(session.session_id, session.incarnation)
        for number, write in enumerate(WRITES):
            await write.call(runtime, again, idempotency_key=f"k{number}")
    assert len(rows(place, "SELECT * FROM outcomes")) == len(WRITES)


async def test_a_call_that_changed_nothing_changes_nothing_when_it_is_repeated() -> None:
    async with open_runtime("memory:") as runtime:
        session = await runtime.create_session("s")
        await session.clear(idempotency_key="clear")
        assert await session.pop(idempotency_key="pop") is None
        assert not await session.delete_document("notes", "a", idempotency_key="document")
        await session.append("user", "hi")
        await session.put_document("notes", "a", 1)
        await session.clear(idempotency_key="clear")
        assert await session.pop(idempotency_key="pop") is None
        assert not await session.delete_document("notes", "a", idempotency_key="document")
        assert [message.content for message in (await session.messages()).items] == ["hi"]
        assert await session.get_document("notes", "a") is not None
