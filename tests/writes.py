"""Every write of the public API, each with arguments that change something, and with others of the same kind."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeAlias

from agent_runtime import Approval, Runtime, SessionHandle
from agent_runtime.approvals import Decision

Call: TypeAlias = Callable[..., Awaitable[Any]]


class Write(NamedTuple):
    """A call on a runtime and a session, which takes `durability` and `idempotency_key`; `other` has another body."""

    method: str
    call: Call
    other: Call | None


WRITES = [
    Write(
        "create_session",
        lambda runtime, _, **options: runtime.create_session("new", system_prompt="hi", **options),
        lambda runtime, _, **options: runtime.create_session("new", system_prompt="ho", **options),
    ),
    Write(
        "create_session",
        lambda runtime, _, **options: runtime.create_session(metadata={"b": 1, "a": 2}, **options),
        lambda runtime, _, **options: runtime.create_session(metadata={"b": 1, "a": 2.0}, **options),
    ),
    Write(
        "get_or_create_session",
        lambda runtime, _, **options: runtime.get_or_create_session("newer", user_id="ada", **options),
        lambda runtime, _, **options: runtime.get_or_create_session("newest", user_id="ada", **options),
    ),
    Write(
        "append",
        lambda _, session, **options: session.append("user", "hi", metadata={"a": 1}, **options),
        lambda _, session, **options: session.append("user", "hi", metadata={"a": 2}, **options),
    ),
    Write(
        "append_message",
        lambda _, session, **options: session.append_message({"role": "user", "refusal": "no"}, **options),
        lambda _, session, **options: session.append_message({"role": "user", "refusal": "yes"}, **options),
    ),
    Write(
        "append_json",
        lambda _, session, **options: session.append_json({"role": "user", "content": "é", "x": 1}, **options),
        lambda _, session, **options: session.append_json({"role": "user", "content": "é"}, **options),
    ),
    Write(
        "append_many",
        lambda _, session, **options: session.append_many([{"role": "user"}, {"role": "user", "x": [1]}], **options),
        lambda _, session, **options: session.append_many([{"role": "user"}], **options),
    ),
    Write(
        "append_tool_result",
        lambda _, session, **options: session.append_tool_result("c", "f", {"a": 1}, **options),
        lambda _, session, **options: session.append_tool_result("c", "g", {"a": 1}, **options),
    ),
    Write("pop", lambda _, session, **options: session.pop(**options), None),
    Write(
        "update",
        lambda _, session, **options: session.update(title="t", metadata={"a": 1}, **options),
        lambda _, session, **options: session.update(title="t", metadata=None, **options),
    ),
    Write(
        "merge",
        lambda _, session, **options: session.merge({"description": "d", "metadata": {"m": 1}}, **options),
        lambda _, session, **options: session.merge({"description": "d"}, **options),
    ),
    Write(
        "switch_agent",
        lambda _, session, **options: session.switch_agent("coder", reason="why", **options),
        lambda _, session, **options: session.switch_agent("coder", **options),
    ),
    Write(
        "update_context",
        lambda _, session, **options: session.update_context(metadata={"a": [1]}, **options),
        lambda _, session, **options: session.update_context(metadata={"a": [1.0]}, **options),
    ),
    Write(
        "merge_context",
        lambda _, session, **options: session.merge_context({"b": 1}, **options),
        lambda _, session, **options: session.merge_context({"b": 2}, **options),
    ),
    Write(
        "change_context",
        lambda _, session, **options: session.change_context(lambda context: {**context, "c": 1}, **options),
        None,
    ),
    Write(
        "put_document",
        lambda _, session, **options: session.put_document("c", "json", {"a": 1}, **options),
        lambda _, session, **options: session.put_document("c", "json", {"a": 2}, **options),
    ),
    Write(
        "put_document",
        lambda _, session, **options: session.put_document("c", "bytes", b"\0\xff", media_type="x/y", **options),
        lambda _, session, **options: session.put_document("c", "bytes", b"\0\xff", media_type="x/z", **options),
    ),
    Write(
        "delete_document",
        lambda _, session, **options: session.delete_document("c", "k", **options),
        lambda _, session, **options: session.delete_document("c", "json", **options),
    ),
    Write(
        "request_approval",
        lambda _, session, **options: session.request_approval("c", "f", {"a": 1}, **{"durability": None, **options}),
        lambda _, session, **options: session.request_approval("c", "f", {"a": 2}, **{"durability": None, **options}),
    ),
    Write(
        "decide_approval",
        lambda _, session, **options: decide(session, "approve", **options),
        lambda _, session, **options: decide(session, "reject", **options),
    ),
    Write("clear", lambda _, session, **options: session.clear(**options), None),
    Write("delete", lambda _, session, **options: session.delete(**options), None),
]
"""In an order in which each changes something after those before it."""


_ASKED: dict[str, str] = {}
"""The approval that `begin` asked for, by incarnation."""


async def decide(session: SessionHandle, decision: Decision, **options: Any) -> Approval:
    """Decide what `begin` asked for."""
    return await session.decide_approval(_ASKED[session.incarnation], decision, **options)


WRITE_IDS = [f"{number}-{write.method}" for number, write in enumerate(WRITES)]


async def begin(runtime: Runtime) -> SessionHandle:
    """The session `s1`, of which there is something for every write to change."""
    session = await runtime.create_session("s1", system_prompt="Be kind.")
    await session.append("user", "hi")
    await session.append("assistant", tool_calls=[{"id": "c"}])
    await session.put_document("c", "k", 1)
    _ASKED[session.incarnation] = (await session.request_approval("c", "f", {}, durability=None)).approval_id
    return session


def methods_with(parameter: str) -> set[str]:
    """The public methods that take a parameter."""
    return {
        name
        for owner in (Runtime, SessionHandle)
        for name, method in inspect.getmembers(owner, inspect.isfunction)
        if not name.startswith("_") and parameter in inspect.signature(method).parameters
    }
