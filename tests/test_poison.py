"""A change that the database refuses goes to quarantine alone: its session is held and shown, all others go on.

Time is virtual, so that waiting for the next try takes a moment.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_runtime import (
    Message,
    NewMessage,
    Quarantined,
    Runtime,
    SessionExists,
    SessionHandle,
    SessionHeld,
    SessionNotFound,
    hookimpl,
)
from agent_runtime.changes import Change
from agent_runtime.testing import Fault, Faults, creates_session, writes_message, writes_session
from agent_runtime_memory import MemoryDatabase
from model import Model, ModelSession
from rig import all_wait, audit, audit_at_rest, config, opened, running
from rig import virtual_time as anyio_backend

__all__ = ["anyio_backend"]

pytestmark = pytest.mark.anyio


async def check(runtime: Runtime, model: Model) -> None:
    """Every session shows what it should, in every read, and is in the list; no other is."""
    audit(runtime)
    assert [record async for record in runtime.scan_sessions()] == model.listing(None, "asc")
    for session in model.sessions.values():
        handle = await runtime.get_session(session.session_id)
        assert await handle.record() == session.record
        assert await handle.context() == session.context
        assert await handle.switches() == session.switches
        assert await handle.messages(limit=1000) == session.page(None, 1000, "asc")
        assert await handle.messages(limit=3, order="desc") == session.page(None, 3, "desc")
        assert await handle.history() == session.history(None)
        assert await handle.history(3) == session.history(3)
        assert await handle.list_documents("notes") == session.document_page("notes", None, 100)
        for key in ("1", "2"):
            assert await handle.get_document("notes", key) == session.documents.get(("notes", key))


class Author:
    """Changes one session, and keeps the model."""

    def __init__(self, handle: SessionHandle, session: ModelSession) -> None:
        self.handle = handle
        self.session = session
        self.incarnation = handle.incarnation

    async def append(self, *, message_id: str | None = None, **options: Any) -> Message:
        new = [NewMessage(role="user", content=f"message {self.session.next_seq}", id=message_id)]
        messages = await self.handle.append_many(new, **options)
        self.session.append(new, messages)
        return messages[0]

    async def pop(self) -> None:
        self.session.pop(await self.handle.pop())

    async def clear(self) -> None:
        await self.handle.clear()
        self.session.clear()

    async def switch(self) -> None:
        agent = f"agent {len(self.session.switches)}"
        self.session.switch(agent, None, await self.handle.switch_agent(agent))

    async def put(self, key: str = "1") -> None:
        value = self.session.next_seq
        self.session.put("notes", key, value, None, await self.handle.put_document("notes", key, value))

    async def discard(self) -> None:
        await self.handle.delete_document("notes", "1")
        self.session.documents.pop(("notes", "1"), None)

    async def settle(self) -> None:
        await self.session.settle(self.handle)


async def author(runtime: Runtime, model: Model, session_id: str, **fields: Any) -> Author:
    handle = await runtime.create_session(session_id, **fields)
    return Author(handle, await model.create(handle, **fields))


async def refused(call: Awaitable[object], told: list[tuple[int, ...]]) -> None:
    with pytest.raises(Quarantined) as caught:
        await call
    told.append(caught.value.sequences)


# --- a poisoned creation ----------------------------------------------------------------------------------------------


class World:
    """A creation that the database refuses, 50 changes behind it, and two sessions that have nothing to do with it."""

    def __init__(self) -> None:
        self.faults, self.database, self.model = Faults(), MemoryDatabase(), Model()
        self.poison: Fault
        self.quarantined: list[int] = []

    @hookimpl
    def agent_runtime_change_quarantined(self, change: Change) -> None:
        self.quarantined.append(change.sequence)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Runtime]:
        async with opened(config(), self.database.open, self.faults, self) as runtime:
            yield runtime

    async def poisoned(self, runtime: Runtime) -> Author:
        """All of that, tried; the first sequences are: 1 another creation, 2 the poisoned one."""
        before = await author(runtime, self.model, "before", user_id="u")
        poisoned = await author(runtime, self.model, "s", user_id="u", system_prompt="lead", metadata={"a": 1})
        after = await author(runtime, self.model, "after")
        for number in range(12):
            await poisoned.append()
            await poisoned.switch()
            await poisoned.put("12"[number % 2])
            await (poisoned.pop if number % 3 == 2 else poisoned.append)()
            await before.append()
            await after.append()
        gate = self.faults.hold("apply", nth=1)
        self.poison = self.faults.reject(creates_session("s"))
        waiter: list[tuple[int, ...]] = []
        flush: list[tuple[int, ...]] = []
        async with anyio.create_task_group() as tasks:
            waiting = poisoned.handle.append("user", "waited for", durability="stored")
            tasks.start_soon(refused, waiting, waiter)
            await gate.reached.wait()
            tasks.start_soon(refused, runtime.flush(), flush)
            await all_wait()
            newest = await poisoned.handle.messages(order="desc", limit=1)
            poisoned.session.append([NewMessage(role="user", content="waited for")], newest.items)
            await poisoned.discard()
            for each in (before, poisoned, after):
                await each.settle()
            gate.open()
        await refused_flush(runtime)
        assert waiter == [(runtime.watermarks.accepted - 1,)]
        assert (flush[0][0], len(flush[0])) == (2, 50)
        assert self.quarantined == [2]
        return poisoned


async def refused_flush(runtime: Runtime) -> None:
    """The changes that came too late for the first batch are queued behind the others; then there is nothing new."""
    while runtime.watermarks.stored < runtime.watermarks.accepted:
        with pytest.raises(Quarantined):
            await runtime.flush()
    await runtime.flush()


async def check_held(runtime: Runtime, world: World, poisoned: Author) -> None:
    """It shows, but can't be changed; the others can."""
    await check(runtime, world.model)
    audit_at_rest(runtime)
    entries = await runtime.quarantine.entries()
    assert [entry.state for entry in entries] == ["rejected"] + ["queued"] * 50
    assert [entry.sequence for entry in entries] == sorted({entry.sequence for entry in entries})
    status = runtime.status()
    assert (status.quarantine.sessions, status.quarantine.changes, status.state) == (1, 51, "running")
    handle = await runtime.get_session("s")
    assert handle.incarnation == poisoned.incarnation
    writes: list[Callable[[], Awaitable[object]]] = [
        lambda: handle.append("user", "no"),
        handle.pop,
        handle.clear,
        handle.delete,
        lambda: handle.update(title="no"),
        lambda: handle.put_document("notes", "1", "no"),
        lambda: handle.switch_agent("no"),
    ]
    for write in writes:
        with pytest.raises(SessionHeld):
            await write()
    with pytest.raises(SessionExists):
        await runtime.create_session("s")
    other = Author(await runtime.get_session("before"), world.model.sessions["before"])
    await other.append(durability="stored")
    await other.settle()


