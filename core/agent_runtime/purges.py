"""Hard purges: sessions deleted, and waited for until nothing of them is left where this runtime writes.

A purge deletes through the door, as any call does; so it is journaled, stored once, and seen at once. Before that the
changes that a session has in quarantine are given up, and what is kept of its idempotent calls is overwritten. Then it
waits, for all its sessions together, until the deletion is stored, the rows are deleted, the storage has taken them out
of its files as far as it can, and the journal has let go of every segment that was begun before. Where it is broken off
the sessions are deleted already, and the rest happens as after any deletion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import msgspec

from .door import CREATION_SCOPE, Door
from .errors import Quarantined, SessionNotFound
from .keeper import JournalKeeper
from .plans import Planner
from .quarantine import Quarantine
from .reads import Reads
from .records import PurgedSession
from .residents import Resident
from .rows import OutcomeRow
from .scheduler import Scheduler
from .session import PAGE_ITEMS_MAX

__all__ = ["Purges"]

_PAGE: Final = 200
_encode: Final = msgspec.json.Encoder().encode


class _Created(msgspec.Struct):
    """The part of a session's record, which is the outcome of its creation, that tells which session it is."""

    incarnation: str


class Purges:
    """Purges sessions of one runtime."""

    def __init__(
        self,
        *,
        door: Door,
        planner: Planner,
        reads: Reads,
        quarantine: Quarantine,
        scheduler: Scheduler,
        journal: JournalKeeper | None,
    ) -> None:
        self._door = door
        self._planner = planner
        self._reads = reads
        self._quarantine = quarantine
        self._scheduler = scheduler
        self._journal = journal

    async def purge(
        self, session_ids: Sequence[str], idle_longer_than: timedelta | None, *, dry_run: bool
    ) -> list[PurgedSession]:
        """Purge those of the sessions that are there and idle; with `dry_run` only tell what that would take."""
        before = None if idle_longer_than is None else self._door.now() - idle_longer_than
        creations = {} if dry_run else await self._creations()
        purged = []
        deletions = []
        for session_id in dict.fromkeys(session_ids):
            resident = await self._door.locate(session_id)
            if resident is None or not _is_idle(resident, before):
                continue
            try:
                taken = await self._measure(resident)
            except SessionNotFound:  # somebody else has deleted it meanwhile
                continue
            if not dry_run:
                deletion = await self._delete(resident, before, creations.get(resident.incarnation, []))
                if deletion is None:
                    continue
                deletions.append(deletion)
            purged.append(taken)
        if deletions:
            await self._erase(deletions)
        return purged

    async def _measure(self, resident: Resident) -> PurgedSession:
        session_id, incarnation = resident.session_id, resident.incarnation
        messages = documents = size = 0
        after: int | None = None
        while True:
            page = await self._reads.messages(session_id, incarnation, after=after, limit=_PAGE, order="asc")
            messages += len(page.items)
            size += sum(len(_encode(message)) for message in page.items)
            after = page.next
            if after is None:
                break
        async with self._door.view(resident) as snapshot:
            collections = {*await snapshot.collections(incarnation)}
        collections.update(row.collection for change in resident.changes for row in change.documents)
        for collection in sorted(collections):
            key: str | None = None
            while True:
                found = await self._reads.documents(
                    session_id, incarnation, collection, cursor=key, limit=PAGE_ITEMS_MAX
                )
                documents += len(found.items)
                size += sum(len(_encode(document)) for document in found.items)
                key = found.next
                if key is None:
                    break
        return PurgedSession(
            session_id=session_id,
            messages=messages,
            documents=documents,
            quarantined=len(resident.held),
            bytes=size + resident.held_bytes,
        )

    async def _delete(self, resident: Resident, before: datetime | None, creations: Sequence[OutcomeRow]) -> int | None:
        """Delete the session with what is kept beside it; None: it is there no more, or not idle any more.

        The result is the sequence of the deletion; 0: giving up its creation was all there was to do.
        """
        session_id, incarnation = resident.session_id, resident.incarnation
        held = False
        while True:
            current = await self._door.locate(session_id)
            if current is None or current.incarnation != incarnation or not _is_idle(current, before):
                return 0 if held else None
            if current.held:
                held = True
                with suppress(Quarantined):  # the change behind it is refused too: it is given up next
                    await self._quarantine.drop(session_id)
                continue
            seen: int | None = current.sequence
            for outcome in (*creations, *await self._outcomes(current)):
                if seen is not None:
                    seen = await self._door.write(
                        session_id, incarnation, partial(self._planner.forget, outcome, seen), durability="buffered"
                    )
            if seen is not None:
                deletion = await self._door.write(
                    session_id, incarnation, partial(self._planner.delete_unchanged, seen), durability="buffered"
                )
                if deletion is not None:
                    return deletion

    async def _outcomes(self, resident: Resident) -> list[OutcomeRow]:
        """What is kept of the idempotent calls on the session."""
        found: dict[str, OutcomeRow] = {}
        async with self._door.view(resident) as snapshot:
            after = (resident.incarnation, "")
            while rows := await snapshot.outcomes(after=after, limit=_PAGE):
                found.update((row.key, row) for row in rows if row.scope == resident.incarnation)
                if rows[-1].scope != resident.incarnation:
                    break
                after = rows[-1].scope, rows[-1].key
            return self._living({**found, **resident.outcomes}.values())

    async def _creations(self) -> dict[str, list[OutcomeRow]]:
        """What is kept of the idempotent calls that created sessions, by incarnation."""
        found = {row.key: row for row in self._door.creations}
        async with self._door.view(None) as snapshot:
            after = (CREATION_SCOPE, "")
            while rows := await snapshot.outcomes(after=after, limit=_PAGE):
                found.update((row.key, row) for row in rows if row.scope == CREATION_SCOPE)
                if rows[-1].scope != CREATION_SCOPE:
                    break
                after = rows[-1].scope, rows[-1].key
        creations: dict[str, list[OutcomeRow]] = {}
        for row in self._living(found.values()):
            creations.setdefault(msgspec.json.decode(row.outcome, type=_Created).incarnation, []).append(row)
        return creations

    def _living(self, outcomes: Iterable[OutcomeRow]) -> list[OutcomeRow]:
        now = self._door.now()
        return [row for row in outcomes if row.expires_at > now]  # the others go with the rows, as they are

    async def _erase(self, deletions: Iterable[int]) -> None:
        log = self._door.log
        upto = log.accepted
        await log.wait_stored(upto, first=upto + 1)  # what the database refuses of others is theirs to be told
        await self._scheduler.purged()
        if self._journal is not None:
            await self._journal.erase(upto)
        for deletion in deletions:
            await log.wait_stored(deletion)


def _is_idle(resident: Resident, before: datetime | None) -> bool:
    return before is None or (resident.last_activity < before and not resident.held)
