"""The agent that holds a session: shown with its history, handed over, its metadata changed."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from agent_runtime import AgentContext, DurabilityNotReached

from .answers import Answer, json_answer
from .bodies import MERGE_PATCH
from .resources import Call, Operations, operation

__all__ = ["OPERATIONS"]


@operation()
async def show(call: Call) -> Answer:
    """The context, with every hand-over under `agent_history`."""
    session = await call.session()
    switches = await session.switches()
    context = _shown(await session.context())
    context["agent_history"] = [
        {"from": each.from_agent, "to": each.to_agent, "reason": each.reason, "timestamp": each.switched_at}
        | ({} if each.metadata is None else {"metadata": each.metadata})
        for each in switches
    ]
    return json_answer(context)


@operation(durability=str)
async def patch(call: Call) -> Answer:
    """Merge a patch (RFC 7396) into the metadata of the context; 200 and the context, without its history."""
    given = await call.members(optional=("metadata",), types=MERGE_PATCH)
    session = await call.session()
    try:
        if "metadata" not in given:
            context = await session.context()
        elif given["metadata"] is None:
            context = await session.update_context(metadata={}, **call.options)
        else:
            context = await session.merge_context(given["metadata"], **call.options)
    except DurabilityNotReached as error:
        error.outcome = _shown(error.outcome)
        raise
    return json_answer(_shown(context))


@operation(durability=str)
async def switch(call: Call) -> Answer:
    """Hand the session over to an agent; 200 and the context, without its history."""
    given = await call.members(required=("agent",), optional=("reason",))
    session = await call.session()
    try:
        return json_answer(_shown(await session.switch_agent(**given, **call.options)))
    except DurabilityNotReached as error:
        error.outcome = _shown(error.outcome)
        raise


def _shown(context: AgentContext) -> dict[str, Any]:
    """The context without its hand-overs: these lie in the database, which a write does not wait for."""
    return msgspec.structs.asdict(context)


OPERATIONS: Final[Operations] = {
    "/v1/sessions/{session_id}/context": {"GET": show, "PATCH": patch},
    "/v1/sessions/{session_id}/agent": {"POST": switch},
}
