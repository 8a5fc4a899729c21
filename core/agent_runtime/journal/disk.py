"""The journal's files on a real disk: one directory, one process.

Guarantees: the directory is taken by a lock that the operating system drops with the process; a forked child neither
keeps it nor can write, for its copies of all descriptors are closed before it runs. A sync that has failed once fails
for ever: the kernel tells such an error once, and then takes the lost pages for clean.

Directory and files are their owner's only: they hold conversations.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import weakref
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Final

from anyio.to_thread import run_sync

from .files import JournalFiles, SegmentFile

__all__ = ["LOCK_NAME", "LocalFiles"]

LOCK_NAME: Final = "lock"

_CLOSED: Final = -1  # any use of it fails with EBADF


class _Descriptor:
    """An open file or directory. After `close`, and in a forked child, every use of it fails with EBADF."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._lock = Lock()
        _descriptors.add(self)

    def flush(self, flush: Callable[[int], None]) -> None:
        """Call `flush`; `close` waits for it, lest the number be another file's by then. For worker threads."""
        with self._lock:
            flush(self.number)

    def close(self) -> None:
        with self._lock:
            self.drop()

    def drop(self) -> None:
        """As `close`, but waiting for nobody: a forked child has no other threads, but it may have their locks."""
        number, self.number = self.number, _CLOSED
        if number != _CLOSED:
            os.close(number)


_descriptors: Final[weakref.WeakSet[_Descriptor]] = weakref.WeakSet()


def _drop_all() -> None:
    for descriptor in list(_descriptors):
        descriptor.drop()


os.register_at_fork(after_in_child=_drop_all)


def _flush_data(number: int) -> None:
    if sys.platform == "darwin":
        fcntl.fcntl(number, fcntl.F_FULLFSYNC)  # fsync leaves the data in the drive's cache there
    else:
        os.fdatasync(number)


class _LocalSegment(SegmentFile):
    def __init__(self, number: int) -> None:
        self._descriptor = _Descriptor(number)
        self._failed = False

    def write(self, data: bytes) -> int:
        return os.write(self._descriptor.number, data)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor.number, size)

    async def sync(self) -> None:
        await run_sync(self._sync)

    def _sync(self) -> None:
        # Noted here, in the thread: whoever waited for it may have been cancelled, and never hear of it.
        if self._failed:
            raise OSError("an earlier sync of this file has failed")
        try:
            self._descriptor.flush(_flush_data)
        except OSError:
            self._failed = True
            raise

    def close(self) -> None:
        self._descriptor.close()


class LocalFiles(JournalFiles):
    """A directory, by its path. Nothing is touched before the first call; after `close` every call raises OSError."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._directory: _Descriptor | None = None
        self._lock: _Descriptor | None = None

    @property
    def place(self) -> str:
        return str(self._path)

    @property
    def _number(self) -> int:
        """The descriptor of the directory: every name is looked up in it, wherever it may be moved."""
        if self._directory is None:
            self._directory = _Descriptor(os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        if self._directory.number == _CLOSED:  # said here, for os.scandir takes -1 for the working directory
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._directory.number

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC, 0o600, dir_fd=self._number)

    def lock(self) -> bool:
        if self._lock is not None and self._lock.number != _CLOSED:
            return True
        if not self._path.is_dir():
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _flush_directory(self._path.parent)
        while True:
            descriptor = _Descriptor(self._open(LOCK_NAME, os.O_RDWR | os.O_CREAT))
            try:
                fcntl.flock(descriptor.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                descriptor.close()
                return False
            except OSError:
                descriptor.close()
                raise
            if self._is_lock(descriptor):
                self._lock = descriptor
                return True
            descriptor.close()  # somebody has removed the file meanwhile: a lock on it keeps nobody out

    def _is_lock(self, descriptor: _Descriptor) -> bool:
        try:
            named = os.stat(LOCK_NAME, dir_fd=self._number)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(descriptor.number))

    def names(self) -> list[str]:
        with os.scandir(self._number) as entries:
            return [entry.name for entry in entries]

    def create(self, name: str) -> SegmentFile:
        return _LocalSegment(self._open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL))

    def read(self, name: str) -> BinaryIO:
        return FileIO(self._open(name, os.O_RDONLY), "rb")

    def truncate(self, name: str, size: int) -> None:
        descriptor = _Descriptor(self._open(name, os.O_WRONLY))
        try:
            os.ftruncate(descriptor.number, size)
        finally:
            descriptor.close()

    def unlink(self, name: str) -> None:
        os.unlink(name, dir_fd=self._number)

    async def sync_directory(self) -> None:
        await run_sync(self._sync_directory)

    def _sync_directory(self) -> None:
        if self._directory is not None:
            self._directory.flush(os.fsync)

    def free_bytes(self) -> int:
        figures = os.fstatvfs(self._number)
        return figures.f_bavail * figures.f_frsize

    def identity(self) -> str:
        """The file system and the lock file's inode. Device numbers would not do: some are new after a reboot."""
        return f"{os.fstatvfs(self._number).f_fsid:x}:{os.stat(LOCK_NAME, dir_fd=self._number).st_ino}"

    def close(self) -> None:
        for descriptor in (self._directory, self._lock):
            if descriptor is not None:
                descriptor.close()


def _flush_directory(path: Path) -> None:
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)
