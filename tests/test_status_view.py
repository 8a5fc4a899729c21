"""`agent-runtime status`: what it tells of a server, live and once; servers that go away, come back, or never were."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_runtime import Status, open_runtime_blocking
from agent_runtime.cli.dashboard import ASCII, UNICODE, Board, Row
from agent_runtime.directories import Unfinished
from agent_runtime.histograms import SECONDS, Histogram
from crash import Left
from http_rig import Server, environment, free_port, run, serving
from places import SHORT, in_file
from shell import Shell

replace = msgspec.structs.replace
NOBODY = "changes up to 0 are stored: start one with `agent-runtime serve`, or name one with --server"


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return in_file(tmp_path_factory.mktemp("status")).url


@pytest.fixture(scope="module")
def server(storage: str) -> Iterator[Server]:
    """A server with a session and three messages, of which nothing is stored."""
    with serving("--storage", storage, environ={"AGENT_RUNTIME__WRITE_BEHIND__INTERVAL_S": "1000"}) as server:
        with httpx.Client(base_url=f"{server.url}/v1/sessions") as client:
            client.put("/s1", json={}).raise_for_status()
            for _ in range(3):
                client.post("/s1/messages", json={"role": "user", "content": "hi"}).raise_for_status()
        yield server


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_elsewhere_than_on_a_terminal_it_is_lines(server: Server, storage: str, encoding: str) -> None:
    where = ("--storage", storage) if encoding == "utf-8" else ("--server", server.url.replace("//", "//me:secret@"))
    done = run("status", *where, environ={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii() == (encoding == "ascii")
    assert "\\u" not in done.stdout
    shown = {line[:11].rstrip(): line[11:].split() for line in done.stdout.splitlines()}
    assert shown["server"] == [server.url]
    assert shown["state"] == ["running"]
    assert shown["accepted"] == ["4"]
    assert shown["stored"][:3] == ["0", "4", "behind,"]
    assert shown["pending"][-2:] == ["4", "changes"]
    assert shown["appends"][0] == "journaled"
    assert shown["appends"][-3:] == ["3", "so", "far"]
    assert shown["quarantine"] == ["empty"]


def test_as_json_it_is_what_the_server_answers(server: Server) -> None:
    told = json.loads(run("status", "--server", server.url, "--json").stdout)
    asked = httpx.get(f"{server.url}/v1/status").json()
    assert told.keys() == asked.keys()
    assert (told["watermarks"], told["appends"]) == (asked["watermarks"], asked["appends"])
    assert msgspec.convert(told, Status).pending.changes == 4


def test_it_is_repeated_when_that_is_asked_for(server: Server) -> None:
    command = [sys.executable, "-m", "agent_runtime.cli", "status", "--server", server.url, "--json", "--every", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment({})) as process:
        assert process.stdout is not None
        looks = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.terminate()
    assert [look["watermarks"]["accepted"] for look in looks] == [4, 4, 4]


# --- no server --------------------------------------------------------------------------------------------------------


def test_where_no_server_is(tmp_path: Path) -> None:
    shell, place = Shell(tmp_path), in_file(tmp_path)
    assert shell.fails("status") == f"no server has {place.url} open, where {NOBODY}"
    with place.open_blocking():
        output, [holder, why] = shell.here("status", code=3)
        assert output == ""
        assert holder.startswith(f"agent-runtime: the database is in use by pid {os.getpid()} on ")
        assert why == "agent-runtime: it is no server, so there is nobody to ask"
    away = f"http://127.0.0.1:{free_port()}"
    refused = f"the server at {away} can't be reached: Connection refused"
    assert shell.fails("status", "--server", away) == refused
    with open_runtime_blocking(place.config(), address=away):
        _, [_, why] = shell.here("status", code=3)
        assert why == f"agent-runtime: {refused}"
        Left(tmp_path).sql("UPDATE partitions SET expires_at = expires_at - 3600")
        gone = r"has not renewed its lease for 35\d\d s: what it had not stored is in its journal"
        assert re.search(gone, shell.fails("status", "--once"))


def test_a_server_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.cli.status._ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert Shell(tmp_path).fails("status", "--server", url) == f"the server at {url} does not answer within 0.2 s"


# --- live -------------------------------------------------------------------------------------------------------------


class Terminal:
    """A command on a terminal of its own. `seen` is all it wrote there so far."""

    def __init__(self, process: subprocess.Popen[bytes], ours: int) -> None:
        self.process = process
        self.seen = ""
        self._ours = ours

    def until(self, pattern: str, timeout_s: float = 20.0) -> str:
        """Read until this is seen, styles left out; what came up to then."""
        start, end = len(self.seen), time.monotonic() + timeout_s
        while not re.search(pattern, plain(self.seen[start:])):
            if not select.select([self._ours], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError(f"{pattern!r} is not seen: {plain(self.seen[start:])[-3000:]}")
            self.seen += os.read(self._ours, 65536).decode()
        return plain(self.seen[start:])

    def ended(self) -> int:
        """Its exit code, and all that it wrote is read."""
        code = self.process.wait(20)
        while select.select([self._ours], [], [], 0)[0]:
            try:
                self.seen += os.read(self._ours, 65536).decode()
            except OSError:  # nobody has the other end any more
                break
        return code


def plain(text: str) -> str:
    return re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|\([A-Z])", "", text)


@contextmanager
def on_terminal(*arguments: str, columns: int = 80, rows: int = 24, **environ: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    kept = {name: value for name, value in environment({}).items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "agent_runtime.cli", "status", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=kept | {"TERM": "xterm-256color"} | environ,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


ALTERNATE, NORMAL, SHOWN = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


def test_live_it_outlives_its_servers(tmp_path: Path) -> None:
    """The first is killed, another one comes on another port. Ctrl-C leaves what was seen last, and a whole terminal."""
    url = in_file(tmp_path).url
    fast = {"AGENT_RUNTIME__LEASE__DURATION_S": "1"}
    with ExitStack() as stack:
        first = stack.enter_context(serving("--storage", url, environ=fast))
        terminal = stack.enter_context(on_terminal("--storage", url, "--every", "0.2"))
        terminal.until("● running")
        httpx.put(f"{first.url}/v1/sessions/s1").raise_for_status()
        terminal.until(r"accepted +1\b")
        first.signal(signal.SIGKILL)
        first.process.wait()
        terminal.until(r"● no answer for \d+ s(.|\n)*(can't be reached|in use by|has not renewed)")
        second = stack.enter_context(serving("--storage", url, environ=fast))
        assert second.url != first.url
        terminal.until(re.escape(second.url) + " .*● running")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.ended() == 0
    assert terminal.seen.count(ALTERNATE) == terminal.seen.count(NORMAL) == 1
    left = terminal.seen.split(NORMAL)[1]
    assert second.url in plain(left)
    assert "accepted" in left
    assert SHOWN in terminal.seen.split(ALTERNATE)[1]


@pytest.mark.parametrize(("columns", "rows", "environ"), [(80, 24, {}), (20, 4, {"NO_COLOR": "1"})])
def test_live_it_fits_its_terminal(server: Server, columns: int, rows: int, environ: dict[str, str]) -> None:
    with on_terminal("--server", server.url, "--every", "0.1", columns=columns, rows=rows, **environ) as terminal:
        terminal.until("running(.|\n)*running")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.ended() == 0
        shown, left = terminal.seen.split(ALTERNATE)[1].split(NORMAL)
        screens = re.split(r"\x1b\[H", shown)[1:]
        assert len(screens) >= 2
        for screen in screens:
            lines = plain(screen).rstrip("\r\n").split("\r\n")
            assert len(lines) <= rows
            assert max(map(len, lines)) <= columns
        assert ("quar" in shown) == (rows == 24)
        assert "quar" in left  # scrolled, but all of it
        assert bool(re.search(r"\x1b\[[0-9;]*(3[0-7]|38;)[0-9;]*m", terminal.seen)) == (not environ)


def test_on_a_terminal_that_can_do_nothing_it_looks_once(server: Server, tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    code, seen = shell.on_terminal("status", "--server", server.url, "--once")
    assert (code, ALTERNATE in seen, "running" in seen) == (0, False, True)
    shell.environment["TERM"] = "dumb"
    code, seen = shell.on_terminal("status", "--server", server.url)
    assert (code, "\x1b" in seen, "running" in seen) == (0, False, True)


# --- what the figures come to -----------------------------------------------------------------------------------------


@cache
def status_of_nothing() -> Status:
    """Of a runtime where nothing has happened."""
    with TemporaryDirectory() as directory, in_file(Path(directory)).open_blocking() as runtime:
        return runtime.status()


@pytest.fixture
def status() -> Status:
    return status_of_nothing()


def at(status: Status, accepted: int, stored: int, **fields: Any) -> Status:
    return replace(status, watermarks=replace(status.watermarks, accepted=accepted, stored=stored), **fields)


def rows(board: Board) -> dict[str, Row]:
    return {row.label: row for row in board.rows() if row.label}


def test_rates_are_those_of_the_last_seconds(status: Status) -> None:
    board = Board()
    board.add(100.0, at(status, 1000, 0))
    assert "writes" not in rows(board)
    assert board.period == "since the start"
    for second in range(1, 31):
        board.add(100.0 + second, at(status, 1000 + 10 * second + max(0, second - 20) * 90, 0))
    assert board.period == "last 10 s"
    assert rows(board)["writes"].value == "100 /s"
    curve = rows(board)["writes"].text
    assert curve == "▁" * 20 + "█" * 10
    narrow = {row.label: row for row in board.rows(columns=36)}
    assert narrow["writes"].text == curve[-10:]


def test_another_runtime_begins_anew(status: Status) -> None:
    board = Board()
    for second, epoch, accepted in ((1, 1, 1000), (2, 1, 2000), (3, 2, 2000), (4, 2, 2001)):
        board.add(float(second), at(status, accepted, accepted, lease=replace(status.lease, epoch=epoch)))
    assert rows(board)["writes"].value == "1.0 /s"
    assert rows(board)["stored"].text == "up to date"


def test_quantiles_are_those_of_the_last_seconds(status: Status) -> None:
    def appends(slow: int, fast: int) -> Status:
        histogram = Histogram.of(SECONDS)
        for value, count in ((0.2, slow), (2e-5, fast)):
            for _ in range(count):
                histogram.observe(value)
        return replace(status, appends={"stored": histogram})

    board = Board()
    board.add(0.0, appends(1000, 0))
    assert rows(board)["appends"].text.endswith("1,000 so far")
    board.add(10.0, appends(1000, 100))
    assert rows(board)["appends"] == Row("appends", "stored", "p50 18 µs, p99 25 µs, 10 /s")


def test_what_somebody_has_to_look_after(status: Status) -> None:
    board = Board(ASCII)
    board.add(0.0, status)
    assert list(board.troubles()) == []
    assert board.state == ("running", "good")
    bad = replace(
        status,
        state="degraded",
        flush=replace(status.flush, failing_s=75.0, last_error="StorageUnavailable: it is away", failures=3),
        quarantine=replace(status.quarantine, changes=3, sessions=1),
        lease=replace(status.lease, unreachable=True, expires_in_s=-5.0),
        unfinished=(Unfinished(place="/there", holder="pid 7 on host"),),
        pending=replace(status.pending, bytes=60, bytes_max=64, waiting=2, refused=7),
    )
    board.add(1.0, bad)
    assert [(row.label, row.value, row.text) for row in board.troubles()] == [
        ("failing", "for 75 s", "StorageUnavailable: it is away"),
        ("quarantine", "3", "changes of 1 held session: agent-runtime quarantine list"),
        ("journal", "left", "/there of pid 7 on host: what it has comes in once it is opened again"),
        ("lease", "expired", f"5 s ago; can't be renewed while the database is away; epoch {status.lease.epoch}"),
        ("overload", "", "2 wait for room, 7 were refused so far"),
    ]
    shown = rows(board)
    assert (shown["pending"].value, shown["pending"].tone) == ("94%", "bad")
    assert shown["flushes"].text.startswith("3 failed; ")
    assert not {"lease", "quarantine"} & shown.keys()
    assert board.state[1] == "warning"


@settings(SHORT, max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 200))
def test_whatever_the_figures_every_row_can_be_shown(seed: int, columns: int) -> None:
    """No division by nothing, no bar that is longer than its place."""
    random = Random(seed)

    def some(kind: Any) -> Any:
        return random.choice([0, 1, random.randrange(10 ** random.randint(1, 15)), random.random() * 10])

    def shaken(value: Any) -> Any:
        match value:
            case Histogram():
                return Histogram(value.bounds, [int(some(int)) for _ in value.counts], float(some(float)))
            case msgspec.Struct():
                return replace(value, **{name: shaken(getattr(value, name)) for name in value.__struct_fields__})
            case dict():
                return {name: shaken(each) for name, each in value.items()}
            case bool():
                return random.random() < 0.5
            case int():
                return int(some(int))
            case float():
                return float(some(float))
            case _:
                return value

    board = Board(random.choice([ASCII, UNICODE]))
    for look in range(random.randint(1, 5)):
        board.add(look * random.random(), shaken(status_of_nothing()))
    for row in [*board.troubles(), *board.rows(columns)]:
        assert "\n" not in row.label + row.value + row.text
        if row.label == "writes":
            assert len(row.text) <= max(1, columns - 26)
