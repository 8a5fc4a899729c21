"""Opening a PostgreSQL database: the URL, TLS, the state it is found in; each refusal is one line with a way out."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import anyio
import msgspec
import pytest
import trustme

import agent_runtime_postgresql
import agent_runtime_sql.schema
from agent_runtime import load_config
from agent_runtime.errors import AgentRuntimeError, InvalidInput, StorageFatal, StorageUnavailable
from agent_runtime.storage import StorageConfig, Survival
from agent_runtime.testing.kit.writer import writing
from agent_runtime_postgresql import agent_runtime_storages, open_postgresql
from agent_runtime_postgresql.settings import Settings, parse_settings
from places import in_schema
from postgres_proxy import proxied
from postgres_server import (
    PASSWORD_USER,
    Server,
    migrated_schema,
    new_schema,
    server,
    start,
    temporary_directory,
    url_of,
)

pytestmark = pytest.mark.anyio

SECRET = "s3cr3t"


async def refusal(url: str, **options: Any) -> AgentRuntimeError:
    """The error of opening: one line, without the password."""
    with pytest.raises(AgentRuntimeError) as caught:
        async with open_postgresql(StorageConfig(url=url, options=options)):
            pass
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    return caught.value


def at(base: str, *, user: str | None = None, database: str | None = None, query: str = "") -> str:
    """The URL of a server, with other parts."""
    parts = urlsplit(base)
    netloc = parts.netloc if user is None else f"{user}@{parts.netloc.rpartition('@')[2]}"
    return urlunsplit(parts._replace(netloc=netloc, path=f"/{database}" if database else parts.path, query=query))


# The URL and the options


@pytest.mark.parametrize("scheme", agent_runtime_storages())
def test_urls(scheme: str) -> None:
    settings = parse_settings(
        StorageConfig(
            url=f"{scheme}://me:{SECRET}%23@db.example.org:6543/app?sslmode=require&pool_size=9&connect_timeout=3"
            "&application_name=mine&options=-c%20work_mem%3D8MB&target_session_attrs=primary",
            options={"pool_size": 7, "schema": "own"},
        )
    )
    assert settings.dsn == (
        f"postgresql://me:{SECRET}%23@db.example.org:6543/app"
        "?sslmode=require&options=-c%20work_mem%3D8MB&target_session_attrs=primary"
    )
    assert settings.name == "the database app at db.example.org:6543"
    assert (settings.pool_size, settings.schema, settings.application_name) == (7, "own", "mine")
    assert (settings.connect_timeout_s, settings.local) == (3.0, False)


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("postgresql:///app", True),
        ("postgresql://localhost/app", True),
        ("postgresql://127.0.0.1:5433/app", True),
        ("postgresql://[::1]:5433/app", True),
        ("postgresql://me@/app?host=/run/postgresql", True),
        ("postgresql://db.example.org/app", False),
        ("postgresql://10.0.0.7/app", False),
        ("postgresql://[2001:db8::7]/app", False),
        ("postgresql://localhost,db.example.org/app", False),
        ("postgresql://me@/app?host=db.example.org", False),
    ],
)
def test_a_server_on_another_machine_survives_the_loss_of_this_one(
    url: str, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGHOST", raising=False)
    assert parse_settings(StorageConfig(url=url)).local is local
    monkeypatch.setenv("PGHOST", "db.example.org")
    assert parse_settings(StorageConfig(url="postgresql:///app")).local is False


@pytest.mark.parametrize(
    ("url", "options", "path", "hint"),
    [
        ("postgresql:app", {}, "storage.url", "postgresql://user"),
        ("postgresql://[::1/app", {}, "storage.url", "postgresql://user"),
        (f"postgresql://me:{SECRET}#4@db/app", {}, "storage.url", "%23"),
        ("postgresql://db/app?sslmod=require", {}, "storage.url.sslmod", "nearest is sslmode"),
        ("postgresql://db/app?sslmode=on", {}, "storage.url.sslmode", "Invalid enum value"),
        ("postgresql://db/app?sslrootcert=/no/such.pem", {}, "storage.url.sslrootcert", "no file"),
        ("postgresql://db/app?channel_binding=require", {}, "storage.url.channel_binding", "Invalid enum value"),
        ("postgresql://db/app?pool_size=1", {}, "storage.url.pool_size", ">= 2"),
        ("postgresql://db/app?connect_timeout=soon", {}, "storage.url.connect_timeout", "int"),
        ("postgresql://db/app", {"pool": 3}, "storage.options.pool", "nearest is pool_size"),
        ("postgresql://db/app", {"sslmode": "require"}, "storage.options.sslmode", "no such option"),
        ("postgresql://db/app", {"schema": 'a"b'}, "storage.options.schema", "regex"),
        ("postgresql://db/app", {"lock_timeout_s": 0}, "storage.options.lock_timeout_s", "> 0"),
        ("postgresql://db/app", {"dsn": "x"}, "storage.options.dsn", "no such option"),
    ],
)
async def test_urls_and_options_that_are_refused(url: str, options: dict[str, Any], path: str, hint: str) -> None:
    error = await refusal(url, **options)
    assert isinstance(error, InvalidInput)
    assert (error.path, hint in error.problem) == (path, True)


# The server


async def test_servers_that_are_not_there(tmp_path: Path) -> None:
    for url in (
        f"postgresql://me:{SECRET}@127.0.0.1:1/app",
        f"postgresql://me:{SECRET}@nowhere.invalid/app",
        f"postgresql://me:{SECRET}@/app?host={tmp_path}",
    ):
        error = await refusal(url)
        assert isinstance(error, StorageUnavailable)
        assert "the database app at" in str(error)
        assert "can't be reached" in str(error)


async def test_credentials_and_databases_that_are_refused() -> None:
    server().directory  # noqa: B018 - one of our own, where passwords are asked for
    exists = f"SELECT FROM pg_roles WHERE rolname = '{PASSWORD_USER}'"
    server().execute(
        f"DO $$ BEGIN IF NOT EXISTS ({exists}) THEN CREATE ROLE {PASSWORD_USER} LOGIN PASSWORD 'right'; END IF; END $$"
    )
    for url, problem in (
        (at(server().url, user=f"{PASSWORD_USER}:{SECRET}"), "refuses this user"),
        (at(server().url, user=PASSWORD_USER), "refuses this user"),
        (at(server().url, user=f"stranger:{SECRET}"), "refuses this user"),
        (at(server().url, database="nowhere"), "does not exist"),
        (at(server().url, user=f"{PASSWORD_USER}:right", query="schema=not_permitted"), "does not permit it"),
    ):
        error = await refusal(url)
        assert isinstance(error, StorageFatal)
        assert problem in str(error)


async def test_too_many_connections_may_pass() -> None:
    role = new_schema()
    server().execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 0")
    try:
        error = await refusal(at(server().url, user=role))
    finally:
        server().execute(f"DROP ROLE {role}")
    assert isinstance(error, StorageUnavailable)
    assert "too many connections" in str(error)


async def test_a_database_that_can_only_be_read_may_become_the_primary() -> None:
    error = await refusal(url_of(migrated_schema(), options="-c%20default_transaction_read_only%3Don"))
    assert isinstance(error, StorageUnavailable)
    assert "can't be written: it is a standby" in str(error)


async def test_a_database_in_another_encoding_is_refused() -> None:
    database = new_schema()
    server().execute(f"CREATE DATABASE {database} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        error = await refusal(at(server().url, database=database))
    finally:
        server().execute(f"DROP DATABASE {database}")
    assert isinstance(error, StorageFatal)
    assert "ENCODING 'UTF8'" in str(error)


# Tables


def shape(schema: str) -> list[tuple[Any, ...]]:
    """Columns, indexes and constraints."""
    columns = """SELECT table_name::text, column_name::text, data_type::text, collation_name::text, is_nullable::text
        FROM information_schema.columns WHERE table_schema = $1 AND table_name <> 'agent_runtime_version'"""
    indexes = "SELECT tablename::text, replace(indexdef, schemaname, '') FROM pg_indexes WHERE schemaname = $1"
    constraints = """SELECT conrelid::regclass::text, replace(pg_get_constraintdef(oid), $1 || '.', '')
        FROM pg_constraint WHERE connamespace = $1::regnamespace AND contype <> 'n'"""
    found = [row for query in (columns, indexes, constraints) for row in server().rows(query, schema, schema=schema)]
    return sorted(row for row in found if "agent_runtime_version" not in str(row))


async def test_migrations_make_the_tables_of_the_metadata() -> None:
    schema = new_schema()
    async with open_postgresql(StorageConfig(url=url_of(schema))):
        assert shape(schema) == shape(migrated_schema())
    types = {row[:2]: row[2] for row in shape(schema) if len(row) == 5}
    assert types["messages", "tool_calls"] == "json"
    assert types["messages", "created_at"] == "timestamp with time zone"
    assert types["messages", "content"] == "text"


async def test_opening_again_changes_nothing() -> None:
    schema = new_schema()
    for _ in range(2):
        async with writing(lambda: open_postgresql(StorageConfig(url=url_of(schema)))) as writer:
            await writer.create(f"session {writer.fence.epoch}")
    assert server().rows("SELECT count(*) FROM sessions", schema=schema) == [(2,)]


def test_processes_that_start_at_once_migrate_once() -> None:
    schema = new_schema()
    program = f"""
