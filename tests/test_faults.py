"""Fault injection does what it says, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

from agent_runtime.changes import Batch, Details, Touch
from agent_runtime.errors import ChangeRejected, LeaseHeld, SequenceMismatch, StorageFatal, StorageUnavailable
from agent_runtime.storage import Storage, StorageConfig
from agent_runtime.testing import (
    CALL_NAMES,
    Faults,
    FaultyStorage,
    creates_session,
    faulty_plugin,
    writes_message,
    writes_session,
)
from agent_runtime.testing.kit import NewStorage, Opener
from agent_runtime.testing.kit.batches import BatchContract
from agent_runtime.testing.kit.closing import ClosingContract
from agent_runtime.testing.kit.leases import LeaseContract
from agent_runtime.testing.kit.purging import PurgeContract
from agent_runtime.testing.kit.reads import ReadContract
from agent_runtime.testing.kit.snapshots import SnapshotContract
from agent_runtime.testing.kit.writer import (
    NOON,
    Writer,
    claim,
    context_row,
    document_row,
    message_row,
    quarantine_row,
    session_row,
    switch_row,
)
from agent_runtime_memory import MemoryDatabase

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def faulty(faults: Faults, database: MemoryDatabase | None = None) -> AsyncIterator[Writer]:
    """A writer on a storage with these faults; the session "a" is there, and no call was counted yet."""
    async with (database or MemoryDatabase()).open(StorageConfig(url="memory:")) as inner:
        writer = Writer(inner, await inner.leases.acquire(claim()))
        await writer.create("a")
        writer.storage = FaultyStorage(inner, faults)
        yield writer


async def watermark(storage: Storage) -> int:
    async with storage.snapshot() as snapshot:
        return snapshot.watermark


async def every_call(open_storage: Callable[[], Any]) -> None:
    """Make each call of a storage once, in the order of CALL_NAMES but for the lease's end."""
    async with open_storage() as storage:
        grant = await storage.leases.acquire(claim())
        await storage.leases.renew(grant.fence, 60.0)
        await Writer(storage, grant).create("a")
        await storage.purge(grant.fence, now=NOON, rows_max=1)
        async with storage.snapshot() as snapshot:
            await snapshot.head("session a", outcomes_max=1)
            await snapshot.messages("a", limit=1)
            await snapshot.switches("a")
            await snapshot.document("a", "notes", "1")
            await snapshot.documents("a", "notes", limit=1)
            await snapshot.collections("a")
            await snapshot.sessions(limit=1)
            await snapshot.outcome("a", "1")
            await snapshot.outcomes(limit=1)
            await snapshot.quarantine(limit=1)
            await snapshot.lease()
            await snapshot.journal("j")
        await storage.leases.release(grant.fence)


def open_faulty(faults: Faults) -> Any:
    plugin: Any = faulty_plugin(MemoryDatabase().open, faults)
    return plugin.agent_runtime_storages()["faulty"](StorageConfig(url="faulty:memory:"))


# --- without a fault --------------------------------------------------------------------------------------------------


class TestWithoutFaults(BatchContract, ClosingContract, LeaseContract, PurgeContract, ReadContract, SnapshotContract):
    """With an empty plan a faulty storage keeps the whole contract."""

    @pytest.fixture
    def new_storage(self) -> NewStorage:
        def make() -> Opener:
            database, faults = MemoryDatabase(), Faults()

            @asynccontextmanager
            async def opened() -> AsyncIterator[Storage]:
                async with database.open(StorageConfig(url="memory:")) as inner:
                    yield FaultyStorage(inner, faults)

            return opened

        return make


async def test_every_call_is_counted_by_name() -> None:
    faults = Faults()
    await every_call(lambda: open_faulty(faults))
    assert sorted(faults.calls) == sorted(CALL_NAMES)
    assert faults.calls[:3] == ["open", "acquire", "renew"]
    assert (faults.count(), faults.count("apply"), Faults().count()) == (len(CALL_NAMES), 1, 0)


# --- failing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_effect", [False, True])
async def test_every_call_can_fail(after_effect: bool) -> None:
    for nth in range(1, len(CALL_NAMES) + 1):
        faults = Faults()
        fault = faults.fail(nth=nth, after_effect=after_effect)
        with pytest.raises(StorageUnavailable, match="planned"):
            await every_call(lambda: open_faulty(faults))  # noqa: B023 — called at once
        assert (fault.hits, faults.count()) == (1, nth)


