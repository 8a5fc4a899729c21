"""How a database and its journal are opened together: each is asked who the other is, before anything is written.

The order: take the directory, read what the journal says of itself and what the database says of the journal, compare,
take the lease, bring the database up to date, begin a new segment. A crash anywhere in between is healed by doing it
all again. What does not belong together is refused, and left as it is. What the journal has of changes that were
overtaken comes in before that, under a lease of its own: until all is in, its row in the database stays with them.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias
from uuid import uuid4

import anyio

from .config import Config
from .directories import Found, Overtaken, Taken, Unfinished, ask, overtaken_in, take_directories
from .errors import ConfigError, JournalMismatch, StorageFatal
from .journal import Directory, JournalFiles
from .lease import LeaseKeeper, claim_of, patiently
from .records import Durability
from .storage import Abilities, LeaseRow, Storage

__all__ = ["Identity", "Opening", "Replay", "check_pairing", "claimed", "levels_of"]

logger: Final = logging.getLogger("agent_runtime.journal")

_RELEASE_TIMEOUT_S: Final = 5.0
_FIRST_GENERATION: Final = 1


class Identity(NamedTuple):
    """Who a journal is from now on."""

    journal_id: str
    generation: int


Replay: TypeAlias = Callable[[Overtaken, LeaseKeeper], Awaitable[None]]
"""Brings in what was overtaken, under a lease that was taken without a journal."""


class Opening(NamedTuple):
    """A lease, and the journal that it was taken with, who that is from now on (None: no journal), and what is left."""

    lease: LeaseKeeper
    taken: Taken
    identity: Identity | None
    unfinished: tuple[Unfinished, ...]


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


@asynccontextmanager
async def claimed(
    config: Config,
    storage: Storage,
    files: Callable[[], JournalFiles | None],
    address: str | None,
    *,
    beside: Path | None,
    replay: Replay,
    random: Callable[[], float],
) -> AsyncIterator[Opening]:
    """Take the journal's directory and the lease, if they belong together; give both back at the end.

    With `lease.wait` it waits until they can be had. `files` gives the directory, anew for each try; `beside` is the
    default one, if others may lie beside it. `replay` brings in what our directory has of changes that were overtaken,
    before the journal goes on.

    Raises:
        LeaseHeld: another runtime has one of them.
        JournalMismatch: they don't belong together; nothing was changed.
        JournalError: the directory can't be used.
        StorageError: the database can't be asked.
    """

    async def attempt() -> Opening:
        taken = await take_directories(storage, files(), beside)
        try:
            return await _claim(config, storage, taken, address, replay)
        except BaseException:
            taken.close()
            raise

    opening = await (patiently(attempt, random) if config.lease.wait else attempt())
    try:
        yield opening
    finally:
        with anyio.move_on_after(_RELEASE_TIMEOUT_S, shield=True):
            await opening.lease.release()
        opening.taken.close()


def _identity(config: Config, directory: Directory) -> Identity | None:
    if directory.journal_id is None:
        return Identity(str(uuid4()), _FIRST_GENERATION) if config.journal.enabled else None
    return Identity(directory.journal_id, directory.generation + 1)


async def _claim(config: Config, storage: Storage, taken: Taken, address: str | None, replay: Replay) -> Opening:
    """The lease for the journal in the directory that was taken, once nothing in there is overtaken any more."""
    files, directory = taken.files, taken.directory
    identity = None if directory is None else _identity(config, directory)
    # A journal that is begun now is ours alone; another one is, unless it is a copy.
    ours = directory is not None and (
        directory.journal_id is None or (files is not None and directory.identity == files.identity())
    )
    while True:
        found = await ask(storage, None if identity is None else identity.journal_id)
        if directory is not None:
            check_pairing(directory, found, storage.abilities)
        overtaken = None
        if files is not None and directory is not None:
            overtaken = overtaken_in(files, directory, found, storage.abilities)
        claim = claim_of(config.lease.duration_s, address, None if overtaken else identity, reclaims=ours)
        lease = LeaseKeeper(storage.leases, claim.duration_s)
        await lease.acquire(claim)
        try:
            if lease.grant.sequence == found.watermark:
                if overtaken is None:
                    unfinished = tuple(_unfinished(found.lease, taken))
                    for each in unfinished:
                        logger.warning(
                            "the journal %s%s may have changes that are not stored: they come in when it is opened",
                            each.place or each.journal_id,
                            "" if each.holder is None else f" of {each.holder}",
                        )
                    return Opening(lease, taken, identity, unfinished)
                await replay(overtaken, lease)
                settled = (await ask(storage, overtaken.journal_id)).journal
                if settled is None or settled.sequence <= overtaken.stored:
                    raise StorageFatal(
                        f"the storage has not moved the row of the journal {overtaken.journal_id}, whose changes came "
                        "in late: it must heed Batch.replayed"
                    )
        except BaseException:
            with anyio.CancelScope(shield=True):
                await lease.release()
            raise
        await lease.release()  # what was compared is no longer so


def _unfinished(lease: LeaseRow | None, taken: Taken) -> Iterator[Unfinished]:
    """The journals that were not to be had, and that of a last holder that did not stop in order."""
    yield from taken.unfinished
    left = None if lease is None or lease.holder is None else lease.journal_id
    if lease is not None and left is not None and left not in taken.journal_ids:
        yield Unfinished(journal_id=left, holder=lease.holder)


def check_pairing(directory: Directory, found: Found, abilities: Abilities) -> None:
    """Refuse a journal that is not this database's, or a database that is not this journal's."""
    row, lease = found.journal, found.lease
    if directory.journal_id is None:
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
