"""Purging deletes what nobody sees, a chunk at a time, and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from agent_runtime.errors import LeaseLost

from .contract import Opener, StorageContract
from .dump import dump
from .writer import DAY, Writer, document_row, message_row, outcome_row, switch_row, writing


async def purge(writer: Writer, rows_max: int) -> int:
    """Purge to the end; the number of rows deleted."""
    total = 0
    while rows := await writer.storage.purge(writer.fence, now=datetime.now(UTC), rows_max=rows_max):
        assert 0 < rows <= rows_max
        total += rows
    return total


class PurgeContract(StorageContract):
    """What nobody sees goes."""

    @pytest.mark.parametrize("rows_max", [2, 1000])
    async def test_messages_below_the_floor(self, opener: Opener, rows_max: int) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=7)
            await writer.create("b", messages=7)
            await writer.apply(touched=(writer.touch("a"),), cleared=(("a", 7),))
            await writer.apply(touched=(writer.touch("a"),), messages=(message_row("a", 8),))
            before = await dump(writer.storage)
            assert await purge(writer, rows_max) == 7
            assert await dump(writer.storage) == before
            async with writer.storage.snapshot() as snapshot:
                assert [row.seq for row in await snapshot.messages("a", limit=10)] == [8]

    @pytest.mark.parametrize("rows_max", [2, 1000])
    async def test_deleted_sessions(self, opener: Opener, rows_max: int) -> None:
        async with writing(opener) as writer:
            for incarnation in "abc":
                await writer.create(incarnation, messages=4)
                await writer.apply(
                    touched=(writer.touch(incarnation),),
                    switches=(switch_row(incarnation, 1),),
                    documents=(document_row(incarnation, "notes", "1"),),
                    outcomes=(outcome_row(incarnation, "1"),),
                )
            await writer.apply(deleted=("a", "b"))
            await writer.create("d", session_id="session a", messages=2)
            before = await dump(writer.storage)
            assert await purge(writer, rows_max) >= 2 * len([1, 2, 3, 4, "switch", "document", "context"])
            assert await dump(writer.storage) == before
            async with writer.storage.snapshot() as snapshot:
                assert await snapshot.outcome("a", "1") is not None  # until it expires, so that calls can be repeated

    async def test_expired_outcomes(self, opener: Opener) -> None:
        now = datetime.now(UTC)
        expired = [outcome_row(scope, "expired", expires_at=now - DAY) for scope in ("a", "create")]
        lasting = [outcome_row(scope, "lasting", expires_at=now + DAY) for scope in ("a", "create")]
        renewed = outcome_row("a", "renewed", expires_at=now - DAY)
        async with writing(opener) as writer:
            await writer.create("a")
            await writer.apply(outcomes=(*expired, *lasting, renewed))
            await writer.apply(outcomes=(replace(renewed, expires_at=now + DAY),))
            assert await purge(writer, 1000) == 2
            async with writer.storage.snapshot() as snapshot:
                for outcome in expired:
                    assert await snapshot.outcome(outcome.scope, outcome.key) is None
                for outcome in (*lasting, replace(renewed, expires_at=now + DAY)):
                    assert await snapshot.outcome(outcome.scope, outcome.key) == outcome

    async def test_open_snapshots_lose_nothing(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=3)
            async with writer.storage.snapshot() as snapshot:
                await writer.apply(deleted=("a",))
                await purge(writer, 1000)
                assert await snapshot.head("session a", outcomes_max=1) is not None
                assert len(await snapshot.messages("a", limit=10)) == 3

    async def test_nothing_to_purge(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            assert await purge(writer, 10) == 0
            await writer.create("a", messages=3)
            await writer.apply(touched=(writer.touch("a"),), outcomes=(outcome_row("a", "1"),))
            before = await dump(writer.storage)
            assert await purge(writer, 10) == 0
            assert await dump(writer.storage) == before

    async def test_only_with_the_right_to_write(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            stranger = replace(writer.fence, epoch=writer.fence.epoch + 1)
            with pytest.raises(LeaseLost):
                await writer.storage.purge(stranger, now=datetime.now(UTC), rows_max=1)
