"""Appends without end, over more sessions than memory has room for: every figure is what was counted otherwise, and
memory does not grow.

The truth is counted from outside: calls by their caller, loads and batches at the storage, files on the disk, rows in the
database, the process by the operating system.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any, TypeVar
from unittest.mock import patch

import msgspec
import psutil
import pytest
from anyio.lowlevel import checkpoint

from agent_runtime import Runtime, hookimpl
from agent_runtime.budget import CHANGE_BYTES
from agent_runtime.changes import Batch, Receipt
from agent_runtime.histograms import COUNTS
from agent_runtime.journal import Frame, Journal, read_directory
from agent_runtime.journal.still import StillFiles
from agent_runtime.records import Durability
from agent_runtime.testing import CallName, Faults, faulty_plugin
from agent_runtime_sqlite import agent_runtime_storages
from figures import Figures, counted
from http_rig import App, opened, runtime_of
from places import NEVER_S, in_file
from rig import audit, audit_at_rest

T = TypeVar("T")
TURN = 5  # appends to a session before another one's turn
LEVELS: tuple[Durability, ...] = ("buffered", "journaled", "synced", "stored")


class Soak(msgspec.Struct, frozen=True):
    """How much of everything."""

    appends: int
    sessions: int
    bytes_max: int
    interval_s: float


class Counts(Faults):
    """Counts, at the storage and as a plugin, what the runtime counts for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.loads = 0
        self.finds = 0
        self.changes = 0
        self.receipts: list[tuple[int, float]] = []
        self.appends: dict[Durability, int] = dict.fromkeys(LEVELS, 0)
        self.syncs: list[float] = []

    async def call(self, name: CallName, effect: Callable[[], Awaitable[T]], batch: Batch | None = None) -> T:
        self.loads += name == "head"
        return await effect()

    @hookimpl
    def agent_runtime_batch_stored(self, receipt: Receipt) -> None:
        self.receipts.append((receipt.changes, receipt.duration_s))


class Bench:
    """An application over an SQLite file, what is done with it, and what that must come to."""

    def __init__(self, app: App, counts: Counts, directory: Path, soak: Soak) -> None:
        self.runtime: Runtime = runtime_of(app)
        self.counts = counts
        self._app = app
        self._directory = directory
        self._soak = soak
        self._random = Random(20260301)
        self._names = 0

    async def figures(self) -> Figures:
        reply = await self._app("GET", "/metrics")
        assert reply.status == 200
        return Figures(reply.body.decode())

    async def turn(self, level: Durability = "journaled") -> None:
        """A turn of a conversation: of a new one until there are enough, then of any, most often of one of a few."""
        counts = self.counts
        if self._names < self._soak.sessions:
            self._names += 1
            session = await self.runtime.get_or_create_session(f"session {self._names}")
            counts.changes += 1
        else:
            number = 1 + int(self._names * self._random.random() ** 3)
            session = await self.runtime.get_session(f"session {number}")
        for _ in range(TURN):
            await session.append("user", "something that is said, " * self._random.randint(1, 20), durability=level)
        counts.finds += 1 + TURN
        counts.appends[level] += TURN
        counts.changes += TURN

    def segments(self) -> list[Path]:
        return list(self._directory.glob("*.journal/*.segment"))

    def unstored_bytes(self) -> int:
        """What unstored changes take, by what stands in the journal."""
        [place] = self._directory.glob("*.journal")
        with closing(StillFiles(place)) as files:
            frames = read_directory(files, None).frames(after=self.runtime.watermarks.stored)
            return sum(CHANGE_BYTES + len(frame.payload) for frame in frames if isinstance(frame, Frame))

    async def check(self) -> Figures:
        """Compare every figure with what was counted, at a moment when nothing is under way."""
        figures, counts, soak = await self.figures(), self.counts, self._soak
        stored = sum(changes for changes, _ in counts.receipts)
        watermarks = {level: figures("watermark", level=level) for level in ("accepted", "journaled", "stored")}
        assert watermarks == {"accepted": counts.changes, "journaled": counts.changes, "stored": stored}
        assert stored <= figures("watermark", level="synced") <= counts.changes
        assert [figures("state", state=state) for state in ("running", "degraded", "fenced")] == [1, 0, 0]

        for level, count in counts.appends.items():
            assert figures("append_duration_seconds_count", level=level) == count
        assert figures("pending_changes") == counts.changes - stored
        assert figures("pending_bytes") == self.unstored_bytes()
        assert figures("pending_limit_bytes") == self.runtime.config.write_behind.pending_bytes_max
        assert (figures("pending_oldest_age_seconds") > 0) == (counts.changes > stored)
        for zero in ("pending_waiting", "overloaded_total", "quarantined_changes_total", "quarantine_changes"):
            assert figures(zero) == 0
        assert figures("unfinished_journals") == 0
        for zero in ("held_sessions", "flush_failures_total", "flush_retries_total", "flush_failing_seconds"):
            assert figures(zero) == 0

        assert figures("flush_duration_seconds_count") == figures("flush_changes_count") == len(counts.receipts)
        assert figures("flush_duration_seconds_sum") == pytest.approx(sum(took for _, took in counts.receipts))
        assert figures("flush_changes_sum") == stored
        assert figures.buckets("flush_duration_seconds") == counted(took for _, took in counts.receipts)
        assert figures.buckets("flush_changes", COUNTS) == counted((size for size, _ in counts.receipts), COUNTS)

        audit(self.runtime)  # counts residents and their bytes again
        residents = len(self.runtime._residents._entries)
        assert figures("resident_sessions") == residents
        assert figures("resident_bytes") == self.runtime._residents.bytes
        assert figures("resident_limit_bytes") == soak.bytes_max
        assert figures("resident_misses_total") == counts.loads
        assert figures("resident_hits_total") == counts.finds - counts.loads
        # Who came in is in, or went: a session that is created was known to be absent before.
        assert figures("resident_evictions_total") == counts.loads - residents

        segments = self.segments()
        assert figures("journal_segments") == len(segments)
        assert figures("journal_bytes") == sum(segment.stat().st_size for segment in segments)
        assert figures("journal_sync_duration_seconds_count") == len(counts.syncs)
        assert figures("journal_sync_duration_seconds_sum") == pytest.approx(sum(counts.syncs), rel=0.2, abs=0.01)
        assert (figures("journal_sync_failures_total"), figures("journal_full")) == (0, 0)

        pool = self.runtime._storage.figures()
        assert (figures("pool_connections"), figures("pool_connections_in_use")) == (pool.size, 0)
        with closing(sqlite3.connect(next(self._directory.glob("*.db")))) as database:
            assert database.execute("SELECT epoch FROM partitions").fetchall() == [(figures("lease_epoch"),)]
            [(messages,)] = database.execute("SELECT count(*) FROM messages").fetchall()
        if stored == counts.changes:
            assert messages == sum(counts.appends.values())
        assert 0 < figures("lease_remaining_seconds") <= self.runtime.config.lease.duration_s
        assert figures("lease_unreachable") == 0
        assert figures.of_process("resident_memory_bytes") == pytest.approx(resident_bytes(), rel=0.02)
        return figures


