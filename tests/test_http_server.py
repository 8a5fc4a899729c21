"""`agent-runtime serve` as a process: what it says, how it ends, and clients that behave badly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from agent_runtime import Config, LeaseHeld, open_runtime_blocking
from http_rig import Server, environment, free_port, install, run, serving

LOOPS = ["asyncio", "trio"]
LONG_S = "1000"  # nothing is flushed by itself
MESSAGE = {"role": "user", "content": "hi"}

PROBE = '''
"""What a test asks a server of itself, and streams that do as they are told or do not."""

import asyncio, gc, sys, threading
import anyio
import anyio.lowlevel
import trio
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from agent_runtime import hookimpl
from agent_runtime_http import stopping


async def holds(request):
    gc.collect()
    if isinstance(anyio.lowlevel.current_token().native_token, asyncio.AbstractEventLoop):
        tasks = len(asyncio.all_tasks())
    else:
        tasks = trio.lowlevel.current_statistics().tasks_living
    memory = {"objects": len(gc.get_objects()), "blocks": sys.getallocatedblocks()}
    return JSONResponse({"tasks": tasks, "threads": threading.active_count(), **memory})


async def stream(request):
    async def parts():
        yield b"first"
        await stopping(request.scope).wait()
        yield b"last"

    return StreamingResponse(parts())


async def deaf(request):
    async def parts():
        yield b"first"
        await anyio.sleep_forever()

    return StreamingResponse(parts())


sent = 0


async def hasty(request):
    async def parts():
        global sent
        for _ in range(32 << 10):
            yield bytes(1 << 10)
            sent += 1 << 10

    return StreamingResponse(parts())


async def hasty_sent(request):
    return JSONResponse(sent)


@hookimpl
def agent_runtime_http_routes():
    paths = {"/holds": holds, "/stream": stream, "/deaf": deaf, "/hasty": hasty, "/hasty/sent": hasty_sent}
    return [Route(path, endpoint) for path, endpoint in paths.items()]
'''


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'sessions.db'}"


@pytest.fixture
def probe(tmp_path: Path) -> dict[str, str]:
    """The environment of a server with the plugin that answers `/holds` and the streams."""
    return {
        "PYTHONPATH": install(tmp_path / "probe", "probe", PROBE),
        "AGENT_RUNTIME__WRITE_BEHIND__INTERVAL_S": LONG_S,
    }


def appended(server: Server, **headers: str) -> int:
    """Append a message; how many there are then."""
    httpx.put(f"{server.url}/v1/sessions/s1", headers=headers).raise_for_status()
    reply = httpx.post(f"{server.url}/v1/sessions/s1/messages", json=MESSAGE, headers=headers)
    assert reply.status_code == 201
    seq: int = reply.json()["seq"]
    return seq


def stored(storage: str) -> int:
    with open_runtime_blocking(storage) as runtime:
        return runtime.get_session("s1").record().message_count


# --- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_it_says_where_it_listens_where_it_stores_and_which_plugins_are_on(storage: str, loop: str) -> None:
    with serving("--storage", storage, "--loop", loop) as server:
        first, second, third = server.output
        assert first == f"agent-runtime 0.1.0 listens on http://127.0.0.1:{server.port}"
        assert second.startswith(f"stores in {storage} (durability: ")
        assert {"http", "memory", "sqlite"} <= set(third.removeprefix("plugins: ").split(", "))
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        (line,) = server.errors().splitlines()  # that its tables were made is no news
        assert line.endswith(f" INFO agent_runtime: database initialized: {storage}")


def test_secrets_are_not_said(tmp_path: Path) -> None:
    source = """
from agent_runtime import hookimpl
from agent_runtime.storage import StorageConfig
from agent_runtime_memory import MemoryDatabase

@hookimpl
def agent_runtime_storages():
    return {"vault": lambda config: MemoryDatabase().open(StorageConfig(url="memory:"))}
