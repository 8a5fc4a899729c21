"""A look at a whole journal: every segment is read from end to end, and nothing is changed.

Recovery reads only what the database lacks; this finds damage wherever it lies, and what can't be told frame by frame.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from heapq import merge
from itertools import groupby
from operator import itemgetter
from typing import TypeAlias

import msgspec

from ..errors import JournalError
from .files import JournalFiles
from .frames import Frame, scan, seed_of
from .segments import Directory, Segment, read_directory

__all__ = ["DamageFound", "FileFound", "Inspection", "SegmentFound", "conflicts", "inspect"]

Range: TypeAlias = tuple[int, int]
"""Sequences, first to last."""


class SegmentFound(msgspec.Struct, frozen=True, kw_only=True):
    """A segment. `begins` is the lowest sequence that it may hold; `first` and `last` are those of its frames.

    `generation` and `created_at` are None where its header is lost.
    """

    file: str
    bytes: int
    generation: int | None
    created_at: datetime | None
    begins: int
    frames: int
    first: int | None
    last: int | None


class DamageFound(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that are no whole frame. Torn: they end the file, as those do that a crash leaves."""

    file: str
    offset: int
    bytes: int
    torn: bool


class FileFound(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is kept, and not read."""

    file: str
    bytes: int


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What a journal holds.

    `changes` counts each change once, `unstored` those above the database's watermark (None: that is not known).
    `voids` are sequences of writes that failed, which are no changes; `missing` those that were written and are not
    there. `kept` are the torn tails that were cut.
    """

    directory: str
    journal_id: str | None
    database_id: str | None
    generation: int
    partition: int | None
    bytes: int
    changes: int
    first: int | None
    last: int | None
    unstored: int | None
    segments: tuple[SegmentFound, ...]
    damage: tuple[DamageFound, ...]
    voids: tuple[Range, ...]
    missing: tuple[Range, ...]
    kept: tuple[FileFound, ...]

    @property
    def damaged(self) -> bool:
        """Whether more is wrong than what a crash leaves behind."""
        return bool(self.missing) or not all(damage.torn for damage in self.damage)


def inspect(
    files: JournalFiles,
    *,
    journal_id: str | None = None,
    stored: int | None = None,
    progress: Callable[[str, int], None] = lambda name, size: None,
) -> Inspection:
    """Read all of a journal. It takes about five seconds a gigabyte.

    `journal_id` serves where no header is left that tells it, `stored` is the database's watermark. `progress` is told
    the name of each segment that was read, and how many bytes all were so far.

    Raises:
        JournalError: a file can't be read, or is of a later format, of another journal, or under a wrong name.
    """
    directory = read_directory(files, journal_id)
    found: list[SegmentFound] = []
    runs: dict[str, list[Range]] = {}
    size = 0
    for segment in directory.segments:
        runs[segment.name] = list(_runs(frame.sequence for frame in _frames(files, directory, segment)))
        found.append(_found(segment, runs[segment.name]))
        size += segment.size
        progress(segment.name, size)
    changes = _without(_union(run for each in runs.values() for run in each), directory.voids)
    return Inspection(
        directory=directory.place,
        journal_id=directory.journal_id,
        database_id=directory.database_id,
        generation=directory.generation,
        partition=directory.partition,
        bytes=directory.bytes,
        changes=_count(changes),
        first=changes[0][0] if changes else None,
        last=changes[-1][1] if changes else None,
        unstored=None if stored is None else _count(_without(changes, [(0, stored)])),
        segments=tuple(found),
        damage=tuple(_damage(files, directory)),
        voids=directory.voids,
        missing=tuple(_missing(directory, runs)),
        kept=tuple(_kept(files)),
    )


def _frames(files: JournalFiles, directory: Directory, segment: Segment) -> Iterator[Frame]:
    """The frames of a segment; the directory notes the damage."""
    try:
        with files.read(segment.name) as file:
            for item in scan(file, seed_of(directory.journal_id or ""), segment.start):
                if isinstance(item, Frame):
                    yield item
                else:
                    directory.note(segment.name, item)
    except OSError as error:
        raise JournalError(f"{segment.name} in {files.place} can't be read: {error.strerror or error}") from error


def _kept(files: JournalFiles) -> Iterator[FileFound]:
    for name in sorted(files.names()):
        if ".torn-" in name:
            yield FileFound(file=name, bytes=_size(files, name))


def _size(files: JournalFiles, name: str) -> int:
    with files.read(name) as file:
        return file.seek(0, io.SEEK_END)


def _found(segment: Segment, runs: Sequence[Range]) -> SegmentFound:
    header = segment.header
    return SegmentFound(
        file=segment.name,
        bytes=segment.size,
        generation=None if header is None else header.generation,
        created_at=None if header is None else header.created_at,
        begins=segment.first,
        frames=_count(runs),
        first=runs[0][0] if runs else None,
        last=runs[-1][1] if runs else None,
    )


def _damage(files: JournalFiles, directory: Directory) -> Iterator[DamageFound]:
    """What is no frame, in the order of the files. A last file without a header is what a crash leaves of a new one."""
    newest = max((segment.name for segment in directory.segments), default="")
    for (name, offset), damage in sorted(directory.damage.items()):
        yield DamageFound(file=name, offset=offset, bytes=damage.end - damage.start, torn=damage.torn)
    for name in directory.unreadable:
        yield DamageFound(file=name, offset=0, bytes=_size(files, name), torn=name > newest)


def _missing(directory: Directory, runs: dict[str, list[Range]]) -> Iterator[Range]:
    """Gaps between the first and the last change of each generation.

    Between two generations there may be some: the second begins where the database stood.
    """
    generation = 0

    def generation_of(segment: Segment) -> int:
        nonlocal generation
        generation = generation if segment.header is None else segment.header.generation
        return generation

    for _, group in groupby(directory.segments, generation_of):
        segments = list(group)
        there = _union(run for segment in segments for run in runs[segment.name])
        first = min(segment.first for segment in segments)
        last = max([segment.first - 1 for segment in segments] + [run[1] for run in there])
        yield from _without([(first, last)], _union([*there, *directory.voids]))


def _runs(sequences: Iterable[int]) -> Iterator[Range]:
    """Ascending sequences as ranges."""
    first = last = None
    for sequence in sequences:
        if first is None or last is None:
            first = sequence
        elif sequence != last + 1:
            yield first, last
            first = sequence
        last = sequence
    if first is not None and last is not None:
        yield first, last


def _union(ranges: Iterable[Range]) -> list[Range]:
    """The ranges, ascending, those that meet joined."""
    union: list[Range] = []
    for first, last in sorted(ranges):
        if union and first <= union[-1][1] + 1:
            union[-1] = union[-1][0], max(last, union[-1][1])
        else:
            union.append((first, last))
    return union


def _without(ranges: Iterable[Range], others: Iterable[Range]) -> list[Range]:
    """What of ascending ranges is in none of the others, which are ascending too."""
    left: list[Range] = []
    others = list(others)
    for first, last in ranges:
        for other_first, other_last in others:
            if other_last < first:
                continue
            if other_first > last:
                break
            if first < other_first:
                left.append((first, other_first - 1))
            first = other_last + 1
        if first <= last:
            left.append((first, last))
    return left


def _count(ranges: Iterable[Range]) -> int:
    return sum(last - first + 1 for first, last in ranges)


def conflicts(files: JournalFiles, directory: Directory, after: int) -> Iterator[int]:
    """Sequences above `after` that stand in the journal twice, and differently. A change written again is the same.

    Raises:
        JournalError: a file can't be read.
    """
    for group in _overlapping(directory):
        frames = merge(*(_frames(files, directory, segment) for segment in group), key=itemgetter(0))
        for sequence, same in groupby(frames, itemgetter(0)):
            void = any(first <= sequence <= last for first, last in directory.voids)
            if sequence > after and not void and len({frame.payload for frame in same}) > 1:
                yield sequence


def _overlapping(directory: Directory) -> Iterator[list[Segment]]:
    """Segments whose sequences overlap, together."""
    group: list[Segment] = []
    last = 0
    for segment in sorted(directory.segments, key=lambda segment: segment.first):
        if segment.first > last and group:
            if len(group) > 1:
                yield group
            group = []
        group.append(segment)
        last = max(last, directory.last(segment))
    if len(group) > 1:
        yield group
