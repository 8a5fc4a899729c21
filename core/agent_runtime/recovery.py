"""Recovery: what the journal has and the database has not goes to the database, before anything is served.

The changes take the way that all changes take: in batches that name the sequence they follow, tried again, bisected and
quarantined by the write-behind task. So recovery may be killed anywhere and run again, in bounded memory.

Guarantees: each whole change is stored once, in order. Where damage has taken a change of a session, the later ones of
that session go to quarantine instead of being laid over a gap, and the session is held; all others go on.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final

import anyio
import msgspec
from anyio.lowlevel import checkpoint

from .budget import Budget
from .changes import Change, decode_change
from .errors import JournalCorrupt, StorageUnavailable
from .journal import Directory, Frame, Gap
from .lease import LeaseKeeper
from .log import Log
from .quarantined import quarantine_rows
from .residents import Residents
from .scheduler import Observers, Pending, Scheduler, SchedulerOptions
from .storage import Storage

__all__ = ["change_in", "recover"]

logger: Final = logging.getLogger("agent_runtime.journal")

_CHANGE_BYTES: Final = 3000  # what a decoded change takes besides its encoded form, generously
_CHANGES_PER_TURN: Final = 50
_PROGRESS_S: Final = 5.0
_WATCH_S: Final = 0.2


class _Gaps:
    """Ranges of sequences that are lost."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []

    def add(self, gap: Gap) -> None:
        """Add a range behind all others."""
        self._firsts.append(gap.first)
        self._lasts.append(gap.last)

    def __contains__(self, sequence: int) -> bool:
        index = bisect_right(self._firsts, sequence) - 1
        return index >= 0 and sequence <= self._lasts[index]

    @property
    def count(self) -> int:
        """How many sequences they are."""
        return sum(self._lasts) - sum(self._firsts) + len(self._firsts)


def change_in(frame: Frame, directory: Directory) -> Change:
    """The change that a frame of a journal holds.

    Raises:
        JournalCorrupt: the frame is whole, but holds no change that this version can read, or not the one it says.
    """
    try:
        change = decode_change(frame.payload)
    except msgspec.MsgspecError as error:
        raise JournalCorrupt(
            f"change {frame.sequence} of the journal {directory.place} is whole, but can't be read: it was written by "
            "another version of agent-runtime, which is to open it"
        ) from error
    if change.sequence != frame.sequence:
        raise JournalCorrupt(
            f"the frame {frame.sequence} of the journal {directory.place} holds change {change.sequence}"
        )
    return change


async def recover(
    directory: Directory,
    storage: Storage,
    lease: LeaseKeeper,
    *,
    observers: Observers,
    options: SchedulerOptions,
    bytes_max: int,
    timeout_s: float,
    now: Callable[[], datetime],
    random: Callable[[], float],
) -> int:
    """Store every change of the journal that the database lacks. Returns the sequence up to which all is stored.

    `bytes_max` bounds what is in memory at once; `timeout_s` is how long the database may be away.

    Raises:
        StorageUnavailable: it was away longer, or can't be used; the journal keeps everything.
        JournalCorrupt: a whole change is of a form that this version can't read.
        LeaseLost: another runtime has taken over.
    """
    log = Log(lease.grant.sequence)
    budget = Budget(bytes_max, timeout_s=math.inf, retry_after_s=1.0)
    scheduler = Scheduler(
        storage,
        lease.grant.fence,
        log=log,
        budget=budget,
        residents=Residents(bytes_max=0, tail_messages=0),
        observers=observers,
        options=options,
        now=now,
        random=random,
    )
    await _Recovery(directory, storage, lease, log, budget, scheduler, timeout_s).run()
    return log.stored


