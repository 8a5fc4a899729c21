"""The journal as it is written: append, sync, cut. Its files are `written`'s; here is what they are for the log.

Appending is one write to the page cache, which outlives the process; syncing takes it to the disk. A journal whose disk
misbehaves keeps three rules:

- An append that fails leaves nothing behind: what it wrote is truncated. Where that fails too the segment is sealed,
  its sequences are used up, and the headers of all later segments name them void.
- A sync that fails is never tried again on the same file: the kernel may have dropped what it could not write, and
  says so once. Appends go on in a new segment, and every change of the old one that the database does not have is
  written again, from memory, into another. `synced` moves only when all that is on the disk.
- While less is free than twice what is unstored, nothing is appended: there must be room to write all of it again.

`append` runs on the event loop and never waits. `sync`, `cut`, `erase` and `finish` belong to one task, one call at a
time.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from itertools import chain
from typing import Final

import msgspec
from anyio.lowlevel import checkpoint

from ..errors import JournalError, JournalFull
from ..histograms import SECONDS, Histogram
from ..identifiers import utc_now
from .files import JournalFiles, SegmentFile
from .frames import encode_frame, seed_of
from .headers import Header, number_of
from .segments import Directory
from .written import WrittenSegment, WrittenSegments, short_write

__all__ = ["Figures", "Journal"]

logger: Final = logging.getLogger("agent_runtime.journal")

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_CHECK_BYTES: Final = 256 * 1024
_TURN_BYTES: Final = 64 * 1024  # written again between two yields to the loop: about a millisecond


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The journal in numbers. `syncs` has the seconds that syncs took, `failures` counts those that failed; `full`: the
    last append was refused for lack of room."""

    segments: int
    bytes: int
    last_sync_s: float
    syncs: Histogram
    failures: int
    full: bool


