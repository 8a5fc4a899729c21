"""What the tests of the command line run commands with."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import patch

import anyio
import pytest

from agent_runtime.cli import main
from agent_runtime.storage import StorageConfig
from agent_runtime_sqlite.storage import open_storage
from places import in_file

COMMAND = (sys.executable, "-m", "agent_runtime.cli")


class Shell:
    """Runs commands in a directory, on an SQLite file there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.database = in_file(directory).path
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("AGENT_RUNTIME") and name not in ("LOG_LEVEL", "COLUMNS", "NO_COLOR", "FORCE_COLOR")
        } | {"AGENT_RUNTIME__STORAGE__URL": f"sqlite:///{self.database}", "TERM": "xterm"}

    def start(
        self, *arguments: str, stdin: int = subprocess.DEVNULL, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """A command that runs."""
        return subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=self.directory,
            env=self.environment | (environment or {}),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(
        self, *arguments: str, code: int = 0, given: bytes = b"", environment: dict[str, str] | None = None
    ) -> tuple[str, list[str]]:
        """Run a command: what it printed, and the lines on standard error. It must end with `code`."""
        with self.start(*arguments, stdin=subprocess.PIPE, environment=environment) as process:
            output, errors = process.communicate(given, timeout=60)
        assert (process.returncode, b"Traceback" in errors) == (code, False), errors.decode()
        return output.decode(), errors.decode().splitlines()

    def here(self, *arguments: str, code: int = 0, environment: dict[str, str] | None = None) -> tuple[str, list[str]]:
        """As `run`, but in this process, which is a lot faster."""
        output, errors = TextIOWrapper(BytesIO(), "utf-8"), TextIOWrapper(BytesIO(), "utf-8")
        with redirect_stdout(output), redirect_stderr(errors):
            ended = self._main(arguments, environment)
        for stream in (output, errors):
            stream.seek(0)
        told = errors.read()
        assert (ended, "Traceback" in told) == (code, False), told
        return output.read(), told.splitlines()

    def fails(self, *arguments: str, code: int = 1, environment: dict[str, str] | None = None) -> str:
        """Run a command, in this process, that fails with one clear line; that."""
        output, errors = self.here(*arguments, code=code, environment=environment)
        assert output == ""
        assert len(errors) == 1
        assert errors[0].startswith("agent-runtime: ")
        return errors[0].removeprefix("agent-runtime: ")

    def make_tables(self, name: str) -> None:
        """A database that no runtime ever had open."""

        async def make() -> None:
            async with open_storage(StorageConfig(url=f"sqlite:///{self.directory / name}")):
                """Opening makes them."""

        anyio.run(make)

    def file(self, name: str, *lines: dict[str, Any]) -> str:
        """A file of JSON Lines; its name."""
        (self.directory / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return name

    def on_terminal(self, *arguments: str, typed: str = "", columns: int = 100) -> tuple[int, str]:
        """Run a command, in this process, on a terminal where `typed` is typed: its exit code and what is seen."""
        ours, theirs = pty.openpty()
        shown = bytearray()
        reader = Thread(target=lambda: shown.extend(b"".join(iter(lambda: _read(ours), b""))))
        reader.start()
        os.write(ours, typed.encode())
        with os.fdopen(theirs, "r+b", buffering=0) as terminal:
            streams = [
                TextIOWrapper(terminal, "utf-8", write_through=True, newline=newline) for newline in (None, "", "")
            ]
            with patch.multiple(sys, stdin=streams[0], stdout=streams[1], stderr=streams[2]):
                code = self._main(arguments, {"COLUMNS": str(columns)})
        reader.join()
        os.close(ours)
        return code, shown.decode().replace("\r\n", "\n")

    def _main(self, arguments: Sequence[str], environment: dict[str, str] | None) -> Any:
        with (
            patch.dict(os.environ, self.environment | (environment or {}), clear=True),
            patch.object(sys, "argv", ["agent-runtime", *arguments]),
            chdir(self.directory),
            logging_restored(),
            pytest.raises(SystemExit) as end,
        ):
            main()
        return end.value.code


@contextmanager
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux tells that nobody has the other end any more
        return b""


def chat(session_id: str, *contents: str, **fields: Any) -> dict[str, Any]:
    return {"session_id": session_id, "messages": [{"role": "user", "content": each} for each in contents]} | fields
