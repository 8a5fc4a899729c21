"""The tables of a partition, and the rules that a batch and a purge keep when they write to them.

Everything is written into a transaction first, and refused before any of it shows: a session that is not there can't be
changed and owns nothing, an id is taken by one session at a time, and what is only ever inserted is inserted once.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from typing import Any, Final

import msgspec

from agent_runtime.changes import Batch
from agent_runtime.errors import ChangeRejected
from agent_runtime.rows import (
    ContextRow,
    DocumentRow,
    MessageRow,
    OutcomeRow,
    QuarantineRow,
    SessionRow,
    SwitchRow,
)
from agent_runtime.storage import JournalRow

from .tables import Key, Table, Transaction, View

__all__ = ["ALL", "Partition", "Standing", "purge", "write"]

ALL: Final = None
"""The group of keys that has everything in it."""

_STANDING: Final = (ALL,)


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """The row that every writer compares first: the sequence, and who may write.

    `expires_at` is by the event loop's clock; `opening` tells by which opening of the database the lease was taken.
    """

    sequence: int = 0
    epoch: int = 0
    journal_id: str | None = None
    holder: str | None = None
    host: str | None = None
    pid: int | None = None
    address: str | None = None
    acquired_at: datetime | None = None
    expires_at: float | None = None
    opening: int = 0


class Partition:
    """The tables. In brackets: the key of a row."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._standing: Table[Standing] = Table()
        self.journals: Table[JournalRow] = Table()  # (journal_id)
        self.sessions: Table[SessionRow] = Table()  # (incarnation)
        self.names: Table[str] = Table()  # (session_id): incarnation
        self.listing: Table[str] = Table()  # (ALL or user_id, created_at, incarnation): incarnation
        self.contexts: Table[ContextRow] = Table()  # (incarnation)
        self.messages: Table[MessageRow] = Table()  # (incarnation, seq)
        self.switches: Table[SwitchRow] = Table()  # (incarnation, number)
        self.documents: Table[DocumentRow] = Table()  # (incarnation, collection, key)
        self.outcomes: Table[OutcomeRow] = Table()  # (scope, key)
        self.expiries: Table[Key] = Table()  # (ALL, expires_at, scope, key): (scope, key)
        self.quarantine: Table[QuarantineRow] = Table()  # (ALL, sequence)
        self.floors: Table[int] = Table()  # (ALL, incarnation): below it there may be messages to purge
        self.tombstones: Table[str] = Table()  # (ALL, incarnation): the incarnation, deleted and to be purged

    def standing(self, view: View) -> Standing:
        """The partition's row."""
        return view.get(self._standing, _STANDING) or Standing()

    def stand(self, transaction: Transaction, standing: Standing) -> None:
        """Replace the partition's row."""
        transaction.put(self._standing, _STANDING, standing)


def write(partition: Partition, transaction: Transaction, batch: Batch) -> None:
    """Write the rows of a batch.

    Raises:
        ChangeRejected: a row breaks a rule; the transaction is to be thrown away.
    """
    for sequence in batch.discharged:
        transaction.delete(partition.quarantine, (ALL, sequence))
    for incarnation in batch.deleted:
        _bury(partition, transaction, incarnation)
    for session in batch.created:
        _create(partition, transaction, session)
    for touch in batch.touched:
        _change(
            partition,
            transaction,
            touch.incarnation,
            last_activity=touch.last_activity,
            message_count=touch.message_count,
            next_seq=touch.next_seq,
            sequence=touch.sequence,
        )
    for incarnation, details in batch.edited:
        _change(partition, transaction, incarnation, **msgspec.structs.asdict(details))
    for incarnation, floor in batch.cleared:
        _change(partition, transaction, incarnation, floor=floor)
        transaction.put(partition.floors, (ALL, incarnation), floor)
    _write_belongings(partition, transaction, batch)
    for outcome in batch.outcomes:
        _put_outcome(partition, transaction, outcome)
    for row in batch.quarantined:
        _insert(transaction, partition.quarantine, (ALL, row.sequence), row)


def _write_belongings(partition: Partition, transaction: Transaction, batch: Batch) -> None:
    owned = (batch.contexts, batch.switches, batch.messages, batch.documents)
    owners = {row.incarnation for rows in owned for row in rows}
    owners.update(incarnation for incarnation, _ in batch.removed)
    owners.update(incarnation for incarnation, *_ in batch.discarded)
    for incarnation in owners:
        _session(partition, transaction, incarnation)
    for context in batch.contexts:
        transaction.put(partition.contexts, (context.incarnation,), context)
    for switch in batch.switches:
        _insert(transaction, partition.switches, (switch.incarnation, switch.number), switch)
    for incarnation, seq in batch.removed:
        transaction.delete(partition.messages, (incarnation, seq))
    for message in batch.messages:
        _insert(transaction, partition.messages, (message.incarnation, message.seq), message)
    for incarnation, collection, key in batch.discarded:
        transaction.delete(partition.documents, (incarnation, collection, key))
    for document in batch.documents:
        transaction.put(partition.documents, (document.incarnation, document.collection, document.key), document)


