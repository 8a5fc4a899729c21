"""What is logged: the operator's lines, few of them, each on a line of its own, and nothing that was said in them."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from agent_runtime import Config, StorageUnavailable, open_runtime, open_runtime_blocking
from agent_runtime.cli.exits import tell
from agent_runtime.cli.logs import configure_logging
from agent_runtime.testing import Faults, faulty_plugin
from agent_runtime_memory import MemoryDatabase
from http_rig import Server, environment, install, serving
from shell import logging_restored

README = Path(__file__).parents[1] / "configs" / "README.md"
CANARY = "kanarienvogel"
OFTEN = {"AGENT_RUNTIME__WRITE_BEHIND__INTERVAL_S": "0.02"}
JSON = {"AGENT_RUNTIME__LOGGING__FORMAT": "json"}
WHEN = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ [\w.]+: \S")


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'sessions.db'}"


Logged = Callable[..., list[str]]


@pytest.fixture
def logged() -> Logged:
    """Configures logging, lets something be logged, and gives the lines."""

    def lines(log: Callable[[], object], **keys: str) -> list[str]:
        output = StringIO()
        with redirect_stderr(output), logging_restored():
            configure_logging(Config.of("memory:", logging=keys), quiet=False)
            log()
        return output.getvalue().splitlines()

    return lines


def raise_and_log() -> None:
    """An error of somebody, that came of others, in a group, each with text that nobody should read."""
    try:
        try:
            raise ValueError(CANARY)
        except ValueError as error:
            raise ExceptionGroup(CANARY, [KeyError(CANARY), StorageUnavailable("it is away")]) from error
    except ExceptionGroup:
        logging.getLogger("stranger").exception("it\nfailed\n")


# --- one line an event ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["text", "json"])
def test_an_event_is_a_line_whatever_it_holds(logged: Logged, format_: str) -> None:
    def log() -> None:
        raise_and_log()
        logging.getLogger("stranger").warning("two\nlines\x1b[2J and \u2028 more")
        warnings.warn_explicit("old", DeprecationWarning, "somewhere.py", 7)
        tell("it failed\nin two lines")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        lines = logged(log, format=format_)
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    assert CANARY not in "".join(lines)
    for name in ("ValueError", "ExceptionGroup", "KeyError", "StorageUnavailable: it is away", "raise_and_log"):
        assert name in lines[0]
    if format_ == "text":
        assert all(WHEN.match(line) for line in lines[:3]), lines
        assert lines[3] == "agent-runtime: it failed\\nin two lines"
    else:
        entries = [json.loads(line) for line in lines]
        assert [entry["level"] for entry in entries] == ["ERROR", "WARNING", "WARNING", "ERROR"]
        assert entries[0]["message"] == "it\nfailed"
        assert entries[3]["message"] == "it failed\nin two lines"


def test_times_are_utc(logged: Logged) -> None:
    before = datetime.now(UTC)
    (line,) = logged(lambda: logging.getLogger("stranger").warning("now"), format="json")
    time = datetime.fromisoformat(json.loads(line)["time"])
    assert time.utcoffset() == before.utcoffset()
    assert before <= time <= datetime.now(UTC)


def test_the_keys_of_json_are_those_in_the_documentation(logged: Logged) -> None:
    (line,) = logged(raise_and_log, format="json")
    section = README.read_text().partition("### logging")[2].partition("### plugins")[0]
    table = section.partition("| key | what |")[2].partition("\n\n")[0]
    assert list(json.loads(line)) == re.findall(r"^\| `(\w+)`", table, re.MULTILINE)


def test_libraries_are_heard_from_warning_on_and_say_nothing_of_what_was_said(logged: Logged) -> None:
    async def fail() -> None:
        raise ValueError(CANARY)

    def log() -> None:
        for name in ("aiosqlite", "alembic.runtime.migration", "sqlalchemy.engine.Engine", "uvicorn.error", "asyncio"):
            logging.getLogger(name).info("a detail")
            logging.getLogger(name).warning("a warning of %s", name)
        logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: %r", ValueError(CANARY))

    lines = logged(log, level="DEBUG")
    assert len(lines) == 6
    assert all("a warning of" in line for line in lines[:5])
    assert lines[5].endswith("ERROR asyncio: Task exception was never retrieved")


def test_a_database_s_statements_are_not_logged(storage: str, logged: Logged) -> None:
    """Drivers log them, with what they store, at DEBUG."""

    def log() -> None:
        with open_runtime_blocking(storage) as runtime:
            session = runtime.create_session("s1")
            session.append("user", CANARY, durability="stored")

    lines = logged(log, level="DEBUG")
    assert any("flushed" in line for line in lines)
    assert CANARY not in "".join(lines)


def test_the_library_configures_nothing(storage: str) -> None:
    code = f"""
