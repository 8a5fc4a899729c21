"""Statements, compiled once, on the driver's connection; a transaction of them, for what SQL backends share.

The driver is used directly, below SQLAlchemy's engine: its array parameters take all rows of a field in one statement,
and its values need no conversion. Messages, the most there is, go by COPY: it costs this process less than half of what
arrays do, the server two thirds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC
from functools import cache
from operator import attrgetter, itemgetter
from typing import Any, Final

from sqlalchemy import CTE, ClauseElement, Dialect, Select, Table, Text, column, exists, func, select
from sqlalchemy import bindparam as parameter
from sqlalchemy.dialects.postgresql import ARRAY, asyncpg
from sqlalchemy.dialects.postgresql import insert as insert_into
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.types import TypeEngine

from agent_runtime.changes import Touch
from agent_runtime_sql.rows import NAMED
from agent_runtime_sql.tables import UtcTime
from agent_runtime_sql.transaction import Advanced
from agent_runtime_sql.writes import (
    ADVANCE_JOURNAL,
    ADVANCE_PARTITION,
    Columns,
    Rows,
    Write,
    batch_writes,
    touching,
)

from .errors import rejecting
from .pool import Connection, Driver

__all__ = ["WRITES", "PostgresqlTransaction", "insert"]

_DIALECT: Final[Dialect] = asyncpg.dialect()  # type: ignore[no-untyped-call]
_PIECE_ROWS: Final = 200


def insert(table: Table, values: Columns) -> Any:
    """The statement that inserts a row of these values; without any, the one that conflict clauses are put on."""
    statement = insert_into(table)
    return statement.from_select(list(values), select(*values.values())) if values else statement


def _given(table: Table, names: Sequence[str]) -> Columns:
    """One statement for all items: the columns of arrays, unnested."""
    arrays = (parameter(name, type_=ARRAY(_element(table.c[name].type))) for name in names)
    columns = (column(name, table.c[name].type) for name in names)
    return dict(func.unnest(*arrays).table_valued(*columns).render_derived().c)


def _element(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    """The type of a column, for the elements of an array: a collation is the column's affair."""
    own = kind.dialect_impl(_DIALECT)
    return Text() if isinstance(own, Text) else own


def _advance() -> Select[Any]:
    """All that `advance` does in one round trip, and the rows it moved.

    Its parts see what was there before they waited for the partition's row. No harm comes of it: whoever may change
    other rows changes that one first, so that where it still is as expected they are, too.
    """
    moved = ADVANCE_PARTITION.returning(*ADVANCE_PARTITION.table.primary_key).cte("moved")
    along = [statement.where(exists().select_from(moved)) for statement in (ADVANCE_JOURNAL, touching(_given))]
    parts = [moved, *(statement.returning(*statement.table.primary_key).cte() for statement in along)]
    return select(*map(_count, parts))


def _count(part: CTE) -> Any:
    return select(func.count()).select_from(part).scalar_subquery()


WRITES: Final = batch_writes(insert, _given)
_ADVANCE: Final = _advance()
_TOUCHED: Final = Touch.__struct_fields__


class _Compiled:
    """A statement's text, and its parameters in order."""

    def __init__(self, statement: ClauseElement) -> None:
        compiled = statement.compile(dialect=_DIALECT)
        if not isinstance(compiled, SQLCompiler) or compiled.positiontup is None:
            raise TypeError("a statement was expected")
        self.sql: Final = str(compiled)
        self.names: Final[Sequence[str]] = tuple(compiled.positiontup)
        self._fixed = {name: compiled.binds[name].value for name in self.names if not compiled.binds[name].required}
        found = statement.selected_columns if isinstance(statement, Select) else ()
        self.times: Final = [place for place, item in enumerate(found) if isinstance(item.type, UtcTime)]

    def values(self, parameters: Mapping[str, Any]) -> list[Any]:
        found = {**self._fixed, **parameters}
        return [found[name] for name in self.names]


@cache
def _compiled(statement: ClauseElement) -> _Compiled:
    return _Compiled(statement)


class PostgresqlTransaction:
    """See `agent_runtime_sql.transaction.Transaction`. Statements are module constants: each is compiled once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def driver(self) -> Driver:
        """The connection below."""
        return self._connection.driver

    async def fetch(self, statement: Select[Any], parameters: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        compiled = _compiled(statement)
        rows = await self._connection.fetch(compiled.sql, compiled.values(parameters))
        for place in compiled.times:
            _make_aware(rows, place)
        return rows

    async def change(self, statement: UpdateBase, parameters: Mapping[str, Any]) -> int:
        compiled = _compiled(statement)
        return await self._connection.change(compiled.sql, compiled.values(parameters))

    async def advance(self, place: Mapping[str, Any], touched: Sequence[Touch]) -> Advanced:
        arrays = await _arrays("touched", touched, _TOUCHED)
        with rejecting("touched"):
            rows = await self.fetch(_ADVANCE, {**place, **arrays})
        return Advanced(*rows[0])

    async def write(self, field: str, write: Write, items: Sequence[Any], constants: Mapping[str, Any]) -> int:
        if isinstance(write.statement, Rows):
            rows = write.statement
            with rejecting(field):
                return await self._connection.copy(rows.table.name, rows.names, _records(items, rows.names))
        compiled = _compiled(write.statement)
        names = [name for name in compiled.names if name not in constants]
        arrays = await _arrays(field, items, names)
        values = {name: constants[name] for name in compiled.names if name in constants} | arrays
        with rejecting(field):
            return await self._connection.change(compiled.sql, compiled.values(values))


def _make_aware(rows: list[Sequence[Any]], place: int) -> None:
    """The driver takes the first and the last moment of Python for infinities, and gives those back without a zone."""
    for number, time in enumerate([row[place] for row in rows]):
        if time is not None and time.tzinfo is None:
            values = list(rows[number])
            values[place] = time.replace(tzinfo=UTC)
            rows[number] = values


async def _records(items: Sequence[Any], names: Sequence[str]) -> AsyncIterator[tuple[Any, ...]]:
    """The items' values, with the event loop free between pieces of them."""
    row = attrgetter(*names)
    for number, item in enumerate(items, 1):
        yield row(item)
        if number % _PIECE_ROWS == 0:
            await asyncio.sleep(0)


async def _arrays(field: str, items: Sequence[Any], names: Sequence[str]) -> dict[str, list[Any]]:
    """The items' values by column, made in pieces between which the event loop is free."""
    row = _row_getter(field, names)
    arrays: list[list[Any]] = [[] for _ in names]
    for start in range(0, len(items), _PIECE_ROWS):
        if start:
            await asyncio.sleep(0)
        for array, values in zip(arrays, zip(*map(row, items[start : start + _PIECE_ROWS]), strict=True), strict=True):
            array.extend(values)
    return dict(zip(names, arrays, strict=True))


def _row_getter(field: str, names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    named = NAMED.get(field)
    if named is not None:
        return lambda item: _tuple(itemgetter(*names)(named(item)), names)
    getter = attrgetter(*names)
    return getter if len(names) > 1 else lambda item: (getter(item),)


def _tuple(values: Any, names: Sequence[str]) -> tuple[Any, ...]:
    return values if len(names) > 1 else (values,)
