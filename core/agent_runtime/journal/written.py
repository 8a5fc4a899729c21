"""The segments of a journal that is written to: which there are, and what of them is on the disk.

Owns their files from creation to removal, and what the next header says: its number, and the voids. Which one is
appended to, what is written and what a failed sync means for the log is the writer's.

Guarantees: a segment counts as synced once its bytes and its name are. One whose sync has failed is closed and never
synced again, and is a suspect until what it holds is elsewhere. Cutting goes from the oldest to the newest, and always
leaves a header that tells which journal this is.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from typing import Final

import msgspec
from anyio.lowlevel import checkpoint

from .files import JournalFiles, SegmentFile
from .headers import Header, encode_headers, segment_name
from .segments import Directory

__all__ = ["WrittenSegment", "WrittenSegments", "short_write"]

logger: Final = logging.getLogger("agent_runtime.journal")


class WrittenSegment:
    """A segment on the disk. `file` is open while it is written or not yet synced; `size` counts its good bytes.

    `last` holds once it is finished: nothing more is appended to it. `repeats`: it has what earlier ones have, too.
    """

    def __init__(self, name: str, size: int, first: int, last: int, file: SegmentFile | None = None) -> None:
        self.name = name
        self.size = size
        self.first = first
        self.last = last
        self.file = file
        self.finished = file is None
        self.empty_size = size
        self.synced_size = 0
        self.named = False  # whether its name is known to be on the disk
        self.repeats = False
        self.stored_at: float | None = None

    def finish(self, last: int) -> None:
        """Nothing more is appended; `last` is the highest sequence in it."""
        self.last = last
        self.finished = True

    def close(self) -> None:
        """Close its file, as it is: nothing more is appended."""
        self.finished = True
        if self.file is not None:
            self.file.close()
            self.file = None


class WrittenSegments:
    """All segments of one opening of a journal, those of earlier ones included.

    `voids` are the sequences that new headers name void.
    """

    def __init__(
        self,
        files: JournalFiles,
        directory: Directory,
        header: Header,
        *,
        retain_s: float,
        now: Callable[[], datetime],
        clock: Callable[[], float],
    ) -> None:
        self.voids = list(header.voids)
        self._files = files
        self._header = header
        self._retain_s = retain_s
        self._now = now
        self._clock = clock
        self._number = header.segment
        self._all = _segments_of(directory, header.first - 1)  # by number
        self._unsynced: list[WrittenSegment] = []
        self._suspects: list[WrittenSegment] = []

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self._all)

    @property
    def bytes(self) -> int:
        """What they take on the disk."""
        return sum(segment.size for segment in self._all)

    @property
    def first(self) -> int:
        """The lowest sequence that any of them may hold."""
        return min(segment.first for segment in self._all)

    @property
    def suspects(self) -> list[WrittenSegment]:
        """Those whose sync failed, and that are not written again yet."""
        return list(self._suspects)

    def create(self, first: int) -> tuple[WrittenSegment, SegmentFile]:
        """A new segment, for sequences from `first` on, with nothing but its header. It is synced with the next sync.

        Raises:
            OSError: it could not be written.
        """
        self._number += 1
        name = segment_name(self._number)
        header = msgspec.structs.replace(
            self._header, segment=self._number, first=first, voids=tuple(self.voids), created_at=self._now()
        )
        data = encode_headers(header)
        file = self._files.create(name)
        segment = WrittenSegment(name, len(data), first, first - 1, file)
        self._all.append(segment)
        try:
            written = file.write(data)
            if written != len(data):
                raise short_write(written, len(data))
        except OSError:
            self.discard(segment)
            raise
        self._unsynced.append(segment)
        return segment, file

    def discard(self, segment: WrittenSegment) -> None:
        """Remove a segment that nothing depends on; one that can't be removed is left to be cut."""
        segment.close()
        for segments in (self._unsynced, self._suspects):
            if segment in segments:
                segments.remove(segment)
        try:
            self._files.unlink(segment.name)
        except OSError as error:
            logger.warning("could not remove %s in %s: %s", segment.name, self._files.place, error.strerror or error)
        else:
            self._all.remove(segment)

    async def sync(self) -> AsyncIterator[tuple[Sequence[WrittenSegment], OSError]]:
        """Sync files and names. Gives those that could not be synced at once, to be distrusted before it goes on."""
        for segment in list(self._unsynced):
            size = segment.size
            if segment.file is not None and segment.synced_size < size:
                try:
                    await segment.file.sync()
                except OSError as error:
                    yield [segment], error
                else:
                    segment.synced_size = size
        unnamed = [segment for segment in self._unsynced if not segment.named]
        if unnamed:
            try:
                await self._files.sync_directory()
            except OSError as error:
                yield unnamed, error
            else:
                for segment in unnamed:
                    segment.named = True
        for segment in list(self._unsynced):
            if segment.finished and segment.named and segment.synced_size == segment.size:
                segment.close()
                self._unsynced.remove(segment)

    def distrust(self, segment: WrittenSegment) -> None:
        """Its sync has failed: it is a suspect. One without changes goes, or a failing disk fills with headers."""
        segment.close()
        self._unsynced.remove(segment)
        if segment.size > segment.empty_size:
            self._suspects.append(segment)
        else:
            self.discard(segment)

    def trust(self) -> None:
        """What the suspects hold is on the disk elsewhere, or stored."""
        self._suspects.clear()

    async def cut(self, stored: int, *, retain: bool = True) -> None:
        """Remove the finished ones of which every change is stored, the oldest first; without `retain` at once.

        The newest is kept, and the newest that is known to be on the disk: should a power loss leave nothing else, that
        one's header still tells which journal this is. What can't be removed is left for the next call.
        """
        now = self._clock()
        newest = next((segment for segment in self._all if not segment.finished), self._all[-1])
        known = (segment for segment in (newest, *reversed(self._all)) if segment.named and segment.synced_size)
        kept = (newest, next(known, None))
        done = [segment for segment in self._all if segment not in kept and segment.last <= stored]
        for segment in sorted(done, key=lambda segment: segment.last):
            if segment.stored_at is None:
                segment.stored_at = now
            if not retain or now - segment.stored_at >= self._retain_s:
                self.discard(segment)
                await checkpoint()
        low = min(self.first, stored + 1)
        self.voids = [void for void in self.voids if void[1] >= low]

    def close(self) -> None:
        """Close all files, as they are."""
        for segment in self._all:
            segment.close()
        self._unsynced.clear()


def _segments_of(directory: Directory, end: int) -> list[WrittenSegment]:
    """The segments that are there already, by number. One that can't be read goes with those before it."""
    found = {
        segment.name: WrittenSegment(
            segment.name, segment.size, segment.first, max(segment.first - 1, directory.last(segment))
        )
        for segment in directory.segments
    }
    last = end
    for name in sorted([*found, *directory.unreadable], reverse=True):
        if name in found:
            last = found[name].first - 1
        else:
            found[name] = WrittenSegment(name, 0, last + 1, last)
    return [found[name] for name in sorted(found)]


def short_write(written: int, size: int) -> OSError:
    """The error of a short write: disks are short when they are full."""
    return OSError(errno.ENOSPC, f"only {written} of {size} bytes were written")
