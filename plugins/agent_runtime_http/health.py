"""How the service is: health checks, which work at any time and ask no database, status, and flush."""

from __future__ import annotations

from importlib.metadata import version
from typing import Final

from .answers import Answer, json_answer
from .resources import Call, Operations, operation

__all__ = ["OPERATIONS"]


@operation()
async def health(_call: Call) -> Answer:
    """That the process answers, and its version; 200 whatever the runtime does."""
    return json_answer({"status": "ok", "service": "agent-runtime", "version": version("agent-runtime")})


@operation()
async def live(_call: Call) -> Answer:
    """That the process answers."""
    return json_answer({"status": "ok"})


@operation()
async def ready(call: Call) -> Answer:
    """Whether requests will be served: 200, or 503 with the check that says why not."""
    service = call.service
    state = "closed" if service.runtime is None else service.runtime.status().state
    checks = {
        "runtime": service.state,
        "storage": {"running": "ok", "degraded": "failing"}.get(state, "unknown"),
        "lease": {"fenced": "lost", "closed": "none"}.get(state, "held"),
    }
    is_ready = service.state == "running" and state == "running"
    return json_answer({"status": "ready" if is_ready else "not ready", "checks": checks}, 200 if is_ready else 503)


@operation()
async def status(call: Call) -> Answer:
    """The figures of the runtime: watermarks, pending changes, flushes, residents, pool, lease, quarantine."""
    return json_answer(call.runtime.status())


@operation()
async def flush(call: Call) -> Answer:
    """Store every change acknowledged so far; 200 and the watermarks once that is done."""
    await call.runtime.flush()
    return json_answer({"watermarks": call.runtime.watermarks})


OPERATIONS: Final[Operations] = {
    "/health": {"GET": health},
    "/livez": {"GET": live},
    "/readyz": {"GET": ready},
    "/v1/status": {"GET": status},
    "/v1/flush": {"POST": flush},
}
