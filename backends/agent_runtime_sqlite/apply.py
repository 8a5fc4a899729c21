"""A batch, in one transaction; and its opposite, the purge of what nobody sees any more."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import msgspec
from sqlalchemy import Delete
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_runtime.changes import Batch, Receipt
from agent_runtime.errors import ChangeRejected, LeaseLost, SequenceMismatch, StorageFatal
from agent_runtime.storage import Fence
from agent_runtime_sql.reads import SELECT_PARTITION, SELECT_PURGE
from agent_runtime_sql.rows import NAMED
from agent_runtime_sql.tables import time_text
from agent_runtime_sql.writes import (
    ADVANCE_JOURNAL,
    ADVANCE_PARTITION,
    DELETE_EXPIRED_OUTCOMES,
    DELETE_MESSAGES,
    DELETE_PURGE,
    DELETE_SESSION,
    DELETES_OF_SESSION,
    SEQ_MAX,
    batch_writes,
)

from .errors import rejecting
from .prepared import Prepared

__all__ = ["apply_batch", "lost", "partition_row", "purge"]

_ADVANCE_PARTITION: Final = Prepared(ADVANCE_PARTITION)
_ADVANCE_JOURNAL: Final = Prepared(ADVANCE_JOURNAL)
_WRITES: Final = [
    (field, Prepared(write.statement, NAMED.get(field)), write.exact)
    for field, writes in batch_writes(insert).items()
    for write in writes
]


async def apply_batch(connection: AsyncConnection, batch: Batch, fence: Fence, now: datetime) -> Receipt:
    """Move the sequence, if it and the fence are as expected, and write the rows; `now` is for tombstones."""
    place = {**msgspec.structs.asdict(fence), "after": batch.after, "last": batch.last}
    if await _ADVANCE_PARTITION.run(connection, [place], {}) != 1:
        raise await _why_not(connection, batch, fence)
    if fence.journal_id is not None and await _ADVANCE_JOURNAL.run(connection, [place], {}) != 1:
        raise StorageFatal(f"the database has no row of the journal {fence.journal_id}: it was changed by hand")
    constants = {"partition": fence.partition, "deleted_at": time_text(now)}
    for field, statement, exact in _WRITES:
        items = getattr(batch, field)
        if items:
            with rejecting(field):
                hit = await statement.run(connection, items, constants)
            if exact and hit != len(items):
                raise ChangeRejected(
                    f"{len(items) - hit} of {len(items)} sessions to be {field} are not there: deleted or never created"
                )
    return batch.receipt()


async def _why_not(connection: AsyncConnection, batch: Batch, fence: Fence) -> LeaseLost | SequenceMismatch:
    row = await partition_row(connection, fence.partition)
    if row is None or not _holds(row, fence):
        return lost(row)
    return SequenceMismatch(batch.after, row["sequence"])


async def partition_row(connection: AsyncConnection, partition: int) -> Mapping[str, Any] | None:
    """The row that every writer goes by; None before the first grant."""
    row = (await connection.execute(SELECT_PARTITION, {"partition": partition})).one_or_none()
    return None if row is None else row._asdict()


def _holds(row: Mapping[str, Any], fence: Fence) -> bool:
    return (row["epoch"], row["journal_id"]) == (fence.epoch, fence.journal_id) and row["holder"] is not None


def lost(row: Mapping[str, Any] | None) -> LeaseLost:
    """The error for a fence that does not match the partition's row."""
    if row is None:
        return LeaseLost("the lease is lost: the database has no record of it, so it is not the one it was granted in")
    return LeaseLost(f"the lease is lost: in epoch {row['epoch']} it is held by {row['holder'] or 'nobody'}")


async def purge(connection: AsyncConnection, fence: Fence, now: datetime, rows_max: int) -> int:
    """Delete at most `rows_max` rows; notes of what to purge are not counted, each stands for a row at least."""
    row = await partition_row(connection, fence.partition)
    if row is None or not _holds(row, fence):
        raise lost(row)
    in_partition = {"partition": fence.partition}
    left = rows_max
    left -= await _delete(connection, DELETE_EXPIRED_OUTCOMES, {**in_partition, "now": now, "limit": left})
    while left > 0 and (note := (await connection.execute(SELECT_PURGE, in_partition)).one_or_none()) is not None:
        left -= await _purge_incarnation(connection, note.incarnation, note.floor, fence.partition, left)
    return rows_max - left


async def _purge_incarnation(
    connection: AsyncConnection, incarnation: str, floor: int | None, partition: int, rows_max: int
) -> int:
    """The note goes with the last row."""
    left = rows_max
    of_session = {"incarnation": incarnation, "floor": SEQ_MAX if floor is None else floor}
    for statement in (DELETE_MESSAGES, *(DELETES_OF_SESSION if floor is None else ())):
        left -= await _delete(connection, statement, {**of_session, "limit": left})
        if left <= 0:
            return rows_max
    if floor is None:
        left -= await _delete(connection, DELETE_SESSION, {"incarnation": incarnation})
    await connection.execute(DELETE_PURGE, {"partition": partition, "incarnation": incarnation})
    return rows_max - left


async def _delete(connection: AsyncConnection, statement: Delete, parameters: Mapping[str, Any]) -> int:
    return (await connection.execute(statement, parameters)).rowcount
