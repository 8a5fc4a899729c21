"""The directories of journals: which one is ours, and what others hold.

One runtime writes to one directory, which it has under a lock. Where the configuration names it there is no other. The
default one lies beside a file of a database, and there may be more: `<file>.journal`, `<file>.journal.2`, and so on. A
holder that is frozen keeps the lock on its directory, and so may a forked child of one that is dead; whoever takes over
takes the next one. So the rule is:

- If the first directory is locked, and somebody has a lease of the database that has not expired, that is who has it.
- Else the first directory that can be locked is ours; but rather one whose changes go on where the database ends.
- All others that can be locked are brought in and emptied; the ones that can't be are named as unfinished.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from .config import Config
from .errors import ConfigError, JournalError, LeaseHeld
from .filesystems import network_filesystem
from .journal import Directory, JournalFiles, LocalFiles, read_directory
from .storage import Abilities, JournalRow, LeaseRow, Storage

__all__ = [
    "Found",
    "Overtaken",
    "Taken",
    "Unfinished",
    "ask",
    "holder_of",
    "journal_files",
    "journal_place",
    "journal_places",
    "overtaken_in",
    "take",
    "take_directories",
]

logger: Final = logging.getLogger("agent_runtime.journal")


class Found(NamedTuple):
    """What the database says."""

    watermark: int
    lease: LeaseRow | None
    journal: JournalRow | None


class Overtaken(NamedTuple):
    """A journal whose changes above `stored` the database lacks, while another runtime has written since."""

    files: JournalFiles
    directory: Directory
    journal_id: str
    stored: int


class Unfinished(msgspec.Struct, frozen=True, kw_only=True):
    """A journal that may have changes which the database lacks, and that was not to be had.

    They come back when it is opened again. `place` is its directory, `holder` who had it, as far as that is known.
    """

    journal_id: str | None = None
    place: str | None = None
    holder: str | None = None


class Taken:
    """The directories that are locked. `files` and `directory` are ours (None: there is no journal).

    `overtaken` are others with changes that the database lacks, `unfinished` those that could not be had.
    """

    def __init__(self) -> None:
        self.files: JournalFiles | None = None
        self.directory: Directory | None = None
        self.overtaken: list[Overtaken] = []
        self.unfinished: list[Unfinished] = []
        self.journal_ids: set[str] = set()
        self._locked: list[JournalFiles] = []

    def lock(self, files: JournalFiles) -> bool:
        """Take a directory, to be given back with all others; False: another process has it. Raises as `take`."""
        locked = take(files)
        if locked:
            self._locked.append(files)
        return locked

    def read(self, files: JournalFiles) -> Directory:
        """What a directory holds that was locked. Raises as `read_directory`."""
        directory = read_directory(files)
        if directory.journal_id is not None:
            self.journal_ids.add(directory.journal_id)
        return directory

    def leave(self, files: JournalFiles, holder: str | None = None) -> None:
        """This one can't be had: it is named, and comes in when it is opened again."""
        try:
            journal_id = read_directory(files).journal_id
        except JournalError:
            journal_id = None
        if journal_id is not None:
            self.journal_ids.add(journal_id)
        self.unfinished.append(Unfinished(place=files.place, journal_id=journal_id, holder=holder))

    def close(self) -> None:
        """Give all of them back."""
        for files in self._locked:
            files.close()


def journal_place(config: Config, abilities: Abilities) -> Path | None:
    """Where the journal would lie, whether it is switched on or not; None: nobody says."""
    place = config.journal.directory or abilities.journal_directory
    return None if place is None else Path(place).absolute()


def journal_places(config: Config | None, abilities: Abilities) -> list[Path]:
    """Where journals may lie, in order: the one that the configuration names, or else the default one and those that
    are there beside it. Empty: nobody says."""
    if config is not None and config.journal.directory:
        return [Path(config.journal.directory).absolute()]
    if abilities.journal_directory is None:
        return []
    first = Path(abilities.journal_directory).absolute()
    return [first, *_beside(first)]


def journal_files(config: Config, abilities: Abilities) -> JournalFiles | None:
    """The directory of the journal; None: there is none. One that is there is opened even where the journal is off.

    Raises:
        ConfigError: nobody said where it is to lie.
    """
    path = journal_place(config, abilities)
    if path is not None:
        if not config.journal.enabled and not path.is_dir():
            return None
        if filesystem := network_filesystem(path):
            raise ConfigError(
                [f"journal.directory: {path} lies on a network filesystem ({filesystem}): choose a local disk"]
            )
        return LocalFiles(path)
    if not config.journal.enabled:
        return None
    if abilities.survives == "nothing" and config.origin("journal.enabled") == "default":
        return None  # there is nothing that a journal could bring back
    problem = "must be set for this database, to a directory on a local disk that outlives the process; or set"
    raise ConfigError([f"journal.directory: {problem} journal.enabled to false, and a crash loses what is not stored"])


