"""PostgreSQL's clock for leases: the server's, which all who want a lease share, read while the row is locked.

A lease whose holder is provably dead (same machine, boot and namespace, and no such process) has ended too.

A holder that is frozen within a transaction keeps the partition's row locked. The server ends such a transaction by
itself, but only between two statements: not where the client has sent a part of one and then fallen silent. So whoever
finds the row locked, and its lease expired, has the server end the connection that keeps it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import anyio
from sqlalchemy import Float, bindparam, cast, extract, func, select

from agent_runtime.errors import StorageUnavailable
from agent_runtime.storage import Claim, Fence, Grant
from agent_runtime_sql.leases import acquire, lease_statements, release, renew
from agent_runtime_sql.tables import partitions

from .transaction import PostgresqlTransaction, insert
from .writer import Writer

__all__ = ["SELECT_LEASE", "PostgresqlLeases", "remaining_s"]

logger: Final = logging.getLogger(__name__)

# clock_timestamp() moves on within a transaction, which may have waited for the row.
_NOW: Final = cast(extract("epoch", func.clock_timestamp()), Float)
SELECT_LEASE: Final = select(partitions, (partitions.c.expires_at - _NOW).label("left_s")).where(
    partitions.c.partition == bindparam("partition")
)
"""The partition's row as `remaining_s` wants it."""

_EXPIRES_AT: Final = _NOW + bindparam("duration_s", type_=Float)
_STATEMENTS: Final = lease_statements(insert, SELECT_LEASE.with_for_update(), _EXPIRES_AT)


_END_SILENT: Final = """
SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity AS activity
WHERE usename = current_user AND wait_event = 'ClientRead' AND pid <> pg_backend_pid()
AND EXISTS (
    SELECT 1 FROM pg_locks WHERE pid = activity.pid AND granted AND relation = 'partitions'::regclass
    AND mode IN ('RowShareLock', 'RowExclusiveLock')
)
AND EXISTS (
    SELECT 1 FROM partitions WHERE partition = $1 AND holder IS NOT NULL
    AND expires_at < extract(epoch FROM clock_timestamp())
    AND activity.state_change < clock_timestamp() - make_interval(secs => duration_s)
)
"""


def remaining_s(row: Mapping[str, Any]) -> float | None:
    """How long the lease in the partition's row lasts: negative once it has ended, None when nobody holds it."""
    return None if row["holder"] is None else row["left_s"]


class PostgresqlLeases:
    """The lease desk. Its calls are short transactions, shielded: nobody is left in doubt about having the lease."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def acquire(self, claim: Claim) -> Grant:
        self._writer.heed_lease(claim.duration_s)
        with anyio.CancelScope(shield=True):
            try:
                grant = await self._writer.run(_acquire, claim)
            except StorageUnavailable:
                if not await self._writer.run(_end_silent, claim.partition):
                    raise
                grant = await self._writer.run(_acquire, claim)
        return grant

    async def renew(self, fence: Fence, duration_s: float) -> None:
        self._writer.heed_lease(duration_s)
        with anyio.CancelScope(shield=True):
            await self._writer.run(_renew, fence, duration_s)

    async def release(self, fence: Fence) -> None:
        with anyio.CancelScope(shield=True):
            await self._writer.run(release, fence)


async def _acquire(transaction: PostgresqlTransaction, claim: Claim) -> Grant:
    return await acquire(transaction, claim, _STATEMENTS, remaining_s, {})


async def _end_silent(transaction: PostgresqlTransaction, partition: int) -> int:
    """End the connections that keep an expired lease's row locked, and wait for a client that has been silent since.

    Returns how many they were.
    """
    ended = await transaction.driver.fetch(_END_SILENT, partition)
    for row in ended:
        logger.warning("ended the connection %d of a silent holder, which kept the lease locked", row["pid"])
    return len(ended)


async def _renew(transaction: PostgresqlTransaction, fence: Fence, duration_s: float) -> None:
    await renew(transaction, fence, duration_s, _STATEMENTS, {})
