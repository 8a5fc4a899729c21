"""The header `Idempotency-Key`: who sends it with a write may send that again, and has the first answer again.

It is read as draft-ietf-httpapi-idempotency-key-header-07 has it, a string of RFC 9651 (section 3.3.3) whose parameters
mean nothing; and without the quotes too, as most clients send it. `"a"` and `a` are one key.
"""

from __future__ import annotations

import re
from typing import Final

from starlette.types import Scope

from .problems import Fault, Refusal, invalid

__all__ = ["HEADER", "KEY", "KEYED", "PATTERN", "read_key"]

HEADER: Final = "Idempotency-Key"
KEY: Final = b"idempotency-key"
"""As requests have it."""
KEYED: Final = frozenset({"POST", "PATCH"})
"""The methods of a write that take it. To do `PUT` or `DELETE` twice is to do it once."""

_CHARS_MAX: Final = 255
_BARE: Final = r"[!#-+\--:<-\[\]-~]"
_QUOTED: Final = r'(?:[ !#-\[\]-~]|\\["\\])'
_PARAMETERS: Final = r" *(?:;[ -~]*)?"
_COUNT: Final = f"{{1,{_CHARS_MAX}}}"
PATTERN: Final = f'^(?:{_BARE}{_COUNT}|"{_QUOTED}{_COUNT}"{_PARAMETERS})$'
"""What is accepted, as a regular expression."""

_quoted: Final = re.compile(f'"({_QUOTED}*)"{_PARAMETERS}'.encode()).fullmatch
_bare: Final = re.compile(f"{_BARE}*".encode()).fullmatch
_escaped: Final = re.compile(r"\\(.)")


def read_key(scope: Scope) -> str | None:
    """The key of a request; None if it has none.

    Raises:
        Refusal: it is given twice, is no string, or has not 1 to 255 characters.
    """
    given: bytes | None = None
    for name, value in scope["headers"]:
        if name == KEY:
            if given is not None:
                raise _malformed("is given twice")
            given = value
    if given is None:
        return None
    given = given.strip(b" \t")
    if quoted := _quoted(given):
        key = _escaped.sub(r"\1", quoted[1].decode("ascii"))
    elif _bare(given):
        key = given.decode("ascii")
    else:
        raise _malformed('must be text in double quotes, of printable ASCII characters, with \\ before each " and \\')
    if not 1 <= len(key) <= _CHARS_MAX:
        raise invalid([Fault(HEADER, f"must have 1 to {_CHARS_MAX} characters")])
    return key


def _malformed(problem: str) -> Refusal:
    return Refusal("malformed", f"{HEADER} {problem}", [Fault(HEADER, problem)])
