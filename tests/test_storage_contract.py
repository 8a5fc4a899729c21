"""Our own storages keep the contract of a storage, on both event loops."""

from __future__ import annotations

import pytest

from agent_runtime.storage import StorageConfig
from agent_runtime_memory import MemoryDatabase
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


def memory() -> Opener:
    database = MemoryDatabase()
    return lambda: database.open(StorageConfig(url="memory:"))


@pytest.fixture(params=[memory])
def new_opener(request: pytest.FixtureRequest) -> NewOpener:
    make: NewOpener = request.param
    return make


class TestBatches(BatchContract): ...


class TestCancellation(CancellationContract): ...


class TestClosing(ClosingContract): ...


class TestLeases(LeaseContract): ...


class TestPurge(PurgeContract): ...


class TestReads(ReadContract): ...


class TestSequences(SequenceContract): ...


class TestSnapshots(SnapshotContract): ...


class TestValues(ValueContract): ...
