"""What an operator reads of batches: a line for the first after a pause, then one a minute for all there were.

So the line comes as soon as something is stored, and however many batches there are, the log has no more than one a
minute; at DEBUG each batch has its own. Nothing is left untold: the last line comes when the runtime closes.
"""

from __future__ import annotations

import logging
from typing import Final

import anyio

from .changes import Batch, Change, Receipt
from .scheduler import Observers

__all__ = ["FlushLog"]

logger: Final = logging.getLogger("agent_runtime")
_INTERVAL_S: Final = 60.0


class FlushLog:
    """An observer of batches, who hands on to the others what it is told."""

    def __init__(self, others: Observers) -> None:
        self._others = others
        self._batches = self._changes = self._sessions = 0
        self._duration_s = 0.0
        self._stored = anyio.Event()

    def batch_stored(self, receipt: Receipt) -> None:
        """Count it."""
        self._batches += 1
        self._changes += receipt.changes
        self._sessions += receipt.sessions
        self._duration_s += receipt.duration_s
        self._stored.set()
        self._others.batch_stored(receipt)

    def flush_failed(self, batch: Batch, error: Exception, attempt: int) -> None:
        """Hand it on; who failed tells it."""
        self._others.flush_failed(batch, error, attempt)

    def change_quarantined(self, change: Change, error: Exception) -> None:
        """Hand it on; who put it there tells it."""
        self._others.change_quarantined(change, error)

    async def run(self) -> None:
        """Tell, until cancelled."""
        while True:
            await self._stored.wait()
            self.tell()
            await anyio.sleep(_INTERVAL_S)

    def tell(self) -> None:
        """Tell what was stored since the last time, if anything was. A session counts in each batch that it is in."""
        if not self._batches:
            return
        logger.info(
            "flushed %d change(s) of %d session(s) in %.0f ms%s",
            self._changes,
            self._sessions,
            self._duration_s * 1000,
            "" if self._batches == 1 else f", in {self._batches} batches",
        )
        self._batches = self._changes = self._sessions = 0
        self._duration_s = 0.0
        self._stored = anyio.Event()
