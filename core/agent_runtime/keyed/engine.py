"""What is asked of an engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from ..storage import Abilities, PoolFigures

__all__ = ["Engine", "View"]


class View(Protocol):
    """What the engine held at one moment. Not used by two tasks at once; once it has ended its calls raise."""

    async def get(self, keys: Collection[bytes]) -> Mapping[bytes, bytes]:
        """Those of the keys that are there, with their values."""

    async def scan(
        self, start: bytes, end: bytes, *, limit: int, reverse: bool = False
    ) -> Sequence[tuple[bytes, bytes]]:
        """The keys with `start` <= key < `end`, by the value of their bytes, with their values; at most `limit`."""


class Engine(Protocol):
    """Bytes under ordered keys. Keys are up to 2 KiB long, values as long as what people say.

    Its errors are `StorageUnavailable` and `StorageFatal`, without anything of keys or values in their messages. A
    cancelled call leaves nothing running.
    """

    @property
    def abilities(self) -> Abilities:
        """What it declares."""

    def view(self) -> AbstractAsyncContextManager[View]:
        """What is there now: with every commit that returned before, and for as long as it is open no later one."""

    async def commit(
        self, guard: bytes, expected: bytes | None, puts: Mapping[bytes, bytes], deletes: Collection[bytes]
    ) -> bool:
        """In one transaction, if the value of `guard` is `expected` (None: it is not there): delete, then put.

        `puts` has `guard`, too: of two commits that expect the same there, one finds it changed. Returns whether it
        wrote. Once it returned the write is as safe as the abilities declare. If it raises, all is written or nothing.
        """

    def figures(self) -> PoolFigures:
        """Connections; synchronous and cheap."""
