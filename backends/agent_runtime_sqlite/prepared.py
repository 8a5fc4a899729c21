"""Statements compiled once, so that writing or reading a row costs the event loop one short tuple.

Measured, for 1,000 messages: SQLAlchemy's `execute(statement, [dicts])` with the same columns holds the loop for 3.5 ms
in one go, as it makes a second dict and a tuple of each row and converts its time. Here msgspec turns a struct into
plain values, times included, and an itemgetter orders them: 1.2 ms, in pieces, the longest of which is 0.3 ms with all
that is done about the list; where the struct has all that a statement takes, its attributes are taken as they are: 0.8
ms. The rest is the work of the driver's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import chain, islice
from operator import attrgetter, itemgetter
from typing import Any, Final

import aiosqlite
import msgspec
from sqlalchemy import BindParameter, Select, Table, bindparam
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.dml import UpdateBase

from agent_runtime_sql.tables import UtcTime, fixed_time_text, time_text

__all__ = ["Prepared", "PreparedRows", "Selected", "parameters"]

_DIALECT: Final = sqlite.dialect()
_PIECE_ROWS: Final = 500
_STEP_ROWS: Final = 100


class Prepared:
    """An INSERT, UPDATE or DELETE with parameters."""

    def __init__(self, statement: UpdateBase, named: Callable[[Any], Mapping[str, Any]] | None = None) -> None:
        """`named` makes a mapping of an item, if items are neither structs nor mappings."""
        compiled = statement.compile(dialect=_DIALECT)
        names = compiled.positiontup if isinstance(compiled, SQLCompiler) else None
        if not names:
            raise TypeError("a statement with parameters was expected")
        self.sql = str(compiled)
        self._names = frozenset(names)
        self._fixed = {name: bind.value for name, bind in compiled.binds.items() if name in names and not bind.required}
        # Of one name both would give a value, not a tuple.
        self._ordered = itemgetter(*names) if len(names) > 1 else lambda values: (values[names[0]],)
        self._attributes = attrgetter(*names) if len(names) > 1 else lambda item: (getattr(item, names[0]),)
        self._times = [
            (place, name) for place, name in enumerate(names) if isinstance(compiled.binds[name].type, UtcTime)
        ]
        self._named = named

    async def run(self, driver: aiosqlite.Connection, items: Iterable[Any], constants: Mapping[str, Any]) -> int:
        """Run the statement for each item, in one executemany. Returns the number of rows that it changed.

        Parameters are taken, by name, from `constants` and from the item.
        """
        return await _executed(driver, self.sql, await self.rows(items, constants))

    async def rows(self, items: Iterable[Any], constants: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The parameters of the statement for each item."""
        used = {name: value for name, value in constants.items() if name in self._names}
        used = msgspec.to_builtins({**self._fixed, **used}, builtin_types=(bytes,))
        rows: list[tuple[Any, ...]] = []
        source = iter(items)
        while piece := list(islice(source, _PIECE_ROWS)):
            if used or not isinstance(piece[0], msgspec.Struct):
                rows += [self._row(item, used) for item in piece]
            else:
                rows += map(self._row_of_struct, piece)
            await asyncio.sleep(0)
        return rows

    def _row(self, item: Any, constants: Mapping[str, Any]) -> tuple[Any, ...]:
        values = msgspec.to_builtins(self._named(item) if self._named else item, builtin_types=(bytes,))
        values.update(constants)
        for _, name in self._times:
            if (text := values[name]) is not None:
                values[name] = fixed_time_text(text)
        ordered: tuple[Any, ...] = self._ordered(values)
        return ordered

    def _row_of_struct(self, item: msgspec.Struct) -> tuple[Any, ...]:
        """As `_row`, at half its time, where the struct has all that the statement takes."""
        values: tuple[Any, ...] = self._attributes(item)
        if not self._times:
            return values
        row = list(values)
        for place, _ in self._times:
            if row[place] is not None:
                row[place] = time_text(row[place])
        return tuple(row)


class PreparedRows:
    """An INSERT of many structs, that many rows in one step of the database.

    The driver lets go of the interpreter's lock for each step, and then has to have it again: from an event loop that
    works, which at one row a step lost a tenth of its time to that.
    """

    def __init__(self, table: Table, names: Sequence[str]) -> None:
        self._one = Prepared(insert(table).values(parameters(table, names)))
        many = insert(table).values([parameters(table, names, f"_{number}") for number in range(_STEP_ROWS)])
        self._many_sql = str(many.compile(dialect=_DIALECT))

    async def run(self, driver: aiosqlite.Connection, items: Iterable[Any], constants: Mapping[str, Any]) -> int:
        """As `Prepared.run`."""
        rows = await self._one.rows(items, constants)
        whole = len(rows) // _STEP_ROWS * _STEP_ROWS
        steps = [tuple(chain.from_iterable(rows[start : start + _STEP_ROWS])) for start in range(0, whole, _STEP_ROWS)]
        count = 0
        for sql, left in ((self._many_sql, steps), (self._one.sql, rows[whole:])):
            if left:
                count += await _executed(driver, sql, left)
        return count


def parameters(table: Table, names: Sequence[str], suffix: str = "") -> dict[str, BindParameter[Any]]:
    """A parameter for each of these columns, named after it."""
    return {name: bindparam(name + suffix, type_=table.c[name].type) for name in names}


async def _executed(driver: aiosqlite.Connection, sql: str, rows: Iterable[Sequence[Any]]) -> int:
    # Not closed: it is spent, and to say so to the driver's thread takes as long as a turn of a busy loop.
    return (await driver.executemany(sql, rows)).rowcount


class Selected:
    """A SELECT."""

    def __init__(self, statement: Select[Any]) -> None:
        compiled = statement.compile(dialect=_DIALECT)
        if not isinstance(compiled, SQLCompiler) or compiled.positiontup is None:
            raise TypeError("a statement was expected")
        self._sql = str(compiled)
        self._names = tuple(compiled.positiontup)
        self._fixed = {name: compiled.binds[name].value for name in self._names if not compiled.binds[name].required}
        self._times = [place for place, it in enumerate(statement.selected_columns) if isinstance(it.type, UtcTime)]

    async def run(self, driver: aiosqlite.Connection, parameters: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """The rows that it finds."""
        given = {**self._fixed, **parameters}
        values = (given[name] for name in self._names)
        found = await driver.execute_fetchall(
            self._sql, [time_text(value) if isinstance(value, datetime) else value for value in values]
        )
        rows: list[Sequence[Any]] = list(found)
        if self._times:
            for start in range(0, len(rows), _PIECE_ROWS):
                rows[start : start + _PIECE_ROWS] = map(self._read, rows[start : start + _PIECE_ROWS])
                await asyncio.sleep(0)
        return rows

    def _read(self, row: Sequence[Any]) -> Sequence[Any]:
        values = list(row)
        for place in self._times:
            if (text := values[place]) is not None:
                values[place] = datetime.fromisoformat(text)
        return values
