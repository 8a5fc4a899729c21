"""Retention: deletes sessions in which nothing has happened for long, a page of them at a time, while all else goes on.

Guarantees:
- A deletion is a change like any other: journaled, stored exactly once, seen by every read at once. Whether the session
  is idle is decided by its state in memory in the step that deletes it, so newer activity, stored or not, keeps it; so
  does quarantine.
- The sweep reads the list of sessions only: no history, and of those it deletes their heads. It holds one page in
  memory, waits until its deletions are stored before it reads the next, rests as long as it has worked, and takes no
  other session's place in memory.
- It ends when the runtime closes, between two changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

import anyio
import msgspec

from .door import Door, Plan
from .errors import AgentRuntimeError, LeaseLost, RuntimeClosed
from .plans import Planner
from .residents import Resident
from .rows import SessionRow
from .storage import SessionKey

__all__ = ["Retention", "Swept"]

logger: Final = logging.getLogger("agent_runtime")

_PAGE: Final = 200
_SOON_S: Final = 60.0
"""After the start and after an error. A runtime that is restarted often sweeps too, one that opens for a moment not."""


class Swept(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep did: how many sessions it looked at, how many of them it deleted."""

    sessions: int
    deleted: int


class Retention:
    """Sweeps of one runtime."""

    def __init__(self, *, door: Door, planner: Planner) -> None:
        self._door = door
        self._planner = planner

    async def run(self, max_idle: timedelta, interval_s: float) -> None:
        """Sweep every `interval_s`, until cancelled or the runtime closes."""
        pause_s = min(interval_s, _SOON_S)
        while True:
            await anyio.sleep(pause_s)
            try:
                await self.sweep(max_idle)
            except (LeaseLost, RuntimeClosed):
                return
            except AgentRuntimeError as error:
                logger.warning("the search for idle sessions broke off, it begins again soon: %s", error)
                pause_s = min(interval_s, _SOON_S)
            else:
                pause_s = interval_s

    async def sweep(self, max_idle: timedelta) -> Swept:
        """Delete every session that has been idle for longer than `max_idle`. Returns once that is stored.

        Raises:
            AgentRuntimeError: it could not go on; what it has deleted stays deleted.
        """
        before = self._door.now() - max_idle
        started_at = anyio.current_time()
        sessions = deleted = 0
        after: SessionKey | None = None
        while True:
            page_at = anyio.current_time()
            async with self._door.view(None) as snapshot:
                rows = await snapshot.sessions(after=after, limit=_PAGE)
            deleted += await self._delete([row for row in rows if row.last_activity < before], before)
            sessions += len(rows)
            if len(rows) < _PAGE:
                break
            after = SessionKey(rows[-1].created_at, rows[-1].incarnation)
            await anyio.sleep(anyio.current_time() - page_at)
        logger.info("deleted %d idle session(s) of %d in %.1f s", deleted, sessions, anyio.current_time() - started_at)
        return Swept(sessions=sessions, deleted=deleted)

    async def _delete(self, rows: list[SessionRow], before: datetime) -> int:
        deleted = 0
        for row in rows:
            deleted += await self._door.write(
                row.session_id,
                row.incarnation,
                self._deletion(row.incarnation, before),
                durability="buffered",
                cold=True,
            )
        if deleted:
            await self._door.log.wait_stored(self._door.log.accepted, first=self._door.log.accepted + 1)
        return deleted

    def _deletion(self, incarnation: str, before: datetime) -> Callable[[Resident | None], Plan[bool]]:
        return lambda current: self._planner.delete_idle(current, incarnation, before)
