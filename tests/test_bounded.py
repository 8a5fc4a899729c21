"""Memory is bounded whatever is slow, stuck, large or refused: all that is kept of sessions is counted, and has an end.

Time is virtual: a read that is stuck for half a minute takes a moment.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest

from agent_runtime import (
    IdempotencyConflict,
    InvalidInput,
    Overloaded,
    Page,
    Quarantined,
    Runtime,
    SessionHandle,
    SessionNotFound,
    StorageUnavailable,
)
from agent_runtime.changes import Batch, encode_change
from agent_runtime.residents import Resident
from agent_runtime.testing import CallName, Faults
from agent_runtime_memory import MemoryDatabase
from rig import all_wait, audit, audit_at_rest, running
from rig import virtual_time as anyio_backend

__all__ = ["anyio_backend"]

pytestmark = pytest.mark.anyio

BUDGET = 65_536
READ_TIMEOUT_S = 20.0
WIDE = "\N{CAT FACE}"


def sections(**write_behind: Any) -> dict[str, dict[str, Any]]:
    """A small budget, flushed every second, and reads that have 20 s."""
    return {
        "storage": {"read_timeout_s": READ_TIMEOUT_S},
        "write_behind": {"interval_s": 1.0, "pending_bytes_max": BUDGET, "append_timeout_s": 5.0} | write_behind,
    }


def kept_bytes(runtime: Runtime) -> int:
    """What the changes that are kept in memory take as JSON."""
    return sum(len(encode_change(change)) for each in runtime._residents.dirty.values() for change in each.changes)


def residents_alive() -> int:
    """How many residents there are at all, counted or not."""
    gc.collect()
    return sum(isinstance(each, Resident) for each in gc.get_objects())


async def long_session(database: MemoryDatabase, session_id: str, messages: int, content: str) -> None:
    """A session whose messages are in the database only."""
    async with running(Faults(), database, write_behind={"pending_bytes_max": 2**30}) as runtime:
        handle = await runtime.create_session(session_id)
        await handle.append_many([{"role": "user", "content": f"{number} {content}"} for number in range(messages)])


# --- reads that are slow ----------------------------------------------------------------------------------------------


async def test_changes_that_a_stuck_read_may_lack_keep_their_room() -> None:
    faults, database = Faults(), MemoryDatabase()
    await long_session(database, "s", 10, "long")
    async with running(faults, database, **sections()) as runtime:
        handle = await runtime.get_session("s")
        other = await runtime.create_session("t")
        await runtime.flush()
        faults.hold("messages", nth=1)
        start = anyio.current_time()
        written = 0
        async with anyio.create_task_group() as tasks:

            async def read() -> None:
                with pytest.raises(StorageUnavailable, match=r"storage\.read_timeout_s \(20 s\)"):
                    await handle.history()
                assert anyio.current_time() == pytest.approx(start + READ_TIMEOUT_S)

            tasks.start_soon(read)
            await all_wait()
            with pytest.raises(Overloaded):
                while written < 1000:
                    await other.append("user", "x" * 1000)
                    assert kept_bytes(runtime) <= runtime._budget.used <= BUDGET
                    written += 1
                    await anyio.sleep(0.01)
            await anyio.sleep(2.0)
            assert runtime.watermarks.stored == runtime.watermarks.accepted  # they wait for the read only
            assert written > 20
            audit(runtime)
            await anyio.sleep_until(start + READ_TIMEOUT_S + 0.1)
            for _ in range(100):  # nobody is stopped for ever
                await other.append("user", "x" * 1000)
        await runtime.flush()
        assert len(await handle.history()) == 10
        audit_at_rest(runtime)


async def test_who_waits_for_room_gets_it_when_the_read_ends() -> None:
    faults, database = Faults(), MemoryDatabase()
    await long_session(database, "s", 10, "long")
    async with running(faults, database, **sections(append_timeout_s=60.0)) as runtime:
        handle = await runtime.get_session("s")
        gate = faults.hold("messages", nth=1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(handle.history)
            await gate.reached.wait()
            start = anyio.current_time()
            with anyio.move_on_after(10.0):
                for _ in range(1000):
                    await handle.append("user", "x" * 1000)
            assert anyio.current_time() == pytest.approx(start + 10.0)
            tasks.start_soon(handle.append, "user", "y")
            await all_wait()
            accepted = runtime.watermarks.accepted
            gate.open()
            await all_wait()
            assert runtime.watermarks.accepted == accepted + 1
        await runtime.flush()
        audit_at_rest(runtime)


async def test_changes_that_wait_for_a_read_make_no_batches_small() -> None:
    faults, database = Faults(), MemoryDatabase()
    await long_session(database, "s", 10, "long")
    async with running(faults, database, **sections(interval_s=5.0)) as runtime:
        handle = await runtime.get_session("s")
        gate = faults.hold("messages", nth=1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(handle.history)
            await gate.reached.wait()
            await handle.append("user", "x" * 40_000)
            await runtime.flush()
            before = faults.count("apply")
            for _ in range(10):
                await handle.append("user", "y")
                await anyio.sleep(0.4)
            assert faults.count("apply") == before
            gate.open()
        await runtime.flush()


async def test_reads_that_follow_one_another_without_a_gap_keep_no_change_for_long() -> None:
    faults, database = Faults(), MemoryDatabase()
    await long_session(database, "s", 10, "long")
    async with running(faults, database, **sections()) as runtime:
        handle, other = await runtime.get_session("s"), await runtime.create_session("t")
        faults.delay(3.0, "messages")
        async with anyio.create_task_group() as tasks:
            for second in range(60):
                tasks.start_soon(lambda: handle.messages(limit=2))
                await other.append("user", "x")
                await anyio.sleep(1.0)
                assert sum(len(each.pending) for each in runtime._residents.dirty.values()) <= 6
                assert len(runtime._residents._views) <= 4, second
        await runtime.flush()
        audit_at_rest(runtime)


async def test_of_reads_that_have_ended_nothing_stays_behind_a_stuck_one() -> None:
    faults, database = Faults(), MemoryDatabase()
    for number in range(3):
        await long_session(database, f"s{number}", 5, "long")
    async with running(Faults(), database) as runtime:
        for number in range(200):
            await runtime.create_session(f"t{number}", title="x" * 500)
    others = residents_alive()  # of other tests
    async with running(faults, database, **sections()) as runtime:
        handle = await runtime.get_session("s0")
        gate = faults.hold("messages", nth=1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(handle.history)
            await gate.reached.wait()
            for number in range(200):
                other = await runtime.get_session(f"t{number}")
                await other.messages()
                await other.get_document("notes", "1")
            assert runtime.status().residents.evictions > 100
            assert residents_alive() - others <= runtime._residents.count
            assert len(runtime._residents._views) == 1
            gate.open()
        audit_at_rest(runtime)


READS: dict[CallName, Callable[[Runtime, SessionHandle], Awaitable[Any]]] = {
    "snapshot": lambda _, handle: handle.history(),
    "head": lambda runtime, _: runtime.get_session("unknown"),
    "messages": lambda _, handle: handle.messages(),
    "switches": lambda _, handle: handle.switches(),
    "document": lambda _, handle: handle.get_document("notes", "1"),
    "documents": lambda _, handle: handle.list_documents("notes"),
    "sessions": lambda runtime, _: runtime.list_sessions(),
    "outcome": lambda runtime, _: runtime.create_session(idempotency_key="k"),
    "quarantine": lambda runtime, _: runtime.quarantine.entries(),
}


@pytest.mark.parametrize("name", READS)
async def test_a_read_that_is_stuck_fails_in_time(name: CallName) -> None:
    faults, database = Faults(), MemoryDatabase()
    await long_session(database, "s", 10, "long")
    async with running(faults, database, **sections()) as runtime:
        handle = await runtime.get_session("s")
        await handle.switch_agent("coder")
        start = anyio.current_time()
        faults.hold(name)
        errors: list[StorageUnavailable] = []

        async def read() -> None:
            with pytest.raises(StorageUnavailable, match=r"read_timeout_s") as caught:
                await READS[name](runtime, handle)
            errors.append(caught.value)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            tasks.start_soon(read)  # of two who want the same session, one waits for the other's load
        assert anyio.current_time() == pytest.approx(start + READ_TIMEOUT_S)
        assert len(errors) == 2
        faults.clear()
        await READS[name](runtime, handle) if name != "head" else await runtime.get_session("s")
        await runtime.flush()
        audit_at_rest(runtime)


# --- sessions that are large ------------------------------------------------------------------------------------------


async def _pop(handle: SessionHandle) -> int:
    seq = (await handle.record()).message_count
    while (message := await handle.pop()) is not None:
        assert message.seq == seq
        seq -= 1
    return 60 - seq


LARGE_READS: dict[str, Callable[[SessionHandle], Awaitable[int]]] = {
    "whole": lambda handle: _length(handle.history()),
    "part": lambda handle: _length(handle.history(15)),
    "newest": lambda handle: _items(handle.messages(limit=20, order="desc")),
    "pop": _pop,
}


async def _length(history: Awaitable[list[Any]]) -> int:
    return len(await history)


async def _items(page: Awaitable[Page[Any]]) -> int:
    return len((await page).items)


@pytest.mark.parametrize(("read", "count"), [("whole", 60), ("part", 15), ("newest", 20), ("pop", 60)])
async def test_a_session_larger_than_all_the_room_takes_a_part_of_it(read: str, count: int) -> None:
    database = MemoryDatabase()
    for session_id in "abc":
        await long_session(database, session_id, 60, "x" * 3000)
    async with running(Faults(), database, residents={"bytes_max": 100_000, "tail_messages": 200}) as runtime:
        for session_id in "abc":
            handle = await runtime.get_session(session_id)
            assert await LARGE_READS[read](handle) == count
            await runtime.flush()
            assert runtime._residents.bytes <= 40_000
            audit_at_rest(runtime)
        assert runtime.status().residents.evictions == 0


async def test_a_session_that_grows_larger_than_all_the_room_takes_a_part_of_it() -> None:
    async with running(Faults(), residents={"bytes_max": 100_000, "tail_messages": 200}) as runtime:
        handle = await runtime.create_session("s")
        for _ in range(60):
            await handle.append("user", "x" * 3000)
            await runtime.flush()
            assert runtime._residents.bytes <= 20_000
        assert runtime.status().residents.evictions == 0
        audit_at_rest(runtime)
        assert len(await handle.history()) == 60


async def test_messages_that_are_larger_than_that_part_can_be_popped() -> None:
    database = MemoryDatabase()
    await long_session(database, "s", 5, "x" * 10_000)
    async with running(Faults(), database) as runtime:
        handle = await runtime.get_session("s")
        for left in range(5, -1, -1):
            message = await handle.pop()
            assert (message.seq if message else 0) == left
            assert runtime._residents.bytes <= 20_000
            await runtime.flush()
        audit_at_rest(runtime)


async def test_a_large_outcome_stays_while_it_is_not_stored() -> None:
    faults = Faults()
    async with running(faults) as runtime:
        handle = await runtime.create_session("s")
        gate = faults.hold("apply", nth=1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(runtime.flush)
            await gate.reached.wait()
            message = await handle.append("user", "x" * 10_000, idempotency_key="k")
            gate.open()
        assert runtime.watermarks.stored == 1
        outage = faults.fail("snapshot")
        assert await handle.append("user", "x" * 10_000, idempotency_key="k") == message
        outage.stop()
        await runtime.flush()
        assert await handle.append("user", "x" * 10_000, idempotency_key="k") == message
        assert (await handle.record()).message_count == 1
        audit_at_rest(runtime)


async def test_large_outcomes_of_calls_stay_a_part_of_the_room() -> None:
    """Sessions that are never without an unstored change can't be let go, but what their calls gave can."""
    faults, database = Faults(), MemoryDatabase()
    bytes_max = 200_000
    room = {"bytes_max": bytes_max, "tail_messages": 2}
    async with running(faults, database, **sections(pending_bytes_max=2**30), residents=room) as runtime:
        handles = [await runtime.create_session(f"s{number}") for number in range(5)]
        for turn in range(40):
            for handle in handles:
                await handle.put_document("notes", f"{turn}", "x" * 3000, idempotency_key=f"key {turn}")
            await runtime.flush()
            for handle in handles:
                await handle.append("user", "so that it stays")
            assert runtime._residents.bytes <= bytes_max + 50_000
            audit(runtime)
        for handle in handles:
            await handle.put_document("notes", "0", "x" * 3000, idempotency_key="key 0")  # the same as before
            with pytest.raises(IdempotencyConflict):
                await handle.put_document("notes", "0", "y", idempotency_key="key 1")
    async with running(Faults(), database, residents=room) as runtime:
        handle = await runtime.get_session("s0")
        assert runtime._residents.bytes <= 20_000
        count = runtime.watermarks.accepted
        await handle.put_document("notes", "0", "x" * 3000, idempotency_key="key 0")
        assert runtime.watermarks.accepted == count
        audit_at_rest(runtime)


