"""Whatever is called, and however the changes fall into batches: a storage shows what a plain model does."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from agent_runtime.changes import coalesce

from .contract import SHARED, NewStorage, StorageContract
from .dump import dump
from .world import Call, World, calls
from .writer import NOON, writing


class SequenceContract(StorageContract):
    """Random calls, compared with a model."""

    @given(calls=calls(), sizes=st.lists(st.integers(1, 8), min_size=1), purged=st.sampled_from([0, 2, 1000]))
    @settings(max_examples=10, deadline=None, suppress_health_check=SHARED)
    async def test_random_calls_in_random_batches(
        self, new_storage: NewStorage, calls: list[Call], sizes: list[int], purged: int
    ) -> None:
        opener, world = new_storage(), World()
        left = list(calls)
        async with writing(opener) as writer:
            while left:
                size = sizes[world.sequence % len(sizes)]
                after = world.sequence
                changes = [world.perform(call) for call in left[:size]]
                del left[:size]
                await writer.storage.apply(coalesce(changes, after, NOON), writer.fence)
                if purged:
                    await writer.storage.purge(writer.fence, now=NOON, rows_max=purged)
                assert await dump(writer.storage) == world.dump()
        if "reopening" not in self.lacks:
            async with opener() as storage:
                assert await dump(storage) == world.dump()
