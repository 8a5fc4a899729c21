"""Sessions in and out: JSON Lines, one session a line, in the format of `archive`.

Import: entries, each with such a line, are read as they are needed; a file of lines is the format `chat`, others come
from plugins (`formats`). A few sessions are in flight at once, so that one is looked up while another is parsed; new
ones are made in the order of their lines. A session that can't be stored, or differs from the one that is there under
its id, is refused as a whole, naming its line and the place in it; the others go in. What is there already is left
alone, so an import may be repeated, and one that was interrupted goes on where it stopped. It ends when everything is
stored.

Export: a line is a session at one moment; lines are in order of creation. A file appears whole under its name, or not
at all.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Final, Literal

import anyio
import anyio.to_thread
import msgspec

from .archive import Archive, archive_line, parse_line
from .archives import Restored
from .errors import (
    AgentRuntimeError,
    InvalidInput,
    Overloaded,
    Quarantined,
    SessionExists,
    SessionHeld,
    SessionNotFound,
)
from .formats import Entry
from .identifiers import utc_now
from .runtime import Runtime
from .session import PAGE_ITEMS_MAX

__all__ = [
    "LINE_BYTES_MAX",
    "Imported",
    "chat_entries",
    "export_sessions",
    "import_sessions",
    "new_file",
    "read_archive",
    "read_lines",
    "restore_session",
]

LINE_BYTES_MAX: Final = 1024**3
"""The longest line that is read: bounds the memory that a file takes which has no lines at all."""

_BLOCK_BYTES: Final = 1024 * 1024
_IN_FLIGHT: Final = 4


async def read_archive(runtime: Runtime, session_id: str) -> Archive:
    """A session, whole, at one moment. Raises SessionNotFound."""
    return await runtime._archives.read(session_id)


async def restore_session(runtime: Runtime, archive: Archive) -> Restored:
    """Make the session that the archive describes; `Archives.restore` says what it returns and raises."""
    return await runtime._archives.restore(archive)


# --- import -----------------------------------------------------------------------------------------------------------


class Imported(msgspec.Struct):
    """How many sessions of an import are new, had messages appended, were there already, and could not be restored.

    `problems` counts what the source had besides that did not become what it should, and was told of.
    """

    created: int = 0
    resumed: int = 0
    unchanged: int = 0
    refused: int = 0
    problems: int = 0

    @property
    def sessions(self) -> int:
        """All of them."""
        return self.created + self.resumed + self.unchanged + self.refused

    @property
    def complete(self) -> bool:
        """Whether all that the source had is there now."""
        return not (self.refused or self.problems)

    def count(self, outcome: Restored | Literal["refused", "problems"]) -> None:
        """One more."""
        setattr(self, outcome, getattr(self, outcome) + 1)


async def import_sessions(
    runtime: Runtime,
    entries: AsyncIterable[Entry],
    *,
    refused: Callable[[str], None],
    progress: Callable[[Imported, int], None] = lambda imported, size: None,
) -> Imported:
    """Restore the session of each entry; blank ones are skipped. Returns when all are stored.

    `refused` is told of each problem, and of each session that is not restored, in a text that begins with the place of
    the entry. `progress` is told, after each entry, the numbers and the sizes so far.

    Raises:
        StorageError, LeaseLost, Quarantined, RuntimeClosed: it stopped, or what it did could not be stored.
        AgentRuntimeError: the source can't be read (any further).
    """
    run = _Import(runtime, refused, progress)
    begun_at = runtime.watermarks.accepted
    async with anyio.create_task_group() as tasks:
        turn = anyio.Event()
        turn.set()
        try:
            async for entry in entries:
                await run.slots.acquire()
                mine, turn = turn, anyio.Event()
                tasks.start_soon(run.restore, entry, utc_now(), mine, turn, tasks.cancel_scope)
        except AgentRuntimeError as error:
            run.failure = error  # raised below, by itself; what was read before is restored
    if run.failure is not None:
        raise run.failure
    await _flush(runtime)
    kept = [change.sequence for change in await runtime.quarantine.entries() if change.sequence > begun_at]
    if kept:
        raise Quarantined(kept)
    return run.imported


async def _flush(runtime: Runtime) -> None:
    with suppress(Quarantined):  # looked for at the end: what went there in batches before would not be told of here
        await runtime.flush()


class _Import:
    """An import under way."""

    def __init__(
        self, runtime: Runtime, refused: Callable[[str], None], progress: Callable[[Imported, int], None]
    ) -> None:
        self.imported = Imported()
        self.failure: AgentRuntimeError | None = None
        self.slots = anyio.Semaphore(_IN_FLIGHT, fast_acquire=True)
        self._runtime = runtime
        self._refused = refused
        self._progress = progress
        self._size = 0

    async def restore(
        self, entry: Entry, now: datetime, turn: anyio.Event, done: anyio.Event, scope: anyio.CancelScope
    ) -> None:
        """Restore an entry's session. New ones, and reports, wait for their turn, when all entries before are done."""
        try:
            outcome = await self._outcome(entry.line, now, turn) if entry.line.strip() else None
        except AgentRuntimeError as error:
            self.failure = self.failure or error
            scope.cancel()
            return
        await turn.wait()
        self._size += entry.size
        for problem in entry.problems:
            self.imported.count("problems")
            self._refused(f"{entry.place}: {problem}")
        if isinstance(outcome, InvalidInput):
            self.imported.count("refused")
            self._refused(f"{entry.place}: {_in_source(outcome, entry.places)}")
        elif outcome is not None:
            self.imported.count(outcome)
        self._progress(self.imported, self._size)
        done.set()
        self.slots.release()

    async def _outcome(self, line: bytes, now: datetime, turn: anyio.Event) -> Restored | InvalidInput:
        try:
            if len(line) > LINE_BYTES_MAX + 1:
                raise InvalidInput("line", f"has more than {LINE_BYTES_MAX} bytes")
            archive = parse_line(line, now)
            try:
                await self._runtime.get_session(archive.session_id)
            except SessionNotFound:
                await turn.wait()
            while True:
                try:
                    return await restore_session(self._runtime, archive)
                except Overloaded:
                    await _flush(self._runtime)
        except InvalidInput as error:
            return error
        except SessionHeld as error:
            return InvalidInput("session_id", str(error))
        except SessionExists as error:
            return InvalidInput(
                "session_id",
                f"{error}, with other messages; delete it first, or give this one another id",
            )


