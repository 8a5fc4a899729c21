"""A batch, in one transaction; and its opposite, the purge of what nobody sees any more."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import msgspec
from sqlalchemy import Select

from agent_runtime.changes import Batch, Receipt
from agent_runtime.errors import ChangeRejected, LeaseLost, SequenceMismatch, StorageFatal
from agent_runtime.storage import Fence

from .reads import SELECT_PARTITION, SELECT_PURGE
from .transaction import Transaction
from .writes import (
    DELETE_EXPIRED_OUTCOMES,
    DELETE_MESSAGES,
    DELETE_PURGE,
    DELETE_SESSION,
    DELETES_OF_SESSION,
    SEQ_MAX,
    Write,
)

__all__ = ["LOCK_PARTITION", "apply_batch", "lost", "partition_row", "purge"]

LOCK_PARTITION: Final = SELECT_PARTITION.with_for_update()
"""The partition's row, which nobody else may change then. SQLite, with one writer at a time, has no such clause."""


async def apply_batch(
    transaction: Transaction, batch: Batch, fence: Fence, now: datetime, writes: Mapping[str, tuple[Write, ...]]
) -> Receipt:
    """Move the sequence, if it and the fence are as expected, and write the rows; `now` is for tombstones.

    `writes` are those of `writes.batch_writes`.
    """
    place = {**msgspec.structs.asdict(fence), "after": batch.after, "last": batch.last}
    advanced = await transaction.advance(place, batch.touched)
    if advanced.partition != 1:
        raise await _why_not(transaction, batch, fence)
    if fence.journal_id is not None and advanced.journal != 1:
        raise StorageFatal(f"the database has no row of the journal {fence.journal_id}: it was changed by hand")
    # They are touched before others are deleted here, so that one which is both would be hit.
    both = {touch.incarnation for touch in batch.touched}.intersection(batch.deleted) if batch.deleted else ()
    _check_hits("touched", advanced.touched - len(both), len(batch.touched))
    constants = {"partition": fence.partition, "deleted_at": now}
    for field, statements in writes.items():
        items = getattr(batch, field)
        if items:
            for write in statements:
                hit = await transaction.write(field, write, items, constants)
                if write.exact:
                    _check_hits(field, hit, len(items))
    return batch.receipt()


def _check_hits(field: str, hit: int, items: int) -> None:
    if hit != items:
        raise ChangeRejected(f"{items - hit} of {items} sessions to be {field} are not there: deleted or never created")


async def _why_not(transaction: Transaction, batch: Batch, fence: Fence) -> LeaseLost | SequenceMismatch:
    row = await partition_row(transaction, fence.partition)
    if row is None or not _holds(row, fence):
        return lost(row)
    return SequenceMismatch(batch.after, row["sequence"])


async def partition_row(
    transaction: Transaction, partition: int, statement: Select[Any] = SELECT_PARTITION
) -> Mapping[str, Any] | None:
    """The row that every writer goes by; None before the first grant. `statement` may select more, or lock it."""
    rows = await transaction.fetch(statement, {"partition": partition})
    return dict(zip(statement.selected_columns.keys(), rows[0], strict=True)) if rows else None


def _holds(row: Mapping[str, Any], fence: Fence) -> bool:
    return (row["epoch"], row["journal_id"]) == (fence.epoch, fence.journal_id) and row["holder"] is not None


def lost(row: Mapping[str, Any] | None) -> LeaseLost:
    """The error for a fence that does not match the partition's row."""
    if row is None:
        return LeaseLost("the lease is lost: the database has no record of it, so it is not the one it was granted in")
    return LeaseLost(f"the lease is lost: in epoch {row['epoch']} it is held by {row['holder'] or 'nobody'}")


async def purge(transaction: Transaction, fence: Fence, now: datetime, rows_max: int) -> int:
    """Delete at most `rows_max` rows; notes of what to purge are not counted, each stands for a row at least."""
    row = await partition_row(transaction, fence.partition, LOCK_PARTITION)
    if row is None or not _holds(row, fence):
        raise lost(row)
    in_partition = {"partition": fence.partition}
    left = rows_max
    left -= await transaction.change(DELETE_EXPIRED_OUTCOMES, {**in_partition, "now": now, "limit": left})
    while left > 0 and (notes := await transaction.fetch(SELECT_PURGE, in_partition)):
        incarnation, floor = notes[0]
        left -= await _purge_incarnation(transaction, incarnation, floor, fence.partition, left)
    return rows_max - left


async def _purge_incarnation(
    transaction: Transaction, incarnation: str, floor: int | None, partition: int, rows_max: int
) -> int:
    """The note goes with the last row."""
    left = rows_max
    of_session = {"incarnation": incarnation, "floor": SEQ_MAX if floor is None else floor}
    for statement in (DELETE_MESSAGES, *(DELETES_OF_SESSION if floor is None else ())):
        left -= await transaction.change(statement, {**of_session, "limit": left})
        if left <= 0:
            return rows_max
    if floor is None:
        left -= await transaction.change(DELETE_SESSION, {"incarnation": incarnation})
    await transaction.change(DELETE_PURGE, {"partition": partition, "incarnation": incarnation})
    return rows_max - left
