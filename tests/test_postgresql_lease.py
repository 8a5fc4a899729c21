"""The lease of a PostgreSQL database: by the server's clock, and never up to somebody who hangs."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import Any

import anyio
import pytest
from msgspec.structs import asdict

from agent_runtime.errors import LeaseHeld, LeaseLost, StorageUnavailable
from agent_runtime.process import this_process
from agent_runtime.storage import Claim, LeaseRow, Storage, StorageConfig
from agent_runtime.testing.kit import Opener
from agent_runtime.testing.kit.writer import Writer
from agent_runtime.testing.kit.writer import claim as contract_claim
from agent_runtime_postgresql import open_postgresql
from agent_runtime_postgresql.storage import PostgresqlStorage
from agent_runtime_postgresql.transaction import PostgresqlTransaction
from postgres_server import migrated_schema, server, url_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def schema() -> str:
    return migrated_schema()


@pytest.fixture
def opener(schema: str) -> Opener:
    return lambda: open_postgresql(StorageConfig(url=url_of(schema)))


def claim(holder: str, duration_s: float = 100.0) -> Claim:
    """As this process would claim."""
    return Claim(holder=holder, duration_s=duration_s, **asdict(this_process()))


async def lease_of(storage: Storage) -> LeaseRow:
    async with storage.snapshot() as snapshot:
        lease = await snapshot.lease()
    assert lease is not None
    return lease


async def in_transaction(storage: Storage, function: Any) -> None:
    assert isinstance(storage, PostgresqlStorage)
    await storage._writer.run(function)


def test_a_dead_holder_is_followed_at_once(schema: str, opener: Opener) -> None:
    """On the same machine, where a process can be seen to be dead."""
    program = f"""
import anyio, sys
from agent_runtime.lease import claim_of
from agent_runtime.storage import StorageConfig
from agent_runtime_postgresql import open_postgresql

async def main():
    async with open_postgresql(StorageConfig(url={url_of(schema)!r})) as storage:
        await storage.leases.acquire(claim_of(100.0))
        print("held", flush=True)
        await anyio.sleep(100)

anyio.run(main)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"

        async def follow() -> None:
            async with opener() as storage:
                with pytest.raises(LeaseHeld):
                    await storage.leases.acquire(claim("the second"))
                process.send_signal(signal.SIGKILL)
                process.wait()
                grant = await storage.leases.acquire(claim("the second"))
                assert grant.fence.epoch == 2

        anyio.run(follow)


async def test_a_holder_on_another_machine_counts_until_its_lease_ends(schema: str, opener: Opener) -> None:
    async with opener() as storage:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        await storage.leases.acquire(contract_claim("elsewhere", pid=dead.pid, boot_id="another boot"))
        with pytest.raises(LeaseHeld, match="elsewhere"):
            await storage.leases.acquire(claim("here"))
        server().execute("UPDATE partitions SET expires_at = extract(epoch FROM clock_timestamp()) - 1", schema=schema)
        lease = await lease_of(storage)
        assert lease.expires_in_s is not None
        assert -60 < lease.expires_in_s < 0
        await storage.leases.acquire(claim("here"))


async def test_seconds_are_those_of_the_server(schema: str, opener: Opener) -> None:
    async with opener() as storage:
        await storage.leases.acquire(claim("me", 100.0))
        left = "SELECT expires_at - extract(epoch FROM clock_timestamp()), duration_s FROM partitions"
        ((left_s, duration_s),) = server().rows(left, schema=schema)
        assert 0 < left_s <= 100.0 == duration_s


async def test_a_writer_that_hangs_keeps_nobody_from_taking_over(opener: Opener) -> None:
    """It has the partition's row locked; the server ends its transaction before its lease does."""
    async with opener() as hanging, opener() as other:
        first = Writer(hanging, await hanging.leases.acquire(claim("the first", 2.0)))

        async def hang(transaction: PostgresqlTransaction) -> None:
            await transaction.driver.execute("SELECT 1 FROM partitions FOR UPDATE")
            await asyncio.sleep(4.0)

        async def hold() -> None:
            with pytest.raises(StorageUnavailable):
                await in_transaction(hanging, hang)

        async with anyio.create_task_group() as group:
            group.start_soon(hold)
            await anyio.sleep(2.2)
            with anyio.fail_after(1.5):
                await other.leases.acquire(claim("the second"))
        with pytest.raises(LeaseLost):
            await first.apply()


@pytest.mark.parametrize("expired", [True, False])
async def test_a_writer_that_is_frozen_within_a_statement_is_cut_off_once_its_lease_has_expired(
    opener: Opener, expired: bool
) -> None:
    """The server waits for the rest of what the client has begun, for ever: no timeout of its own ends that."""
    async with opener() as hanging, opener() as other:
        first = Writer(hanging, await hanging.leases.acquire(claim("the first", 1.0 if expired else 100.0)))
        await hanging.leases.renew(first.fence, 1.0 if expired else 100.0)

        async def hang(transaction: PostgresqlTransaction) -> None:
            await transaction.driver.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            await transaction.driver.execute("SELECT 1 FROM partitions FOR UPDATE")
            await transaction.driver.prepare("SELECT 1")
            await asyncio.sleep(3.0)

        async def hold() -> None:
            if expired:
                with pytest.raises(StorageUnavailable):
                    await in_transaction(hanging, hang)
            else:
                await in_transaction(hanging, hang)

        async with anyio.create_task_group() as group:
            group.start_soon(hold)
            await anyio.sleep(1.5)
            if expired:
                with anyio.fail_after(3):
                    await other.leases.acquire(claim("the second", 1.0))
            else:
                with pytest.raises(StorageUnavailable):
                    await other.leases.acquire(claim("the second", 1.0))
        if expired:
            with pytest.raises(LeaseLost):
                await first.apply()


async def test_a_takeover_waits_for_the_batch_that_is_being_stored(opener: Opener) -> None:
    """And finds its sequence: the batch and the takeover change the same row."""
    async with opener() as storage, opener() as other:
        first = Writer(storage, await storage.leases.acquire(claim("the first", 60.0)))

        async def store(transaction: PostgresqlTransaction) -> None:
            await transaction.driver.execute("UPDATE partitions SET sequence = 7")
            await transaction.driver.execute("UPDATE partitions SET expires_at = 0")  # as if it took very long
            await asyncio.sleep(0.5)

        async with anyio.create_task_group() as group:
            group.start_soon(in_transaction, storage, store)
            await anyio.sleep(0.2)
            grant = await other.leases.acquire(claim("the second"))
        assert grant.sequence == 7
        with pytest.raises(LeaseLost, match="the second"):
            await first.apply()


async def test_a_batch_waits_for_the_takeover_and_is_refused(opener: Opener) -> None:
    async with opener() as storage, opener() as other:
        first = Writer(storage, await storage.leases.acquire(claim("the first", 60.0)))

        async def take(transaction: PostgresqlTransaction) -> None:
            await transaction.driver.execute("UPDATE partitions SET epoch = epoch + 1, holder = 'the second'")
            await asyncio.sleep(0.5)

        async with anyio.create_task_group() as group:
            group.start_soon(in_transaction, other, take)
            await anyio.sleep(0.2)
            with pytest.raises(LeaseLost, match="the second"):
                await first.apply()
            with pytest.raises(LeaseLost):
                await storage.leases.renew(first.fence, 60.0)
