"""The reference storage: a database in memory, in plain dicts. Stored batches survive nothing, not even the process.

The URL is `memory:`, without options; each open of it is a fresh database. To open one database several times, make a
`MemoryDatabase` and hand its plugin to the runtime: `open_runtime("memory:", plugins=[MemoryPlugin(database)])`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager

from agent_runtime.hookspecs import hookimpl
from agent_runtime.storage import Storage, StorageConfig, StorageFactory

from .storage import MemoryDatabase

__all__ = ["MemoryDatabase", "MemoryPlugin"]


def _open_fresh(config: StorageConfig) -> AbstractAsyncContextManager[Storage]:
    return MemoryDatabase().open(config)


@hookimpl
def agent_runtime_storages() -> Mapping[str, StorageFactory]:
    """`memory:` opens a fresh database each time."""
    return {"memory": _open_fresh}


class MemoryPlugin:
    """A plugin whose `memory:` opens the same database each time."""

    def __init__(self, database: MemoryDatabase) -> None:
        self._database = database

    @hookimpl
    def agent_runtime_storages(self) -> Mapping[str, StorageFactory]:
        """`memory:` opens the shared database."""
        return {"memory": self._database.open}
