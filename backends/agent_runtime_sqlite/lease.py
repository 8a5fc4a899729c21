"""SQLite's clock for leases: it counts on while the machine sleeps, and nobody sets it.

As both sides of a lease are on one machine they share a clock: seconds since boot, sleep included. A lease of another
boot has ended. So has one whose holder is provably dead: same machine, boot and namespace, and no such process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import anyio
from sqlalchemy import bindparam

from agent_runtime.storage import Claim, Fence, Grant
from agent_runtime_sql.leases import acquire, lease_statements, release, renew
from agent_runtime_sql.reads import SELECT_PARTITION
from agent_runtime_sql.tables import partitions

from .transaction import SqliteTransaction, insert
from .writer import Writer

__all__ = ["Clock", "SqliteLeases", "remaining_s"]

Clock: TypeAlias = Callable[[], float]

_EXPIRES_AT: Final = bindparam("expires_at", type_=partitions.c.expires_at.type)
_STATEMENTS: Final = lease_statements(insert, SELECT_PARTITION, _EXPIRES_AT)
_ROUNDING_S: Final = 1.0


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
            await self._writer.run(release, fence)

    async def _acquire(self, transaction: SqliteTransaction, claim: Claim) -> Grant:
        now = self._clock()

        def remaining(row: Mapping[str, Any]) -> float | None:
            return remaining_s(row, claim.boot_id, now)

        return await acquire(transaction, claim, _STATEMENTS, remaining, {"expires_at": now + claim.duration_s})

    async def _renew(self, transaction: SqliteTransaction, fence: Fence, duration_s: float) -> None:
        await renew(transaction, fence, duration_s, _STATEMENTS, {"expires_at": self._clock() + duration_s})
