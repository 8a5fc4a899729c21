"""A journal's directory as it was at one moment, to be looked at while its owner goes on.

Every file is opened at once, and read up to the size that it has then: what is appended later is not seen, and what is
cut later is. Nothing is locked, and nothing is written.

So whoever takes such a picture, and asks the database for its watermark after that, finds every change above the
watermark that was in the journal when the picture was taken.
"""

from __future__ import annotations

import errno
import io
import os
import time
from typing import TYPE_CHECKING, BinaryIO, Final, cast

from .disk import LocalFiles
from .headers import number_of, segment_name

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["StillFiles"]

_TRIES: Final = 100
_LOOKS: Final = 20
_LOOK_S: Final = 0.005


class StillFiles(LocalFiles):
    """The segments of a directory, and the torn tails kept beside them. To be closed; it is only to be read.

    Raises:
        OSError: the directory or a file can't be opened; FileNotFoundError: there is no such directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._taken: dict[str, tuple[int, int]] = {}
        try:
            for _ in range(_TRIES):
                if all(self._take(name) for name in sorted(filter(number_of, super().names()))):
                    return
                self._drop()
            raise OSError(errno.EAGAIN, "segments are cut faster than they can be opened")
        except BaseException:
            self.close()
            raise

    def _take(self, name: str) -> bool:
        """Open a file. False: it was cut meanwhile, and others may have been begun before that."""
        try:
            descriptor = self._open(name, os.O_RDONLY)
        except FileNotFoundError:
            return False
        self._taken[name] = descriptor, 0  # from here on it is closed with the others
        settles = name == segment_name(number_of(name))
        self._taken[name] = descriptor, _settled_size(descriptor) if settles else os.fstat(descriptor).st_size
        return True

    def _drop(self) -> None:
        for descriptor, _ in self._taken.values():
            os.close(descriptor)
        self._taken.clear()

    def names(self) -> list[str]:
        """The names of the segments, and of the torn tails, that were there."""
        return list(self._taken)

    @property
    def bytes(self) -> int:
        """The size of all."""
        return sum(size for _, size in self._taken.values())

    def read(self, name: str) -> BinaryIO:
        """A file, up to the size that it had."""
        if name not in self._taken:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return cast("BinaryIO", _Part(*self._taken[name]))

    def close(self) -> None:
        """Close all files."""
        self._drop()
        super().close()


def _settled_size(descriptor: int) -> int:
    """The size of a file once a write under way is done: files grow page by page, not frame by frame."""
    size = os.fstat(descriptor).st_size
    for _ in range(_LOOKS):
        if not size or os.pread(descriptor, 1, size - 1) == b"\n":
            break
        time.sleep(_LOOK_S)
        size = os.fstat(descriptor).st_size
    return size


class _Part(io.RawIOBase):
    """The first bytes of an open file, with a position of its own. Closing it leaves the file open."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer)
        left = max(self._size - self._position, 0)
        data = os.pread(self._descriptor, min(len(target), left), self._position)
        target[: len(data)] = data
        self._position += len(data)
        return len(data)
