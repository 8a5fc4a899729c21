"""A database whose runtime crashed: it has its sessions, and only the journal has their messages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from anyio.lowlevel import checkpoint
from msgspec import Raw

from agent_runtime import Message
from agent_runtime.changes import Change, encode_change, message_row
from agent_runtime.identifiers import utc_now
from agent_runtime.journal import Journal, LocalFiles, read_directory
from places import Place, in_file

from .sample import messages

__all__ = ["BATCH", "Crashed"]

BATCH: Final = 1000
_SESSIONS: Final = 50
_SEGMENT_BYTES: Final = 64 * 1024 * 1024
_CHATS: Final = messages(990)


class Crashed:
    """`size` real messages, each a change of its own, of 50 sessions in turn."""

    def __init__(self, directory: Path, size: int) -> None:
        self.size = size
        directory.mkdir()
        self._journal = Path(f"{in_file(directory).path}.journal")

    @property
    def place(self) -> Place:
        path = self._journal.with_suffix("")
        return Place(f"sqlite:///{path}", path=path)

    @property
    def end(self) -> int:
        """The sequence of the last change."""
        return self._first + self.size - 1

    async def make(self) -> None:
        """Make the sessions, and write the journal as a runtime would whose database takes nothing."""
        async with self.place.open() as runtime:
            sessions = [await runtime.create_session() for _ in range(_SESSIONS)]
            await runtime.flush()
            self._first = runtime.watermarks.accepted + 1
            self._ids = [(session.session_id, session.incarnation) for session in sessions]
        files = LocalFiles(self._journal)
        assert files.lock()
        directory = read_directory(files)
        assert directory.journal_id is not None
        assert directory.database_id is not None
        journal = await Journal.begin(
            files,
            directory,
            journal_id=directory.journal_id,
            database_id=directory.database_id,
            generation=directory.generation + 1,
            after=self._first - 1,
            segment_bytes=_SEGMENT_BYTES,
            pending_bytes=lambda: 0,
        )
        for number in range(self.size):
            change = self._change(number)
            journal.append([(change.sequence, encode_change(change))])
            if number % BATCH == 0:
                await checkpoint()
        journal.close()
        files.close()

    def copy(self, directory: Path) -> Place:
        """The same again. The segments are the same files: a recovery removes their names, and no more of them."""
        directory.mkdir()
        path = Path(shutil.copyfile(self.place.path, directory / self.place.path.name))
        shutil.copytree(self._journal, directory / self._journal.name, copy_function=os.link)
        return Place(f"sqlite:///{path}", path=path)

    def remove(self) -> None:
        """Remove the files: they take a gigabyte for a million changes."""
        shutil.rmtree(self.place.path.parent)

    def rows(self) -> Iterator[list[dict[str, Any]]]:
        """The rows that the changes lead to, a batch at a time, in the order of the key."""
        for start in range(0, self.size, BATCH):
            numbers = range(start, min(start + BATCH, self.size))
            rows = [message_row(self._ids[number % _SESSIONS][1], _message(number)) for number in numbers]
            yield sorted(map(msgspec.structs.asdict, rows), key=lambda row: (row["incarnation"], row["seq"]))

    def _change(self, number: int) -> Change:
        sequence = self._first + number
        session_id, incarnation = self._ids[number % _SESSIONS]
        round_ = number // _SESSIONS
        return Change(
            sequence=sequence,
            previous=sequence - _SESSIONS,  # of the first ones: that of the session's creation
            session_id=session_id,
            incarnation=incarnation,
            last_activity=utc_now(),
            message_count=round_ + 1,
            next_seq=round_ + 2,
            messages=(Raw(_message(number)),),
        )


def _message(number: int) -> bytes:
    chat = _CHATS[number % len(_CHATS)]
    seq = number // _SESSIONS + 1
    return msgspec.json.encode(Message(seq=seq, id=f"{number:036}", created_at=utc_now(), **chat))