"""
    environ = {"PYTHONPATH": install(tmp_path, "vault", source)}
    with serving("--storage", "vault://ada:hunter2@host/db", environ=environ) as server:
        assert server.output[1].startswith("stores in vault://ada:***@host/db (durability: ")


def test_it_is_found_in_the_lease(storage: str) -> None:
    with (
        serving("--storage", storage) as server,
        pytest.raises(LeaseHeld, match=server.url),
        open_runtime_blocking(storage),
    ):
        raise AssertionError


def test_options_win_over_the_configuration(tmp_path: Path, storage: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("http: {host: 10.255.255.1, port: 1}\nwrite_behind: {durability: stored}\n")
    with serving("--config", str(file), "--storage", storage, "--host", "localhost") as server:
        assert server.url.startswith("http://localhost:")
        assert server.output[1].endswith("(durability: stored)")


# --- how it fails -----------------------------------------------------------------------------------------------------


def failed(code: int, *arguments: str, environ: Mapping[str, str] = {}) -> str:
    """Run a server that does not come up; the line that says why."""
    done = run("serve", *arguments, environ=environ)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    line: str = done.stderr.splitlines()[-1]
    return line.removeprefix("agent-runtime: ")


def test_a_port_that_is_taken(storage: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = failed(1, "--storage", storage, "--port", str(port))
    expected = f"can't listen on 127.0.0.1, port {port}: Address already in use; choose another with --port or --host"
    assert line == expected


def test_an_address_that_is_not_ours(storage: str) -> None:
    assert "can't listen on nowhere.invalid" in failed(1, "--storage", storage, "--host", "nowhere.invalid")


def test_other_machines_are_let_in_only_explicitly(storage: str) -> None:
    for host in ("0.0.0.0", "::"):
        assert "set http.tokens or http.tokens_file, or http.insecure to true" in failed(
            1, "--storage", storage, "--host", host, "--port", "0"
        )
    variables = {"AGENT_RUNTIME__HTTP__INSECURE": "true"}
    with serving("--storage", storage, "--host", "0.0.0.0", environ=variables) as server:
        assert server.url == f"http://{socket.gethostname()}:{server.port}"
        assert httpx.get(f"http://127.0.0.1:{server.port}/readyz").status_code == 200


def test_a_database_that_is_in_use(storage: str) -> None:
    with serving("--storage", storage) as server:
        line = failed(3, "--storage", storage, "--port", "0")
        assert "in use by pid" in line
        assert server.url in line
        assert "stand by with --wait" in line


def test_usage_and_configuration(storage: str) -> None:
    assert run("serve", "--loop", "twisted").returncode == 2
    assert run("serve", "--port", "many").returncode == 2
    assert "no plugin stores under 'nosql'" in failed(1, "--storage", "nosql:", "--port", "0")
    assert failed(1, environ={"AGENT_RUNTIME__HTTP__PORT": "70000"}) == (
        "AGENT_RUNTIME__HTTP__PORT: must be less than or equal to 65535"
    )


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loop", "number"), [("asyncio", signal.SIGTERM), ("trio", signal.SIGINT)])
def test_a_signal_ends_it_with_everything_stored(
    storage: str, probe: dict[str, str], loop: str, number: signal.Signals
) -> None:
    with serving("--storage", storage, "--loop", loop, environ=probe) as server:
        assert appended(server) == 1
        server.signal(number)
        assert server.ended() == 0
    assert stored(storage) == 1


@contextmanager
def streaming(server: Server, path: str) -> Iterator[list[bytes]]:
    """A stream that has begun, read in a thread to its end."""
    parts: list[bytes] = []
    begun = threading.Event()

    def read() -> None:
        try:
            with httpx.stream("GET", server.url + path, timeout=None) as reply:
                for part in reply.iter_raw():
                    parts.append(part)
                    begun.set()
        except httpx.TransportError:
            parts.append(b"broken off")

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(10)
    yield parts
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("loop", LOOPS)
def test_streams_are_told_to_end(storage: str, probe: dict[str, str], loop: str) -> None:
    with serving("--storage", storage, "--loop", loop, environ=probe) as server:
        with streaming(server, "/stream") as parts:
            assert appended(server) == 1
            started = time.monotonic()
            server.signal(signal.SIGTERM)
            assert server.ended() == 0
            assert time.monotonic() - started < 8  # it did not wait for its grace to pass
        assert parts == [b"first", b"last"]
    assert stored(storage) == 1


@pytest.mark.parametrize("loop", LOOPS)
def test_ctrl_c_twice_does_not_wait_for_a_stream_but_for_what_is_unstored(
    storage: str, probe: dict[str, str], loop: str
) -> None:
    with serving("--storage", storage, "--loop", loop, environ=probe) as server:
        with streaming(server, "/deaf") as parts:
            assert appended(server) == 1
            started = time.monotonic()
            server.signal(signal.SIGINT)
            time.sleep(0.5)
            assert server.process.poll() is None
            server.signal(signal.SIGINT)
            assert server.ended() == 0
            assert time.monotonic() - started < 8
        assert parts == [b"first", b"broken off"]
    assert stored(storage) == 1


def test_a_signal_while_it_opens(tmp_path: Path) -> None:
    source = """
