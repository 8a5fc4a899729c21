"""Commands that find a server: they ask it, as if they had the database open themselves."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_runtime import LeaseHeld, open_runtime, open_runtime_blocking
from agent_runtime.testing import Faults, faulty_plugin
from agent_runtime_memory import MemoryDatabase
from http_rig import Server, install, run, serving
from postgres_server import migrated_schema, url_of

CALL = {"id": "c1", "type": "function", "function": {"name": "trains", "arguments": "{}"}}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('commands') / 'sessions.db'}"


@pytest.fixture(scope="module")
def server(storage: str) -> Iterator[Server]:
    """A server that has stored nothing yet of what it was told."""
    with serving("--storage", storage, environ={"AGENT_RUNTIME__WRITE_BEHIND__INTERVAL_S": "1000"}) as server:
        with httpx.Client(base_url=f"{server.url}/v1/sessions") as client:
            client.put("/s%201", json={"user_id": "ada", "title": "T", "metadata": {"a": 1}}).raise_for_status()
            client.put("/s2", json={"user_id": "bob"}).raise_for_status()
            client.post("/s%201/agent", json={"agent": "coder", "reason": "it is code"}).raise_for_status()
            for message in (
                {"role": "user", "content": "hi ☃", "refusal": None},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
            ):
                client.post("/s%201/messages", json=message).raise_for_status()
        yield server


Ask = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(params=["--server", "--storage"])
def ask(request: pytest.FixtureRequest, server: Server, storage: str) -> Ask:
    """Run a command with the server's URL, or with the database that it has open."""
    where = server.url if request.param == "--server" else storage

    def asked(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = run(*arguments, request.param, where)
        assert done.stderr == ""
        return done

    return asked


def test_sessions_are_listed(ask: Ask) -> None:
    lines = ask("sessions", "list").stdout.splitlines()
    assert [line.split("\t")[:4] for line in lines] == [["s2", "bob", "", "0"], ["s 1", "ada", "T", "2"]]
    [line] = ask("sessions", "list", "--user", "ada", "--limit", "1", "--json").stdout.splitlines()
    assert json.loads(line)["metadata"] == {"a": 1}


def test_a_session_is_shown(ask: Ask, server: Server) -> None:
    text = ask("sessions", "show", "s 1").stdout
    assert "hi ☃" in text
    assert "trains" in text
    shown: Any = json.loads(ask("sessions", "show", "s 1", "--json").stdout)
    base = f"{server.url}/v1/sessions/s%201"
    assert shown["session"] == httpx.get(base).json()
    assert shown["messages"] == httpx.get(f"{base}/messages").json()["items"]
    [switch] = shown["switches"]
    assert (switch["from_agent"], switch["to_agent"], switch["reason"]) == ("orchestrator", "coder", "it is code")
    assert (shown["context"]["current_agent"], shown["context"]["session_id"]) == ("coder", "s 1")
    [newest] = json.loads(ask("sessions", "show", "s 1", "--json", "--limit", "1").stdout)["messages"]
    assert newest["seq"] == 2


def test_sessions_are_deleted(ask: Ask, server: Server) -> None:
    httpx.put(f"{server.url}/v1/sessions/s3").raise_for_status()
    done = ask("sessions", "delete", "s3", "--yes")
    assert (done.returncode, done.stdout) == (0, "deleted s3\n")
    assert httpx.get(f"{server.url}/v1/sessions/s3").status_code == 404
    assert httpx.get(f"{server.url}/v1/status").json()["pending"]["changes"] == 0


def test_what_is_not_there(server: Server, storage: str) -> None:
    for where in (("--server", server.url), ("--storage", storage)):
        done = run("sessions", "show", "nobody", *where)
        assert (done.returncode, done.stderr) == (1, "agent-runtime: there is no session 'nobody'\n")
    done = run("sessions", "show", "no\x07body", "--server", server.url)
    assert (done.returncode, "422: {session_id}" in done.stderr or "control characters" in done.stderr) == (1, True)


def test_a_server_is_found_without_knowing_where_its_journal_lies(tmp_path: Path) -> None:
    database = url_of(migrated_schema())
    variables = {"AGENT_RUNTIME__JOURNAL__DIRECTORY": str(tmp_path / "journal")}
    with serving("--storage", database, environ=variables) as server:
        httpx.put(f"{server.url}/v1/sessions/s1").raise_for_status()
        done = run("sessions", "list", "--storage", database)
        assert (done.returncode, done.stdout.partition("\t")[0]) == (0, "s1"), done.stderr
    done = run("sessions", "list", "--storage", database)
    assert (done.returncode, "journal.directory: must be set" in done.stderr) == (1, True)


def test_a_server_that_can_not_be_reached(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    done = run("sessions", "list", "--server", url)
    assert (done.returncode, done.stderr) == (
        1,
        f"agent-runtime: the server at {url} can't be reached: Connection refused\n",
    )
    # The holder of the lease says that it has a server, and has none.
    storage = f"sqlite:///{tmp_path / 'sessions.db'}"
    with open_runtime_blocking(storage, address=url):
        done = run("sessions", "list", "--storage", storage)
    first, second = done.stderr.splitlines()
    assert done.returncode == 3
    assert "the database is in use by pid" in first
    assert second == f"agent-runtime: the server at {url} can't be reached: Connection refused"
    with open_runtime_blocking(storage):
        done = run("sessions", "list", "--storage", storage)
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)


@pytest.mark.parametrize("url", ["127.0.0.1:8001", "ftp://host", "http://", "http://host:port", "http://host/?a=1", ""])
def test_what_is_no_url_of_a_server(url: str) -> None:
    done = run("sessions", "list", "--server", url)
    assert done.returncode == 1
    assert done.stderr.startswith("agent-runtime: server: is not ")


def test_another_kind_of_server() -> None:
    """It is asked once, and says what it has to say."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        done = run("sessions", "list", "--server", url)
        thread.join()
    assert done.returncode == 1
    assert done.stderr == f"agent-runtime: {url} answers 200, and not as a server of agent-runtime\n"


def test_commands_that_serve_nothing_load_no_server() -> None:
    program = """
import sys
import typer
from agent_runtime.plugins import PluginManager

plugins = PluginManager()
plugins.load()
plugins.commands(typer.Typer())
plugins.client_for("http://127.0.0.1")
assert not {"hypercorn", "starlette", "uvicorn"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)


@pytest.mark.anyio
async def test_the_holder_of_a_lease_is_known_by_its_address(tmp_path: Path) -> None:
    shared = MemoryDatabase()
    plugins = [faulty_plugin(shared.open, Faults())]
    for storage in (f"sqlite:///{tmp_path / 'sessions.db'}", "faulty:memory:"):
        async with open_runtime(storage, address="http://here", plugins=plugins):
            with pytest.raises(LeaseHeld) as caught:
                async with open_runtime(storage, plugins=plugins):
                    raise AssertionError
            assert caught.value.address == "http://here"


def test_a_plugin_for_servers_of_another_kind(tmp_path: Path) -> None:
    source = """
from agent_runtime import hookimpl, open_runtime

@hookimpl
def agent_runtime_clients():
    return {"beside": lambda url: open_runtime("memory:")}
"""
    environ = {"PYTHONPATH": install(tmp_path, "beside", source)}
    assert run("sessions", "list", "--server", "beside:", environ=environ).returncode == 0
    twice = {"PYTHONPATH": install(tmp_path / "again", "twice", source.replace("beside", "http"))}
    done = run("sessions", "list", "--server", "http://x", environ=twice)
    assert done.returncode == 1
    assert "talks to servers under 'http'" in done.stderr
