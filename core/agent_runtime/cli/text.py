"""Text of sessions on a terminal: what it holds can't move the cursor, change colours, or hide other text."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Final

import msgspec

__all__ = ["compact", "json_line", "moment", "visible", "visible_lines"]

# Controls (C0 without line feed, DEL, C1), line and paragraph separators, marks that change the direction of text, and
# lone surrogates, of which arguments and file names may consist. Joiners stay: emoji and many scripts need them.
_HIDDEN: Final = "\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_hidden: Final = re.compile(f"[{_HIDDEN}]")
_hidden_or_line_feed: Final = re.compile(f"[\n{_HIDDEN}]")


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def visible(text: str) -> str:
    """The text as one line, with what can't be seen escaped as Python does."""
    return _hidden_or_line_feed.sub(_escape, text)


def visible_lines(text: str) -> str:
    """The text with its line feeds and tabs, and what else can't be seen escaped."""
    return _hidden.sub(_escape, text.expandtabs(4).replace("\r\n", "\n"))


def json_line(value: object) -> str:
    """The value as JSON, with a line feed; the same value, however a terminal takes it."""
    text = msgspec.json.encode(value).decode()
    return _hidden.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def compact(value: Any, chars_max: int = 400) -> str:
    """A JSON value in one line, cut."""
    text = visible(msgspec.json.encode(value).decode())
    return text if len(text) <= chars_max else f"{text[:chars_max]}… ({len(text)} characters)"


def moment(time: datetime) -> str:
    """A time in UTC, to the second."""
    return f"{time:%Y-%m-%d %H:%M:%S}Z"
