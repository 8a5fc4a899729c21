"""The log of changes: one sequence, its watermarks, and those who wait for a watermark.

Guarantees: with a journal, a change is written there before it counts as accepted; a sequence is given to one change
only, also when writing it failed and could not be undone; watermarks only grow; a waiter returns when the level it
asked for is reached, raises `Quarantined` when a change that it wants stored went to quarantine instead, and never
keeps anyone else waiting.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import anyio

from .errors import AgentRuntimeError, JournalError, Quarantined, again
from .records import Durability, Watermarks

__all__ = ["Log", "Writes"]

_TICK: Final = 0.005
"""The part of its time after which it is looked whether a wait takes too long; it may take two such parts longer."""
_TICK_S: Final = 0.01  # and no less than this


class Writes(Protocol):
    """What the log needs of a journal."""

    @property
    def end(self) -> int:
        """The highest sequence that may be on the disk, acknowledged or not."""

    def append(self, frames: Sequence[tuple[int, bytes]]) -> None:
        """Write encoded changes under their sequences: all of them or, raising JournalError, none."""

    def append_one(self, sequence: int, payload: bytes) -> None:
        """Write one encoded change, or raise JournalError."""


class _Watermark:
    """How far the log has come in one respect, and who waits for it to come further.

    All who wait share one event, and each looks for itself whether it has what it wants: an event and a cancel scope
    for each would cost more than its append. Their time is counted in ticks, for one look at the clock costs 1 µs.
    """

    def __init__(self, sequence: int, first: Callable[[], None]) -> None:
        self.sequence = sequence
        self._first = first  # called when somebody waits where nobody did
        self.on_demand: Callable[[], None] = _nobody
        self.waiting = 0
        self._news = anyio.Event()
        self._tick = 0
        self._due = math.inf  # no later than the earliest tick at which one of them has waited too long
        self._stopped: AgentRuntimeError | None = None

    def advance(self, sequence: int) -> None:
        self.sequence = sequence
        self._tell()

    def stop(self, error: AgentRuntimeError) -> None:
        self._stopped = error
        self._tell()

    def tick(self) -> None:
        """Wake those who wait if the time of one of them is up."""
        self._tick += 1
        if self._due <= self._tick:
            self._tell()

    def _tell(self) -> None:
        if self.waiting:
            self.waiting = 0
            self._due = math.inf
            self._news.set()
            self._news = anyio.Event()

    async def wait(self, sequence: int, ticks: float = math.inf) -> None:
        due = self._tick + ticks
        while sequence > self.sequence:
            if self._stopped is not None:
                raise again(self._stopped)
            if due <= self._tick:
                raise TimeoutError
            news = self._news
            if not self.waiting:
                self._first()
            self.waiting += 1
            self._due = min(self._due, due)
            self.on_demand()
            try:
                await news.wait()
            finally:
                if news is self._news:  # cancelled
                    self.waiting -= 1


class Log:
    """Counts changes: `accepted` is the sequence of the last one acknowledged, `next` that of the next one.

    It begins after `sequence`, up to which everything is stored; with a journal, behind all that this may hold.
    `power_safe`: what is stored survives a power loss. Else `synced` means nothing, for the stored changes are in the
    journal only, perhaps since before the last crash, and memory has them no more to be written there again.
    `timeout_s` is how long `wait` waits, while `expire` runs.
    """

    def __init__(
        self, sequence: int, journal: Writes | None = None, *, power_safe: bool = True, timeout_s: float = math.inf
    ) -> None:
        self._power_safe = power_safe
        self.accepted = sequence
        self.next = sequence + 1 if journal is None else max(sequence, journal.end) + 1
        self._journal = journal
        self._awaited = anyio.Event()
        self._stored = _Watermark(sequence, self._begin_to_expire)
        self._synced = _Watermark(sequence, self._begin_to_expire)
        self.timeout_s = timeout_s
        self._tick_s = max(_TICK_S, _TICK * timeout_s)
        self._ticks = math.inf if math.isinf(timeout_s) else math.ceil(timeout_s / self._tick_s) + 1
        self._quarantined: list[int] = []

    @property
    def watermarks(self) -> Watermarks:
        """How far the log has come."""
        journaled = None if self._journal is None else self.accepted
        synced = None if self._journal is None or not self._power_safe else self.synced
        return Watermarks(accepted=self.accepted, journaled=journaled, synced=synced, stored=self.stored)

    @property
    def stored(self) -> int:
        """Everything up to this sequence is in the database."""
        return self._stored.sequence

    @property
    def synced(self) -> int:
        """Everything up to this sequence survives a power loss: in the journal, or in the database."""
        return self._synced.sequence

    @property
    def store_awaited(self) -> bool:
        """Whether anyone waits for a change to be stored."""
        return self._stored.waiting > 0

    @property
    def sync_awaited(self) -> bool:
        """Whether anyone waits for a change to be synced."""
        return self._synced.waiting > 0

    def on_demand(self, *, store: Callable[[], None] | None = None, sync: Callable[[], None] | None = None) -> None:
        """Whom to call when somebody begins to wait."""
        if store is not None:
            self._stored.on_demand = store
        if sync is not None:
            self._synced.on_demand = sync

    def accept(self, sequence: int, data: bytes) -> None:
        """The change with this sequence, and this encoded form, is acknowledged from here on.

        Raises:
            JournalError: it could not be written to the journal; nothing has happened, but `next` may be another one.
        """
        if sequence != self.next:
            raise ValueError(f"change {sequence} was planned, but {self.next} is the next of the log")
        if self._journal is not None:
            try:
                self._journal.append_one(sequence, data)
            except JournalError:
                self.next = max(self.next, self._journal.end + 1)
                raise
        self.accepted = sequence
        self.next = sequence + 1

    def accept_all(self, frames: Sequence[tuple[int, bytes]]) -> None:
        """As `accept`, for consecutive changes: all of them or none."""
        if frames[0][0] != self.next:
            raise ValueError(f"change {frames[0][0]} was planned, but {self.next} is the next of the log")
        if self._journal is not None:
            try:
                self._journal.append(frames)
            except JournalError:
                self.next = max(self.next, self._journal.end + 1)
                raise
        self.accepted = frames[-1][0]
        self.next = self.accepted + 1

    def advance_stored(self, sequence: int) -> None:
        """Everything up to `sequence` is in the database; wake who waited for that."""
        if not self.stored <= sequence <= self.accepted:
            raise ValueError(
                f"the stored watermark can't move from {self.stored} to {sequence} (accepted {self.accepted})"
            )
        self._stored.advance(sequence)
        if self._power_safe and sequence > self.synced:
            self._synced.advance(sequence)

    def advance_synced(self, sequence: int) -> None:
        """The journal has everything up to `sequence`, power-safe; wake who waited for that."""
        if sequence > self.synced:
            self._synced.advance(min(sequence, self.accepted))

    def quarantine(self, sequence: int) -> None:
        """The change went to quarantine: who waits for it to be stored is told. Called before `advance_stored`."""
        insort(self._quarantined, sequence)

    def discharge(self, sequence: int) -> None:
        """The change has left quarantine."""
        index = bisect_left(self._quarantined, sequence)
        if index < len(self._quarantined) and self._quarantined[index] == sequence:
            del self._quarantined[index]

    def stop(self, error: AgentRuntimeError) -> None:
        """Nothing will be stored any more: whoever waits, now or later, gets `error`."""
        self._stored.stop(error)
        self._synced.stop(error)

    def reached(self, sequence: int) -> Durability:
        """The level that the change has by now."""
        if sequence <= self.stored:
            return "stored"
        if self._journal is None:
            return "buffered"
        return "synced" if self._power_safe and sequence <= self.synced else "journaled"

    async def wait(self, sequence: int, level: Durability) -> None:
        """Wait until the change `sequence` has reached a level.

        Raises:
            TimeoutError: it has not within `timeout_s`.
            Quarantined: it went to quarantine, and so will not be stored.
            LeaseLost, RuntimeClosed: no change will be stored or synced any more.
        """
        if level == "stored":
            await self._stored.wait(sequence, self._ticks)
            self._check_quarantined(sequence, sequence)
        elif level == "synced":
            await self._synced.wait(sequence, self._ticks)

    async def wait_stored(self, sequence: int, *, first: int | None = None) -> None:
        """Wait until the change `sequence` is stored; with `first`, all changes from that one on. However long that
        takes; else raises as `wait`.
        """
        await self._stored.wait(sequence)
        self._check_quarantined(sequence if first is None else first, sequence)

    async def expire(self) -> None:
        """Until cancelled, wake who has waited too long. While nobody waits, time stands still."""
        while True:
            if not self._stored.waiting and not self._synced.waiting:
                self._awaited = anyio.Event()
                await self._awaited.wait()
            await anyio.sleep(self._tick_s)
            self._stored.tick()
            self._synced.tick()

    def _begin_to_expire(self) -> None:
        self._awaited.set()

    def _check_quarantined(self, first: int, last: int) -> None:
        low = bisect_left(self._quarantined, first)
        high = bisect_right(self._quarantined, last)
        if low < high:
            raise Quarantined(self._quarantined[low:high])


def _nobody() -> None:
    """Nobody listens for demand yet."""
