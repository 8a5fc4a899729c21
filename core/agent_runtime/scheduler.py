"""The write-behind task: takes acknowledged changes to the database, in batches, behind the callers' backs.

One task. It flushes when the oldest unstored change is `interval_s` old, when `batch_changes` have gathered or half the
byte budget is used, when somebody waits for `stored`, and to drain. All waiters of one moment share one transaction.

Guarantees:
- Changes are stored in the order of the log, each exactly once: a batch names the sequence it follows, so a batch whose
  outcome was unknown is found stored or not stored, and never stored twice.
- A failed batch loses nothing: the changes stay, and are tried again after a backoff with jitter, whatever the error.
- Only a change that the storage rejects by itself goes to quarantine, with the later ones of its session behind it; all
  other sessions go on. Many in a short time look like a broken schema: then nothing more is quarantined, and the batch
  is tried again, slowly, until a person has acted.
- A batch is shielded: cancelled before or after, never inside. Only a stop that runs out of time breaks it off.
- The task itself ends on two occasions only: drained at a stop, or fenced off by another runtime.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Final, Protocol, cast

import anyio
import msgspec
from anyio.lowlevel import checkpoint

from .budget import Budget
from .changes import Batch, Change, Coalescer, Receipt, encode_change
from .errors import (
    AgentRuntimeError,
    ChangeRejected,
    JournalCorrupt,
    LeaseLost,
    SequenceMismatch,
    SessionNotFound,
    StorageError,
    StorageFatal,
    again,
)
from .histograms import COUNTS, SECONDS, Histogram
from .log import Log
from .residents import Resident, Residents
from .storage import Fence, Scrubs, Storage

__all__ = ["FlushFigures", "Observers", "Pending", "Scheduler", "SchedulerOptions"]

logger = logging.getLogger("agent_runtime.scheduler")

_BACKOFF_FIRST_S: Final = 0.1
_BACKOFF_MAX_S: Final = 10.0
_CHANGES_PER_TURN: Final = 250  # coalescing one costs 2–4 µs: yield to the loop about every millisecond
_PURGE_ROWS: Final = 1000
_PURGE_INTERVAL_S: Final = 3600.0


class Observers(Protocol):
    """Who is told of what happens to batches; never raises."""

    def batch_stored(self, receipt: Receipt) -> None:
        """A batch is in the database."""

    def flush_failed(self, batch: Batch, error: Exception, attempt: int) -> None:
        """The `attempt`-th try to store a batch failed."""

    def change_quarantined(self, change: Change, error: Exception) -> None:
        """A change goes to quarantine."""


class Pending(msgspec.Struct, frozen=True, gc=False):
    """An unstored change; `size` is what it takes of the budget, in bytes. A void or replayed one has no resident.

    `broken` says why it can't be applied although the database would take it: it goes to quarantine without a try.
    """

    change: Change
    resident: Resident | None
    size: int
    broken: str | None = None


class SchedulerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the configuration that the scheduler needs."""

    interval_s: float
    batch_changes: int
    quarantine_max: int
    quarantine_window_s: float


class FlushFigures(msgspec.Struct, kw_only=True):
    """What the scheduler has done so far. `sizes` (in changes) are of stored batches, `durations` (in seconds) of those
    that the storage reported as stored: of one that it reported as failed nobody knows."""

    batches: int = 0
    changes: int = 0
    failures: int = 0
    retries: int = 0
    quarantined: int = 0
    last_duration_s: float = 0.0
    last_changes: int = 0
    durations: Histogram = msgspec.field(default_factory=lambda: Histogram.of(SECONDS))
    sizes: Histogram = msgspec.field(default_factory=lambda: Histogram.of(COUNTS))
    last_error: str | None = None
    failing_since_s: float | None = None


