"""A call that is cancelled, at whatever point it waits, has happened whole or not at all, and leaves nothing behind."""

from __future__ import annotations

import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from datetime import UTC, datetime
from itertools import count
from typing import Any

import anyio
import pytest

from agent_runtime.changes import Batch
from agent_runtime.errors import LeaseHeld, SequenceMismatch
from agent_runtime.storage import Grant, Storage

from .contract import NewStorage, Opener, StorageContract
from .dump import dump
from .writer import Writer, claim, document_row, message_row, writing


@types.coroutine
def _stepped(call: Coroutine[Any, Any, object], step: int, cancel: Callable[[], None]) -> Generator[Any, Any, None]:
    """Run the call; when it waits for the `step`-th time, cancel it there."""
    resume: Callable[[Any], Any] = call.send
    value: Any = None
    waits = 0
    while True:
        try:
            awaited = resume(value)
        except StopIteration:
            return
        waits += 1
        if waits == step:
            cancel()
        try:
            value = yield awaited
            resume = call.send
        except BaseException as error:  # noqa: BLE001 — the call is to meet whatever comes
            value, resume = error, call.throw


async def cancelled_everywhere(call: Callable[[], Coroutine[Any, Any, object]]) -> AsyncIterator[int]:
    """Cancel a new call where it waits for the first time, the second, …; yields after each, until one ends before."""
    for step in count(1):
        with anyio.CancelScope() as scope, anyio.fail_after(30):
            await _stepped(call(), step, scope.cancel)
        if not scope.cancel_called:
            return
        yield step


async def acquire_soon(storage: Storage) -> Grant:
    """Acquire the lease, once a short one has expired that may or may not have been granted."""
    with anyio.fail_after(30):
        while True:
            try:
                return await storage.leases.acquire(claim())
            except LeaseHeld:
                await anyio.sleep(0.01)


class CancellationContract(StorageContract):
    """Cancelled anywhere, whole or not at all."""

    async def test_apply(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a")
            seq = 0

            async def apply() -> None:
                await writer.storage.apply(_growth(writer, seq), writer.fence)

            async for _ in cancelled_everywhere(apply):
                before = writer.sequence
                await self._finish(writer, seq)
                async with writer.storage.snapshot() as snapshot:
                    assert snapshot.watermark == writer.sequence == before + 1
                    assert len(await snapshot.messages("a", limit=1000)) == seq + 1
                seq += 1
            assert seq
            assert writer.storage.figures().in_use == 0

    async def _finish(self, writer: Writer, seq: int) -> None:
        """Whatever became of the batch: trying again stores it, or tells that it is stored."""
        batch = _growth(writer, seq)
        async with writer.storage.snapshot() as snapshot:
            stored = snapshot.watermark == batch.last
            assert stored or snapshot.watermark == batch.after
            assert len(await snapshot.messages("a", limit=1000)) == seq + stored
            assert (await snapshot.document("a", "notes", f"{seq}") is not None) == stored
        if stored:
            with pytest.raises(SequenceMismatch):
                await writer.storage.apply(batch, writer.fence)
        else:
            await writer.storage.apply(batch, writer.fence)
        writer.sequence = batch.last

    async def test_reads(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=2)
            expected = await dump(writer.storage)
            async for _ in cancelled_everywhere(lambda: dump(writer.storage)):
                assert writer.storage.figures().in_use == 0
            for _ in range(10):
                assert await dump(writer.storage) == expected
            await writer.apply(deleted=("a",))

    async def test_purge(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=100)
            await writer.apply(touched=(writer.touch("a"),), cleared=(("a", 99),))

            async def purge() -> int:
                return await writer.storage.purge(writer.fence, now=datetime.now(UTC), rows_max=2)

            before = await dump(writer.storage)
            async for _ in cancelled_everywhere(purge):
                assert await dump(writer.storage) == before
            with anyio.fail_after(30):
                while await purge():
                    pass
            assert await dump(writer.storage) == before

    async def test_acquire(self, opener: Opener) -> None:
        async with opener() as storage:
            epoch = 0
            async for _ in cancelled_everywhere(lambda: storage.leases.acquire(claim(duration_s=0.02))):
                grant = await acquire_soon(storage)
                assert grant.fence.epoch > epoch
                epoch = grant.fence.epoch
                await Writer(storage, grant).apply()
                await storage.leases.release(grant.fence)

    async def test_renew_and_release(self, opener: Opener) -> None:
        async with opener() as storage:
            writer = Writer(storage, await storage.leases.acquire(claim()))
            async for _ in cancelled_everywhere(lambda: storage.leases.renew(writer.fence, 60.0)):
                await writer.apply()

            async def release() -> None:
                await storage.leases.release(writer.fence)

            async for _ in cancelled_everywhere(release):
                await release()
                writer = Writer(storage, await storage.leases.acquire(claim()))
                await writer.apply()

    async def test_opening(self, untouched_storage: NewStorage) -> None:
        opener = untouched_storage()

        async def open_and_close() -> None:
            async with opener():
                pass

        async for _ in cancelled_everywhere(open_and_close):
            await self._works(opener)
            opener = untouched_storage()

    async def _works(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=1)
            assert len((await dump(writer.storage)).sessions) == 1


def _growth(writer: Writer, seq: int) -> Batch:
    return writer.batch(
        touched=(writer.touch("a", message_count=seq + 1, next_seq=seq + 2),),
        messages=(message_row("a", seq + 1),),
        documents=(document_row("a", "notes", f"{seq}"),),
    )
