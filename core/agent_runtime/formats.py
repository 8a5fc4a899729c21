"""What `agent-runtime import` can read besides our own lines: formats that plugins bring.

A format turns what it is given, the name of a file or a URL, into entries. Each is a session as a line in the format of
`archive`, which is then checked and restored as any other line; so a format checks only what it takes apart itself.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import msgspec

__all__ = ["Entry", "ImportFormat", "ImportRequest", "ImportSource"]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A session of a source; an entry without a line is none, and only has problems to tell.

    `place` is what a report of it begins with. `places` are places in the line as people find them in the source: with
    `{"messages[3]": "row 4711"}` what is wrong with that message is told of row 4711. `problems` are what of the source
    did not become what it should, in words that name where it stands there: each is told, and makes the import fail at
    its end. `size` is how much of the source's total this is.
    """

    place: str
    line: bytes = b""
    places: Mapping[str, str] = {}
    problems: Sequence[str] = ()
    size: int = 0


class ImportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be read: `source`, as the command line has it; `deleted`: also sessions only marked as deleted."""

    source: str
    deleted: bool = False


class ImportSource(msgspec.Struct, frozen=True, kw_only=True):
    """What is read. `name` is the source in reports, without secrets; `total` the sum of its entries' sizes, if known.

    `entries` runs on the event loop of the import, asyncio or trio, and is closed at its end.
    """

    name: str
    entries: AsyncGenerator[Entry, None]
    total: int | None = None


ImportFormat: TypeAlias = Callable[[ImportRequest], AbstractContextManager[ImportSource]]
"""Opens a source, before the runtime is opened: what can't be read at all is found before anything is written.

Raises:
    InvalidInput: the source can't be read; `path` is "source".
    OSError: of a file.
"""