class Scheduler:
    """Owns the unstored changes of all sessions. `orphans` counts those in quarantine of deleted ones, by id."""

    def __init__(
        self,
        storage: Storage,
        fence: Fence,
        *,
        log: Log,
        budget: Budget,
        residents: Residents,
        observers: Observers,
        options: SchedulerOptions,
        now: Callable[[], datetime],
        random: Callable[[], float],
    ) -> None:
        self.figures = FlushFigures()
        self.orphans: Counter[str] = Counter()
        self._storage = storage
        self._fence = fence
        self._log = log
        self._budget = budget
        self._residents = residents
        self._observers = observers
        self._options = options
        self._now = now
        self._random = random
        self._pending: deque[Pending] = deque()
        self._pending_bytes = 0
        self._oldest_at = 0.0
        self._held: set[str] = set()
        self._rejections: deque[float] = deque()
        self._wake = anyio.Event()
        self._taken_at = 0.0
        self._stopping = False
        self._abandoned_for: AgentRuntimeError | None = None
        self._scope = anyio.CancelScope()
        self._purge_at = anyio.current_time()  # an earlier run may have left rows to purge
        self._purge_awaited: list[anyio.Event] = []
        log.on_demand(store=self._wake_up)
        budget.on_demand = self._wake_up
        residents.on_settled = budget.release

    @property
    def pending_changes(self) -> int:
        """How many changes are not stored."""
        return len(self._pending)

    def unstored(self) -> Iterator[tuple[int, bytes]]:
        """The sequence and the encoded form of every change that is not stored, in order, as they are now."""
        return ((pending.change.sequence, encode_change(pending.change)) for pending in [*self._pending])

    @property
    def oldest_age_s(self) -> float:
        """How long the oldest unstored change has waited, in seconds."""
        return anyio.current_time() - self._oldest_at if self._pending else 0.0

    def hold(self, incarnation: str) -> None:
        """Changes of this incarnation go to quarantine, behind the one that is there."""
        self._held.add(incarnation)

    def let_go(self, incarnation: str) -> None:
        """The incarnation has no more changes in quarantine."""
        self._held.discard(incarnation)

    def add(self, pending: Pending) -> None:
        """A change was acknowledged. Its size is taken from the budget already. Synchronous; never fails."""
        waiting = self._pending
        waiting.append(pending)
        self._pending_bytes += pending.size
        if len(waiting) == 1:
            self._oldest_at = anyio.current_time()
            self._wake.set()
        elif len(waiting) == self._options.batch_changes or self._pending_bytes * 2 > self._budget.bytes_max:
            self._wake.set()

    def orphan(self, change: Change, size: int) -> None:
        """As `add`, for a change that goes to quarantine by itself: its session is not there any more."""
        self.figures.quarantined += 1
        self.orphans[change.session_id] += 1
        self._observers.change_quarantined(change, SessionNotFound(change.session_id))
        self.add(Pending(change, None, size))

    async def purged(self) -> None:
        """Wait until every row that nobody can see now is deleted, and taken out of the storage's files if it can.

        Raises:
            LeaseLost, RuntimeClosed: that will not happen any more.
        """
        done = anyio.Event()
        self._purge_awaited.append(done)
        self._purge_at = anyio.current_time()
        self._wake.set()
        if self._abandoned_for is None:
            await done.wait()
        if self._abandoned_for is not None:
            raise again(self._abandoned_for)

    def stop(self) -> None:
        """From now on flush without waiting, and end when everything is stored."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """The task. Ends when drained after `stop`, or with the lease lost (then everyone who waits is told)."""
        try:
            while not self._ended:
                await self._sleep_until_due()
                if self._flush_in() <= 0:
                    await checkpoint()  # let everyone who is about to wait at this moment share the batch
                    count = min(len(self._pending), self._options.batch_changes)
                    self._taken_at = anyio.current_time() if count == len(self._pending) else self._oldest_at
                    await self._store(list(islice(self._pending, count)))
                if self._purge_in() <= 0 and not self._stopping:
                    await self._purge()
        except LeaseLost as error:
            logger.error("the lease is lost, %d change(s) are not stored: %s", len(self._pending), error)
            self._log.stop(error)
            self._budget.stop(error)
            raise

    def abandon(self, error: AgentRuntimeError) -> None:
        """The runtime closes, drained or not: break off, and tell everyone who still waits."""
        self._abandoned_for = error
        for waiting in self._purge_awaited:
            waiting.set()
        self._scope.cancel()
        self._wake.set()
        self._log.stop(error)
        self._budget.stop(error)

    def _breakable(self) -> anyio.CancelScope:
        """Around what may take long: shielded from all but `abandon`, whether that comes meanwhile or came before."""
        self._scope = anyio.CancelScope(shield=True)
        if self._abandoned_for is not None:
            self._scope.cancel()
        return self._scope

    @property
    def _ended(self) -> bool:
        return self._abandoned_for is not None or (self._stopping and not self._pending)

    def _wake_up(self) -> None:
        self._wake.set()

    def _flush_in(self) -> float:
        """Seconds until changes are to be stored."""
        pending = len(self._pending)
        if not pending:
            return math.inf
        if (
            self._stopping
            or self._log.store_awaited
            or self._budget.awaited
            or pending >= self._options.batch_changes
            or self._pending_bytes * 2 > self._budget.bytes_max
        ):
            return 0.0
        return self._oldest_at + self._options.interval_s - anyio.current_time()

    def _purge_in(self) -> float:
        return self._purge_at - anyio.current_time()

    async def _sleep_until_due(self) -> None:
        while not self._ended and (due_in := min(self._flush_in(), self._purge_in())) > 0:
            self._wake = anyio.Event()
            with anyio.move_on_after(due_in):
                await self._wake.wait()

    async def _store(self, changes: Sequence[Pending]) -> None:
        """Store consecutive changes, the oldest there are; what is rejected is bisected, left to right."""
        broken = next((index for index, pending in enumerate(changes) if pending.broken is not None), None)
        if broken is not None and len(changes) > 1:
            for part in (changes[:broken], changes[broken : broken + 1], changes[broken + 1 :]):
                await self._store(part)
            return
        rejected: dict[int, str] = {}
        if broken is not None and changes[0].change.incarnation not in self._held:
            reason = changes[0].broken or ""
            rejected[changes[0].change.sequence] = reason
            self._hold_rejected(changes[0], JournalCorrupt(reason))
        attempt = 0
        while self._abandoned_for is None and (changes := _above(self._log.stored, changes)):
            attempt += 1
            batch = await self._coalesce(changes, rejected)
            started = anyio.current_time()
            try:
                with self._breakable() as scope:
                    receipt = await self._storage.apply(batch, self._fence)
                if scope.cancelled_caught:
                    return
            except SequenceMismatch as mismatch:
                self._adopt(mismatch, batch)
            except LeaseLost:
                raise
            except Exception as error:  # noqa: BLE001 — whatever a storage raises, the changes stay and are tried again
                if isinstance(error, ChangeRejected) and not rejected:
                    if len(changes) > 1:
                        middle = len(changes) // 2
                        await self._store(changes[:middle])
                        await self._store(changes[middle:])
                        return
                    if self._may_quarantine():
                        rejected[changes[0].change.sequence] = str(error)
                        self._hold_rejected(changes[0], error)
                        continue
                await self._failed(batch, error, attempt)
            else:
                duration_s = anyio.current_time() - started
                self._stored(msgspec.structs.replace(receipt, duration_s=duration_s, attempt=attempt), batch)

    async def _coalesce(self, changes: Sequence[Pending], rejected: dict[int, str]) -> Batch:
        coalescer = Coalescer(self._log.stored, self._now(), held=self._held, rejected=rejected)
        for number, pending in enumerate(changes, 1):
            coalescer.add(pending.change)
            if number % _CHANGES_PER_TURN == 0:
                await checkpoint()
        return coalescer.batch()

    def _adopt(self, mismatch: SequenceMismatch, batch: Batch) -> None:
        """The database is not where this batch starts: an earlier try of it, reported as failed, was stored."""
        if not self._log.stored < mismatch.found <= self._log.accepted:
            raise LeaseLost(
                f"the database stands at sequence {mismatch.found}, this runtime stored up to {self._log.stored} of "
                f"{self._log.accepted}: somebody else writes to it"
            )
        logger.info("a batch reported as failed was stored after all, up to sequence %d", mismatch.found)
        unstored = len(self._pending)
        self._advance(mismatch.found, batch)
        self._count(unstored - len(self._pending))

    def _stored(self, receipt: Receipt, batch: Batch) -> None:
        self._count(receipt.changes)
        self.figures.last_duration_s = receipt.duration_s
        self.figures.durations.observe(receipt.duration_s)
        self._advance(batch.last, batch)
        logger.debug(
            "flushed %d change(s) of %d session(s) in %.0f ms",
            receipt.changes,
            receipt.sessions,
            receipt.duration_s * 1000,
        )
        self._observers.batch_stored(receipt)

    def _count(self, changes: int) -> None:
        """A batch is stored, whether the storage said so or not."""
        figures = self.figures
        figures.batches += 1
        figures.changes += changes
        figures.last_changes = changes
        figures.sizes.observe(changes)

    def _advance(self, sequence: int, batch: Batch) -> None:
        """Everything up to `sequence` is in the database."""
        if self.figures.failing_since_s is not None:
            logger.info("the storage takes batches again")
            self.figures.failing_since_s = None
            self.figures.last_error = None
        for row in batch.quarantined:
            if row.sequence <= sequence:
                self._log.quarantine(row.sequence)
        for resolved in batch.discharged:
            self._log.discharge(resolved)
        waiting = self._pending
        residents: dict[int, Resident] = {}
        size = 0
        while waiting and waiting[0].change.sequence <= sequence:
            pending = waiting.popleft()
            resident, taken = pending.resident, pending.size
            self._pending_bytes -= taken
            if resident is not None:
                residents[id(resident)] = resident
            if resident is not None and pending.change.incarnation in self._held:
                self._residents.hold(resident, pending.change, taken)
            else:
                size += taken
        self._oldest_at = self._taken_at
        self._log.advance_stored(sequence)
        self._residents.stored(sequence, residents.values(), size)
        if batch.deleted or batch.cleared or any(session.floor for session in batch.created):
            self._purge_at = anyio.current_time()

    def _may_quarantine(self) -> bool:
        """Whether one more rejected change is a poison message, not a sign of a broken schema."""
        now = anyio.current_time()
        rejections = self._rejections
        while rejections and rejections[0] < now - self._options.quarantine_window_s:
            rejections.popleft()
        if len(rejections) >= self._options.quarantine_max:
            return False
        rejections.append(now)
        return True

    def _hold_rejected(self, pending: Pending, error: Exception) -> None:
        change = pending.change
        self._held.add(change.incarnation)
        self.figures.quarantined += 1
        logger.error(
            "change %d of session %r goes to quarantine, the session is held: %s",
            change.sequence,
            change.session_id,
            error,
        )
        self._observers.change_quarantined(change, error)

    async def _failed(self, batch: Batch, error: Exception, attempt: int) -> None:
        figures = self.figures
        figures.failures += 1
        figures.last_error = (
            f"{type(error).__name__}: {error}" if isinstance(error, StorageError) else type(error).__name__
        )
        slow = isinstance(error, (StorageFatal, ChangeRejected))
        if figures.failing_since_s is None:
            figures.failing_since_s = anyio.current_time()
            logger.warning(
                "the storage did not take a batch of %d change(s), trying again: %s", batch.changes, figures.last_error
            )
        self._observers.flush_failed(batch, error, attempt)
        ceiling = _BACKOFF_MAX_S if slow else min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2 ** min(attempt - 1, 16))
        with self._breakable():
            await anyio.sleep(ceiling * (0.5 + self._random() / 2))
        figures.retries += 1

    async def _purge(self) -> None:
        """Delete one chunk of rows that nobody can see."""
        self._purge_at = anyio.current_time() + _PURGE_INTERVAL_S
        awaited = [*self._purge_awaited]
        try:
            rows = 0
            with self._breakable():
                rows = await self._storage.purge(self._fence, now=self._now(), rows_max=_PURGE_ROWS)
                if awaited and not rows and self._storage.abilities.scrubs:
                    await cast("Scrubs", self._storage).scrub()
        except LeaseLost:
            raise
        except Exception as error:  # noqa: BLE001 — purging can wait
            logger.warning("could not purge, trying again later: %s", type(error).__name__)
            self._purge_at = anyio.current_time() + _BACKOFF_MAX_S
            return
        if rows:
            self._purge_at = anyio.current_time()
            return
        for waiting in awaited:
            waiting.set()
            self._purge_awaited.remove(waiting)


def _above(sequence: int, changes: Sequence[Pending]) -> Sequence[Pending]:
    """Those of consecutive changes that come after `sequence`."""
    if changes and changes[0].change.sequence > sequence:
        return changes
    return [pending for pending in changes if pending.change.sequence > sequence]
