"""A database copied into another one, to the letter and whatever the two are: through the contract of a storage alone.

What is copied are the rows that a snapshot shows: sessions with all that belongs to them, quarantine, and outcomes that
have not expired. Not what is deleted and waits for a purge, and not what is of one database alone: its id, its lease,
its journals.

Guarantees: nobody writes meanwhile, for both leases and the journals' directories are held. What the source's journals
have and the source has not is never left behind: such a source is refused. In the end both sides are read and compared.
A copy may be killed anywhere and run again; it goes on where it was.

How it knows where that is: it takes the target's lease as a journal would, under an id that names the source and the
sequence that it stands at. So the target keeps a row of that journal, and nobody else's changes pass for this copy's.
Batches are cut from the source's rows in an order that depends on nothing but them, and each moves the target's
sequence by one: so that is how many batches it has. Outcomes come last, and again if need be: as some expire on the
way, their batches are not always the same. The last step takes the sequence to where the source stands, if it is not
beyond that already.

An unfinished copy keeps the target's lease, and is not taken for a dead process: no runtime is to serve half of a
database. Only this copy, run again, gets it back. (An SQLite file forgets leases when the machine restarts.)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from operator import attrgetter
from typing import Final, Literal, NamedTuple

import anyio
import msgspec

from .changes import Batch
from .directories import Found, holder_of, take
from .errors import InvalidInput, JournalError, LeaseHeld, StorageFatal
from .journal import JournalFiles, read_directory
from .lease import LeaseKeeper, claim_of
from .opening import check_pairing
from .rows import OutcomeRow
from .scan import Rows, Scan, TableSum
from .storage import Claim, Grant, JournalRow, LeaseRow, SessionKey, Snapshot, Storage

__all__ = ["Copied", "Progress", "Source", "TableSum", "copy", "quiet"]

_FORM: Final = "copy:1"
"""Of the id that the target knows a copy by. The number is that of the order and the size of batches."""
_FIELDS: Final = {"sessions": "created", "quarantine": "quarantined"}
"""The fields of a batch that rows of a table go into, where the two have different names."""

_LEASE_S: Final = 30.0
_UNFINISHED_S: Final = 365 * 86400.0
_PAGE: Final = 1000

_by_incarnation: Final = attrgetter("incarnation")


class Copied(msgspec.Struct, frozen=True, kw_only=True):
    """Both sides of a copy, table by table. `resumed`: a part was there already."""

    resumed: bool
    source: dict[str, TableSum]
    target: dict[str, TableSum]

    @property
    def differing(self) -> list[str]:
        """The tables that are not the same on both sides."""
        return [table for table, found in self.source.items() if found != self.target[table]]


class Progress(msgspec.Struct, frozen=True):
    """How far a copy is: what of the source was copied, and then what of the target was compared with it."""

    stage: Literal["copying", "comparing"]
    sessions: int
    messages: int


class Source(NamedTuple):
    """A database that nobody writes to: where it stands, and how much is in it by what its sessions say.

    `epoch` is that of the lease that keeps others away.
    """

    storage: Storage
    database_id: str
    epoch: int
    sequence: int
    sessions: int
    messages: int

    @property
    def copy_id(self) -> str:
        """What a target knows a copy of it by."""
        return f"{_FORM}:{self.database_id}:{self.sequence}"

    def has(self, lease: LeaseRow) -> bool:
        """Whether this is our lease. Databases may share an id, when one was made from a copy of the other's file."""
        return (lease.database_id, lease.epoch) == (self.database_id, self.epoch) and lease.holder is not None


