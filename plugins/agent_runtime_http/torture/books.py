"""The books of a run: the figures, the sessions there are, and what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final
from uuid import uuid4

import msgspec

from .compare import KINDS, Difference
from .tracked import Tracked

__all__ = ["Books", "Figures"]

_FINDINGS_MAX: Final = 100


class Figures(msgspec.Struct, kw_only=True):
    """What was done, and what came of it. `kills` are counted by where they struck, `failures` are answers and ends of
    servers that there should not be, and `findings` say in a line each what was found (the first hundred).
    """

    seed: int
    cycles: int = 0
    starts: int = 0
    requests: int = 0
    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    compared: int = 0
    lost: int = 0
    doubled: int = 0
    out_of_order: int = 0
    torn: int = 0
    invented: int = 0
    failures: int = 0
    recoveries: int = 0
    changes_recovered: int = 0
    longest_start_s: float = 0.0
    kills: dict[str, int] = {}
    findings: list[str] = []

    @property
    def well(self) -> bool:
        """Whether nothing was found."""
        return not self.failures and not any(getattr(self, _field(kind)) for kind in KINDS)


class Books:
    """What is known. Session ids begin with what no other run has."""

    def __init__(self, seed: int) -> None:
        self.figures: Final = Figures(seed=seed)
        self.sessions: Final[dict[str, Tracked]] = {}
        self._prefix = f"torture-{uuid4().hex[:8]}"

    def new(self, name: str, *, shared: bool = False) -> Tracked:
        """A session that is to be."""
        tracked = Tracked(f"{self._prefix}-{len(self.sessions)}-{name}", shared=shared)
        self.sessions[tracked.session_id] = tracked
        return tracked

    def note(self, session_id: str, differences: Iterable[Difference]) -> None:
        """Write down in what a session differs from what it must be."""
        for kind, text, changes in differences:
            name = _field(kind)
            setattr(self.figures, name, getattr(self.figures, name) + changes)
            self._find(f"cycle {self.figures.cycles + 1}: {kind}: {session_id}: {text}")

    def fail(self, text: str) -> None:
        """Write down what the server should not have done."""
        self.figures.failures += 1
        self._find(f"cycle {self.figures.cycles + 1}: {text}")

    def strangers(self, listed: Sequence[str]) -> list[str]:
        """Which of these sessions are not of this run."""
        return [session_id for session_id in listed if not session_id.startswith(self._prefix)]

    def compare_list(self, listed: Sequence[str]) -> None:
        """Compare the ids that the server lists with those of the sessions that there must be."""
        counts = Counter(listed)
        for session_id, tracked in self.sessions.items():
            count = counts.pop(session_id, 0)
            if tracked.in_doubt or count == tracked.state.alive:
                continue
            if count > 1:
                self.note(session_id, [Difference("doubled", f"it is listed {count} times")])
            else:
                self.note(session_id, [Difference("lost", "it is not listed" if count == 0 else "it is listed again")])
        for session_id in counts:
            self.note(session_id, [Difference("invented", "it is listed, and nobody made it")])

    def _find(self, text: str) -> None:
        if len(self.figures.findings) < _FINDINGS_MAX:
            self.figures.findings.append(text)


def _field(kind: str) -> str:
    return kind.replace(" ", "_")
