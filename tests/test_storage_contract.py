"""Our own storages keep the contract of a storage, on both event loops."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import anyio
import pytest

from agent_runtime.storage import StorageConfig
from agent_runtime_memory import MemoryDatabase
from agent_runtime_sqlite import open_sqlite
from storage_contract import (
    BatchContract,
    CancellationContract,
    ClosingContract,
    LeaseContract,
    PurgeContract,
    ReadContract,
    SequenceContract,
    SnapshotContract,
    ValueContract,
)
from storage_contract.kit import NewOpener, Opener


def memory_opener() -> Opener:
    database = MemoryDatabase()
    return lambda: database.open(StorageConfig(url="memory:"))


def sqlite_opener(file: Path) -> Opener:
    return lambda: open_sqlite(StorageConfig(url=f"sqlite:///{file}"))


@pytest.fixture(scope="session")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite database: to copy it is faster than to migrate a new one for each test."""
    file = tmp_path_factory.mktemp("sqlite") / "empty.db"

    async def make() -> None:
        async with sqlite_opener(file)():
            pass

    anyio.run(make)
    return file


@pytest.fixture(params=["memory", "sqlite"])
def new_opener(request: pytest.FixtureRequest, tmp_path: Path, empty_file: Path) -> NewOpener:
    def new_sqlite_opener() -> Opener:
        return sqlite_opener(Path(shutil.copy(empty_file, tmp_path / f"{uuid.uuid4()}.db")))

    return memory_opener if request.param == "memory" else new_sqlite_opener


class TestBatches(BatchContract): ...


class TestCancellation(CancellationContract):
    @pytest.fixture(params=["memory", "sqlite"])
    def new_opener(self, request: pytest.FixtureRequest, tmp_path: Path) -> NewOpener:
        """Nothing is prepared: opening is cancelled while it migrates, too."""
        return memory_opener if request.param == "memory" else lambda: sqlite_opener(tmp_path / f"{uuid.uuid4()}.db")


class TestClosing(ClosingContract): ...


class TestLeases(LeaseContract): ...


class TestPurge(PurgeContract): ...


class TestReads(ReadContract): ...


class TestSequences(SequenceContract): ...


class TestSnapshots(SnapshotContract): ...


class TestValues(ValueContract): ...
