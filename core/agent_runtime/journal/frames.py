"""Frames: how one change lies in a segment.

A frame is one line:

    LLLLLLLL CCCCCCCC SSSSSSSSSSSSSSSS {"a JSON document": …}\\n

8 hexadecimal digits: how many bytes the document has; 8: the CRC-32 of all that follows, from the sequence's first
digit through the newline; 16: the sequence. Digits are lower case, the document holds no raw newline.

The CRC starts from a seed made of the journal's id, which nobody outside knows: what a message holds can never pass for
a frame, even where damage has taken away the frame around it.

Guarantees of `scan`: every whole frame is found, whatever happened to the bytes before and behind it; nothing else is
taken for a frame; every byte belongs to a frame or to a damage. Memory is bounded by the largest whole frame.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import BinaryIO, Final, NamedTuple
from zlib import crc32

from ..errors import JournalError

__all__ = [
    "DOCUMENT_BYTES_MAX",
    "FRAME_BYTES",
    "Damage",
    "Frame",
    "document_bytes",
    "encode_frame",
    "scan",
    "seed_of",
    "whole_frame",
]

DOCUMENT_BYTES_MAX: Final = 0xFFFF_FFFF
"""The length has eight digits."""

FRAME_BYTES: Final = 36
"""What a frame takes besides its document."""

_PREFIX: Final = 35  # up to the document
_CHECKED: Final = 18  # where the checksum begins to count
_CHUNK: Final = 256 * 1024
_CANDIDATE: Final = re.compile(rb"(?=[0-9a-f]{8} [0-9a-f]{8} [0-9a-f]{16} )")


class Frame(NamedTuple):
    """A whole frame, and where in its file it lies."""

    sequence: int
    payload: bytes
    start: int
    end: int


class Damage(NamedTuple):
    """Bytes that are no whole frame. Torn: they reach to the end of the file, as after a write that was cut short."""

    start: int
    end: int
    torn: bool


def seed_of(journal_id: str) -> int:
    """The seed of the checksums in this journal."""
    return crc32(journal_id.encode())


def encode_frame(sequence: int, payload: bytes, seed: int) -> bytes:
    """The frame of a document.

    Raises:
        JournalError: the document is too long.
    """
    if len(payload) > DOCUMENT_BYTES_MAX:
        raise JournalError(f"change {sequence} has {len(payload)} bytes, a frame holds up to {DOCUMENT_BYTES_MAX}")
    checked = b"%016x %b\n" % (sequence, payload)
    return b"%08x %08x %b" % (len(payload), crc32(checked, seed), checked)


def whole_frame(data: bytes, offset: int, seed: int, at: int = 0) -> Frame | None:
    """The frame at `offset` of `data`, if all of it is there. `at`: where in the file `data` begins."""
    length = document_bytes(data[offset : offset + 8])
    end = offset + FRAME_BYTES + length
    if length < 0 or end > len(data):
        return None
    checked = data[offset + _CHECKED : end]
    # The digits are compared as written, so that no other way to write the same number passes.
    if data[offset : offset + _CHECKED] != b"%08x %08x " % (length, crc32(checked, seed)) or checked[-1] != 0x0A:
        return None
    return Frame(int(checked[:16], 16), checked[17:-1], at + offset, at + end)


def document_bytes(prefix: bytes) -> int:
    """The length of the document that a frame's first bytes tell; -1 if they are no number."""
    try:
        return int(prefix[:8], 16)
    except ValueError:
        return -1


def scan(file: BinaryIO, seed: int, start: int = 0) -> Iterator[Frame | Damage]:
    """Frames and damages in the order of the file, from `start` to the end it has now.

    Raises:
        OSError: the file can't be read. That is not damage: another try may read it.
    """
    size = file.seek(0, io.SEEK_END)
    position = start
    while position < size:
        file.seek(position)
        data = file.read(min(_CHUNK, size - position))
        if not data:  # it was truncated meanwhile
            return
        offset = 0
        while (frame := whole_frame(data, offset, seed, position)) is not None:
            offset = frame.end - position
            yield frame
        if offset:
            position += offset
            continue  # what is left of the chunk begins the next one
        frame = _read_frame(file, position, size, seed)
        if frame is None:
            found = _find(file, position + 1, size, seed)
            yield Damage(position, size if found is None else found.start, torn=found is None)
            if found is None:
                return
            frame = found
        position = frame.end
        yield frame


def _read_frame(file: BinaryIO, position: int, size: int, seed: int) -> Frame | None:
    """The frame at `position`, of any size. Its document is kept in memory only when it is whole."""
    file.seek(position)
    prefix = file.read(_PREFIX)
    length = document_bytes(prefix)
    end = position + FRAME_BYTES + length
    if len(prefix) < _PREFIX or length < 0 or end > size:
        return None
    file.seek(end - 1)
    if file.read(1) != b"\n":
        return None
    checksum = crc32(prefix[_CHECKED:], seed)
    file.seek(position + _PREFIX)
    left = length + 1
    while left:
        data = file.read(min(_CHUNK, left))
        if not data:
            return None
        checksum = crc32(data, checksum)
        left -= len(data)
    if prefix[:_CHECKED] != b"%08x %08x " % (length, checksum):
        return None
    file.seek(position)
    return whole_frame(file.read(end - position), 0, seed, position)


def _find(file: BinaryIO, position: int, size: int, seed: int) -> Frame | None:
    """The first whole frame that begins at or behind `position`: every byte is looked at, for any may be damaged."""
    while position < size:
        file.seek(position)
        data = file.read(min(_CHUNK, size - position))
        for match in _CANDIDATE.finditer(data):
            frame = _read_frame(file, position + match.start(), size, seed)
            if frame is not None:
                return frame
        if len(data) < _PREFIX:
            return None
        position += len(data) - _PREFIX + 1
    return None