def resident_bytes() -> int:
    size: int = psutil.Process(os.getpid()).memory_info().rss
    return size


async def soaked(soak: Soak, directory: Path, told: Callable[[Bench, int], Awaitable[None]]) -> None:
    """Do it; `told` is awaited after every hundredth part."""
    counts, place = Counts(), in_file(directory)
    sync = Journal.sync

    async def counted_sync(journal: Journal, *arguments: Callable[[], object]) -> int:
        started = perf_counter()
        synced = await sync(journal, *arguments)  # type: ignore[arg-type]
        counts.syncs.append(perf_counter() - started)
        return synced

    plugins = [("counts", counts), faulty_plugin(agent_runtime_storages()["sqlite"], counts)]
    sections: dict[str, dict[str, Any]] = {
        "write_behind": {"interval_s": soak.interval_s},
        "residents": {"bytes_max": soak.bytes_max},
        "lease": {"duration_s": 60.0},
    }
    with patch.object(Journal, "sync", counted_sync):
        async with opened(f"faulty:{place.url}", plugins, **sections) as app:
            bench = Bench(app, counts, directory, soak)
            part = soak.appends // 100
            for number in range(1, 101):
                while sum(counts.appends.values()) < number * part:
                    await bench.turn()
                await checkpoint()
                await told(bench, number)
            for level in LEVELS:
                await bench.turn(level)
            await bench.runtime.flush()
            figures = await bench.check()
            assert figures("pending_changes") == 0
            assert figures("resident_evictions_total") > 0
            audit_at_rest(bench.runtime)


@pytest.mark.anyio
async def test_every_figure_is_the_counted_truth(tmp_path: Path) -> None:
    """Checked with everything pending, and stored; nothing is stored in between but on demand."""

    async def told(bench: Bench, number: int) -> None:
        if number % 30 == 0:
            figures = await bench.check()
            assert figures("pending_changes") > 0
            await bench.runtime.flush()
            await bench.check()

    await soaked(Soak(appends=3000, sessions=100, bytes_max=300_000, interval_s=NEVER_S), tmp_path, told)


@pytest.mark.long
@pytest.mark.anyio
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_million_appends(tmp_path: Path) -> None:
    sizes: list[int] = []
    started = perf_counter()

    async def told(bench: Bench, number: int) -> None:
        sizes.append(resident_bytes())
        if number % 10 == 0:
            await bench.runtime.flush()
            figures = await bench.check()
            sys.stderr.write(
                f"{number} %, {perf_counter() - started:.0f} s: {sizes[-1] / 2**20:.0f} MiB, "
                f"{figures('resident_sessions'):.0f} resident, {figures('resident_evictions_total'):.0f} evictions, "
                f"{figures('flush_changes_count'):.0f} batches\n"
            )

    await soaked(Soak(appends=1_000_000, sessions=20_000, bytes_max=64 << 20, interval_s=1.0), tmp_path, told)
    second_half = sizes[50:]
    middle = sum(second_half) / len(second_half)
    assert 0.95 * middle <= min(second_half)
    assert max(second_half) <= 1.05 * middle
