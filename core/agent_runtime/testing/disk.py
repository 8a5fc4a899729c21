"""A disk in memory that loses what a real one may lose: the journal's files (`journal.files`) for simulations.

What is modelled is the page cache. A write goes there, and every process sees it at once; only a sync brings it to the
platter. When a process crashes, all it has written stays. When the power fails, what was not synced is kept, lost or
garbled, page by page, a file's size and each name in the directory likewise; bytes that were synced and not written
over stay as they are. A sync that fails has brought some pages to the platter and marks the others as clean: a later
sync does not bring those, although it succeeds (as on Linux). Names are brought by syncing the directory only.

All that is left to chance is drawn from the `random.Random` that is handed in. Faults are planned as in `faults`: by
the name of a call, and which of those calls to strike.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from random import Random
from typing import BinaryIO, Final, Literal

import anyio
from anyio.lowlevel import checkpoint

from agent_runtime.journal.files import JournalFiles, SegmentFile

from .disk_faults import DiskCallName, DiskFault
from .pages import PagedFile

__all__ = ["SimulatedDisk"]

_NEVER_FULL_BYTES: Final = 1 << 50
_LOCK_NAME: Final = "lock"


def _error(number: int, problem: str) -> OSError:
    return OSError(number, f"{os.strerror(number)} ({problem})")


class SimulatedDisk:
    """One directory on a disk of `capacity_bytes` (None: never full; may be set at any time).

    A process opens it with `files()`. `calls` has the names of all calls so far, in order.
    """

    def __init__(self, random: Random, *, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.calls: list[DiskCallName] = []
        self._random = random
        self._faults: list[DiskFault] = []
        self._inodes = 0
        self._names: dict[str, PagedFile] = {}
        self._platter_names: dict[str, PagedFile] = {}
        self._openings: set[_Files] = set()
        self._holder: _Files | None = None

    # What happens to machines

    def files(self) -> JournalFiles:
        """The directory, as a process that starts now sees it."""
        files = _Files(self)
        self._openings.add(files)
        return files

    def crash(self) -> None:
        """Every process that has the directory open dies. What they have written stays, their locks are gone."""
        for files in self._openings:
            files.dead = True
        self._openings.clear()
        self._holder = None

    def lose_power(self) -> None:
        """The machine dies, and with it what was not synced, as chance has it."""
        self.crash()
        survivors: dict[str, PagedFile] = {}
        for name in sorted(self._names.keys() | self._platter_names.keys()):
            found = self._random.choice((self._names.get(name), self._platter_names.get(name)))
            if found is not None:
                survivors[name] = found
        for file in survivors.values():
            file.lose_power(self._random)
        self._names, self._platter_names = survivors, dict(survivors)

    def lose_directory(self) -> None:
        """The machine dies, and the directory with all that was in it."""
        self.crash()
        self._names, self._platter_names = {}, {}

    def contents(self) -> dict[str, bytes]:
        """Every file as processes see it."""
        return {name: bytes(file.written) for name, file in self._names.items()}

    # Faults. Everywhere `name` is the call to strike (default: every one), `nth` which of those, counted from 1 and
    # from now on (default: each), `done` the share of the call's effect that has happened by then: 0 before it, 1 after
    # it, between them a part of the bytes of a write or of the pages of a sync.

    def at(
        self,
        name: DiskCallName | None,
        action: Callable[[], None],
        *,
        nth: int | None = None,
        done: float = 0.0,
    ) -> DiskFault:
        """Call `action`. It may raise an OSError, for the caller to get, and it may let this disk lose power."""
        return self._plan(DiskFault(name, nth, done, 0.0, action))

    def fail(
        self, name: DiskCallName | None = None, *, nth: int | None = None, done: float = 0.0, number: int = errno.EIO
    ) -> DiskFault:
        """Raise an OSError with this number."""

        def action() -> None:
            raise _error(number, f"a planned fault of {name or 'the disk'}")

        return self._plan(DiskFault(name, nth, done, 0.0, action))

    def write_short(self, *, nth: int | None = None, done: float = 0.5) -> DiskFault:
        """Write a share of the bytes only, and tell so."""
        return self._plan(DiskFault("write", nth, done, 0.0, None))

    def delay(
        self, delay_s: float, name: Literal["sync", "sync_directory"] = "sync", *, nth: int | None = None
    ) -> DiskFault:
        """Let a sync take its time."""
        return self._plan(DiskFault(name, nth, 0.0, delay_s, None))

    def clear(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def _plan(self, fault: DiskFault) -> DiskFault:
        self._faults.append(fault)
        return fault

    # What files do

    def _striking(self, name: DiskCallName) -> list[DiskFault]:
        self.calls.append(name)
        faults = [fault for fault in self._faults if fault.strikes(name)]
        return sorted(faults, key=lambda fault: fault.done)

    def _step(self, files: _Files, name: DiskCallName, effect: Callable[[], None]) -> None:
        """A call that happens whole or not at all."""
        files.check_alive()
        faults = self._striking(name)
        for fault in faults:
            if fault.done < 1.0:
                fault.strike()
                files.check_alive()
        effect()
        for fault in faults:
            if fault.done == 1.0:
                fault.strike()
                files.check_alive()

    def _free_bytes(self) -> int:
        if self.capacity_bytes is None:
            return _NEVER_FULL_BYTES
        return max(0, self.capacity_bytes - sum(len(file.written) for file in self._names.values()))

    def _write(self, files: _Files, file: PagedFile, data: bytes) -> int:
        files.check_alive()
        faults = self._striking("write")
        room = self._free_bytes()
        if data and not room:
            raise _error(errno.ENOSPC, "the simulated disk is full")
        count = min(len(data), room)
        written = 0
        for fault in faults:
            part = min(count, int(len(data) * fault.done)) if fault.done < 1.0 else count
            file.append(data[written:part])
            written = max(written, part)
            fault.strike()
            files.check_alive()
            if 0.0 < fault.done < 1.0:
                return written
        file.append(data[written:count])
        return count

    async def _sync(self, files: _Files, file: PagedFile) -> None:
        files.check_alive()
        faults = self._striking("sync")
        size, pages = len(file.written), {number: file.page(number) for number in sorted(file.dirty)}
        file.dirty.clear()
        left = list(pages)
        self._random.shuffle(left)
        try:
            await self._wait(faults)
            files.check_alive()
            for fault in faults:
                rest = int(len(pages) * (1.0 - fault.done))
                while len(left) > rest:
                    number = left.pop()
                    file.bring(number, pages[number])
                fault.strike()
                files.check_alive()
        except BaseException:
            if files.dead:
                file.dirty.update(left)  # only the caller is gone, not the disk
            raise
        for number in left:
            file.bring(number, pages[number])
        file.bring_size(size)

    async def _sync_directory(self, files: _Files) -> None:
        files.check_alive()
        faults = self._striking("sync_directory")
        names = dict(self._names)
        await self._wait(faults)
        files.check_alive()
        for fault in faults:
            if fault.done == 1.0:
                self._platter_names = names
            fault.strike()
            files.check_alive()
        self._platter_names = names

    @staticmethod
    async def _wait(faults: list[DiskFault]) -> None:
        await checkpoint()
        for fault in faults:
            if fault.delay_s:
                await anyio.sleep(fault.delay_s)

    def _new_file(self, name: str) -> PagedFile:
        if name in self._names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        self._inodes += 1
        file = self._names[name] = PagedFile(self._inodes)
        return file

    def _file(self, name: str) -> PagedFile:
        try:
            return self._names[name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None


class _Files:
    """The directory, in the hands of one process."""

    def __init__(self, disk: SimulatedDisk) -> None:
        self.dead = False
        self._disk = disk

    def check_alive(self) -> None:
        if self.dead:
            raise _error(errno.EBADF, "the process that had this open is dead")

    @property
    def place(self) -> str:
        return "a simulated disk"

    def lock(self) -> bool:
        disk = self._disk

        def take() -> None:
            if _LOCK_NAME not in disk._names:
                disk._new_file(_LOCK_NAME)
            disk._holder = disk._holder or self

        disk._step(self, "lock", take)
        return disk._holder is self

    def names(self) -> list[str]:
        names: list[str] = []
        self._disk._step(self, "names", lambda: names.extend(self._disk._names))
        self._disk._random.shuffle(names)
        return names

    def create(self, name: str) -> SegmentFile:
        created: list[PagedFile] = []
        self._disk._step(self, "create", lambda: created.append(self._disk._new_file(name)))
        return _OpenFile(self._disk, self, created[0])

    def read(self, name: str) -> BinaryIO:
        found: list[PagedFile] = []
        self._disk._step(self, "read", lambda: found.append(self._disk._file(name)))
        return io.BytesIO(bytes(found[0].written))

    def truncate(self, name: str, size: int) -> None:
        self._disk._step(self, "truncate", lambda: self._disk._file(name).truncate(size))

    def unlink(self, name: str) -> None:
        def remove() -> None:
            self._disk._file(name)
            del self._disk._names[name]

        self._disk._step(self, "unlink", remove)

    async def sync_directory(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._disk._sync_directory(self)

    def free_bytes(self) -> int:
        self.check_alive()
        return self._disk._free_bytes()

    def identity(self) -> str:
        self.check_alive()
        return f"simulated:{self._disk._file(_LOCK_NAME).inode}"

    def close(self) -> None:
        self.dead = True
        self._disk._openings.discard(self)
        if self._disk._holder is self:
            self._disk._holder = None


class _OpenFile:
    """A file, in the hands of one process."""

    def __init__(self, disk: SimulatedDisk, files: _Files, file: PagedFile) -> None:
        self._disk = disk
        self._files = files
        self._file = file
        self._closed = False

    def write(self, data: bytes) -> int:
        self._check_open()
        return self._disk._write(self._files, self._file, data)

    def truncate(self, size: int) -> None:
        self._check_open()
        self._disk._step(self._files, "truncate", lambda: self._file.truncate(size))

    async def sync(self) -> None:
        self._check_open()
        with anyio.CancelScope(shield=True):
            await self._disk._sync(self._files, self._file)

    def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise _error(errno.EBADF, "it is closed")
