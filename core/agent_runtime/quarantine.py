"""What the database refused: shown, put back into the log, or given up.

A session with a change in quarantine is held: its later changes queue behind it, reads show all of them, writes are
refused. Replaying puts the changes back at the end of the log, in order, under new sequences; the batch that stores
them takes the old ones out of quarantine. Dropping gives up the rejected change and lets the rest through.

Orphans are changes that came in late, when their session had been deleted. They hold nobody, no read sees them, and
they can only be dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from .budget import CHANGE_BYTES, Budget
from .changes import Change, decode_change, encode_change
from .door import Door
from .errors import InvalidInput, SessionHeld, SessionNotFound
from .log import Log
from .quarantined import QuarantinedChange, quarantine_rows
from .residents import OUTCOMES_MAX, Resident, Residents
from .rows import SessionRow
from .scheduler import Pending, Scheduler
from .storage import HeadRows

__all__ = ["Quarantine", "rebase"]


def rebase(changes: Sequence[Change], session: SessionRow | None) -> list[Change]:
    """The changes as they are on top of what the database has of the session (None: nothing), with none before them.

    Every change states results, and of these only the count of messages depends on what was before: on changes that
    were dropped, or lost by damage. So it is made anew, from what each brings and takes away. Seqs that are skipped are
    those of messages that are not there.
    """
    count, next_seq = (0, 1) if session is None else (session.message_count, session.next_seq)
    missing: set[int] = set()
    rebased = []
    for change in changes:
        missing.update(range(next_seq, change.next_seq))
        missing.difference_update(map(_seq_of, change.messages))
        next_seq = max(next_seq, change.next_seq)
        if change.floor is not None:
            count = 0
        count += len(change.messages) - len(set(change.removed) - missing)
        rebased.append(msgspec.structs.replace(change, message_count=count))
    return rebased


def _husk(dropped: Change, session: SessionRow) -> Change:
    """What is left of a change that is given up: the seqs of its messages were shown, and are never used again."""
    return Change(
        sequence=dropped.sequence,
        previous=session.sequence,
        session_id=dropped.session_id,
        incarnation=dropped.incarnation,
        last_activity=session.last_activity,
        message_count=session.message_count,
        next_seq=max(session.next_seq, dropped.next_seq),
    )


def _of(incarnation: str, rows: HeadRows | None) -> HeadRows | None:
    """The rows, if they are of this incarnation."""
    return rows if rows is not None and rows.session.incarnation == incarnation else None


class _Seq(msgspec.Struct):
    seq: int


def _seq_of(raw: msgspec.Raw) -> int:
    return msgspec.json.decode(raw, type=_Seq).seq


class Quarantine:
    """The quarantined changes of a runtime."""

    def __init__(self, *, door: Door, log: Log, budget: Budget, residents: Residents, scheduler: Scheduler) -> None:
        self._door = door
        self._log = log
        self._budget = budget
        self._residents = residents
        self._scheduler = scheduler

    async def restore(self) -> int:
        """At open: bring every held session into memory. Returns how many changes there are."""
        count = 0
        async with self._door.view(None) as snapshot:
            held: dict[str, list[Change]] = {}
            sizes: Counter[str] = Counter()
            async for row in quarantine_rows(snapshot):
                change = decode_change(row.change)
                if change.orphaned is not None:
                    self._scheduler.orphans[change.session_id] += 1
                    count += 1
                    continue
                held.setdefault(row.incarnation, []).append(change)
                sizes[row.incarnation] += CHANGE_BYTES + len(row.change)
            for incarnation, changes in held.items():
                head = await snapshot.head(changes[0].session_id, outcomes_max=OUTCOMES_MAX)
                succeeded = head is not None and head.session.sequence > changes[-1].sequence
                # Changes that were replayed, and damaged in the journal, stand behind later ones that were not.
                changes.sort(key=lambda change: (change.next_seq, change.sequence))
                rows = _of(incarnation, head)
                changes = rebase(changes, None if rows is None else rows.session)  # damage may have taken some
                self._residents.restore(changes, sizes[incarnation], rows, succeeded=succeeded)
                self._budget.charge(sizes[incarnation])
                self._scheduler.hold(incarnation)
                for change in changes:
                    self._log.quarantine(change.sequence)
                    if change.outcome is not None:
                        self._door.remember(change.outcome)
                count += len(changes)
        return count

    async def entries(self) -> list[QuarantinedChange]:
        """All that is in quarantine, in order of sequence."""
        self._door.check_open()
        async with self._door.view(None) as snapshot:
            return [QuarantinedChange.of(row) async for row in quarantine_rows(snapshot)]

    async def replay(self, session_id: str) -> int:
        """Try a session's quarantined changes again, and wait until they are stored. Returns how many they were.

        Raises:
            SessionNotFound: nothing of this session is in quarantine.
            InvalidInput: only changes are that came when the session had been deleted.
            Quarantined: the database refuses a change again.
        """
        if self._has_only_orphans(session_id):
            raise InvalidInput("session", f"{session_id!r} was deleted before these changes came: they can be dropped")
        resident = await self._held(session_id)
        changes = self._resequence(resident.sequence, resident.held)
        self._resubmit(resident, changes)
        await self._log.wait_stored(changes[-1].sequence, first=changes[0].sequence)
        return len(changes)

    async def drop(self, session_id: str) -> int:
        """Give up the session's rejected change, let the ones behind it through. Returns how many those are.

        When the rejected change is the session's creation, there is nothing for the others to go to: all are given up.
        So are those that came when the session had been deleted.

        Raises:
            SessionNotFound: nothing of this session is in quarantine.
            Quarantined: the database refuses another one.
        """
        if self._has_only_orphans(session_id):
            await self._drop_orphans(session_id)
            return 0
        resident = await self._held(session_id)
        async with self._door.view(resident) as snapshot:
            rows = _of(resident.incarnation, await snapshot.head(session_id, outcomes_max=OUTCOMES_MAX))
        self._check(resident)
        held, held_bytes = resident.held, resident.held_bytes
        if rows is None:
            left = 0
            changes = self._resequence(
                resident.sequence, [msgspec.structs.replace(change, void=True) for change in held]
            )
        else:
            left = len(held) - 1
            rest = rebase(held[1:], rows.session)
            changes = self._resequence(rows.session.sequence, [_husk(held[0], rows.session), *rest])
        sizes = self._accept(changes)
        remade = self._residents.remake(resident, rows)
        self._scheduler.let_go(resident.incarnation)
        for change, size in zip(changes, sizes, strict=True):
            if remade is not None:
                self._residents.add(change, remade)
            elif change.outcome is not None:
                self._door.forget(change.outcome)
            self._scheduler.add(Pending(change, remade, size))
        self._budget.release(held_bytes)
        await self._log.wait_stored(changes[-1].sequence, first=changes[0].sequence)
        return left

    def _find(self, session_id: str) -> Resident | None:
        """The held session with this id."""
        return next((each for each in self._residents.held if each.session_id == session_id), None)

    def _has_only_orphans(self, session_id: str) -> bool:
        """Whether what is in quarantine under this id came when its session had been deleted."""
        return self._scheduler.orphans[session_id] > 0 and self._find(session_id) is None

    async def _drop_orphans(self, session_id: str) -> None:
        self._door.check_open()
        await self._log.wait_stored(self._log.accepted, first=self._log.accepted + 1)
        async with self._door.view(None) as snapshot:
            found = [
                decode_change(row.change) async for row in quarantine_rows(snapshot) if row.session_id == session_id
            ]
        orphans = [change for change in found if change.orphaned is not None]
        self._door.check_open()
        if not orphans or not self._scheduler.orphans.pop(session_id, 0):
            raise SessionNotFound(session_id)
        dropped = [msgspec.structs.replace(change, void=True, late=None) for change in orphans]
        changes = self._resequence(0, dropped)
        for change, size in zip(changes, self._accept(changes), strict=True):
            self._scheduler.add(Pending(change, None, size))
        await self._log.wait_stored(changes[-1].sequence, first=changes[0].sequence)

    async def _held(self, session_id: str) -> Resident:
        """A held session, all of whose changes are in quarantine by now."""
        self._door.check_open()
        resident = self._find(session_id)
        if resident is None:
            raise SessionNotFound(session_id)
        await self._log.wait_stored(self._log.accepted, first=self._log.accepted + 1)
        self._check(resident)
        return resident

    def _check(self, resident: Resident) -> None:
        """Somebody else may have replayed or dropped the changes meanwhile, or closed the runtime."""
        self._door.check_open()
        if resident.replaced or not resident.held:
            raise SessionHeld(resident.session_id)

    def _accept(self, changes: Sequence[Change]) -> list[int]:
        """Put the changes into the log. They have room in the budget already; returns what each takes of it now."""
        frames = [(change.sequence, encode_change(change)) for change in changes]
        self._log.accept_all(frames)
        sizes = [CHANGE_BYTES + len(data) for _, data in frames]
        self._budget.charge(sum(sizes))
        return sizes

    def _resequence(self, previous: int, changes: Sequence[Change]) -> list[Change]:
        """The changes with the next sequences of the log, the first after `previous`, each resolving the one it was."""
        renumbered = []
        for sequence, change in enumerate(changes, self._log.next):
            outcome = change.outcome
            if outcome is not None:
                outcome = msgspec.structs.replace(outcome, sequence=sequence)
            renumbered.append(
                msgspec.structs.replace(
                    change, sequence=sequence, previous=previous, outcome=outcome, resolves=change.sequence
                )
            )
            previous = sequence
        return renumbered

    def _resubmit(self, resident: Resident, changes: Sequence[Change]) -> None:
        sizes, held_bytes = self._accept(changes), resident.held_bytes
        self._scheduler.let_go(resident.incarnation)
        self._residents.resubmit(resident, changes)
        for change, size in zip(changes, sizes, strict=True):
            self._scheduler.add(Pending(change, resident, size))
        self._budget.release(held_bytes)
