"""The journal: what it adds to an append, what sharing a sync is worth, and how quickly a crash is made good."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import anyio
import pytest

from agent_runtime import Runtime, SessionHandle
from http_rig import serving
from places import NEVER_S, in_file

from .callers import EventLoop, appends_per_second, name_of, on_every_event_loop
from .crashed import Crashed
from .load import Load
from .measure import Side, compare, figure, spread
from .plain import insert_messages, plain_engine
from .sample import median_message
from .test_http import CONNECTIONS, appends, prepare, side

pytestmark = [pytest.mark.anyio, pytest.mark.benchmark, pytest.mark.timeout(1800)]

ADDED_AT_MOST_S = 5e-6
BLOCK = 64
INTERVAL_S = 0.05

CALLERS = 64
SYNCS_AT_LEAST = 6.0
SYNCED = 15  # appends of each caller in a round: fewer in all than make a batch
PER_SYNC_AT_LEAST = 32.0

RECOVERY_AT_LEAST = 0.4
MEMORY_AT_MOST_MB = 300.0

HTTP_AT_LEAST = 0.85
HTTP_ROUNDS = 7


@asynccontextmanager
async def opened(directory: Path, *, interval_s: float = NEVER_S, **sections: dict[str, Any]) -> AsyncIterator[Runtime]:
    """A runtime on a new file that flushes behind the appends, or when told to."""
    directory.mkdir()
    async with in_file(directory).open(**{"write_behind": {"interval_s": interval_s}, **sections}) as runtime:
        yield runtime


@pytest.mark.parametrize("interval_s", [NEVER_S, INTERVAL_S], ids=["flushes between", "flushes beside"])
async def test_append(tmp_path: Path, interval_s: float, anyio_backend: str) -> None:
    """The median message, at `journaled` and, the journal off, at `buffered`: blocks of 64 appends, one by one.

    With flushes beside them there is no target: a write to a file lets go of the interpreter, which the driver's thread
    then takes. So the appends help to pay for the flush.
    """
    message = median_message()
    beside = interval_s == INTERVAL_S

    def appending(runtime: Runtime, session: SessionHandle, samples: list[float]) -> Side:
        async def block() -> float:
            took: list[float] = []
            for _ in range(BLOCK):
                started = perf_counter()
                await session.append(**message)
                took.append(perf_counter() - started)
            samples.extend(took)
            if beside:
                await anyio.sleep(0.001)
            else:
                await runtime.flush()
            return sorted(took)[BLOCK // 2]

        return block

    async with (
        opened(tmp_path / "with", interval_s=interval_s) as with_journal,
        opened(tmp_path / "without", interval_s=interval_s, journal={"enabled": False}) as without,
    ):
        runtimes = {"journaled": with_journal, "buffered": without}
        samples: dict[str, list[float]] = {level: [] for level in runtimes}
        sides = []
        for level, runtime in runtimes.items():
            assert runtime.status().durability == level
            sides.append(appending(runtime, await runtime.create_session(), samples[level]))
        name = f"append, journaled - buffered, flushes {'beside' if beside else 'between'}, {anyio_backend}"
        await compare(name, *sides, rounds=300, at_most=None if beside else ADDED_AT_MOST_S, difference=True)
        for level, each in samples.items():
            spread(f"append, {level}, {anyio_backend}", each)


@on_every_event_loop
async def test_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anyio_backend: EventLoop) -> None:
    """64 callers that append at `synced`, each one after the other; against the same appends with an fdatasync behind
    each, inline, and against nothing but a write and an fdatasync of the same bytes.
    """
    message = median_message()
    syncs = 0
    fdatasync = os.fdatasync

    def counted(number: int) -> None:
        nonlocal syncs
        syncs += 1
        fdatasync(number)

    async with opened(tmp_path / "journal") as runtime:
        sessions = [await runtime.create_session() for _ in range(CALLERS)]
        await sessions[0].append(**message)
        segment = next((tmp_path / "journal" / "sessions.db.journal").glob("*.segment"))
        frame = segment.read_bytes().splitlines(keepends=True)[-1]
        same = os.open(segment, os.O_RDONLY)
        bare = os.open(tmp_path / "bare", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

        async def shared() -> float:
            rate = await appends_per_second(sessions, SYNCED, "synced")
            await runtime.flush()
            return rate

        async def inline() -> float:
            started = perf_counter()
            for session in sessions:
                await session.append(**message)
                fdatasync(same)
            took_s = perf_counter() - started
            await runtime.flush()
            return CALLERS / took_s

        async def nothing_else() -> float:
            started = perf_counter()
            for _ in range(CALLERS):
                os.write(bare, frame)
                fdatasync(bare)
            return CALLERS / (perf_counter() - started)

        monkeypatch.setattr(os, "fdatasync", counted)
        before = runtime.watermarks.accepted
        await shared()
        per_sync = (runtime.watermarks.accepted - before) / syncs
        name = f"synced appends of 64 callers / a write and an fdatasync each, {name_of(anyio_backend)}"
        await compare(name, shared, nothing_else, rounds=15, unit="/s")
        name = f"synced appends of 64 callers / with an fdatasync each, {name_of(anyio_backend)}"
        await compare(name, shared, inline, rounds=15, unit="/s", at_least=SYNCS_AT_LEAST)
        os.close(same)
        os.close(bare)
    figure(f"synced appends a fdatasync, of 64 callers, {name_of(anyio_backend)}", per_sync, at_least=PER_SYNC_AT_LEAST)


@pytest.mark.parametrize(("size", "rounds"), [(100_000, 3), (1_000_000, 1)])
async def test_recovery(tmp_path: Path, size: int, rounds: int, anyio_backend: str) -> None:
    """A process that opens a database whose journal has the messages of 50 sessions, a change each; against such rows
    handed to SQLAlchemy's executemany as they are, 1,000 a transaction, on a copy of the same file.
    """
    crashed = Crashed(tmp_path / "crashed", size)
    await crashed.make()
    numbers = count()
    peaks: list[float] = []

    async def ours() -> float:
        place = crashed.copy(tmp_path / str(next(numbers)))
        script = str(Path(__file__).parent / "recovering.py")
        done = await anyio.run_process([sys.executable, script, place.url, anyio_backend], stderr=None)
        took_s, stored, peak = map(float, done.stdout.split())
        assert stored == crashed.end
        peaks.append(peak)
        shutil.rmtree(place.path.parent)
        return size / took_s

    async def theirs() -> float:
        path = crashed.copy(tmp_path / str(next(numbers))).path
        engine = plain_engine(path)
        took_s = 0.0
        for rows in crashed.rows():
            started = perf_counter()
            insert_messages(engine, rows)
            took_s += perf_counter() - started
        engine.dispose()
        shutil.rmtree(path.parent)
        return size / took_s

    name = f"recovery of {size:,} changes / executemany of their rows, {anyio_backend}"
    await compare(name, ours, theirs, rounds=rounds, unit="rows/s", at_least=RECOVERY_AT_LEAST, warm_up=rounds > 1)
    crashed.remove()
    figure(f"recovery of {size:,} changes, {anyio_backend}: MB of memory", max(peaks) / 1e6, at_most=MEMORY_AT_MOST_MB)


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
async def test_append_over_http(tmp_path: Path) -> None:
    """Two servers with their defaults, but that one has no journal."""
    found: tuple[list[Load], list[Load]] = [], []
    with (
        serving("--storage", f"sqlite:///{tmp_path / 'with.db'}") as with_journal,
        serving(
            "--storage", f"sqlite:///{tmp_path / 'without.db'}", environ={"AGENT_RUNTIME__JOURNAL__ENABLED": "false"}
        ) as without,
    ):
        for server in (with_journal, without):
            prepare(server)
        sides = [
            side(server, appends, b"201", loads) for server, loads in zip((with_journal, without), found, strict=True)
        ]
        name = f"append over HTTP, {CONNECTIONS} connections, journaled / buffered, requests"
        await compare(name, *sides, rounds=HTTP_ROUNDS, unit="/s", at_least=HTTP_AT_LEAST)
    slow, quick = (median(load.p95 for load in loads) for loads in found)
    figure("append over HTTP: p95, journaled / buffered", slow / quick)
