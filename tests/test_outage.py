"""While the database is away, slow or full of errors, nothing is lost, nobody else is stopped, and memory is bounded.

Time is virtual: a minute of outage takes a moment.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import anyio
import pytest

from agent_runtime import (
    DurabilityNotReached,
    InvalidInput,
    LeaseLost,
    NewMessage,
    Overloaded,
    Runtime,
    RuntimeClosed,
    SessionHandle,
    StorageFatal,
    StorageUnavailable,
    hookimpl,
)
from agent_runtime.changes import Batch, Receipt
from agent_runtime.errors import DrainIncomplete, SequenceMismatch
from agent_runtime.storage import StorageConfig
from agent_runtime.testing import Faults
from agent_runtime_memory import MemoryDatabase
from model import Model
from rig import all_wait, audit, audit_at_rest, config, needed_bytes, opened, running
from rig import virtual_time as anyio_backend

__all__ = ["anyio_backend"]

pytestmark = pytest.mark.anyio

INTERVAL_S = 5.0


class Observer:
    """Notes when batches were stored, and when tries failed."""

    def __init__(self) -> None:
        self.stored: list[tuple[float, Receipt]] = []
        self.failed: list[tuple[float, int]] = []

    @hookimpl
    def agent_runtime_batch_stored(self, receipt: Receipt) -> None:
        self.stored.append((anyio.current_time(), receipt))

    @hookimpl
    def agent_runtime_flush_failed(self, batch: Batch, attempt: int) -> None:
        assert batch.changes
        self.failed.append((anyio.current_time(), attempt))


@asynccontextmanager
async def observed(
    faults: Faults, database: MemoryDatabase | None = None, **write_behind: Any
) -> AsyncIterator[tuple[Runtime, Observer]]:
    """A runtime that flushes every INTERVAL_S, and what its storage does."""
    observer, database = Observer(), database or MemoryDatabase()
    options = config(write_behind={"interval_s": INTERVAL_S} | write_behind)
    async with opened(options, database.open, faults, observer) as runtime:
        yield runtime, observer


class Producer:
    """Appends to a session, keeping to the model."""

    def __init__(self, model: Model, handle: SessionHandle) -> None:
        self.model = model
        self.handle = handle

    async def append(self, content: str = "hi", **options: Any) -> None:
        session = self.model.sessions[self.handle.session_id]
        message = await self.handle.append("user", content, **options)
        session.append([NewMessage(role="user", content=content)], [message])

    async def run(self, until_s: float, every_s: float) -> None:
        while anyio.current_time() < until_s:
            await self.append(f"at {anyio.current_time():.2f}")
            await anyio.sleep(every_s)


async def producer(runtime: Runtime, model: Model, session_id: str | None = None) -> Producer:
    handle = await runtime.create_session(session_id)
    await model.create(handle)
    return Producer(model, handle)


async def check_all(runtime: Runtime, model: Model) -> None:
    """Everything is there, once and in order."""
    for session in model.sessions.values():
        handle = await runtime.get_session(session.session_id)
        await session.settle(handle)
        assert (await handle.messages(limit=1000)).items == session.messages
    assert {record.session_id async for record in runtime.scan_sessions()} == set(model.sessions)


# --- away -------------------------------------------------------------------------------------------------------------


async def test_an_outage_of_a_minute_under_load_loses_nothing() -> None:
    faults, database, model = Faults(), MemoryDatabase(), Model()
    async with observed(faults, database) as (runtime, observer):
        start = anyio.current_time()
        outage = faults.fail_between(start + 7, start + 67)
        async with anyio.create_task_group() as tasks:
            for number in range(4):
                each = await producer(runtime, model, f"s{number}")
                tasks.start_soon(each.run, start + 80, 0.3 + number / 10)
            await anyio.sleep_until(start + 60)
            assert runtime.status().state == "degraded"
            assert runtime.status().pending.oldest_age_s >= 50
            newcomer = await producer(runtime, model)  # its id is made for it, so that the database need not be asked
            tasks.start_soon(newcomer.run, start + 80, 0.5)
            with pytest.raises(StorageUnavailable):
                await runtime.get_session("never loaded")
        await runtime.flush()
        assert runtime.status().state == "running"
        assert outage.hits == len(observer.failed) + 1
        audit_at_rest(runtime)
        await check_all(runtime, model)
    async with running(Faults(), database) as runtime:
        await check_all(runtime, model)
    assert sum(len(session.messages) for session in model.sessions.values()) > 700


async def test_a_purge_that_fails_is_tried_again_every_ten_seconds_and_stops_nobody() -> None:
    faults = Faults()
    async with running(faults) as runtime:
        session = await runtime.create_session("s")
        await session.append("user", "hi", durability="stored")
        await all_wait()
        outage = faults.fail("purge")
        await session.clear(durability="stored")
        await session.append("user", "ho", durability="stored")
        await anyio.sleep(35.0)
        assert outage.hits == 4
        outage.stop()
        purges = faults.calls.count("purge")
        await anyio.sleep(10.0)
        assert faults.calls.count("purge") - purges == 2  # the message, and nothing more


async def test_tries_grow_rarer_up_to_ten_seconds_and_are_spread() -> None:
    faults = Faults()
    async with observed(faults) as (runtime, observer):
        await runtime.create_session("s")
        outage = faults.fail("apply")
        await anyio.sleep(INTERVAL_S + 200)
        outage.stop()
        await runtime.flush()
    assert [attempt for _, attempt in observer.failed] == list(range(1, len(observer.failed) + 1))
    spread = set()
    for (before, attempt), (after, _) in pairwise(observer.failed):
        ceiling = min(10.0, 0.1 * 2 ** (attempt - 1))
        assert ceiling / 2 <= after - before <= ceiling * 1.001
        spread.add(round((after - before) / ceiling, 3))
    assert len(spread) > len(observer.failed) / 2


async def test_what_time_will_not_heal_is_tried_rarely() -> None:
    faults = Faults()
    async with observed(faults) as (runtime, observer):
        await runtime.create_session("s")
        outage = faults.fail("apply", error=StorageFatal("the disk is full of holes"))
        await anyio.sleep(INTERVAL_S + 100)
        assert "holes" in (runtime.status().flush.last_error or "")
        outage.stop()
        await runtime.flush()
    assert all(5 <= after - before <= 10.01 for (before, _), (after, _) in pairwise(observer.failed))


@pytest.mark.parametrize("error", [ValueError("odd"), OSError("gone"), KeyError("x"), RuntimeError("secret text")])
async def test_whatever_a_storage_raises_is_tried_again(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()
    async with observed(faults) as (runtime, observer):
        fault = faults.fail("apply", nth=1, error=error)
        handle = await runtime.create_session("s")
        await handle.append("user", "hi", durability="stored")
        assert (fault.hits, len(observer.failed)) == (1, 1)
        assert "secret" not in caplog.text


@pytest.mark.parametrize(
    "name", ["snapshot", "head", "outcome", "messages", "switches", "document", "documents", "sessions"]
)
async def test_whatever_a_storage_raises_in_a_read_is_storage_unavailable(name: Any) -> None:
    faults, database = Faults(), MemoryDatabase()
    async with running(faults, database) as runtime:
        handle = await runtime.create_session("s")
        for number in range(9):
            await handle.append("user", f"{number}")
        await handle.switch_agent("coder")
    async with running(faults, database) as runtime:
        if name != "head":
            handle = await runtime.get_session("s")
        fault = faults.fail(name, error=OSError("odd"))
        reads: dict[str, Any] = {
            "head": lambda: runtime.get_session("s"),
            "snapshot": handle.history,
            "outcome": lambda: runtime.create_session("t", idempotency_key="k"),
            "messages": handle.history,
            "switches": handle.switches,
            "document": lambda: handle.get_document("notes", "1"),
            "documents": lambda: handle.list_documents("notes"),
            "sessions": runtime.list_sessions,
        }
        if name == "outcome":
            with pytest.raises(StorageUnavailable):
                await reads[name]()
        with pytest.raises(StorageUnavailable, match=r"the storage failed with OSError$"):  # its text may hold anything
            await reads[name]()
        assert fault.hits
        fault.stop()
        await reads[name]()


async def test_a_load_that_fails_fails_for_all_who_wait_for_it_and_can_be_repeated() -> None:
    faults, database = Faults(), MemoryDatabase()
    async with running(faults, database) as runtime:
        await runtime.create_session("s")
    async with running(faults, database) as runtime:
        gate, failing, before = faults.hold("head", nth=1), faults.fail("head", nth=1), faults.count("head")
        errors: list[Exception] = []

        async def load() -> None:
            try:
                await runtime.get_session("s")
            except StorageUnavailable as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(load)
            await all_wait()
            gate.open()
        assert (len(errors), failing.hits, faults.count("head") - before) == (5, 1, 1)
        await load()
        assert len(errors) == 5
        audit_at_rest(runtime)


# --- full -------------------------------------------------------------------------------------------------------------


async def fill(each: Producer, runtime: Runtime, size: int = 2000) -> None:
    """Append until the next append of this size would have to wait."""
    budget = runtime._budget
    while budget.used + 1000 + size <= budget.bytes_max:
        await each.append("x" * size)


async def test_past_the_budget_an_append_waits_and_then_fails_and_changes_nothing() -> None:
    faults, database, model = Faults(), MemoryDatabase(), Model()
    async with observed(faults, database, pending_bytes_max=65_536, append_timeout_s=7.0) as (runtime, _):
        each, other = await producer(runtime, model, "s"), await producer(runtime, model, "t")
        outage = faults.fail("apply")
        await fill(each, runtime)
        accepted, used, start = runtime.watermarks.accepted, runtime._budget.used, anyio.current_time()
        with pytest.raises(Overloaded) as caught:
            await each.handle.append("user", "y" * 5000)
        assert anyio.current_time() - start == pytest.approx(7.0)
        assert caught.value.retry_after_s >= 1
        assert (runtime.watermarks.accepted, runtime._budget.used) == (accepted, used)
        assert used <= 65_536
        await check_all(runtime, model)
        audit(runtime)
        outage.stop()
        await each.append("y" * 5000)
        await other.append("z")
        await runtime.flush()
        audit_at_rest(runtime)
        await check_all(runtime, model)
    async with running(Faults(), database) as runtime:
        await check_all(runtime, model)


async def test_a_change_that_takes_all_the_room_there_is_waits_for_it_and_a_larger_one_is_refused() -> None:
    faults, model = Faults(), Model()
    async with observed(faults, pending_bytes_max=65_536) as (runtime, _):
        each = await producer(runtime, model, "s")
        await each.append("a title")
        await runtime.flush()
        await each.append("x" * 60_000)
        short = 65_536 - runtime._budget.used
        await runtime.flush()
        await each.append("x" * (60_000 + short))
        assert runtime._budget.used == 65_536
        await each.append("y" * (60_000 + short))  # for which the first must be stored
        assert runtime._budget.used == 65_536
        with pytest.raises(InvalidInput, match=r"takes 65537 bytes, more than all of .* \(65536\)"):
            await each.append("z" * (60_001 + short))
        await runtime.flush()
        audit_at_rest(runtime)
        await check_all(runtime, model)


async def test_room_is_given_in_the_order_it_was_asked_for() -> None:
    faults, model = Faults(), Model()
    async with observed(faults, pending_bytes_max=65_536, append_timeout_s=600.0) as (runtime, _):
        each = await producer(runtime, model, "s")
        outage = faults.fail("apply")
        await fill(each, runtime)
        sizes = [
            40_000,
            40_000,
            40_000,
            10,
        ]  # at no time is there room for two large ones, but for the small one always
        done: list[int] = []

        async def append(number: int, size: int) -> None:
            await each.append("z" * size)
            done.append(number)

        async with anyio.create_task_group() as tasks:
            for number, size in enumerate(sizes):
                tasks.start_soon(append, number, size)
                await all_wait()
            await anyio.sleep(30)
            assert not done
            outage.stop()
        assert done[:2] == [0, 1]
        assert set(done[2:]) == {2, 3}  # they get their room in one step
        await runtime.flush()
        audit_at_rest(runtime)
        await check_all(runtime, model)


async def test_who_waits_for_room_makes_the_flush_come() -> None:
    async with observed(Faults(), pending_bytes_max=65_536, interval_s=1000.0) as (runtime, _):
        handle = await runtime.create_session("s")
        await handle.append("user", "x" * 20_000)  # less than half of the budget: no reason to flush
        await all_wait()
        start = anyio.current_time()
        await handle.append("user", "y" * 50_000)
        assert anyio.current_time() - start < 0.1


@pytest.mark.parametrize("read", [None, "history", "history_json"])
async def test_memory_stays_bounded_under_load(read: str | None) -> None:
    """However many sessions are at work at once, and never without an unstored change."""
    faults, model, bytes_max = Faults(), Model(), 300_000
    sections: dict[str, dict[str, Any]] = {
        "residents": {"bytes_max": bytes_max, "tail_messages": 50},
        "write_behind": {"interval_s": 1.0, "pending_bytes_max": 400_000, "append_timeout_s": 60.0},
    }
    async with running(faults, MemoryDatabase(), **sections) as runtime:
        start = anyio.current_time()
        faults.fail_between(start + 5, start + 7, "apply")
        faults.delay(0.2, "apply")

        def check() -> None:
            assert runtime._residents.bytes <= bytes_max + needed_bytes(runtime) + 20_000
            assert runtime._budget.used <= 400_000

        async def load(number: int) -> None:
            each = await producer(runtime, model, f"s{number}")
            for turn in range(80):
                await each.append("x" * (200 + 10 * turn))
                check()
                if read is not None and turn % 10 == 9:
                    await getattr(each.handle, read)()
                    check()
                await anyio.sleep(0.15)

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(load, number)
        await runtime.flush()
        audit_at_rest(runtime)
        assert runtime._residents.bytes <= bytes_max
        assert runtime.status().residents.evictions
        await check_all(runtime, model)


# --- in time ----------------------------------------------------------------------------------------------------------


async def test_callers_who_wait_for_stored_share_a_transaction() -> None:
    faults, model = Faults(), Model()
    async with observed(faults) as (runtime, observer):
        producers = [await producer(runtime, model, f"s{number}") for number in range(50)]
        async with anyio.create_task_group() as tasks:
            for each in producers:
                tasks.start_soon(lambda each=each: each.append(durability="stored"))  # type: ignore[misc]
        assert [receipt.changes for _, receipt in observer.stored] == [100]
        await check_all(runtime, model)


async def test_callers_who_come_during_a_transaction_share_the_next() -> None:
    faults, model = Faults(), Model()
    async with observed(faults) as (runtime, observer):
        producers = [await producer(runtime, model, f"s{number}") for number in range(50)]
        gate = faults.hold("apply", nth=1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(runtime.flush)
            await gate.reached.wait()
            for each in producers:
                tasks.start_soon(lambda each=each: each.append(durability="stored"))  # type: ignore[misc]
            await all_wait()
            gate.open()
        assert [receipt.changes for _, receipt in observer.stored] == [50, 50]
        await check_all(runtime, model)


async def test_at_most_one_transaction_an_interval_or_a_thousand_changes() -> None:
    faults, model = Faults(), Model()
    async with observed(faults) as (runtime, observer):
        start = anyio.current_time()
        each = await producer(runtime, model, "s")
        await each.run(start + 60.0, 0.05)
        slow = len(observer.stored)
        assert slow <= 12
        for _ in range(3_500):
            await each.append()
        await all_wait()
        assert len(observer.stored) - slow <= 4
        await anyio.sleep(INTERVAL_S + 0.01)
        assert runtime.watermarks.stored == runtime.watermarks.accepted
        assert max(receipt.changes for _, receipt in observer.stored) == 1000


async def test_half_the_budget_is_reason_enough_for_a_batch() -> None:
    faults, model = Faults(), Model()
    async with observed(faults, pending_bytes_max=65_536, interval_s=1000.0) as (runtime, observer):
        each = await producer(runtime, model, "s")
        while runtime._budget.used + 4500 < 32_768:
            await each.append("x" * 4000)
        await anyio.sleep(100)
        assert observer.stored == []
        start = anyio.current_time()
        await each.append("x" * 9000)
        await all_wait()
        assert (len(observer.stored), anyio.current_time()) == (1, start)
        await check_all(runtime, model)


async def test_no_change_waits_longer_than_an_interval_while_batches_are_quick() -> None:
    faults, model = Faults(), Model()
    async with observed(faults) as (runtime, observer):
        each = await producer(runtime, model, "s")
        accepted: dict[int, float] = {}
        for pause in (0.1, 4.9, 0.1, 5.1, 12.0, 3.0, 0.0, 0.0, 2.0, 6.0):
            accepted[runtime.watermarks.accepted] = anyio.current_time()
            await anyio.sleep(pause)
            await each.append()
        await anyio.sleep(INTERVAL_S + 0.01)
        assert runtime.watermarks.stored == runtime.watermarks.accepted
        for stored_at, receipt in observer.stored:
            waited = [stored_at - at for sequence, at in accepted.items() if receipt.after < sequence <= receipt.last]
            assert max(waited, default=0) <= INTERVAL_S + 0.01


async def test_what_a_full_batch_leaves_behind_keeps_its_age() -> None:
    faults, model = Faults(), Model()
    async with observed(faults, batch_changes=10) as (runtime, _):
        each = await producer(runtime, model, "s")
        faults.delay(30.0, "apply", nth=1)
        start = anyio.current_time()
        await anyio.sleep_until(start + INTERVAL_S + 1)
        for _ in range(15):
            await each.append()
        await anyio.sleep_until(start + INTERVAL_S + 30 + 0.1)  # the slow batch ends; a full one follows, and the rest
        assert runtime.watermarks.stored == runtime.watermarks.accepted


async def test_a_level_that_is_not_reached_in_time() -> None:
    faults, model, database = Faults(), Model(), MemoryDatabase()
    async with observed(faults, database, durability_timeout_s=8.0) as (runtime, _):
        each = await producer(runtime, model, "s")
        outage = faults.fail("apply")
        start = anyio.current_time()
        with pytest.raises(DurabilityNotReached) as caught:
            await each.handle.append("user", "hi", durability="stored")
        assert 8.0 <= anyio.current_time() - start <= 8.1  # what is looked at is not the clock, but ticks
        model.sessions["s"].append([NewMessage(role="user", content="hi")], [caught.value.outcome])
        assert (caught.value.sequence, caught.value.reached) == (2, "buffered")
        with pytest.raises(
            StorageUnavailable, match=r"2 change\(s\) are still not stored after 8 s: StorageUnavailable"
        ):
            await runtime.flush()
        outage.stop()
        await anyio.sleep(10.0)  # the longest pause between two tries
        await runtime.flush()
        await check_all(runtime, model)


# --- at the end -------------------------------------------------------------------------------------------------------


async def test_a_close_with_the_storage_away_says_how_much_is_lost() -> None:
    faults, database, model = Faults(), MemoryDatabase(), Model()
    start = anyio.current_time()
    with pytest.raises(DrainIncomplete, match=r"3 change\(s\).*lost.*planned fault") as caught:
        async with observed(faults, database, drain_timeout_s=20.0) as (runtime, _):
            each = await producer(runtime, model, "s")
            await runtime.flush()
            faults.fail("apply")
            for _ in range(3):
                await each.handle.append("user", "lost")
            start = anyio.current_time()
    assert caught.value.changes == 3
    assert anyio.current_time() - start == pytest.approx(20.0, abs=0.1)
    async with running(Faults(), database) as runtime:
        await check_all(runtime, model)


async def test_a_close_waits_for_a_storage_that_comes_back() -> None:
    faults, database, model = Faults(), MemoryDatabase(), Model()
    async with observed(faults, database, drain_timeout_s=60.0) as (runtime, _):
        each = await producer(runtime, model, "s")
        await each.append()
        now = anyio.current_time()
        faults.fail_between(now, now + 30, "apply")
    async with running(Faults(), database) as runtime:
        await check_all(runtime, model)


async def test_an_apply_that_hangs_is_broken_off_at_the_end_of_the_drain() -> None:
    faults, database = Faults(), MemoryDatabase()
    start = anyio.current_time()
    with pytest.raises(DrainIncomplete):
        async with observed(faults, database, drain_timeout_s=20.0) as (runtime, _):
            faults.hold("apply")
            await runtime.create_session("s")
            await anyio.sleep(INTERVAL_S + 1)
            start = anyio.current_time()
    assert anyio.current_time() - start == pytest.approx(20.0)


async def test_an_error_of_the_block_comes_out_and_tells_of_what_is_lost() -> None:
    faults = Faults()
    with pytest.raises(KeyError, match="mine") as caught:
        async with observed(faults) as (runtime, _):
            faults.fail("apply")
            await runtime.create_session("s")
            raise KeyError("mine")
    assert any("1 change(s) could not be stored" in note for note in caught.value.__notes__)


async def test_waiters_at_the_end_are_told() -> None:
    """Who waits in another task when the runtime is closed is told, whatever it waits for."""
    told: list[str] = []
    faults = Faults()

    async def wait(what: Any, *errors: type[Exception]) -> None:
        try:
            await what()
        except errors as error:
            told.append(type(error).__name__)

    async with anyio.create_task_group() as tasks:
        with pytest.raises(DrainIncomplete):
            async with observed(faults, pending_bytes_max=65_536, append_timeout_s=1000.0) as (runtime, _):
                handle = await runtime.create_session("s")
                faults.fail("apply")
                await handle.append("user", "x" * 60_000)
                tasks.start_soon(wait, lambda: handle.append("user", "y" * 60_000), RuntimeClosed)
                tasks.start_soon(wait, lambda: handle.append("user", "y" * 60_000, durability="stored"), RuntimeClosed)
                tasks.start_soon(wait, runtime.flush, RuntimeClosed)
                await all_wait()
                assert not told
    assert told == ["RuntimeClosed"] * 3
    with pytest.raises(RuntimeClosed):
        await handle.append("user", "too late")


# --- fenced -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def fenced(faults: Faults, *, lease_s: float) -> AsyncIterator[tuple[Runtime, SessionHandle]]:
    """A runtime whose lease somebody else has taken; whoever closes it is told."""
    database = MemoryDatabase()
    with pytest.raises(LeaseLost):
        async with observed(faults, database) as (runtime, _):
            handle = await runtime.create_session("s")
            await runtime.flush()
            async with database.open(StorageConfig(url="memory:")) as storage:
                await storage.leases.release(runtime._lease.grant.fence)
                runtime._lease._duration_s = lease_s
                yield runtime, handle


async def check_that_all_is_over(runtime: Runtime, handle: SessionHandle) -> None:
    calls: list[Any] = [
        lambda: handle.append("user", "x"),
        handle.history,
        handle.record,
        handle.messages,
        handle.context,
        handle.delete,
        lambda: runtime.get_session("s"),
        lambda: runtime.create_session("t"),
        runtime.create_session,
        runtime.list_sessions,
        runtime.flush,
        runtime.quarantine.entries,
        lambda: runtime.quarantine.replay("s"),
        lambda: runtime.quarantine.drop("s"),
    ]
    for call in calls:
        with pytest.raises(LeaseLost):
            await call()
    assert runtime.status().state == "fenced"


async def test_the_holder_counts_its_lease_from_before_it_asked() -> None:
    """Nobody knows when the database took the time: another one may begin to try earlier than the answer says."""
    faults = Faults()
    faults.delay(4.0, "acquire")
    faults.delay(2.0, "renew")
    async with running(faults, lease={"duration_s": 9.0}) as runtime:
        assert runtime.status().lease.expires_in_s == pytest.approx(9.0 - 4.0)
        await anyio.sleep(3.0 + 1.9)
        assert runtime.status().lease.expires_in_s == pytest.approx(9.0 - 4.0 - 4.9)
        await anyio.sleep(0.2)
        assert runtime.status().lease.expires_in_s == pytest.approx(9.0 - 2.1)


async def test_a_lease_that_is_lost_is_found_out_by_a_batch() -> None:
    async with fenced(Faults(), lease_s=1e6) as (runtime, handle):
        with pytest.raises(DurabilityNotReached, match="lease") as caught:
            await handle.append("user", "x", durability="stored")
        assert isinstance(caught.value.__cause__, LeaseLost)
        await check_that_all_is_over(runtime, handle)


@pytest.mark.parametrize("found", [1, 4, 0], ids=["what is stored already", "more than there is", "less than stored"])
async def test_a_database_that_stands_where_this_runtime_did_not_take_it_is_another_s(found: int) -> None:
    faults = Faults()
    with pytest.raises(LeaseLost, match=f"the database stands at sequence {found}, this runtime stored up to 1 of 3"):
        async with running(faults) as runtime:
            handle = await runtime.create_session("s", durability="stored")
            await handle.append("user", "x")
            faults.fail("apply", nth=1, error=SequenceMismatch(1, found))
            with pytest.raises(DurabilityNotReached, match="somebody else writes to it"):
                await handle.append("user", "y", durability="stored")
            await check_that_all_is_over(runtime, handle)


async def test_a_lease_that_is_lost_is_found_out_by_its_renewal() -> None:
    faults, database = Faults(), MemoryDatabase()
    told: list[object] = []
    with pytest.raises(LeaseLost):
        async with running(
            faults, database, lease={"duration_s": 9.0}, write_behind={"pending_bytes_max": 65_536}
        ) as runtime:
            handle = await runtime.create_session("s")
            gate = faults.hold("apply")

            async def wait(what: Any) -> None:
                try:
                    await what()
                except (LeaseLost, DurabilityNotReached) as error:
                    told.append(error if isinstance(error, LeaseLost) else error.__cause__)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait, lambda: handle.append("user", "y", durability="stored"))
                tasks.start_soon(wait, runtime.flush)
                await gate.reached.wait()
                await handle.append("user", "x" * 60_000)
                tasks.start_soon(wait, lambda: handle.append("user", "z" * 60_000))
                async with database.open(StorageConfig(url="memory:")) as storage:
                    await storage.leases.release(runtime._lease.grant.fence)
            assert len(told) == 3
            assert all(isinstance(error, LeaseLost) for error in told)
            await check_that_all_is_over(runtime, handle)


@pytest.mark.parametrize("step", range(1, 25, 2))
async def test_a_runtime_that_is_fenced_off_at_any_step_of_a_flush_ends(step: int) -> None:
    faults = Faults()
    with pytest.raises(LeaseLost), anyio.fail_after(1):
        async with observed(faults) as (runtime, _):
            handle = await runtime.create_session("s")
            for number in range(990):
                await handle.append("user", f"{number}")
            faults.hold("apply")
            async with anyio.create_task_group() as tasks:

                async def flush() -> None:
                    with pytest.raises(LeaseLost):
                        await runtime.flush()

                tasks.start_soon(flush)
                for _ in range(step):
                    await anyio.lowlevel.checkpoint()
                runtime._fence_off(LeaseLost("as if the renewal had found it out"))
