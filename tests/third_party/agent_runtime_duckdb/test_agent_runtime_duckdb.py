"""The storage keeps every promise of a storage, on asyncio and trio."""

from itertools import count
from pathlib import Path

import pytest
from agent_runtime_duckdb import open_duckdb

from agent_runtime.storage import StorageConfig
from agent_runtime.testing.kit import NewStorage, Opener, StorageKit


class TestDuckDB(StorageKit):
    @pytest.fixture
    def new_storage(self, tmp_path: Path) -> NewStorage:
        numbers = count(1)

        def new() -> Opener:
            config = StorageConfig(url=f"duckdb:///{tmp_path}/{next(numbers)}.duckdb")
            return lambda: open_duckdb(config)

        return new
