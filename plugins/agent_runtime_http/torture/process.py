"""The server, as a process of its own that can be killed at any moment."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL
from typing import Final

import anyio
from anyio.abc import Process

from .wire import Unanswered, Wire

__all__ = ["Gone", "Server", "started"]

_SERVE: Final = ("agent_runtime.cli", "serve")
_FAILPOINTS: Final = "agent_runtime.testing.failpoints"
_POLL_S: Final = 0.004
_START_S: Final = 120.0
_RECOVERED: Final = re.compile(rb"recovered (\d+) change\(s\) from the journal")


class Gone(Exception):
    """The server has ended, or does not become ready."""


class Server:
    """One process. `log` is the file with all that servers have said on standard error; it began at `offset`."""

    def __init__(self, process: Process, port: int, log: Path, offset: int) -> None:
        self.port: Final = port
        self.ended: Final = anyio.Event()
        self.start_s = 0.0
        self._process = process
        self._log = log
        self._offset = offset
        self._started_at = time.monotonic()

    async def watch(self) -> None:
        """Until it has ended."""
        await self._process.wait()
        self.ended.set()

    @property
    def code(self) -> int:
        """Its exit code, below zero for a signal. Once it has ended."""
        code = self._process.returncode
        if code is None:
            raise RuntimeError("the server has not ended")
        return code

    async def listening(self) -> None:
        """Wait until it takes connections: what it says from then on comes while it opens, and recovers.

        Raises:
            Gone: it has ended, or takes too long.
        """
        while True:
            try:
                stream = await anyio.connect_tcp("127.0.0.1", self.port)
            except OSError:
                await self._pause()
            else:
                await stream.aclose()
                return

    async def ready(self) -> None:
        """Wait until it serves. Raises as `listening`."""
        wire = Wire(self.port)
        try:
            while (await wire.ask("GET", "/readyz")).status != 200:
                await self._pause()
        except Unanswered as error:
            raise Gone from error
        finally:
            await wire.aclose()
        self.start_s = time.monotonic() - self._started_at

    async def _pause(self) -> None:
        if self.ended.is_set() or time.monotonic() - self._started_at > _START_S:
            raise Gone
        await anyio.sleep(_POLL_S)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its process group."""
        if not self.ended.is_set() and self._process.returncode is None:
            os.killpg(self._process.pid, number)

    def said(self) -> bytes:
        """What it has said on standard error."""
        with self._log.open("rb") as file:
            file.seek(self._offset)
            return file.read()

    def last_words(self) -> str:
        """The last line of what it has said."""
        lines = self.said().decode(errors="replace").splitlines()
        return lines[-1].removeprefix("agent-runtime: ") if lines else "it said nothing"

    def recovered(self) -> int:
        """How many changes it says that it has recovered."""
        return sum(map(int, _RECOVERED.findall(self.said())))


@asynccontextmanager
async def started(
    arguments: Sequence[str], environ: Mapping[str, str], log: Path, failpoint: str | None = None
) -> AsyncIterator[Server]:
    """`agent-runtime serve` with these arguments, and under a failpoint if one is given. It is dead afterwards.

    Whoever starts it runs its `watch`.
    """
    port = _free_port()
    module = _SERVE if failpoint is None else (_FAILPOINTS, failpoint, *_SERVE)
    command = [sys.executable, "-m", *module, "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("ab") as errors:
        offset = errors.tell()
        process = await anyio.open_process(
            command, stdin=DEVNULL, stdout=DEVNULL, stderr=errors, env=environ, start_new_session=True
        )
    server = Server(process, port, log, offset)
    try:
        yield server
    finally:
        with anyio.CancelScope(shield=True):
            server.signal(signal.SIGKILL)
            await process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
