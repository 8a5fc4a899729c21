"""What the proofs of the core run on: a runtime over a storage with planned faults, its books audited from outside.

The books are what the runtime keeps count of: bytes of residents, the budget, who is dirty, idle, pinned or waited for.
An audit counts everything again from scratch.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import anyio
import pytest
import trio.testing
from anyio.lowlevel import checkpoint

from agent_runtime import Config, Runtime, open_runtime, residents
from agent_runtime.changes import Batch
from agent_runtime.residents import Resident
from agent_runtime.storage import StorageFactory
from agent_runtime.testing import CallName, Faults, faulty_plugin
from agent_runtime_memory import MemoryDatabase

T = TypeVar("T")
NEVER_S = 1_000_000.0
END_S = 100_000.0  # of virtual time


class MeteredFaults(Faults):
    """Faults that know how many calls are under way."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way = 0

    async def call(self, name: CallName, effect: Callable[[], Awaitable[T]], batch: Batch | None = None) -> T:
        self.under_way += 1
        try:
            return await super().call(name, effect, batch)
        finally:
            self.under_way -= 1


def config(url: str = "faulty:memory:", /, **sections: dict[str, Any]) -> Config:
    """Nothing is flushed but on demand, and as little as possible stays in memory."""
    defaults: dict[str, dict[str, Any]] = {
        "write_behind": {"interval_s": NEVER_S, "drain_timeout_s": 2.0},
        "residents": {"bytes_max": 65_536, "tail_messages": 3},
        "lease": {"duration_s": NEVER_S},
    }
    return Config.of(url, **{name: defaults.get(name, {}) | sections.get(name, {}) for name in defaults | sections})


@asynccontextmanager
async def opened(options: Config, factory: StorageFactory, faults: Faults, *plugins: object) -> AsyncIterator[Runtime]:
    """A runtime whose storages fail as planned. The plugins that are installed would take longer than most tests."""
    async with AsyncExitStack() as stack:
        with patch("agent_runtime.plugins._installed", list):
            opening = open_runtime(options, plugins=[faulty_plugin(factory, faults), *plugins])
            runtime = await stack.enter_async_context(opening)
        yield runtime


@asynccontextmanager
async def running(
    faults: Faults | None = None, database: MemoryDatabase | None = None, /, **sections: dict[str, Any]
) -> AsyncIterator[Runtime]:
    """A runtime over a memory database (default: a new one), with these faults."""
    async with opened(config(**sections), (database or MemoryDatabase()).open, faults or Faults()) as runtime:
        yield runtime


