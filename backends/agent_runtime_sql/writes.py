"""The statements of `apply` and `purge`: built once, with bound parameters named after the columns.

How a backend hands many rows to its database (executemany, arrays) is its own affair. It compiles the statements
before it has values: SQLAlchemy, given values, keeps the names of an UPDATE's columns for itself. `insert` is the
dialect's insert construct, for the sake of ON CONFLICT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
from sqlalchemy import ColumnElement, Delete, Table, Update, and_, bindparam, delete, exists, select, tuple_, update
from sqlalchemy.sql.dml import UpdateBase

from agent_runtime.changes import Details, Touch
from agent_runtime.rows import (
    ContextRow,
    DocumentRow,
    MessageRow,
    OutcomeRow,
    QuarantineRow,
    SessionRow,
    SwitchRow,
)
from agent_runtime.storage import Fence

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
    "ADVANCE_JOURNAL",
    "ADVANCE_PARTITION",
    "DELETES_OF_SESSION",
    "DELETE_EXPIRED_OUTCOMES",
    "DELETE_MESSAGES",
    "DELETE_PURGE",
    "DELETE_SESSION",
    "SEQ_MAX",
    "Write",
    "batch_writes",
    "fenced",
]

Insert: TypeAlias = Callable[[Table], Any]
SEQ_MAX: Final = 2**63 - 1


class Write(NamedTuple):
    """A statement to run for each item of a field. `exact`: each must hit one row, or the item can never apply."""

    statement: UpdateBase
    exact: bool = False


def fenced(fence: Fence | None = None) -> ColumnElement[bool]:
    """The partition's row, as long as it is held under this fence; without one, parameters named after its fields."""
    partition, epoch, journal_id = (
        bindparam(name) if fence is None else getattr(fence, name) for name in ("partition", "epoch", "journal_id")
    )
    return and_(
        partitions.c.partition == partition,
        partitions.c.epoch == epoch,
        partitions.c.journal_id.is_not_distinct_from(journal_id),
        partitions.c.holder.is_not(None),
    )


ADVANCE_PARTITION: Final = (
    update(partitions).where(fenced(), partitions.c.sequence == bindparam("after")).values(sequence=bindparam("last"))
)
"""Compare and set: the first statement of a batch. One row, or the batch does not follow."""

ADVANCE_JOURNAL: Final = (
    update(journals)
    .where(journals.c.partition == bindparam("partition"), journals.c.journal_id == bindparam("journal_id"))
    .values(sequence=bindparam("last"), previous_generation=journals.c.generation)
)
"""The journal's row follows, and with its first batch a new generation is the only one."""


def _here(table: Table, *names: str) -> ColumnElement[bool]:
    clause = table.c[names[0]] == bindparam(names[0])
    for name in names[1:]:
        clause &= table.c[name] == bindparam(name)
    return clause


def _inserting(insert: Insert, table: Table, kind: type[msgspec.Struct], *more: str) -> Any:
    return insert(table).values({name: bindparam(name) for name in (*more, *kind.__struct_fields__)})


def _upserting(insert: Insert, table: Table, kind: type[msgspec.Struct], *more: str) -> Any:
    statement = _inserting(insert, table, kind, *more)
    changed = {name: statement.excluded[name] for name in kind.__struct_fields__ if not table.c[name].primary_key}
    return statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=changed)


def _session_update(*names: str) -> Update:
    return (
        update(sessions)
        .where(_here(sessions, "incarnation"), sessions.c.deleted_at.is_(None))
        .values({name: bindparam(name) for name in names})
    )


def batch_writes(insert: Insert) -> Mapping[str, tuple[Write, ...]]:
    """The statements for each field of a `Batch`, in the order in which to run them.

    Their parameters are the item's fields (or what `rows.NAMED` makes of it), `partition`, and `deleted_at`: now.
    """
    purge_columns = ("partition", "incarnation", "floor")
    to_purge = insert(purges).values({name: bindparam(name) for name in purge_columns})
    # Nothing is noted for a session without rows below its floor, so that every note stands for a row at least.
    to_purge_below = insert(purges).from_select(
        list(purge_columns),
        select(*(bindparam(name, type_=purges.c[name].type) for name in purge_columns)).where(
            exists().where(_here(messages, "incarnation"), messages.c.seq <= bindparam("floor"))
        ),
    )

    def noted(statement: Any) -> Any:
        return statement.on_conflict_do_update(
            index_elements=list(purges.primary_key), set_={"floor": statement.excluded.floor}
        )

    touched = tuple(name for name in Touch.__struct_fields__ if name != "incarnation")
    return {
        "discharged": (Write(delete(quarantine).where(_here(quarantine, "partition", "sequence"))),),
        "deleted": (Write(_session_update("deleted_at"), exact=True), Write(noted(to_purge))),
        "created": (Write(_inserting(insert, sessions, SessionRow, "partition")),),
        "touched": (Write(_session_update(*touched), exact=True),),
        "edited": (Write(_session_update(*Details.__struct_fields__), exact=True),),
        "cleared": (Write(_session_update("floor"), exact=True), Write(noted(to_purge_below))),
        "contexts": (Write(_upserting(insert, contexts, ContextRow)),),
        "switches": (Write(_inserting(insert, switches, SwitchRow)),),
        "removed": (Write(delete(messages).where(_here(messages, "incarnation", "seq"))),),
        "messages": (Write(_inserting(insert, messages, MessageRow)),),
        "discarded": (Write(delete(documents).where(_here(documents, "incarnation", "collection", "key"))),),
        "documents": (Write(_upserting(insert, documents, DocumentRow)),),
        "outcomes": (Write(_upserting(insert, outcomes, OutcomeRow, "partition")),),
        "quarantined": (Write(_inserting(insert, quarantine, QuarantineRow, "partition")),),
    }


def _limited(table: Table, *conditions: ColumnElement[bool]) -> Delete:
    """Delete at most `limit` rows that share the first column of the key and meet the conditions.

    No database has DELETE … LIMIT. Only the inner query has the conditions, so that the outer one goes by the key.
    """
    first, *others = (column.name for column in table.primary_key)
    chosen = select(*(table.c[name] for name in others)).where(_here(table, first), *conditions)
    return delete(table).where(
        _here(table, first),
        tuple_(*(table.c[name] for name in others)).in_(chosen.limit(bindparam("limit")).correlate(None)),
    )


DELETE_MESSAGES: Final = _limited(messages, messages.c.seq <= bindparam("floor"))
DELETES_OF_SESSION: Final = (
    _limited(switches),
    _limited(documents),
    delete(contexts).where(_here(contexts, "incarnation")),
)
"""What to delete of a session besides its messages, before the session's own row."""

DELETE_EXPIRED_OUTCOMES: Final = _limited(outcomes, outcomes.c.expires_at <= bindparam("now"))
DELETE_SESSION: Final = delete(sessions).where(_here(sessions, "incarnation"))
DELETE_PURGE: Final = delete(purges).where(_here(purges, "partition", "incarnation"))
