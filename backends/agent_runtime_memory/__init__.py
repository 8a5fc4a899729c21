"""The reference storage: a database in memory, in plain dicts. Stored batches survive nothing, not even the process.

The URL is `memory:`, without options; each open of it is a fresh database. To open one database several times, make a
`MemoryDatabase` and hand in a plugin for it, under a scheme of its own:
`open_runtime("shared:", plugins=[MemoryPlugin(database, scheme="shared")])`.
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
    """A plugin whose URL, `scheme` and a colon, opens the same database each time.

    With the scheme `memory` it takes the place of the installed plugin of that name, which must be disabled then.
    """

    def __init__(self, database: MemoryDatabase, *, scheme: str = "memory") -> None:
        self._database = database
        self._scheme = scheme

    @hookimpl
    def agent_runtime_storages(self) -> Mapping[str, StorageFactory]:
        """The shared database."""
        return {self._scheme: self._database.open}