async def test_a_failure_before_the_effect_has_none_and_one_after_it_has() -> None:
    faults = Faults()
    async with faulty(faults) as writer:
        before, after = faults.fail("apply", nth=2), faults.fail("apply", nth=3, after_effect=True)
        await writer.apply()
        with pytest.raises(StorageUnavailable):
            await writer.apply()
        assert (before.hits, after.hits) == (1, 0)
        with pytest.raises(StorageUnavailable):
            await writer.apply()
        assert (before.hits, after.hits) == (1, 1)
        with pytest.raises(SequenceMismatch) as caught:
            await writer.apply()
        assert (caught.value.expected, caught.value.found) == (2, 3)


async def test_a_lease_that_was_granted_unheard() -> None:
    faults = Faults()
    faults.fail("acquire", after_effect=True, nth=1)
    async with open_faulty(faults) as storage:
        with pytest.raises(StorageUnavailable):
            await storage.leases.acquire(claim())
        with pytest.raises(LeaseHeld):
            await storage.leases.acquire(claim())


async def test_a_snapshot_that_fails_after_it_was_taken_is_given_back() -> None:
    faults = Faults()
    async with faulty(faults) as writer:
        faults.fail("snapshot", nth=1, after_effect=True)
        with pytest.raises(StorageUnavailable):
            await watermark(writer.storage)
        assert writer.storage.figures().in_use == 0
        assert await watermark(writer.storage) == 1


async def test_an_error_of_ones_own() -> None:
    faults = Faults()
    async with faulty(faults) as writer:
        faults.fail("apply", error=StorageFatal("corrupt"))
        for _ in range(2):
            with pytest.raises(StorageFatal, match="corrupt"):
                await writer.apply()


async def test_counting_starts_with_the_plan_and_sees_calls_that_others_fail() -> None:
    faults = Faults()
    async with faulty(faults) as writer:
        await writer.apply()
        faults.fail("apply", nth=1)
        second = faults.fail("apply", nth=2)
        for hits in (0, 1):
            with pytest.raises(StorageUnavailable):
                await writer.apply()
            assert second.hits == hits
        await writer.apply()


async def test_faults_are_stopped_one_or_all() -> None:
    faults = Faults()
    async with faulty(faults) as writer:
        fault = faults.fail("apply")
        with pytest.raises(StorageUnavailable):
            await writer.apply()
        fault.stop()
        await writer.apply()
        faults.fail("apply")
        faults.fail("snapshot")
        faults.clear()
        await writer.apply()
        assert await watermark(writer.storage) == 3
        assert fault.hits == 1


async def test_an_outage() -> None:
    faults = Faults()
    async with faulty(faults) as writer:
        start = anyio.current_time() + 0.2
        fault = faults.fail_between(start, start + 0.4)
        await writer.apply()
        await anyio.sleep_until(start)
        with pytest.raises(StorageUnavailable, match="outage"):
            await writer.apply()
        await anyio.sleep_until(start + 0.4)
        await writer.apply()
        assert fault.hits == 1


def test_a_misspelt_call_is_refused() -> None:
    name: Any = "aply"
    with pytest.raises(ValueError, match="'aply' is not a call of a storage; those are: open, "):
        Faults().fail(name)


# --- waiting ----------------------------------------------------------------------------------------------------------


async def test_a_call_is_delayed() -> None:
    faults = Faults()
    async with faulty(faults) as writer:
        faults.delay(0.03, "apply", nth=2)
        await writer.apply()
        start = anyio.current_time()
        async with anyio.create_task_group() as group:
            group.start_soon(writer.apply)
            await anyio.wait_all_tasks_blocked()
            assert await watermark(writer.storage) == 2
        assert anyio.current_time() - start >= 0.03
        assert await watermark(writer.storage) == 3


async def test_a_call_is_held_at_a_gate() -> None:
    faults = Faults()
    async with faulty(faults) as writer:
        gate = faults.hold("apply", nth=1)
        assert not gate.reached.is_set()
        async with anyio.create_task_group() as group:
            group.start_soon(writer.apply)
            await gate.reached.wait()
            await anyio.wait_all_tasks_blocked()
            assert await watermark(writer.storage) == 1
            gate.open()
        assert await watermark(writer.storage) == 2
        await writer.apply()


async def test_a_held_call_that_is_cancelled_has_no_effect() -> None:
    faults = Faults()
    async with faulty(faults) as writer:
        gate = faults.hold("apply")
        with anyio.move_on_after(0.01) as scope:
            await writer.apply()
        assert scope.cancelled_caught
        gate.open()
        assert await watermark(writer.storage) == 1


# --- refusing ---------------------------------------------------------------------------------------------------------


