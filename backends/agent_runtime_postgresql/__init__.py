"""The PostgreSQL storage, as a plugin of agent-runtime. Importing it is cheap: the drivers come with the first open."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager

from agent_runtime.hookspecs import hookimpl
from agent_runtime.storage import Storage, StorageConfig, StorageFactory

__all__ = ["agent_runtime_storages", "open_postgresql"]


def open_postgresql(config: StorageConfig) -> AbstractAsyncContextManager[Storage]:
    """Open the database of a URL such as `postgresql://user:password@host:5432/database`.

    See `settings` for the options, `storage.open_storage` for what happens.
    """
    from .storage import open_storage

    return open_storage(config)


@hookimpl
def agent_runtime_storages() -> Mapping[str, StorageFactory]:
    """The schemes of PostgreSQL."""
    return {
        "postgres": open_postgresql,
        "postgresql": open_postgresql,
        "postgresql+asyncpg": open_postgresql,
    }
