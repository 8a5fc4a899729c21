"""Database and journals against themselves and each other: whether what is stored can be as it is.

Only reads, through snapshots, so that it may be done while a runtime has the sessions open. A page of sessions is
looked at in one snapshot; the next page in another one, so that none is held open for long. The journals are pictures
taken before the last snapshot: every change above that one's watermark is in them.

A journal that another one has overtaken is told of, and its changes are looked at one by one: what they follow is seen
when they come in.

Gaps between the seqs of a session are no finding: whoever removes a message leaves one. That rows and counts differ is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Final

import msgspec
from anyio.lowlevel import checkpoint

from .changes import Change, decode_change
from .directories import Found, overtaken_in
from .errors import JournalError, StorageError
from .journal import Directory, Frame, Gap, JournalFiles, read_directory
from .journal.inspection import conflicts
from .opening import check_pairing
from .quarantined import quarantine_rows
from .rows import MessageRow, QuarantineRow, SessionRow
from .storage import LeaseRow, SessionKey, Snapshot, Storage

__all__ = ["Checked", "Finding", "check"]

_SESSIONS: Final = 200  # looked at in one snapshot
_MESSAGES: Final = 1000
_SHOWN: Final = 5
_CHANGES_PER_TURN: Final = 100


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that is wrong, and where: a session, perhaps a message of it, a change of the log."""

    problem: str
    session_id: str | None = None
    seq: int | None = None
    sequence: int | None = None

    def __str__(self) -> str:
        places = (
            None if self.session_id is None else f"session {self.session_id!r}",
            None if self.seq is None else f"seq {self.seq}",
            None if self.sequence is None else f"change {self.sequence}",
        )
        return ": ".join([", ".join(filter(None, places)), self.problem]) if any(places) else self.problem


class Checked(msgspec.Struct, kw_only=True):
    """How much was looked at: `changes` are those of the journals that are not stored; and how much was found."""

    sessions: int = 0
    messages: int = 0
    changes: int = 0
    quarantined: int = 0
    findings: int = 0


async def check(
    storage: Storage,
    pictures: Callable[[], AbstractContextManager[Sequence[JournalFiles]]],
    *,
    found: Callable[[Finding], None],
    progress: Callable[[Checked], None] = lambda checked: None,
) -> Checked:
    """Look at everything. `found` is told of what is wrong, `progress` now and then how much was looked at.

    `pictures` takes a picture of each journal there is.

    Raises:
        StorageError: the database can't be read.
        JournalError: no picture of a journal can be taken.
    """
    return await _Check(storage, pictures, found, progress).run()


class _Held(msgspec.Struct):
    """A session that is held: its changes in quarantine."""

    session_id: str
    sequences: list[int]


