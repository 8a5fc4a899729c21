"""What schemathesis is told of the surface: why a request may be refused that no schema forbids."""

from __future__ import annotations

import re
from typing import Any

import schemathesis
from schemathesis.generation import GenerationMode

REASONS = re.compile(
    "is not one that a list gave"  # a cursor
    "|is given twice: here and as a key"  # of `extra`, and of the message
    "|must be an int, not float"  # 1.0 is an integer to JSON Schema
    "|must lie in the years 1970 to 9999"
)


@schemathesis.check
def refused_for_a_reason(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    """What the document allows is refused only for what it can't say."""
    if case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE and response.status_code == 422:
        assert REASONS.search(response.json()["detail"]), f"refused, though the document allows it: {response.text}"