def _session(partition: Partition, transaction: Transaction, incarnation: str) -> SessionRow:
    session = transaction.get(partition.sessions, (incarnation,))
    if session is None:
        raise ChangeRejected(f"there is no session with the incarnation {incarnation!r}")
    return session


def _change(partition: Partition, transaction: Transaction, incarnation: str, **columns: Any) -> None:
    session = _session(partition, transaction, incarnation)
    transaction.put(partition.sessions, (incarnation,), msgspec.structs.replace(session, **columns))


def _insert(transaction: Transaction, table: Table[Any], key: Key, row: Any) -> None:
    if transaction.get(table, key) is not None:
        raise ChangeRejected(f"a {type(row).__name__} with the key {key} is there already")
    transaction.put(table, key, row)


def _create(partition: Partition, transaction: Transaction, session: SessionRow) -> None:
    incarnation = session.incarnation
    if transaction.get(partition.tombstones, (ALL, incarnation)) is not None:
        raise ChangeRejected(f"the incarnation {incarnation!r} was deleted before")
    if transaction.get(partition.names, (session.session_id,)) is not None:
        raise ChangeRejected(f"the session id {session.session_id!r} is taken")
    _insert(transaction, partition.sessions, (incarnation,), session)
    transaction.put(partition.names, (session.session_id,), incarnation)
    for key in _listing_keys(session):
        transaction.put(partition.listing, key, incarnation)


def _bury(partition: Partition, transaction: Transaction, incarnation: str) -> None:
    session = _session(partition, transaction, incarnation)
    transaction.delete(partition.sessions, (incarnation,))
    transaction.delete(partition.names, (session.session_id,))
    transaction.delete(partition.floors, (ALL, incarnation))
    for key in _listing_keys(session):
        transaction.delete(partition.listing, key)
    transaction.put(partition.tombstones, (ALL, incarnation), incarnation)


def _listing_keys(session: SessionRow) -> Iterator[Key]:
    groups = {ALL, session.user_id}  # no user: one key
    return ((group, session.created_at, session.incarnation) for group in groups)


def _put_outcome(partition: Partition, transaction: Transaction, outcome: OutcomeRow) -> None:
    _drop_outcome(partition, transaction, (outcome.scope, outcome.key))
    transaction.put(partition.outcomes, (outcome.scope, outcome.key), outcome)
    transaction.put(partition.expiries, _expiry_key(outcome), (outcome.scope, outcome.key))


def _drop_outcome(partition: Partition, transaction: Transaction, key: Key) -> None:
    outcome = transaction.get(partition.outcomes, key)
    if outcome is not None:
        transaction.delete(partition.outcomes, key)
        transaction.delete(partition.expiries, _expiry_key(outcome))


def _expiry_key(outcome: OutcomeRow) -> Key:
    return ALL, outcome.expires_at, outcome.scope, outcome.key


def purge(partition: Partition, transaction: Transaction, now: datetime, rows_max: int) -> int:
    """Delete up to `rows_max` rows that nobody can see; returns how many were deleted."""
    left = rows_max
    for key, incarnation in transaction.scan(partition.tombstones, ALL):
        left -= _purge_session(partition, transaction, incarnation, left)
        if not left:
            return rows_max
        transaction.delete(partition.tombstones, key)
        left -= 1
    for key, floor in transaction.scan(partition.floors, ALL):
        incarnation = key[1]
        left -= _purge_rows(transaction, partition.messages, incarnation, left, before=(incarnation, floor + 1))
        if not left:
            return rows_max
        transaction.delete(partition.floors, key)
    expired = [key for _, key in islice(transaction.scan(partition.expiries, ALL, before=(ALL, now)), left)]
    for key in expired:
        _drop_outcome(partition, transaction, key)
    return rows_max - left + len(expired)


def _purge_session(partition: Partition, transaction: Transaction, incarnation: str, rows_max: int) -> int:
    left = rows_max
    tables: tuple[Table[Any], ...] = (partition.messages, partition.switches, partition.documents, partition.contexts)
    for table in tables:
        left -= _purge_rows(transaction, table, incarnation, left)
    return rows_max - left


def _purge_rows(
    transaction: Transaction, table: Table[Any], group: str, rows_max: int, *, before: Key | None = None
) -> int:
    keys = [key for key, _ in islice(transaction.scan(table, group, before=before, backwards=True), rows_max)]
    for key in keys:
        transaction.delete(table, key)
    return len(keys)
