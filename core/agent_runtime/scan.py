"""Every row that a snapshot shows, in one order, cut into batches and summed up.

Guarantees: the same rows are the same batches and the same sums, whatever storage they are read from. Memory is bounded
by a page and a batch, however long a session is.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any, Final, TypeAlias

import msgspec

from .errors import StorageFatal
from .quarantined import quarantine_rows
from .rows import SessionRow
from .storage import SessionKey, Snapshot

__all__ = ["Rows", "Scan", "TableSum"]

Rows: TypeAlias = Mapping[str, Sequence[Any]]
"""Rows by their table."""

_TABLES: Final = ("sessions", "contexts", "switches", "documents", "messages", "quarantine", "outcomes")
_BATCH_ROWS: Final = 5000
_BATCH_BYTES: Final = 8 * 1024 * 1024
_PAGE: Final = 1000
_PAGE_OF_LARGE: Final = 100  # documents

_encode_lines: Final = msgspec.json.Encoder().encode_lines


class TableSum(msgspec.Struct, frozen=True):
    """How many rows a table has, and the SHA-256 of them in order: each as JSON, on a line."""

    rows: int
    sha256: str


class Scan:
    """Reads all rows of a snapshot. `take` is given them, batch by batch; `progress` the sessions and messages so far.

    The oldest session comes first, with all that belongs to it, then what is in quarantine, and in batches of their own
    the outcomes that have not expired by `now`. A session that has room in a batch, by its number of messages, is not
    begun in the one before.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        now: datetime,
        take: Callable[[Rows], Awaitable[None]],
        progress: Callable[[int, int], None],
    ) -> None:
        self._snapshot = snapshot
        self._now = now
        self._take = take
        self._progress = progress
        self._counts = dict.fromkeys(_TABLES, 0)
        self._sums = {table: hashlib.sha256() for table in _TABLES}
        self._batch: defaultdict[str, list[Any]] = defaultdict(list)
        self._batch_rows = 0
        self._batch_bytes = 0

    async def run(self) -> dict[str, TableSum]:
        """Read everything. Returns the sum of each table."""
        after: SessionKey | None = None
        while sessions := await self._snapshot.sessions(after=after, limit=_PAGE):
            for session in sessions:
                if self._batch_rows + session.message_count > _BATCH_ROWS:
                    await self._flush()
                await self._session(session)
            after = SessionKey(sessions[-1].created_at, sessions[-1].incarnation)
        async with aclosing(quarantine_rows(self._snapshot)) as rows:
            async for row in rows:
                await self._add(quarantine=[row])
        await self._flush()
        await self._outcomes()
        return {table: TableSum(self._counts[table], self._sums[table].hexdigest()) for table in _TABLES}

    async def _session(self, session: SessionRow) -> None:
        incarnation = session.incarnation
        head = await self._snapshot.head(session.session_id, outcomes_max=0)
        if head is None or head.session != session:
            raise StorageFatal(f"the session {session.session_id!r} is in the list, but not so under its id")
        switches = await self._snapshot.switches(incarnation)
        await self._add(sessions=[session], contexts=[head.context], switches=switches)
        for collection in await self._snapshot.collections(incarnation):
            await self._documents(incarnation, collection)
        await self._messages(incarnation, session.floor)

    async def _documents(self, incarnation: str, collection: str) -> None:
        after = ""
        while True:
            rows = await self._snapshot.documents(incarnation, collection, after=after, limit=_PAGE_OF_LARGE)
            await self._add(documents=rows)
            if len(rows) < _PAGE_OF_LARGE:
                return
            after = rows[-1].key

    async def _messages(self, incarnation: str, after: int) -> None:
        while True:
            rows = await self._snapshot.messages(incarnation, after=after, limit=_PAGE)
            await self._add(messages=rows)
            if len(rows) < _PAGE:
                return
            after = rows[-1].seq

    async def _outcomes(self) -> None:
        after: tuple[str, str] | None = None
        while page := await self._snapshot.outcomes(after=after, limit=_PAGE):
            await self._add(outcomes=[row for row in page if row.expires_at > self._now])
            await self._flush()
            after = page[-1].scope, page[-1].key

    async def _add(self, **rows: Sequence[Any]) -> None:
        for table, of_table in rows.items():
            if of_table:
                lines = _encode_lines(of_table)
                self._sums[table].update(lines)
                self._counts[table] += len(of_table)
                self._batch[table].extend(of_table)
                self._batch_rows += len(of_table)
                self._batch_bytes += len(lines)
        self._progress(self._counts["sessions"], self._counts["messages"])
        if self._batch_rows >= _BATCH_ROWS or self._batch_bytes >= _BATCH_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        batch, self._batch = self._batch, defaultdict(list)
        self._batch_rows = self._batch_bytes = 0
        if batch:
            await self._take(batch)
