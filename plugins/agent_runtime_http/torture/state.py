"""What a session must be like."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, Final

import msgspec

__all__ = ["Item", "State", "Wrong", "covers", "tag_of"]

_FIRST_AGENT: Final = "orchestrator"
Item = dict[str, Any]


class Wrong(Exception):
    """The answer is not the one that the calls before it lead to. `kind` is what the difference amounts to."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class State(msgspec.Struct):
    """What is acknowledged of a session. Items are as the server shows them; of those whose answer was never seen there
    is only what was sent. `next_seq` 0: nobody knows. `removed` has the tags of messages that were removed, `former`
    the incarnations that were deleted.
    """

    alive: bool = False
    born: Item = {}
    title: str | None = None
    metadata: Item = {}
    agent: str = _FIRST_AGENT
    context: Item = {}
    switches: list[Item] = []
    messages: list[Item] = []
    next_seq: int = 1
    documents: dict[str, Any] = {}
    removed: set[str] = set()
    former: set[str] = set()

    def copy(self) -> State:
        """Another one; the items are shared, nobody changes them."""
        copied = copy(self)
        for name in self.__struct_fields__:
            if isinstance(value := getattr(self, name), list | dict | set):
                setattr(copied, name, value.copy())
        return copied

    def end(self) -> None:
        """The session is deleted."""
        former = self.former | {self.born["incarnation"]} if self.born else self.former
        new = State(former=former)
        for name in self.__struct_fields__:
            setattr(self, name, getattr(new, name))

    def append(self, sent: Sequence[Item], shown: Sequence[Item] | None) -> None:
        """Messages at the end."""
        if shown is not None and len(shown) != len(sent):
            raise Wrong("torn", f"{len(sent)} message(s) were appended, {len(shown)} were acknowledged")
        for index, message in enumerate(sent):
            item = message if shown is None else shown[index]
            if not covers(message, item):
                raise Wrong("invented", f"the message {tag_of(message)} was acknowledged as another one")
            if shown is None:
                item = {**item, "seq": self.next_seq} if self.next_seq else item
            elif self.next_seq and item["seq"] != self.next_seq:
                raise Wrong("out of order", f"seq {item['seq']} was given where {self.next_seq} comes next")
            self.messages.append(item)
            if self.next_seq or shown is not None:
                self.next_seq = item.get("seq", self.next_seq) + 1


def covers(expected: Item, found: Item) -> bool:
    """Whether what was found has everything that is expected."""
    return all(name in found and found[name] == value for name, value in expected.items())


def tag_of(item: Item) -> str:
    """What tells a message, or a hand-over, from all others."""
    text = item.get("content", item.get("reason"))
    return text.partition(" ")[0] if isinstance(text, str) else "(untagged)"