class Journal:
    """One opening of a journal; `begin` makes one.

    `end` is the highest sequence that may be on the disk, acknowledged or not; `synced`: all that was appended up to it
    survives a power loss.
    """

    def __init__(
        self,
        files: JournalFiles,
        directory: Directory,
        header: Header,
        *,
        segment_bytes: int,
        retain_s: float,
        pending_bytes: Callable[[], int],
        now: Callable[[], datetime],
        clock: Callable[[], float],
    ) -> None:
        self.end = header.first - 1
        self.synced = self.end
        self._files = files
        self._segment_bytes = segment_bytes
        self._pending_bytes = pending_bytes
        self._clock = clock
        self._seed = seed_of(header.journal)
        self._segments = WrittenSegments(files, directory, header, retain_s=retain_s, now=now, clock=clock)
        self._current: WrittenSegment | None = None  # None: no more to the last one, and no new one could be made
        self._write: Callable[[bytes], int] = _nowhere
        self._slow_size = 0  # an append that would make the current segment larger looks after space and rotation first
        self._last_sync_s = 0.0
        self._syncs = Histogram.of(SECONDS)
        self._failures = 0
        self._full = False
        self._closed = False

    @classmethod
    async def begin(
        cls,
        files: JournalFiles,
        directory: Directory,
        *,
        journal_id: str,
        database_id: str,
        generation: int,
        after: int,
        stored: int | None = None,
        partition: int = 0,
        segment_bytes: int,
        retain_s: float = 0.0,
        pending_bytes: Callable[[], int],
        now: Callable[[], datetime] = utc_now,
        clock: Callable[[], float] = time.monotonic,
    ) -> Journal:
        """Begin a segment behind those of `directory`, which is locked and cut; the log goes on after `after`.

        `stored` is how far the database is. Sequences behind that, and behind the last frame, were given out and lost
        with the tail that held them: they are void from now on, lest they look cut when what held them is.
        `pending_bytes` gives the bytes of all unstored changes; `clock` counts seconds.

        Raises:
            JournalError: the segment could not be written and synced; JournalFull: for lack of room.
            ValueError: the directory's end lies behind `after`.
        """
        if after < directory.end:
            raise ValueError(f"the journal may hold changes up to {directory.end}, it can't go on after {after}")
        try:
            identity, names = files.identity(), files.names()
        except OSError as error:
            raise _failure(files.place, "be begun", error) from error
        header = Header(
            journal=journal_id,
            generation=generation,
            database=database_id,
            partition=partition,
            segment=max(map(number_of, names), default=0),
            first=after + 1,
            voids=directory.voids if stored is None else _with_lost_tail(directory, stored),
            identity=identity,
            created_at=now(),
        )
        journal = cls(
            files,
            directory,
            header,
            segment_bytes=segment_bytes,
            retain_s=retain_s,
            pending_bytes=pending_bytes,
            now=now,
            clock=clock,
        )
        try:
            journal._rotate()
            await journal._sync_all()
            if journal._failures:
                raise JournalError(f"the first segment of the journal in {files.place} could not be synced")
        except BaseException:
            journal.close()
            raise
        return journal

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return self._files.place

    @property
    def figures(self) -> Figures:
        """The journal in numbers."""
        return Figures(
            segments=self._segments.count,
            bytes=self._segments.bytes,
            last_sync_s=self._last_sync_s,
            syncs=self._syncs.copy(),
            failures=self._failures,
            full=self._full,
        )

    def append(self, frames: Sequence[tuple[int, bytes]]) -> None:
        """Write changes, encoded, under consecutive sequences from `end` + 1 on: all of them, or none.

        Raises:
            JournalFull: there is too little room; it goes on by itself when there is more.
            JournalError: they could not be written. `end` may have moved: those sequences must not be used again.
            ValueError: these are not the next sequences.
        """
        end = self.end
        for sequence, _ in frames:
            end += 1
            if sequence != end:
                raise ValueError(f"change {sequence} can't follow {end - 1} in the journal")
        self._append(end, b"".join([encode_frame(sequence, payload, self._seed) for sequence, payload in frames]))

    def append_one(self, sequence: int, payload: bytes) -> None:
        """As `append`, for one change: the hot path."""
        if sequence != self.end + 1:
            raise ValueError(f"change {sequence} can't follow {self.end} in the journal")
        self._append(sequence, encode_frame(sequence, payload, self._seed))

    def _append(self, end: int, data: bytes) -> None:
        """Write frames, the last of them of sequence `end`."""
        current = self._current
        if current is None or current.size + len(data) > self._slow_size:
            current = self._prepare(len(data))
        try:
            written = self._write(data)
        except OSError as error:
            self._undo(current, end)
            raise self._refusal(error) from error
        if written != len(data):
            self._undo(current, end)
            raise self._refusal(short_write(written, len(data)))
        current.size += written
        self.end = end
        if self._full:
            self._full = False
            logger.warning("the journal in %s has room again", self._files.place)

    def _prepare(self, size: int) -> WrittenSegment:
        """See that there is room, and a segment to append to."""
        if self._closed:
            raise JournalError(f"the journal in {self._files.place} is closed")
        self._check_room()
        current = self._current
        if current is None or (current.size + size > self._segment_bytes and current.size > current.empty_size):
            current = self._rotate()
        self._slow_size = min(current.size + size + _CHECK_BYTES, max(self._segment_bytes, current.size + size))
        return current

    def _check_room(self) -> None:
        needed = 2 * self._pending_bytes()
        try:
            free = self._files.free_bytes()
        except OSError as error:
            raise _failure(self._files.place, "see how much room it has", error) from error
        if free < needed:
            self._set_full()
            raise JournalFull(
                f"the journal in {self._files.place} has {free} bytes free and needs {needed}, twice what is unstored: "
                "make room there; it goes on by itself"
            )

    def _set_full(self) -> None:
        if not self._full:
            logger.error("the journal in %s is full: changes are refused until there is room", self._files.place)
        self._full = True
        self._slow_size = 0

    def _refusal(self, error: OSError) -> JournalError:
        refusal = _failure(self._files.place, "be written", error)
        if isinstance(refusal, JournalFull):
            self._set_full()
        return refusal

    def _undo(self, segment: WrittenSegment, last: int) -> None:
        """A write has failed that would have brought changes up to `last`: nothing of it may ever be read."""
        try:
            if segment.file is not None:
                segment.file.truncate(segment.size)
        except OSError as error:
            logger.error(
                "%s in %s is sealed, what a failed write left there can't be cut: %s",
                segment.name,
                self._files.place,
                error.strerror or error,
            )
            self._segments.voids.append((self.end + 1, last))
            self._retire()
            self.end = last
            self._try_to_rotate()

    def _retire(self) -> None:
        """Nothing more is appended to the current segment."""
        if self._current is not None:
            self._current.finish(self.end)
            self._current = None
            self._write = _nowhere

    def _try_to_rotate(self) -> None:
        """Rotate now if possible: what the new header says should be on the disk soon. Else the next append does."""
        try:
            self._rotate()
        except JournalError as error:
            logger.error("no new segment yet: %s", error)

    def _rotate(self) -> WrittenSegment:
        """Append to a new segment from now on. It is synced with the next sync."""
        segment, file = self._create(self.end + 1)
        self._retire()
        self._current = segment
        self._write = file.write
        self._slow_size = 0
        return segment

    def _create(self, first: int) -> tuple[WrittenSegment, SegmentFile]:
        """A new segment with nothing but its header."""
        try:
            return self._segments.create(first)
        except OSError as error:
            raise self._refusal(error) from error

    async def sync(self, unstored: Callable[[], Iterable[tuple[int, bytes]]]) -> int:
        """Take what was appended before the call to the disk. Returns `synced`.

        `unstored` gives every change that the database does not have, ascending and encoded; it is called only after a
        sync has failed, and gone through while changes come and go.

        Raises:
            JournalError: it is not there, and `synced` has not moved. The next call tries again, with new files.
        """
        self._slow_size = 0  # so that room is looked for after each sync, too
        target = self.end
        started_at = self._clock()
        await self._sync_all()
        if self._segments.suspects:
            await self._write_again(unstored)
        if self._closed:
            raise JournalError(f"the journal in {self._files.place} is closed")
        self._last_sync_s = self._clock() - started_at
        self._syncs.observe(self._last_sync_s)
        self.synced = max(self.synced, target)
        return self.synced

    async def _sync_all(self) -> None:
        """Sync files and names. What can't be synced is suspect from then on, and appended to no more."""
        async for segments, error in self._segments.sync():
            self._distrust(segments, error)

    def _distrust(self, segments: Sequence[WrittenSegment], error: OSError) -> None:
        self._failures += 1
        logger.error(
            "could not sync %s in %s: %s; what the database does not have is written again",
            ", ".join(segment.name for segment in segments),
            self._files.place,
            error.strerror or error,
        )
        for segment in segments:
            if segment is self._current:
                self._retire()
            self._segments.distrust(segment)
        if self._current is None:
            self._try_to_rotate()

    async def _write_again(self, unstored: Callable[[], Iterable[tuple[int, bytes]]]) -> None:
        """Bring what the suspect segments hold, and the database does not, to the disk in a new one."""
        if self._current is None:
            self._rotate()
        suspects = self._segments.suspects
        low = min(segment.first for segment in suspects)
        high = max(segment.last for segment in suspects)
        changes = (change for change in unstored() if low <= change[0] <= high)
        first = next(changes, None)
        if first is not None:
            segment, file = self._create(first[0])
            segment.repeats = True
            try:
                await self._copy(chain((first,), changes), segment, file)
            except OSError as error:
                self._segments.discard(segment)
                raise self._refusal(error) from error
            except BaseException:
                self._segments.discard(segment)
                raise
        for suspect in suspects:  # a copy that could not be synced is of no use any more
            if suspect.repeats:
                self._segments.discard(suspect)
        suspects = self._segments.suspects
        await self._sync_all()
        if self._segments.suspects != suspects:
            raise JournalError(f"the journal in {self._files.place} could not be synced, in new files either")
        self._segments.trust()
        logger.warning("the journal in %s is synced again, in new files", self._files.place)

    async def _copy(self, changes: Iterable[tuple[int, bytes]], segment: WrittenSegment, file: SegmentFile) -> None:
        pause_at = segment.size + _TURN_BYTES
        for sequence, payload in changes:
            data = encode_frame(sequence, payload, self._seed)
            written = file.write(data)
            if written != len(data):
                raise short_write(written, len(data))
            segment.size += written
            segment.last = sequence
            if segment.size >= pause_at:
                pause_at = segment.size + _TURN_BYTES
                await checkpoint()
        segment.finish(segment.last)

    async def cut(self, stored: int) -> None:
        """Remove the segments of which every change is stored, the oldest first.

        The newest is kept, and the newest that is known to be on the disk: should a power loss leave nothing else, that
        one's header still tells which journal this is. What can't be removed is left for the next call.
        """
        await self._segments.cut(stored)

    async def erase(self, stored: int, upto: int) -> bool:
        """As `cut`, whatever is to be retained, and with the newest segment ended before that if it begins at or before
        `upto`. True: nothing up to `upto` is left; else there are changes behind it that are not stored.
        """
        current = self._current
        if current is not None and current.size > current.empty_size and current.first <= upto:
            self._try_to_rotate()
            await self._sync_all()
        await self._segments.cut(stored, retain=False)
        return self._segments.first > upto

    async def finish(self, stored: int) -> None:
        """As `cut`, and of the newest segment leave a header only: by that the next opening knows the journal."""
        if self._current is not None and self._current.size > self._current.empty_size and stored >= self.end:
            self._try_to_rotate()
            await self._sync_all()
        await self.cut(stored)

    def close(self) -> None:
        """Close the segments, as they are. Nothing is appended any more; the directory stays its opener's."""
        self._closed = True
        self._retire()
        self._segments.close()


def _with_lost_tail(directory: Directory, stored: int) -> tuple[tuple[int, int], ...]:
    """The voids, and what was given out at the end of the log of which there is no frame."""
    known = max(
        stored, *(directory.last(segment) for segment in directory.segments), *(last for _, last in directory.voids), 0
    )
    return directory.voids if known >= directory.end else (*directory.voids, (known + 1, directory.end))


def _nowhere(data: bytes) -> int:
    raise OSError(errno.EBADF, f"no segment is open to take {len(data)} bytes")


def _failure(place: str, what: str, error: OSError) -> JournalError:
    reason = error.strerror or error
    if error.errno in _FULL:
        return JournalFull(f"the journal in {place} could not {what}: {reason}; make room there, it goes on by itself")
    return JournalError(f"the journal in {place} could not {what}: {reason}")
