"""Sessions in and out: JSON Lines, one session a line, in the format of `archive`.

Import: lines are read as they are needed, and a few sessions are in flight at once, each looked up while others are
parsed; they are made in the order of their lines. A session that can't be stored, or differs from the one that is there
under its id, is refused as a whole, with its line and the place in it; the others go in. What is there already is left
alone, so an import may be repeated, and one that was interrupted goes on where it stopped. It ends when everything is
stored.

Export: each line is a session at one moment, in order of creation. A file appears whole under its name, or not at all.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Final

import anyio
import anyio.to_thread
import msgspec

from .archive import Archive, archive_line, parse_line
from .archives import Restored
from .errors import AgentRuntimeError, InvalidInput, Overloaded, SessionExists, SessionHeld, SessionNotFound, StorageError
from .identifiers import utc_now
from .runtime import Runtime

__all__ = [
    "LINE_BYTES_MAX",
    "Imported",
    "export_sessions",
    "import_sessions",
    "new_file",
    "read_archive",
    "read_lines",
    "restore_session",
]

LINE_BYTES_MAX: Final = 1024**3
"""The longest line that is read. It bounds the memory that a file takes which is not JSON Lines at all."""

_BLOCK_BYTES: Final = 1024 * 1024
_IN_FLIGHT: Final = 4


async def read_archive(runtime: Runtime, session_id: str) -> Archive:
    """A session, whole, as it is at one moment. Raises SessionNotFound."""
    return await runtime._archives.read(session_id)


async def restore_session(runtime: Runtime, archive: Archive) -> Restored:
    """Make the session that the archive describes; what it returns and raises is said at `Archives.restore`."""
    return await runtime._archives.restore(archive)


# --- import -----------------------------------------------------------------------------------------------------------


class Imported(msgspec.Struct):
    """What became of the sessions of an import, in numbers."""

    created: int = 0
    resumed: int = 0
    unchanged: int = 0
    refused: int = 0


async def import_sessions(
    runtime: Runtime,
    lines: AsyncIterable[bytes],
    *,
    name: str,
    refused: Callable[[str], None],
    progress: Callable[[Imported, int], None] = lambda imported, size: None,
) -> Imported:
    """Restore the session of each line; returns when all are stored.

    `refused` is told of each session that is not restored, in a line of text that begins with `name` and the number of
    its line. `progress` is called after each line, with the numbers so far and the bytes read.
    """
    imported, size, number = Imported(), 0, 0
    async for line in lines:
        number += 1
        size += len(line)
        if line.strip():
            try:
                archive = parse_line(line, utc_now())
                restored = await _restored(runtime, archive)
                setattr(imported, restored, getattr(imported, restored)+1)
            except InvalidInput as error:
                imported.refused += 1
                refused(f"{name}:{number}: {error}")
            progress(imported, size)
    await runtime.flush()
    return imported

async def _restored(runtime, archive):
    while True:
        try:
            return await restore_session(runtime, archive)
        except Overloaded:
            await runtime.flush()
