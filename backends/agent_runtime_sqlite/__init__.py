"""The SQLite storage, as a plugin of agent-runtime. Importing it is cheap: the drivers come with the first open."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager

from agent_runtime.hookspecs import hookimpl
from agent_runtime.storage import Storage, StorageConfig, StorageFactory

__all__ = ["agent_runtime_storages", "open_sqlite"]


def open_sqlite(config: StorageConfig) -> AbstractAsyncContextManager[Storage]:
    """Open the database file of a URL such as `sqlite:///relative.db` or `sqlite:////absolute.db`.

    See `settings` for the options, `storage.open_storage` for what happens.
    """
    from .storage import open_storage

    return open_storage(config)


@hookimpl
def agent_runtime_storages() -> Mapping[str, StorageFactory]:
    """The schemes of SQLite."""
    return {"sqlite": open_sqlite, "sqlite+aiosqlite": open_sqlite}
