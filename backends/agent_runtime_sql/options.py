"""Options of `storage.options`, or of a URL's query, checked one by one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import msgspec

from agent_runtime.errors import InvalidInput

__all__ = ["known_options"]


def known_options(
    where: str, options: Mapping[str, Any], kinds: Mapping[str, Any], database: str, *, strict: bool
) -> dict[str, Any]:
    """`options` as the types of `kinds`; `where` and `database` are for messages. Not strict: numbers may be text.

    Raises InvalidInput for one that has no such type, or is not known.
    """
    known = {}
    for name, value in options.items():
        if name not in kinds:
            nearest = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)[0]
            raise InvalidInput(f"{where}.{name}", f"{database} has no such option; the nearest is {nearest}")
        try:
            known[name] = msgspec.convert(value, kinds[name], strict=strict)
        except msgspec.ValidationError as exc:
            raise InvalidInput(f"{where}.{name}", str(exc)) from None
    return known
