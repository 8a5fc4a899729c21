"""A transaction, for the functions that SQL backends share.

Its statements run on the driver's connection, below SQLAlchemy's: whose cursor takes four changes of threads for what
is one here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

import aiosqlite
from sqlalchemy import Select, Table
from sqlalchemy.dialects.sqlite import insert as insert_into
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.dml import UpdateBase

from agent_runtime.changes import Touch
from agent_runtime_sql.rows import NAMED
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
from .prepared import Prepared, PreparedRows, Selected, parameters

__all__ = ["WRITES", "SqliteTransaction", "insert"]


def insert(table: Table, values: Columns) -> Any:
    """The statement that inserts a row of these values; without any, the one that conflict clauses are put on."""
    statement = insert_into(table)
    return statement.values(dict(values)) if values else statement


# A statement is run for each item, whose values are its parameters.
WRITES: Final = batch_writes(insert, parameters)
_TOUCH: Final = Write(touching(parameters))


@cache
def _prepared(statement: UpdateBase) -> Prepared:
    return Prepared(statement)


@cache
def _prepared_for(field: str, statement: UpdateBase | Rows) -> Prepared | PreparedRows:
    return PreparedRows(*statement) if isinstance(statement, Rows) else Prepared(statement, NAMED.get(field))


@cache
def _selected(statement: Select[Any]) -> Selected:
    return Selected(statement)


class SqliteTransaction:
    """See `agent_runtime_sql.transaction.Transaction`. Statements are module constants: each is compiled once."""

    def __init__(self, connection: AsyncConnection, driver: aiosqlite.Connection) -> None:
        self.connection: Final = connection
        self._driver = driver

    async def fetch(self, statement: Select[Any], parameters: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        return await _selected(statement).run(self._driver, parameters)

    async def change(self, statement: UpdateBase, parameters: Mapping[str, Any]) -> int:
        return await _prepared(statement).run(self._driver, [parameters], {})

    async def advance(self, place: Mapping[str, Any], touched: Sequence[Touch]) -> Advanced:
        if not (partition := await self.change(ADVANCE_PARTITION, place)):
            return Advanced(partition)
        journal = await self.change(ADVANCE_JOURNAL, place)
        return Advanced(partition, journal, await self.write("touched", _TOUCH, touched, {}) if touched else 0)

    async def write(self, field: str, write: Write, items: Sequence[Any], constants: Mapping[str, Any]) -> int:
        with rejecting(field):
            return await _prepared_for(field, write.statement).run(self._driver, items, constants)
