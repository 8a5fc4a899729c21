"""Standing by for a lease, and the directories of journals when the first one is not to be had."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from agent_runtime import (
    Config,
    LeaseHeld,
    LeaseLost,
    Runtime,
    StorageUnavailable,
    open_runtime,
    open_runtime_blocking,
)
from agent_runtime.errors import DrainIncomplete
from agent_runtime.journal import LocalFiles, read_directory
from agent_runtime.testing import Fault, Faults, faulty_plugin
from agent_runtime_sqlite import open_sqlite
from http_rig import environment, free_port, serving
from places import NEVER_S, in_file

pytestmark = pytest.mark.anyio


class Beside:
    """A SQLite file, its journals beside it."""

    def __init__(self, directory: Path) -> None:
        self.path = in_file(directory).path
        self.first = directory / "sessions.db.journal"
        self.second = directory / "sessions.db.journal.2"
        self.faults = Faults()

    @asynccontextmanager
    async def open(self, *, drain_timeout_s: float = 20.0, **lease: Any) -> AsyncIterator[Runtime]:
        config = Config.of(
            f"faulty:sqlite:///{self.path}",
            write_behind={"interval_s": NEVER_S, "drain_timeout_s": drain_timeout_s},
            lease={"duration_s": 60.0} | lease,
        )
        async with open_runtime(config, plugins=[faulty_plugin(open_sqlite, self.faults)]) as runtime:
            yield runtime

    @asynccontextmanager
    async def silenced(self) -> AsyncIterator[Runtime]:
        """A runtime that stores nothing and does not give the lease back: it falls silent when the block is left."""
        try:
            async with self.open(drain_timeout_s=0.02, duration_s=1.0) as runtime:
                outages = [self.faults.fail(name) for name in ("apply", "renew", "release")]
                yield runtime
        except DrainIncomplete:
            pass
        finally:
            for outage in outages:
                outage.stop()

    @contextmanager
    def locked(self, directory: Path) -> Iterator[None]:
        """Another process has the directory, as a child of a dead holder would."""
        with closing(LocalFiles(directory)) as files:
            assert files.lock()
            yield


@pytest.fixture
def beside(tmp_path: Path) -> Beside:
    return Beside(tmp_path)


async def texts(runtime: Runtime) -> list[object]:
    session = await runtime.get_session("s")
    return [message.content async for message in session.scan_messages()]


async def append(runtime: Runtime, *contents: str) -> None:
    session = await runtime.get_or_create_session("s")
    for content in contents:
        await session.append("user", content)


# --- waiting ----------------------------------------------------------------------------------------------------------


async def test_a_standby_takes_over_when_the_holder_stops(beside: Beside, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agent_runtime.lease")
    stopping = anyio.Event()

    async def hold(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with beside.open() as runtime:
            await append(runtime, "x")
            task_status.started()
            await stopping.wait()

    async with anyio.create_task_group() as tasks:
        await tasks.start(hold)
        tasks.start_soon(_set_later, stopping, 1.5)
        with anyio.fail_after(20):
            async with beside.open(wait=True) as runtime:
                assert stopping.is_set()
                assert await texts(runtime) == ["x"]
                assert runtime.status().unfinished == ()
    [line] = [record.getMessage() for record in caplog.records if "waiting" in record.getMessage()]
    assert line.startswith(f"waiting for the lease: pid {os.getpid()} on ")
    assert line.endswith(" UTC unless it renews")


async def _set_later(event: anyio.Event, delay_s: float) -> None:
    await anyio.sleep(delay_s)
    event.set()


async def test_waiting_is_cancelled_at_once_and_leaves_nothing_locked(beside: Beside) -> None:
    async with beside.open():
        with anyio.move_on_after(0.3) as scope:
            async with beside.open(wait=True):
                raise AssertionError
        assert scope.cancelled_caught
        with pytest.raises(LeaseHeld, match=rf"in use by pid {os.getpid()} on .*, for \d+\.\d s more unless renewed"):
            async with beside.open():
                raise AssertionError
    async with beside.open():
        assert not beside.second.exists()


async def test_a_standby_waits_while_the_database_is_away(beside: Beside, caplog: pytest.LogCaptureFixture) -> None:
    beside.faults.fail("acquire", nth=1)
    beside.faults.fail("acquire", nth=2)
    with pytest.raises(StorageUnavailable):
        async with beside.open():
            raise AssertionError
    beside.faults.fail("acquire", nth=1)
    beside.faults.fail("acquire", nth=2)
    async with beside.open(wait=True) as runtime:
        await append(runtime, "x")
    assert "waiting for the lease: a planned fault of acquire" in caplog.text


async def test_a_lease_whose_grant_was_not_heard_of_is_no_obstacle(beside: Beside) -> None:
    beside.faults.fail("acquire", nth=1, after_effect=True)
    async with beside.open() as runtime:
        assert beside.faults.count("acquire") == 2
        await append(runtime, "x")


async def test_who_is_refused_hears_of_nothing_else(
    beside: Beside, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = Config.of(f"sqlite:///{beside.path}", journal={"directory": str(tmp_path / "elsewhere")})
    async with beside.open():
        with pytest.raises(LeaseHeld):
            async with open_runtime(elsewhere):
                raise AssertionError
    assert "did not stop in order" not in caplog.text


@pytest.mark.parametrize("unreachable", ["continue", "refuse"])
async def test_writes_while_the_lease_has_expired(beside: Beside, unreachable: str) -> None:
    async with beside.open(duration_s=1.0, unreachable=unreachable) as runtime:
        await append(runtime, "x")
        outages = [beside.faults.fail(name) for name in ("renew", "apply")]
        await append(runtime, "y")
        with anyio.fail_after(20):
            while runtime.status().lease.expires_in_s > 0:
                await anyio.sleep(0.05)
        expected = ["x", "y", "z"]
        if unreachable == "continue":
            await append(runtime, "z")
        else:
            expected.remove("z")
            with pytest.raises(StorageUnavailable, match="the lease has expired and can't be renewed"):
                await append(runtime, "z")
        assert await texts(runtime) == expected
        for outage in outages:
            outage.stop()
        with anyio.fail_after(20):
            while runtime.status().lease.expires_in_s <= 0:
                await anyio.sleep(0.05)
        await append(runtime, "again")
        assert await texts(runtime) == [*expected, "again"]


# --- standing still ---------------------------------------------------------------------------------------------------

STILL_S = 1.2
"""Longer than the lease of these tests: the event loop stands still, as in a process that is stopped and goes on."""


def take_over(beside: Beside) -> None:
    """Another runtime waits until the lease has expired, and writes."""

    def write() -> None:
        config = Config.of(f"sqlite:///{beside.path}", lease={"wait": True})
        with open_runtime_blocking(config) as other:
            other.get_session("s").put_document("notes", "n", "newer", idempotency_key="k2")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()


@pytest.mark.parametrize("broken", [pytest.param(False, marks=pytest.mark.long), True])
async def test_who_was_overtaken_while_it_stood_still_acknowledges_nothing(beside: Beside, broken: bool) -> None:
    """`broken`: so is, meanwhile, the connection by which it asks first."""
    with pytest.raises(LeaseLost):
        async with beside.open(duration_s=1.0) as runtime:
            session = await runtime.get_or_create_session("s", durability="stored")
            take_over(beside)
            if broken:
                beside.faults.fail("renew", nth=1)
            writes = [
                lambda: session.put_document("notes", "n", "older", idempotency_key="k1"),
                lambda: session.append("user", "x"),
                lambda: runtime.get_or_create_session("new"),
            ]
            async with anyio.create_task_group() as tasks:
                for write in writes:
                    tasks.start_soon(_expect_lease_lost, write)
            await _expect_lease_lost(writes[0])
    async with beside.open() as runtime:
        session = await runtime.get_session("s")
        document = await session.get_document("notes", "n")
        assert document is not None
        assert document.value == "newer"
        assert await texts(runtime) == []
        assert [each.session_id for each in (await runtime.list_sessions()).items] == ["s"]


@pytest.mark.long
@pytest.mark.parametrize("answered", [False, True])
async def test_the_answer_to_who_asked_before_it_stood_still_says_nothing(beside: Beside, answered: bool) -> None:
    woken = anyio.Event()

    def stand_still(_: object) -> None:
        take_over(beside)
        woken.set()
        if not answered:
            raise StorageUnavailable("the connection is gone")

    with pytest.raises(LeaseLost):
        async with beside.open(duration_s=1.0) as runtime:
            session = await runtime.get_or_create_session("s", durability="stored")
            beside.faults._plan(Fault("renew", 1, after=stand_still))
            await woken.wait()
            await _expect_lease_lost(lambda: session.append("user", "x"))


async def _expect_lease_lost(write: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(LeaseLost):
        await write()


async def test_who_stood_still_and_was_not_overtaken_renews_before_it_goes_on(
    beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_runtime.lease._PATIENCE_S", 3600.0)
    async with beside.open(duration_s=1.0) as runtime:
        await append(runtime, "x")
        renewed = beside.faults.count("renew")
        time.sleep(STILL_S)
        with anyio.fail_after(20):
            await append(runtime, "y")
        assert beside.faults.count("renew") > renewed
        assert runtime.status().lease.expires_in_s > 0
        assert await texts(runtime) == ["x", "y"]


@pytest.mark.parametrize("unreachable", ["continue", "refuse"])
async def test_who_stood_still_and_can_not_ask_does_as_when_it_is_away(beside: Beside, unreachable: str) -> None:
    async with beside.open(duration_s=1.0, unreachable=unreachable) as runtime:
        await append(runtime, "x")
        outage = beside.faults.fail("renew")
        time.sleep(STILL_S)
        if unreachable == "continue":
            await append(runtime, "y")
        else:
            with pytest.raises(StorageUnavailable, match="the lease has expired and can't be renewed"):
                await append(runtime, "y")
        assert outage.hits >= 1
        outage.stop()


async def test_a_database_that_never_answers_stops_no_write(
    beside: Beside, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the process has run all the time nothing waits; where it has stood still, for a moment."""
    monkeypatch.setattr("agent_runtime.lease._PATIENCE_S", 0.1)
    unheard = "could not ask whose the lease is"
    async with beside.open(duration_s=1.0) as runtime:
        await append(runtime, "x")
        gate = beside.faults.hold("renew")
        await gate.reached.wait()
        with anyio.fail_after(20):
            while runtime.status().lease.expires_in_s > -1:
                await append(runtime, "on")
                await anyio.sleep(0.02)
        assert unheard not in caplog.text
        time.sleep(STILL_S)
        await append(runtime, "y")
        assert caplog.text.count(unheard) == 1
        await append(runtime, "z")
        assert caplog.text.count(unheard) == 1
        gate.open()
        with anyio.fail_after(20):
            while runtime.status().lease.expires_in_s <= 0:
                await anyio.sleep(0.02)


