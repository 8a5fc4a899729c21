"""Failpoints: a process that kills itself at a named point, so that whoever starts it again sees what is left.

    python -m agent_runtime.testing.failpoints journal.write:torn:3 agent_runtime.cli serve --storage …

runs the module with its arguments until the journal's third write has written half of its bytes; then the process is
gone, as with `kill -9`. A point is `journal.` or `storage.` with the name of a call, and a moment:

| moment | the process dies |
|---|---|
| `before` | when the call is made, before it does anything |
| `torn` | in the midst of it: half of the bytes are written (`journal.write` only) |
| `after` | when it has had its effect, before the caller learns of it |

Calls of the journal are those of its files that change something; calls of the storage are `faults.CALL_NAMES`, and
`storage.apply` is the one that commits. A point that is never come to kills nobody. Only this module puts failpoints
anywhere: the runtime knows none, and reads no variable for them.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import BinaryIO, Final, NoReturn, TypeVar

from agent_runtime import directories
from agent_runtime.changes import Batch
from agent_runtime.journal import JournalFiles, LocalFiles, SegmentFile
from agent_runtime.plugins import PluginManager
from agent_runtime.storage import Storage, StorageConfig, StorageFactory

from .faults import CALL_NAMES, CallName, Faults
from .faulty import FaultyStorage

__all__ = ["FAILPOINTS", "JOURNAL_CALLS", "Failpoint", "FailpointFiles", "install", "kill"]

JOURNAL_CALLS: Final = ("write", "sync", "create", "truncate", "unlink", "sync_directory")
FAILPOINTS: Final = (
    "journal.write:torn",
    *(f"journal.{call}:{moment}" for call in JOURNAL_CALLS for moment in ("before", "after")),
    *(f"storage.{call}:{moment}" for call in CALL_NAMES for moment in ("before", "after")),
)
"""Every point, with its moment."""

T = TypeVar("T")


def kill(point: str) -> NoReturn:
    """End this process as `kill -9` does; the last thing it says on standard error is where."""
    os.write(2, f"killed at {point}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(f"survived {point}")


class Failpoint:
    """Strikes the `nth` time that `point` is come to: `end` is called with its name, and does not return."""

    def __init__(self, point: str, nth: int = 1, *, end: Callable[[str], NoReturn] = kill) -> None:
        if point not in FAILPOINTS:
            raise ValueError(f"{point!r} is not a failpoint; those are: {', '.join(FAILPOINTS)}")
        if nth < 1:
            raise ValueError("points are counted from 1")
        self.point: Final = point
        self._left = nth
        self._end = end

    @classmethod
    def parse(cls, text: str) -> Failpoint:
        """The failpoint that `POINT:MOMENT[:NTH]` names.

        Raises:
            ValueError: it names none.
        """
        call, _, rest = text.partition(":")
        moment, colon, nth = rest.partition(":")
        if colon and not nth.isdecimal():
            raise ValueError(f"{text!r} ends with {nth!r}, not with the number of a time")
        return cls(f"{call}:{moment}", int(nth) if colon else 1)

    def strikes(self, point: str) -> bool:
        """Whether it is to strike now, as the process has come to a point."""
        if point != self.point:
            return False
        self._left -= 1
        return self._left == 0

    def reach(self, point: str) -> None:
        """The process has come to a point."""
        if self.strikes(point):
            self._end(point)

    @contextmanager
    def around(self, call: str) -> Iterator[None]:
        """The process makes a call."""
        self.reach(f"{call}:before")
        yield
        self.reach(f"{call}:after")


class _Segment:
    def __init__(self, inner: SegmentFile, failpoint: Failpoint) -> None:
        self._inner = inner
        self._failpoint = failpoint

    def write(self, data: bytes) -> int:
        with self._failpoint.around("journal.write"):
            if self._failpoint.strikes("journal.write:torn"):
                self._inner.write(data[: len(data) // 2])
                kill("journal.write:torn")
            return self._inner.write(data)

    def truncate(self, size: int) -> None:
        with self._failpoint.around("journal.truncate"):
            self._inner.truncate(size)

    async def sync(self) -> None:
        with self._failpoint.around("journal.sync"):
            await self._inner.sync()

    def close(self) -> None:
        self._inner.close()


class FailpointFiles:
    """The files of a journal, with a failpoint in the calls that change something."""

    def __init__(self, inner: JournalFiles, failpoint: Failpoint) -> None:
        self._inner = inner
        self._failpoint = failpoint

    @property
    def place(self) -> str:
        return self._inner.place

    def lock(self) -> bool:
        return self._inner.lock()

    def names(self) -> list[str]:
        return self._inner.names()

    def create(self, name: str) -> SegmentFile:
        with self._failpoint.around("journal.create"):
            return _Segment(self._inner.create(name), self._failpoint)

    def read(self, name: str) -> BinaryIO:
        return self._inner.read(name)

    def truncate(self, name: str, size: int) -> None:
        with self._failpoint.around("journal.truncate"):
            self._inner.truncate(name, size)

    def unlink(self, name: str) -> None:
        with self._failpoint.around("journal.unlink"):
            self._inner.unlink(name)

    async def sync_directory(self) -> None:
        with self._failpoint.around("journal.sync_directory"):
            await self._inner.sync_directory()

    def free_bytes(self) -> int:
        return self._inner.free_bytes()

    def identity(self) -> str:
        return self._inner.identity()

    def close(self) -> None:
        self._inner.close()


class _StoragePoints(Faults):
    """The calls of a storage, with a failpoint in them."""

    def __init__(self, failpoint: Failpoint) -> None:
        super().__init__()
        self._failpoint = failpoint

    async def call(self, name: CallName, effect: Callable[[], Awaitable[T]], batch: Batch | None = None) -> T:
        with self._failpoint.around(f"storage.{name}"):
            return await effect()


def install(failpoint: Failpoint) -> None:
    """Put a failpoint under every runtime that this process opens from now on."""
    storage_for = PluginManager.storage_for

    def files_at(path: Path) -> FailpointFiles:
        return FailpointFiles(LocalFiles(path), failpoint)

    def factory_for(manager: PluginManager, url: str) -> StorageFactory:
        return _wrapped(storage_for(manager, url), failpoint)

    seams: list[tuple[object, str, object]] = [
        (directories, "LocalFiles", files_at),
        (PluginManager, "storage_for", factory_for),
    ]
    for owner, name, replacement in seams:
        setattr(owner, name, replacement)


def _wrapped(factory: StorageFactory, failpoint: Failpoint) -> StorageFactory:
    points = _StoragePoints(failpoint)

    @asynccontextmanager
    async def opened(config: StorageConfig) -> AsyncIterator[Storage]:
        async with AsyncExitStack() as stack:
            storage = await points.call("open", lambda: stack.enter_async_context(factory(config)))
            yield FaultyStorage(storage, points)

    return opened


def _main(arguments: Sequence[str]) -> None:
    """Run a module under a failpoint."""
    if len(arguments) < 2:
        sys.exit("usage: python -m agent_runtime.testing.failpoints POINT:MOMENT[:NTH] MODULE [ARGUMENT…]")
    point, module, *rest = arguments
    try:
        install(Failpoint.parse(point))
    except ValueError as error:
        sys.exit(str(error))
    sys.argv[1:] = rest
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
