"""A FastAPI application of the old service's users: but for its imports, and the lifespan it is given, it is as it was.

Its lower half has moved on to the new calls, as the guide advises: one endpoint at a time, on the same runtime.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy import text

from agent_runtime_codelab.dependencies import (
    AgentContextManagerDep,
    ConnectionDep,
    ReadConnectionDep,
    RuntimeDep,
    SessionDep,
    SessionManagerDep,
    runtime_lifespan,
)
from agent_runtime_codelab.managers import (
    AgentContextManager,
    SessionManager,
    agent_context_manager,
    get_session_manager,
    session_manager,
)

app = FastAPI(lifespan=runtime_lifespan())


# --- as it was: synchronous endpoints, on FastAPI's worker threads ----------------------------------------------------


@app.post("/sessions/{session_id}/messages")
def say(session_id: str, content: str, role: str = "user") -> dict[str, Any]:
    session_manager.get_or_create(session_id, system_prompt="Be nice.")
    session_manager.append_message(session_id, role=role, content=content)
    return {"history": session_manager.get_history(session_id)}


@app.post("/sessions/{session_id}")
def create(session_id: str, manager: Annotated[SessionManager, Depends(get_session_manager)]) -> JSONResponse:
    try:
        state = manager.create(session_id)
    except ValueError as error:
        return JSONResponse({"error": str(error)}, status_code=409)
    return JSONResponse({"session_id": state.session_id, "messages": list(state.messages)})


@app.delete("/sessions/{session_id}")
def delete(session_id: str) -> dict[str, bool]:
    return {"deleted": AgentContextManager().delete(session_id)}


# --- as it was: synchronous calls from within the loop ----------------------------------------------------------------


@app.post("/agents/{session_id}/switch")
async def switch(session_id: str, agent: str, reason: str) -> dict[str, Any]:
    context = agent_context_manager.get_or_create(session_id)
    context.switch_agent(agent, reason)
    context.metadata["switched"] = True
    context.add_metadata("count", context.get_metadata("count", 0) + 1)
    return {
        "current_agent": context.current_agent,
        "agent_history": context.agent_history,
        "switch_count": context.switch_count,
        "metadata": context.metadata,
    }


# --- as it was: asynchronous managers ---------------------------------------------------------------------------------


@app.get("/sessions/{session_id}/history")
async def history(session_id: str, sessions: SessionManagerDep, contexts: AgentContextManagerDep) -> Any:
    if not await sessions.exists(session_id):
        return JSONResponse({"error": f"Session {session_id} not found"}, status_code=404)
    context = await contexts.get(session_id)
    return {
        "messages": await sessions.get_history(session_id),
        "current_agent": context.current_agent if context else None,
    }


@app.post("/sessions/{session_id}/tool-results")
async def tool_result(session_id: str, call_id: str, result: str, sessions: SessionManagerDep) -> Any:
    await sessions.append_tool_result(session_id, call_id=call_id, tool_name="read_file", result=result)
    return {"count": len(await sessions.get_history(session_id))}


# --- what has moved on: the new calls, beside the old ones ------------------------------------------------------------


@app.get("/new/sessions/{session_id}")
async def new_history(session: SessionDep) -> dict[str, Any]:
    record = await session.record()
    return {"title": record.title, "messages": await session.history()}


@app.post("/new/sessions/{session_id}/messages")
async def new_say(session: SessionDep, runtime: RuntimeDep, content: str) -> dict[str, Any]:
    message = await session.append("user", content)
    await runtime.flush()
    return {"seq": message.seq, "stored": runtime.watermarks.stored >= 1}


# --- tables of its own, beside the runtime's --------------------------------------------------------------------------


@app.post("/notes/{session_id}")
async def note(session_id: str, body: str, db: ConnectionDep) -> dict[str, int]:
    await db.execute(
        text("CREATE TABLE IF NOT EXISTS app_notes (session_id VARCHAR(255) NOT NULL, body TEXT NOT NULL)")
    )
    await db.execute(text("INSERT INTO app_notes VALUES (:id, :body)"), {"id": session_id, "body": body})
    count = await db.scalar(text("SELECT count(*) FROM app_notes"))
    if body != "forget":
        await db.commit()
    return {"count": count}


@app.get("/notes/{session_id}")
async def notes(session_id: str, db: ReadConnectionDep) -> dict[str, Any]:
    statement = text("SELECT body FROM app_notes WHERE session_id = :id ORDER BY body")
    return {"notes": list(await db.scalars(statement, {"id": session_id}))}
