"""The query of a URL: every parameter is known, given once, and of its type, or the request is refused by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qsl

from .problems import Fault, Refusal, invalid

__all__ = ["DURABILITY", "Parameters", "read_query"]

Parameters: TypeAlias = Mapping[str, type[str] | type[int]]
"""The parameters that an operation takes, each with its type."""

DURABILITY: Final[Parameters] = {"durability": str}
"""What every write takes."""

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
        kind = parameters.get(name)
        if kind is None:
            known = ", ".join(parameters) or "none"
            faults.append(Fault(f"?{name[:100]}", f"is not a parameter here; there are: {known}"))
        elif name in values:
            faults.append(Fault(f"?{name}", "is given twice"))
        elif kind is int and not _is_int(value):
            faults.append(Fault(f"?{name}", "must be a whole number"))
        else:
            values[name] = kind(value)
    if faults:
        raise invalid(faults)
    return values
