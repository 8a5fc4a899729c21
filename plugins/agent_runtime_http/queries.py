"""The query of a URL: every parameter is known, given once, and of its type, or the request is refused by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias, get_args
from urllib.parse import parse_qsl

from agent_runtime.records import Durability, Order
from agent_runtime.session import PAGE_ITEMS_MAX
from agent_runtime.validation import ID_CHARS_MAX, SEQ_MAX

from .problems import Fault, Refusal, invalid

__all__ = [
    "AFTER",
    "CURSOR",
    "DURABILITY",
    "ID",
    "KEY_CURSOR",
    "USER_ID",
    "Parameter",
    "Parameters",
    "limit",
    "order",
    "read_query",
]


class Parameter(NamedTuple):
    """A parameter of a query: its type, what it says, and its JSON Schema beside the type, which the runtime checks.

    `name` is that of the schema, where several operations share it.
    """

    kind: type[str] | type[int]
    description: str
    schema: Mapping[str, Any]
    name: str | None = None


Parameters: TypeAlias = Mapping[str, Parameter]
"""The parameters that an operation takes, by name."""

ID: Final[Mapping[str, Any]] = {
    "minLength": 1,
    "maxLength": ID_CHARS_MAX,
    "pattern": r"^(?!\.{1,2}$)[^/\u0000-\u001f\u007f-\u009f]+$",
}
"""An id, a collection or a key."""
DURABILITY: Final = Parameter(
    str,
    "The level that the answer waits for: what the change then survives. Without it, the configured one.",
    {"enum": list(get_args(Durability))},
    "Durability",
)
AFTER: Final = Parameter(int, "The seq to begin behind: `next` of the page before.", {"minimum": 0, "maximum": SEQ_MAX})
CURSOR: Final = Parameter(str, "Where to begin: `next` of the page before.", {"pattern": "^[A-Za-z0-9_-]+$"})
KEY_CURSOR: Final = Parameter(str, "The key to begin behind: `next` of the page before.", ID)
USER_ID: Final = Parameter(str, "Of this user only.", ID)


def limit(default: int) -> Parameter:
    """How long a page may be."""
    schema = {"minimum": 1, "maximum": PAGE_ITEMS_MAX, "default": default}
    return Parameter(int, "How many to return at most.", schema)


def order(default: Order) -> Parameter:
    """In which order to list."""
    text = f"Which end of the list comes first; {default!r} unless given."
    return Parameter(str, text, {"enum": list(get_args(Order))}, "Order")


_is_int: Final = re.compile(r"-?[0-9]{1,18}").fullmatch


def read_query(query: bytes, parameters: Parameters) -> dict[str, Any]:
    """The values of the parameters that are given.

    Raises:
        Refusal: with every fault.
    """
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError:
        raise Refusal("malformed", "the query is not percent-encoded UTF-8, or has more than 100 parameters") from None
    values: dict[str, Any] = {}
    faults: list[Fault] = []
    for name, value in pairs:
        parameter = parameters.get(name)
        if parameter is None:
            known = ", ".join(parameters) or "none"
            faults.append(Fault(f"?{name[:100]}", f"is not a parameter here; there are: {known}"))
        elif name in values:
            faults.append(Fault(f"?{name}", "is given twice"))
        elif parameter.kind is int and not _is_int(value):
            faults.append(Fault(f"?{name}", "must be a whole number"))
        else:
            values[name] = parameter.kind(value)
    if faults:
        raise invalid(faults)
    return values
