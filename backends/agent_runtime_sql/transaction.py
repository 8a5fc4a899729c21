"""An open transaction, as far as the functions of this package use one: what a backend has to give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Select
from sqlalchemy.sql.dml import UpdateBase

from agent_runtime.changes import Touch

from .writes import Write

__all__ = ["Advanced", "Transaction"]


class Advanced(NamedTuple):
    """How many rows were moved."""

    partition: int
    journal: int = 0
    touched: int = 0


class Transaction(Protocol):
    """Runs statements whose parameters have names. Those that a statement has no use for are left out."""

    async def fetch(self, statement: Select[Any], parameters: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """The rows that the statement finds, all of them."""

    async def change(self, statement: UpdateBase, parameters: Mapping[str, Any]) -> int:
        """Run the statement. Returns the number of rows that it changed."""

    async def advance(self, place: Mapping[str, Any], touched: Sequence[Touch]) -> Advanced:
        """Begin a batch: compare and set (`writes.ADVANCE_PARTITION`) and, where that hits its row, move along the
        journal's (`writes.ADVANCE_JOURNAL`) and the sessions touched (`writes.touching`).

        Raises ChangeRejected, naming `touched`, when the database refuses one of them.
        """

    async def write(self, field: str, write: Write, items: Sequence[Any], constants: Mapping[str, Any]) -> int:
        """Write the items of a field of a batch. Returns the number of rows that it changed, all items together.

        Raises ChangeRejected, naming the field, when the database refuses one of them.
        """
