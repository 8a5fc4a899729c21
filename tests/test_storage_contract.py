"""Our own storages pass the kit that the authors of others are given, on both event loops."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import anyio
import pytest

from agent_runtime.storage import StorageConfig
from agent_runtime.testing.kit import NewStorage, Opener, StorageKit
from agent_runtime_memory import MemoryDatabase
from agent_runtime_postgresql import open_postgresql
from agent_runtime_sqlite import open_sqlite
from postgres_server import migrated_schema, new_schema, url_of


class TestMemory(StorageKit):
    @pytest.fixture
    def new_storage(self) -> NewStorage:
        def new() -> Opener:
            database = MemoryDatabase()
            return lambda: database.open(StorageConfig(url="memory:"))

        return new


def sqlite_opener(file: Path) -> Opener:
    return lambda: open_sqlite(StorageConfig(url=f"sqlite:///{file}"))


@pytest.fixture(scope="session")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database: to copy it is faster than to migrate a new one for each test."""
    file = tmp_path_factory.mktemp("sqlite") / "empty.db"

    async def make() -> None:
        async with sqlite_opener(file)():
            pass

    anyio.run(make)
    return file


class TestSQLite(StorageKit):
    @pytest.fixture
    def new_storage(self, tmp_path: Path, empty_file: Path) -> NewStorage:
        return lambda: sqlite_opener(Path(shutil.copy(empty_file, tmp_path / f"{uuid.uuid4()}.db")))

    @pytest.fixture
    def untouched_storage(self, tmp_path: Path) -> NewStorage:
        return lambda: sqlite_opener(tmp_path / f"{uuid.uuid4()}.db")


def postgresql_opener(schema: str) -> Opener:
    return lambda: open_postgresql(StorageConfig(url=url_of(schema)))


class TestPostgreSQL(StorageKit):
    @pytest.fixture
    def new_storage(self) -> NewStorage:
        return lambda: postgresql_opener(migrated_schema())

    @pytest.fixture
    def untouched_storage(self) -> NewStorage:
        return lambda: postgresql_opener(new_schema())
