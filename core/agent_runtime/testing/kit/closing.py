"""What is closed says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest

from agent_runtime.errors import StorageError

from .contract import Opener, StorageContract
from .writer import Writer, claim, writing


@contextmanager
def _refused(call: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        return
    pytest.fail(f"{call} raised nothing: it must raise a StorageError, such as StorageUnavailable")


class ClosingContract(StorageContract):
    """Closed is closed."""

    async def test_a_closed_storage_refuses_every_call(self, opener: Opener) -> None:
        async with opener() as storage:
            writer = Writer(storage, await storage.leases.acquire(claim()))
        with _refused("apply, after the storage was closed,"):
            await writer.apply()
        with _refused("purge, after the storage was closed,"):
            await storage.purge(writer.fence, now=datetime.now(UTC), rows_max=1)
        with _refused("snapshot, after the storage was closed,"):
            async with storage.snapshot():
                pass
        with _refused("leases.acquire, after the storage was closed,"):
            await storage.leases.acquire(claim())
        with _refused("leases.renew, after the storage was closed,"):
            await storage.leases.renew(writer.fence, 1.0)
        with _refused("leases.release, after the storage was closed,"):
            await storage.leases.release(writer.fence)

    async def test_a_snapshot_ends_with_its_block(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=1)
            async with writer.storage.snapshot() as snapshot:
                pass
            with _refused("a read of a snapshot, after its block was left,"):
                await snapshot.messages("a", limit=1)
            assert writer.storage.figures().in_use == 0

    async def test_figures(self, opener: Opener) -> None:
        async with opener() as storage:
            assert storage.figures().in_use == 0
            async with storage.snapshot():
                figures = storage.figures()
                assert 0 <= figures.in_use <= figures.size
            assert storage.figures().in_use == 0
