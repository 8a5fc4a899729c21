"""What a journal's directory holds: its segments, their headers, and the frames of all of them in one order.

Segments follow each other in the log, with two exceptions. One that was written again after a failed sync repeats what
an earlier one holds: each sequence is read once. And a segment in which a write failed that could not be undone may
hold frames that were refused: the headers of later ones name those sequences void, for they are never used again.
"""

from __future__ import annotations

import io
import logging
import re
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from heapq import heappop, heappush
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

import msgspec

from ..errors import JournalCorrupt, JournalError, JournalMismatch
from .files import JournalFiles
from .frames import Damage, Frame, scan, seed_of, whole_frame
from .headers import HEADERS_BYTES_MAX, HEADERS_BYTES_MIN, Header, Opening, decode_headers, number_of, segment_name

__all__ = ["Directory", "Gap", "Segment", "read_directory"]

logger: Final = logging.getLogger("agent_runtime.journal")

_NAME: Final = re.compile(r"[0-9]{10}\.segment")
_TAIL: Final = 64 * 1024


class Gap(NamedTuple):
    """Sequences, first to last, that should be there and are not."""

    first: int
    last: int


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A segment as found. Its frames begin at byte `start`; where no header is whole, `first` is the first frame's."""

    number: int
    name: str
    size: int
    header: Header | None
    first: int
    start: int


def read_directory(files: JournalFiles, journal_id: str | None = None) -> Directory:
    """Read what the segments say of themselves; `journal_id` serves where no header is left that tells it.

    Raises:
        JournalError: a file can't be read, or is of a later format.
        JournalMismatch: there are segments of several journals.
        JournalCorrupt: a segment bears the name of another one.
    """
    try:
        names = sorted(name for name in files.names() if _NAME.fullmatch(name))
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise _unreadable(files.place, error) from error
    openings = {name: _read_opening(files, name) for name in names}
    journals = {opening.header.journal: name for name, (opening, _) in openings.items() if opening.header is not None}
    if len(journals) > 1:
        found = " and ".join(f"{id_} ({name})" for id_, name in journals.items())
        raise JournalMismatch(f"{files.place} holds segments of several journals: {found}; move the wrong ones away")
    journal_id = next(iter(journals), journal_id)
    segments: list[Segment] = []
    unreadable: list[str] = []
    for name, (opening, size) in openings.items():
        header, number = opening.header, number_of(name)
        if header is not None and header.segment != number:
            right = segment_name(header.segment)
            raise JournalCorrupt(f"{name} in {files.place} is segment {header.segment}: give it back its name, {right}")
        first = header.first if header is not None else _first_sequence(files, name, journal_id)
        if first is None:
            unreadable.append(name)
        else:
            segments.append(Segment(number=number, name=name, size=size, header=header, first=first, start=opening.end))
    directory = Directory(files, journal_id, segments, unreadable)
    for name, (opening, _) in openings.items():
        if opening.damage is not None:
            directory.note(name, opening.damage)
    return directory


def _read_opening(files: JournalFiles, name: str) -> tuple[Opening, int]:
    """How the segment begins, and the size of its file."""
    try:
        with files.read(name) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            data = file.read(HEADERS_BYTES_MAX)
    except OSError as error:
        raise _unreadable(f"{name} in {files.place}", error) from error
    return decode_headers(data, f"{name} in {files.place}"), size


def _first_sequence(files: JournalFiles, name: str, journal_id: str | None) -> int | None:
    """The sequence of the first whole frame in a segment without a header."""
    if journal_id is None:
        return None
    try:
        with files.read(name) as file:
            return next((item.sequence for item in scan(file, seed_of(journal_id)) if isinstance(item, Frame)), None)
    except OSError as error:
        raise _unreadable(f"{name} in {files.place}", error) from error


def _unreadable(what: str, error: OSError) -> JournalError:
    return JournalError(f"{what} can't be read: {error.strerror or error}")


class _Tail(NamedTuple):
    """How a segment ends: the highest sequence in it (0: it has none), and where a torn tail begins."""

    last: int
    torn: int | None


_Open: TypeAlias = tuple[int, int, Frame, Generator[Frame, None, None]]
"""A segment being read: the sequence of its next frame, its number negated, that frame, what gives those behind it."""


