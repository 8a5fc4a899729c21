"""Reading: a snapshot is a transaction on a connection that only reads.

In the write-ahead log a transaction's view is fixed by its first statement. Here that is the one that reads the
sequence, so the watermark is exactly that of the view.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final, TypeVar, TypeVarTuple

import aiosqlite
import anyio
import msgspec
from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_runtime.bridge import on_cancel
from agent_runtime.errors import StorageFatal, StorageUnavailable
from agent_runtime.process import this_process
from agent_runtime.records import Order
from agent_runtime.rows import (
    ContextRow,
    DocumentRow,
    MessageRow,
    OutcomeRow,
    QuarantineRow,
    SessionRow,
    SwitchRow,
)
from agent_runtime.storage import HeadRows, JournalRow, LeaseRow, SessionKey
from agent_runtime_sql.reads import (
    SELECT_COLLECTIONS,
    SELECT_DOCUMENT,
    SELECT_DOCUMENTS,
    SELECT_HEAD,
    SELECT_JOURNAL,
    SELECT_NEWEST_OUTCOMES,
    SELECT_OUTCOME,
    SELECT_QUARANTINE,
    SELECT_SEQUENCE,
    SELECT_SWITCHES,
    select_messages,
    select_sessions,
)
from agent_runtime_sql.rows import struct_of
from agent_runtime_sql.writes import SEQ_MAX

from .apply import partition_row
from .database import Database
from .engine import driver_of
from .lease import Clock, remaining_s

__all__ = ["Readers", "SqliteSnapshot"]

Item = TypeVar("Item", bound=msgspec.Struct)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_PIECE_ROWS: Final = 200
_SESSION_COLUMNS: Final = len(SessionRow.__struct_fields__)


class SqliteSnapshot:
    """One view of the database. Each read is one call on the connection's loop.

    A read that is cancelled gives up the connection; the snapshot is of no use after it.
    """

    def __init__(
        self,
        database: Database,
        connection: AsyncConnection,
        driver: aiosqlite.Connection,
        clock: Clock,
        partition: int,
        watermark: int,
    ) -> None:
        self._database = database
        self._connection = connection
        self._driver = driver
        self._clock = clock
        self._partition = partition
        self._watermark = watermark
        self._closed = False

    @property
    def watermark(self) -> int:
        return self._watermark

    async def head(self, session_id: str, *, outcomes_max: int) -> HeadRows | None:
        return await self._run(self._head, session_id, outcomes_max)

    async def _head(self, session_id: str, outcomes_max: int) -> HeadRows | None:
        found = await self._connection.execute(SELECT_HEAD, {"partition": self._partition, "session_id": session_id})
        row = found.one_or_none()
        if row is None:
            return None
        session = struct_of(SessionRow, row[:_SESSION_COLUMNS])
        if row[_SESSION_COLUMNS] is None:
            raise StorageFatal(f"{self._database.name} is damaged: the session {session_id!r} has no context")
        outcomes = await self._rows(
            OutcomeRow,
            SELECT_NEWEST_OUTCOMES,
            {"scope": session.incarnation, "now": datetime.now(UTC), "limit": outcomes_max},
        )
        return HeadRows(session=session, context=struct_of(ContextRow, row[_SESSION_COLUMNS:]), outcomes=outcomes)

    async def messages(
        self, incarnation: str, *, after: int = 0, before: int | None = None, limit: int, order: Order = "asc"
    ) -> Sequence[MessageRow]:
        parameters = {
            "incarnation": incarnation,
            "after": after,
            "before": SEQ_MAX if before is None else before,
            "limit": limit,
        }
        return await self._run(self._rows, MessageRow, select_messages(order), parameters)

    async def switches(self, incarnation: str) -> Sequence[SwitchRow]:
        return await self._run(self._rows, SwitchRow, SELECT_SWITCHES, {"incarnation": incarnation})

    async def document(self, incarnation: str, collection: str, key: str) -> DocumentRow | None:
        parameters = {"incarnation": incarnation, "collection": collection, "key": key}
        return _single(await self._run(self._rows, DocumentRow, SELECT_DOCUMENT, parameters))

    async def documents(
        self, incarnation: str, collection: str, *, after: str = "", limit: int
    ) -> Sequence[DocumentRow]:
        parameters = {"incarnation": incarnation, "collection": collection, "after": after, "limit": limit}
        return await self._run(self._rows, DocumentRow, SELECT_DOCUMENTS, parameters)

    async def collections(self, incarnation: str) -> Sequence[str]:
        return await self._run(self._collections, incarnation)

    async def _collections(self, incarnation: str) -> Sequence[str]:
        found = await self._connection.execute(
            SELECT_COLLECTIONS, {"partition": self._partition, "incarnation": incarnation}
        )
        return found.scalars().all()

    async def sessions(
        self, *, user_id: str | None = None, after: SessionKey | None = None, limit: int, order: Order = "asc"
    ) -> Sequence[SessionRow]:
        statement = select_sessions(order, of_user=user_id is not None, behind=after is not None)
        parameters = {"user_id": user_id, "limit": limit, **(msgspec.structs.asdict(after) if after else {})}
        return await self._run(self._rows, SessionRow, statement, parameters)

    async def outcome(self, scope: str, key: str) -> OutcomeRow | None:
        return _single(await self._run(self._rows, OutcomeRow, SELECT_OUTCOME, {"scope": scope, "key": key}))

    async def quarantine(self, *, after: int = 0, limit: int) -> Sequence[QuarantineRow]:
        return await self._run(self._rows, QuarantineRow, SELECT_QUARANTINE, {"after": after, "limit": limit})

    async def journal(self, journal_id: str) -> JournalRow | None:
        return _single(await self._run(self._rows, JournalRow, SELECT_JOURNAL, {"journal_id": journal_id}))

    async def lease(self) -> LeaseRow | None:
        row = await self._run(partition_row, self._connection, self._partition)
        if row is None:
            return None
        row = {**row, "expires_in_s": remaining_s(row, this_process().boot_id, self._clock())}
        return struct_of(LeaseRow, [row[name] for name in LeaseRow.__struct_fields__])

    async def _rows(self, kind: type[Item], statement: Select[Any], parameters: Mapping[str, Any]) -> list[Item]:
        found = await self._connection.execute(statement, {"partition": self._partition, **parameters})
        rows: list[Item] = []
        for piece in found.partitions(_PIECE_ROWS):
            rows.extend(struct_of(kind, row) for row in piece)
            await asyncio.sleep(0)
        return rows

    async def _run(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        if self._closed:
            raise StorageUnavailable(f"a snapshot of {self._database.name} is used after it was closed")
        return await self._database.run(self._interruptible, function, args)

    async def _interruptible(self, function: Callable[[*Ts], Awaitable[T]], args: tuple[*Ts]) -> T:
        with on_cancel(self._driver.interrupt):
            return await function(*args)

    async def close(self) -> None:
        """Give the connection back."""
        self._closed = True
        await self._database.run(self._connection.close)


def _single(rows: Sequence[Item]) -> Item | None:
    return rows[0] if rows else None


class Readers:
    """Lends the connections that read, one a snapshot."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._free = anyio.Semaphore(database.readers_max, fast_acquire=True)

    @asynccontextmanager
    async def snapshot(self, partition: int) -> AsyncIterator[SqliteSnapshot]:
        """Wait for a free connection, and fix a view. Only the wait can be cancelled; the rest takes no time."""
        async with self._free:
            with anyio.CancelScope(shield=True):
                snapshot = await self._database.run(self._open, partition)
            try:
                yield snapshot
            finally:
                with anyio.CancelScope(shield=True):
                    await snapshot.close()

    async def _open(self, partition: int) -> SqliteSnapshot:
        connection = await self._database.reader()
        try:
            driver = await driver_of(connection)
            sequence = await connection.scalar(SELECT_SEQUENCE, {"partition": partition})
        except BaseException:
            await connection.invalidate()
            await connection.close()
            raise
        return SqliteSnapshot(self._database, connection, driver, self._clock, partition, sequence or 0)
