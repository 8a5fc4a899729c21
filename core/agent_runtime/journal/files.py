"""The files of a journal: one directory of segments, owned by one process.

The journal does all it does to a disk through these two protocols, so that a simulation can take the disk's place.
Writing is synchronous (it is a memory copy into the page cache, about a microsecond), syncing is asynchronous (it waits
for the disk, in a worker thread). What is called here raises OSError, as the operating system does.
"""

from __future__ import annotations

from typing import BinaryIO, Protocol

__all__ = ["JournalFiles", "SegmentFile"]


class SegmentFile(Protocol):
    """A segment that is being written. One writer; `sync` may run while `write` is called."""

    def write(self, data: bytes) -> int:
        """Append. Returns how many bytes were written, which may be fewer."""

    def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes; the next write goes there."""

    async def sync(self) -> None:
        """Wait until everything written before this call survives a power loss (fdatasync). Not to be cancelled inside:
        a cancelled caller gets its cancellation after the sync has ended.
        """

    def close(self) -> None:
        """Close the file."""


class JournalFiles(Protocol):
    """The directory. Names are plain file names."""

    @property
    def place(self) -> str:
        """Where it is, for people."""

    def lock(self) -> bool:
        """Make the directory if need be, and take it for this process until `close`, the death of the process or of the
        machine, whichever comes first. A forked child does not inherit it. False: another process has it.
        """

    def names(self) -> list[str]:
        """The names of all files."""

    def create(self, name: str) -> SegmentFile:
        """A new file, to be appended to. It survives a power loss once `sync_directory` has returned."""

    def read(self, name: str) -> BinaryIO:
        """A file, to be read from its start; unbuffered reads are not short unless at the end."""

    def truncate(self, name: str, size: int) -> None:
        """Cut a file that is not being written to `size` bytes."""

    def unlink(self, name: str) -> None:
        """Remove a file."""

    async def sync_directory(self) -> None:
        """Wait until the names created and removed before this call survive a power loss (fsync).

        Cancellation as in `SegmentFile.sync`.
        """

    def free_bytes(self) -> int:
        """Bytes that this process may still write to the file system."""

    def identity(self) -> str:
        """What tells this directory from a copy of it, such as the device and inode of its lock file."""

    def close(self) -> None:
        """Give the directory back."""
