"""The lease: who this process is to others, and keeping the right to write while the runtime is open.

The epoch in the fence is what keeps two writers apart; time only decides when another one may try. So a lease that
could not be renewed in time, because the database was away, is renewed when it is back, if nobody has taken it.
"""

from __future__ import annotations

import logging
from typing import Final

import anyio

from .errors import LeaseLost
from .process import this_process
from .storage import Claim, Grant, LeaseDesk

__all__ = ["LeaseKeeper", "claim_of"]

logger = logging.getLogger("agent_runtime.lease")

_RENEWALS: Final = 3
"""How often a lease is renewed within its duration."""


def claim_of(
    duration_s: float,
    address: str | None = None,
    journal: tuple[str, int] | None = None,
    *,
    reclaims: bool = False,
) -> Claim:
    """The claim of this process; with a journal, that one's id and generation."""
    journal_id, generation = journal or (None, 0)
    process = this_process()
    return Claim(
        holder=f"pid {process.pid} on {process.host}" + (f" ({address})" if address else ""),
        host=process.host,
        pid=process.pid,
        process_started=process.process_started,
        pid_namespace=process.pid_namespace,
        boot_id=process.boot_id,
        address=address,
        journal_id=journal_id,
        generation=generation,
        reclaims=reclaims,
        duration_s=duration_s,
    )


class LeaseKeeper:
    """Takes and renews one lease. `expires_at` is by `anyio.current_time()`, counted from before the request."""

    grant: Grant

    def __init__(self, desk: LeaseDesk, duration_s: float) -> None:
        self._desk = desk
        self._duration_s = duration_s
        self.expires_at = anyio.current_time()
        self.unreachable = False

    async def acquire(self, claim: Claim) -> None:
        """Take the lease. To be called first.

        Raises:
            LeaseHeld: someone else has it.
            StorageError: the database can't be asked.
        """
        before = anyio.current_time()
        self.grant = await self._desk.acquire(claim)
        self.expires_at = before + self._duration_s

    async def run(self) -> None:
        """Renew until cancelled.

        Raises:
            LeaseLost: somebody else has taken it.
        """
        while True:
            await anyio.sleep(self._duration_s / _RENEWALS)
            before = anyio.current_time()
            try:
                await self._desk.renew(self.grant.fence, self._duration_s)
            except LeaseLost:
                logger.error("the lease is lost: another runtime has taken over")
                raise
            except Exception as error:  # noqa: BLE001 — whatever it is, the epoch keeps us safe, and we try again
                if not self.unreachable:
                    logger.warning("could not renew the lease, going on: %s", type(error).__name__)
                self.unreachable = True
            else:
                self.unreachable = False
                self.expires_at = before + self._duration_s

    async def release(self) -> None:
        """Give the lease back, if the database can be reached; else it expires."""
        try:
            await self._desk.release(self.grant.fence)
        except Exception as error:  # noqa: BLE001 — it ends by itself
            logger.warning("could not give the lease back, it expires by itself: %s", type(error).__name__)
