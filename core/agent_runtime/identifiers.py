"""Identifiers and the time: what a record is named and when it was made.

Owns the making of UUIDv7 strings (RFC 9562, section 5.7). One object of `Identifiers` never gives the same string twice
and each string sorts after the one before, whatever the clock does.

The ids name records; they open nothing. Who may read a session is decided by who asks, never by who can guess an id, so
the bits need to be unlike those of other processes, not unpredictable: a `random.Random` seeded once from the operating
system (`Random(SystemRandom().getrandbits(256)).getrandbits`) is enough, and costs no system call per id.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

__all__ = ["Identifiers", "utc_now"]

_COUNTER_BITS: Final = 42
_LOW_BITS: Final = 16  # of the counter, in the last group of digits
_LOW_MAX: Final = (1 << _LOW_BITS) - 1
_HIGH_MAX: Final = (1 << (_COUNTER_BITS - _LOW_BITS)) - 1
_TAIL_BITS: Final = 32


class Identifiers:
    """Makes UUIDv7 strings that only grow.

    The 74 bits behind the time are a counter of 42 (RFC 9562, section 6.2, method 1), begun in each millisecond at a
    random value below its half, and 32 random bits. While the clock stands still or runs backwards the counter goes on
    in the latest millisecond seen; a counter that is used up moves on to the next millisecond, ahead of the clock.

    `now_ms` gives milliseconds since 1970, `getrandbits(n)` an integer of n random bits. Not for use by two threads at
    once, nor on both sides of a fork.
    """

    __slots__ = ("_getrandbits", "_high", "_low", "_ms", "_now_ms", "_prefix")

    def __init__(self, now_ms: Callable[[], int], getrandbits: Callable[[int], int]) -> None:
        self._now_ms = now_ms
        self._getrandbits = getrandbits
        self._start(max(0, now_ms()))

    def _start(self, ms: int) -> None:
        self._ms = ms
        self._count(self._getrandbits(_COUNTER_BITS - 1))

    def _count(self, counter: int) -> None:
        """Go on with this count: all of the identifier but its last group is made here, once for up to 65,536."""
        ms = self._ms
        self._high, self._low = counter >> _LOW_BITS, counter & _LOW_MAX
        variant = 0x8000 | self._high & 0x3FFF
        self._prefix = f"{ms >> 16:08x}-{ms & 0xFFFF:04x}-7{self._high >> 14:03x}-{variant:04x}-"

    def new(self) -> str:
        """The next identifier: 36 characters, lower case."""
        now_ms = self._now_ms()
        if now_ms > self._ms:
            self._start(now_ms)
        elif self._low < _LOW_MAX:
            self._low += 1
        elif self._high < _HIGH_MAX:
            self._count((self._high + 1) << _LOW_BITS)
        else:
            self._start(self._ms + 1)
        return self._prefix + "%012x" % (self._low << _TAIL_BITS | self._getrandbits(_TAIL_BITS))


def utc_now() -> datetime:
    """The time: aware, in UTC."""
    return datetime.now(UTC)
