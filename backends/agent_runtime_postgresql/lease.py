"""PostgreSQL's clock for leases: the server's, which all who want a lease share, read while the row is locked.

A lease whose holder is provably dead (same machine, boot and namespace, and no such process) has ended too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import anyio
from sqlalchemy import Float, bindparam, cast, extract, func, select

from agent_runtime.storage import Claim, Fence, Grant
from agent_runtime_sql.leases import acquire, lease_statements, release, renew
from agent_runtime_sql.tables import partitions

from .transaction import PostgresqlTransaction, insert
from .writer import Writer

__all__ = ["SELECT_LEASE", "PostgresqlLeases", "remaining_s"]

# clock_timestamp() moves on within a transaction, which may have waited for the row.
_NOW: Final = cast(extract("epoch", func.clock_timestamp()), Float)
SELECT_LEASE: Final = select(partitions, (partitions.c.expires_at - _NOW).label("left_s")).where(
    partitions.c.partition == bindparam("partition")
)
"""The partition's row as `remaining_s` wants it."""

_EXPIRES_AT: Final = _NOW + bindparam("duration_s", type_=Float)
_STATEMENTS: Final = lease_statements(insert, SELECT_LEASE.with_for_update(), _EXPIRES_AT)


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
            grant = await self._writer.run(_acquire, claim)
        return grant  # noqa: RET504 - for mypy a scope may swallow what is raised in it

    async def renew(self, fence: Fence, duration_s: float) -> None:
        self._writer.heed_lease(duration_s)
        with anyio.CancelScope(shield=True):
            await self._writer.run(_renew, fence, duration_s)

    async def release(self, fence: Fence) -> None:
        with anyio.CancelScope(shield=True):
            await self._writer.run(release, fence)


async def _acquire(transaction: PostgresqlTransaction, claim: Claim) -> Grant:
    return await acquire(transaction, claim, _STATEMENTS, remaining_s, {})


async def _renew(transaction: PostgresqlTransaction, fence: Fence, duration_s: float) -> None:
    await renew(transaction, fence, duration_s, _STATEMENTS, {})
