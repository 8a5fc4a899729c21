"""Between the structs of the core and the rows of a database: which columns, in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from sqlalchemy import Column, Table

__all__ = ["NAMED", "columns_of"]


def columns_of(table: Table, kind: type[msgspec.Struct]) -> list[Column[Any]]:
    """The columns of `table` for the fields of `kind`, in their order: so selected they make one, `kind(*row)`."""
    return [table.c[name] for name in kind.__struct_fields__]


NAMED: Final[Mapping[str, Callable[[Any], dict[str, Any]]]] = {
    "discharged": lambda sequence: {"sequence": sequence},
    "deleted": lambda incarnation: {"incarnation": incarnation, "floor": None},
    "edited": lambda pair: {"incarnation": pair[0], **msgspec.structs.asdict(pair[1])},
    "cleared": lambda pair: {"incarnation": pair[0], "floor": pair[1]},
    "removed": lambda pair: {"incarnation": pair[0], "seq": pair[1]},
    "replayed": lambda pair: {"journal_id": pair[0], "sequence": pair[1]},
    "discarded": lambda triple: dict(zip(("incarnation", "collection", "key"), triple, strict=True)),
}
"""Fields of a `Batch` whose items are no structs, each with what gives an item's values the names of their columns."""
