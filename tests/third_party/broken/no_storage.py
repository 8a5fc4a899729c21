"""A plugin that opens something else than a storage."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from agent_runtime import hookimpl
from agent_runtime.storage import StorageConfig


class Bucket:
    async def apply(self) -> None: ...

    def snapshot(self) -> None: ...


@asynccontextmanager
async def open_bucket(config: StorageConfig) -> AsyncIterator[Bucket]:
    yield Bucket()


@hookimpl
def agent_runtime_storages() -> Any:
    return {"broken": open_bucket}