async def test_batches_are_rejected_for_as_long_as_it_is_planned() -> None:
    faults = Faults()
    async with faulty(faults) as writer:
        fault = faults.reject(writes_message("a-2"))
        await writer.apply(messages=(message_row("a", 1),))
        for _ in range(2):
            with pytest.raises(ChangeRejected):
                await writer.apply(messages=(message_row("a", 2),))
        await writer.apply(quarantined=(quarantine_row(5),))
        fault.stop()
        await writer.apply(messages=(message_row("a", 2),))
        assert fault.hits == 2


EMPTY = Batch(after=0, last=1, changes=1, sessions=1)
OF_A: list[dict[str, Any]] = [
    {"deleted": ("a",)},
    {"created": (session_row("a"),)},
    {"touched": (Touch("a", NOON, 0, 1, 1),)},
    {"edited": (("a", Details(None, None, "{}")),)},
    {"cleared": (("a", 1),)},
    {"contexts": (context_row("a"),)},
    {"switches": (switch_row("a", 1),)},
    {"removed": (("a", 1),)},
    {"messages": (message_row("a", 1),)},
    {"discarded": (("a", "notes", "1"),)},
    {"documents": (document_row("a", "notes", "1"),)},
]


@pytest.mark.parametrize("rows", OF_A, ids=lambda rows: next(iter(rows)))
def test_what_writes_a_session(rows: dict[str, Any]) -> None:
    batch = replace(EMPTY, **rows)
    assert writes_session("a")(batch)
    assert not writes_session("b")(batch)
    assert not writes_session("a")(replace(EMPTY, quarantined=(quarantine_row(1, incarnation="a"),)))


def test_what_writes_a_message_or_creates_a_session() -> None:
    batch = replace(EMPTY, created=(session_row("a"),), messages=(message_row("a", 1),))
    assert writes_message("a-1")(batch)
    assert not writes_message("a-2")(batch)
    assert creates_session("session a")(batch)
    assert not creates_session("a")(batch)


# --- committing late --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retried", [False, True])
async def test_a_late_commit_comes_once_before_the_next_call(retried: bool) -> None:
    faults, seen_inside = Faults(), Faults()
    async with faulty(seen_inside) as writer:
        writer.storage = FaultyStorage(writer.storage, faults)
        fault = faults.commit_late()
        with pytest.raises(StorageUnavailable):
            await writer.apply()
        assert not seen_inside.calls
        if retried:
            with pytest.raises(SequenceMismatch) as caught:
                await writer.apply()
            assert caught.value.found == 2
        assert await watermark(writer.storage) == 2
        assert await watermark(writer.storage) == 2
        assert seen_inside.count("apply") == 1 + retried
        assert fault.hits == 1


async def test_a_late_commit_comes_too_late_for_a_storage_that_went_on() -> None:
    faults, database = Faults(), MemoryDatabase()
    async with faulty(faults, database) as writer, database.open(StorageConfig(url="memory:")) as another:
        faults.commit_late()
        with pytest.raises(StorageUnavailable):
            await writer.apply(messages=(message_row("a", 1),))
        await another.leases.release(writer.fence)
        await another.leases.acquire(claim())
        async with writer.storage.snapshot() as snapshot:
            assert snapshot.watermark == 1
            assert not await snapshot.messages("a", limit=1)


async def test_a_late_commit_is_lost_with_its_storage() -> None:
    faults, database = Faults(), MemoryDatabase()
    async with faulty(faults, database) as writer:
        faults.commit_late()
        with pytest.raises(StorageUnavailable):
            await writer.apply()
    async with database.open(StorageConfig(url="memory:")) as again:
        assert await watermark(FaultyStorage(again, faults)) == 1


# --- as a plugin ------------------------------------------------------------------------------------------------------


async def test_the_plugin_hands_the_rest_of_the_url_and_the_options_in() -> None:
    seen: list[StorageConfig] = []

    @asynccontextmanager
    async def factory(config: StorageConfig) -> AsyncIterator[Storage]:
        seen.append(config)
        async with MemoryDatabase().open(StorageConfig(url="memory:")) as storage:
            yield storage

    plugin: Any = faulty_plugin(factory, Faults(), scheme="odd")
    storages = plugin.agent_runtime_storages()
    assert list(storages) == ["odd"]
    async with storages["odd"](StorageConfig(url="odd:sqlite:///x.db", options={"a": 1})) as storage:
        assert storage.abilities.survives == "nothing"
    assert seen == [StorageConfig(url="sqlite:///x.db", options={"a": 1})]


async def test_purge_passes_its_arguments_on() -> None:
    async with faulty(Faults()) as writer:
        await writer.apply(messages=tuple(message_row("a", seq) for seq in range(1, 6)))
        await writer.apply(touched=(writer.touch("a"),), cleared=(("a", 5),))
        assert await writer.storage.purge(writer.fence, now=datetime.now(UTC), rows_max=2) == 2
