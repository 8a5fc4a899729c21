"""The figures of a runtime, as `Runtime.status` and the surfaces give them."""

from __future__ import annotations

from typing import Literal

import anyio
import msgspec

from .budget import Budget
from .errors import LeaseLost
from .journal import Journal
from .lease import LeaseKeeper
from .log import Log
from .records import Durability, Watermarks
from .residents import Residents
from .scheduler import FlushFigures, Scheduler
from .storage import PoolFigures, Storage

__all__ = [
    "JournalStatus",
    "LeaseStatus",
    "PendingStatus",
    "QuarantineStatus",
    "ResidentsStatus",
    "Status",
    "status_of",
]


class PendingStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Unstored changes."""

    changes: int
    bytes: int
    bytes_max: int
    oldest_age_s: float


class ResidentsStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Sessions in memory, and how often they were found there."""

    count: int
    bytes: int
    bytes_max: int
    hits: int
    misses: int
    evictions: int


class QuarantineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Sessions that are held, and the changes of theirs in quarantine."""

    sessions: int
    changes: int


class LeaseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The lease; `expires_in_s` as this runtime counts it."""

    epoch: int
    expires_in_s: float
    unreachable: bool


class JournalStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The journal. `full`: it takes no more for want of disk; `sync_failures` count since the start."""

    place: str
    segments: int
    bytes: int
    full: bool
    sync_failures: int
    last_sync_s: float


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """All figures. `durability` is the level that a call waits for unless it names one. `state` is degraded while
    batches fail, for now or for a reason that does not go away by itself.
    """

    state: Literal["running", "degraded", "fenced"]
    durability: Durability
    watermarks: Watermarks
    pending: PendingStatus
    flush: FlushFigures
    residents: ResidentsStatus
    quarantine: QuarantineStatus
    lease: LeaseStatus
    journal: JournalStatus | None
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
    durability: Durability,
    fenced: LeaseLost | None,
) -> Status:
    """The figures of this moment."""
    failing = scheduler.figures.failing_since_s is not None
    held = residents.held
    return Status(
        state="fenced" if fenced else "degraded" if failing else "running",
        durability=durability,
        watermarks=log.watermarks,
        pending=PendingStatus(
            changes=scheduler.pending_changes,
            bytes=budget.used,
            bytes_max=budget.bytes_max,
            oldest_age_s=scheduler.oldest_age_s,
        ),
        flush=msgspec.structs.replace(scheduler.figures),
        residents=ResidentsStatus(
            count=residents.count,
            bytes=residents.bytes,
            bytes_max=residents.bytes_max,
            hits=residents.hits,
            misses=residents.misses,
            evictions=residents.evictions,
        ),
        quarantine=QuarantineStatus(sessions=len(held), changes=sum(len(resident.held) for resident in held)),
        lease=LeaseStatus(
            epoch=lease.grant.fence.epoch,
            expires_in_s=lease.expires_at - anyio.current_time(),
            unreachable=lease.unreachable,
        ),
        journal=None if journal is None else _journal_status(journal),
        pool=storage.figures(),
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
    )
