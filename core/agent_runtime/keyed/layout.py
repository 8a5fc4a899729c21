"""Where what is kept: keys whose order by bytes is the order of lists.

A key is its parts, joined by NUL, which is in no part and before every character; UTF-8 sorts by code points.

| kind | after partition and kind | value |
|---|---|---|
| `standing` | | `Standing`: the guard |
| `session` | created_at, incarnation | the row |
| `incarnation`, `id` | incarnation; session_id | the key of the session |
| `user` | user_id, created_at, incarnation | the key of the session |
| `context` | incarnation | the row |
| `message`, `switch` | incarnation, seq or number | the row |
| `document` | incarnation, collection, key | the row |
| `outcome` | scope, key | the row |
| `expiry` | expires_at, scope, key | the key of the outcome |
| `quarantine` | sequence | the row |
| `purge` | incarnation | `Purge`: what is still to be deleted |
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, TypeVar

import msgspec

from ..rows import OutcomeRow, SessionRow

__all__ = [
    "BELONGINGS",
    "Purge",
    "Writes",
    "behind",
    "expiry_key",
    "key",
    "outcome_key",
    "pack",
    "session_keys",
    "span",
    "unpack",
]

T = TypeVar("T")
BELONGINGS: Final = ("message", "switch", "document", "context")
"""What is deleted with a session."""

pack: Final = msgspec.msgpack.Encoder().encode


class Purge(msgspec.Struct, frozen=True):
    """Belongings that nobody sees: messages up to the floor, or all (None)."""

    incarnation: str
    floor: int | None


class Writes:
    """What a transaction writes."""

    def __init__(self) -> None:
        self.puts: dict[bytes, bytes] = {}
        self.deletes: set[bytes] = set()

    def put(self, key: bytes, value: object) -> None:
        """Put a row, or the key of one."""
        self.puts[key] = value if isinstance(value, bytes) else pack(value)


def unpack(value: bytes, kind: type[T]) -> T:
    """The row that `pack` made bytes of."""
    return msgspec.msgpack.decode(value, type=kind)


def key(partition: int, kind: str, *parts: str | int | datetime) -> bytes:
    """A key, or what the keys with more parts begin with. Numbers and times are of one length, so that they sort."""
    return "\0".join([f"{partition:x}", kind, *map(_text, parts)]).encode()


def _text(part: str | int | datetime) -> str:
    if isinstance(part, datetime):
        return part.isoformat(timespec="microseconds")
    return part if isinstance(part, str) else f"{part:016x}"


def span(beginning: bytes) -> tuple[bytes, bytes]:
    """From where to where all keys have these first parts and more."""
    return beginning + b"\0", beginning + b"\1"


def behind(key: bytes) -> bytes:
    """The first key behind this one and those that have more parts."""
    return key + b"\1"


def session_keys(partition: int, row: SessionRow) -> Mapping[bytes, Any]:
    """Where a session is found: its own key first."""
    place = key(partition, "session", row.created_at, row.incarnation)
    keys: dict[bytes, Any] = {place: row}
    keys[key(partition, "incarnation", row.incarnation)] = place
    keys[key(partition, "id", row.session_id)] = place
    if row.user_id is not None:
        keys[key(partition, "user", row.user_id, row.created_at, row.incarnation)] = place
    return keys


def outcome_key(partition: int, row: OutcomeRow) -> bytes:
    """Where an outcome is."""
    return key(partition, "outcome", row.scope, row.key)


def expiry_key(partition: int, row: OutcomeRow) -> bytes:
    """Where it stands that an outcome expires."""
    return key(partition, "expiry", row.expires_at, row.scope, row.key)
