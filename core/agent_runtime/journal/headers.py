"""The header of a segment: what it says of itself.

A segment begins with its header twice: two frames of sequence 0 and seed 0, padded alike to a multiple of 512 bytes, so
that damage to one costs nothing, and the second is found without the first.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Final, NamedTuple

import msgspec

from ..errors import JournalCorrupt, JournalError
from .frames import FRAME_BYTES, Damage, document_bytes, encode_frame, whole_frame

__all__ = [
    "FORMAT",
    "HEADERS_BYTES_MAX",
    "HEADERS_BYTES_MIN",
    "Header",
    "decode_headers",
    "encode_headers",
    "number_of",
    "segment_name",
]

FORMAT: Final = 1
HEADERS_BYTES_MIN: Final = 2 * 512
"""What the headers of a new journal take."""

HEADERS_BYTES_MAX: Final = 2 * 64 * 1024

_NAME: Final = re.compile(r"([0-9]{10})\.segment")
_BLOCK: Final = 512


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a segment says of itself.

    `journal` and `database` are ids, `generation` counts the openings, `segment` the segments. `first`: the lowest
    sequence that it may hold. `voids`: ranges of sequences, first and last, that are no changes wherever they stand.
    `identity`: of the directory that it was written in.
    """

    format: int = FORMAT
    journal: str
    generation: int
    database: str
    partition: int
    segment: int
    first: int
    voids: tuple[tuple[int, int], ...] = ()
    identity: str
    created_at: datetime


class _Format(msgspec.Struct):
    format: int


def segment_name(number: int) -> str:
    """The name of a segment's file."""
    return f"{number:010d}.segment"


def encode_headers(header: Header) -> bytes:
    """What a segment begins with: the header, twice.

    Raises:
        JournalError: it names too many voids.
    """
    document = msgspec.json.encode(header)
    document += b" " * (-(len(document) + FRAME_BYTES) % _BLOCK)
    data = encode_frame(0, document, 0) * 2
    if len(data) > HEADERS_BYTES_MAX:
        raise JournalError(f"{len(header.voids)} failed writes could not be undone, more than a header can name")
    return data


def number_of(name: str) -> int:
    """The number of the segment that a file is, or was part of; 0: of none."""
    match = _NAME.match(name)
    return 0 if match is None else int(match[1])


class Opening(NamedTuple):
    """How a segment begins: its header, if a copy is whole, the copy that is not, and where the frames begin."""

    header: Header | None
    damage: Damage | None
    end: int


def decode_headers(data: bytes, what: str) -> Opening:
    """Read the first `HEADERS_BYTES_MAX` bytes of a segment, or all that it has.

    Raises:
        JournalError: it is of a later format. `what` names the segment.
        JournalCorrupt: it is whole, and no header.
    """
    frame = whole_frame(data, 0, 0)
    if frame is not None and frame.sequence == 0:
        end = frame.end * 2
        damaged = data[frame.end : end] != data[: frame.end]
        damage = Damage(frame.end, min(end, len(data)), torn=len(data) < end) if damaged else None
        return Opening(_decode(frame.payload, what), damage, end)
    # The second copy begins on a multiple of the block, behind a newline or where the first one says that it ends: no
    # message holds a newline, so none can pass for a header.
    claimed = document_bytes(data) + FRAME_BYTES
    for start in range(_BLOCK, len(data) // 2 + 1, _BLOCK):
        if data[start - 1] == 0x0A or start == claimed:
            frame = whole_frame(data, start, 0)
            if frame is not None and frame.sequence == 0 and frame.end == start * 2:
                return Opening(_decode(frame.payload, what), Damage(0, start, torn=False), frame.end)
    return Opening(None, None, 0)


def _decode(document: bytes, what: str) -> Header:
    try:
        format_ = msgspec.json.decode(document, type=_Format).format
        if format_ > FORMAT:
            raise JournalError(
                f"{what} is of format {format_}, this version of agent-runtime reads up to {FORMAT}: "
                "use the version that wrote it"
            )
        return msgspec.json.decode(document, type=Header)
    except msgspec.MsgspecError as error:
        raise JournalCorrupt(f"{what} has a whole header that says nothing known: {error}") from error
