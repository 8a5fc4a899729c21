"""How the service is: health checks, which work at any time and ask no database, status, and flush.

Health checks are answered to anybody: they tell what is wrong, but not with which session, nor where anything is.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Final

from agent_runtime.status import JournalStatus, Status

from .answers import Answer, json_answer
from .operations import Gives, Operations, operation
from .resources import Call
from .service import Service
from .shapes import Check, Flushed, Health, Live, Readiness

__all__ = ["OPERATIONS"]


@operation(Gives(200, Health), public=True)
async def get_health(_call: Call) -> Answer:
    """Whether the process answers, and its version; 200 whatever the runtime does."""
    return json_answer(Health(version=version("agent-runtime")))


@operation(Gives(200, Live), public=True)
async def get_liveness(_call: Call) -> Answer:
    """Whether the process answers."""
    return json_answer(Live())


@operation(Gives(200, Readiness), Gives(503, Readiness), public=True)
async def get_readiness(call: Call) -> Answer:
    """Whether requests will be served: 200, or 503 if a check fails; with all the checks."""
    checks = [*_checks(call.service)]
    if any(check.status == "fail" for check in checks):
        return json_answer(Readiness(status="not ready", checks=checks), 503)
    return json_answer(Readiness(status="ready", checks=checks))


_DOING: Final = {
    "closed": "closed",
    "opening": "opening, and recovering what a crash may have left",
    "running": "running",
    "stopping": "stopping, and storing what is not stored yet",
}


def _checks(service: Service) -> Iterator[Check]:
    """What the runtime does, and once it is open the rest."""
    doing = _DOING[service.state]
    if service.state == "opening" and service.config.lease.wait:
        doing += "; while another runtime has the lease, waiting for that"
    yield Check(
        name="runtime", status="ok" if service.state == "running" else "fail", detail=doing, since=service.since
    )
    if service.runtime is not None:
        status = service.runtime.status()
        yield _storage(status)
        yield _lease(status)
        yield _quarantine(status)
        if status.journal is not None:
            yield _journal(status.journal)


def _storage(status: Status) -> Check:
    if status.flush.failing_s is not None:
        since = datetime.now(UTC) - timedelta(seconds=status.flush.failing_s)
        detail = f"batches fail, {status.pending.changes} change(s) wait to be stored"
        return Check(name="storage", status="fail", detail=detail, since=since)
    if status.lease.unreachable:
        return Check(name="storage", status="fail", detail="the database does not answer")
    return Check(name="storage", status="ok", detail="batches are stored")


def _lease(status: Status) -> Check:
    if status.state == "fenced":
        return Check(name="lease", status="fail", detail="it is lost: another runtime has taken over")
    return Check(name="lease", status="ok", detail="it is held")


def _quarantine(status: Status) -> Check:
    held = status.quarantine
    if not held.sessions:
        return Check(name="quarantine", status="ok", detail="no session is held")
    detail = f"{held.sessions} session(s) are held by {held.changes} change(s): see agent-runtime quarantine list"
    return Check(name="quarantine", status="warn", detail=detail)


def _journal(journal: JournalStatus) -> Check:
    # Not a failure: reads go on, and that there is room again is seen by the first write that is let through.
    if journal.full:
        detail = "the disk is low: writes are refused until there is room, reads go on"
        return Check(name="journal", status="warn", detail=detail)
    return Check(name="journal", status="ok", detail="writes are taken")


@operation(Gives(200, Status))
async def get_status(call: Call) -> Answer:
    """Get the figures of the runtime.

    Watermarks, pending changes, flushes, residents, pool, lease, quarantine.
    """
    return json_answer(call.runtime.status())


@operation(Gives(200, Flushed), refuses=["quarantined"])
async def flush(call: Call) -> Answer:
    """Store every change acknowledged so far.

    The answer comes, with the watermarks, once that is done.
    """
    await call.runtime.flush()
    return json_answer({"watermarks": call.runtime.watermarks})


OPERATIONS: Final[Operations] = {
    "/health": {"GET": get_health},
    "/livez": {"GET": get_liveness},
    "/readyz": {"GET": get_readiness},
    "/v1/status": {"GET": get_status},
    "/v1/flush": {"POST": flush},
}