async def test_ids_and_texts_of_wide_characters_count_as_what_they_take() -> None:
    async with running() as runtime:
        for number in range(300):
            session_id = f"{number:03}" + WIDE * 252
            with pytest.raises(SessionNotFound):
                await runtime.get_session(session_id)
            assert runtime._residents.count * sys.getsizeof(session_id) <= runtime._residents.bytes_max
    async with running() as runtime:
        metadata = {"text": WIDE + "m" * 2000}
        handle = await runtime.create_session(
            "s", title=WIDE + "t" * 400, description=WIDE + "d" * 2000, metadata=metadata
        )
        await handle.update_context(metadata={"text": WIDE + "c" * 2000})
        await handle.append("user", WIDE + "n" * 2000, idempotency_key="k")
        assert runtime._residents.bytes >= 4 * (400 + 4 * 2000)
        await runtime.flush()
        audit_at_rest(runtime)


# --- changes that are refused, or grow --------------------------------------------------------------------------------


def poisoned(batch: Batch) -> bool:
    return any(row.key == "poison" for row in batch.documents)


async def test_changes_in_quarantine_keep_their_room_until_they_leave_it() -> None:
    faults, database = Faults(), MemoryDatabase()
    faults.reject(poisoned)
    options = sections(quarantine_max=1000, append_timeout_s=2.0)
    async with running(faults, database, **options) as runtime:
        held = []
        with pytest.raises(Overloaded):
            for number in range(100):
                handle = await runtime.create_session(f"s{number}")
                await runtime.flush()
                await handle.put_document("notes", "poison", "x" * 5000)
                await handle.append("user", "behind it")
                held.append(handle.session_id)
                with pytest.raises(Quarantined):
                    await runtime.flush()
                assert kept_bytes(runtime) <= runtime._budget.used <= BUDGET
        assert 5 < len(held) < 12
        audit(runtime)
        full = runtime._budget.used
        await runtime.quarantine.drop(held[0])
        assert runtime._budget.used < full - 5000
        await (await runtime.get_session(held[0])).append("user", "there is room again")
        with pytest.raises(Quarantined):
            await runtime.quarantine.replay(held[1])
        await runtime.flush()
        assert kept_bytes(runtime) <= runtime._budget.used
        audit_at_rest(runtime)
        left = runtime._budget.used
    faults.clear()
    async with running(faults, database, **options) as runtime:
        assert kept_bytes(runtime) <= runtime._budget.used
        assert runtime._budget.used == pytest.approx(left, rel=0.1)
        for session_id in sorted({entry.session_id for entry in await runtime.quarantine.entries()}):
            await runtime.quarantine.replay(session_id)
        assert runtime._budget.used == 0
        audit_at_rest(runtime)


async def test_changes_that_grow_while_they_wait_for_room_wait_on() -> None:
    """Each merges a key into the same object, so that the last is many times what it was when it asked for room."""
    faults = Faults()
    async with running(faults, **sections(append_timeout_s=1000.0)) as runtime:
        handle = await runtime.create_session("s")
        await handle.append("user", "x" * 60_000)
        used: list[int] = []

        async def merge(number: int) -> None:
            with suppress(InvalidInput):  # the object has outgrown the budget
                await handle.merge_context({f"{number}": "y" * 4000})
            used.append(runtime._budget.used)

        gate = faults.hold("apply", nth=1)
        async with anyio.create_task_group() as tasks:
            for number in range(14):
                tasks.start_soon(merge, number)
            await gate.reached.wait()
            await all_wait()
            gate.open()
        assert len(used) == 14
        assert max(used) <= BUDGET
        assert len((await handle.context()).metadata) == 14
        await runtime.flush()
        audit_at_rest(runtime)