import logging
from agent_runtime import open_runtime_blocking
levels = lambda: {{name: (each.level, each.handlers) for name, each in logging.root.manager.loggerDict.items()
                   if isinstance(each, logging.Logger) and name.startswith("agent_runtime")}}
with open_runtime_blocking({storage!r}) as runtime:
    runtime.create_session("s1", durability="stored")
assert (logging.root.level, logging.root.handlers) == (logging.WARNING, [])
assert set(map(str, levels().values())) == {{"(0, [])"}}, levels()
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment({}), check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- the operator's lines ---------------------------------------------------------------------------------------------


def messages(lines: list[str]) -> list[str]:
    return [json.loads(line)["message"] for line in lines]


def matches(told: list[str], *patterns: str) -> None:
    assert len(told) == len(patterns), told
    for line, pattern in zip(told, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def load(server: Server, calls: int) -> int:
    """Append messages from many connections at once; how many requests that was."""

    def append(name: str) -> None:
        url = f"{server.url}/v1/sessions/{name}"
        with httpx.Client() as client:
            client.put(url).raise_for_status()
            for number in range(calls):
                client.post(
                    f"{url}/messages", json={"role": "user", "content": f"{CANARY} {number}"}
                ).raise_for_status()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, (f"s{number}" for number in range(4))))
    return 4 * (calls + 1)


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_server_under_load_says_little(storage: str, loop: str) -> None:
    with serving("--storage", storage, "--loop", loop, environ=OFTEN | JSON) as server:
        changes = load(server, 100)
        httpx.get(f"{server.url}/nowhere")
        httpx.post(f"{server.url}/v1/flush").raise_for_status()
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
        lines = server.errors().splitlines()
    told = messages(lines)
    flushed = [line for line in told if line.startswith("flushed")]
    assert len(flushed) == 2, told  # the first batch, and at the end all others
    assert sum(int(line.split()[1]) for line in flushed) == changes
    matches(
        [line for line in told if not line.startswith("flushed")],
        re.escape(f"database initialized: {storage}"),
        r"stopping; 0 change\(s\) are to be stored",
        "shutdown complete",
    )
    assert {json.loads(line)["level"] for line in lines} == {"INFO"}
    assert CANARY not in "".join(lines)


def test_a_server_after_a_crash_says_what_it_recovered(storage: str) -> None:
    slow = {"AGENT_RUNTIME__WRITE_BEHIND__INTERVAL_S": "1000"} | JSON
    with serving("--storage", storage, environ=slow) as server:
        changes = load(server, 3)
        server.signal(signal.SIGKILL)
        server.ended()
    with serving("--storage", storage, environ=slow) as server:
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
        told = messages(server.errors().splitlines())
    matches(
        told,
        "database initialized: .*",
        rf"the journal .* goes up to {changes}, the database up to 0",
        rf"recovered {changes} change\(s\) from the journal .*",
        r"stopping; 0 change\(s\) are to be stored",
        "shutdown complete",
    )