import anyio
from agent_runtime.storage import StorageConfig, Survival
from agent_runtime_postgresql import open_postgresql

async def main():
    async with open_postgresql(StorageConfig(url={url_of(schema)!r})) as storage:
        async with storage.snapshot() as snapshot:
            assert snapshot.watermark == 0

anyio.run(main)
"""
    processes = [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(process.communicate(timeout=60)[1], process.returncode) for process in processes] == [("", 0)] * 3
    assert server().rows("SELECT version_num FROM agent_runtime_version", schema=schema) == [
        (agent_runtime_sql.schema.HEAD,)
    ]


async def test_a_newer_schema_and_tables_of_others_are_refused() -> None:
    newer, taken = migrated_schema(), new_schema()
    server().execute("UPDATE agent_runtime_version SET version_num = '9999'", schema=newer)
    server().execute(f"CREATE SCHEMA {taken}; CREATE TABLE {taken}.messages (id int)")
    for schema, problem in ((newer, "newer than schema"), (taken, "holds a table 'messages'")):
        error = await refusal(url_of(schema))
        assert isinstance(error, StorageFatal)
        assert problem in str(error)
    assert server().rows("SELECT table_name::text FROM information_schema.tables WHERE table_schema = $1", taken) == [
        ("messages",)
    ]


# TLS


class Authority:
    """The file of an authority, and the certificate of a server on this machine that it has signed."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._authority = trustme.CA()
        self.file = directory / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.file))

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert("127.0.0.1").configure_cert(context)
        return context


