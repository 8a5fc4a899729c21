"""The contract of a storage through PgBouncer in transaction mode, where each transaction may meet another connection.

Run by hand (marked `long`), as it needs the program: `apt install pgbouncer`, or its path in the environment variable
AGENT_RUNTIME_TEST_PGBOUNCER.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from agent_runtime.storage import StorageConfig
from agent_runtime.testing.kit import NewStorage, Opener, StorageKit
from agent_runtime_postgresql import open_postgresql
from postgres_server import migrated_schema, new_schema, server, temporary_directory

pytestmark = pytest.mark.long

ENVIRONMENT = "AGENT_RUNTIME_TEST_PGBOUNCER"
CONNECTIONS = 6
"""Fewer than two storages have, so that they share them; but for each snapshot that a test has open at a time."""


@pytest.fixture(scope="module")
def pgbouncer() -> Iterator[str]:
    """The address of one that runs."""
    program = os.environ.get(ENVIRONMENT) or shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        raise RuntimeError(f"no PgBouncer: apt install pgbouncer, or set {ENVIRONMENT} to its path")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory = temporary_directory()
    target = urlsplit(server().url)
    (directory / "pgbouncer.ini").write_text(
        f"""
[databases]
postgres = host={target.hostname} port={target.port} user={target.username}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
server_round_robin = 1
default_pool_size = {CONNECTIONS}
"""
    )
    user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([program, str(directory / "pgbouncer.ini")], stdout=log, stderr=log, user=user)
    try:
        _wait_for(port, process, directory)
        yield f"postgresql://{target.username}@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(directory)


def _wait_for(port: int, process: subprocess.Popen[bytes], directory: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PgBouncer does not start: {(directory / 'log').read_text()}") from None
            time.sleep(0.02)
        else:
            return


class TestPgBouncer(StorageKit):
    @pytest.fixture
    def new_storage(self, pgbouncer: str) -> NewStorage:
        def new() -> Opener:
            url = f"{pgbouncer}?schema={migrated_schema()}"
            return lambda: open_postgresql(StorageConfig(url=url))

        return new

    @pytest.fixture
    def untouched_storage(self, pgbouncer: str) -> NewStorage:
        def new() -> Opener:
            url = f"{pgbouncer}?schema={new_schema()}"
            return lambda: open_postgresql(StorageConfig(url=url))

        return new
