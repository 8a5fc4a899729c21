"""A call returns when its change is at the level asked for; what does not reach it in time stands."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from agent_runtime import (
    AgentRuntimeError,
    BlockingSessionHandle,
    DurabilityNotReached,
    InvalidInput,
    LeaseHeld,
    RuntimeClosed,
    SessionHandle,
    SessionNotFound,
    StorageUnavailable,
)
from agent_runtime.errors import again
from agent_runtime.log import Log
from agent_runtime.testing import Faults, faulty_plugin
from agent_runtime_memory import MemoryDatabase
from places import Place, everything, place_fixture
from writes import WRITE_IDS, WRITES, Write, begin, methods_with

pytestmark = pytest.mark.anyio

place = place_fixture()
memory = place_fixture(("memory",))


class FaultyPlace(Place):
    """A database in memory, with faults."""

    def __init__(self) -> None:
        self.faults = Faults()
        super().__init__("faulty:memory:", faulty_plugin(MemoryDatabase().open, self.faults))


def test_every_write_takes_a_level() -> None:
    assert {write.method for write in WRITES} == methods_with("durability") == methods_with("idempotency_key")


@pytest.mark.parametrize("by_default", [False, True])
async def test_a_write_returns_at_the_level_it_asks_for(place: Place, by_default: bool) -> None:
    level = None if by_default else "stored"
    async with place.open(write_behind={"durability": "stored" if by_default else "buffered"}) as runtime:
        session = await begin(runtime)
        for write in WRITES:
            before = runtime.watermarks
            await write.call(runtime, session, durability=level)
            assert runtime.watermarks.stored == runtime.watermarks.accepted == before.accepted + 1, write.method
            assert runtime.watermarks.synced in (None, runtime.watermarks.stored)


async def test_a_buffered_write_waits_for_nothing(place: Place) -> None:
    async with place.open(write_behind={"durability": "stored"}) as runtime:
        session = await begin(runtime)
        stored = runtime.watermarks.stored
        for write in WRITES:
            await write.call(runtime, session, durability="buffered")
        assert runtime.watermarks.stored == stored == runtime.watermarks.accepted - len(WRITES)


@pytest.mark.parametrize(
    ("level", "problem"),
    [
        ("journaled", "'journaled' can't be had here, it needs the journal: use one of 'buffered', 'stored'"),
        ("synced", "'synced' can't be had here, it needs the journal: use one of 'buffered', 'stored'"),
        ("safe", "'safe' is not a level: use one of 'buffered', 'stored'"),
        ("", "'' is not a level: use one of 'buffered', 'stored'"),
        (["stored"], "['stored'] is not a level: use one of 'buffered', 'stored'"),
    ],
)
async def test_a_level_that_there_is_not_is_refused(memory: Place, level: Any, problem: str) -> None:
    async with memory.open() as runtime:
        session = await begin(runtime)
        before = await everything(session, "c"), runtime.watermarks
        for write in WRITES:
            with pytest.raises(InvalidInput) as caught:
                await write.call(runtime, session, durability=level)
            assert str(caught.value) == f"durability: {problem}"
        assert (await everything(session, "c"), runtime.watermarks) == before


async def test_what_changes_nothing_waits_for_what_it_tells(memory: Place) -> None:
    async with memory.open() as runtime:
        session = await runtime.create_session("s1")
        same = await runtime.get_or_create_session("s1", durability="stored")
        assert runtime.watermarks.stored == 1
        await session.switch_agent("coder")
        await same.switch_agent("coder", durability="stored")
        assert runtime.watermarks.stored == 2


async def test_flush_waits_for_all_that_was_acknowledged(place: Place) -> None:
    async with place.open() as runtime:
        await runtime.flush()
        session = await begin(runtime)
        await runtime.flush()
        assert runtime.watermarks.stored == runtime.watermarks.accepted == 5
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(session.append, "user", "hi")
            for _ in range(20):
                tasks.start_soon(runtime.flush)
        assert runtime.status().flush.batches <= 3


@pytest.mark.parametrize("write", WRITES, ids=WRITE_IDS)
async def test_a_level_not_reached_in_time_leaves_the_change(write: Write) -> None:
    place, same = FaultyPlace(), FaultyPlace()
    async with same.open() as runtime:
        session = await begin(runtime)
        expected = await write.call(runtime, session)
    async with place.open(write_behind={"durability_timeout_s": 0.001}) as runtime:
        session = await begin(runtime)
        gate = place.faults.hold("apply")
        with pytest.raises(DurabilityNotReached) as caught:
            await write.call(runtime, session, durability="stored")
        error = caught.value
        assert (error.sequence, error.wanted, error.reached) == (6, "stored", "buffered")
        assert str(error) == (
            "change 6 is applied but only buffered, not yet stored (it took more than 0.001 s); do not repeat the call"
        )
        assert type(error.outcome) is type(expected)
        if isinstance(expected, SessionHandle):
            assert await runtime.get_session(error.outcome.session_id)
        if write.method == "append":
            assert error.outcome == (await session.messages(order="desc", limit=1)).items[0]
        with pytest.raises(StorageUnavailable, match=r"6 change\(s\) are still not stored after 0.001 s"):
            await runtime.flush()
        gate.open()
    async with place.open() as runtime:
        assert runtime.watermarks.stored == 6


async def test_time_is_counted_only_while_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that nobody asks for anything is not woken for it; whoever waits next has all of the time."""
    log, slept, sleep = Log(0, timeout_s=0.02), 0, anyio.sleep

    async def counted(delay_s: float) -> None:
        nonlocal slept
        slept += 1
        await sleep(delay_s)

    monkeypatch.setattr(anyio, "sleep", counted)
    log.accept(log.next, b"{}")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(log.expire)
        for _ in range(2):
            before = slept
            await sleep(0.1)
            assert slept == before
            with pytest.raises(TimeoutError):
                await log.wait(1, "stored")
            assert slept > before
            await sleep(0.02)  # the tick that nobody needs any more
        tasks.cancel_scope.cancel()


def test_threads_get_a_handle_of_theirs_when_a_level_is_not_reached(anyio_backend: Any) -> None:
    place = FaultyPlace()
    with place.open_blocking(loop=anyio_backend, write_behind={"durability_timeout_s": 0.001}) as runtime:
        outage = place.faults.fail("apply")
        for create in (runtime.create_session, runtime.get_or_create_session):
            with pytest.raises(DurabilityNotReached) as caught:
                create(create.__name__, durability="stored")
            assert isinstance(caught.value.outcome, BlockingSessionHandle)
            assert caught.value.outcome.append("user", "hi").seq == 1
        outage.stop()


@pytest.mark.parametrize("error", [RuntimeClosed(), LeaseHeld("somebody", 1.0), SessionNotFound("s")])
def test_an_error_that_many_raise_is_not_one_object(error: AgentRuntimeError) -> None:
    twin = again(error)
    assert (type(twin), twin.args, str(twin), vars(twin)) == (type(error), error.args, str(error), vars(error))
    assert twin is not error
