"""The statements of `apply` and `purge`: built once, with bound parameters named after the columns.

How a backend hands many rows to its database is its own affair: a statement run for each (`Given` are parameters), or
one for all of them (`Given` are the columns of arrays). It compiles the statements before it has values: SQLAlchemy,
given values, keeps the names of an UPDATE's columns for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    "Rows",
    "Write",
    "batch_writes",
    "fenced",
    "touching",
]

Columns: TypeAlias = Mapping[str, ColumnElement[Any]]
Insert: TypeAlias = Callable[[Table, Columns], Any]
"""The dialect's INSERT of these values into these columns."""
Given: TypeAlias = Callable[[Table, Sequence[str]], Columns]
"""What the items to be written hold for these columns of a table, as their statement sees it."""
SEQ_MAX: Final = 2**63 - 1


class Rows(NamedTuple):
    """Many items to insert into a table as they are: a database may have a shorter way for them than a statement."""

    table: Table
    names: tuple[str, ...]


class Write(NamedTuple):
    """What to run for the items of a field. `exact`: it must hit a row for each, or an item can never apply."""

    statement: UpdateBase | Rows
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


def touching(given: Given) -> Update:
    """The statement for the field `touched` of a `Batch`: it goes along with the two that move the sequence."""
    return _updating(given, *(name for name in Touch.__struct_fields__ if name != "incarnation"))


def _updating(given: Given, *names: str, **constants: ColumnElement[Any]) -> Update:
    """Sessions that are there, by their incarnation."""
    items = given(sessions, ("incarnation", *names))
    return (
        update(sessions)
        .where(sessions.c.incarnation == items["incarnation"], sessions.c.deleted_at.is_(None))
        .values({**{name: items[name] for name in names}, **constants})
    )


def _here(table: Table, *names: str) -> ColumnElement[bool]:
    clause = table.c[names[0]] == bindparam(names[0])
    for name in names[1:]:
        clause &= table.c[name] == bindparam(name)
    return clause


def _constant(table: Table, name: str) -> ColumnElement[Any]:
    return bindparam(name, type_=table.c[name].type)


def batch_writes(insert: Insert, given: Given) -> Mapping[str, tuple[Write, ...]]:
    """The statements for each field of a `Batch` but `touched`, in the order in which to run them.

    What is not an item's (see `given`) is a parameter: `partition`, and `deleted_at`, which is now.
    """

    def values(table: Table, names: Sequence[str]) -> Columns:
        """Of the items; of the partition too, where the table has one."""
        partition = {"partition": _constant(table, "partition")} if "partition" in table.c else {}
        return {**partition, **given(table, names)}

    def found(table: Table, *names: str) -> ColumnElement[bool]:
        return and_(*(table.c[name] == value for name, value in values(table, names).items()))

    def inserting(table: Table, kind: type[msgspec.Struct]) -> Any:
        return insert(table, values(table, kind.__struct_fields__))

    def replacing(statement: Any, table: Table, names: Sequence[str]) -> Any:
        changed = {name: statement.excluded[name] for name in names if not table.c[name].primary_key}
        return statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=changed)

    def upserting(table: Table, kind: type[msgspec.Struct]) -> Any:
        return replacing(inserting(table, kind), table, kind.__struct_fields__)

    to_purge = values(purges, ("incarnation", "floor"))
    # Nothing is noted for a session without rows below its floor, so that every note stands for a row at least.
    below = exists().where(messages.c.incarnation == to_purge["incarnation"], messages.c.seq <= to_purge["floor"])
    note = insert(purges, to_purge)
    note_below = insert(purges, {}).from_select(list(to_purge), select(*to_purge.values()).where(below))
    replayed = given(journals, ("journal_id", "sequence"))
    return {
        "discharged": (Write(delete(quarantine).where(found(quarantine, "sequence"))),),
        "deleted": (
            Write(_updating(given, deleted_at=_constant(sessions, "deleted_at")), exact=True),
            Write(replacing(note, purges, ["floor"])),
        ),
        "created": (Write(inserting(sessions, SessionRow)),),
        "edited": (Write(_updating(given, *Details.__struct_fields__), exact=True),),
        "cleared": (Write(_updating(given, "floor"), exact=True), Write(replacing(note_below, purges, ["floor"]))),
        "contexts": (Write(upserting(contexts, ContextRow)),),
        "switches": (Write(inserting(switches, SwitchRow)),),
        "removed": (Write(delete(messages).where(found(messages, "incarnation", "seq"))),),
        "messages": (Write(Rows(messages, MessageRow.__struct_fields__)),),
        "discarded": (Write(delete(documents).where(found(documents, "incarnation", "collection", "key"))),),
        "documents": (Write(upserting(documents, DocumentRow)),),
        "outcomes": (Write(upserting(outcomes, OutcomeRow)),),
        "quarantined": (Write(inserting(quarantine, QuarantineRow)),),
        "replayed": (
            Write(
                update(journals)
                .where(
                    journals.c.partition == _constant(journals, "partition"),
                    journals.c.journal_id == replayed["journal_id"],
                )
                .values(sequence=replayed["sequence"])
            ),
        ),
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
