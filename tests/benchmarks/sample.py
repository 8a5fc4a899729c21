"""Real conversations to measure with: the sample of tests/data."""

from __future__ import annotations

import gzip
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

__all__ = ["Chat", "median_message", "messages"]

Chat: TypeAlias = dict[str, Any]
_FILE = Path(__file__).parent.parent / "data" / "airline-sample.jsonl.gz"


@cache
def _all_messages() -> list[Chat]:
    with gzip.open(_FILE) as lines:
        return [message for line in lines for message in msgspec.json.decode(line)["messages"]]


def messages(count: int) -> list[Chat]:
    """That many messages in chat format, in the order of the conversations, from the start again after the last."""
    return list(islice(cycle(_all_messages()), count))


@cache
def median_message() -> Chat:
    """The message of median length as JSON: a call of a tool."""
    ordered = sorted(_all_messages(), key=lambda message: len(msgspec.json.encode(message)))
    return ordered[len(ordered) // 2]
