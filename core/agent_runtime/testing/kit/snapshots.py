"""A snapshot is one moment: everything stored before it, nothing stored after, and it waits for nobody."""

from __future__ import annotations

import anyio

from agent_runtime.storage import Snapshot

from .contract import Opener, StorageContract
from .dump import dump
from .writer import Writer, message_row, writing


class SnapshotContract(StorageContract):
    """One moment."""

    async def test_it_stays_as_it_was(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=2)
            async with writer.storage.snapshot() as before:
                await _grow(writer, 3)
                async with writer.storage.snapshot() as between:
                    await writer.apply(deleted=("a",))
                    await writer.create("b", session_id="session a")
                    assert await _watermark_and_messages(before) == (1, [1, 2])
                    assert await _watermark_and_messages(between) == (2, [1, 2, 3])
                    async with writer.storage.snapshot() as after:
                        assert await _watermark_and_messages(after) == (4, [])
                assert await _watermark_and_messages(before) == (1, [1, 2])

    async def test_lists_stay_as_they_were(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("b")
            await writer.create("d")
            async with writer.storage.snapshot() as snapshot:
                for incarnation in "ace":
                    await writer.create(incarnation)
                await writer.apply(deleted=("b",))
                assert [row.incarnation for row in await snapshot.sessions(limit=10)] == ["b", "d"]
                assert [row.incarnation for row in await snapshot.sessions(limit=10, order="desc")] == ["d", "b"]
                assert [row.incarnation for row in await snapshot.sessions(limit=1)] == ["b"]
            async with writer.storage.snapshot() as snapshot:
                assert [row.incarnation for row in await snapshot.sessions(limit=10)] == ["a", "c", "d", "e"]

    async def test_nothing_of_a_refused_batch_is_seen(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=2)
            async with writer.storage.snapshot() as snapshot:
                stale = writer.batch(touched=(writer.touch("a"),), messages=(message_row("a", 3),))
                await writer.storage.apply(stale, writer.fence)
                assert await _watermark_and_messages(snapshot) == (1, [1, 2])

    async def test_none_is_torn_or_late_while_batches_come(self, opener: Opener) -> None:
        """Every batch moves the session's row and adds a message: a view shows both or neither."""
        batches = 30
        async with writing(opener) as writer:
            await writer.create("a")

            async def read() -> None:
                seen = 0
                while seen <= batches:
                    stored = writer.sequence
                    async with writer.storage.snapshot() as snapshot:
                        for _ in range(2):
                            head = await snapshot.head("session a", outcomes_max=0)
                            messages = await snapshot.messages("a", limit=100)
                            assert head is not None
                            assert head.session.sequence == snapshot.watermark == len(messages) + 1
                        assert snapshot.watermark >= max(stored, seen)
                        seen = snapshot.watermark

            with anyio.fail_after(60):
                async with anyio.create_task_group() as group:
                    for _ in range(3):
                        group.start_soon(read)
                    for seq in range(1, batches + 1):
                        await _grow(writer, seq)

    async def test_neither_waits_for_the_other(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a")
            with anyio.fail_after(30):
                async with writer.storage.snapshot() as first, writer.storage.snapshot() as second:
                    await writer.apply(messages=tuple(message_row("a", seq) for seq in range(1, 1001)))
                    async with writer.storage.snapshot() as third:
                        assert len(await third.messages("a", limit=2000)) == 1000
                    assert not await first.messages("a", limit=1)
                    assert not await second.messages("a", limit=1)

    async def test_many_at_once(self, opener: Opener) -> None:
        """More than a pool has connections: they take turns."""
        async with writing(opener) as writer:
            await writer.create("a", messages=3)
            expected = await dump(writer.storage)

            async def read() -> None:
                assert await dump(writer.storage) == expected

            with anyio.fail_after(60):
                async with anyio.create_task_group() as group:
                    for _ in range(20):
                        group.start_soon(read)
            assert writer.storage.figures().in_use == 0


async def _grow(writer: Writer, seq: int) -> None:
    touch = writer.touch("a", message_count=seq, next_seq=seq + 1)
    await writer.apply(touched=(touch,), messages=(message_row("a", seq),))


async def _watermark_and_messages(snapshot: Snapshot) -> tuple[int, list[int]]:
    return snapshot.watermark, [row.seq for row in await snapshot.messages("a", limit=10)]
