"""One holder at a time; the fence of every earlier one stops to match."""

from __future__ import annotations

from datetime import UTC, datetime

import anyio
import pytest
from msgspec.structs import replace

from agent_runtime.errors import LeaseHeld, LeaseLost, SequenceMismatch
from agent_runtime.storage import Fence, Grant, Storage

from .contract import NewStorage, Opener, StorageContract, needs
from .writer import Writer, claim, writing

SHORT_S = 0.05


async def refused(storage: Storage, fence: Fence, sequence: int) -> bool:
    """Whether everything that needs the right to write is refused with this fence."""
    refusals = 0
    try:
        await Writer(storage, Grant(fence=fence, database_id="", sequence=sequence)).apply()
    except LeaseLost:
        refusals += 1
    try:
        await storage.purge(fence, now=datetime.now(UTC), rows_max=1)
    except LeaseLost:
        refusals += 1
    try:
        await storage.leases.renew(fence, 60.0)
    except LeaseLost:
        refusals += 1
    assert refusals in (0, 3)
    return refusals == 3


class LeaseContract(StorageContract):
    """The right to write."""

    @needs("openings")
    async def test_the_second_is_refused_with_the_name_of_the_first(self, opener: Opener) -> None:
        async with opener() as storage, opener() as another:
            await storage.leases.acquire(claim("the first"))
            for desk in (storage.leases, another.leases):
                with pytest.raises(LeaseHeld, match="the first") as caught:
                    await desk.acquire(claim("the second"))
                assert caught.value.holder == "the first"
                assert caught.value.expires_in_s is not None
                assert 0 < caught.value.expires_in_s <= 60.0

    async def test_a_lease_is_shown(self, opener: Opener) -> None:
        async with opener() as storage:
            mine = claim("the holder", address="http://127.0.0.1:1", journal_id="j")
            grant = await storage.leases.acquire(mine)
            async with storage.snapshot() as snapshot:
                lease = await snapshot.lease()
                assert lease is not None
                assert (lease.partition, lease.epoch, lease.journal_id) == (0, grant.fence.epoch, "j")
                assert lease.database_id == grant.database_id
                assert (lease.holder, lease.host, lease.pid, lease.address) == (
                    "the holder",
                    mine.host,
                    mine.pid,
                    "http://127.0.0.1:1",
                )
                assert lease.acquired_at is not None
                assert abs((datetime.now(UTC) - lease.acquired_at).total_seconds()) < 60
                assert lease.expires_in_s is not None
                assert 0 < lease.expires_in_s <= 60.0
                await storage.leases.release(grant.fence)
                seen_before = await snapshot.lease()
                assert seen_before is not None
                assert seen_before.holder == "the holder"
            async with storage.snapshot() as snapshot:
                released = await snapshot.lease()
            assert released is not None
            assert (released.holder, released.expires_in_s) == (None, None)

    async def test_what_is_given_back_is_free(self, opener: Opener) -> None:
        async with opener() as storage:
            first = await storage.leases.acquire(claim("the first"))
            await storage.leases.release(first.fence)
            assert await refused(storage, first.fence, 0)
            second = await storage.leases.acquire(claim("the second"))
            assert second.fence.epoch > first.fence.epoch
            assert await refused(storage, first.fence, 0)
            assert not await refused(storage, second.fence, 0)

    async def test_an_earlier_holder_gives_back_nothing(self, opener: Opener) -> None:
        async with opener() as storage:
            first = await storage.leases.acquire(claim())
            await storage.leases.release(first.fence)
            second = await storage.leases.acquire(claim("the second"))
            await storage.leases.release(first.fence)
            assert not await refused(storage, second.fence, 0)
            with pytest.raises(LeaseHeld):
                await storage.leases.acquire(claim("the third"))

    @needs("openings")
    async def test_an_expired_lease_is_taken_over(self, opener: Opener) -> None:
        async with opener() as storage, opener() as another:
            first = Writer(storage, await storage.leases.acquire(claim("the first")))
            await first.create("a")
            with pytest.raises(LeaseHeld):
                await another.leases.acquire(claim("the second"))
            await storage.leases.renew(first.fence, SHORT_S)
            await anyio.sleep(2 * SHORT_S)
            second = await another.leases.acquire(claim("the second"))
            assert (second.sequence, second.fence.epoch > first.fence.epoch) == (1, True)
            assert await refused(storage, first.fence, 1)
            assert await refused(another, first.fence, 1)
            await Writer(another, second).create("b")

    @needs("openings")
    async def test_an_expired_lease_that_nobody_took_still_counts(self, opener: Opener) -> None:
        async with opener() as storage, opener() as another:
            grant = await storage.leases.acquire(claim(duration_s=SHORT_S))
            await anyio.sleep(2 * SHORT_S)
            async with storage.snapshot() as snapshot:
                lease = await snapshot.lease()
                assert lease is not None
                assert lease.expires_in_s is not None
                assert lease.expires_in_s < 0
            await Writer(storage, grant).create("a")
            await storage.leases.renew(grant.fence, 60.0)
            with pytest.raises(LeaseHeld):
                await another.leases.acquire(claim())

    @needs("openings")
    async def test_renewing_extends_from_now(self, opener: Opener) -> None:
        async with opener() as storage, opener() as another:
            grant = await storage.leases.acquire(claim(duration_s=60.0))
            await storage.leases.renew(grant.fence, SHORT_S)
            await anyio.sleep(2 * SHORT_S)
            await another.leases.acquire(claim("the second"))
            with pytest.raises(LeaseLost):
                await storage.leases.renew(grant.fence, 60.0)

    async def test_another_fence_does_not_match(self, opener: Opener) -> None:
        async with opener() as storage:
            nobody = Fence(partition=0, epoch=0, journal_id=None)
            assert await refused(storage, nobody, 0)
            assert await refused(storage, replace(nobody, epoch=1), 0)
            grant = await storage.leases.acquire(claim(journal_id="j"))
            assert not await refused(storage, grant.fence, 0)
            for change in ({"epoch": grant.fence.epoch - 1}, {"epoch": grant.fence.epoch + 1}):
                assert await refused(storage, replace(grant.fence, **change), 1)
            for journal_id in ("k", None):
                assert await refused(storage, replace(grant.fence, journal_id=journal_id), 1)

    async def test_the_fence_is_compared_before_the_sequence(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a")
            stale = replace(writer.batch(), after=0, last=1)
            with pytest.raises(LeaseLost):
                await writer.storage.apply(stale, replace(writer.fence, epoch=writer.fence.epoch + 1))

    @needs("reopening")
    async def test_a_database_keeps_its_id(self, new_storage: NewStorage) -> None:
        ids = []
        for opener in (new_storage(), new_storage()):
            for _ in range(2):
                async with opener() as storage:
                    grant = await storage.leases.acquire(claim())
                    ids.append(grant.database_id)
                    await storage.leases.release(grant.fence)
        assert ids[0] == ids[1] != ids[2] == ids[3]
        assert all(ids)

    @needs("reopening")
    async def test_each_journal_has_a_row(self, opener: Opener) -> None:
        async with writing(opener, journal_id="j", generation=1) as writer:
            await writer.create("a")
            await writer.create("b")
        async with writing(opener, journal_id="k", generation=1) as writer:
            assert writer.sequence == 2
            await writer.create("c")
        async with opener() as storage:  # a claim that came to nothing
            await storage.leases.release((await storage.leases.acquire(claim(journal_id="j", generation=2))).fence)
        async with writing(opener, journal_id="j", generation=3) as writer:
            async with writer.storage.snapshot() as snapshot:
                granted, another = await snapshot.journal("j"), await snapshot.journal("k")
                assert await snapshot.journal("l") is None
            assert granted is not None
            assert (granted.generation, granted.previous_generation, granted.sequence) == (3, 1, 2)
            assert another is not None
            assert (another.partition, another.journal_id, another.sequence) == (0, "k", 3)
            await writer.create("d")
            async with writer.storage.snapshot() as snapshot:
                confirmed, untouched = await snapshot.journal("j"), await snapshot.journal("k")
            assert confirmed is not None
            assert (confirmed.generation, confirmed.previous_generation, confirmed.sequence) == (3, 3, 4)
            assert untouched == another

    @needs("reopening")
    async def test_a_journal_that_comes_in_late_has_its_row_moved_by_whoever_writes(self, opener: Opener) -> None:
        """The row says how far the changes of that journal are dealt with, whatever the sequence of the batch is."""
        async with writing(opener, journal_id="j", generation=1) as writer:
            await writer.create("a")
        for journal_id, sequence in ((None, 7), ("k", 9), ("j", 8)):
            async with writing(opener, journal_id=journal_id, generation=2) as writer:
                receipt = await writer.apply(replayed=(("j", sequence), ("never seen", 5)))
                assert receipt.last == writer.sequence < 7
                async with writer.storage.snapshot() as snapshot:
                    row, unknown = await snapshot.journal("j"), await snapshot.journal("never seen")
                    assert snapshot.watermark == receipt.last
                assert row is not None
                assert (row.sequence, unknown) == (sequence, None)
        async with writing(opener, journal_id="k", generation=3) as writer:
            stale = replace(writer.batch(replayed=(("j", 1),)), after=0, last=1)
            with pytest.raises(SequenceMismatch):
                await writer.storage.apply(stale, writer.fence)
            async with writer.storage.snapshot() as snapshot:
                unmoved = await snapshot.journal("j")
            assert unmoved == row

    @needs("openings")
    async def test_a_journal_reclaims_its_lease_at_once(self, opener: Opener) -> None:
        async with opener() as storage, opener() as another:
            first = await storage.leases.acquire(claim(journal_id="j", generation=1))
            for refused in (claim(journal_id="k", reclaims=True), claim(journal_id="j"), claim(reclaims=True)):
                with pytest.raises(LeaseHeld):
                    await another.leases.acquire(refused)
            again = await another.leases.acquire(claim(journal_id="j", generation=2, reclaims=True))
            assert again.fence.epoch > first.fence.epoch
            await another.leases.release(again.fence)
            await storage.leases.acquire(claim())
            with pytest.raises(LeaseHeld):  # nobody's lease without a journal is that of a claim without one
                await another.leases.acquire(claim(reclaims=True))

    async def test_renewing_goes_on_beside_batches(self, opener: Opener) -> None:
        async with writing(opener) as writer:

            async def renew() -> None:
                for _ in range(20):
                    await writer.storage.leases.renew(writer.fence, 60.0)

            with anyio.fail_after(60):
                async with anyio.create_task_group() as group:
                    group.start_soon(renew)
                    for number in range(20):
                        await writer.create(f"{number}")

    @needs("openings")
    async def test_of_many_who_try_at_once_one_is_granted(self, opener: Opener) -> None:
        granted: list[Grant] = []
        async with opener() as storage, opener() as another:

            async def acquire(desk: Storage, name: str) -> None:
                try:
                    granted.append(await desk.leases.acquire(claim(name)))
                except LeaseHeld:
                    return

            async with anyio.create_task_group() as group:
                for number in range(6):
                    group.start_soon(acquire, (storage, another)[number % 2], f"{number}")
        assert len(granted) == 1
