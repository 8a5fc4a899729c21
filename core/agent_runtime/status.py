"""The figures of a runtime, as `Runtime.status` and the surfaces give them."""

from __future__ import annotations

from typing import Literal, TypeAlias

import anyio
import msgspec

from .budget import Budget
from .directories import Unfinished
from .door import Door
from .errors import LeaseLost
from .histograms import Histogram
from .journal import Journal
from .lease import LeaseKeeper
from .log import Log
from .records import Durability, Watermarks
from .residents import Residents
from .scheduler import FlushFigures, Scheduler
from .storage import PoolFigures, Storage

__all__ = [
    "FlushStatus",
    "JournalStatus",
    "LeaseStatus",
    "PendingStatus",
    "QuarantineStatus",
    "ResidentsStatus",
    "State",
    "Status",
    "status_of",
]


State: TypeAlias = Literal["running", "degraded", "fenced"]


class PendingStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Unstored changes, the calls that wait for room for one, and those that were refused (`Overloaded`)."""

    changes: int
    bytes: int
    bytes_max: int
    oldest_age_s: float
    waiting: int
    refused: int


class FlushStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What was stored since the start, in how many batches; `durations` in seconds and `sizes` in changes are theirs.

    A batch that was reported as failed, and found stored later, counts in `batches`, `changes` and `sizes` only.
    `failing_s`: for how long batches have failed; None when they don't. `last_error` then says why.
    """

    batches: int
    changes: int
    failures: int
    retries: int
    quarantined: int
    last_duration_s: float
    last_changes: int
    last_error: str | None
    failing_s: float | None
    durations: Histogram
    sizes: Histogram


class ResidentsStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Sessions in memory, and how often they were found there."""

    count: int
    bytes: int
    bytes_max: int
    hits: int
    misses: int
    evictions: int


class QuarantineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Sessions that are held, the changes of theirs in quarantine, and others whose session was deleted (orphans)."""

    sessions: int
    changes: int
    orphans: int


class LeaseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The lease; `expires_in_s` as this runtime counts it."""

    epoch: int
    expires_in_s: float
    unreachable: bool


class JournalStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The journal. `full`: it takes no more for want of disk. Since the start: `sync_failures`, and in `syncs` the
    seconds that syncs took.
    """

    place: str
    segments: int
    bytes: int
    full: bool
    sync_failures: int
    last_sync_s: float
    syncs: Histogram


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """All figures. `durability` is the level that a call waits for unless it names one. `state` is degraded while
    batches fail, for now or for a reason that does not go away by itself. `appends` has the seconds, by level, that
    calls took which appended messages. `unfinished` names journals that may have changes which come in late, once they
    are opened.
    """

    state: State
    durability: Durability
    watermarks: Watermarks
    appends: dict[Durability, Histogram]
    pending: PendingStatus
    flush: FlushStatus
    residents: ResidentsStatus
    quarantine: QuarantineStatus
    lease: LeaseStatus
    journal: JournalStatus | None
    unfinished: tuple[Unfinished, ...]
    pool: PoolFigures


def status_of(
    *,
    log: Log,
    budget: Budget,
    residents: Residents,
    scheduler: Scheduler,
    lease: LeaseKeeper,
    storage: Storage,
    journal: Journal | None,
    door: Door,
    fenced: LeaseLost | None,
    orphans: int,
    unfinished: tuple[Unfinished, ...],
) -> Status:
    """The figures of this moment."""
    flush = _flush_status(scheduler.figures)
    held = residents.held
    return Status(
        state="fenced" if fenced else "degraded" if flush.failing_s is not None else "running",
        durability=door.durability,
        watermarks=log.watermarks,
        appends={level: appends.copy() for level, appends in door.appends.items()},
        pending=PendingStatus(
            changes=scheduler.pending_changes,
            bytes=budget.used,
            bytes_max=budget.bytes_max,
            oldest_age_s=scheduler.oldest_age_s,
            waiting=budget.waiting,
            refused=budget.refusals,
        ),
        flush=flush,
        residents=ResidentsStatus(
            count=residents.count,
            bytes=residents.bytes,
            bytes_max=residents.bytes_max,
            hits=residents.hits,
            misses=residents.misses,
            evictions=residents.evictions,
        ),
        quarantine=QuarantineStatus(
            sessions=len(held), changes=sum(len(resident.held) for resident in held), orphans=orphans
        ),
        lease=LeaseStatus(
            epoch=lease.grant.fence.epoch,
            expires_in_s=lease.expires_in_s,
            unreachable=lease.unreachable,
        ),
        journal=None if journal is None else _journal_status(journal),
        unfinished=unfinished,
        pool=storage.figures(),
    )


def _flush_status(figures: FlushFigures) -> FlushStatus:
    since_s = figures.failing_since_s
    return FlushStatus(
        batches=figures.batches,
        changes=figures.changes,
        failures=figures.failures,
        retries=figures.retries,
        quarantined=figures.quarantined,
        last_duration_s=figures.last_duration_s,
        last_changes=figures.last_changes,
        last_error=figures.last_error,
        failing_s=None if since_s is None else anyio.current_time() - since_s,
        durations=figures.durations.copy(),
        sizes=figures.sizes.copy(),
    )


def _journal_status(journal: Journal) -> JournalStatus:
    figures = journal.figures
    return JournalStatus(
        place=journal.place,
        segments=figures.segments,
        bytes=figures.bytes,
        full=figures.full,
        sync_failures=figures.failures,
        last_sync_s=figures.last_sync_s,
        syncs=figures.syncs,
    )
