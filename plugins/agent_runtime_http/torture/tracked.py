"""A session as the connections know it: what is acknowledged of it, and what may have happened besides.

A connection makes one call at a time on its own sessions, so after a crash at most one outcome is unknown: the session
is as it was before that call, or as it is after. In the common session any of the calls under way may have happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Final
from urllib.parse import quote

from .calls import (
    Append,
    Batch,
    Call,
    Clear,
    Create,
    Delete,
    DiscardDocument,
    PatchContext,
    PatchSession,
    Pop,
    PutDocument,
    Switch,
    ToolResult,
)
from .compare import Difference, differences
from .state import State, Wrong, tag_of

__all__ = ["Tracked", "next_call"]

_TEXT: Final = 'one word follows another; ☃ and \\ and " as well. ' * 20
_KEYS: Final = 6
_BATCH_MAX: Final = 5


class Tracked:
    """A session, and what is known of it. `in_doubt`: it must be read back before it is used again.

    `shared`: several connections append to it, and nothing else is done with it.
    """

    def __init__(self, session_id: str, *, shared: bool = False) -> None:
        self.session_id: Final = session_id
        self.path: Final = f"/v1/sessions/{quote(session_id, safe='')}"
        self.shared: Final = shared
        self.state = State()
        self.pending: list[Call] = []
        self.in_doubt = False
        self.settled = True
        self._numbers = 0

    def number(self) -> int:
        """The number of the next call."""
        self._numbers += 1
        self.settled = False
        return self._numbers

    def target(self, call: Call) -> str:
        """The path of a call on it."""
        return "/v1/sessions" if isinstance(call, Create) else self.path + call.path

    def acknowledge(self, call: Call, answer: Any) -> list[Difference]:
        """The call was carried out, and answered. Returns what is wrong with the answer."""
        try:
            call.apply(self.state, answer)
        except Wrong as wrong:
            self.in_doubt = True
            return [Difference(wrong.kind, str(wrong))]
        finally:
            if self.shared:
                self.state.next_seq = 0
        return []

    def leave_open(self, call: Call) -> None:
        """Nobody knows whether the call was carried out."""
        self.pending.append(call)
        self.in_doubt = True

    def compare(self, found: State) -> list[Difference]:
        """In what the session as it was found differs from all that it may be; from now on it is as it was found."""
        best: tuple[int, State, list[Difference]] | None = None
        for candidate in self._candidates(found):
            told = differences(candidate, found)
            if self.shared:
                told += _gaps(found)
            count = sum(difference.changes for difference in told)
            if best is None or count < best[0]:
                best = (count, candidate, told)
        if best is None:
            raise RuntimeError("a session is always something")
        _, candidate, told = best
        found.removed, found.former = candidate.removed, candidate.former
        found.next_seq = 0 if told or self.shared else candidate.next_seq
        self.state = found
        self.pending.clear()
        self.in_doubt = False
        self.settled = not found.alive
        return told

    def _candidates(self, found: State) -> Iterator[State]:
        """What the session may be: with and without the calls whose outcome is unknown."""
        if not self.shared or not self.state.alive:
            for call in self.pending:
                after = self.state.copy()
                call.apply(after, None)
                yield after
            yield self.state
            return
        state = self.state.copy()
        places = {tag_of(message): message["seq"] for message in found.messages}
        for call in self.pending:
            if any(tag in places for tag in call.wrote()):
                call.apply(state, None)
        state.messages.sort(key=lambda message: message.get("seq", places.get(tag_of(message), 0)))
        yield state


def _gaps(found: State) -> list[Difference]:
    """Nothing is ever removed from a common session, so its messages are numbered without a gap."""
    seqs = [message["seq"] for message in found.messages]
    missing = sorted(set(range(1, max(seqs, default=0) + 1)).difference(seqs))
    return [Difference("lost", f"seq {missing[0]} is missing, and is not the last", len(missing))] if missing else []


# How often each call is made.
_COMMON: Final[dict[type[Call], float]] = {Append: 6, Batch: 2, ToolResult: 2}
_OWN: Final[dict[type[Call], float]] = {
    Append: 44,
    Batch: 12,
    ToolResult: 8,
    Switch: 6,
    PutDocument: 8,
    DiscardDocument: 4,
    PatchSession: 4,
    PatchContext: 4,
    Pop: 6,
    Clear: 1.5,
    Delete: 2.5,
}


def next_call(tracked: Tracked, random: Random) -> Call:
    """What to do next with a session that is not in doubt."""
    number, text = tracked.number(), _TEXT[: random.randint(0, len(_TEXT)) if random.random() < 0.2 else 40]
    if not tracked.state.alive:
        return Create(number, text, session_id=tracked.session_id)
    kinds = _COMMON if tracked.shared else _OWN
    kind = random.choices([*kinds], [*kinds.values()])[0]
    if kind is Append:
        return Append(number, text, tool=random.random() < 0.2)
    if kind is Batch:
        return Batch(number, text, size=random.randint(2, _BATCH_MAX))
    if issubclass(kind, PutDocument):
        return kind(number, text, key=f"k{random.randrange(_KEYS)}")
    return kind(number, text)