class _JumpingSelector(selectors.SelectSelector):
    """Where others wait for the time to pass, it lets it pass."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None or self.now_s + timeout > END_S:
                raise RuntimeError("everyone waits for something that does not come")
            self.now_s += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio with a clock that jumps to the next timer when nobody has anything to do, as trio's MockClock does."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


@pytest.fixture(params=["asyncio", "trio"])
def virtual_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """In a module that imports it as `anyio_backend`, the time of the event loop is virtual, and that of leases."""
    monkeypatch.setattr("agent_runtime.lease.boot_clock", anyio.current_time)
    if request.param == "asyncio":
        return "asyncio", {"loop_factory": VirtualLoop}
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


async def all_wait() -> None:
    """Let every other task run as far as it gets."""
    try:
        ready = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]  # anyio's own function sleeps for 0.1 s
    except RuntimeError:
        await anyio.wait_all_tasks_blocked()
    else:
        await checkpoint()
        while ready:
            await checkpoint()


async def quiet(runtime: Runtime, faults: MeteredFaults) -> None:
    """Wait until the runtime does nothing by itself: no call is under way, nothing is due."""
    scheduler = runtime._scheduler
    idle = 0
    while idle < 5:
        due = min(scheduler._flush_in(), scheduler._purge_in()) <= 0
        if faults.under_way or due:
            idle = 0
            await anyio.sleep(0.0005)
        else:
            idle += 1
            await checkpoint()


def audit(runtime: Runtime) -> None:
    """Count everything again."""
    books, log, budget, scheduler = runtime._residents, runtime._log, runtime._budget, runtime._scheduler
    entries = books._entries
    known = {id(each): each for each in entries.values() if each is not None}
    known |= {id(each): each for each in books.dirty.values()}
    known |= {id(view.resident): view.resident for view in books._views if view.resident is not None}
    for resident in known.values():
        _audit_resident(resident)
    absent = [name for name, each in entries.items() if each is None]
    assert books.bytes == sum(each.bytes for each in known.values()) + sum(map(residents._absent_bytes, absent))
    assert books.bytes <= books.bytes_max or all(name in entries for name in books._idle)

    unsettled = [change for each in books.dirty.values() for change in each.pending]
    for incarnation, resident in books.dirty.items():
        assert incarnation == resident.incarnation
        assert resident.pending or resident.held
    for name in books._idle:
        idle = entries[name]
        assert idle is None or (idle.idle and not idle.pending and not idle.pins and not idle.held)
    for name, entry in entries.items():
        assert entry is None or entry.session_id == name
        needed = entry is not None and (entry.pending or entry.pins or entry.held)
        assert (name in books._idle) != bool(needed)
    assert [each.key for each in sorted(_unborn(books.dirty.values()), key=_place)] == books.born

    pending = [each.change for each in scheduler._pending]
    assert [change.sequence for change in pending] == list(range(log.stored + 1, log.accepted + 1))
    assert {change.sequence for change in pending} <= {change.sequence for change in unsettled} | {
        change.sequence for change in pending if change.void
    }
    held = sum(each.held_bytes for each in books.dirty.values())
    settling = sum(size for _, _, size in books._settling)
    assert scheduler._pending_bytes == sum(each.size for each in scheduler._pending)
    assert budget.used >= scheduler._pending_bytes + held + settling


def audit_at_rest(runtime: Runtime) -> None:
    """Count everything again when nobody is at work and all is stored: nothing is left waiting, pinned or reserved."""
    audit(runtime)
    books, log, budget, scheduler = runtime._residents, runtime._log, runtime._budget, runtime._scheduler
    assert not scheduler._pending
    assert log.stored == log.accepted
    assert not log.store_awaited
    assert not log.sync_awaited
    assert budget.used == sum(each.held_bytes for each in books.dirty.values())
    assert not budget._queue
    assert not books._views
    assert not books._settling
    assert all(each.held for each in books.dirty.values())
    assert all(each is None or not each.pins for each in books._entries.values())
    assert books.bytes <= books.bytes_max or not books._idle or len(books._idle) == 1
    assert not runtime._door._flights


def needed_bytes(runtime: Runtime) -> int:
    """What of the bytes in memory can't be let go: the heads of sessions with unstored changes, and those messages."""
    needed = 0
    for resident in runtime._residents.dirty.values():
        unstored = [raw for change in resident.pending for raw in change.messages]
        needed += resident.bytes - resident.tail_bytes
        needed += sum(map(residents.message_bytes, unstored))
        needed -= 0 if resident.chat is None else len(resident.chat[1])
    return needed


def _unborn(dirty: Any) -> list[Resident]:
    return [each for each in dirty if each.unborn is not None]


def _place(resident: Resident) -> tuple[Any, str]:
    return resident.created_at, resident.incarnation


def _audit_resident(resident: Resident) -> None:
    assert len(resident.tail) == len(resident.tail_seqs)
    assert resident.tail_seqs == sorted(set(resident.tail_seqs))
    assert all(resident.tail_from < seq < resident.next_seq for seq in resident.tail_seqs)
    if resident.bytes == 0:
        return  # it is kept for its unstored deletion only, or for a read that is under way
    texts = (resident.metadata, resident.context.metadata, resident.title, resident.description)
    size = residents._HEAD_BYTES + sum(map(residents.text_bytes, texts))
    tail_bytes = sum(len(bytes(raw)) + residents._MESSAGE_BYTES for raw in resident.tail)
    outcomes_bytes = sum(
        residents._OUTCOME_BYTES + residents.text_bytes(row.outcome) for row in resident.outcomes.values()
    )
    assert (resident.tail_bytes, resident.outcomes_bytes) == (tail_bytes, outcomes_bytes)
    size += tail_bytes + outcomes_bytes
    size += 0 if resident.lead is None else len(bytes(resident.lead))
    size += 0 if resident.chat is None else len(resident.chat[1])
    assert resident.bytes == size
