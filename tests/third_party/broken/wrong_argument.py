"""A plugin whose hook asks for what there is not."""

from collections.abc import Mapping

from agent_runtime import hookimpl
from agent_runtime.storage import StorageConfig, StorageFactory


@hookimpl
def agent_runtime_storages(config: StorageConfig) -> Mapping[str, StorageFactory]:
    return {}