async def test_a_poisoned_creation_is_held_and_shown_across_a_restart_and_is_replayed() -> None:
    world = World()
    async with world.open() as runtime:
        poisoned = await world.poisoned(runtime)
        await check_held(runtime, world, poisoned)
    async with world.open() as runtime:
        await check_held(runtime, world, poisoned)
        with pytest.raises(Quarantined):
            await runtime.quarantine.replay("s")
        await check_held(runtime, world, poisoned)
    async with world.open() as runtime:
        await check_held(runtime, world, poisoned)
        world.poison.stop()
        assert await runtime.quarantine.replay("s") == 51
        await check_stored(runtime, world)
    async with world.open() as runtime:
        await check_stored(runtime, world)


async def check_stored(runtime: Runtime, world: World) -> None:
    assert await runtime.quarantine.entries() == []
    assert runtime.status().quarantine.changes == 0
    audit_at_rest(runtime)
    await check(runtime, world.model)
    again = Author(await runtime.get_session("s"), world.model.sessions["s"])
    await again.append(durability="stored")
    await again.pop()
    await again.settle()
    await runtime.flush()
    await check(runtime, world.model)


@pytest.mark.parametrize("restart", [False, True])
async def test_a_poisoned_creation_is_dropped_with_all_behind_it(restart: bool) -> None:
    world = World()
    async with world.open() as runtime:
        await world.poisoned(runtime)
        del world.model.sessions["s"]
        if not restart:
            await drop_all(runtime, world)
    async with world.open() as runtime:
        if restart:
            await drop_all(runtime, world)
        await check(runtime, world.model)
        world.poison.stop()
        await author(runtime, world.model, "s")
        await runtime.flush()
        await check(runtime, world.model)


