"""The log of changes: one sequence, its watermarks, and those who wait for a watermark.

Guarantees: watermarks only grow; a waiter returns when the level it asked for is reached, raises `Quarantined` when one
of the changes it waits for went to quarantine instead, and never keeps the scheduler waiting.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable

import anyio

from .errors import AgentRuntimeError, Quarantined, again
from .records import Watermarks

__all__ = ["Log"]


class _Waiter:
    __slots__ = ("error", "event", "number", "sequence")

    def __init__(self, sequence: int, number: int) -> None:
        self.sequence = sequence
        self.number = number
        self.event = anyio.Event()
        self.error: AgentRuntimeError | None = None

    def __lt__(self, other: _Waiter) -> bool:
        return (self.sequence, self.number) < (other.sequence, other.number)


class Log:
    """Counts changes. `accepted` is the sequence of the last one acknowledged, `stored` of the last one stored."""

    def __init__(self, sequence: int) -> None:
        self.accepted = sequence
        self.stored = sequence
        self.on_demand: Callable[[], None] = _nobody
        self._waiters: list[_Waiter] = []
        self._quarantined: list[int] = []
        self._numbers = 0
        self._stopped: AgentRuntimeError | None = None

    @property
    def watermarks(self) -> Watermarks:
        """How far the log has come."""
        return Watermarks(accepted=self.accepted, journaled=None, synced=None, stored=self.stored)

    @property
    def awaited(self) -> bool:
        """Whether anyone waits for a change to be stored."""
        return bool(self._waiters)

    def advance(self, stored: int) -> None:
        """Everything up to `stored` is in the database; wake who waited for that."""
        if not self.stored <= stored <= self.accepted:
            raise ValueError(
                f"the stored watermark can't move from {self.stored} to {stored} (accepted {self.accepted})"
            )
        self.stored = stored
        while self._waiters and self._waiters[0].sequence <= stored:
            heapq.heappop(self._waiters).event.set()

    def quarantine(self, sequence: int) -> None:
        """The change went to quarantine: whoever waits for it is told so. To be called before `advance`."""
        insort(self._quarantined, sequence)

    def discharge(self, sequence: int) -> None:
        """The change has left quarantine."""
        index = bisect_left(self._quarantined, sequence)
        if index < len(self._quarantined) and self._quarantined[index] == sequence:
            del self._quarantined[index]

    def stop(self, error: AgentRuntimeError) -> None:
        """Nothing will be stored any more: whoever waits, now or later, gets `error`."""
        self._stopped = error
        for waiter in self._waiters:
            waiter.error = error
            waiter.event.set()
        self._waiters.clear()

    async def wait_stored(self, sequence: int, *, first: int | None = None) -> None:
        """Wait until the change `sequence` is stored; with `first`, all changes from that one on.

        Raises:
            Quarantined: one of the changes went to quarantine.
            LeaseLost, RuntimeClosed: nothing will be stored any more.
        """
        if sequence > self.stored:
            if self._stopped is not None:
                raise again(self._stopped)
            self._numbers += 1
            waiter = _Waiter(sequence, self._numbers)
            heapq.heappush(self._waiters, waiter)
            self.on_demand()
            try:
                await waiter.event.wait()
            finally:
                if not waiter.event.is_set():
                    self._waiters.remove(waiter)
                    heapq.heapify(self._waiters)
            if waiter.error is not None:
                raise again(waiter.error)
        low = bisect_left(self._quarantined, sequence if first is None else first)
        high = bisect_right(self._quarantined, sequence)
        if low < high:
            raise Quarantined(self._quarantined[low:high])


def _nobody() -> None:
    """Nobody listens for demand yet."""