class Directory:
    """The segments of a journal, as they were when read. It may be read while another process writes there.

    `unreadable` names the files that have neither a header nor a frame. `damage` is what was met until now, by the
    file's name and the place in it.
    """

    def __init__(
        self,
        files: JournalFiles,
        journal_id: str | None,
        segments: Sequence[Segment],
        unreadable: Sequence[str],
    ) -> None:
        self.journal_id: Final = journal_id
        self.segments: Final = tuple(segments)
        self.unreadable = tuple(unreadable)
        self._files = files
        self._seed = 0 if journal_id is None else seed_of(journal_id)
        self._headers = [segment.header for segment in segments if segment.header is not None]
        self._damage: dict[tuple[str, int], Damage] = {}
        self._tails: dict[str, _Tail] = {}

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return self._files.place

    @property
    def header(self) -> Header | None:
        """The newest header."""
        return max(self._headers, key=lambda header: (header.generation, header.segment), default=None)

    @property
    def generation(self) -> int:
        """The generation of the newest header; 0 when there is none."""
        return 0 if (header := self.header) is None else header.generation

    @property
    def database_id(self) -> str | None:
        """The database that the newest header names."""
        return None if (header := self.header) is None else header.database

    @property
    def partition(self) -> int | None:
        """The partition that the newest header names."""
        return None if (header := self.header) is None else header.partition

    @property
    def identity(self) -> str | None:
        """The identity of the directory in which the newest header was written."""
        return None if (header := self.header) is None else header.identity

    @cached_property
    def unused(self) -> bool:
        """Whether the last opening left no change here: perhaps it died while it recovered those of earlier ones."""
        newest = [each for each in self.segments if each.header and each.header.generation == self.generation]
        return not any(self.last(segment) >= segment.first for segment in newest)

    @property
    def first_retained(self) -> int | None:
        """The lowest sequence that the journal may hold, or that is void: everything below was cut."""
        first = min((segment.first for segment in self.segments), default=None)
        for void_first, void_last in reversed(self.voids):
            if first is not None and void_first < first <= void_last + 1:
                first = void_first
        return first

    @property
    def bytes(self) -> int:
        """What the segments take."""
        return sum(segment.size for segment in self.segments)

    @cached_property
    def voids(self) -> tuple[tuple[int, int], ...]:
        """Sequences that are no changes, ascending ranges."""
        return tuple(sorted({(first, last) for header in self._headers for first, last in header.voids}))

    @cached_property
    def end(self) -> int:
        """The highest sequence that may have been used; 0 when there is none. Reads the ends of the segments."""
        begun = max((segment.first - 1 for segment in self.segments), default=0)
        void = max((last for _, last in self.voids), default=0)
        return max(begun, void, *(self.last(segment) for segment in self.segments), 0)

    @property
    def damage(self) -> Mapping[tuple[str, int], Damage]:
        """What was met so far of bytes that are no frames."""
        return MappingProxyType(self._damage)

    def last(self, segment: Segment) -> int:
        """The highest sequence of a segment's whole frames; 0: it has none."""
        return self._tail(segment).last

    def frames(self, after: int) -> Iterator[Frame | Gap]:
        """Every change above `after`, ascending and once, with the gaps between them, up to `end`.

        Raises:
            JournalError: a file can't be read.
        """
        expected = after + 1
        with closing(self._merged(after)) as merged:
            for frame in merged:
                sequence = frame.sequence
                if sequence < expected or (self.voids and self._is_void(sequence)):
                    continue
                if sequence > expected:
                    yield from self._gaps(expected, sequence - 1)
                yield frame
                expected = sequence + 1
        yield from self._gaps(expected, self.end)

    def _is_void(self, sequence: int) -> bool:
        return any(first <= sequence <= last for first, last in self.voids)

    def _gaps(self, first: int, last: int) -> Iterator[Gap]:
        """What of these sequences is not void."""
        for void_first, void_last in self.voids:
            if first < void_first <= last:
                yield Gap(first, void_first - 1)
            if void_first <= last:
                first = max(first, void_last + 1)
        if first <= last:
            yield Gap(first, last)

    def _merged(self, after: int) -> Generator[Frame, None, None]:
        """The frames of all segments by sequence, the newest segment's first among equal ones.

        A segment is opened when its first sequence comes: no more are open at once than overlap.
        """
        waiting = deque(sorted(self.segments, key=lambda segment: (segment.first, segment.number)))
        open_: list[_Open] = []
        try:
            while waiting or open_:
                if waiting and (not open_ or waiting[0].first <= open_[0][0]):
                    segment = waiting.popleft()
                    if self.last(segment) > after:
                        _advance(open_, -segment.number, self._scan(segment))
                    continue
                _, order, frame, source = heappop(open_)
                yield frame
                if not open_:  # the usual case: nothing overlaps
                    limit = waiting[0].first if waiting else None
                    for frame in source:
                        if limit is not None and frame.sequence >= limit:
                            heappush(open_, (frame.sequence, order, frame, source))
                            break
                        yield frame
                else:
                    _advance(open_, order, source)
        finally:
            for *_, source in open_:
                source.close()

    def _scan(self, segment: Segment) -> Generator[Frame, None, None]:
        """The frames of one segment; damage is noted."""
        try:
            with self._files.read(segment.name) as file:
                for item in scan(file, self._seed, segment.start):
                    if isinstance(item, Frame):
                        yield item
                    else:
                        self.note(segment.name, item)
        except OSError as error:
            raise _unreadable(f"{segment.name} in {self.place}", error) from error

    def note(self, name: str, damage: Damage) -> None:
        """Bytes of a file are no whole frame: kept in `damage`, and logged once."""
        if (name, damage.start) in self._damage:
            return
        self._damage[name, damage.start] = damage
        logger.warning(
            "the journal is %s: bytes %d to %d of %s in %s are no whole frame",
            "torn" if damage.torn else "damaged",
            damage.start,
            damage.end,
            name,
            self.place,
        )

    def _tail(self, segment: Segment) -> _Tail:
        """How the segment ends; only where that is not whole all of it is read."""
        tail = self._tails.get(segment.name)
        if tail is None:
            frame = self._last_frame(segment)
            if frame is not None or segment.size <= segment.start:
                tail = _Tail(0 if frame is None else frame.sequence, None)
            else:
                last = max((frame.sequence for frame in self._scan(segment)), default=0)
                torn = [
                    damage.start for (name, _), damage in self._damage.items() if name == segment.name and damage.torn
                ]
                tail = _Tail(last, torn[0] if torn else None)
            self._tails[segment.name] = tail
        return tail

    def _last_frame(self, segment: Segment) -> Frame | None:
        """The last line, if it is a whole frame and not too long."""
        if segment.size <= segment.start:
            return None
        start = max(segment.start, segment.size - _TAIL)
        try:
            with self._files.read(segment.name) as file:
                file.seek(start)
                data = file.read(segment.size - start)
        except OSError as error:
            raise _unreadable(f"{segment.name} in {self.place}", error) from error
        frame = whole_frame(data, data.rfind(b"\n", 0, -1) + 1, self._seed, start)
        return frame if frame is not None and frame.end == segment.size else None

    async def cut_torn_tails(self) -> list[str]:
        """Cut what a crash has left behind the last whole frame of a segment, and segments that it left unfinished.

        The bytes are kept in files of their own, power-safe before anything is cut. Returns their names. The directory
        must be locked.

        Raises:
            JournalError: a file can't be read, written or cut.
            JournalCorrupt: nothing is left that tells whose frames a file holds.
        """
        newest = max((segment.number for segment in self.segments), default=0)
        unfinished = [name for name in self.unreadable if number_of(name) > newest]
        if self.journal_id is None:
            self._refuse_headless(unfinished)
        kept: list[str] = []
        try:
            for name in unfinished:
                kept += await self._keep(name, 0)
                self._files.unlink(name)
            for segment in self.segments:
                torn = self._tail(segment).torn
                if torn is not None:
                    kept += await self._keep(segment.name, torn)
                    self._files.truncate(segment.name, torn)
                    self._tails[segment.name] = _Tail(self.last(segment), None)
        except OSError as error:
            raise JournalError(f"could not cut the torn tails in {self.place}: {error.strerror or error}") from error
        if unfinished:
            logger.warning("removed %s in %s: unfinished when a crash came", ", ".join(unfinished), self.place)
        self.unreadable = tuple(name for name in self.unreadable if name not in unfinished)
        return kept

    def _refuse_headless(self, names: Sequence[str]) -> None:
        for name in names:
            with self._files.read(name) as file:
                size = file.seek(0, io.SEEK_END)
            if size > HEADERS_BYTES_MIN:
                raise JournalCorrupt(
                    f"{name} in {self.place} has no whole header, and no other segment tells whose it is: open it "
                    "with the database it belongs to, or move it away to begin a new journal"
                )

    async def _keep(self, name: str, start: int) -> list[str]:
        """Copy the bytes from `start` on to a file of their own."""
        with self._files.read(name) as file:
            size = file.seek(0, io.SEEK_END)
            if size == start:
                return []
            file.seek(start)
            kept = f"{name}.torn-{start}"
            if kept in self._files.names():  # a crash came between keeping and cutting
                self._files.unlink(kept)
            copy = self._files.create(kept)
            try:
                while data := file.read(_TAIL):
                    while data:
                        data = data[copy.write(data) :]
                await copy.sync()
            finally:
                copy.close()
        await self._files.sync_directory()
        logger.warning("cut %d bytes from the end of %s in %s: kept in %s", size - start, name, self.place, kept)
        return [kept]


def _advance(heap: list[_Open], order: int, source: Generator[Frame, None, None]) -> None:
    """Put a source back by its next frame; one that has no more is left out."""
    frame = next(source, None)
    if frame is not None:
        heappush(heap, (frame.sequence, order, frame, source))
