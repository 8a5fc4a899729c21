"""An open transaction, as far as the functions of this package use one: what a backend has to give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sqlalchemy import Select
from sqlalchemy.sql.dml import UpdateBase

from .writes import Write

__all__ = ["Transaction"]


class Transaction(Protocol):
    """Runs statements whose parameters have names. Those that a statement has no use for are left out."""

    async def fetch(self, statement: Select[Any], parameters: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """The rows that the statement finds, all of them."""

    async def change(self, statement: UpdateBase, parameters: Mapping[str, Any]) -> int:
        """Run the statement. Returns the number of rows that it changed."""

    async def write(self, field: str, write: Write, items: Sequence[Any], constants: Mapping[str, Any]) -> int:
        """Write the items of a field of a batch. Returns the number of rows that it changed, all items together.

        Raises ChangeRejected, naming the field, when the database refuses one of them.
        """
