"""The lease of a SQLite file: by a clock that sleeps with nobody, and at once when its holder is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import asdict, replace

from agent_runtime.errors import LeaseHeld, LeaseLost
from agent_runtime.process import boot_clock, this_process
from agent_runtime.storage import Claim, LeaseRow, Storage, StorageConfig
from agent_runtime.testing.kit.writer import Writer
from agent_runtime_sqlite.storage import open_storage

pytestmark = pytest.mark.anyio

DURATION_S = 100.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def config(tmp_path: Path) -> StorageConfig:
    return StorageConfig(url=f"sqlite:///{tmp_path / 'agent_runtime.db'}")


def claim(holder: str) -> Claim:
    """As this process would claim."""
    return Claim(holder=holder, duration_s=DURATION_S, **asdict(this_process()))


async def lease_of(storage: Storage) -> LeaseRow:
    async with storage.snapshot() as snapshot:
        lease = await snapshot.lease()
    assert lease is not None
    return lease


def test_the_clock_goes_on_while_the_machine_sleeps() -> None:
    uptime_s = float(Path("/proc/uptime").read_text().split()[0]) if sys.platform == "linux" else boot_clock()
    assert abs(boot_clock() - uptime_s) < 5


async def test_the_same_process_is_refused_as_any_other(config: StorageConfig, clock: Clock) -> None:
    async with open_storage(config, clock=clock) as storage, open_storage(config, clock=clock) as another:
        await storage.leases.acquire(claim("the first"))
        clock.now_s += 30
        with pytest.raises(LeaseHeld, match=r"in use by the first, for 70\.0 s more") as caught:
            await another.leases.acquire(claim("the second"))
        assert caught.value.expires_in_s == 70.0
        assert (await lease_of(another)).expires_in_s == 70.0


async def test_a_lease_ends_and_is_renewed_by_the_clock(config: StorageConfig, clock: Clock) -> None:
    async with open_storage(config, clock=clock) as storage, open_storage(config, clock=clock) as another:
        first = await storage.leases.acquire(claim("the first"))
        clock.now_s += DURATION_S + 5
        assert (await lease_of(storage)).expires_in_s == -5
        await storage.leases.renew(first.fence, 10.0)
        assert (await lease_of(storage)).expires_in_s == 10
        clock.now_s += 9.9
        with pytest.raises(LeaseHeld):
            await another.leases.acquire(claim("the second"))
        clock.now_s += 0.2
        second = await another.leases.acquire(claim("the second"))
        assert second.fence.epoch == first.fence.epoch + 1
        with pytest.raises(LeaseLost, match=f"in epoch {second.fence.epoch} it is held by the second"):
            await storage.leases.renew(first.fence, 10.0)
        with pytest.raises(LeaseLost, match="held by the second"):
            await Writer(storage, first).apply()
        await another.leases.release(second.fence)
        with pytest.raises(LeaseLost, match="held by nobody"):
            await another.leases.renew(second.fence, 10.0)


async def test_a_lease_of_another_boot_has_ended(config: StorageConfig, clock: Clock) -> None:
    """Whether boots have ids, or the clock was set back to where a lease lasts longer than it was granted for."""
    before = replace(claim("before"), boot_id="another boot")
    async with open_storage(config, clock=clock) as storage:
        await storage.leases.acquire(before)
        if this_process().boot_id is not None:
            left_s = (await lease_of(storage)).expires_in_s
            assert left_s is not None
            assert left_s < 0
            after = claim("after")
        else:
            after = replace(before, holder="after", boot_id="this boot")
        await storage.leases.acquire(after)
        await storage.leases.release((await storage.leases.acquire(replace(after, boot_id="third"))).fence)

        await storage.leases.acquire(replace(claim("before"), boot_id=None))
        clock.now_s = 1.0
        assert (await lease_of(storage)).expires_in_s == -1.0
        await storage.leases.acquire(replace(claim("after"), boot_id=None))


async def test_a_database_of_another_file_has_no_record_of_the_lease(config: StorageConfig, tmp_path: Path) -> None:
    elsewhere = StorageConfig(url=f"sqlite:///{tmp_path / 'another.db'}")
    async with open_storage(config) as storage, open_storage(elsewhere) as another:
        grant = await storage.leases.acquire(claim("the first"))
        with pytest.raises(LeaseLost, match="no record"):
            await Writer(another, grant).apply()
        with pytest.raises(LeaseLost, match="no record"):
            await another.leases.renew(grant.fence, 10.0)


async def test_partitions_are_apart(config: StorageConfig) -> None:
    async with open_storage(config) as storage:
        first = await storage.leases.acquire(claim("the first"))
        second = await storage.leases.acquire(replace(claim("the second"), partition=1))
        assert (first.database_id, second.fence.partition) == (second.database_id, 1)
        writers = [Writer(storage, first), Writer(storage, second), Writer(storage, second)]
        for number, writer in enumerate(writers[:2]):
            await writer.create(f"{number}", session_id="same")
        await writers[1].apply()
        for partition, watermark in ((0, 1), (1, 2), (2, 0)):
            async with storage.snapshot(partition) as snapshot:
                head = await snapshot.head("same", outcomes_max=0)
                assert snapshot.watermark == watermark
                assert (head and head.session.incarnation) == (f"{partition}" if partition < 2 else None)
                assert [row.incarnation for row in await snapshot.sessions(limit=9)] == [f"{partition}"][:watermark]


HOLDER = """
import sys
sys.path[:] = sys.argv[2].split(":")
import anyio
from msgspec.structs import asdict
from agent_runtime.process import this_process
from agent_runtime.storage import Claim, StorageConfig
from agent_runtime_sqlite.storage import open_storage
async def main():
    claim = Claim(holder="the other process", duration_s=100, **asdict(this_process()))
    async with open_storage(StorageConfig(url=sys.argv[1])) as storage:
        print((await storage.leases.acquire(claim)).fence.epoch, flush=True)
        await anyio.sleep(600)
anyio.run(main)
"""


@pytest.fixture
def holder(config: StorageConfig) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the lease."""
    command = [sys.executable, "-c", HOLDER, config.url, ":".join(sys.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        yield process
        process.kill()


async def test_a_living_holder_keeps_its_lease_and_a_dead_one_loses_it_at_once(
    config: StorageConfig, holder: subprocess.Popen[str]
) -> None:
    async with open_storage(config) as storage:
        for stop in (signal.SIGCONT, signal.SIGSTOP):
            holder.send_signal(stop)
            with pytest.raises(LeaseHeld, match="the other process"):
                await storage.leases.acquire(claim("this one"))
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        if sys.platform != "linux":
            with pytest.raises(LeaseHeld, match="the other process"):
                await storage.leases.acquire(claim("this one"))
            return
        grant = await storage.leases.acquire(claim("this one"))
        assert grant.fence.epoch == 2
        await Writer(storage, grant).create("a")
