"""What a crash leaves: a database and a journal with changes that are not stored, to be looked at and damaged by hand."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from agent_runtime import Config, open_runtime_blocking
from agent_runtime.changes import Change, encode_change
from agent_runtime.journal import LocalFiles, read_directory
from agent_runtime.journal.frames import Frame, encode_frame, seed_of
from agent_runtime.journal.still import StillFiles
from places import NEVER_S, in_file

SEGMENT_BYTES = 4096
STORED = 21
END = 32


def leave_crash(directory: Path) -> None:
    """The files as a runtime would leave them that is killed: changes up to STORED are stored, those up to END not."""
    place = in_file(directory)
    with place.open_blocking(journal={"segment_bytes": SEGMENT_BYTES}) as runtime:
        plain = runtime.create_session("plain", system_prompt="lead")
        for number in range(5):
            plain.append("user", f"said {number} " + "x" * 100)
        plain.pop()
        cleared = runtime.create_session("cleared")
        cleared.append_many([{"role": "user", "content": "hushed"}] * 4)
        cleared.clear()
        cleared.append_many([{"role": "user", "content": "said"}] * 2)
        switched = runtime.create_session("switched")
        switched.switch_agent("coder", reason="because")
        switched.switch_agent("writer")
        switched.put_document("notes", "a", {"b": 1})
        gone = runtime.create_session("gone")
        gone.append("user", "soon forgotten")
        ended = runtime.create_session("ended")
        ended.append("user", "to the end")
        gone.delete()
        ended.append("user", "still")
        runtime.flush()
        assert runtime.watermarks.stored == STORED
        for number in range(6):
            plain.append("user", f"unstored {number} " + "x" * 400)
        new = runtime.create_session("new")
        new.append("user", "unstored too")
        switched.switch_agent("coder")
        cleared.clear()
        ended.delete()
        assert runtime.watermarks.accepted == END
        left = directory / "left"
        shutil.copytree(place.path.parent, left, ignore=shutil.ignore_patterns("left"))
    for path in (*place.path.parent.glob("sessions.db*"),):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in left.iterdir():
        path.rename(directory / path.name)
    left.rmdir()


class Left:
    """A database and its journal in a directory."""

    def __init__(self, directory: Path, journal: str = "sessions.db.journal") -> None:
        self.database = directory / "sessions.db"
        self.journal = directory / journal

    @classmethod
    def copy(cls, source: Path, directory: Path) -> Left:
        """A copy of what a crash has left."""
        shutil.copytree(source, directory, dirs_exist_ok=True)
        return cls(directory)

    @property
    def segments(self) -> list[Path]:
        return sorted(self.journal.glob("*.segment"))

    def sql(self, *statements: str) -> Left:
        """Change the database behind everyone's back."""
        with closing(sqlite3.connect(self.database)) as connection:
            for statement in statements:
                assert connection.execute(statement).rowcount != 0, statement
            connection.commit()
        return self

    def quarantine(self, change: Change, state: str = "rejected") -> Left:
        """Put a change into quarantine."""
        with closing(sqlite3.connect(self.database)) as connection:
            row = (change.sequence, change.session_id, change.incarnation, state, encode_change(change))
            statement = "INSERT INTO quarantine VALUES (0, ?, ?, ?, ?, 'no', ?, '2026-03-01T00:00:00.000000Z')"
            connection.execute(statement, row)
            connection.commit()
        return self

    def value(self, query: str) -> str:
        """A value of the database."""
        with closing(sqlite3.connect(self.database)) as connection:
            return str(connection.execute(query).fetchone()[0])

    @property
    def journal_id(self) -> str:
        with closing(StillFiles(self.journal)) as files:
            return read_directory(files).journal_id or ""

    def frames(self) -> dict[int, tuple[Path, Frame]]:
        """Every frame, and the file that it is in."""
        with closing(StillFiles(self.journal)) as files:
            directory = read_directory(files)
            names = {segment.first: segment.name for segment in directory.segments}
            found = {}
            for item in directory.frames(after=(directory.first_retained or 1) - 1):
                assert isinstance(item, Frame)
                name = names[max(first for first in names if first <= item.sequence)]
                found[item.sequence] = self.journal / name, item
        return found

    def change(self, sequence: int) -> Change:
        return msgspec.json.decode(self.frames()[sequence][1].payload, type=Change)

    @contextmanager
    def overtaken(self) -> Iterator[Left]:
        """Another runtime has taken over, while the dead one's child keeps its journal locked: the one that writes now.

        It has stored a message of the session `plain`, and has another one that is not stored.
        """
        self.sql("UPDATE partitions SET expires_at = 0")
        config = Config.of(f"sqlite:///{self.database}", write_behind={"interval_s": NEVER_S})
        with closing(LocalFiles(self.journal)) as files:
            assert files.lock()
            with open_runtime_blocking(config) as runtime:
                session = runtime.get_session("plain")
                session.append("user", "meanwhile", durability="stored")
                session.append("user", "on time")
                yield Left(self.database.parent, f"{self.journal.name}.2")

    def damage(self, sequence: int) -> tuple[Path, Frame]:
        """Flip a bit of the frame of a change."""
        path, frame = self.frames()[sequence]
        data = bytearray(path.read_bytes())
        data[frame.end - 5] ^= 1
        path.write_bytes(data)
        return path, frame

    def append(self, sequence: int, change: Change | bytes) -> None:
        """Write one more frame into the newest segment."""
        with self.segments[-1].open("ab") as file:
            file.write(self._frame(sequence, change))

    def rewrite(self, sequence: int, change: Change | bytes) -> None:
        """Put another change in the place of one, into a frame that is whole."""
        path, frame = self.frames()[sequence]
        data = path.read_bytes()
        path.write_bytes(data[: frame.start] + self._frame(sequence, change) + data[frame.end :])

    def _frame(self, sequence: int, change: Change | bytes) -> bytes:
        payload = change if isinstance(change, bytes) else encode_change(change)
        return encode_frame(sequence, payload, seed_of(self.journal_id))
