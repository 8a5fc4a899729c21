"""A database is made when it is first opened, once, and left as it is from then on."""

from __future__ import annotations

import anyio

from agent_runtime.storage import Storage

from .contract import NewStorage, StorageContract, needs
from .dump import dump
from .writer import Writer, claim, writing

OPENINGS = 4


class OpeningContract(StorageContract):
    """Opening, again and at once."""

    async def test_a_new_one_is_empty_and_nobody_s(self, untouched_storage: NewStorage) -> None:
        async with untouched_storage()() as storage, storage.snapshot() as snapshot:
            assert snapshot.watermark == 0
            assert not await snapshot.sessions(limit=1)
            lease = await snapshot.lease()
            assert lease is None or lease.holder is None

    @needs("reopening")
    async def test_opening_it_again_changes_nothing(self, untouched_storage: NewStorage) -> None:
        opener = untouched_storage()
        async with writing(opener) as writer:
            await writer.create("a", messages=3)
            expected = await dump(writer.storage)
        for _ in range(3):
            async with opener() as storage:
                assert await dump(storage) == expected

    @needs("openings")
    async def test_several_open_a_new_one_at_once(self, untouched_storage: NewStorage) -> None:
        """As when several processes start: one of them makes the tables, the others wait for it."""
        opener = untouched_storage()
        opened: dict[int, Storage] = {}
        all_opened, done = anyio.Event(), anyio.Event()

        async def hold(number: int) -> None:
            async with opener() as storage:
                opened[number] = storage
                if len(opened) == OPENINGS:
                    all_opened.set()
                await done.wait()

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for number in range(OPENINGS):
                    group.start_soon(hold, number)
                await all_opened.wait()
                writer = Writer(opened[0], await opened[0].leases.acquire(claim()))
                await writer.create("a", messages=1)
                expected = await dump(opened[0])
                for storage in opened.values():
                    assert await dump(storage) == expected
                done.set()

    async def test_two_are_two(self, new_storage: NewStorage) -> None:
        async with writing(new_storage()) as one, writing(new_storage()) as other:
            await one.create("a", messages=1)
            assert not (await dump(other.storage)).sessions
            await other.create("b")
            assert [each.session.incarnation for each in (await dump(one.storage)).sessions] == ["a"]
