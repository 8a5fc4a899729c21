"""Storages that break one promise each, given to the kit: `pytest liars.py` must find every one of them out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import anyio
import pytest
from msgspec.structs import replace

from agent_runtime import LeaseLost
from agent_runtime.changes import Batch, Receipt
from agent_runtime.errors import ChangeRejected, SequenceMismatch, StorageError
from agent_runtime.storage import Abilities, Fence, PoolFigures, Snapshot, Storage, StorageConfig
from agent_runtime.testing import Faults, FaultyStorage
from agent_runtime.testing.kit import NewStorage, Opener, StorageKit
from agent_runtime_memory import MemoryDatabase


class Liars(StorageKit):
    kind: ClassVar[type[FaultyStorage]] = FaultyStorage

    @pytest.fixture
    def new_storage(self) -> NewStorage:
        def new() -> Opener:
            database = MemoryDatabase()

            @asynccontextmanager
            async def opened() -> AsyncIterator[Storage]:
                async with database.open(StorageConfig(url="memory:")) as inner:
                    yield self.kind(inner, Faults())

            return opened

        return new


class Torn(FaultyStorage):
    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        try:
            return await super().apply(batch, fence)
        except ChangeRejected:
            await super().apply(Batch(after=batch.after, last=batch.last, changes=1, sessions=1), fence)
            raise


class TestTorn(Liars):
    kind = Torn


class Doubling(FaultyStorage):
    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        try:
            return await super().apply(batch, fence)
        except SequenceMismatch as error:
            return await super().apply(replace(batch, after=error.found, last=error.found + 1), fence)


class TestDoubling(Liars):
    kind = Doubling


class Unfenced(FaultyStorage):
    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        try:
            return await super().apply(batch, fence)
        except LeaseLost:
            return batch.receipt()


class TestUnfenced(Liars):
    kind = Unfenced


class Deaf(FaultyStorage):
    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        try:
            return await super().apply(batch, fence)
        except StorageError:
            return batch.receipt()


class TestDeaf(Liars):
    kind = Deaf


class HalfCancelled(FaultyStorage):
    """Shows a part before the rest, and leaves it there when it is cancelled in between."""

    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        documents = batch.documents
        await super().apply(replace(batch, documents=()), fence)
        rest = Batch(after=batch.last, last=batch.last, changes=0, sessions=0, documents=documents)
        await super().apply(rest, fence)
        return batch.receipt()


class TestHalfCancelled(Liars):
    kind = HalfCancelled


class Wrapped:
    """A snapshot, but for what a subclass changes."""

    def __init__(self, inner: Snapshot) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Wrapping(FaultyStorage):
    wrapper: ClassVar[type[Wrapped]]

    @asynccontextmanager
    async def snapshot(self, partition: int = 0, first: Sequence[Any] = ()) -> AsyncIterator[Any]:
        async with super().snapshot(partition, first) as inner:
            yield self.wrapper(inner)


class Behind(Wrapped):
    @property
    def watermark(self) -> int:
        return max(0, self._inner.watermark - 1)


class LastPage(Wrapped):
    async def messages(self, *args: Any, order: str = "asc", **kwargs: Any) -> Sequence[Any]:
        return await self._inner.messages(*args, **kwargs)


class Tidied(Wrapped):
    async def documents(self, *args: Any, **kwargs: Any) -> Sequence[Any]:
        rows = await self._inner.documents(*args, **kwargs)
        return [replace(row, data=row.data and row.data.strip(b"\0")) for row in rows]


class TestBehind(Liars):
    class kind(Wrapping):
        wrapper = Behind


class TestNeverDescending(Liars):
    class kind(Wrapping):
        wrapper = LastPage


class TestTidied(Liars):
    class kind(Wrapping):
        wrapper = Tidied


class Leaking(FaultyStorage):
    def figures(self) -> PoolFigures:
        return PoolFigures(size=1, in_use=1)


class TestLeaking(Liars):
    kind = Leaking


class RowByRow(FaultyStorage):
    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        await anyio.sleep(0.001 * len(batch.messages))
        return await super().apply(batch, fence)


class TestRowByRow(Liars):
    kind = RowByRow


class Boasting(FaultyStorage):
    @property
    def abilities(self) -> Abilities:
        return Abilities(survives="power", journal_directory="/journal")


class TestBoasting(Liars):
    kind = Boasting


class TestForgetful(Liars):
    """Does not declare that it is empty again when it is opened again."""

    @pytest.fixture
    def new_storage(self) -> NewStorage:
        return lambda: lambda: MemoryDatabase().open(StorageConfig(url="memory:"))


class TestForgetfulAndSaysSo(TestForgetful):
    """Breaks nothing."""

    lacks = ("openings", "reopening")


class TestSkipping(Liars):
    @pytest.fixture
    def new_storage(self) -> NewStorage:
        pytest.skip("there is no server")


@pytest.mark.xfail
class TestExpectedToFail(Liars):
    kind = Leaking


@pytest.mark.skip
class TestSkipped(Liars): ...
