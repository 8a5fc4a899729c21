"""What a storage has in quarantine, as it is read: row by row, and what callers see of a row."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Final, Literal

import msgspec

from .rows import QuarantineRow
from .storage import Snapshot

__all__ = ["QuarantinedChange", "quarantine_rows"]

_PAGE: Final = 100  # changes may be large


class QuarantinedChange(msgspec.Struct, frozen=True, kw_only=True):
    """A change in quarantine: the one that was `rejected`, or one `queued` behind it. `bytes` is its encoded size."""

    sequence: int
    session_id: str
    state: Literal["rejected", "queued"]
    error: str
    bytes: int
    quarantined_at: datetime

    @classmethod
    def of(cls, row: QuarantineRow) -> QuarantinedChange:
        """What callers see of a row."""
        return cls(
            sequence=row.sequence,
            session_id=row.session_id,
            state=row.state,
            error=row.error,
            bytes=len(row.change),
            quarantined_at=row.quarantined_at,
        )


async def quarantine_rows(snapshot: Snapshot) -> AsyncGenerator[QuarantineRow, None]:
    """All that is in quarantine, in order of sequence, a page in memory at a time. To be closed by who may not come to
    its end (`contextlib.aclosing`)."""
    after = 0
    while rows := await snapshot.quarantine(after=after, limit=_PAGE):
        for row in rows:
            yield row
        after = rows[-1].sequence
