"""A call that is cancelled, wherever it waits, has happened whole or not at all, and leaves nothing behind.

`cancelled_everywhere` makes a call again and again and cancels it where it waits for the first time, the second, …
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from agent_runtime import DurabilityNotReached, NewMessage, Quarantined, Runtime, SessionHandle, SessionNotFound
from agent_runtime.testing import Faults, writes_message
from agent_runtime.testing.kit.cancellation import cancelled_everywhere
from agent_runtime_memory import MemoryDatabase
from model import Model, ModelSession
from rig import all_wait, audit, audit_at_rest, running

pytestmark = pytest.mark.anyio


def evict(runtime: Runtime) -> None:
    """Let go of all that is stored."""
    books = runtime._residents
    bytes_max, books.bytes_max = books.bytes_max, 0
    books._evict()
    books.bytes_max = bytes_max


async def check(handle: SessionHandle, session: ModelSession) -> None:
    """Everything is as the model says."""
    assert await handle.messages(limit=1000) == session.page(None, 1000, "asc")
    assert (await handle.list_documents("notes")).items == list(session.documents.values())
    assert await handle.switches() == session.switches
    await session.settle(handle)


# --- appends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True], ids=["room", "full"])
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("keyed", [False, True], ids=["no key", "key"])
@pytest.mark.parametrize("level", ["buffered", "stored"])
async def test_an_append_is_cancelled_anywhere(level: Any, keyed: bool, cold: bool, full: bool) -> None:
    faults, database, model = Faults(), MemoryDatabase(), Model()
    async with running(faults, database, write_behind={"pending_bytes_max": 65_536}) as runtime:
        if full:
            faults.delay(0.003, "apply")  # long enough for the append to come to wait for room
        handle, other = await runtime.create_session("s"), await runtime.create_session("other")
        session = await model.create(handle)
        number, steps = 0, 0
        outcome: object = None

        async def prepare() -> None:
            await runtime.flush()
            if cold:
                evict(runtime)
            if full:
                await other.append("user", "x" * 60_000)
            runtime._door._turn = 1  # the next write yields to the event loop

        async def append() -> None:
            nonlocal outcome
            key = f"key {number}" if keyed else None
            outcome = None
            try:
                outcome = await handle.append("user", f"{number}" * 9_000, durability=level, idempotency_key=key)
            except DurabilityNotReached as error:
                assert error.sequence == runtime.watermarks.accepted
                assert (error.wanted, error.reached) == ("stored", "buffered")
                outcome = error.outcome

        async def look() -> None:
            """Once or not at all; once if we were told so, or ask again with the key."""
            audit(runtime)
            new = NewMessage(role="user", content=f"{number}" * 9_000)
            if keyed:
                again = await handle.append("user", f"{number}" * 9_000, idempotency_key=f"key {number}")
                assert outcome in (None, again)
                session.append([new], [again])
            else:
                newest = (await handle.messages(order="desc", limit=1)).items
                if newest and newest[0].content == new.content:
                    session.append([new], newest)
                assert outcome in (None, *session.messages[-1:])
            await check(handle, session)
            await runtime.flush()
            audit_at_rest(runtime)
            await check(handle, session)

        await prepare()
        async for _ in cancelled_everywhere(append):
            await look()
            number, steps = number + 1, steps + 1
            await prepare()
        assert outcome is not None
        await look()
        assert steps >= 1 + cold + full + (level == "stored")
    async with running(Faults(), database) as runtime:
        await check(await runtime.get_session("s"), session)


# --- other changes ----------------------------------------------------------------------------------------------------


async def _pop(handle: SessionHandle, level: Any) -> None:
    await handle.pop(durability=level)


async def _clear(handle: SessionHandle, level: Any) -> None:
    await handle.clear(durability=level)


async def _discard(handle: SessionHandle, level: Any) -> None:
    assert await handle.delete_document("notes", "1", durability=level)


async def _append_many(handle: SessionHandle, level: Any) -> None:
    await handle.append_many([{"role": "user", "content": "1"}, {"role": "user", "content": "2"}], durability=level)


async def _delete(handle: SessionHandle, level: Any) -> None:
    await handle.delete(durability=level)


CHANGES: dict[str, tuple[Callable[[SessionHandle, Any], Awaitable[None]], tuple[int, int, bool]]] = {
    # the call; how many messages and documents there are after it, and whether there is a session
    "append_many": (_append_many, (5, 1, True)),
    "pop": (_pop, (2, 1, True)),
    "clear": (_clear, (0, 1, True)),
    "discard": (_discard, (3, 0, True)),
    "delete": (_delete, (0, 0, False)),
}


async def state_of(runtime: Runtime, session_id: str) -> tuple[int, int, bool]:
    """How many messages and documents the session has, counted in every way there is; and whether it is there."""
    listed = [record.session_id async for record in runtime.scan_sessions()]
    try:
        handle = await runtime.get_session(session_id)
    except SessionNotFound:
        assert session_id not in listed
        return 0, 0, False
    assert session_id in listed
    messages = (await handle.messages(limit=1000)).items
    documents = (await handle.list_documents("notes")).items
    assert (await handle.record()).message_count == len(messages) == len(await handle.history())
    assert (await handle.get_document("notes", "1") is not None) == bool(documents)
    return len(messages), len(documents), True


@pytest.mark.parametrize("level", ["buffered", "stored"])
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_is_cancelled_anywhere(change: str, cold: bool, level: Any) -> None:
    call, after = CHANGES[change]
    database, expected = MemoryDatabase(), {}
    async with running(Faults(), database) as runtime:
        number = -1
        handle: SessionHandle

        async def prepare() -> None:
            nonlocal number, handle
            number += 1
            handle = await runtime.create_session(f"s{number}")
            await handle.append_many([{"role": "user", "content": f"{each}"} for each in range(3)])
            await handle.put_document("notes", "1", 1)
            if cold:
                await runtime.flush()
                evict(runtime)
            runtime._door._turn = 1

        async def make() -> None:
            try:
                await call(handle, level)
            except DurabilityNotReached as error:
                assert error.sequence == runtime.watermarks.accepted

        async def look(*possible: tuple[int, int, bool]) -> None:
            audit(runtime)
            state = expected[f"s{number}"] = await state_of(runtime, f"s{number}")
            assert state in possible
            await runtime.flush()
            audit_at_rest(runtime)
            evict(runtime)
            assert await state_of(runtime, f"s{number}") == state

        await prepare()
        async for _ in cancelled_everywhere(make):
            await look((3, 1, True), after)
            await prepare()
        await look(after)
        assert number
    async with running(Faults(), database) as runtime:
        for session_id, state in expected.items():
            assert await state_of(runtime, session_id) == state


@pytest.mark.parametrize("exist_ok", [False, True])
@pytest.mark.parametrize("keyed", [False, True])
async def test_a_creation_is_cancelled_anywhere(exist_ok: bool, keyed: bool) -> None:
    database = MemoryDatabase()
    async with running(Faults(), database) as runtime:
        create: Any = runtime.get_or_create_session if exist_ok else runtime.create_session
        number = 0
        incarnations: dict[str, str] = {}

        async def make() -> None:
            key = f"key {number}" if keyed else None
            try:
                handle = await create(f"s{number}", system_prompt="lead", durability="stored", idempotency_key=key)
            except DurabilityNotReached as error:
                handle = error.outcome
            incarnations[f"s{number}"] = handle.incarnation

        async def look() -> None:
            audit(runtime)
            session_id, known = f"s{number}", incarnations.get(f"s{number}")
            if keyed:
                handle = await create(session_id, system_prompt="lead", idempotency_key=f"key {number}")
            else:
                handle = await runtime.get_or_create_session(session_id, system_prompt="lead")
            assert known in (None, handle.incarnation)
            incarnations[session_id] = handle.incarnation
            assert len((await handle.messages()).items) == 1
            await runtime.flush()
            audit_at_rest(runtime)

        async for _ in cancelled_everywhere(make):
            await look()
            number += 1
        await look()
        assert number > 2
    async with running(Faults(), database) as runtime:
        found = {record.session_id: record.incarnation async for record in runtime.scan_sessions()}
        assert found == incarnations


# --- reads ------------------------------------------------------------------------------------------------------------

READS: dict[str, Callable[[Runtime, SessionHandle], Awaitable[Any]]] = {
    "get": lambda runtime, _: runtime.get_session("s"),
    "list": lambda runtime, _: runtime.list_sessions(),
    "history": lambda _, handle: handle.history(),
    "short history": lambda _, handle: handle.history(2),
    "messages": lambda _, handle: handle.messages(limit=3),
    "newest": lambda _, handle: handle.messages(limit=3, order="desc"),
    "switches": lambda _, handle: handle.switches(),
    "document": lambda _, handle: handle.get_document("notes", "1"),
    "documents": lambda _, handle: handle.list_documents("notes"),
}


@pytest.mark.parametrize("kind", READS)
async def test_a_read_is_cancelled_anywhere(kind: str) -> None:
    async with running() as runtime:
        handle = await runtime.create_session("s")
        for number in range(60):
            await handle.append("user", f"{number}")
        await handle.switch_agent("coder")
        await runtime.flush()
        evict(runtime)
        waits = 0

        async def read() -> None:
            await READS[kind](runtime, handle)

        async for _ in cancelled_everywhere(read):
            waits += 1
            audit_at_rest(runtime)
            await handle.append("user", "goes on")
            await runtime.flush()
            evict(runtime)
        audit_at_rest(runtime)
        assert waits > 1


async def test_a_load_that_others_wait_for_is_cancelled_anywhere() -> None:
    async with running() as runtime:
        await runtime.create_session("s")
        await runtime.flush()
        waits = 0

        async def load() -> None:
            await runtime.get_session("s")

        async def beside() -> None:
            """Others come while it is under way; they are not cancelled with it."""
            for _ in range(3):
                others.start_soon(load)
            await load()

        evict(runtime)
        async with anyio.create_task_group() as others:
            async for _ in cancelled_everywhere(beside):
                waits += 1
                await all_wait()
                audit_at_rest(runtime)
                evict(runtime)
        audit_at_rest(runtime)
        assert waits > 2


# --- flushes ----------------------------------------------------------------------------------------------------------


async def test_a_flush_is_cancelled_anywhere() -> None:
    faults = Faults()
    async with running(faults) as runtime:
        handle = await runtime.create_session("s")
        waits = 0
        await handle.append("user", "0")
        async for _ in cancelled_everywhere(runtime.flush):
            waits += 1
            audit(runtime)
            assert not runtime._log.store_awaited
            await runtime.flush()
            audit_at_rest(runtime)
            await handle.append("user", f"{waits}")
        audit_at_rest(runtime)
        assert waits
        assert [message.content for message in (await handle.messages()).items] == [
            f"{each}" for each in range(waits + 1)
        ]


@pytest.mark.parametrize("batches", [1, 2])
async def test_a_waiter_that_is_cancelled_takes_nobody_with_it(batches: int) -> None:
    """Not the batch that it waits for, nor the others who wait for that."""
    faults = Faults()
    async with running(faults) as runtime:
        handles = [await runtime.create_session(f"s{number}") for number in range(3)]
        waits = 0
        told: list[object] = []

        async def one() -> None:
            try:
                await handles[0].append("user", "cancelled", durability="stored")
            except DurabilityNotReached as error:
                told.append(error.outcome)

        async def another(handle: SessionHandle) -> None:
            told.append(await handle.append("user", "waits", durability="stored"))

        await runtime.flush()
        for _ in range(batches):
            before = faults.count("apply")
            gate = faults.hold("apply", nth=1)
            async with anyio.create_task_group() as tasks:
                async with anyio.create_task_group() as cancelled:
                    cancelled.start_soon(one)
                    tasks.start_soon(another, handles[1])
                    tasks.start_soon(another, handles[2])
                    await gate.reached.wait()
                    cancelled.cancel_scope.cancel()
                waits += 1
                gate.open()
            assert faults.count("apply") == before + 1
            audit_at_rest(runtime)
        assert len(told) == 3 * batches


async def test_replaying_and_dropping_are_cancelled_anywhere() -> None:
    """What is in quarantine is there, or resolved; in the end nothing is left of it."""
    for how in ("replay", "drop"):
        faults = Faults()
        async with running(faults) as runtime:
            number = 0

            async def prepare() -> None:
                poison = faults.reject(writes_message(f"poison {number}"))  # noqa: B023 — called at once
                handle = await runtime.create_session(f"s{number}")  # noqa: B023
                await runtime.flush()
                await handle.append_many([NewMessage(role="user", content="x", id=f"poison {number}")])  # noqa: B023
                with pytest.raises(Quarantined):
                    await runtime.flush()
                poison.stop()

            async def resolve() -> None:
                await getattr(runtime.quarantine, how)(f"s{number}")  # noqa: B023

            async def look() -> None:
                audit(runtime)
                await runtime.flush()
                audit_at_rest(runtime)
                if runtime.status().quarantine.sessions:
                    await resolve()
                handle = await runtime.get_session(f"s{number}")  # noqa: B023
                assert len((await handle.messages()).items) == (how == "replay")  # noqa: B023
                await handle.append("user", "goes on", durability="stored")

            await prepare()
            async for _ in cancelled_everywhere(resolve):
                await look()
                number += 1
                await prepare()
            await look()
            assert number


# --- the whole runtime ------------------------------------------------------------------------------------------------


class Visit:
    """Opens a runtime, works, and closes it; keeps what was acknowledged."""

    def __init__(self) -> None:
        self.database = MemoryDatabase()
        self.acknowledged: list[str] = []
        self.unknown: list[str] = []

    async def make(self) -> None:
        async with running(Faults(), self.database) as runtime:
            handle = await runtime.get_or_create_session("s")
            for level in ("buffered", "buffered", "stored", "buffered"):
                content = f"{len(self.acknowledged) + len(self.unknown)}"
                self.unknown.append(content)
                try:
                    await handle.append("user", content, durability=level)
                except DurabilityNotReached:
                    self.acknowledged.append(self.unknown.pop())
                    raise
                self.acknowledged.append(self.unknown.pop())
                await checkpoint()

    async def check(self) -> None:
        """What was acknowledged is there once, in order; what was not, once or not at all."""
        async with running(Faults(), self.database) as runtime:
            handle = await runtime.get_or_create_session("s")
            contents = [message.content for message in (await handle.messages(limit=1000)).items]
            assert [content for content in contents if content not in self.unknown] == self.acknowledged
            assert len(contents) == len(set(contents))


async def test_a_runtime_that_is_cancelled_anywhere_drains() -> None:
    visit = Visit()

    async def make() -> None:
        try:
            await visit.make()
        except DurabilityNotReached:
            return

    waits = 0
    async for _ in cancelled_everywhere(make):
        waits += 1
        await visit.check()
    await visit.check()
    assert waits > 15
    assert len(visit.acknowledged) > waits


def test_a_task_that_asyncio_itself_cancels_drains() -> None:
    """Not by a scope of anyio's but by `Task.cancel`, as on Ctrl-C."""

    async def main() -> None:
        visit = Visit()
        for waits in range(60):
            task = asyncio.create_task(visit.make())
            for _ in range(waits):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, DurabilityNotReached):
                await task
            await visit.check()
        assert len(visit.acknowledged) > 60

    asyncio.run(main())
