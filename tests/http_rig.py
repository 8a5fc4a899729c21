"""What the tests of the HTTP surface share: requests to an application of this process, and servers of their own."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.types import ASGIApp, Message

from agent_runtime import Config, Runtime
from agent_runtime.testing import Faults, faulty_plugin
from agent_runtime_http import create_app, lifespan
from agent_runtime_memory import MemoryDatabase
from described import check_described

JSON = {"content-type": "application/json"}
SAMPLE = Path(__file__).parent / "data" / "airline-sample.jsonl.gz"
START_S = 30.0


class Reply(NamedTuple):
    """What was answered. `pointers` are those of a problem document."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def pointers(self) -> list[str]:
        return [fault["pointer"] for fault in self.json.get("errors", [])]

    @property
    def slug(self) -> str:
        return str(self.json["type"]).removeprefix("urn:agent-runtime:problem:")


class App:
    """An application of this process, called as servers call it. What is answered is checked to be whole, and as documented."""

    def __init__(self, app: ASGIApp, root: str = "") -> None:
        self.app = app
        self._root = root

    async def __call__(
        self,
        method: str,
        target: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        chunks: Iterable[bytes] | None = None,
        hang_up: bool = False,
    ) -> Reply:
        """Make a request. A body that is not bytes is sent as JSON; `chunks` come without a Content-Length."""
        given = {} if body is None or isinstance(body, bytes) else dict(JSON)
        given |= headers or {}
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        if chunks is None:
            given["content-length"] = str(len(data))
            chunks = [data]
        raw_path, _, query = (self._root + target).partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(raw_path),
            "raw_path": raw_path.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": {},
        }
        reply = await self._answered(scope, [*chunks], hang_up)
        if not hang_up:
            check_described(method, target, reply.status, reply.headers, reply.body)
        return reply

    async def _answered(self, scope: dict[str, Any], chunks: Sequence[bytes], hang_up: bool) -> Reply:
        coming: list[Message] = [
            {"type": "http.request", "body": chunk, "more_body": hang_up or number < len(chunks)}
            for number, chunk in enumerate(chunks, 1)
        ]
        sent: list[Message] = []

        async def receive() -> Message:
            return coming.pop(0) if coming else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        if hang_up:
            assert sent == []
            return Reply(0, {}, b"")
        start, *rest = sent
        assert start["type"] == "http.response.start"
        assert [message.get("more_body", False) for message in rest] == [True] * (len(rest) - 1) + [False]
        headers = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
        assert len(headers) == len(start["headers"])
        reply = Reply(start["status"], headers, b"".join(message.get("body", b"") for message in rest))
        self._check(reply, is_head=scope["method"] == "HEAD")
        return reply

    @staticmethod
    def _check(reply: Reply, *, is_head: bool) -> None:
        length = reply.headers.get("content-length")
        assert is_head or length is None or int(length) == len(reply.body)
        if reply.status == 204 or is_head:
            assert reply.body == b""
        elif reply.headers.get("content-type") == "application/problem+json":
            problem = reply.json
            assert problem["status"] == reply.status
            assert problem["type"].startswith("urn:agent-runtime:problem:")
            assert problem["title"]
            assert problem["detail"]
        else:
            assert reply.status < 400 or "checks" in reply.json


@asynccontextmanager
async def opened(
    config: Config | str = "memory:", plugins: Iterable[object] = (), **sections: dict[str, Any]
) -> AsyncIterator[App]:
    """An application whose runtime is open."""
    app = create_app(Config.of(config, **sections) if isinstance(config, str) else config, plugins=plugins)
    async with lifespan(app):
        yield App(app)


def runtime_of(app: App) -> Runtime:
    """The runtime behind an application."""
    assert isinstance(app.app, Starlette)
    runtime: Runtime = app.app.state.service.running()
    return runtime


def checks(ready: Reply) -> dict[str, str]:
    """The status of each check of `/readyz`."""
    return {check["name"]: check["status"] for check in ready.json["checks"]}


class Outage:
    """A database that does what a test wants."""

    def __init__(self) -> None:
        self.faults = Faults()
        self._database = MemoryDatabase()

    def opened(self, **sections: dict[str, Any]) -> Any:
        defaults = {"interval_s": 1000.0, "drain_timeout_s": 0.01, "durability_timeout_s": 0.01}
        sections["write_behind"] = defaults | sections.get("write_behind", {})
        return opened("faulty:memory:", plugins=[faulty_plugin(self._database.open, self.faults)], **sections)


def conversations() -> list[dict[str, Any]]:
    """The sample: 30 sessions with their messages in chat format."""
    with gzip.open(SAMPLE) as lines:
        return [json.loads(line) for line in lines]


class Server:
    """A process that serves, and where. `output` has the lines it has announced itself with."""

    def __init__(self, process: subprocess.Popen[str], output: list[str], errors: IO[str]) -> None:
        self.process = process
        self.output = output
        self.url = output[0].split()[-1]
        self._errors = errors

    @property
    def port(self) -> int:
        return int(self.url.split(":")[2].partition("/")[0])

    def errors(self) -> str:
        """What it has written to standard error."""
        return _written(self._errors)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self, timeout_s: float = START_S) -> int:
        """Wait for its end; its exit code."""
        return self.process.wait(timeout_s)


def _written(file: IO[str]) -> str:
    """All of the file so far. Whoever writes to it goes on where they were: a seek would move them too."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Ours, without what could configure a runtime, and with these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AGENT_RUNTIME__")}
    return {**kept, **variables}


def run(*arguments: str, environ: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    """Run `agent-runtime` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "agent_runtime.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=START_S,
        env=environment(environ),
        check=False,
    )


@contextmanager
def started(command: list[str], lines: int, environ: Mapping[str, str] = {}) -> Iterator[Server]:
    """A process that has announced itself with so many lines. It is ended with SIGTERM if it still runs at the end."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(environ))
        assert process.stdout is not None
        try:
            output = [process.stdout.readline().strip() for _ in range(lines)]
            assert all(output), f"it did not start: {output}, {_written(errors)}"
            yield Server(process, output, errors)
            if process.poll() is None:
                process.terminate()
                process.wait(START_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdout.close()


@contextmanager
def serving(*arguments: str, port: int = 0, environ: Mapping[str, str] = {}) -> Iterator[Server]:
    """`agent-runtime serve`, that has begun to serve."""
    command = [sys.executable, "-m", "agent_runtime.cli", "serve", "--port", str(port), *arguments]
    with started(command, 3, environ) as server:
        yield server


def free_port() -> int:
    """A port that nobody listens to at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def install(directory: Path, name: str, source: str) -> str:
    """Make a distribution with one plugin in a directory, for a process of its own; what to put on PYTHONPATH."""
    metadata = directory / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (directory / f"{name}.py").write_text(source)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[agent_runtime]\n{name} = {name}\n")
    return os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
