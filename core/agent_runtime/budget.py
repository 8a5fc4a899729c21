"""The budget for unstored changes: bytes that may be acknowledged before the database has them.

Changes take their room until they have settled (residents.py): those which are stored, but kept for a read that is
under way, are in memory as much as those which are not; and so are those in quarantine, for as long as they are there.

Guarantees: no more than `bytes_max` are in use (but for what was in quarantine when the runtime was opened, and the few
bytes that a change may take more when it is replayed); room is given in the order it was asked for; who waits too long,
or is cancelled, has taken nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import anyio

from .errors import AgentRuntimeError, Overloaded, again

__all__ = ["CHANGE_BYTES", "Budget"]

CHANGE_BYTES: Final = 400
"""What an unstored change takes besides its encoded form (measured, see tests/benchmarks)."""


class _Ticket:
    __slots__ = ("event", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.event = anyio.Event()


class Budget:
    """Counts bytes. `retry_after_s` is what a refused caller is told; `refusals` counts those who were."""

    def __init__(self, bytes_max: int, *, timeout_s: float, retry_after_s: float) -> None:
        self.bytes_max = bytes_max
        self.used = 0
        self.refusals = 0
        self.on_demand: Callable[[], None] = _nobody
        self._timeout_s = timeout_s
        self._retry_after_s = retry_after_s
        self._queue: deque[_Ticket] = deque()
        self._stopped: AgentRuntimeError | None = None

    @property
    def awaited(self) -> bool:
        """Whether anyone waits for room."""
        return bool(self._queue)

    @property
    def waiting(self) -> int:
        """How many wait for room."""
        return len(self._queue)

    def admit(self, size: int) -> bool:
        """Take `size` bytes if there is room and nobody waits before us."""
        if self._queue or self.used + size > self.bytes_max:
            return False
        self.used += size
        return True

    def adjust(self, difference: int) -> bool:
        """A change that has its room turned out larger or smaller. False: there is no room for the difference."""
        if difference > 0 and self.used + difference > self.bytes_max:
            return False
        self.release(-difference)
        return True

    def charge(self, size: int) -> None:
        """Take `size` bytes, be there room or not: for changes that are in memory already."""
        self.used += size

    def release(self, size: int) -> None:
        """Give `size` bytes back, and let in who waits."""
        self.used -= size
        queue = self._queue
        while queue and self.used + queue[0].size <= self.bytes_max:
            ticket = queue.popleft()
            self.used += ticket.size
            ticket.event.set()

    def stop(self, error: AgentRuntimeError) -> None:
        """Nothing more gets room: whoever waits gets `error`."""
        self._stopped = error
        for ticket in self._queue:
            ticket.event.set()

    async def reserve(self, size: int) -> None:
        """Wait for `size` bytes and take them.

        Raises:
            Overloaded: there was no room in time.
        """
        ticket = _Ticket(size)
        self._queue.append(ticket)
        self.on_demand()
        try:
            with anyio.move_on_after(self._timeout_s):
                await ticket.event.wait()
        except BaseException:
            self._leave(ticket)
            raise
        if self._stopped is not None:
            self._leave(ticket)
            raise again(self._stopped)
        if not ticket.event.is_set():
            self._leave(ticket)
            self.refusals += 1
            raise Overloaded(self._retry_after_s, self.used, self.bytes_max)

    def _leave(self, ticket: _Ticket) -> None:
        if ticket in self._queue:
            self._queue.remove(ticket)
            self.release(0)
        elif ticket.event.is_set():
            self.release(ticket.size)


def _nobody() -> None:
    """Nobody listens for demand yet."""
