"""Sessions that lie idle are deleted: those, all of them, nothing else, and without disturbing anyone. Time is virtual."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_runtime import Config, Runtime, SessionNotFound, StorageUnavailable
from agent_runtime.durations import duration
from agent_runtime.errors import ChangeRejected, ConfigError
from agent_runtime.testing import Faults
from agent_runtime_memory import MemoryDatabase
from rig import audit_at_rest, running
from rig import virtual_time as anyio_backend  # noqa: F401 — a fixture

pytestmark = pytest.mark.anyio

MONTH = {"max_idle": "30d", "sweep_interval_s": 3600.0}


class Clock:
    """The time of day."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.time += timedelta(microseconds=1)
        return self.time

    def days(self, count: float) -> None:
        self.time += timedelta(days=count)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("agent_runtime.runtime.utc_now", clock)
    return clock


async def names(runtime: Runtime) -> list[str]:
    return [session.session_id async for session in runtime.scan_sessions()]


async def fill(runtime: Runtime, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        session = await runtime.create_session(f"s{number:04}")
        await session.append("user", "hi")
    await runtime.flush()


async def test_what_is_idle_goes_and_what_is_not_stays(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agent_runtime")
    async with running(retention=MONTH) as runtime:
        await fill(runtime, 450)  # more than two pages
        clock.days(29)
        for number in (0, 7, 199, 200, 449):
            await (await runtime.get_session(f"s{number:04}")).append("user", "I am here")
        await runtime.flush()
        await anyio.sleep(100)
        assert len(await names(runtime)) == 450
        clock.days(2)
        await anyio.sleep(3700)
        kept = ["s0000", "s0007", "s0199", "s0200", "s0449"]
        assert await names(runtime) == kept
        assert runtime.watermarks.stored == runtime.watermarks.accepted
        with pytest.raises(SessionNotFound):
            await runtime.get_session("s0001")
        assert (await (await runtime.get_session("s0007")).record()).message_count == 2
        audit_at_rest(runtime)
        told = [line for line in caplog.messages if "idle" in line]
        assert [line.partition(" in ")[0] for line in told] == [
            "deleted 0 idle session(s) of 450",
            "deleted 445 idle session(s) of 450",
        ]


async def test_nothing_goes_unless_it_is_configured(clock: Clock) -> None:
    async with running() as runtime:
        await fill(runtime, 3)
        clock.days(10_000)
        await anyio.sleep(10_000)
        assert len(await names(runtime)) == 3


async def test_a_search_begins_soon_after_the_start_and_not_at_once(clock: Clock) -> None:
    database = MemoryDatabase()
    async with running(None, database) as runtime:
        await fill(runtime, 3)
    clock.days(31)
    async with running(None, database, retention=MONTH) as runtime:
        await anyio.sleep(59)
        assert len(await names(runtime)) == 3
    async with running(None, database, retention=MONTH) as runtime:
        await anyio.sleep(61)
        assert await names(runtime) == []
    async with running(None, database) as runtime:
        assert await names(runtime) == []


async def test_activity_that_is_not_stored_yet_keeps_a_session(clock: Clock) -> None:
    """The list that is searched is the database's: it does not have it."""
    faults = Faults()
    async with running(faults, retention=MONTH) as runtime:
        await fill(runtime, 5)
        clock.days(31)
        session = await runtime.get_session("s0003")
        await session.append("user", "not stored yet")
        await anyio.sleep(61)
        assert await names(runtime) == ["s0003"]
        assert [message.content for message in (await session.messages()).items] == ["hi", "not stored yet"]


async def test_activity_while_it_is_searched_keeps_a_session(clock: Clock) -> None:
    """It comes after the list was read, and before the session's turn."""
    faults, database = Faults(), MemoryDatabase()
    async with running(None, database) as runtime:
        await fill(runtime, 5)
    clock.days(31)
    async with running(faults, database, retention=MONTH) as runtime:
        faults.delay(5.0, "head", nth=1)
        await anyio.sleep(62)
        assert len(await names(runtime)) == 5
        await (await runtime.get_session("s0004")).append("user", "just in time")
        await anyio.sleep(10)
        assert await names(runtime) == ["s0004"]


async def test_an_id_that_was_used_again_is_another_session(clock: Clock) -> None:
    async with running(retention=MONTH) as runtime:
        await fill(runtime, 2)
        clock.days(31)
        await (await runtime.get_session("s0001")).delete()
        await runtime.create_session("s0001")  # not stored: the list has the old one
        await anyio.sleep(61)
        assert await names(runtime) == ["s0001"]


async def test_held_sessions_stay(clock: Clock) -> None:
    faults = Faults()
    async with running(faults, retention=MONTH) as runtime:
        await fill(runtime, 3)
        faults.fail("apply", nth=1, error=ChangeRejected("no"))
        session = await runtime.get_session("s0001")
        await session.append("user", "refused")
        with pytest.raises(Exception, match="quarantine"):
            await runtime.flush()
        clock.days(31)
        await anyio.sleep(61)
        assert await names(runtime) == ["s0001"]
        assert len(await runtime.quarantine.entries()) == 1


async def test_who_is_in_memory_stays_there(clock: Clock) -> None:
    """A search of many sessions takes nobody's place, and counts as nobody's miss: there is room for one page of it."""
    database = MemoryDatabase()
    room = {"bytes_max": 1_500_000, "tail_messages": 10}
    async with running(None, database) as runtime:
        await fill(runtime, 1000)
        clock.days(31)
        await fill(runtime, 300, first=5000)
    async with running(None, database, retention=MONTH, residents=room) as runtime:
        wanted = [f"s{number:04}" for number in range(5000, 5300)]
        for name in wanted:
            await (await runtime.get_session(name)).history()
        figures = runtime.status().residents
        assert room["bytes_max"] - figures.bytes > 500_000
        await anyio.sleep(100)
        assert await names(runtime) == wanted
        after = runtime.status().residents
        assert after.misses == figures.misses
        assert all(runtime._residents._entries.get(name) for name in wanted)
        assert after.evictions > 0  # of those that are known to be gone


async def test_an_outage_breaks_a_search_off_and_the_next_one_ends_it(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    faults = Faults()
    async with running(faults, retention=MONTH) as runtime:
        await fill(runtime, 5)
        clock.days(31)
        faults.fail("sessions", nth=1, error=StorageUnavailable("it is away"))
        await anyio.sleep(61)
        assert len(await names(runtime)) == 5
        assert any("broke off" in line and "it is away" in line for line in caplog.messages)
        await anyio.sleep(61)
        assert await names(runtime) == []


async def test_a_search_ends_with_the_runtime(clock: Clock) -> None:
    faults = Faults()
    database = MemoryDatabase()
    async with running(faults, database, retention=MONTH) as runtime:
        await fill(runtime, 250)
        clock.days(31)
        await anyio.sleep(60)
        while len(await names(runtime)) == 250:
            await anyio.sleep(0)
    async with running(None, database) as runtime:
        left = await names(runtime)
        assert len(left) < 250
        for name in left:
            assert (await (await runtime.get_session(name)).record()).message_count == 1


# --- lengths of time --------------------------------------------------------------------------------------------------


@given(st.tuples(*[st.integers(0, 500)] * 5).filter(any))
def test_a_length_is_the_sum_of_its_parts(numbers: tuple[int, ...]) -> None:
    text = "".join(f"{number}{unit}" for number, unit in zip(numbers, "wdhms", strict=True) if number)
    w, d, h, m, s = numbers
    assert duration(text) == timedelta(weeks=w, days=d, hours=h, minutes=m, seconds=s)


@pytest.mark.parametrize(
    "text",
    ["", "30", "d", "-1d", "1.5d", "1h1d", "30D", "P30D", "1d 12h", "0s", "99999999999999w", "9" * 50 + "s", "٣d"],
)
def test_what_is_no_length_is_refused(text: str) -> None:
    for refused in (lambda: duration(text), lambda: Config.of("memory:", retention={"max_idle": text})):
        with pytest.raises((ValueError, ConfigError), match="must be"):
            refused()
