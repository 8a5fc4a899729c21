"""For tests of plugins, and of what is built on the runtime: faults of storages and disks, on demand.

The contract of a storage as tests is `agent_runtime.testing.kit`, which needs pytest; this package does not.
"""

from __future__ import annotations

from .disk import SimulatedDisk
from .disk_faults import DISK_CALL_NAMES, DiskCallName, DiskFault
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
    "DISK_CALL_NAMES",
    "CallName",
    "DiskCallName",
    "DiskFault",
    "Fault",
    "Faults",
    "FaultyStorage",
    "Gate",
    "SimulatedDisk",
    "creates_session",
    "faulty_plugin",
    "writes_message",
    "writes_session",
]
