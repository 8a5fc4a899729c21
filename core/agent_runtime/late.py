"""Late replay: what a journal still has when another runtime has written to the database since.

A runtime that loses its lease keeps its journal, with changes that were acknowledged and are not stored. When the
journal is opened again they come in through the ordinary door, as new changes of the log, each against the state that
it finds:

- A message keeps its id. It keeps its seq too, if nobody has appended to the session since: then nothing is late. Else
  it goes to the end, under a new seq, marked as late (`records.LATE`).
- A call whose idempotency key is known was repeated elsewhere: its change is dropped. If it created a session, what
  follows goes to the one that the repetition created.
- A session that nobody else has changed since takes everything as it was, whatever the clocks say.
- What a later change of the journal removes does not come in at all. Removals otherwise touch what they saw: messages
  that were stored when the journal was overtaken, documents that were there before its changes. A session that was
  changed since is not deleted, but cleared of those.
- Contexts and documents that are older than what is there are dropped; of details that are, only those come in that
  nobody has given since, and newer ones leave those that they don't give. What is older is told by their times: the
  database does not say who wrote a document. Of what the journal gave more than once, only the last comes in.
- Changes of a session that was deleted since go to quarantine, as orphans: they hold nobody. A session that was
  created under an id that another has taken since is joined to that one.

Each change names the place that it had (`Change.late`), and the batch that stores it moves its journal's row there. So
replay may be killed anywhere and run again. For what it must know of the whole journal it notes, in a file of its own,
how far the journal was stored when it was overtaken, and which sessions others have changed: a later run looks at the
same changes as the first one, and knows what that one has brought in from what others did. Where another runtime has
written between the two, a session that the first one has begun with counts as changed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import msgspec
from anyio.lowlevel import checkpoint
from msgspec.structs import replace

from .budget import CHANGE_BYTES, Budget
from .changes import Change, Late, encode_change
from .directories import Overtaken
from .door import CREATION_SCOPE, Door, Plan
from .errors import JournalError, Overloaded, Quarantined, StorageUnavailable
from .journal import Frame
from .journal.headers import number_of, segment_name
from .late_changes import Found, Story, reborn, rebuilt
from .log import Log
from .reads import Reads
from .records import Session
from .recovery import change_in
from .residents import Resident
from .rows import OutcomeRow
from .scheduler import Pending, Scheduler

__all__ = ["MARK", "LateReplay"]

logger: Final = logging.getLogger("agent_runtime.journal")

MARK: Final = "overtaken"
_MARKS: Final = (MARK, f"{MARK}.2")
"""Two, in turns: the last one stays until the next one is on the disk."""
_CHANGES_PER_TURN: Final = 50
_PAGE: Final = 1000
_decode_session: Final = msgspec.json.Decoder(Session).decode


class _Mark(msgspec.Struct, frozen=True):
    """What the file says: the journal was stored up to `stored`, and ended at `end`, when it was overtaken. `changed`
    are the incarnations that others have changed since, as the run in `epoch` knew."""

    journal: str
    stored: int
    end: int
    epoch: int = 0
    changed: list[str] = []


class LateReplay:
    """Brings in the changes of one journal that was overtaken. Its directory is locked, and nobody else writes."""

    def __init__(
        self,
        overtaken: Overtaken,
        *,
        door: Door,
        log: Log,
        budget: Budget,
        reads: Reads,
        scheduler: Scheduler,
        flush: Callable[[], Awaitable[None]],
        epoch: int,
    ) -> None:
        self._epoch = epoch
        self._files = overtaken.files
        self._directory = overtaken.directory
        self._journal_id = overtaken.journal_id
        self._done = overtaken.stored
        self._door = door
        self._log = log
        self._reads = reads
        self._budget = budget
        self._scheduler = scheduler
        self._flush = flush
        self._stories: dict[str, Story] = {}
        self._orphans = 0

    async def run(self, *, ours: bool) -> None:
        """Bring in everything. `ours`: the journal goes on after this; else it is empty then.

        Raises:
            StorageError: the database can't be used; the journal keeps what is left.
            JournalError: it can't be read.
            LeaseLost: another runtime has taken over.
        """
        end = self._directory.end
        if ours:
            self._log.next = max(self._log.next, end + 1)
        await self._begin(end)
        count = 0
        for change in self._changes(self._done):
            await self._bring(change)
            count += 1
        if count or ours:
            await self._finish(end)
        if count:
            logger.warning(
                "%d change(s) of the journal %s came in late; %d went to quarantine, their sessions were deleted",
                count,
                self._directory.place,
                self._orphans,
            )
        await self._tidy(ours=ours)

    # The journal

    async def _begin(self, end: int) -> None:
        """Learn what there is to know of the whole, and note it on the disk before anything comes in."""
        name, last = self._last_mark(end)
        stored = self._done if last is None else last.stored
        for number, change in enumerate(self._changes(stored), 1):
            self._note(change)
            if number % _CHANGES_PER_TURN == 0:
                await checkpoint()
        if last is not None and last.epoch + 1 == self._epoch:
            changed = last.changed
        else:
            changed = await self._changed()
        for incarnation in changed:
            if (story := self._stories.get(incarnation)) is not None:
                story.changed = True
        await self._write_mark(name, _Mark(self._journal_id, stored, end, self._epoch, changed))

    def _last_mark(self, end: int) -> tuple[str, _Mark | None]:
        """What the last run has noted, and in which file; None: this is the first one."""
        last, found = MARK, None
        with self._accessing("read"):
            for name in set(_MARKS) & set(self._files.names()):
                with self._files.read(name) as file, contextlib.suppress(msgspec.MsgspecError):
                    # One that is not whole is of a run that died before anything else.
                    mark = msgspec.json.decode(file.read(), type=_Mark)
                    if (mark.journal, mark.end) != (self._journal_id, end):
                        continue
                    if found is None or mark.epoch > found.epoch:
                        last, found = name, mark
        return last, found

    async def _write_mark(self, last: str, mark: _Mark) -> None:
        """Put it in the place of the `last` one."""
        (name,) = set(_MARKS) - {last}
        with self._accessing("write"):
            if name in self._files.names():
                self._files.unlink(name)
            file = self._files.create(name)
            try:
                data = msgspec.json.encode(mark) + b"\n"
                if file.write(data) != len(data):
                    raise JournalError(f"could not write {name} in {self._directory.place}: the disk is full")
                await file.sync()
            finally:
                file.close()
            await self._files.sync_directory()

    @contextlib.contextmanager
    def _accessing(self, verb: str) -> Iterator[None]:
        """What the disk refuses of a mark is an error that says so."""
        try:
            yield
        except OSError as error:
            raise JournalError(
                f"could not {verb} {MARK} in {self._directory.place}: {error.strerror or error}"
            ) from error

    async def _changed(self) -> list[str]:
        """The incarnations that are there, and that somebody has changed since the journal knew them."""
        found: list[str] = []
        for incarnation, story in self._stories.items():
            current = await self._door.locate(story.session_id)
            if current is not None and current.incarnation == incarnation and current.sequence != story.previous:
                found.append(incarnation)
        return found

    def _changes(self, after: int) -> Iterator[Change]:
        """What the journal has above a sequence. What replays or drops something of the quarantine is left there."""
        for item in self._directory.frames(after=after):
            if not isinstance(item, Frame):
                logger.error("change(s) %d to %d of the journal %s are lost by damage", *item, self._directory.place)
                continue
            change = change_in(item, self._directory)
            if change.resolves is None and not change.void:
                yield change

    def _note(self, change: Change) -> None:
        """Take a change into the story of its session."""
        story = self._stories.get(change.incarnation)
        if story is None:
            story = self._stories[change.incarnation] = Story.begun_by(change)
        story.add(change)

    async def _finish(self, end: int) -> None:
        """When all is stored, the journal's row says so, and stands where the database does if the journal is ours."""
        sequence = self._log.next
        self._settle(
            Change(
                sequence=sequence,
                previous=0,
                session_id="",
                incarnation="",
                last_activity=self._door.now(),
                message_count=0,
                next_seq=1,
                void=True,
                late=Late(self._journal_id, max(sequence, end)),
            )
        )
        await self._store()

    def _settle(self, change: Change) -> None:
        """Put a change into the log that belongs to no session that is there: void, or an orphan."""
        data = encode_change(change)
        size = CHANGE_BYTES + len(data)
        self._log.accept(change.sequence, data)
        self._budget.charge(size)
        if change.orphaned is None:
            self._scheduler.add(Pending(change, None, size))
        else:
            self._scheduler.orphan(change, size)

    async def _store(self) -> None:
        """Wait until all that came in is stored; some of it in quarantine."""
        with contextlib.suppress(Quarantined):
            await self._flush()

    async def _tidy(self, *, ours: bool) -> None:
        try:
            for name in sorted(self._files.names()):
                if name in _MARKS or (not ours and number_of(name) and name == segment_name(number_of(name))):
                    self._files.unlink(name)
            await self._files.sync_directory()
        except OSError as error:
            raise JournalError(f"could not clear {self._directory.place}: {error.strerror or error}") from error

    # Changes

    async def _bring(self, change: Change) -> None:
        """One change, against what there is now."""
        story, late = self._stories[change.incarnation], Late(self._journal_id, change.sequence)
        if change.outcome is not None and await self._outcome(change.outcome.scope, change.outcome.key):
            return
        current = await self._door.locate(change.session_id)
        if change.birth is not None and current is None:
            await self._write(change.session_id, lambda _: reborn(change, story, self._log.next, late))
            return
        if current is None or current.incarnation != change.incarnation:
            if story.deleted:
                return
            current = await self._joined(change, story)
            if current is None:
                self._orphan(change)
                return
            if change.outcome is not None and await self._outcome(current.incarnation, change.outcome.key):
                return
        found = await self._found(change, story, current)

        def build(resident: Resident | None) -> Change | None:
            if resident is None:
                raise StorageUnavailable(f"the session {change.session_id!r} is gone while nobody may write")
            return rebuilt(change, story, found, resident, self._log.next, late)

        await self._write(current.session_id, build)

    async def _outcome(self, scope: str, key: str) -> OutcomeRow | None:
        async with self._door.view(None) as snapshot:
            return await snapshot.outcome(scope, key)

    async def _joined(self, change: Change, story: Story) -> Resident | None:
        """The session that has taken the place of one which only this journal knew; None: there is none."""
        if not story.born:
            return None
        session_id = change.session_id
        outcome = None if story.key is None else await self._outcome(CREATION_SCOPE, story.key)
        if outcome is not None:
            session_id = _decode_session(outcome.outcome).session_id
        return await self._door.locate(session_id)

    async def _write(self, session_id: str, build: Callable[[Resident | None], Change | None]) -> None:
        """Put what `build` makes of the session into the log."""

        def decide(current: Resident | None) -> Plan[None]:
            return Plan(build(current), None)

        while True:
            try:
                return await self._door.write(session_id, CREATION_SCOPE, decide, durability="buffered", held=True)
            except Overloaded:
                await self._store()

    def _orphan(self, change: Change) -> None:
        """Its session was deleted, and not by this journal too."""
        self._orphans += 1
        reason = "came in late: its session had been deleted"
        late = Late(self._journal_id, change.sequence, reason)
        self._settle(replace(change, sequence=self._log.next, previous=0, late=late))

    async def _found(self, change: Change, story: Story, current: Resident) -> Found:
        """What of a change still has its place, as far as the database must be asked."""
        found = Found()
        place, alone = (current.session_id, current.incarnation), story.alone(current)
        if current.incarnation == change.incarnation:
            for seq in change.removed:
                if seq <= story.base and await self._reads.message(*place, seq) is not None:
                    found.removed.append(seq)
            floor = change.next_seq - 1 if change.deleted else change.floor
            if floor is not None:
                found.floor = min(floor, story.base)
                found.left = await self._count_above(current, found.floor)
            if change.deleted and not alone:
                found.discarded = await self._documents_seen(story, current)
        for row in change.documents:
            if story.gone_document(row, change.sequence):
                continue
            there = None if alone else (await self._reads.document_row(*place, row.collection, row.key))[0]
            if there is None or there.updated_at <= row.updated_at:
                found.documents.append(replace(row, incarnation=current.incarnation))
        for collection, key in change.discarded:
            there, _ = await self._reads.document_row(*place, collection, key)
            if there is not None and (alone or story.saw(there)):
                found.discarded.append((collection, key))
        return found

    async def _documents_seen(self, story: Story, current: Resident) -> list[tuple[str, str]]:
        """The documents of a session that the journal knew of."""
        await self._store()
        found: list[tuple[str, str]] = []
        async with self._door.view(current) as snapshot:
            for collection in await snapshot.collections(current.incarnation):
                key = ""
                while page := await snapshot.documents(current.incarnation, collection, after=key, limit=_PAGE):
                    found += ((collection, row.key) for row in page if story.saw(row))
                    key = page[-1].key
        return found

    async def _count_above(self, current: Resident, floor: int) -> int:
        """How many messages there are behind a seq."""
        count, after = 0, floor
        while True:
            page = await self._reads.messages(
                current.session_id, current.incarnation, after=after, limit=_PAGE, order="asc"
            )
            count += len(page.items)
            if page.next is None:
                return count
            after = page.next