def _in_source(error: InvalidInput, places: Mapping[str, str]) -> str:
    """The error, with the place in the line called what it is in the source: by the longest that is known."""
    for place in sorted(places, key=len, reverse=True):
        rest = error.path.removeprefix(place)
        if rest != error.path and rest[:1] in ("", ".", "["):
            return f"{places[place]}{rest}: {error.problem}"
    return str(error)


async def chat_entries(name: str, lines: AsyncIterable[bytes]) -> AsyncGenerator[Entry, None]:
    """The lines of a file called `name`, by their numbers."""
    number = 0
    async for line in lines:
        number += 1
        yield Entry(place=f"{name}:{number}", line=line, size=len(line))


async def read_lines(file: BinaryIO) -> AsyncGenerator[bytes, None]:
    """The lines of a file, of a pipe also as they come. Of one longer than LINE_BYTES_MAX a little more than that."""
    begun: list[bytes] = []
    room = LINE_BYTES_MAX + 1
    while block := await _block(file):
        *ends, rest = block.split(b"\n")
        for end in ends:
            yield b"".join([*begun, end[:room], b"\n"])
            begun, room = [], LINE_BYTES_MAX + 1
        begun.append(rest[:room])
        room -= len(begun[-1])
    if line := b"".join(begun):
        yield line


async def _block(file: BinaryIO) -> bytes:
    """Some bytes; none at the end."""
    descriptor = file.fileno()
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor):
        await anyio.wait_readable(descriptor)  # a thread that waits for somebody to write could not be cancelled
        return os.read(descriptor, _BLOCK_BYTES)
    return await anyio.to_thread.run_sync(os.read, descriptor, _BLOCK_BYTES)


# --- export -----------------------------------------------------------------------------------------------------------


async def export_sessions(
    runtime: Runtime,
    write: Callable[[bytes], Awaitable[object]],
    *,
    session_ids: Sequence[str] | None = None,
    plain: bool = False,
    progress: Callable[[int, int], None] = lambda sessions, size: None,
) -> int:
    """Write the line of each session (None: of all, the oldest first; else of these, in their order). Returns how many.

    `plain`: with nothing but their ids and the messages. `progress` is told, after each, the sessions and bytes so far.

    Raises:
        SessionNotFound: one of `session_ids` is no session's. (One of all that is deleted meanwhile is left out.)
    """
    sessions, size = 0, 0

    async def export(session_id: str) -> None:
        nonlocal sessions, size
        line = archive_line(await read_archive(runtime, session_id), plain=plain)
        await write(line)
        sessions, size = sessions + 1, size + len(line)
        progress(sessions, size)

    if session_ids is not None:
        for session_id in session_ids:
            await export(session_id)
        return sessions
    cursor: str | None = None
    while True:
        page = await runtime.list_sessions(limit=PAGE_ITEMS_MAX, cursor=cursor, order="asc")
        for record in page.items:
            with suppress(SessionNotFound):
                await export(record.session_id)
        cursor = page.next
        if cursor is None:
            return sessions


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be written, which takes the name `path` when the block is left without an error; else nothing is there.

    It replaces a file under that name, in one step and with that one's mode. What is there and no regular file (a
    device, a pipe) is written to instead.

    Raises:
        OSError: of the file's name and nobody else's.
    """
    path = path.resolve()
    mode = path.stat().st_mode if path.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        with _named(path), path.open("wb") as file:
            yield file
        return
    draft = path.with_name(f".{secrets.token_hex(8)}.draft")
    try:
        with _named(path), draft.open("xb") as file:
            if mode is not None:
                draft.chmod(stat.S_IMODE(mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        with _named(path):
            draft.replace(path)
            _sync_directory(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of the draft tells the name that the file was to have."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
