"""The lease of a partition: one row, an epoch that only rises, and a clock that counts on while the machine sleeps.

Time decides only when someone else may try; what keeps two writers apart is the epoch, compared in every batch. As both
sides are on one machine they share a clock: seconds since boot, sleep included, which nobody sets. A lease of another
boot has ended. So has one whose holder is provably dead: same machine, boot and namespace, and no such process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias
from uuid import uuid4

import anyio
from sqlalchemy import insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_runtime.errors import LeaseHeld
from agent_runtime.process import ProcessFacts, is_dead
from agent_runtime.storage import Claim, Fence, Grant
from agent_runtime_sql.reads import SELECT_JOURNAL
from agent_runtime_sql.rows import struct_of
from agent_runtime_sql.tables import journals, partitions
from agent_runtime_sql.writes import fenced

from .apply import lost, partition_row
from .writer import Writer

__all__ = ["Clock", "SqliteLeases", "boot_clock", "remaining_s"]

Clock: TypeAlias = Callable[[], float]

_CLOCK: Final[int] = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_CLAIMED: Final = ("holder", "host", "pid", "process_started", "pid_namespace", "boot_id", "address", "duration_s")
_HOLDER_COLUMNS: Final = (*_CLAIMED, "acquired_at", "expires_at")
_ROUNDING_S: Final = 1.0


def boot_clock() -> float:
    """Seconds since the machine booted, those asleep included where the platform counts them."""
    return time.clock_gettime(_CLOCK)


def remaining_s(row: Mapping[str, Any], boot_id: str | None, now: float) -> float | None:
    """How long the lease in the partition's row lasts: negative once it has ended, None when nobody holds it."""
    if row["holder"] is None:
        return None
    left: float = row["expires_at"] - now
    # A lease that lasts longer than it was granted for is of an earlier boot too, where boots have no id.
    of_another_boot = None not in (boot_id, row["boot_id"]) and boot_id != row["boot_id"]
    if of_another_boot or left > row["duration_s"] + _ROUNDING_S:
        return -now
    return left


class SqliteLeases:
    """The lease desk. Its calls are short transactions, shielded: nobody is left in doubt about having the lease."""

    def __init__(self, writer: Writer, clock: Clock) -> None:
        self._writer = writer
        self._clock = clock

    async def acquire(self, claim: Claim) -> Grant:
        with anyio.CancelScope(shield=True):
            grant = await self._writer.run(self._acquire, claim)
        return grant  # noqa: RET504 - for mypy a scope may swallow what is raised in it

    async def renew(self, fence: Fence, duration_s: float) -> None:
        with anyio.CancelScope(shield=True):
            await self._writer.run(self._renew, fence, duration_s)

    async def release(self, fence: Fence) -> None:
        with anyio.CancelScope(shield=True):
            await self._writer.run(_release, fence)

    async def _acquire(self, connection: AsyncConnection, claim: Claim) -> Grant:
        now = self._clock()
        row = await partition_row(connection, claim.partition) or await _new_partition(connection, claim.partition)
        left_s = remaining_s(row, claim.boot_id, now)
        if left_s is not None and left_s > 0 and not is_dead(_facts(row)):
            raise LeaseHeld(row["holder"], left_s, row["address"])
        fence = Fence(partition=claim.partition, epoch=row["epoch"] + 1, journal_id=claim.journal_id)
        await connection.execute(
            update(partitions)
            .where(partitions.c.partition == claim.partition)
            .values(
                epoch=fence.epoch,
                journal_id=fence.journal_id,
                acquired_at=datetime.now(UTC),
                expires_at=now + claim.duration_s,
                **{name: getattr(claim, name) for name in _CLAIMED},
            )
        )
        if claim.journal_id is not None:
            await _pair_journal(connection, claim, row["sequence"])
        return Grant(fence=fence, database_id=row["database_id"], sequence=row["sequence"])

    async def _renew(self, connection: AsyncConnection, fence: Fence, duration_s: float) -> None:
        expires_at = self._clock() + duration_s
        renewed = await connection.execute(
            update(partitions).where(fenced(fence)).values(expires_at=expires_at, duration_s=duration_s)
        )
        if renewed.rowcount != 1:
            raise lost(await partition_row(connection, fence.partition))


def _facts(row: Mapping[str, Any]) -> ProcessFacts:
    return struct_of(ProcessFacts, [row[name] for name in ProcessFacts.__struct_fields__])


async def _release(connection: AsyncConnection, fence: Fence) -> None:
    """The epoch stays: it never comes again."""
    await connection.execute(update(partitions).where(fenced(fence)).values(dict.fromkeys(_HOLDER_COLUMNS)))


async def _new_partition(connection: AsyncConnection, partition: int) -> Mapping[str, Any]:
    """The row of a partition that was never granted. The database has one id, made with its first row."""
    database_id = await connection.scalar(select(partitions.c.database_id).limit(1)) or str(uuid4())
    row = {"partition": partition, "database_id": database_id, "epoch": 0, "journal_id": None, "sequence": 0}
    await connection.execute(insert(partitions), row)
    return {**dict.fromkeys(_HOLDER_COLUMNS), **row}


async def _pair_journal(connection: AsyncConnection, claim: Claim, sequence: int) -> None:
    """Write the journal's row: a journal that is new here goes on from `sequence`, another from where it stood.

    The generation before stays accepted until the first batch; so a claim that is repeated must not displace it.
    """
    place = {"partition": claim.partition, "journal_id": claim.journal_id}
    row = (await connection.execute(SELECT_JOURNAL, place)).one_or_none()
    if row is None:
        previous = claim.generation
    else:
        previous = row.previous_generation if row.generation == claim.generation else row.generation
        sequence = row.sequence
    values = {"generation": claim.generation, "previous_generation": previous, "sequence": sequence}
    statement = upsert(journals).values(**place, **values)
    await connection.execute(statement.on_conflict_do_update(index_elements=list(journals.primary_key), set_=values))