async def drop_all(runtime: Runtime, world: World) -> None:
    assert await runtime.quarantine.drop("s") == 0
    audit_at_rest(runtime)
    assert await runtime.quarantine.entries() == []
    with pytest.raises(SessionNotFound):
        await runtime.get_session("s")
    with pytest.raises(SessionNotFound):
        await runtime.quarantine.drop("s")
    await check(runtime, world.model)


async def test_the_key_of_a_poisoned_creation() -> None:
    """It answers for as long as the creation is held, also after a restart; once that is dropped, it is free."""
    world = World()
    async with world.open() as runtime:
        poison = world.faults.reject(creates_session("s"))
        handle = await runtime.create_session("s", idempotency_key="k")
        with pytest.raises(Quarantined):
            await runtime.flush()
        assert (await runtime.create_session("s", idempotency_key="k")).incarnation == handle.incarnation
    async with world.open() as runtime:
        assert (await runtime.create_session("s", idempotency_key="k")).incarnation == handle.incarnation
        await runtime.quarantine.drop("s")
        poison.stop()
        assert (await runtime.create_session("s", idempotency_key="k")).incarnation != handle.incarnation


async def test_the_key_of_a_poisoned_call() -> None:
    """While the call is held its key answers, but not as stored, also after a restart; once it is dropped it is free."""
    world = World()

    async with world.open() as runtime:
        session = await runtime.create_session("s", durability="stored")
        poison = world.faults.reject(writes_session(session.incarnation))
        message = await session.append("user", "hi", idempotency_key="k")
        with pytest.raises(Quarantined):
            await runtime.flush()
    for _ in range(2):
        async with world.open() as runtime:
            session = await runtime.get_session("s")
            assert await session.append("user", "hi", idempotency_key="k") == message
            with pytest.raises(Quarantined):
                await session.append("user", "hi", idempotency_key="k", durability="stored")
    async with world.open() as runtime:
        poison.stop()
        await runtime.quarantine.drop("s")
        session = await runtime.get_session("s")
        again = await session.append("user", "hi", idempotency_key="k", durability="stored")
        assert (await session.messages()).items == [again]
        assert again.seq == 2


# --- a poisoned change in the middle ----------------------------------------------------------------------------------

STEPS: dict[str, Callable[[Author], Awaitable[object]]] = {
    "append": Author.append,
    "pop": Author.pop,
    "clear": Author.clear,
    "switch": Author.switch,
    "put": Author.put,
    "discard": Author.discard,
}
steps = st.lists(st.sampled_from(["append", "append", *STEPS]), max_size=8)


async def poison_between(
    runtime: Runtime, model: Model, faults: Faults, before: list[str], after: list[str], *, evicted: bool
) -> Author:
    """A session with a stored past, a poisoned message, and changes that were acknowledged before that was known."""
    each = await author(runtime, model, "s", title="given")
    for name in before:
        await STEPS[name](each)
    await runtime.flush()
    if evicted:
        runtime._residents.bytes_max = 0
        runtime._residents._evict()
    await each.append(message_id="poison")
    gate = faults.hold("apply", nth=1)
    faults.reject(writes_message("poison"))
    told: list[tuple[int, ...]] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(refused, runtime.flush(), told)
        await gate.reached.wait()
        for name in after:
            await STEPS[name](each)
        await each.settle()
        gate.open()
    assert len(told) == 1
    await refused_flush(runtime)
    await check(runtime, model)
    return each


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=steps, after=steps, evicted=st.booleans(), restarted=st.booleans(), replayed=st.booleans())
async def test_what_is_behind_a_poisoned_message(
    before: list[str], after: list[str], evicted: bool, restarted: bool, replayed: bool
) -> None:
    """Replayed, all is as if nothing had been; dropped, that one message is missing."""
    faults, database, model = Faults(), MemoryDatabase(), Model()
    async with running(faults, database) as runtime:
        await poison_between(runtime, model, faults, before, after, evicted=evicted)
        if not restarted:
            await resolve(runtime, model, faults, replayed=replayed)
    async with running(faults, database) as runtime:
        if restarted:
            await check(runtime, model)
            await resolve(runtime, model, faults, replayed=replayed)
        each = Author(await runtime.get_session("s"), model.sessions["s"])
        await check(runtime, model)
        await each.append()
        while each.session.messages:
            await each.pop()
        assert await each.handle.pop() is None
        await each.settle()
        await runtime.flush()
    async with running(faults, database) as runtime:
        await check(runtime, model)