# --- directories ------------------------------------------------------------------------------------------------------


async def test_a_locked_directory_keeps_nobody_out_once_the_lease_has_expired(beside: Beside) -> None:
    async with beside.silenced() as runtime:
        await append(runtime, "late")
    with beside.locked(beside.first):
        with pytest.raises(LeaseHeld, match=rf"in use by pid {os.getpid()} on "):
            async with beside.open():
                raise AssertionError
        assert not beside.second.exists()
        async with beside.open(wait=True) as runtime:
            assert [each.place for each in runtime.status().unfinished] == [str(beside.first)]
            assert runtime.status().journal.place == str(beside.second)  # type: ignore[union-attr]
            await append(runtime, "meanwhile")
    async with beside.open() as runtime:
        assert runtime.status().unfinished == ()
        assert runtime.status().journal.place == str(beside.first)  # type: ignore[union-attr]
        assert await texts(runtime) == ["meanwhile", "late"]
    assert read_directory(LocalFiles(beside.second)).segments == ()


async def test_the_journal_that_follows_the_database_goes_on_and_the_other_is_brought_in(beside: Beside) -> None:
    async with beside.silenced() as runtime:
        await append(runtime, "late 1", "late 2")
    with beside.locked(beside.first):
        async with beside.open(wait=True) as runtime:
            await append(runtime, "stored")
        async with beside.silenced() as runtime:
            await append(runtime, "on time")
    async with beside.open(wait=True) as runtime:
        assert runtime.status().journal.place == str(beside.second)  # type: ignore[union-attr]
        assert await texts(runtime) == ["stored", "on time", "late 1", "late 2"]
        assert read_directory(LocalFiles(beside.first)).segments == ()
        await append(runtime, "more")
    for _ in range(2):
        async with beside.open() as runtime:
            assert runtime.status().journal.place == str(beside.first)  # type: ignore[union-attr]
            assert await texts(runtime) == ["stored", "on time", "late 1", "late 2", "more"]


