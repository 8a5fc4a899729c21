"""Token buckets, one a client, in a bounded room.

A bucket is one number: the time at which it will be full again, which is the theoretical arrival time of the generic
cell rate algorithm (ITU-T I.371). A bucket that is full says nothing, so it is forgotten; past the bound the one that
was used least recently goes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

__all__ = ["Buckets"]


class Buckets:
    """`rate` requests a second of each client, and `burst` at once; of `clients_max` clients. `now` is in seconds."""

    def __init__(self, *, rate: float, burst: int, clients_max: int, now: Callable[[], float]) -> None:
        self._interval_s = 1 / rate
        self._depth_s = burst / rate
        self._clients_max = clients_max
        self._now = now
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        """How many clients are known."""
        return len(self._full_at)

    def take(self, client: str) -> float:
        """Take one from a client's bucket: 0.0; or, where there is none, nothing: the seconds until there will be."""
        now = self._now()
        full_at = max(self._full_at.get(client, now), now) + self._interval_s
        missing_s = full_at - now - self._depth_s
        if missing_s > 1e-9:
            return missing_s
        self._full_at[client] = full_at
        self._full_at.move_to_end(client)
        self._forget(now)
        return 0.0

    def _forget(self, now: float) -> None:
        """Let go of buckets that are full, two at a time and least recently used first, and of what is too many."""
        for _ in range(2):
            client, full_at = next(iter(self._full_at.items()))
            if full_at > now and len(self._full_at) <= self._clients_max:
                return
            del self._full_at[client]
