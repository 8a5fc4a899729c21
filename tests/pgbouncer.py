"""PgBouncer before the PostgreSQL server of the tests, so that a connection is another one after each transaction.

The binary is the one that AGENT_RUNTIME_TEST_PGBOUNCER names, or that of the PATH (Debian: `apt-get install
pgbouncer`); without any it is an error.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit, urlunsplit

from http_rig import free_port
from postgres_server import command, temporary_directory

ENVIRONMENT: Final = "AGENT_RUNTIME_TEST_PGBOUNCER"
_START_TIMEOUT_S: Final = 10.0
_CONNECTIONS: Final = 6
"""Fewer than two storages have, so that they share them."""
# Round robin: so the next transaction meets another connection, also where nobody else is in the way.
_SETTINGS: Final = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listens}
unix_socket_dir =
auth_type = trust
auth_file = {users}
pool_mode = transaction
default_pool_size = {connections}
min_pool_size = 3
server_round_robin = 1
max_client_conn = 500
"""


def binary() -> Path:
    """Where PgBouncer is. Raises RuntimeError when there is none."""
    found = os.environ.get(ENVIRONMENT) or shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        raise RuntimeError(f"no PgBouncer: install it (Debian: apt-get install pgbouncer), or set {ENVIRONMENT} to it")
    return Path(found)


@contextmanager
def bounced(url: str) -> Iterator[str]:
    """A PgBouncer before the server of a URL, which pools transactions: the URL that leads through it."""
    program, target, port = binary(), urlsplit(url), free_port()
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    directory = temporary_directory()
    users, settings, log = (directory / name for name in ("users", "settings", "log"))
    users.write_text(f'"{unquote(target.username or "postgres")}" "{unquote(target.password or "")}"\n')
    settings.write_text(
        _SETTINGS.format(
            host=target.hostname, port=target.port or 5432, listens=port, users=users, connections=_CONNECTIONS
        )
    )
    try:
        with log.open("wb") as said:
            process = subprocess.Popen([*command(program, user, os.getpid()), str(settings)], stdout=said, stderr=said)
        try:
            _wait(process, port, log)
            name = target.netloc.rpartition("@")[0]
            yield urlunsplit(target._replace(netloc=f"{name}@127.0.0.1:{port}"))
        finally:
            process.terminate()
            process.wait()
    finally:
        shutil.rmtree(directory)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PgBouncer does not start: {log.read_text()}") from error
            time.sleep(0.01)
        else:
            return