import contextlib, anyio
from agent_runtime import hookimpl

@contextlib.asynccontextmanager
async def stuck(config):
    await anyio.sleep_forever()
    yield

@hookimpl
def agent_runtime_storages():
    return {"stuck": stuck}
"""
    port = free_port()
    command = ["-m", "agent_runtime.cli", "serve", "--storage", "stuck:", "--port", str(port)]
    variables = environment({"PYTHONPATH": install(tmp_path, "stuck", source)})
    with subprocess.Popen([sys.executable, *command], env=variables, stdout=subprocess.PIPE) as process:
        assert until(lambda: httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200)
        ready = httpx.get(f"http://127.0.0.1:{port}/readyz")
        assert (ready.status_code, ready.json()["checks"][0]["detail"].split(",")[0]) == (503, "opening")
        assert httpx.get(f"http://127.0.0.1:{port}/v1/sessions").status_code == 503
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
        assert (process.returncode, output) == (0, b"")


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Whether it comes true in time; what can't be reached is not true yet."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if condition():
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    return False


def test_what_can_not_be_stored_is_said_and_counted(tmp_path: Path) -> None:
    source = """
from agent_runtime import hookimpl
from agent_runtime.testing import Faults, faulty_plugin
from agent_runtime_memory import MemoryDatabase

faults = Faults()
faults.fail("apply")

@hookimpl
def agent_runtime_storages():
    return faulty_plugin(MemoryDatabase().open, faults).agent_runtime_storages()
