"""The lease of a partition: one row, and an epoch that only rises.

Time decides only when someone else may try; what keeps two writers apart is the epoch, compared in every batch. Which
clock counts is the backend's affair: it gives `lease_statements` the time at which a lease ends, and `acquire` the way
to tell from the row how long it lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeAlias
from uuid import uuid4

import msgspec
from sqlalchemy import ColumnElement, Select, Table, Update, bindparam, null, select, update
from sqlalchemy.sql.dml import UpdateBase

from agent_runtime.errors import LeaseHeld
from agent_runtime.process import ProcessFacts, is_dead
from agent_runtime.storage import Claim, Fence, Grant, LeaseRow

from .apply import lost, partition_row
from .reads import SELECT_JOURNAL
from .tables import journals, partitions
from .transaction import Transaction
from .writes import Columns, Insert, fenced

__all__ = ["LeaseStatements", "Remaining", "acquire", "lease_row", "lease_statements", "release", "renew"]

Remaining: TypeAlias = Callable[[Mapping[str, Any]], float | None]
"""How many seconds the lease in the partition's row lasts: negative once it has ended, None when nobody holds it."""

_CLAIMED: Final = ("holder", "host", "pid", "process_started", "pid_namespace", "boot_id", "address", "duration_s")
_GRANTED: Final = ("epoch", "journal_id", "acquired_at", *_CLAIMED)
_HOLDER_COLUMNS: Final = (*_CLAIMED, "acquired_at", "expires_at")
_JOURNAL_COLUMNS: Final = tuple(journals.c.keys())
_SELECT_DATABASE: Final = select(partitions.c.database_id).limit(1)
_RELEASE: Final = update(partitions).where(fenced()).values(dict.fromkeys(_HOLDER_COLUMNS, null()))


class LeaseStatements(NamedTuple):
    """What the calls of a lease desk run. `lock` selects the partition's row, which nobody else may change then."""

    lock: Select[Any]
    grant: Update
    renew: Update
    found: UpdateBase
    pair: UpdateBase


def lease_statements(insert: Insert, lock: Select[Any], expires_at: ColumnElement[Any]) -> LeaseStatements:
    """`expires_at` is when a lease ends that is granted or renewed now; it may use the parameter `duration_s`."""

    def given(table: Table, *names: str) -> Columns:
        return {name: bindparam(name, type_=table.c[name].type) for name in names}

    in_partition = partitions.c.partition == bindparam("partition")
    found = given(partitions, "partition", "database_id", "epoch", "sequence")
    pair = insert(journals, given(journals, *_JOURNAL_COLUMNS))
    moved = {name: pair.excluded[name] for name in _JOURNAL_COLUMNS if not journals.c[name].primary_key}
    duration = given(partitions, "duration_s")
    return LeaseStatements(
        lock=lock,
        grant=update(partitions).where(in_partition).values({**given(partitions, *_GRANTED), "expires_at": expires_at}),
        renew=update(partitions).where(fenced()).values({**duration, "expires_at": expires_at}),
        found=insert(partitions, found).on_conflict_do_nothing(),
        pair=pair.on_conflict_do_update(index_elements=list(journals.primary_key), set_=moved),
    )


async def acquire(
    transaction: Transaction,
    claim: Claim,
    statements: LeaseStatements,
    remaining: Remaining,
    clock: Mapping[str, Any],
) -> Grant:
    """See `agent_runtime.storage.LeaseDesk.acquire`. `clock` are parameters for `expires_at`, besides `duration_s`."""
    row = await _locked(transaction, claim.partition, statements)
    left_s = remaining(row)
    reclaimed = claim.reclaims and claim.journal_id is not None and row["journal_id"] == claim.journal_id
    if left_s is not None and left_s > 0 and not reclaimed and not is_dead(_facts(row)):
        raise LeaseHeld(row["holder"], left_s, row["address"])
    fence = Fence(partition=claim.partition, epoch=row["epoch"] + 1, journal_id=claim.journal_id)
    granted = {**msgspec.structs.asdict(claim), **clock, "epoch": fence.epoch, "acquired_at": datetime.now(UTC)}
    await transaction.change(statements.grant, granted)
    if claim.journal_id is not None:
        await _pair_journal(transaction, claim, row["sequence"], statements)
    return Grant(fence=fence, database_id=row["database_id"], sequence=row["sequence"])


async def renew(
    transaction: Transaction, fence: Fence, duration_s: float, statements: LeaseStatements, clock: Mapping[str, Any]
) -> None:
    """See `agent_runtime.storage.LeaseDesk.renew`."""
    renewed = {**msgspec.structs.asdict(fence), **clock, "duration_s": duration_s}
    if await transaction.change(statements.renew, renewed) != 1:
        raise lost(await partition_row(transaction, fence.partition))


async def release(transaction: Transaction, fence: Fence) -> None:
    """See `agent_runtime.storage.LeaseDesk.release`. The epoch stays: it never comes again."""
    await transaction.change(_RELEASE, msgspec.structs.asdict(fence))


def lease_row(row: Mapping[str, Any], remaining: Remaining) -> LeaseRow:
    """What a snapshot shows of the partition's row."""
    shown = {**row, "expires_in_s": remaining(row)}
    return LeaseRow(**{name: shown[name] for name in LeaseRow.__struct_fields__})


def _facts(row: Mapping[str, Any]) -> ProcessFacts:
    return ProcessFacts(**{name: row[name] for name in ProcessFacts.__struct_fields__})


async def _locked(transaction: Transaction, partition: int, statements: LeaseStatements) -> Mapping[str, Any]:
    """The row of the partition; made, if it was never granted. The database has one id, made with its first row."""
    row = await partition_row(transaction, partition, statements.lock)
    while row is None:
        known = await transaction.fetch(_SELECT_DATABASE, {})
        database_id = known[0][0] if known else str(uuid4())
        found = {"partition": partition, "database_id": database_id, "epoch": 0, "sequence": 0}
        await transaction.change(statements.found, found)
        row = await partition_row(transaction, partition, statements.lock)
    return row


async def _pair_journal(transaction: Transaction, claim: Claim, sequence: int, statements: LeaseStatements) -> None:
    """Write the journal's row: a journal that is new here goes on from `sequence`, another from where it stood.

    The last generation that a batch confirmed stays accepted, however many claims came to nothing since.
    """
    place = {"partition": claim.partition, "journal_id": claim.journal_id}
    rows = await transaction.fetch(SELECT_JOURNAL, place)
    if not rows:
        previous = claim.generation
    else:
        _, _, _, previous, sequence = rows[0]
    values = {"generation": claim.generation, "previous_generation": previous, "sequence": sequence}
    await transaction.change(statements.pair, {**place, **values})
