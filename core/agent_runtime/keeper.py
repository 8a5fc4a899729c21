"""The journal's task: syncs what was written, and cuts what the database has.

Everyone who waits for `synced` at one moment shares one sync, and those who come while it runs share the next one. When
nobody waits the journal is synced every `sync_interval_s`. A sync that fails leaves the watermark where it is; those
who wait go on waiting, until a later one, or the database, has their change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from .errors import JournalError, RuntimeClosed
from .journal import Journal
from .log import Log

__all__ = ["JournalKeeper"]

logger: Final = logging.getLogger("agent_runtime.journal")

_PAUSE_S: Final = 0.2
"""Before a sync is tried again that failed while somebody waits."""


class JournalKeeper:
    """Keeps one journal. `unstored` gives every unstored change, encoded; `cuts`: what is stored need not be kept."""

    def __init__(
        self,
        journal: Journal,
        log: Log,
        *,
        sync_interval_s: float,
        unstored: Callable[[], Iterable[tuple[int, bytes]]],
        cuts: bool,
    ) -> None:
        self.journal: Final = journal
        self._log = log
        self._sync_interval_s = sync_interval_s
        self._unstored = unstored
        self._cuts = cuts
        self._wake = anyio.Event()
        self._failing = False
        self._erasing: list[tuple[int, anyio.Event]] = []
        self._closed = False
        log.on_demand(sync=self._wake_up)

    def _wake_up(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if not self._log.sync_awaited:
                self._wake = anyio.Event()
                with anyio.move_on_after(self._sync_interval_s):
                    await self._wake.wait()
            elif self._failing:
                await anyio.sleep(_PAUSE_S)
            await checkpoint()  # let everyone who is about to wait at this moment share the sync
            await self._sync()
            await self._cut()
            await self._erase()

    async def erase(self, upto: int) -> None:
        """Wait until no file of the journal has a change up to `upto`, however long it is to retain them.

        What is in the same files and not stored yet is stored first. Where what is stored survives nothing, the journal
        keeps everything, and this does nothing.
        """
        if not self._cuts:
            return
        done = anyio.Event()
        self._erasing.append((upto, done))
        while not done.is_set():
            if self._closed:
                raise RuntimeClosed
            self._wake.set()
            await self._log.wait_stored(self._log.accepted, first=self._log.accepted + 1)
            with anyio.move_on_after(_PAUSE_S):
                await done.wait()

    async def _erase(self) -> None:
        for upto, done in [*self._erasing]:
            if await self.journal.erase(self._log.stored, upto):
                done.set()
                self._erasing.remove((upto, done))

    async def close(self) -> None:
        """The last: sync what is not stored, cut what is. The directory is for the next runtime then."""
        if self._cuts and self._log.stored == self._log.accepted:
            await self.journal.finish(self._log.stored)
        else:
            await self._sync()
            await self._cut()
        self._closed = True
        self.journal.close()

    async def _sync(self) -> None:
        if self.journal.synced >= self.journal.end:  # also what is stored is synced: only then older segments may go
            return
        try:
            synced = await self.journal.sync(self._unstored)
        except JournalError as error:
            if not self._failing:
                logger.error("the journal could not be synced, trying again: %s", error)
            self._failing = True
        else:
            if self._failing:
                logger.warning("the journal can be synced again")
            self._failing = False
            self._log.advance_synced(synced)

    async def _cut(self) -> None:
        if self._cuts:
            await self.journal.cut(self._log.stored)
