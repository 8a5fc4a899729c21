"""What the memory storage does besides the contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio
import pytest
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import agent_runtime_memory
from agent_runtime.errors import InvalidInput, LeaseHeld
from agent_runtime.storage import Storage, StorageConfig, StorageFactory
from agent_runtime.testing.kit.writer import DAY, Writer, claim, outcome_row
from agent_runtime_memory import MemoryDatabase, MemoryPlugin
from agent_runtime_memory.tables import Table, Transaction, View

pytestmark = pytest.mark.anyio

MEMORY = StorageConfig(url="memory:")


def factory_of(plugin: Any) -> StorageFactory:
    factories: Mapping[str, StorageFactory] = plugin.agent_runtime_storages()
    return factories["memory"]


async def watermark(storage: Storage) -> int:
    async with storage.snapshot() as snapshot:
        return snapshot.watermark


# --- the plugin -------------------------------------------------------------------------------------------------------


async def test_each_open_of_the_plugin_is_a_fresh_database() -> None:
    factory = factory_of(agent_runtime_memory)
    async with factory(MEMORY) as one, factory(MEMORY) as other:
        first = Writer(one, await one.leases.acquire(claim()))
        await first.create("a")
        await other.leases.acquire(claim())
        assert (await watermark(one), await watermark(other)) == (1, 0)


async def test_a_database_is_shared_by_its_plugin() -> None:
    factory = factory_of(MemoryPlugin(MemoryDatabase()))
    async with factory(MEMORY) as one, factory(MEMORY) as other:
        await Writer(one, await one.leases.acquire(claim())).create("a")
        with pytest.raises(LeaseHeld):
            await other.leases.acquire(claim())
        assert await watermark(other) == 1
    async with factory(MEMORY) as again:
        assert await watermark(again) == 1


def test_a_shared_database_has_the_scheme_that_was_asked_for() -> None:
    plugin: Any = MemoryPlugin(MemoryDatabase(), scheme="shared")
    assert list(plugin.agent_runtime_storages()) == ["shared"]
    assert list(agent_runtime_memory.agent_runtime_storages()) == ["memory"]


@pytest.mark.parametrize("url", ["memory:x", "memory://", "memory:?a=b", "memory::"])
async def test_anything_behind_the_colon_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"^storage\.url: .* use memory:$"):
        async with MemoryDatabase().open(StorageConfig(url=url)):
            pass


async def test_options_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"^storage\.options\.size: "):
        async with MemoryDatabase().open(StorageConfig(url="memory:", options={"size": 1})):
            pass


async def test_it_declares_that_nothing_survives() -> None:
    async with MemoryDatabase().open(MEMORY) as storage:
        assert storage.abilities.survives == "nothing"


# --- time -------------------------------------------------------------------------------------------------------------


def test_leases_follow_a_virtual_clock() -> None:
    async def main() -> None:
        async with MemoryDatabase().open(MEMORY) as storage:
            await storage.leases.acquire(claim(duration_s=3600.0))
            await anyio.sleep(3599.0)
            with pytest.raises(LeaseHeld) as caught:
                await storage.leases.acquire(claim())
            assert caught.value.expires_in_s == pytest.approx(1.0)
            await anyio.sleep(1.0)
            await storage.leases.acquire(claim())

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_the_lease_of_an_opening_that_is_closed_is_free() -> None:
    database = MemoryDatabase()
    async with database.open(MEMORY) as crashed:
        first = await crashed.leases.acquire(claim())
    async with database.open(MEMORY) as storage:
        second = await storage.leases.acquire(claim())
        assert second.fence.epoch > first.fence.epoch


async def test_outcomes_expire_by_the_clock_that_was_given() -> None:
    outcome = outcome_row("a", "1")
    clock = [outcome.expires_at - DAY]
    async with MemoryDatabase(now=lambda: clock[0]).open(MEMORY) as storage:
        writer = Writer(storage, await storage.leases.acquire(claim()))
        await writer.create("a")
        await writer.apply(outcomes=(outcome,))
        async with storage.snapshot() as snapshot:
            head = await snapshot.head("session a", outcomes_max=1)
            assert head is not None
            assert list(head.outcomes) == [outcome]
            clock[0] = outcome.expires_at
            head = await snapshot.head("session a", outcomes_max=1)
            assert head is not None
            assert not head.outcomes


# --- tables -----------------------------------------------------------------------------------------------------------

keys = st.tuples(st.integers(0, 1), st.integers(0, 5))
writes = st.lists(st.tuples(keys, st.none() | st.integers()), max_size=6)


@given(transactions=st.lists(writes, max_size=6), bounds=st.tuples(st.none() | keys, st.none() | keys))
@settings(deadline=None)
def test_views_and_transactions_show_what_copies_of_the_tables_would(
    transactions: list[list[tuple[tuple[int, int], int | None]]],
    bounds: tuple[tuple[int, int] | None, tuple[int, int] | None],
) -> None:
    table: Table[int] = Table()
    plain: dict[tuple[int, int], int] = {}
    open_views: list[tuple[View, dict[tuple[int, int], int]]] = []
    after, before = bounds

    def check(view: View, expected: dict[tuple[int, int], int]) -> None:
        for group in (0, 1):
            rows = [
                (key, expected[key])
                for key in sorted(expected)
                if key[0] == group and (after is None or key > after) and (before is None or key < before)
            ]
            assert list(view.scan(table, group, after=after, before=before)) == rows
            assert list(view.scan(table, group, after=after, before=before, backwards=True)) == rows[::-1]
        for key in [(group, place) for group in (0, 1) for place in range(6)]:
            assert view.get(table, key) == expected.get(key)

    for transaction_writes in transactions:
        open_views.append((View(), dict(plain)))
        transaction = Transaction()
        for key, row in transaction_writes:
            if row is None:
                transaction.delete(table, key)
                plain.pop(key, None)
            else:
                transaction.put(table, key, row)
                plain[key] = row
            check(transaction, plain)
        transaction.commit([view for view, _ in open_views])
        for view, expected in open_views:
            check(view, expected)
        check(View(), plain)


async def test_a_view_costs_what_changes_while_it_is_open_and_nothing_afterwards() -> None:
    """However much is stored: no copy is made of it."""
    database = MemoryDatabase()
    async with database.open(MEMORY) as storage:
        writer = Writer(storage, await storage.leases.acquire(claim()))
        await writer.create("a", messages=2000)
        async with storage.snapshot():
            await writer.apply(touched=(writer.touch("a"),))
            [view] = database._contents.views
            kept = sum(len(rows) for rows in view._overlay.values())
            assert kept == len(["the session", "the partition's row"])
        assert not database._contents.views
