"""What the database refused: shown, put back into the log, or given up.

A session with a change in quarantine is held: its later changes queue behind it, reads show all of them, writes are
refused. Replaying puts the changes back at the end of the log, in order, under new sequences; the batch that stores
them takes the old ones out of quarantine. Dropping gives up the rejected change and lets the rest through.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Final, Literal

import msgspec

from .changes import Change, decode_change
from .door import Door
from .errors import SessionHeld, SessionNotFound
from .log import Log
from .residents import OUTCOMES_MAX, Resident, Residents
from .rows import QuarantineRow, SessionRow
from .scheduler import Pending, Scheduler
from .storage import HeadRows, Snapshot

__all__ = ["Quarantine", "QuarantinedChange", "rebase"]

_PAGE: Final = 200


class QuarantinedChange(msgspec.Struct, frozen=True, kw_only=True):
    """A change in quarantine: the one that was `rejected`, or one `queued` behind it. `bytes` is its encoded size."""

    sequence: int
    session_id: str
    state: Literal["rejected", "queued"]
    error: str
    bytes: int
    quarantined_at: datetime


def rebase(changes: Sequence[Change], dropped: Change, message_count: int) -> list[Change]:
    """The changes as they would be had `dropped`, the one before them, not happened.

    `message_count` is the session's count before `dropped`. Every change states results; of these only the count of
    messages depends on what was before.
    """
    surplus = dropped.message_count - message_count
    missing = {_seq_of(raw) for raw in dropped.messages}
    rebased = []
    for change in changes:
        if change.floor is not None:
            surplus = 0
        surplus -= len(missing.intersection(change.removed))
        rebased.append(msgspec.structs.replace(change, message_count=change.message_count - surplus))
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

    def __init__(self, *, door: Door, log: Log, residents: Residents, scheduler: Scheduler) -> None:
        self._door = door
        self._log = log
        self._residents = residents
        self._scheduler = scheduler

    async def restore(self) -> int:
        """At open: bring every held session into memory. Returns how many changes there are."""
        count = 0
        async with self._door.view(None) as snapshot:
            held: dict[str, list[Change]] = {}
            async for row in self._rows(snapshot):
                held.setdefault(row.incarnation, []).append(decode_change(row.change))
            for incarnation, changes in held.items():
                head = await snapshot.head(changes[0].session_id, outcomes_max=OUTCOMES_MAX)
                succeeded = head is not None and head.session.sequence > changes[-1].sequence
                self._residents.restore(changes, _of(incarnation, head), succeeded=succeeded)
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
            return [
                QuarantinedChange(
                    sequence=row.sequence,
                    session_id=row.session_id,
                    state=row.state,
                    error=row.error,
                    bytes=len(row.change),
                    quarantined_at=row.quarantined_at,
                )
                async for row in self._rows(snapshot)
            ]

    @staticmethod
    async def _rows(snapshot: Snapshot) -> AsyncIterator[QuarantineRow]:
        after = 0
        while rows := await snapshot.quarantine(after=after, limit=_PAGE):
            for row in rows:
                yield row
            after = rows[-1].sequence

    async def replay(self, session_id: str) -> int:
        """Try a session's quarantined changes again, and wait until they are stored. Returns how many they were.

        Raises:
            SessionNotFound: nothing of this session is in quarantine.
            Quarantined: the database refuses a change again.
        """
        resident = await self._held(session_id)
        changes = self._resequence(resident, resident.held)
        self._resubmit(resident, changes)
        await self._log.wait_stored(changes[-1].sequence, first=changes[0].sequence)
        return len(changes)

    async def drop(self, session_id: str) -> int:
        """Give up the session's rejected change, let the ones behind it through. Returns how many those are.

        When the rejected change is the session's creation, there is nothing for the others to go to: all are given up.

        Raises:
            SessionNotFound: nothing of this session is in quarantine.
            Quarantined: the database refuses another one.
        """
        resident = await self._held(session_id)
        async with self._door.view(resident) as snapshot:
            rows = _of(resident.incarnation, await snapshot.head(session_id, outcomes_max=OUTCOMES_MAX))
        self._check(resident)
        held = resident.held
        remade = self._residents.remake(resident, rows)
        self._scheduler.let_go(resident.incarnation)
        if rows is None or remade is None:
            left = 0
            changes = self._resequence(resident, [msgspec.structs.replace(change, void=True) for change in held])
        else:
            left = len(held) - 1
            rest = rebase(held[1:], held[0], rows.session.message_count)
            changes = self._resequence(remade, [_husk(held[0], rows.session), *rest])
        for change in changes:
            self._log.accepted = change.sequence
            if remade is not None:
                self._residents.add(change, remade)
            elif change.outcome is not None:
                self._door.forget(change.outcome)
            self._scheduler.add(Pending(change, remade, 0))
        await self._log.wait_stored(changes[-1].sequence, first=changes[0].sequence)
        return left

    async def _held(self, session_id: str) -> Resident:
        """A held session, all of whose changes are in quarantine by now."""
        self._door.check_open()
        resident = next((each for each in self._residents.held if each.session_id == session_id), None)
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

    def _resequence(self, resident: Resident, changes: Sequence[Change]) -> list[Change]:
        """The changes with the next sequences of the log, each resolving the one it comes from."""
        sequence = self._log.accepted
        previous = resident.sequence
        renumbered = []
        for change in changes:
            sequence += 1
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
        self._scheduler.let_go(resident.incarnation)
        self._residents.resubmit(resident, changes)
        for change in changes:
            self._log.accepted = change.sequence
            self._scheduler.add(Pending(change, resident, 0))