"""
    environ = {
        "PYTHONPATH": install(tmp_path, "away", source),
        "AGENT_RUNTIME__WRITE_BEHIND__DRAIN_TIMEOUT_S": "0.5",
    }
    with serving("--storage", "faulty:memory:", environ=environ) as server:
        appended(server)
        server.signal(signal.SIGTERM)
        assert server.ended() == 4
        assert "2 change(s) could not be stored" in server.errors()


def test_another_runtime_takes_over(storage: str, probe: dict[str, str], tmp_path: Path) -> None:
    """A server that was frozen for longer than its lease finds out, ends by itself, and says what is not stored."""
    with serving("--storage", storage, environ=probe | {"AGENT_RUNTIME__LEASE__DURATION_S": "1"}) as server:
        appended(server)
        httpx.post(f"{server.url}/v1/flush").raise_for_status()
        appended(server)
        server.signal(signal.SIGSTOP)
        try:
            with ExitStack() as stack:
                assert until(lambda: takes_over(stack, storage, tmp_path / "journal"))
                server.signal(signal.SIGCONT)
                assert server.ended() == 4
        finally:
            server.signal(signal.SIGCONT)
        assert "1 change(s) could not be stored" in server.errors()
    assert stored(storage) == 2  # they come back when its journal is opened again


def takes_over(stack: ExitStack, storage: str, journal: Path) -> bool:
    """Open the database with a journal elsewhere: the frozen server has locked its own."""
    try:
        stack.enter_context(open_runtime_blocking(Config.of(storage, journal={"directory": str(journal)})))
    except LeaseHeld:
        return False
    return True


# --- clients that behave badly ----------------------------------------------------------------------------------------

HEAD = b"POST /v1/sessions/s1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
HALVES = [
    b"",  # says nothing
    b"POST /v1/sess",
    HEAD,
    HEAD + b"content-length: 1000\r\n\r\n",
    HEAD + b"content-length: 1000\r\n\r\n" + b'{"role": "user", "content": "',
    HEAD + b"transfer-encoding: chunked\r\n\r\n" + b'8\r\n{"role":\r\n',
]


def holds(server: Server, client: httpx.Client) -> dict[str, int]:
    """What the server holds: tasks, threads, objects, blocks of memory, open files, and bytes."""
    found: dict[str, int] = client.get(f"{server.url}/holds").json()
    process = psutil.Process(server.process.pid)
    return found | {"files": process.num_fds(), "bytes": process.memory_info().rss}


@pytest.mark.parametrize("loop", LOOPS)
def test_others_are_served_beside_500_connections_and_nothing_leaks(
    storage: str, probe: dict[str, str], loop: str
) -> None:
    """Idle, slow and half-sent; then all of them hang up. What was half sent is not stored."""
    with serving("--storage", storage, "--loop", loop, environ=probe) as server, httpx.Client() as client:
        count = appended(server)

        def crowd(size: int) -> None:
            nonlocal count
            with ExitStack() as stack:
                for number in range(size):
                    sloppy = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                    sloppy.sendall(HALVES[number % len(HALVES)])
                started = time.monotonic()
                for _ in range(5):
                    count += 1
                    assert appended(server) == count
                assert time.monotonic() - started < 10

        def settled() -> bool:
            after = holds(server, client)
            return after["files"] <= before["files"] and after["tasks"] <= before["tasks"]

        before = holds(server, client)
        crowd(300)  # to warm up
        assert until(settled)
        before = holds(server, client)
        crowd(500)
        crowd(100)
        assert until(settled)
        after = holds(server, client)
        assert after["threads"] <= before["threads"]
        # Less than one for each of the 300 requests that came to the application; trio keeps a thousand past deadlines.
        allowed = 200 if loop == "asyncio" else 4000
        assert after["objects"] < before["objects"] + allowed
        assert after["blocks"] < before["blocks"] + 2 * allowed
        assert after["bytes"] < before["bytes"] + (16 << 20)
        record = client.get(f"{server.url}/v1/sessions/s1").json()
        assert record["message_count"] == count


@pytest.mark.parametrize("loop", LOOPS)
def test_a_slow_sender_is_waited_for_and_a_slow_reader_keeps_nobody(
    storage: str, probe: dict[str, str], loop: str
) -> None:
    with serving("--storage", storage, "--loop", loop, environ=probe) as server:
        appended(server)
        text = "x" * 200_000
        for _ in range(5):
            httpx.post(f"{server.url}/v1/sessions/s1/messages", json=MESSAGE | {"content": text}).raise_for_status()
        with socket.create_connection(("127.0.0.1", server.port)) as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.sendall(b"GET /v1/sessions/s1/history HTTP/1.1\r\nhost: localhost\r\n\r\n")
            body = json.dumps(MESSAGE).encode()
            with socket.create_connection(("127.0.0.1", server.port)) as sender:
                sender.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body))
                for at in range(len(body)):
                    sender.sendall(body[at : at + 1])
                    time.sleep(0.005)
                assert sender.recv(100).startswith(b"HTTP/1.1 201")
            assert appended(server) == 8
            assert reader.recv(100).startswith(b"HTTP/1.1 200")


def test_an_answer_is_one_packet(storage: str) -> None:
    """Else its reader is woken twice, the first time for nothing."""
    with serving("--storage", storage) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        for _ in range(200):
            client.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            head, _, body = client.recv(65536).partition(b"\r\n\r\n")
            assert b"content-length: %d" % len(body) in head
            assert body


def test_a_client_that_ends_its_side_reads_the_answer(storage: str) -> None:
    """As long as nobody had to wait for the answer."""
    body = b'{"role": "user", "content": "hi"}'
    head = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with serving("--storage", storage) as server:
        httpx.put(f"{server.url}/v1/sessions/a", json={}).raise_for_status()
        for seq in range(1, 21):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(b"POST /v1/sessions/a/messages HTTP/1.1\r\n" + head + body)
                client.shutdown(socket.SHUT_WR)
                assert b'"seq":%d,' % seq in client.recv(65536)


def test_a_stream_that_never_waits_is_held_back_by_its_reader(storage: str, probe: dict[str, str]) -> None:
    size = 32 << 20
    with serving("--storage", storage, environ=probe) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as reader:
            reader.sendall(b"GET /hasty HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            assert appended(server) == 1
            assert httpx.get(f"{server.url}/hasty/sent").json() < size // 2  # what sockets take, and no more
            received = 0
            while part := reader.recv(1 << 20):
                received += len(part)
        assert received > size


@pytest.mark.parametrize("loop", LOOPS)
def test_bad_requests_over_the_wire(storage: str, loop: str) -> None:
    """What clients normalise away, as it is sent."""

    def ask(request: bytes) -> tuple[int, Any]:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(request)
            received = b""
            while part := client.recv(65536):
                received += part
        head, _, body = received.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body) if b"problem+json" in head else body

    def get(target: bytes) -> bytes:
        return b"GET %b HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n" % target

    with serving(
        "--storage", storage, "--loop", loop, environ={"AGENT_RUNTIME__HTTP__BODY_BYTES_MAX": "2048"}
    ) as server:
        appended(server)
        clear = get(b"/v1/sessions/s1%2Fmessages").replace(b"GET", b"DELETE")
        assert ask(clear)[0] == 422
        assert ask(get(b"/v1/sessions/.."))[0] == 422
        assert ask(get(b"/v1/sessions/%FF"))[0] == 400
        status, problem = ask(get(b"/v1/sessions/" + b"x" * 5000))
        assert (status, problem["errors"][0]["pointer"]) == (422, "{session_id}")
        chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
        chunked = HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunk * 9 + b"0\r\n\r\n"
        assert ask(chunked)[0] == 413
        expecting = HEAD + b"connection: close\r\nexpect: 100-continue\r\ncontent-length: 999999\r\n\r\n"
        status, _ = ask(expecting)
        assert status in (413, 100)  # Hypercorn asks for the body before it has asked us
        assert httpx.get(f"{server.url}/v1/sessions/s1").json()["message_count"] == 1


def test_the_old_variables_start_it(tmp_path: Path) -> None:
    """As the old service was: configured by its environment alone."""
    variables = {
        "AGENT_RUNTIME__DB_URL": f"sqlite:///{tmp_path / 'old.db'}",
        "LOG_LEVEL": "warning",
        "GATEWAY_URL": "http://gateway",
        "INTERNAL_API_KEY": "key",
    }
    with serving(environ=variables) as server:
        assert httpx.get(f"{server.url}/v1/sessions").status_code == 401
        assert appended(server, **{"x-internal-auth": "key"}) == 1
    assert os.listdir(tmp_path)  # noqa: PTH208