def test_a_failure_is_a_line_of_json_too(storage: str) -> None:
    with (
        serving("--storage", storage, environ=JSON) as server,
        serving_fails("--storage", storage, environ=JSON) as errors,
    ):
        entry = json.loads(errors[-1])
    assert (entry["level"], entry["logger"]) == ("ERROR", "agent_runtime.cli")
    assert f"in use by pid {server.process.pid}" in entry["message"]


class serving_fails:
    """A server that does not come up: the lines that it says so with."""

    def __init__(self, *arguments: str, environ: dict[str, str]) -> None:
        self._command = [sys.executable, "-m", "agent_runtime.cli", "serve", "--port", "0", *arguments]
        self._environ = environment(environ)

    def __enter__(self) -> list[str]:
        done = subprocess.run(self._command, capture_output=True, text=True, env=self._environ, check=False, timeout=30)
        assert done.returncode != 0
        return done.stderr.splitlines()

    def __exit__(self, *_: object) -> None:
        """Nothing is left."""


def test_a_plugin_s_error_is_one_line(storage: str, tmp_path: Path) -> None:
    source = f"""
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from agent_runtime import hookimpl

async def broken(request):
    raise ValueError("{CANARY}")

async def breaking(request):
    async def parts():
        yield b"first"
        raise ValueError("{CANARY}")
    return StreamingResponse(parts())

@hookimpl
def agent_runtime_http_routes():
    return [Route("/broken", broken), Route("/breaking", breaking)]
"""
    environ = JSON | {"PYTHONPATH": install(tmp_path / "plugin", "rotten", source)}
    for loop in ("asyncio", "trio"):
        with serving("--storage", storage, "--loop", loop, environ=environ) as server:
            assert httpx.get(f"{server.url}/broken").status_code == 500
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{server.url}/breaking")
            server.signal(signal.SIGTERM)
            assert server.ended() == 0
            errors = [entry for entry in map(json.loads, server.errors().splitlines()) if entry["level"] == "ERROR"]
            assert "a request failed: ValueError at " in errors[0]["message"]
            assert "rotten.py" in errors[0]["message"]
            assert CANARY not in server.errors()


# --- no more than one line a minute -----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_batches_are_told_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The minute is made short; what is summed up is everything."""
    monkeypatch.setattr("agent_runtime.flushes._INTERVAL_S", 0.3)
    caplog.set_level(logging.INFO, "agent_runtime")
    started = anyio.current_time()
    async with open_runtime(Config.of("memory:")) as runtime:
        for number in range(40):
            await runtime.create_session(f"s{number}", durability="stored")
            await anyio.sleep(0.02)
        await anyio.sleep(0.4)
        told = flushes(caplog)
        assert sum(changes for changes, _ in told) == 40  # those of the last minute too, although nothing follows
    assert flushes(caplog) == told
    assert 3 <= len(told) <= 2 + (anyio.current_time() - started) / 0.3
    assert told[0] == (1, 1)
    assert sum(sessions for _, sessions in told) == 40


def flushes(caplog: pytest.LogCaptureFixture) -> list[tuple[int, int]]:
    """The changes and the sessions of each line."""
    pattern = re.compile(r"flushed (\d+) change\(s\) of (\d+) session\(s\) in \d+ ms(, in \d+ batches)?")
    found = [
        pattern.fullmatch(record.getMessage()) for record in caplog.records if record.getMessage().startswith("flushed")
    ]
    return [(int(match[1]), int(match[2])) for match in found if match is not None]


@pytest.mark.anyio
async def test_a_drain_tells_what_it_stored_and_what_it_could_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agent_runtime")
    faults = Faults()
    plugin: Any = faulty_plugin(MemoryDatabase().open, faults)
    config = Config.of("faulty:memory:", write_behind={"drain_timeout_s": 0.1})
    with pytest.raises(Exception, match="could not be stored"):
        async with open_runtime(config, plugins=[plugin]) as runtime:
            await runtime.create_session("s1", durability="stored")
            faults.fail("apply")
            await runtime.create_session("s2")
    assert flushes(caplog) == [(1, 1)]
    assert "shutdown complete" not in caplog.messages