async def test_a_directory_of_another_database_beside_ours_is_left_alone(beside: Beside, tmp_path: Path) -> None:
    (tmp_path / "another").mkdir()
    other = Beside(tmp_path / "another")
    async with other.silenced() as runtime:
        await append(runtime, "not ours")
    other.first.rename(beside.second)
    async with beside.open() as runtime:
        assert runtime.status().journal.place == str(beside.first)  # type: ignore[union-attr]
        await append(runtime, "x")
    beside.second.rename(other.first)
    async with other.open(wait=True) as runtime:
        assert await texts(runtime) == ["not ours"]


# --- serve ------------------------------------------------------------------------------------------------------------


def test_servers_that_stand_by(tmp_path: Path) -> None:
    """One is stopped by a signal before it had anything; the other serves when the holder is killed, with all it had."""
    storage = f"sqlite:///{in_file(tmp_path).path}"
    with serving("--storage", storage) as holder, standby(storage) as (first, port), standby(storage) as (second, _):
        for number in range(3):
            httpx.put(f"{holder.url}/v1/sessions/s{number}").raise_for_status()
        for process in (first, second):
            said = until_waiting(process)
            assert f"pid {holder.process.pid} on " in said
            assert holder.url in said
        assert httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200
        ready = httpx.get(f"http://127.0.0.1:{port}/readyz")
        assert (ready.status_code, ready.json()["checks"][0]["detail"].partition("; ")[2]) == (
            503,
            "while another runtime has the lease, waiting for that",
        )
        second.send_signal(signal.SIGTERM)
        output, _ = second.communicate(timeout=20)
        assert (second.returncode, output) == (0, b"")
        holder.signal(signal.SIGKILL)
        assert first.stdout is not None
        assert b"listens on" in first.stdout.readline()
        assert len(httpx.get(f"http://127.0.0.1:{port}/v1/sessions").json()["items"]) == 3
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=20)
        assert first.returncode == 0


@contextmanager
def standby(storage: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = free_port()
    command = [sys.executable, "-m", "agent_runtime.cli", "serve", "--storage", storage, "--port", str(port), "--wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment({})) as process:
        try:
            yield process, port
        finally:
            process.kill()


def until_waiting(process: subprocess.Popen[bytes]) -> str:
    """The line that says for whom it waits."""
    assert process.stderr is not None
    for line in process.stderr:
        if b"waiting for the lease" in line:
            return line.decode()
    raise AssertionError("it has ended")