# --- the source -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def quiet(storage: Storage, journals: Sequence[JournalFiles]) -> AsyncIterator[Source]:
    """Hold a database, so that nobody writes to it, and make sure that it has all that its journals have.

    `journals` are where those are, or would be; empty: nobody says.

    Raises:
        LeaseHeld: somebody has it open.
        InvalidInput: nobody ever had it open, so it is hardly the right one.
        JournalError: a journal has changes that the database lacks, or can't be found.
        LeaseLost: while it was held, somebody has taken it.
    """
    async with _locked(storage, journals):
        lease = LeaseKeeper(storage.leases, _LEASE_S)
        row = await _hold(storage, lease)
        epoch, sequence = lease.grant.fence.epoch, lease.grant.sequence
        try:
            await _check_stored(storage, journals, row, sequence)
            async with _renewed(lease):
                sessions, messages = await _survey(storage)
                yield Source(storage, row.database_id, epoch, sequence, sessions, messages)
        finally:
            with anyio.CancelScope(shield=True):
                await lease.release()


async def _hold(storage: Storage, lease: LeaseKeeper) -> LeaseRow:
    """Take the lease. Returns its row as it was before.

    It is taken for the journal that it was held for before, and that journal's row stays as it is: the database goes on
    to say where changes may be that it lacks.
    """
    while True:
        async with storage.snapshot() as snapshot:
            row = await snapshot.lease()
            if row is None:
                raise InvalidInput("source", "is new: no runtime ever had it open; is its URL right?")
            known = None if row.journal_id is None else await snapshot.journal(row.journal_id)
        identity = None if known is None else (known.journal_id, known.generation)
        await lease.acquire(claim_of(_LEASE_S, None, identity))
        if lease.grant.fence.epoch == row.epoch + 1:
            return row
        await lease.release()  # somebody had it between the question and the grant


@asynccontextmanager
async def _renewed(lease: LeaseKeeper) -> AsyncIterator[None]:
    """Renew the lease meanwhile. The block is cancelled when it is lost, and raises that."""
    errors: list[Exception] = []
    async with anyio.create_task_group() as tasks:

        async def renew() -> None:
            try:
                await lease.run()
            except Exception as error:  # noqa: BLE001 — raised below, outside of the task group's exception group
                errors.append(error)
                tasks.cancel_scope.cancel()

        tasks.start_soon(renew)
        try:
            yield
        except Exception as error:  # noqa: BLE001 — as above
            errors.append(error)
        tasks.cancel_scope.cancel()
    if errors:
        raise errors[0]


@asynccontextmanager
async def _locked(storage: Storage, journals: Sequence[JournalFiles]) -> AsyncIterator[None]:
    """Take the journals' directories that are there: away from its database a runtime goes on writing there."""
    try:
        for journal in journals:
            if _exists(journal) and not take(journal):
                raise await holder_of(storage, journal)
        yield
    finally:
        for journal in journals:
            journal.close()


def _exists(journal: JournalFiles) -> bool:
    try:
        journal.names()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise JournalError(f"the journal's directory {journal.place} can't be read: {error.strerror}") from error
    return True


async def _check_stored(storage: Storage, journals: Sequence[JournalFiles], row: LeaseRow, sequence: int) -> None:
    """Refuse a database that lacks what a journal has. `row` is its lease as it was before we took it."""
    last_id = None if row.journal_id is None or row.journal_id.startswith(_FORM) else row.journal_id
    if not journals:
        if last_id is not None:
            raise JournalError(
                f"the database was last written through the journal {last_id}, which may have changes that it lacks: "
                "set journal.directory to where that is"
            )
        return
    found = [read_directory(journal, last_id) for journal in journals if _exists(journal)]
    found = [directory for directory in found if directory.segments]
    if found and last_id is not None and last_id not in [directory.journal_id for directory in found]:
        others = " and ".join(directory.place for directory in found)
        raise JournalError(
            f"the database was last written through the journal {last_id}, and {others} "
            f"{'is another one' if len(found) == 1 else 'are others'}: set journal.directory to where that is"
        )
    for directory in found:
        async with storage.snapshot() as snapshot:
            known = None if directory.journal_id is None else await snapshot.journal(directory.journal_id)
        check_pairing(directory, Found(sequence, row, known), storage.abilities)
        stored = sequence if known is None else known.sequence  # below `sequence` where another has written since
        if next(directory.frames(after=stored), None) is not None:
            raise JournalError(
                f"the journal {directory.place} has changes {stored + 1} to {directory.end} that the database lacks: "
                "open the database once, as `agent-runtime sessions list` does, which stores them; then copy it"
            )


