"""A storage on any engine that keeps bytes under ordered keys and compares and sets: for authors who have one.

An engine is four members: views that are consistent, one call that writes, what it declares and its figures. Everything
else that `storage.Storage` promises is made of those here.

    @asynccontextmanager
    async def open_mine(config: StorageConfig) -> AsyncIterator[Storage]:
        async with connect(config.url) as engine:
            yield KeyedStorage(engine)

The writers of a partition exclude one another on one key, its guard: each write says what it read there, and what it
is to be. So nothing else of an engine's isolation between writers matters.
"""

from .engine import Engine, View
from .storage import KeyedStorage

__all__ = ["Engine", "KeyedStorage", "View"]
