"""The lease: who this process is to others, and keeping the right to write while the runtime is open.

The epoch in the fence is what keeps two writers apart; time only decides when another one may try. So a lease that
could not be renewed in time, because the database was away, is renewed when it is back, if nobody has taken it.

A process that stood still until its lease had expired (stopped, or asleep with its machine) does not know whether it
was overtaken. It asks before it acknowledges anything: what it wrote now would be of an older epoch than what another
runtime may have acknowledged since, yet by its time the newer one when it came in late.

Whoever waits for a lease asks for it again and again: a holder that has ended, or given it back, is succeeded within a
second, one that has fallen silent when its lease has expired.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final, TypeVar

import anyio

from .errors import LeaseHeld, LeaseLost, StorageUnavailable, again
from .identifiers import utc_now
from .process import boot_clock, this_process
from .storage import Claim, Grant, LeaseDesk

__all__ = ["LeaseKeeper", "claim_of", "patiently"]

logger = logging.getLogger("agent_runtime.lease")

T = TypeVar("T")
_RENEWALS: Final = 3
"""How often a lease is renewed within its duration."""
_LOOKS: Final = 6
"""How often within a lease's duration the process sees that it has not stood still; it may miss one of them."""
_PATIENCE_S: Final = 2.0
"""How long a write waits for the database to say whose the lease is; one that is away does not stop writes."""
_POLL_S: Final = 1.0
_POLL_LEAST_S: Final = 0.1


async def patiently(attempt: Callable[[], Awaitable[T]], random: Callable[[], float]) -> T:
    """Make attempts until one is not refused because another runtime has the lease, or the database is away.

    The log names each holder that is waited for, once. `random` gives numbers from 0 to 1: many who wait for one holder
    come one by one.
    """
    told: str | None = None
    while True:
        pause_s = _POLL_S
        try:
            return await attempt()
        except LeaseHeld as held:
            left_s = held.expires_in_s
            if held.holder != told:
                until = ""
                if left_s is not None and left_s > 0:
                    expiry = utc_now() + timedelta(seconds=left_s)
                    until = f", until {expiry:%Y-%m-%d %H:%M:%S} UTC unless it renews"
                logger.info("waiting for the lease: %s has it%s", held.holder, until)
            told = held.holder
            if left_s is not None and left_s > 0:
                pause_s = min(pause_s, max(left_s, _POLL_LEAST_S))
        except StorageUnavailable as error:
            logger.warning("waiting for the lease: %s", error)
        await anyio.sleep(pause_s * (1 + random() / 4))


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
    """Takes and renews one lease, which is counted from before each request, by `boot_clock`.

    Until it expires, and after that for as long as the process is seen not to stand still, nothing is `in_doubt`.
    """

    grant: Grant

    def __init__(self, desk: LeaseDesk, duration_s: float) -> None:
        self._desk = desk
        self._duration_s = duration_s
        self._expires_at = self._sure_until = boot_clock()
        self.unreachable = False
        self._doubt = anyio.Event()
        self._answered = anyio.Event()
        self._lost: LeaseLost | None = None

    async def acquire(self, claim: Claim) -> None:
        """Take the lease. To be called first.

        Where the answer is lost, the lease may be ours already: so a claim that reclaims it is made once more.

        Raises:
            LeaseHeld: someone else has it.
            StorageError: the database can't be asked.
        """
        before = boot_clock()
        try:
            self.grant = await self._desk.acquire(claim)
        except StorageUnavailable:
            if not claim.reclaims:
                raise
            self.grant = await self._desk.acquire(claim)
        self._extend(before)

    @property
    def expires_in_s(self) -> float:
        """How long the lease lasts, as far as this runtime knows: negative once it has ended."""
        return self._expires_at - boot_clock()

    @property
    def expired(self) -> bool:
        """Whether another runtime may have taken the lease, as far as this one knows."""
        return self.expires_in_s <= 0

    @property
    def in_doubt(self) -> bool:
        """Whether the lease may have been taken while the process stood still: who acknowledges anything asks first."""
        return boot_clock() >= self._sure_until

    async def confirm(self) -> None:
        """Have the database say whose the lease is, before it would be asked anyway; wait for that, but not for long.

        Raises:
            LeaseLost: another runtime has taken over.
        """
        self._doubt.set()
        with anyio.move_on_after(_PATIENCE_S):
            while self._lost is None and self.in_doubt:
                await self._answered.wait()
        if self._lost is not None:
            raise again(self._lost)
        if self.in_doubt:
            logger.warning("could not ask whose the lease is in %g s, going on", _PATIENCE_S)
            self._go_on()

    async def run(self) -> None:
        """Renew until cancelled.

        Raises:
            LeaseLost: somebody else has taken it.
        """
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._look)
            lost = await self._renew_until_lost()
            tasks.cancel_scope.cancel()
        raise lost

    async def _renew_until_lost(self) -> LeaseLost:
        while True:
            with anyio.move_on_after(self._duration_s / _RENEWALS):
                await self._doubt.wait()
            self._doubt = anyio.Event()
            await self._renew()
            self._answered.set()
            self._answered = anyio.Event()
            if self._lost is not None:
                return self._lost

    async def _renew(self) -> None:
        before = boot_clock()
        in_doubt = before >= self._sure_until
        try:
            await (self._ask_twice() if in_doubt else self._ask())
        except LeaseLost as error:
            logger.error("the lease is lost: another runtime has taken over")
            self._lost = error
        except Exception as error:  # noqa: BLE001 — whatever it is, the epoch keeps us safe, and we try again
            if not self.unreachable:
                logger.warning("could not renew the lease, going on: %s", type(error).__name__)
            self.unreachable = True
            if in_doubt:  # else it began before the process stood still, and says nothing
                self._go_on()
        else:
            self.unreachable = False
            self._extend(before)
        if self.in_doubt:
            self._doubt.set()

    async def _ask(self) -> None:
        await self._desk.renew(self.grant.fence, self._duration_s)

    async def _ask_twice(self) -> None:
        """A connection that broke while the process stood still fails, whether the database is there or not."""
        try:
            await self._ask()
        except LeaseLost:
            raise
        except Exception:  # noqa: BLE001 — the second answer counts
            await self._ask()

    async def _look(self) -> None:
        """See that the process has not stood still."""
        while True:
            await anyio.sleep(self._duration_s / _LOOKS)
            if self.in_doubt:
                self._doubt.set()
            else:
                self._go_on()

    def _extend(self, before: float) -> None:
        self._expires_at = before + self._duration_s
        self._sure_until = max(self._sure_until, self._expires_at)

    def _go_on(self) -> None:
        self._sure_until = max(self._sure_until, boot_clock() + 2 * self._duration_s / _LOOKS)

    async def release(self) -> None:
        """Give the lease back, if the database can be reached; else it expires."""
        try:
            await self._desk.release(self.grant.fence)
        except Exception as error:  # noqa: BLE001 — it ends by itself
            logger.warning("could not give the lease back, it expires by itself: %s", type(error).__name__)
