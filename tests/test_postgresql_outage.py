"""A PostgreSQL server stops or hangs under load and comes back, and ends connections in the middle of commits that then
complete: nothing is lost, nothing is doubled, nobody is kept waiting, nobody needs to act.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Final
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import asyncpg
import pytest

import postgres_server
from agent_runtime import Config, Runtime, SessionHandle, StorageUnavailable, open_runtime
from agent_runtime.storage import StorageConfig
from agent_runtime.testing.kit.writer import writing
from agent_runtime_postgresql import database, open_postgresql
from postgres_proxy import proxied
from postgres_server import new_schema, temporary_directory
from test_postgresql import Log

pytestmark = pytest.mark.anyio

WRITERS: Final = 16
PAUSE_S: Final = 0.02
NEW_EVERY: Final = 10
RATIO_AT_MOST: Final = 2.0
ATTEMPTS: Final = 3
LEASE_S: Final = 2.0
RECOVERS_S: Final = 30.0


class OwnServer:
    """A server that nobody else uses, which comes back where it was.

    It dies with the thread that started it, as Linux has it; so that is always the same one.
    """

    def __init__(self, directory: Path, thread: Executor) -> None:
        self._thread = thread
        self._running = thread.submit(postgres_server.start, directory).result()
        self.url = self._running.url
        self.rows = self._running.rows
        self.execute = self._running.execute

    def hang(self) -> None:
        self._running.hang()

    def go_on(self) -> None:
        self._running.go_on()

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        self._running.stop(how)

    def start(self) -> None:
        port = urlsplit(self.url).port
        self._running = self._thread.submit(postgres_server.serve, self._running.directory, None, port).result()


@pytest.fixture(scope="module")
def own_server() -> Iterator[OwnServer]:
    directory = temporary_directory()
    try:
        with ThreadPoolExecutor(1) as thread:
            server = OwnServer(directory, thread)
            yield server
            server.stop()
    finally:
        shutil.rmtree(directory)


class Load:
    """Callers that append, to sessions that they use all the time and to new ones. `said` is what was acknowledged."""

    def __init__(self, runtime: Runtime) -> None:
        self.said: dict[str, list[str]] = {}
        self.measure()
        self._runtime = runtime
        self._texts = count()
        self._over = False

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(WRITERS):
                tasks.start_soon(self._write, await self._runtime.create_session())

    def stop(self) -> None:
        self._over = True

    def measure(self) -> dict[str, list[float]]:
        """What calls take from now on, in seconds; `due` counts from when they were to be made."""
        self.took_s: dict[str, list[float]] = {"warm": [], "new": [], "due": []}
        return self.took_s

    async def _write(self, warm: SessionHandle) -> None:
        due = perf_counter()
        for number in count(1):
            if self._over:
                return
            if number % NEW_EVERY == 0:
                started = perf_counter()
                session = await self._runtime.create_session()
                await self._append(session)
                self.took_s["new"].append(perf_counter() - started)
            started = perf_counter()
            await self._append(warm)
            self.took_s["warm"].append(perf_counter() - started)
            self.took_s["due"].append(perf_counter() - due)
            due = perf_counter() + PAUSE_S
            await anyio.sleep(PAUSE_S)

    async def _append(self, session: SessionHandle) -> None:
        text = f"text {next(self._texts)}"
        message = await session.append("user", text, durability="journaled")
        said = self.said.setdefault(session.session_id, [])
        said.append(text)
        assert message.seq == len(said)


def p95(samples: list[float]) -> float:
    return sorted(samples)[int(len(samples) * 0.95)]


async def until(runtime: Runtime, state: str) -> None:
    with anyio.fail_after(RECOVERS_S):
        while runtime.status().state != state:
            await anyio.sleep(0.01)


async def outage(
    runtime: Runtime, load: Load, server: OwnServer, how: signal.Signals, lasts_s: float
) -> dict[str, float]:
    """The server is away for so long: how much longer appends take meanwhile than before."""
    before = load.measure()
    await anyio.sleep(min(lasts_s, 10.0))
    during = load.measure()
    await anyio.to_thread.run_sync(server.stop, how)
    began = anyio.current_time()
    await until(runtime, "degraded")
    stored = runtime.watermarks.stored
    with pytest.raises(StorageUnavailable):
        await runtime.get_session("never loaded")
    await anyio.sleep_until(began + lasts_s)
    load.measure()
    status = runtime.status()
    assert (status.state, status.watermarks.stored) == ("degraded", stored)
    assert status.pending.changes > WRITERS * lasts_s
    assert status.pending.oldest_age_s > lasts_s * 0.8
    await anyio.to_thread.run_sync(server.start)
    await until(runtime, "running")
    with anyio.fail_after(RECOVERS_S):
        while runtime.status().lease.unreachable:
            await anyio.sleep(0.01)
    ratios = {name: p95(during[name]) / p95(before[name]) for name in before}
    print(*(f"{name}: {p95(before[name]) * 1e6:.0f} µs, then {p95(during[name]) * 1e6:.0f} µs" for name in before))
    print(
        f"{sum(map(len, during.values()))} calls during the outage, {status.pending.changes} changes unstored; {ratios}"
    )
    return ratios


async def check(runtime: Runtime, said: dict[str, list[str]]) -> None:
    """Every session has what was said in it, once, in order."""
    found = {}
    async for record in runtime.scan_sessions():
        session = await runtime.get_session(record.session_id)
        found[record.session_id] = [message.content async for message in session.scan_messages()]
    assert found == said


@pytest.mark.parametrize(
    ("anyio_backend", "how"),
    [("asyncio", signal.SIGINT), pytest.param("trio", signal.SIGQUIT, marks=pytest.mark.long)],
)
@pytest.mark.parametrize("lasts_s", [2.0, pytest.param(60.0, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
async def test_a_server_stops_under_load_and_comes_back(
    own_server: OwnServer, tmp_path: Path, how: signal.Signals, lasts_s: float
) -> None:
    """Stopped in an orderly way, or as by a crash."""
    schema = new_schema()
    config = Config.of(
        f"{own_server.url}?schema={schema}",
        journal={"directory": str(tmp_path / "journal")},
        write_behind={"interval_s": 0.2},
        lease={"duration_s": LEASE_S},
    )
    async with open_runtime(config) as runtime:
        load = Load(runtime)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load.run)
            for _ in range(ATTEMPTS):  # the machine may have had something else to do
                ratios = await outage(runtime, load, own_server, how, lasts_s)
                if max(ratios.values()) <= RATIO_AT_MOST:
                    break
            load.stop()
        assert max(ratios.values()) <= RATIO_AT_MOST, ratios
        await runtime.flush()
        assert runtime.status().pool.in_use == 0
        await check(runtime, load.said)
    query = (
        "SELECT session_id, array_agg(content ORDER BY seq) FROM messages JOIN sessions USING (incarnation) GROUP BY 1"
    )
    rows = await anyio.to_thread.run_sync(partial(own_server.rows, query, schema=schema))
    assert dict(rows) == load.said
    async with open_runtime(config) as runtime:
        await check(runtime, load.said)


# Commits that complete although the connection was lost


async def found(server: OwnServer, query: str) -> int:
    """Wait until a query finds something; how much."""
    with anyio.fail_after(RECOVERS_S):
        while not (rows := await anyio.to_thread.run_sync(partial(server.rows, query))):
            await anyio.sleep(0.002)
    return len(rows)


WAITING: Final = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
ENDED: Final = f"SELECT pg_terminate_backend(pid) FROM ({WAITING}) AS it"


@asynccontextmanager
async def awaited_standby(server: OwnServer) -> AsyncIterator[None]:
    """Every commit, safe on the server's disk already, waits for a standby that is not there.

    https://www.postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION: such a commit is seen by others
    only when the wait is over; it stands all the same when its connection is ended meanwhile.
    """

    def set_standbys(names: str) -> None:
        server.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
        server.execute("SELECT pg_reload_conf()")

    def commit() -> None:
        with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            while True:
                server.execute("SELECT pg_logical_emit_message(true, '', '')")

    await anyio.to_thread.run_sync(set_standbys, "nobody")
    try:
        async with anyio.create_task_group() as tasks:  # the server takes a moment to heed it
            tasks.start_soon(anyio.to_thread.run_sync, commit)
            await found(server, ENDED)
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(set_standbys, "")


@pytest.mark.parametrize("times", [6, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
async def test_commits_that_stand_although_their_connection_was_ended(own_server: OwnServer, times: int) -> None:
    """Each is ended by the server, in the middle of a commit. Every second one broke on our side before: the storage has
    a new one by then, on which the next try waits for the old commit.
    """
    schema = new_schema()
    with proxied(f"{own_server.url}?schema={schema}") as proxy:
        async with writing(lambda: open_postgresql(StorageConfig(url=proxy.url))) as writer:
            await writer.create("a")
            log = Log(writer)
            async with awaited_standby(own_server):
                for seq in range(1, times + 1):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(log.append, seq)
                        await found(own_server, WAITING)
                        if seq % 2:
                            await anyio.to_thread.run_sync(proxy.cut)
                            await found(own_server, "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
                        assert await found(own_server, ENDED) == 1
            await log.check(times)
            assert (log.tries, log.stored_unknown) == (2 * times, times)


# A server that hangs


@pytest.mark.parametrize("hangs", [1, pytest.param(20, marks=pytest.mark.long)])
async def test_a_server_hangs_under_load_and_wakes(
    own_server: OwnServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hangs: int
) -> None:
    """It takes what is sent to it, and answers nothing. When it wakes it goes on, with the commit that it was at too."""
    monkeypatch.setattr(database, "_CLIENT_MARGIN_S", 0.1)
    caplog.set_level("INFO", "agent_runtime")
    schema = new_schema()
    url, journal = (
        f"{own_server.url}?schema={schema}&application_name={schema}",
        {"directory": str(tmp_path / "journal")},
    )
    config = Config.of(
        f"{url}&connect_timeout_s=0.2&statement_timeout_s=0.3",
        journal=journal,
        write_behind={"interval_s": 0.02},
        storage={"read_timeout_s": 0.4},
        lease={"duration_s": 60.0},
    )
    async with open_runtime(config) as runtime:
        slow = """
            CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.1); RETURN NULL; END';
            CREATE CONSTRAINT TRIGGER wait AFTER UPDATE ON partitions
                DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()
            """
        await anyio.to_thread.run_sync(partial(own_server.execute, slow, schema=schema))
        load = Load(runtime)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load.run)
            for _ in range(hangs):
                async with anyio.create_task_group() as lists:  # so that there are idle connections too
                    for _ in range(3):
                        lists.start_soon(runtime.list_sessions)
                await found(own_server, "SELECT pid FROM pg_stat_activity WHERE query = 'COMMIT' AND state = 'active'")
                own_server.hang()
                try:
                    took = load.measure()
                    await until(runtime, "degraded")
                    stored, retries = runtime.watermarks.stored, runtime.status().flush.retries
                    with anyio.fail_after(2), pytest.raises(StorageUnavailable):
                        await runtime.get_session("never loaded")
                    await anyio.sleep(0.2)
                    assert runtime.watermarks.stored == stored
                    assert runtime.status().flush.retries > retries
                    assert min(len(took["warm"]), len(took["new"])) > WRITERS
                finally:
                    own_server.go_on()
                await until(runtime, "running")
            load.stop()
        await runtime.flush()
        assert runtime.status().pool.in_use == 0
        mine = f"SELECT pid FROM pg_stat_activity WHERE application_name = '{schema}'"
        assert await found(own_server, mine) <= runtime.status().pool.size
    assert "reported as failed was stored after all" in caplog.text
    async with open_runtime(Config.of(url, journal=journal)) as runtime:
        await check(runtime, load.said)
