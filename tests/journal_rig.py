"""What the journal's tests share: a journal in memory, and a disk that fails on demand."""

from __future__ import annotations

import errno
import io
import os
from collections import defaultdict, deque
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import anyio
from anyio.lowlevel import checkpoint

from agent_runtime.journal import JournalFiles, SegmentFile

__all__ = ["Faulty", "Image"]


class Image(JournalFiles):
    """Files in memory, by name."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents

    @property
    def place(self) -> str:
        return "memory"

    def lock(self) -> bool:
        return True

    def names(self) -> list[str]:
        return list(self.contents)

    def create(self, name: str) -> SegmentFile:
        self.contents[name] = b""
        return _ImageSegment(self.contents, name)

    def read(self, name: str) -> BinaryIO:
        return io.BytesIO(self.contents[name])

    def truncate(self, name: str, size: int) -> None:
        self.contents[name] = self.contents[name][:size]

    def unlink(self, name: str) -> None:
        del self.contents[name]

    async def sync_directory(self) -> None:
        await checkpoint()

    def free_bytes(self) -> int:
        return 1 << 40

    def identity(self) -> str:
        return "memory"

    def close(self) -> None:
        self.contents = {}


class _ImageSegment(SegmentFile):
    def __init__(self, contents: dict[str, bytes], name: str) -> None:
        self._contents = contents
        self._name = name

    def write(self, data: bytes) -> int:
        self._contents[self._name] += data
        return len(data)

    def truncate(self, size: int) -> None:
        self._contents[self._name] = self._contents[self._name][:size]

    async def sync(self) -> None:
        await checkpoint()

    def close(self) -> None:
        self._name = ""


class Fault(NamedTuple):
    """What happens instead of a call: of a write `taken` bytes are written all the same; without an error it is short."""

    error: int | None
    taken: int = 0


class Faulty(JournalFiles):
    """Files over others, whose calls fail as planned: the next ones of a name, in order.

    `calls` notes what reached the files below. `free` stands for the free bytes, `gate` holds up syncs while it is set.
    """

    def __init__(self, files: JournalFiles) -> None:
        self.files = files
        self.calls: list[tuple[str, str]] = []
        self.free: int | None = None
        self.gate: anyio.Event | None = None
        self.during_sync: Callable[[], None] | None = None
        self._plan: defaultdict[str, deque[Fault | None]] = defaultdict(deque)

    def fail(self, call: str, error: int | None = errno.EIO, *, times: int = 1, skip: int = 0, taken: int = 0) -> None:
        """The next calls fail, the first `skip` ones excepted."""
        self._plan[call].extend([None] * skip + [Fault(error, taken)] * times)

    def heal(self) -> None:
        """Nothing fails any more."""
        self._plan.clear()

    def fault(self, call: str, name: str = "") -> Fault | None:
        """To be done instead of this call; raises if that is all."""
        plan = self._plan[call]
        fault = plan.popleft() if plan else None
        if fault is None:
            self.calls.append((call, name))
        elif fault.error is not None and not fault.taken:
            raise OSError(fault.error, os.strerror(fault.error))
        return fault

    def count(self, call: str, name: str) -> int:
        """How many calls reached the files below."""
        return self.calls.count((call, name))

    @property
    def place(self) -> str:
        return self.files.place

    def lock(self) -> bool:
        return self.files.lock()

    def names(self) -> list[str]:
        return self.files.names()

    def create(self, name: str) -> SegmentFile:
        self.fault("create", name)
        return _FaultySegment(self, name, self.files.create(name))

    def read(self, name: str) -> BinaryIO:
        self.fault("read", name)
        return self.files.read(name)

    def truncate(self, name: str, size: int) -> None:
        self.fault("truncate", name)
        self.files.truncate(name, size)

    def unlink(self, name: str) -> None:
        self.fault("unlink", name)
        self.files.unlink(name)

    async def sync_directory(self) -> None:
        self.fault("sync_directory")
        await self.files.sync_directory()

    def free_bytes(self) -> int:
        return self.files.free_bytes() if self.free is None else self.free

    def identity(self) -> str:
        return self.files.identity()

    def close(self) -> None:
        self.files.close()


class _FaultySegment(SegmentFile):
    def __init__(self, files: Faulty, name: str, file: SegmentFile) -> None:
        self._files = files
        self._name = name
        self._file = file

    def write(self, data: bytes) -> int:
        fault = self._files.fault("write", self._name)
        if fault is None:
            return self._file.write(data)
        written = self._file.write(data[: fault.taken])
        if fault.error is not None:
            raise OSError(fault.error, os.strerror(fault.error))
        return written

    def truncate(self, size: int) -> None:
        self._files.fault("truncate", self._name)
        self._file.truncate(size)

    async def sync(self) -> None:
        if self._files.gate is not None:
            await self._files.gate.wait()
        if self._files.during_sync is not None:
            self._files.during_sync()
        self._files.fault("sync", self._name)
        await self._file.sync()

    def close(self) -> None:
        self._file.close()