async def resolve(runtime: Runtime, model: Model, faults: Faults, *, replayed: bool) -> None:
    held = runtime.status().quarantine.changes
    session = model.sessions["s"]
    if replayed:
        faults.clear()
        assert await runtime.quarantine.replay("s") == held
    else:
        session.messages = [message for message in session.messages if message.id != "poison"]
        assert await runtime.quarantine.drop("s") == held - 1
        await session.settle(await runtime.get_session("s"))
    audit_at_rest(runtime)
    assert await runtime.quarantine.entries() == []
    await check(runtime, model)


async def test_reads_beside_a_drop() -> None:
    """A read that is under way while a change is dropped shows the session with it or without it."""
    faults, database, model = Faults(), MemoryDatabase(), Model()
    async with running(faults, database) as runtime:
        each = await poison_between(runtime, model, faults, ["append"] * 9, ["append"] * 9, evicted=True)
        whole = each.session.history(None)
        gate, histories = faults.hold("messages", nth=1), []

        async def read() -> None:
            histories.append(await each.handle.history())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await gate.reached.wait()
            assert await runtime.quarantine.drop("s") == 9
            each.session.messages = [message for message in each.session.messages if message.id != "poison"]
            await each.settle()
            gate.open()
        assert histories[0] in (whole, each.session.history(None))
        audit_at_rest(runtime)
        await check(runtime, model)


@pytest.mark.parametrize("others", [["replay", "drop"], ["drop", "drop"], ["drop", "replay"], ["replay", "replay"]])
async def test_two_who_resolve_at_once(others: list[str]) -> None:
    faults, database, model = Faults(), MemoryDatabase(), Model()
    async with running(faults, database) as runtime:
        each = await poison_between(runtime, model, faults, ["append"], ["append"], evicted=False)
        faults.clear()
        done: list[str] = []

        async def resolve_once(how: str) -> None:
            try:
                await getattr(runtime.quarantine, how)("s")
            except (SessionHeld, SessionNotFound):
                return
            done.append(how)

        async with anyio.create_task_group() as tasks:
            for how in others:
                tasks.start_soon(resolve_once, how)
        assert len(done) == 1
        if done == ["drop"]:
            each.session.messages = [message for message in each.session.messages if message.id != "poison"]
        await each.settle()
        await runtime.flush()
        audit_at_rest(runtime)
        await check(runtime, model)
    async with running(faults, database) as runtime:
        await check(runtime, model)


# --- an id that was used again before the poison was known ------------------------------------------------------------


@pytest.mark.parametrize("stored_before", [False, True])
@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("replayed", [False, True])
async def test_a_session_that_was_deleted_and_created_again(
    stored_before: bool, restarted: bool, replayed: bool
) -> None:
    """The old one's changes are held without standing in the way of the new one, and can be replayed or dropped."""
    faults, database, model = Faults(), MemoryDatabase(), Model()
    async with running(faults, database) as runtime:
        old = await author(runtime, model, "s")
        if stored_before:
            await runtime.flush()
        await old.append(message_id="poison")
        gate, poisoned = faults.hold("apply", nth=1), {"poison"}
        faults.reject(lambda batch: not poisoned.isdisjoint(row.id for row in batch.messages))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(refused, runtime.flush(), [])
            await gate.reached.wait()
            await old.handle.delete()
            del model.sessions["s"]
            new = await author(runtime, model, "s")
            await new.append()
            await new.settle()
            gate.open()
        while runtime.watermarks.stored < runtime.watermarks.accepted:
            with pytest.raises(Quarantined):
                await runtime.flush()
        await check(runtime, model)
        if not restarted:
            await resolve_all(runtime, poisoned, replayed=replayed)
            await check(runtime, model)
    async with running(faults, database) as runtime:
        await check(runtime, model)
        await resolve_all(runtime, poisoned, replayed=replayed)
        await check(runtime, model)
        new = Author(await runtime.get_session("s"), model.sessions["s"])
        await new.append(durability="stored")
        await new.settle()
        audit_at_rest(runtime)
    async with running(faults, database) as runtime:
        await check(runtime, model)


