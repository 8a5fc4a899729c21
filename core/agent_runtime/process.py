"""Facts about a process that tell, later and from another process of the same machine, whether it is still alive.

A process id alone says little: ids are used again, count anew in each container, and mean nothing after a reboot. So
the boot, the namespace and the start of the process go with it. Elsewhere than on Linux those are unknown, and no
process is ever said to be dead.

A process may stand still for long: stopped, or asleep with its machine. `boot_clock` counts on meanwhile.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

__all__ = ["ProcessFacts", "boot_clock", "is_dead", "this_process"]

_PROC: Final = Path("/proc")
_CLOCK: Final[int] = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boot_clock() -> float:
    """Seconds since the machine booted, those asleep included where the platform counts them."""
    return time.clock_gettime(_CLOCK)


class ProcessFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Which process this is: `storage.Claim` has the same fields.

    `process_started` is in clock ticks since the boot that `boot_id` names; `pid_namespace` is what `pid` counts in.
    """

    host: str
    pid: int
    process_started: int | None = None
    pid_namespace: str | None = None
    boot_id: str | None = None


def this_process() -> ProcessFacts:
    """The facts of the process that asks."""
    pid = os.getpid()
    stat = _stat(pid)
    return ProcessFacts(
        host=socket.gethostname(),
        pid=pid,
        process_started=None if stat is None else stat.started,
        pid_namespace=_pid_namespace(),
        boot_id=_boot_id(),
    )


def is_dead(facts: ProcessFacts) -> bool:
    """Whether that process has provably ended. If not it is alive, or of another machine, boot or container."""
    if None in (facts.boot_id, facts.pid_namespace, facts.process_started) or facts.pid <= 0:
        return False
    if (facts.host, facts.boot_id, facts.pid_namespace) != (socket.gethostname(), _boot_id(), _pid_namespace()):
        return False
    try:
        os.kill(facts.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    # /proc may hide the processes of other users, so that nothing there is no proof; kill() has found one.
    stat = _stat(facts.pid)
    return stat is not None and (stat.state in "ZX" or stat.started != facts.process_started)


class _Stat(NamedTuple):
    state: str
    started: int


def _stat(pid: int) -> _Stat | None:
    """State and start time from /proc/<pid>/stat (proc(5)): fields 3 and 22; field 2, the name, may hold anything."""
    text = _read(_PROC / str(pid) / "stat")
    if text is None:
        return None
    fields = text.rpartition(")")[2].split()
    return _Stat(fields[0], int(fields[19]))


def _boot_id() -> str | None:
    return _read(_PROC / "sys/kernel/random/boot_id")


def _pid_namespace() -> str | None:
    try:
        return str((_PROC / "self/ns/pid").readlink())
    except OSError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
