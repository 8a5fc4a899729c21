"""A plugin that stores under another one's scheme."""

from typing import Any

from agent_runtime import hookimpl


@hookimpl
def agent_runtime_storages() -> Any:
    return {"sqlite": print}
