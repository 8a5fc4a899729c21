"""For tests of plugins, and of what is built on the runtime: faults on demand."""

from __future__ import annotations

from .faults import (
    CALL_NAMES,
    CallName,
    Fault,
    Faults,
    Gate,
    creates_session,
    writes_message,
    writes_session,
)
from .faulty import FaultyStorage, faulty_plugin

__all__ = [
    "CALL_NAMES",
    "CallName",
    "Fault",
    "Faults",
    "FaultyStorage",
    "Gate",
    "creates_session",
    "faulty_plugin",
    "writes_message",
    "writes_session",
]
