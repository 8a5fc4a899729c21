"""Planned faults of a simulated disk: which call they strike, when, and what happens then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, TypeAlias, get_args

__all__ = ["DISK_CALL_NAMES", "DiskCallName", "DiskFault"]

DiskCallName: TypeAlias = Literal[
    "lock", "names", "create", "read", "unlink", "sync_directory", "write", "truncate", "sync"
]
"""The calls of a directory and of its files that a fault may strike."""

DISK_CALL_NAMES: Final[tuple[DiskCallName, ...]] = get_args(DiskCallName)


class DiskFault:
    """A planned fault. It strikes calls until it is stopped; `hits` tells how many it has struck."""

    def __init__(
        self, name: DiskCallName | None, nth: int | None, done: float, delay_s: float, action: Callable[[], None] | None
    ) -> None:
        if name is not None and name not in DISK_CALL_NAMES:
            raise ValueError(f"{name!r} is not a call of a disk; those are: {', '.join(DISK_CALL_NAMES)}")
        if not 0.0 <= done <= 1.0:
            raise ValueError(f"done is a share, from 0.0 to 1.0, not {done}")
        self.hits = 0
        self.done = done
        self.delay_s = delay_s
        self._name = name
        self._nth = nth
        self._action = action
        self._seen = 0
        self._stopped = False

    def stop(self) -> None:
        """From now on it strikes no call."""
        self._stopped = True

    def strikes(self, name: DiskCallName) -> bool:
        """Whether it is to strike this call, which counts as seen."""
        if self._stopped or self._name not in (None, name):
            return False
        self._seen += 1
        return self._nth in (None, self._seen)

    def strike(self) -> None:
        """Let it happen."""
        self.hits += 1
        if self._action is not None:
            self._action()
