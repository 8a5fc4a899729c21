"""How a command ends: its exit code, and what it says on standard error when it failed.

| code | meaning |
|---|---|
| 0 | done |
| 1 | failed: one line that names the input and the way out (a configuration: a line a fault) |
| 2 | called in a wrong way |
| 3 | another process holds the lease, or has taken it over; the line names it |
| 4 | stopped with changes that could not be stored |
| 130, 143 | interrupted by Ctrl-C, by SIGTERM; what was changed before is stored |
"""

from __future__ import annotations

import sys
import traceback
from typing import Final

from ..errors import AgentRuntimeError, LeaseHeld, LeaseLost
from .logs import told

__all__ = ["FAILED", "HELD", "LEFT", "SIGNALLED", "USAGE", "Failure", "failure_of", "tell"]

FAILED: Final = 1
USAGE: Final = 2
HELD: Final = 3
LEFT: Final = 4
SIGNALLED: Final = 128
"""To be added to the number of the signal."""


class Failure(Exception):
    """Ends the command with these lines and this exit code."""

    def __init__(self, *lines: str, code: int = FAILED) -> None:
        super().__init__(*lines)
        self.lines = lines
        self.code = code


def failure_of(error: BaseException) -> Failure:
    """The failure that an exception amounts to."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, Failure):
        return error
    if isinstance(error, AgentRuntimeError):
        notes = [note.removeprefix("agent-runtime: ") for note in getattr(error, "__notes__", ())]
        lines = [*str(error).splitlines(), *notes]
        return Failure(*lines, code=HELD if isinstance(error, (LeaseHeld, LeaseLost)) else FAILED)
    if isinstance(error, OSError) and error.strerror:
        return Failure(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    # Without what it says: that may be of a session.
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return Failure(f"an unexpected {type(error).__name__}{place}; agent-runtime --debug … shows where it comes from")


def tell(*lines: str) -> None:
    """Say something on standard error, a line each, as logging is formatted."""
    for line in lines:
        sys.stderr.write(told(line) + "\n")
    sys.stderr.flush()
