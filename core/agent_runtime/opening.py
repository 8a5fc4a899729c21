"""How a database and its journal are opened together: each is asked who the other is, before anything is written.

The order: take the directory, read what the journal says of itself and what the database says of the journal, compare,
take the lease, bring the database up to date, begin a new segment. A crash anywhere in between is healed by doing it
all again. What does not belong together is refused, and left as it is.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple
from uuid import uuid4

import anyio

from .config import Config
from .errors import ConfigError, JournalError, JournalMismatch, LeaseHeld
from .filesystems import network_filesystem
from .journal import Directory, JournalFiles, LocalFiles, read_directory
from .lease import LeaseKeeper, claim_of
from .records import Durability
from .storage import Abilities, JournalRow, LeaseRow, Storage

__all__ = [
    "Found",
    "Identity",
    "Opening",
    "check_pairing",
    "claimed",
    "holder_of",
    "journal_files",
    "journal_place",
    "levels_of",
    "take",
]

logger: Final = logging.getLogger("agent_runtime.journal")

_RELEASE_TIMEOUT_S: Final = 5.0
_FIRST_GENERATION: Final = 1


class Identity(NamedTuple):
    """Who a journal is from now on."""

    journal_id: str
    generation: int


class Opening(NamedTuple):
    """A lease, and the journal that it was taken with: what its directory holds, and who it is. None: no journal."""

    lease: LeaseKeeper
    directory: Directory | None
    identity: Identity | None


class Found(NamedTuple):
    """What the database says."""

    watermark: int
    lease: LeaseRow | None
    journal: JournalRow | None


def levels_of(config: Config, abilities: Abilities, *, journaled: bool) -> tuple[Sequence[Durability], Durability]:
    """The levels that a call may ask for, and the one that it waits for if it asks for none.

    Raises:
        ConfigError: the configuration asks for one that can't be had.
    """
    level = config.write_behind.durability
    levels: tuple[Durability, ...] = ("buffered", "stored")
    if journaled:
        synced: tuple[Durability, ...] = () if abilities.survives == "nothing" else ("synced",)
        levels = ("buffered", "journaled", *synced, "stored")
    if level in levels:
        return levels, level
    if config.origin("write_behind.durability") == "default":
        return levels, "buffered"
    reason = "needs the journal, which is off" if not journaled else "can't be promised with this database"
    raise ConfigError([f"write_behind.durability: {level} {reason}: use {' or '.join(levels)}"])


def journal_place(config: Config, abilities: Abilities) -> Path | None:
    """Where the journal would lie, whether it is switched on or not; None: nobody says."""
    place = config.journal.directory or abilities.journal_directory
    return None if place is None else Path(place).absolute()


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


@asynccontextmanager
async def claimed(
    config: Config, storage: Storage, files: JournalFiles | None, address: str | None
) -> AsyncIterator[Opening]:
    """Take the journal's directory and the lease, if they belong together; give both back at the end.

    Raises:
        LeaseHeld: another runtime has one of them.
        JournalMismatch: they don't belong together; nothing was changed.
        JournalError: the directory can't be used.
        StorageError: the database can't be asked.
    """
    try:
        if files is not None and not take(files):
            raise await holder_of(storage, files)
        directory = None if files is None else read_directory(files)
        identity = None if directory is None else _identity(config, directory)
        lease = await _lease(config, storage, files, directory, identity, address)
        try:
            yield Opening(lease, directory, identity)
        finally:
            with anyio.move_on_after(_RELEASE_TIMEOUT_S, shield=True):
                await lease.release()
    finally:
        if files is not None:
            files.close()


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


def _identity(config: Config, directory: Directory) -> Identity | None:
    if directory.journal_id is None:
        return Identity(str(uuid4()), _FIRST_GENERATION) if config.journal.enabled else None
    return Identity(directory.journal_id, directory.generation + 1)


async def _lease(
    config: Config,
    storage: Storage,
    files: JournalFiles | None,
    directory: Directory | None,
    identity: Identity | None,
    address: str | None,
) -> LeaseKeeper:
    reclaims = files is not None and directory is not None and directory.identity == files.identity()
    while True:
        found = await _ask(storage, identity)
        if directory is not None:
            check_pairing(directory, found, storage.abilities)
        claim = claim_of(config.lease.duration_s, address, identity, reclaims=reclaims)
        lease = LeaseKeeper(storage.leases, claim.duration_s)
        await lease.acquire(claim)
        if lease.grant.sequence == found.watermark:
            return lease
        await lease.release()  # somebody wrote between the question and the grant: what was compared is no longer so


async def _ask(storage: Storage, identity: Identity | None) -> Found:
    async with storage.snapshot() as snapshot:
        row = None if identity is None else await snapshot.journal(identity.journal_id)
        return Found(snapshot.watermark, await snapshot.lease(), row)


def check_pairing(directory: Directory, found: Found, abilities: Abilities) -> None:
    """Refuse a journal that is not this database's, or a database that is not this journal's."""
    row, lease = found.journal, found.lease
    if directory.journal_id is None:
        if lease is not None and lease.holder is not None and lease.journal_id is not None:
            logger.warning(
                "%s did not stop in order and kept the journal %s, not the one at %s: what it had not stored comes "
                "back when that one is opened",
                lease.holder,
                lease.journal_id,
                directory.place,
            )
        return
    if abilities.survives != "nothing":
        database_id = None if lease is None else lease.database_id
        if database_id != directory.database_id:
            other = "a database that is new" if database_id is None else f"the database {database_id}"
            raise _mismatch(directory, f"belongs to the database {directory.database_id}, storage.url leads to {other}")
        if row is not None and directory.generation < row.previous_generation:
            raise _mismatch(
                directory,
                f"is an old copy: it is of generation {directory.generation}, the database knows generation "
                f"{row.generation} of it",
            )
        if row is not None and row.sequence < min(found.watermark, directory.end):
            raise _mismatch(
                directory,
                f"has changes {row.sequence + 1} to {directory.end} that the database lacks, and another runtime has "
                f"written up to {found.watermark} since",
            )
    if directory.first_retained is not None and found.watermark + 1 < directory.first_retained:
        raise _mismatch(
            directory,
            f"begins at change {directory.first_retained}, the database ends at {found.watermark}, as one restored "
            "from an old backup does: restore a newer one",
        )
    if found.watermark < directory.end:
        logger.info(
            "the journal %s goes up to %d, the database up to %d", directory.place, directory.end, found.watermark
        )


def _mismatch(directory: Directory, problem: str) -> JournalMismatch:
    return JournalMismatch(
        f"the journal {directory.place} {problem}. To go on without what only this journal has, move the directory "
        "away (`agent-runtime journal inspect` shows what it holds)"
    )
