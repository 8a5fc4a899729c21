"""The value of a partition's guard: who may write, and how far each log is stored. Pure functions of it."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime

import msgspec
from msgspec.structs import asdict, replace

from ..changes import Batch
from ..errors import LeaseHeld, LeaseLost, SequenceMismatch, StorageFatal
from ..process import ProcessFacts, is_dead
from ..storage import Claim, Fence, JournalRow, LeaseRow

__all__ = ["Standing", "advanced", "fenced", "granted", "lease_row", "released", "renewed"]


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A partition. `claim` is that of the holder, None when there is none; `expires_at` is in seconds since 1970."""

    database_id: str
    sequence: int = 0
    epoch: int = 0
    claim: Claim | None = None
    acquired_at: datetime | None = None
    expires_at: float = 0.0
    journals: dict[str, JournalRow] = {}


def granted(standing: Standing | None, claim: Claim) -> Standing:
    """The lease is the claimant's.

    Raises:
        LeaseHeld: someone else holds it.
    """
    before = standing or Standing(database_id=str(uuid.uuid4()))
    held, left_s = before.claim, before.expires_at - time.time()
    if held is not None and left_s > 0 and not _reclaims(claim, held) and not is_dead(_process_of(held)):
        raise LeaseHeld(held.holder, left_s, held.address)
    return Standing(
        database_id=before.database_id,
        sequence=before.sequence,
        epoch=before.epoch + 1,
        claim=claim,
        acquired_at=datetime.now(UTC),
        expires_at=time.time() + claim.duration_s,
        journals=_paired(before, claim),
    )


def _reclaims(claim: Claim, held: Claim) -> bool:
    return claim.reclaims and claim.journal_id is not None and claim.journal_id == held.journal_id


def _process_of(claim: Claim) -> ProcessFacts:
    fields = asdict(claim)
    return ProcessFacts(**{name: fields[name] for name in ProcessFacts.__struct_fields__})


def _paired(standing: Standing, claim: Claim) -> dict[str, JournalRow]:
    """The generation before stays accepted until the first batch, however often the claim is repeated."""
    if claim.journal_id is None:
        return standing.journals
    row = standing.journals.get(claim.journal_id)
    if row is None:
        row = JournalRow(
            partition=claim.partition,
            journal_id=claim.journal_id,
            generation=claim.generation,
            previous_generation=claim.generation,
            sequence=standing.sequence,
        )
    elif row.generation != claim.generation:
        row = replace(row, generation=claim.generation)
    return {**standing.journals, claim.journal_id: row}


def fenced(standing: Standing | None, fence: Fence) -> Standing:
    """The standing, for who may write.

    Raises:
        LeaseLost: the fence does not match.
    """
    if standing is None or standing.claim is None:
        raise LeaseLost(f"the lease of partition {fence.partition} is nobody's")
    if (standing.epoch, standing.claim.journal_id) != (fence.epoch, fence.journal_id):
        raise LeaseLost(f"the lease of partition {fence.partition} was taken over by {standing.claim.holder}")
    return standing


def advanced(standing: Standing | None, batch: Batch, fence: Fence) -> Standing:
    """The batch is stored.

    Raises:
        LeaseLost: the fence does not match.
        SequenceMismatch: the batch does not follow what is stored.
    """
    before = fenced(standing, fence)
    if before.sequence != batch.after:
        raise SequenceMismatch(batch.after, before.sequence)
    journals = before.journals
    if fence.journal_id is not None:
        row = journals.get(fence.journal_id)
        if row is None:
            raise StorageFatal("the journal that holds the lease has no row")
        journals = {
            **journals,
            fence.journal_id: replace(row, sequence=batch.last, previous_generation=row.generation),
        }
    for journal_id, sequence in batch.replayed:
        if (row := journals.get(journal_id)) is not None:
            journals = {**journals, journal_id: replace(row, sequence=sequence)}
    return replace(before, sequence=batch.last, journals=journals)


def renewed(standing: Standing | None, fence: Fence, duration_s: float) -> Standing:
    """The lease lasts from now, also where it had expired.

    Raises:
        LeaseLost: the fence does not match.
    """
    return replace(fenced(standing, fence), expires_at=time.time() + duration_s)


def released(standing: Standing | None, fence: Fence) -> Standing:
    """The lease is nobody's.

    Raises:
        LeaseLost: it was no more this holder's to give back.
    """
    return replace(fenced(standing, fence), claim=None, acquired_at=None)


def lease_row(standing: Standing | None, partition: int) -> LeaseRow | None:
    """The lease as it stands."""
    if standing is None:
        return None
    row = LeaseRow(
        partition=partition,
        database_id=standing.database_id,
        epoch=standing.epoch,
        holder=None,
        host=None,
        pid=None,
        address=None,
        journal_id=None,
        acquired_at=None,
        expires_in_s=None,
    )
    claim = standing.claim
    if claim is None:
        return row
    return replace(
        row,
        holder=claim.holder,
        host=claim.host,
        pid=claim.pid,
        address=claim.address,
        journal_id=claim.journal_id,
        acquired_at=standing.acquired_at,
        expires_in_s=standing.expires_at - time.time(),
    )
