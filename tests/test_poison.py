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
    open_runtime,
)
from agent_runtime.changes import Change
from agent_runtime.testing import Faults, creates_session, faulty_plugin, writes_message
from agent_runtime_memory import MemoryDatabase
from model import Model, ModelSession
from rig import all_wait, audit, audit_at_rest, config, running
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
        self.poison = self.faults.reject(creates_session("s"))
        self.quarantined: list[int] = []

    @hookimpl
    def agent_runtime_change_quarantined(self, change: Change) -> None:
        self.quarantined.append(change.sequence)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Runtime]:
        async with open_runtime(config(), plugins=[faulty_plugin(self.database.open, self.faults), self]) as runtime:
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
        told: list[tuple[int, ...]] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(refused, poisoned.append(durability="stored"), told)
            await all_wait()
            tasks.start_soon(refused, runtime.flush(), told)
            await poisoned.discard()
        for each in (before, poisoned, after):
            await each.settle()
        await refused_flush(runtime)
        assert len(min(told)) == 1 or len(told[0]) == 1
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
        handle = await runtime.create_session("s", idempotency_key="k")
        with pytest.raises(Quarantined):
            await runtime.flush()
        assert (await runtime.create_session("s", idempotency_key="k")).incarnation == handle.incarnation
    async with world.open() as runtime:
        assert (await runtime.create_session("s", idempotency_key="k")).incarnation == handle.incarnation
        await runtime.quarantine.drop("s")
        world.poison.stop()
        assert (await runtime.create_session("s", idempotency_key="k")).incarnation != handle.incarnation


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


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=steps, after=steps, evicted=st.booleans(), restarted=st.booleans())
async def test_a_dropped_message_leaves_what_the_others_made(
    before: list[str], after: list[str], evicted: bool, restarted: bool
) -> None:
    faults, database, model = Faults(), MemoryDatabase(), Model()
    async with running(faults, database) as runtime:
        each = await author(runtime, model, "s", title="given")
        for name in before:
            await STEPS[name](each)
        await runtime.flush()
        if evicted:
            runtime._residents.bytes_max = 0
            runtime._residents._evict()
        dropped = await each.append(message_id="poison")
        faults.reject(writes_message("poison"))
        with pytest.raises(Quarantined):
            await runtime.flush()
        assert len(await runtime.quarantine.entries()) == 1

    faults.clear()
    async with running(faults, database) as runtime:
        assert await runtime.quarantine.replay("s") == 1
        await each.settle_in(runtime) if hasattr(each, "settle_in") else None
    assert dropped.seq and after is not None and restarted is not None
