"""Lengths of time as text, as Prometheus writes them: `30d`, `12h`, `1d12h`. Whole numbers of w, d, h, m and s."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

__all__ = ["LENGTH_MAX", "duration"]

_DURATION: Final = re.compile(r"(?:(\d+)w)?(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)
_UNITS: Final = ("weeks", "days", "hours", "minutes", "seconds")
LENGTH_MAX: Final = timedelta(days=36_500)


def duration(text: str) -> timedelta:
    """The length of time.

    Raises:
        ValueError: it is none, nothing, or more than a hundred years.
    """
    match = _DURATION.fullmatch(text)
    if match is None or len(text) > 40:
        raise ValueError("must be a length of time such as 30d, 12h or 1d12h: numbers of w, d, h, m, s, in that order")
    numbers = {unit: int(number) for unit, number in zip(_UNITS, match.groups(), strict=True) if number is not None}
    try:
        length = timedelta(**numbers)
    except OverflowError:
        length = timedelta.max
    if not timedelta(0) < length <= LENGTH_MAX:
        raise ValueError("must be more than nothing, and at most a hundred years (36500d)")
    return length