async def test_tls(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path / "trusted"), Authority(tmp_path / "stranger")
    with proxied(url_of(migrated_schema()), authority.context()) as proxy:
        for query in (
            "sslmode=require",
            f"sslmode=verify-ca&sslrootcert={authority.file}",
            f"sslmode=verify-full&sslrootcert={authority.file}",
        ):
            before = proxy.secured
            async with open_postgresql(StorageConfig(url=f"{proxy.url}&{query}")) as storage, storage.snapshot():
                assert proxy.secured > before, query
        for query in (
            f"sslmode=verify-ca&sslrootcert={stranger.file}",
            f"sslmode=verify-full&sslrootcert={stranger.file}",
        ):
            error = await refusal(f"{proxy.url}&{query}")
            assert isinstance(error, StorageFatal), query
            assert "TLS fails" in str(error)
        # The name in the certificate is 127.0.0.1 alone.
        by_name = proxy.url.replace("127.0.0.1", "localhost")
        error = await refusal(f"{by_name}&sslmode=verify-full&sslrootcert={authority.file}")
        assert isinstance(error, StorageFatal)
        assert isinstance(await refusal(f"{proxy.url}&sslmode=disable"), StorageUnavailable)


async def test_tls_that_the_server_has_not() -> None:
    error = await refusal(url_of(migrated_schema(), sslmode="require"))
    assert isinstance(error, StorageUnavailable)
    assert "SSL" in str(error)


# What a stored batch survives


@pytest.fixture
def own_server() -> Iterator[Server]:
    directory = temporary_directory()
    running = start(directory)
    try:
        yield running
    finally:
        running.stop()
        shutil.rmtree(directory)


def test_a_server_without_fsync_survives_nothing(own_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async def survives() -> Survival:
        async with open_postgresql(StorageConfig(url=own_server.url)) as storage:
            return storage.abilities.survives

    assert anyio.run(survives) == "power"
    assert not caplog.records
    own_server.execute("ALTER SYSTEM SET fsync = off")
    own_server.execute("SELECT pg_reload_conf()")
    assert anyio.run(survives) == "nothing"
    assert "fsync=off" in caplog.text


# Documents

DOCUMENT = Path(agent_runtime_postgresql.__file__).parent / "README.md"
CONFIG = Path(__file__).parent.parent / "configs" / "postgresql.yaml"


def test_the_options_and_parameters_are_described() -> None:
    text = DOCUMENT.read_text()
    options = dict(re.findall(r"^\| `(\w+)` \| `([\w.-]+)` \|", text, re.MULTILINE))
    fields = msgspec.structs.fields(Settings)
    assert options == {field.name: f"{field.default}" for field in fields if not field.required}
    (named,) = re.findall(r"\*\*libpq's parameters\*\*.*?Any other is refused", text, re.DOTALL)
    for name in re.findall(r"`([a-z_]+)`", named):
        with pytest.raises(InvalidInput) as caught:
            parse_settings(StorageConfig(url=f"postgresql://db/app?{name}=x", options={"no": "such"}))
        assert "nearest" not in caught.value.problem or caught.value.path == "storage.options.no", name


def test_the_queries_of_the_document_run(anyio_backend: Any, tmp_path: Path) -> None:
    place = in_schema(tmp_path)
    with place.open_blocking(loop=anyio_backend) as runtime:
        session = runtime.create_session("s1", user_id="ada")
        session.append("assistant", tool_calls=[{"id": "c", "function": {"name": "f"}}])
    (schema,) = re.findall(r"schema=(\w+)", place.url)
    (block,) = re.findall(r"```sql\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    queries = [query for query in block.split(";") if query.strip()]
    assert len(queries) == 3
    for query in queries:
        assert server().rows(query, schema=schema), query


def test_the_example_of_a_configuration_is_accepted() -> None:
    config = load_config(CONFIG, environ={})
    settings = parse_settings(StorageConfig(url=config.storage.url, options=dict(config.storage.options)))
    assert settings.name == "the database agent_runtime at localhost:5432"
    assert config.journal.directory == "data/journal"