async def _survey(storage: Storage) -> tuple[int, int]:
    """How many sessions there are, and how many messages they say they have."""
    sessions = messages = 0
    async with storage.snapshot() as snapshot:
        after: SessionKey | None = None
        while rows := await snapshot.sessions(after=after, limit=_PAGE):
            sessions += len(rows)
            messages += sum(row.message_count for row in rows)
            after = SessionKey(rows[-1].created_at, rows[-1].incarnation)
    return sessions, messages


# --- the target -------------------------------------------------------------------------------------------------------


async def copy(
    source: Source,
    target: Storage,
    journals: Sequence[JournalFiles],
    *,
    now: datetime,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Copied:
    """Copy the source, or what of it is not there yet, and compare the two. `journals` are the target's, as in `quiet`.

    Outcomes that have expired by `now` are left out. The target is free for others once it was found the same.

    Raises:
        InvalidInput: the target has something else in it.
        LeaseHeld: somebody has it open.
        JournalError: one of its journals has changes that it lacks.
        ChangeRejected: it refuses a row.
        StorageError, LeaseLost: it stopped. Run again it goes on.
    """
    async with target.snapshot() as snapshot:
        row = await snapshot.lease()
    if row is not None and source.has(row):
        raise InvalidInput("target", "is the database that is to be copied")
    async with _locked(target, journals):
        lease = await _begin(source, target, journals)
        work = _Copy(source, target, lease.grant, now, progress)
        try:
            copied = await work.run()
        except BaseException:
            if not work.begun:
                with anyio.CancelScope(shield=True):
                    await lease.release()
            raise
        if not copied.differing:
            await target.leases.release(lease.grant.fence)
        return copied


async def _begin(source: Source, target: Storage, journals: Sequence[JournalFiles]) -> LeaseKeeper:
    """Take the target's lease, if there is nothing in it, or this copy."""
    while True:
        async with target.snapshot() as snapshot:
            sequence, row, ours = snapshot.watermark, await snapshot.lease(), await snapshot.journal(source.copy_id)
            empty = sequence == 0 and not await snapshot.sessions(limit=1)
        if not empty and (ours is None or ours.sequence != sequence):
            raise _foreign(source, row, ours)
        if row is not None and journals:
            await _check_stored(target, journals, row, sequence)
        lease = LeaseKeeper(target.leases, _UNFINISHED_S)
        await lease.acquire(_claim(source))
        if lease.grant.sequence == sequence:
            return lease
        await lease.release()  # somebody wrote between the question and the grant


def _claim(source: Source) -> Claim:
    claim = claim_of(_UNFINISHED_S, None, (source.copy_id, 1), reclaims=True)
    holder = (
        f"an unfinished copy of the database {source.database_id}, begun by {claim.holder}: copy again to finish it"
    )
    return msgspec.structs.replace(claim, holder=holder, process_started=None, pid_namespace=None)


def _foreign(source: Source, row: LeaseRow | None, ours: JournalRow | None) -> InvalidInput | LeaseHeld:
    """Why a target that has something in it is none."""
    way_out = "copy to an empty database"
    if ours is not None:
        return InvalidInput("target", f"has this copy, and was written to since: {way_out}")
    begun = "" if row is None or row.journal_id is None else row.journal_id
    if begun.startswith(f"{_FORM}:{source.database_id}:"):
        return InvalidInput("target", f"has a copy of this source, which has changed since: {way_out}")
    if begun.startswith(_FORM):
        return InvalidInput("target", f"has a copy of another database: {way_out}")
    if row is not None and row.holder is not None and (row.expires_in_s or 0) > 0:
        return LeaseHeld(row.holder, row.expires_in_s, row.address)
    return InvalidInput("target", f"has something in it that is not of this copy: {way_out}")


class _Copy:
    """A copy under way. `begun`: the target has some of it, or may have."""

    def __init__(
        self, source: Source, target: Storage, grant: Grant, now: datetime, progress: Callable[[Progress], None]
    ) -> None:
        self.begun = grant.sequence > 0
        self._there = self._sequence = grant.sequence
        self._read = 0
        self._outcomes_after: tuple[str, str] | None = None
        self._source = source
        self._target = target
        self._fence = grant.fence
        self._now = now
        self._progress = progress

    async def run(self) -> Copied:
        """Do what is left to do, and compare."""
        of_source = await self._copied()
        if self._sequence < self._source.sequence:
            await self._apply({}, self._source.sequence)
        async with self._target.snapshot() as snapshot:
            of_target = await self._scan("comparing", snapshot, _ignored).run()
        return Copied(resumed=self._there > 0, source=of_source, target=of_target)

    async def _copied(self) -> dict[str, TableSum]:
        """Read and write at the same time. Returns the sums of the source."""
        sums: dict[str, TableSum] = {}
        send, receive = anyio.create_memory_object_stream[Rows]()

        async def hand_on(rows: Rows) -> None:
            self._read += 1
            there = await self._has(rows["outcomes"]) if "outcomes" in rows else self._read <= self._there
            if not there:
                await send.send(rows)

        async def read() -> None:
            async with send, self._source.storage.snapshot() as snapshot:
                if snapshot.watermark != self._source.sequence:
                    raise StorageFatal("the source has changed, although its lease was held")
                sums.update(await self._scan("copying", snapshot, hand_on).run())

        async def write() -> None:
            async with receive:
                async for rows in receive:
                    await self._apply(rows, self._sequence + 1)

        await _together(read, write)
        return sums

    async def _has(self, outcomes: Sequence[OutcomeRow]) -> bool:
        """Whether the target has these, which follow those of the last call."""
        after, self._outcomes_after = self._outcomes_after, (outcomes[-1].scope, outcomes[-1].key)
        async with self._target.snapshot() as snapshot:
            return list(await snapshot.outcomes(after=after, limit=len(outcomes))) == outcomes

    def _scan(
        self, stage: Literal["copying", "comparing"], snapshot: Snapshot, take: Callable[[Rows], Awaitable[None]]
    ) -> Scan:
        return Scan(
            snapshot, self._now, take, lambda sessions, messages: self._progress(Progress(stage, sessions, messages))
        )

    async def _apply(self, rows: Rows, last: int) -> None:
        fields = {_FIELDS.get(table, table): tuple(of_table) for table, of_table in rows.items()}
        fields["messages"] = tuple(sorted(rows.get("messages", ()), key=_by_incarnation))
        batch = Batch(
            after=self._sequence,
            last=last,
            changes=last - self._sequence,
            sessions=len(rows.get("sessions", ())),
            **fields,
        )
        self.begun = True
        with anyio.CancelScope(shield=True):
            await self._target.apply(batch, self._fence)
        self._sequence = last


async def _ignored(_rows: Rows) -> None:
    pass


async def _together(*parts: Callable[[], Awaitable[None]]) -> None:
    """Run the parts at the same time. The first error ends the others, and is raised as it is."""
    errors: list[Exception] = []
    async with anyio.create_task_group() as tasks:

        async def run(part: Callable[[], Awaitable[None]]) -> None:
            try:
                await part()
            except Exception as error:  # noqa: BLE001 — raised below, outside of the task group's exception group
                errors.append(error)
                tasks.cancel_scope.cancel()

        for part in parts:
            tasks.start_soon(run, part)
    if errors:
        raise errors[0]