def take(files: JournalFiles) -> bool:
    """Take the journal's directory; False: another process has it.

    Raises:
        JournalError: it can't be used.
    """
    try:
        return files.lock()
    except OSError as error:
        raise JournalError(
            f"the journal's directory {files.place} can't be used ({error.strerror}): make it writable for this user, "
            "or name another one in journal.directory"
        ) from error


async def holder_of(storage: Storage, files: JournalFiles) -> LeaseHeld:
    """The error that names who has the journal's directory, as far as the database knows."""
    async with storage.snapshot() as snapshot:
        row = await snapshot.lease()
    if row is None or row.holder is None:
        return LeaseHeld(f"another process, which has the journal {files.place}")
    return LeaseHeld(row.holder, row.expires_in_s, row.address)


async def ask(storage: Storage, journal_id: str | None) -> Found:
    """What the database says of itself, of its lease, and of a journal."""
    async with storage.snapshot() as snapshot:
        row = None if journal_id is None else await snapshot.journal(journal_id)
        return Found(snapshot.watermark, await snapshot.lease(), row)


def overtaken_in(files: JournalFiles, directory: Directory, found: Found, abilities: Abilities) -> Overtaken | None:
    """The journal as one that was overtaken: another runtime has written since it was stored last.

    A journal that is written to is stored as far as the database: so all that it has beyond that is late now.
    """
    row = found.journal
    if row is None or abilities.survives == "nothing" or row.sequence >= found.watermark:
        return None
    return Overtaken(files, directory, row.journal_id, row.sequence)


async def take_directories(storage: Storage, files: JournalFiles | None, beside: Path | None) -> Taken:
    """Take our directory; with `beside`, which is the default one, also those beside it.

    Raises:
        LeaseHeld: another process has it.
        JournalError: it can't be used, or read.
        StorageError: the database can't be asked.
    """
    taken = Taken()
    try:
        if beside is not None:
            await _take_all(storage, files, beside, taken)
        elif files is not None:
            if not taken.lock(files):
                raise await holder_of(storage, files)
            taken.files, taken.directory = files, taken.read(files)
    except BaseException:
        taken.close()
        raise
    return taken


class _Found(NamedTuple):
    """A directory that was locked, and what the database says of its journal."""

    files: JournalFiles
    directory: Directory
    said: Found

    @property
    def unstored(self) -> bool:
        row = self.said.journal
        return row is not None and next(self.directory.frames(after=row.sequence), None) is not None

    @property
    def goes_on(self) -> bool:
        """Whether its changes follow what the database has."""
        row = self.said.journal
        return row is not None and row.sequence == self.said.watermark and self.unstored


async def _take_all(storage: Storage, files: JournalFiles | None, first: Path, taken: Taken) -> None:
    """`files` is the first one; None: no journal is wanted, but there may be some."""
    free: list[_Found] = []
    if files is not None:
        if taken.lock(files):
            free.append(await _look(storage, taken, files))
        else:
            refusal = await holder_of(storage, files)
            if refusal.expires_in_s is not None and refusal.expires_in_s > 0:
                raise refusal
            taken.leave(files, None if refusal.expires_in_s is None else refusal.holder)
    for path in _beside(first):
        other = LocalFiles(path)
        try:
            if taken.lock(other):
                free.append(await _look(storage, taken, other))
                continue
        except JournalError as error:
            logger.warning("a journal is left as it is: %s", error)
        taken.leave(other)
    if files is not None:
        if not free:
            files = LocalFiles(next(path for path in _numbered(first) if not path.exists()))
            if not taken.lock(files):
                raise await holder_of(storage, files)
            free.append(await _look(storage, taken, files))
        ours = next((each for each in free if each.goes_on), free[0])
        taken.files, taken.directory = ours.files, ours.directory
        free.remove(ours)
    for files, directory, said in free:
        if said.journal is not None and (said.lease is None or said.lease.database_id == directory.database_id):
            taken.overtaken.append(Overtaken(files, directory, said.journal.journal_id, said.journal.sequence))
        elif directory.segments:
            logger.warning("the journal %s is not this database's, and is left as it is", files.place)


async def _look(storage: Storage, taken: Taken, files: JournalFiles) -> _Found:
    directory = taken.read(files)
    return _Found(files, directory, await ask(storage, directory.journal_id))


def _numbered(first: Path) -> Iterator[Path]:
    return (first.with_name(f"{first.name}.{number}") for number in count(2))


def _beside(first: Path) -> list[Path]:
    """The directories that are there, besides the first one, in order."""
    pattern = re.compile(re.escape(first.name) + r"\.([1-9][0-9]*)")
    paths = first.parent.iterdir() if first.parent.is_dir() else ()
    found = {int(match[1]): path for path in paths if (match := pattern.fullmatch(path.name))}
    return [found[number] for number in sorted(found)]