class _Check:
    def __init__(
        self,
        storage: Storage,
        pictures: Callable[[], AbstractContextManager[Sequence[JournalFiles]]],
        found: Callable[[Finding], None],
        progress: Callable[[Checked], None],
    ) -> None:
        self._storage = storage
        self._pictures = pictures
        self._found = found
        self._progress = progress
        self._checked = Checked()

    async def run(self) -> Checked:
        await self._check_sessions()
        with self._pictures() as pictures:
            async with self._storage.snapshot() as snapshot:
                held = await self._check_quarantine(snapshot)
                await self._check_journals(snapshot, pictures, held)
        return self._checked

    def _tell(
        self, problem: str, *, session_id: str | None = None, seq: int | None = None, sequence: int | None = None
    ) -> None:
        self._checked.findings += 1
        self._found(Finding(problem=problem, session_id=session_id, seq=seq, sequence=sequence))

    # Sessions

    async def _check_sessions(self) -> None:
        after: SessionKey | None = None
        while True:
            async with self._storage.snapshot() as snapshot:
                rows = await snapshot.sessions(after=after, limit=_SESSIONS)
                for row in rows:
                    await self._try_session(snapshot, row)
                    self._checked.sessions += 1
                    self._progress(self._checked)
            if len(rows) < _SESSIONS:
                return
            after = SessionKey(rows[-1].created_at, rows[-1].incarnation)

    async def _try_session(self, snapshot: Snapshot, row: SessionRow) -> None:
        try:
            await self._check_session(snapshot, row)
        except StorageError as error:
            await snapshot.lease()  # if the database is away, that is what went wrong
            self._tell(f"can't be read: {error}", session_id=row.session_id)

    async def _check_session(self, snapshot: Snapshot, row: SessionRow) -> None:
        session_id = row.session_id
        if not 0 < row.sequence <= snapshot.watermark:
            problem = f"its last change is {row.sequence}, the database has all up to {snapshot.watermark}"
            self._tell(problem, session_id=session_id, sequence=row.sequence)
        if not 0 <= row.floor < row.next_seq:
            self._tell(f"its floor is {row.floor}, its next seq {row.next_seq}", session_id=session_id)
        await self._check_messages(snapshot, row)
        switches = [switch.number for switch in await snapshot.switches(row.incarnation)]
        if switches != list(range(1, len(switches) + 1)):
            wrong = next(number for place, number in enumerate(switches, 1) if number != place)
            problem = f"its {len(switches)} switch(es) are not numbered from 1 on: there is a number {wrong}"
            self._tell(problem, session_id=session_id)
        head = await snapshot.head(session_id, outcomes_max=0)
        if head is None or head.session.incarnation != row.incarnation:
            self._tell("is in the list, but not under its id", session_id=session_id)
        elif head.context.switch_count != len(switches):
            counted = f"counts {head.context.switch_count} switch(es), has {len(switches)}"
            self._tell(counted, session_id=session_id)

    async def _check_messages(self, snapshot: Snapshot, row: SessionRow) -> None:
        """Above the floor, for what is below may be there until it is purged."""
        count, last = 0, row.floor
        absent: list[str] = []
        while True:
            rows: Sequence[MessageRow] = await snapshot.messages(row.incarnation, after=last, limit=_MESSAGES)
            for message in rows:
                if message.seq > last + 1 and len(absent) <= _SHOWN:
                    absent.append(_range(last + 1, message.seq - 1))
                if message.seq <= last and count:
                    self._tell("is there twice", session_id=row.session_id, seq=message.seq)
                if message.seq >= row.next_seq:
                    problem = f"is there, although the session's next seq is {row.next_seq}"
                    self._tell(problem, session_id=row.session_id, seq=message.seq)
                last = message.seq
                count += 1
            if len(rows) < _MESSAGES:
                break
        self._checked.messages += count
        if count == row.message_count:
            return
        if last < row.next_seq - 1:
            absent.append(_range(last + 1, row.next_seq - 1))
        where = f"; absent seqs: {', '.join(absent[:_SHOWN])}{', …' if len(absent) > _SHOWN else ''}" if absent else ""
        self._tell(f"counts {row.message_count} message(s), has {count}{where}", session_id=row.session_id)

    # Quarantine

    async def _check_quarantine(self, snapshot: Snapshot) -> dict[str, _Held]:
        held: dict[str, _Held] = {}
        async for row in quarantine_rows(snapshot):
            self._checked.quarantined += 1
            if self._is_orphan(row):
                continue
            earlier = held.get(row.incarnation)
            self._check_quarantined(snapshot, row, earlier)
            if earlier is None:
                held[row.incarnation] = _Held(row.session_id, [row.sequence])
            else:
                earlier.sequences.append(row.sequence)
        for incarnation, session in held.items():
            await self._check_held(snapshot, incarnation, session)
        return held

    def _is_orphan(self, row: QuarantineRow) -> bool:
        """Whether it came when its session had been deleted: it holds nobody."""
        try:
            orphaned = decode_change(row.change).orphaned
        except msgspec.MsgspecError:
            return False
        if orphaned is not None:
            self._tell(f"is in quarantine: {orphaned}", session_id=row.session_id, sequence=row.sequence)
        return orphaned is not None

    def _check_quarantined(self, snapshot: Snapshot, row: QuarantineRow, earlier: _Held | None) -> None:
        problems: list[str] = []
        if row.sequence > snapshot.watermark:
            problems.append(f"is in quarantine, the database has all up to {snapshot.watermark}")
        if (row.state == "rejected") != (earlier is None):
            problems.append(f"is {row.state} in quarantine, {'as the first' if earlier is None else 'behind another'}")
        try:
            change = decode_change(row.change)
        except msgspec.MsgspecError:
            problems.append("is in quarantine, and can't be read")
        else:
            if (change.sequence, change.session_id, change.incarnation) != (
                row.sequence,
                row.session_id,
                row.incarnation,
            ):
                problems.append(f"is in quarantine, and holds change {change.sequence} of {change.session_id!r}")
            elif earlier is not None and change.previous != earlier.sequences[-1]:
                problems.append(f"follows {change.previous}, but is in quarantine behind {earlier.sequences[-1]}")
        for problem in problems:
            self._tell(problem, session_id=row.session_id, sequence=row.sequence)

    async def _check_held(self, snapshot: Snapshot, incarnation: str, held: _Held) -> None:
        first, *queued = held.sequences
        problem = f"is held: change {first} was refused, {len(queued)} wait(s) behind it in quarantine"
        self._tell(problem, session_id=held.session_id, sequence=first)
        stored = await self._stored(snapshot, held.session_id, incarnation)
        if stored is not None and stored > first:
            problem = f"is held by change {first}, and has gone on to {stored}"
            self._tell(problem, session_id=held.session_id, sequence=first)

    @staticmethod
    async def _stored(snapshot: Snapshot, session_id: str, incarnation: str) -> int | None:
        """The sequence of the session's last stored change; 0: there is no such session, None: it can't be read."""
        try:
            head = await snapshot.head(session_id, outcomes_max=0)
        except StorageError:
            await snapshot.lease()
            return None
        return head.session.sequence if head is not None and head.session.incarnation == incarnation else 0

    # Journals

    async def _check_journals(
        self, snapshot: Snapshot, pictures: Sequence[JournalFiles], held: dict[str, _Held]
    ) -> None:
        lease = await snapshot.lease()
        found: list[tuple[JournalFiles, Directory]] = []
        for files in pictures:
            with self._telling_errors():
                found.append((files, read_directory(files, None if lease is None else lease.journal_id)))
        if len(found) == len(pictures):  # else nobody can tell whether the holder's is among them
            self._check_holder(lease, [directory for _, directory in found])
        for files, directory in found:
            with self._telling_errors():
                await self._check_journal(snapshot, lease, files, directory, held)

    @contextmanager
    def _telling_errors(self) -> Iterator[None]:
        """A journal that can't be read, or is not this database's, is a finding, and the others are looked at."""
        try:
            yield
        except JournalError as error:
            self._tell(str(error))

    def _check_holder(self, lease: LeaseRow | None, directories: Sequence[Directory]) -> None:
        if lease is None or lease.holder is None or lease.journal_id is None:
            return
        if lease.journal_id not in [directory.journal_id for directory in directories]:
            place = "there is no journal here"
            if directories:
                others = " and ".join(directory.place for directory in directories)
                place = f"{others} {'is another one' if len(directories) == 1 else 'are others'}"
            self._tell(
                f"{lease.holder} has, or had when it died, the journal {lease.journal_id}, and {place}: what only that "
                "one holds comes back when it is opened"
            )

    async def _check_journal(
        self,
        snapshot: Snapshot,
        lease: LeaseRow | None,
        files: JournalFiles,
        directory: Directory,
        held: dict[str, _Held],
    ) -> None:
        """Whether journal and database belong together, by the rules by which they are opened; and what it has more."""
        if directory.journal_id is None or not directory.segments:
            return
        row = await snapshot.journal(directory.journal_id)
        if row is not None and row.sequence > snapshot.watermark:
            self._tell(f"the journal is stored up to {row.sequence}, the database has all up to {snapshot.watermark}")
        found = Found(snapshot.watermark, lease, row)
        check_pairing(directory, found, self._storage.abilities)
        overtaken = overtaken_in(files, directory, found, self._storage.abilities)
        stored = snapshot.watermark if overtaken is None else overtaken.stored
        if overtaken is not None and next(directory.frames(after=stored), None) is not None:
            self._tell(
                f"the journal {directory.place} has changes {stored + 1} to {directory.end} that the database lacks, "
                f"and another runtime has written up to {found.watermark} since: they come in late when the journal is "
                "opened"
            )
        for sequence in conflicts(files, directory, stored):
            self._tell(f"is in the journal {directory.place} twice, and differently", sequence=sequence)
        if overtaken is None:
            await self._check_changes(snapshot, directory, held)
        else:
            async for _ in self._changes(directory, stored):
                """What they follow is seen when they come in."""
        for (name, offset), damage in directory.damage.items():
            if not damage.torn:
                size = damage.end - damage.start
                self._tell(f"{name} of the journal {directory.place} is damaged at byte {offset}: {size} bytes")

    async def _changes(self, directory: Directory, stored: int) -> AsyncIterator[Change]:
        """The changes that are not stored, as far as they can be read."""
        for number, item in enumerate(directory.frames(after=stored)):
            if number % _CHANGES_PER_TURN == 0:
                await checkpoint()
                self._progress(self._checked)
            if isinstance(item, Gap):
                more = f", and so are all up to {item.last}" if item.last > item.first else ""
                problem = f"is lost{more}: not to be read from the journal {directory.place}"
                self._tell(problem, sequence=item.first)
                continue
            self._checked.changes += 1
            change = self._decoded(item, directory)
            if change is not None:
                yield change

    async def _check_changes(self, snapshot: Snapshot, directory: Directory, held: dict[str, _Held]) -> None:
        """The changes that are not stored: each follows the one before it of its session, in the journal or stored."""
        last: dict[str, int | None] = {}
        quarantined = {sequence for session in held.values() for sequence in session.sequences}
        async for change in self._changes(directory, snapshot.watermark):
            if change.resolves is not None and change.resolves not in quarantined:
                problem = f"resolves change {change.resolves}, which is not in quarantine"
                self._tell(problem, session_id=change.session_id, sequence=change.sequence)
            if change.void or change.orphaned is not None:
                continue
            before = await self._before(snapshot, change, last, held)
            if before is not None and change.previous not in before:
                self._tell(
                    f"follows {change.previous or 'nothing'}, but the session's last change before it is "
                    f"{' or '.join(str(sequence or 'none') for sequence in before) or 'its deletion'}",
                    session_id=change.session_id,
                    sequence=change.sequence,
                )
            last[change.incarnation] = None if change.deleted else change.sequence

    def _decoded(self, frame: Frame, directory: Directory) -> Change | None:
        try:
            change = decode_change(frame.payload)
        except msgspec.MsgspecError:
            self._tell(f"is whole in the journal {directory.place}, but can't be read", sequence=frame.sequence)
            return None
        if change.sequence != frame.sequence:
            problem = f"is written under the sequence {frame.sequence} in the journal {directory.place}"
            self._tell(problem, sequence=change.sequence)
            return None
        return change

    async def _before(
        self, snapshot: Snapshot, change: Change, last: dict[str, int | None], held: dict[str, _Held]
    ) -> list[int] | None:
        """The sequences that the change may follow: one, or none behind a deletion. None: nobody can tell."""
        if change.incarnation in last:
            sequence = last[change.incarnation]
            return [] if sequence is None else [sequence]
        stored = await self._stored(snapshot, change.session_id, change.incarnation)
        session = held.get(change.incarnation)
        if stored is None:
            return None
        if session is None:
            return [stored]
        # What is dropped leaves the session as it is stored; what is replayed, or queues, follows the others.
        return [session.sequences[-1], stored] if change.resolves is not None else [session.sequences[-1]]


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"
