"""A plugin whose factory lacks its decorator."""

from typing import Any

from agent_runtime import hookimpl
from agent_runtime.storage import StorageConfig


async def open_it(config: StorageConfig) -> object:
    return config


@hookimpl
def agent_runtime_storages() -> Any:
    return {"broken": open_it}
