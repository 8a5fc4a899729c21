"""How the service is: health checks, which work at any time and ask no database, status, and flush."""

from __future__ import annotations

from importlib.metadata import version
from typing import Final

from agent_runtime.status import Status

from .answers import Answer, json_answer
from .operations import Gives, Operations, operation
from .resources import Call
from .shapes import Flushed, Health, Live, Readiness

__all__ = ["OPERATIONS"]


@operation(Gives(200, Health))
async def get_health(_call: Call) -> Answer:
    """Whether the process answers, and its version; 200 whatever the runtime does."""
    return json_answer(Health(version=version("agent-runtime")))


@operation(Gives(200, Live))
async def get_liveness(_call: Call) -> Answer:
    """Whether the process answers."""
    return json_answer(Live())


@operation(Gives(200, Readiness), Gives(503, Readiness))
async def get_readiness(call: Call) -> Answer:
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


@operation(Gives(200, Status))
async def get_status(call: Call) -> Answer:
    """Get the figures of the runtime: watermarks, pending changes, flushes, residents, pool, lease, quarantine."""
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