async def resolve_all(runtime: Runtime, poisoned: set[str], *, replayed: bool) -> None:
    """Until nothing of the id is left: of two incarnations the older one goes first."""
    if replayed:
        poisoned.clear()
    while runtime.status().quarantine.changes:
        if replayed or not poisoned:
            await runtime.quarantine.replay("s")
        else:
            await runtime.quarantine.drop("s")
            poisoned.clear()


# --- many -------------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.one_of(st.sampled_from([1, 2, 500, 999, 1000]), st.integers(1, 1000)))
async def test_one_poisoned_message_among_a_thousand_is_found_left_to_right(place: int) -> None:
    faults, stored = Faults(), []

    class Observer:
        @hookimpl
        def agent_runtime_batch_stored(self, receipt: Any) -> None:
            stored.append((receipt.after, receipt.last))

    options = config(write_behind={"interval_s": 1e6, "batch_changes": 1000})
    async with opened(options, MemoryDatabase().open, faults, Observer()) as runtime:
        handles = [await runtime.create_session(f"s{number}") for number in range(10)]
        await runtime.flush()
        stored.clear()
        fault = faults.reject(writes_message("poison"))
        for number in range(1, 1001):
            new = NewMessage(role="user", content="x", id="poison" if number == place else None)
            await handles[number % 10].append_many([new])
        with pytest.raises(Quarantined) as caught:
            await runtime.flush()
        assert fault.hits <= 12  # once a halving, and the last alone
        assert len(stored) <= 12
        assert stored[0][0] == 10
        assert stored[-1][1] == 1010
        assert [after for after, _ in stored[1:]] == [last for _, last in stored[:-1]]
        behind = [10 + number for number in range(place, 1001) if number % 10 == place % 10]
        assert list(caught.value.sequences) == behind
        assert [entry.sequence for entry in await runtime.quarantine.entries()] == behind
        audit_at_rest(runtime)


async def test_a_broken_schema_stops_the_flusher_and_fills_no_quarantine() -> None:
    faults, model, database = Faults(), Model(), MemoryDatabase()
    sections = {"write_behind": {"interval_s": 1.0, "quarantine_max": 3, "quarantine_window_s": 1000.0}}
    async with running(faults, database, **sections) as runtime:
        authors = [await author(runtime, model, f"s{number}") for number in range(8)]
        await runtime.flush()
        broken = faults.reject(lambda batch: bool(batch.messages))
        for each in authors:
            await each.append()
            await each.settle()
        await anyio.sleep(200)
        status = runtime.status()
        assert (status.state, status.quarantine.changes, status.pending.changes) == ("degraded", 3, 5)
        await check(runtime, model)
        with pytest.raises(SessionHeld):
            await authors[0].append()
        for each in authors[3:]:
            await each.append()
            await each.settle()
        await check(runtime, model)
        broken.stop()
        await anyio.sleep(12)
        status = runtime.status()
        assert (status.state, status.quarantine.changes, status.pending.changes) == ("running", 3, 0)
        for number in range(3):
            assert await runtime.quarantine.replay(f"s{number}") == 1
        audit_at_rest(runtime)
        await check(runtime, model)
    async with running(faults, database) as runtime:
        await check(runtime, model)


async def test_the_window_of_rejections_moves_on() -> None:
    faults, model = Faults(), Model()
    sections = {"write_behind": {"interval_s": 1.0, "quarantine_max": 1, "quarantine_window_s": 60.0}}
    async with running(faults, **sections) as runtime:
        authors = [await author(runtime, model, f"s{number}") for number in range(3)]
        await runtime.flush()
        faults.reject(lambda batch: bool(batch.messages))
        for number, each in enumerate(authors, 1):
            await each.append()
            await each.settle()
            await anyio.sleep(80)
            assert runtime.status().quarantine.changes == number
            assert runtime.status().state == "running"
        await check(runtime, model)
