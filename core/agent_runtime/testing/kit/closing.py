"""What is closed says so."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from agent_runtime.errors import StorageError

from .contract import Opener, StorageContract
from .writer import Writer, claim, writing


class ClosingContract(StorageContract):
    """Closed is closed."""

    async def test_a_closed_storage_refuses_every_call(self, opener: Opener) -> None:
        async with opener() as storage:
            writer = Writer(storage, await storage.leases.acquire(claim()))
        with pytest.raises(StorageError):
            await writer.apply()
        with pytest.raises(StorageError):
            await storage.purge(writer.fence, now=datetime.now(UTC), rows_max=1)
        with pytest.raises(StorageError):
            async with storage.snapshot():
                pass
        with pytest.raises(StorageError):
            await storage.leases.acquire(claim())
        with pytest.raises(StorageError):
            await storage.leases.renew(writer.fence, 1.0)
        with pytest.raises(StorageError):
            await storage.leases.release(writer.fence)

    async def test_a_snapshot_ends_with_its_block(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=1)
            async with writer.storage.snapshot() as snapshot:
                pass
            with pytest.raises(StorageError):
                await snapshot.messages("a", limit=1)
            assert writer.storage.figures().in_use == 0

    async def test_figures(self, opener: Opener) -> None:
        async with opener() as storage:
            assert storage.figures().in_use == 0
            async with storage.snapshot():
                figures = storage.figures()
                assert 0 <= figures.in_use <= figures.size
            assert storage.figures().in_use == 0
