"""The agent that holds a session: shown with its history, handed over, its metadata changed."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from agent_runtime import AgentContext, DurabilityNotReached

from .answers import Answer, json_answer
from .bodies import MERGE_PATCH
from .operations import Gives, Operations, Takes, operation
from .queries import DURABILITY
from .resources import Call
from .shapes import AgentHandOver, ContextPatch, ContextWithHistory

__all__ = ["OPERATIONS"]


@operation(Gives(200, ContextWithHistory))
async def get_context(call: Call) -> Answer:
    """Get which agent holds the session, with every hand-over."""
    session = await call.session()
    switches = await session.switches()
    context = _shown(await session.context())
    context["agent_history"] = [
        {"from": each.from_agent, "to": each.to_agent, "reason": each.reason, "timestamp": each.switched_at}
        | ({} if each.metadata is None else {"metadata": each.metadata})
        for each in switches
    ]
    return json_answer(context)


@operation(
    Gives(200, AgentContext),
    takes=Takes(ContextPatch, example={"metadata": {"plan": ["ask", "book"]}}, media_types=MERGE_PATCH),
    durability=DURABILITY,
)
async def update_context(call: Call) -> Answer:
    """Change the metadata of the context.

    The body is a merge patch (RFC 7396): what is absent stays, null removes. The answer has no `agent_history`.
    """
    given = call.members()
    session = await call.session()
    try:
        metadata = given.get("metadata", {})
        if metadata is None:
            context = await session.update_context(metadata={}, **call.options)
        else:
            context = await session.merge_context(metadata, **call.options)
    except DurabilityNotReached as error:
        error.outcome = _shown(error.outcome)
        raise
    return json_answer(_shown(context))


@operation(
    Gives(200, AgentContext),
    takes=Takes(AgentHandOver, example={"agent": "booking", "reason": "the traveller has chosen"}),
    durability=DURABILITY,
)
async def switch_agent(call: Call) -> Answer:
    """Hand the session over to an agent.

    To the agent that has it already: nothing is recorded. The answer has no `agent_history`.
    """
    given = call.members()
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
    "/v1/sessions/{session_id}/context": {"GET": get_context, "PATCH": update_context},
    "/v1/sessions/{session_id}/agent": {"POST": switch_agent},
}
