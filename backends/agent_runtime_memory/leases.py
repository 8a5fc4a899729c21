"""The rules of the lease in memory: who may write a partition, and how that is compared.

Every function is one step of a transaction. Times are by the event loop's clock, so that they follow a virtual one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime

import anyio
from msgspec.structs import replace

from agent_runtime.errors import LeaseHeld, LeaseLost, StorageFatal
from agent_runtime.storage import Claim, Fence, JournalRow

from .partition import Partition, Standing
from .tables import Transaction

__all__ = ["acquire", "advance", "fenced", "release", "renew", "replayed"]


def acquire(
    partition: Partition,
    transaction: Transaction,
    claim: Claim,
    *,
    now: datetime,
    opening: int,
    open_now: Collection[int],
) -> Standing:
    """Give the lease to who claims it through `opening`.

    A holder whose opening is not in `open_now` is dead: nothing can be written through it any more.

    Raises:
        LeaseHeld: someone else holds it.
    """
    time = anyio.current_time()
    before = partition.standing(transaction)
    reclaimed = claim.reclaims and claim.journal_id is not None and before.journal_id == claim.journal_id
    if before.holder is not None and before.expires_at is not None and not reclaimed:
        expires_in_s = before.expires_at - time
        if expires_in_s > 0 and before.opening in open_now:
            raise LeaseHeld(before.holder, expires_in_s, before.address)
    standing = Standing(
        sequence=before.sequence,
        epoch=before.epoch + 1,
        journal_id=claim.journal_id,
        holder=claim.holder,
        host=claim.host,
        pid=claim.pid,
        address=claim.address,
        acquired_at=now,
        expires_at=time + claim.duration_s,
        opening=opening,
    )
    partition.stand(transaction, standing)
    if claim.journal_id is not None:
        _pair_journal(partition, transaction, claim.journal_id, claim.generation)
    return standing


def _pair_journal(partition: Partition, transaction: Transaction, journal_id: str, generation: int) -> None:
    """Write the journal's row: a new journal goes on from here, another from where it stood.

    The last generation that a batch confirmed stays accepted, however many claims came to nothing since.
    """
    row = transaction.get(partition.journals, (journal_id,))
    if row is None:
        sequence = partition.standing(transaction).sequence
        row = JournalRow(
            partition=partition.number,
            journal_id=journal_id,
            generation=generation,
            previous_generation=generation,
            sequence=sequence,
        )
    elif row.generation != generation:
        row = replace(row, generation=generation)
    transaction.put(partition.journals, (journal_id,), row)


def fenced(partition: Partition, transaction: Transaction, fence: Fence) -> Standing:
    """The partition's row, for who may write.

    Raises:
        LeaseLost: the fence does not match.
    """
    standing = partition.standing(transaction)
    if standing.holder is None:
        raise LeaseLost(f"the lease of partition {fence.partition} was given back")
    if (standing.epoch, standing.journal_id) != (fence.epoch, fence.journal_id):
        raise LeaseLost(f"the lease of partition {fence.partition} was taken over by {standing.holder}")
    return standing


def advance(partition: Partition, transaction: Transaction, fence: Fence, sequence: int) -> None:
    """Move the sequence of the partition and of the journal of who writes."""
    partition.stand(transaction, replace(fenced(partition, transaction, fence), sequence=sequence))
    if fence.journal_id is not None:
        journal = transaction.get(partition.journals, (fence.journal_id,))
        if journal is None:
            raise StorageFatal(f"the journal {fence.journal_id!r} holds the lease, but has no row")
        moved = replace(journal, sequence=sequence, previous_generation=journal.generation)
        transaction.put(partition.journals, (fence.journal_id,), moved)


def replayed(partition: Partition, transaction: Transaction, journals: Iterable[tuple[str, int]]) -> None:
    """Move the rows of journals whose changes have come in late, where they are known."""
    for journal_id, sequence in journals:
        row = transaction.get(partition.journals, (journal_id,))
        if row is not None:
            transaction.put(partition.journals, (journal_id,), replace(row, sequence=sequence))


def renew(partition: Partition, transaction: Transaction, fence: Fence, duration_s: float) -> None:
    """Extend the lease, expired or not."""
    standing = fenced(partition, transaction, fence)
    partition.stand(transaction, replace(standing, expires_at=anyio.current_time() + duration_s))


def release(partition: Partition, transaction: Transaction, fence: Fence) -> None:
    """Give the lease back, if it is there to give."""
    try:
        standing = fenced(partition, transaction, fence)
    except LeaseLost:
        return
    partition.stand(transaction, Standing(sequence=standing.sequence, epoch=standing.epoch))
