"""The PostgreSQL storage through PgBouncer, which gives each transaction another connection to the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import anyio
import asyncpg
import pytest

import pgbouncer
from agent_runtime.storage import StorageConfig
from agent_runtime.testing.kit import NewStorage, Opener, StorageKit
from agent_runtime_postgresql import open_postgresql
from pgbouncer import bounced
from postgres_server import migrated_schema, new_schema, server, url_of
from test_postgresql import ended_mid_commit

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def pooled() -> Iterator[str]:
    with bounced(server().url) as url:
        yield url


def opener_of(pooled: str, schema: str) -> Opener:
    url = urlunsplit(urlsplit(url_of(schema))._replace(netloc=urlsplit(pooled).netloc))
    return lambda: open_postgresql(StorageConfig(url=url, options={"application_name": schema}))


class TestPostgreSQLThroughPgBouncer(StorageKit):
    @pytest.fixture
    def new_storage(self, pooled: str) -> NewStorage:
        return lambda: opener_of(pooled, migrated_schema())

    @pytest.fixture
    def untouched_storage(self, pooled: str) -> NewStorage:
        return lambda: opener_of(pooled, new_schema())


def test_a_connection_is_another_one_after_each_transaction(pooled: str) -> None:
    """What the others stand on."""

    async def pids() -> set[int]:
        connections = [await asyncpg.connect(pooled, statement_cache_size=0) for _ in range(3)]
        try:
            await asyncio.gather(*(each.execute("SELECT pg_sleep(0.2)") for each in connections))  # side by side
            return {await connections[0].fetchval("SELECT pg_backend_pid()") for _ in range(10)}
        finally:
            for connection in connections:
                await connection.close()

    assert len(anyio.run(pids)) >= 3


@pytest.mark.anyio
@pytest.mark.timeout(600)
async def test_connections_ended_in_the_middle_of_200_commits(pooled: str) -> None:
    schema = migrated_schema()
    await ended_mid_commit(schema, opener_of(pooled, schema), 200)


def test_without_a_pgbouncer_these_tests_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(pgbouncer.ENVIRONMENT, raising=False)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="no PgBouncer: install it"), bounced(f"postgresql://{tmp_path.name}"):
        pass