class _Recovery:
    def __init__(
        self,
        directory: Directory,
        storage: Storage,
        lease: LeaseKeeper,
        log: Log,
        budget: Budget,
        scheduler: Scheduler,
        timeout_s: float,
    ) -> None:
        self._directory = directory
        self._storage = storage
        self._lease = lease
        self._log = log
        self._budget = budget
        self._scheduler = scheduler
        self._timeout_s = timeout_s
        self._start = log.stored
        self._gaps = _Gaps()
        self._changes = 0
        self._error: Exception | None = None

    async def run(self) -> None:
        """Do it, with the lease renewed meanwhile."""
        async with anyio.create_task_group() as tasks:
            for part in (self._lease.run, self._watch, self._feed):
                tasks.start_soon(self._heed, part)
            await self._heed(self._scheduler.run)
            tasks.cancel_scope.cancel()
        if self._error is not None:
            raise self._error
        if self._changes:
            logger.info("recovered %d change(s) from the journal %s", self._changes, self._directory.place)
        if self._gaps.count:
            logger.error("%d change(s) of the journal %s are lost by damage", self._gaps.count, self._directory.place)

    async def _heed(self, part: Callable[[], Awaitable[None]]) -> None:
        """Run a part; its error ends the whole, and comes out of `run` instead of the task group's exception group."""
        try:
            await part()
        except Exception as error:  # noqa: BLE001 — raised by run()
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._scheduler.abandon(StorageUnavailable("the recovery has failed"))

    async def _feed(self) -> None:
        """Hand the changes to the write-behind task, and let it end with the last one."""
        await self._hold()
        for turn, item in enumerate(self._directory.frames(after=self._start), 1):
            if turn % _CHANGES_PER_TURN == 0:
                await checkpoint()
            if isinstance(item, Gap):
                self._gaps.add(item)
            else:
                await self._replay(item)
        self._scheduler.stop()

    async def _hold(self) -> None:
        """What comes for a session with changes in quarantine queues behind them, as before."""
        async with self._storage.snapshot() as snapshot:
            async for row in quarantine_rows(snapshot):
                self._scheduler.hold(row.incarnation)

    async def _replay(self, frame: Frame) -> None:
        change = change_in(frame, self._directory)
        if change.resolves is not None:  # it was put back when everything before it was stored
            await self._log.wait_stored(self._log.accepted, first=self._log.accepted + 1)
            self._scheduler.let_go(change.incarnation)
        size = min(_CHANGE_BYTES + len(frame.payload), self._budget.bytes_max)
        if not self._budget.admit(size):
            await self._budget.reserve(size)
        lost = change.previous in self._gaps or await self._is_loose(change)
        broken = "a change of its session before it was lost by damage to the journal" if lost else None
        self._log.next = change.sequence
        self._log.accept(change.sequence, frame.payload)
        self._scheduler.add(Pending(change, None, size, broken))
        self._changes += 1

    async def _is_loose(self, change: Change) -> bool:
        """Whether the change does not follow what the database has of its session.

        So it may be where a recovery died that knew of a gap below what it had stored; this one can't see it any more.
        """
        if change.void or change.orphaned is not None:
            return False
        if not self._directory.unused or change.previous > self._start or change.birth or change.resolves:
            return False
        async with self._storage.snapshot() as snapshot:
            head = await snapshot.head(change.session_id, outcomes_max=0)
        session = None if head is None else head.session
        return session is None or (session.incarnation, session.sequence) != (change.incarnation, change.previous)

    async def _watch(self) -> None:
        """Tell how far it is, and give up when the database has been away for too long."""
        told_at = anyio.current_time()
        try:
            while True:
                await anyio.sleep(_WATCH_S)
                now = anyio.current_time()
                figures = self._scheduler.figures
                if figures.failing_since_s is not None and now - figures.failing_since_s > self._timeout_s:
                    raise StorageUnavailable(
                        f"the database does not take what the journal {self._directory.place} has for it "
                        f"({figures.last_error}); the journal keeps it: start again when the database is back"
                    )
                if now - told_at > _PROGRESS_S:
                    told_at = now
                    done, all_ = self._log.stored - self._start, max(self._directory.end - self._start, 1)
                    logger.info("recovering from the journal: %d of %d change(s)", done, all_)
        finally:
            self._scheduler.abandon(StorageUnavailable("the recovery has ended"))
