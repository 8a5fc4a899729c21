"""Between the structs of the core and the rows of a database: which columns, in which order, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Final, TypeVar

import msgspec
from sqlalchemy import Column, Table

__all__ = ["NAMED", "columns_of", "maker_of", "struct_of"]

Item = TypeVar("Item", bound=msgspec.Struct)


def columns_of(table: Table, kind: type[msgspec.Struct]) -> list[Column[Any]]:
    """The columns of `table` for the fields of `kind`, in their order: what `struct_of` wants selected."""
    return [table.c[name] for name in kind.__struct_fields__]


@cache
def maker_of(kind: type[Item]) -> Callable[..., Item]:
    """What makes a struct of the values of its fields, in their order.

    Written out as a person would, like the methods of a dataclass: a message takes 0.3 µs, with a dict of keywords 1.7.
    """
    names = kind.__struct_fields__
    keywords = ", ".join(f"{name}={name}" for name in names)
    source = f"lambda {', '.join(names)}: kind({keywords})"
    maker: Callable[..., Item] = eval(source, {"kind": kind})  # noqa: S307 - of the names of our own fields
    return maker


def struct_of(kind: type[Item], values: Sequence[Any]) -> Item:
    """The struct whose fields have these values."""
    item: Item = maker_of(kind)(*values)
    return item


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
