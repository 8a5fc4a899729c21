"""`agent-runtime serve` from its start to its end: whatever the signals and the database do, nothing acknowledged is lost.

Exit code 0 says that everything is stored; 4 that something is left in the journal, which the next start stores.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from agent_runtime import open_runtime_blocking
from http_rig import Server, environment, free_port, install, serving

IMPATIENT = {
    "AGENT_RUNTIME__STORAGE__OPTIONS": '{"busy_timeout_s": 0.1}',
    "AGENT_RUNTIME__WRITE_BEHIND__INTERVAL_S": "1000",
}
STARTS = 5
BRIEF = IMPATIENT | {"AGENT_RUNTIME__WRITE_BEHIND__DRAIN_TIMEOUT_S": "0.6"}
AWAY = """
from agent_runtime import hookimpl
from agent_runtime.testing import Faults, faulty_plugin
from agent_runtime_sqlite.storage import open_storage

faults = Faults()
faults.fail("apply")

@hookimpl
def agent_runtime_storages():
    return faulty_plugin(open_storage, faults, scheme="away").agent_runtime_storages()
"""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


def append(server: Server, count: int) -> list[str]:
    """Append messages to a session; the texts that were acknowledged."""
    url = f"{server.url}/v1/sessions/s1"
    texts = [f"message {number}" for number in range(count)]
    with httpx.Client() as client:
        client.put(url).raise_for_status()
        for text in texts:
            client.post(f"{url}/messages", json={"role": "user", "content": text}).raise_for_status()
    return texts


def found(database: Path) -> list[str]:
    """The texts that are there when the database and its journal are opened again."""
    with open_runtime_blocking(f"sqlite:///{database}") as runtime:
        return [str(message.content) for message in runtime.get_session("s1").scan_messages()]


def in_database(database: Path) -> int:
    """How many messages the database has by itself."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM messages").fetchone()
        return int(count)


@contextmanager
def away(database: Path) -> Iterator[sqlite3.Connection]:
    """The database takes nothing, as somebody else has locked it; until that one rolls back."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


# --- the database is away ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loop", "signals"), [("asyncio", [signal.SIGINT] * 3), ("trio", [signal.SIGTERM])])
def test_a_drain_that_takes_too_long_leaves_the_rest_to_the_next_start(
    database: Path, loop: str, signals: Sequence[signal.Signals]
) -> None:
    with serving("--storage", f"sqlite:///{database}", "--loop", loop, environ=BRIEF) as server:
        texts = append(server, 20)
        with away(database):
            started = time.monotonic()
            for number in signals:
                server.signal(number)
                time.sleep(0.1)
            assert server.ended() == 4
            assert time.monotonic() - started < 10
        last = server.errors().splitlines()[-1]
        assert last.startswith("agent-runtime: 21 change(s) could not be stored before the stop and are kept in the")
        assert str(database) in last
    assert in_database(database) == 0
    assert found(database) == texts


@pytest.mark.parametrize(("loop", "second"), [("asyncio", signal.SIGTERM), ("trio", signal.SIGINT)])
def test_no_second_signal_spares_the_drain(database: Path, loop: str, second: signal.Signals) -> None:
    """The database comes back while the server waits for it: then all is stored, however often it was told to stop."""
    with serving("--storage", f"sqlite:///{database}", "--loop", loop, environ=IMPATIENT) as server:
        texts = append(server, 5)
        with away(database):
            server.signal(signal.SIGTERM)
            time.sleep(0.3)
            server.signal(second)
            time.sleep(0.3)
            assert server.process.poll() is None
        assert server.ended() == 0
        assert server.errors().splitlines()[-1].endswith("shutdown complete")
    assert in_database(database) == len(texts)
    assert found(database) == texts


# --- while it starts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loop", "number"), [("asyncio", signal.SIGTERM), ("trio", signal.SIGINT)])
def test_a_signal_during_recovery_leaves_the_journal_as_it_is(
    database: Path, tmp_path: Path, loop: str, number: signal.Signals
) -> None:
    with serving("--storage", f"sqlite:///{database}", "--loop", loop, environ=IMPATIENT) as server:
        texts = append(server, 20)
        server.signal(signal.SIGKILL)
        server.ended()
    port = free_port()
    options = ["--storage", f"away:sqlite:///{database}", "--loop", loop, "--port", str(port)]
    command = [sys.executable, "-m", "agent_runtime.cli", "serve", *options]
    with recovering(command, port, install(tmp_path / "plugin", "away", AWAY)) as process:
        process.send_signal(number)
        assert process.wait(20) == 0
    assert in_database(database) == 0
    assert found(database) == texts


@contextmanager
def recovering(command: list[str], port: int, path: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that tries to recover: it answers, and is not ready."""
    environ = environment(IMPATIENT | {"PYTHONPATH": path})
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            line = b""
            while b"trying again" not in line:
                line = process.stderr.readline()
                assert line, "it has ended"
            reply = httpx.get(f"http://127.0.0.1:{port}/readyz")
            assert (reply.status_code, reply.json()["checks"][0]["detail"].split(",")[0]) == (503, "opening")
            yield process
        finally:
            process.kill()


def test_a_signal_at_any_moment_of_the_start(tmp_path: Path) -> None:
    """Before it heeds signals the process ends as any other; from then on it ends in order, with 0."""
    processes = []
    for index in range(STARTS):
        options = ["--storage", f"sqlite:///{tmp_path / f'{index}.db'}", "--port", "0"]
        command = [sys.executable, "-m", "agent_runtime.cli", "serve", *options]
        processes.append(
            subprocess.Popen(command, env=environment({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    codes = []
    started = time.monotonic()
    for index, process in enumerate(processes[:-1]):
        time.sleep(max(0.0, started + 0.4 * index - time.monotonic()))
        process.send_signal(signal.SIGTERM)
    assert processes[-1].stdout is not None
    assert processes[-1].stdout.readline()
    processes[-1].send_signal(signal.SIGTERM)
    for process in processes:
        output, errors = process.communicate(timeout=30)
        codes.append(process.returncode)
        assert "Traceback" not in errors
        assert (process.returncode == 0) or not output  # what it has announced it ends in order
    assert set(codes) <= {0, -signal.SIGTERM}
    assert codes[-1] == 0, json.dumps(codes)
    for index in range(STARTS):
        with open_runtime_blocking(f"sqlite:///{tmp_path / f'{index}.db'}") as runtime:
            assert runtime.list_sessions().items == []
