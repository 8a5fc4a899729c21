"""The statements of a snapshot and of the lease: built once, with bound parameters.

Texts compare by code points: on SQLite that is what its default collation, byte by byte over UTF-8, amounts to.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import Column, ColumnElement, Integer, Select, and_, bindparam, cast, exists, select, tuple_

from agent_runtime.records import Order
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

from .rows import columns_of
from .tables import (
    contexts,
    documents,
    journals,
    messages,
    outcomes,
    partitions,
    purges,
    quarantine,
    sessions,
    switches,
)

__all__ = [
    "SELECT_COLLECTIONS",
    "SELECT_DOCUMENT",
    "SELECT_DOCUMENTS",
    "SELECT_HEAD",
    "SELECT_JOURNAL",
    "SELECT_NEWEST_OUTCOMES",
    "SELECT_OUTCOME",
    "SELECT_PARTITION",
    "SELECT_PURGE",
    "SELECT_QUARANTINE",
    "SELECT_SEQUENCE",
    "SELECT_SWITCHES",
    "select_messages",
    "select_outcomes",
    "select_sessions",
]

_LIMIT: Final = bindparam("limit", type_=Integer)
_in_partition: Final = bindparam("partition", type_=Integer)
_undeleted: Final = and_(sessions.c.deleted_at.is_(None), sessions.c.partition == _in_partition)


def _of_session(column: Column[Any]) -> ColumnElement[bool]:
    """Rows of the session `incarnation`, unless it is deleted."""
    there = exists().where(sessions.c.incarnation == bindparam("incarnation"), _undeleted)
    return and_(column == bindparam("incarnation"), there)


SELECT_PARTITION: Final = select(partitions).where(partitions.c.partition == _in_partition)
SELECT_SEQUENCE: Final = select(partitions.c.sequence).where(partitions.c.partition == _in_partition)
SELECT_JOURNAL: Final = select(*columns_of(journals, JournalRow)).where(
    journals.c.partition == _in_partition, journals.c.journal_id == bindparam("journal_id")
)
SELECT_PURGE: Final = (
    select(purges.c.incarnation, purges.c.floor)
    .where(purges.c.partition == _in_partition)
    .order_by(purges.c.incarnation)
    .limit(1)
)

_has_outcomes: Final = exists().where(
    outcomes.c.partition == sessions.c.partition, outcomes.c.scope == sessions.c.incarnation
)
SELECT_HEAD: Final = (
    select(partitions.c.sequence, _has_outcomes, *columns_of(sessions, SessionRow), *columns_of(contexts, ContextRow))
    .join_from(partitions, sessions, and_(sessions.c.session_id == bindparam("session_id"), _undeleted), isouter=True)
    .join(contexts, sessions.c.incarnation == contexts.c.incarnation, isouter=True)
    .where(partitions.c.partition == _in_partition)
)
"""The sequence that the partition stands at, and what there is of the session."""
SELECT_NEWEST_OUTCOMES: Final = (
    select(*columns_of(outcomes, OutcomeRow))
    .where(
        outcomes.c.partition == _in_partition,
        outcomes.c.scope == bindparam("scope"),
        # The cast to its own type keeps SQLite from going by the time, through the outcomes of all sessions.
        cast(outcomes.c.expires_at, outcomes.c.expires_at.type) > bindparam("now"),
    )
    .order_by(outcomes.c.sequence.desc())
    .limit(_LIMIT)
)
SELECT_OUTCOME: Final = select(*columns_of(outcomes, OutcomeRow)).where(
    outcomes.c.partition == _in_partition,
    outcomes.c.scope == bindparam("scope"),
    outcomes.c.key == bindparam("key"),
)
SELECT_SWITCHES: Final = (
    select(*columns_of(switches, SwitchRow)).where(_of_session(switches.c.incarnation)).order_by(switches.c.number)
)
SELECT_DOCUMENT: Final = select(*columns_of(documents, DocumentRow)).where(
    _of_session(documents.c.incarnation),
    documents.c.collection == bindparam("collection"),
    documents.c.key == bindparam("key"),
)
SELECT_DOCUMENTS: Final = (
    select(*columns_of(documents, DocumentRow))
    .where(
        _of_session(documents.c.incarnation),
        documents.c.collection == bindparam("collection"),
        documents.c.key > bindparam("after"),
    )
    .order_by(documents.c.key)
    .limit(_LIMIT)
)
SELECT_COLLECTIONS: Final = (
    select(documents.c.collection)
    .where(_of_session(documents.c.incarnation))
    .distinct()
    .order_by(documents.c.collection)
)
SELECT_QUARANTINE: Final = (
    select(*columns_of(quarantine, QuarantineRow))
    .where(quarantine.c.partition == _in_partition, quarantine.c.sequence > bindparam("after"))
    .order_by(quarantine.c.sequence)
    .limit(_LIMIT)
)


@cache
def select_messages(order: Order) -> Select[Any]:
    """Parameters: incarnation, after, before, limit. Of the fields of MessageRow all but the first, its incarnation."""
    seq = messages.c.seq
    return (
        select(*columns_of(messages, MessageRow)[1:])
        .where(_of_session(messages.c.incarnation), seq > bindparam("after"), seq < bindparam("before"))
        .order_by(seq.asc() if order == "asc" else seq.desc())
        .limit(_LIMIT)
    )


@cache
def select_outcomes(*, behind: bool) -> Select[Any]:
    """Parameters: partition, limit; `scope` and `key` if `behind`."""
    place = (outcomes.c.scope, outcomes.c.key)
    statement = select(*columns_of(outcomes, OutcomeRow)).where(outcomes.c.partition == _in_partition)
    if behind:
        statement = statement.where(
            tuple_(*place) > tuple_(*(bindparam(column.name, type_=column.type) for column in place))
        )
    return statement.order_by(*place).limit(_LIMIT)


@cache
def select_sessions(order: Order, *, of_user: bool, behind: bool) -> Select[Any]:
    """Parameters: partition, limit; `user_id` if `of_user`; the key's `created_at` and `incarnation` if `behind`."""
    statement = select(*columns_of(sessions, SessionRow)).where(_undeleted)
    if of_user:
        statement = statement.where(sessions.c.user_id == bindparam("user_id"))
    place = (sessions.c.created_at, sessions.c.incarnation)
    if behind:
        key = tuple_(*(bindparam(column.name, type_=column.type) for column in place))
        statement = statement.where(tuple_(*place) > key if order == "asc" else tuple_(*place) < key)
    return statement.order_by(*(column.asc() if order == "asc" else column.desc() for column in place)).limit(_LIMIT)
