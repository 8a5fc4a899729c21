"""The old service's managers: their names, what they answered, from threads and from within running loops; none of it lost."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from agent_runtime import (
    BlockingRuntime,
    Config,
    InvalidInput,
    NewMessage,
    RuntimeClosed,
    SessionNotFound,
    hookimpl,
    open_runtime_blocking,
)
from agent_runtime_codelab.contexts import AgentContext, SessionState
from agent_runtime_codelab.managers import (
    AgentContextManager,
    AsyncAgentContextManager,
    AsyncSessionManager,
    SessionManager,
    agent_context_manager,
    get_agent_context_manager,
    get_session_manager,
    session_manager,
)
from agent_runtime_codelab.opened import NotOpened, on_a_thread, open_managers

CALL = {"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": "{}"}}


@asynccontextmanager
async def opened(config: Config | str = "memory:") -> AsyncIterator[BlockingRuntime]:
    async with on_a_thread(open_managers(config)) as runtime:
        yield runtime


def database(directory: Path) -> str:
    return f"sqlite:///{directory / 'new.db'}"


# --- what they answer -------------------------------------------------------------------------------------------------


def old_sessions(manager: SessionManager) -> None:
    """The old calls on sessions, one after the other."""
    assert (manager.exists("s1"), manager.get("s1"), manager.get_history("s1"), manager.all_sessions()) == (
        False,
        None,
        [],
        [],
    )
    created = manager.create("s1", system_prompt="Be nice.")
    assert (created.session_id, created.messages) == ("s1", ({"role": "system", "content": "Be nice."},))
    with pytest.raises(ValueError, match="Session s1 already exists"):
        manager.create("s1")
    assert manager.exists("s1")
    manager.append_message("s1", "user", "hello", name="ann")
    manager.append_message("s1", role="assistant", content="hi")
    manager.append_tool_result("s1", call_id="c1", tool_name="read_file", result="ok")
    history = [
        {"role": "system", "content": "Be nice."},
        {"role": "user", "content": "hello", "name": "ann"},
        {"role": "assistant", "content": "hi"},
        {"role": "tool", "content": "ok", "name": "read_file", "tool_call_id": "c1"},
    ]
    assert manager.get_history("s1") == history
    manager.get_history("s1").clear()
    assert manager.get_history("s1") == history
    found = manager.get("s1")
    assert found is not None
    assert (list(found.messages), found.message_count, found.title) == (history, 4, "hello")
    assert found.created_at <= found.last_activity <= datetime.now(UTC)
    assert repr(found) == "<SessionState 's1'>"
    assert manager.get_or_create("s1", system_prompt="Be rude.").message_count == 4
    assert manager.get_or_create("s2", "Be rude.").message_count == 1
    assert manager.get_or_create("s3", "").messages == ()  # the old service's way to say that there is none
    assert [each.session_id for each in manager.all_sessions()] == ["s1", "s2", "s3"]
    for call in (lambda: manager.append_message("s4", "user", "x"), lambda: manager.append_tool_result("s4", "c", "t", "x")):
        with pytest.raises(ValueError, match="Session s4 not found"):
            call()
    manager.delete("s1")
    manager.delete("s1")
    assert not manager.exists("s1")
    with pytest.raises(SessionNotFound):
        found.messages  # noqa: B018


def old_contexts(manager: AgentContextManager) -> None:
    """The old calls on contexts."""

    class AgentType(str, Enum):  # noqa: UP042 - as they had it
        CODER = "coder"

    assert (manager.exists("s1"), manager.get("s1"), manager.delete("s1")) == (False, None, False)
    assert (manager.get_all_sessions(), manager.get_session_count()) == ([], 0)
    context = manager.get_or_create("s1")
    assert (context.session_id, context.current_agent, context.agent_history, context.metadata) == (
        "s1",
        "orchestrator",
        [],
        {},
    )
    assert (context.last_switch_at, context.switch_count) == (None, 0)
    assert datetime.now(UTC) - timedelta(minutes=1) < context.created_at <= datetime.now(UTC)
    context.switch_agent(AgentType.CODER, "code is wanted")
    context.switch_agent("coder", "once more")
    assert (context.current_agent, context.switch_count) == ("coder", 1)
    [told] = context.get_agent_history()
    assert context.last_switch_at is not None
    assert told == {
        "from": "orchestrator",
        "to": "coder",
        "reason": "code is wanted",
        "timestamp": context.last_switch_at.isoformat(),
    }
    other = manager.get("s1")
    assert other is not None
    other.switch_agent("ask", reason="a question")
    assert (context.current_agent, len(context.agent_history)) == ("ask", 2)  # what one holds is never out of date
    assert manager.get_or_create("s1", initial_agent="debug").current_agent == "ask"
    assert manager.get_or_create("s2", initial_agent=AgentType.CODER).current_agent == "coder"
    assert (manager.get_all_sessions(), manager.get_session_count()) == (["s1", "s2"], 2)
    assert (manager.delete("s1"), manager.delete("s1"), manager.exists("s1")) == (True, False, False)
    with pytest.raises(SessionNotFound):
        context.current_agent  # noqa: B018
    assert repr(context) == "<AgentContext 's1'>"


@pytest.mark.parametrize("calls", [old_sessions, old_contexts])
def test_in_a_thread_without_a_loop(calls: Callable[[Any], None]) -> None:
    with open_managers("memory:") as runtime:
        calls(session_manager if calls is old_sessions else agent_context_manager)
        for record in list(runtime.scan_sessions()):
            runtime.get_session(record.session_id).delete()
        calls(SessionManager(runtime) if calls is old_sessions else AgentContextManager(runtime))


@pytest.mark.anyio
@pytest.mark.parametrize("calls", [old_sessions, old_contexts])
async def test_within_a_running_loop(calls: Callable[[Any], None]) -> None:
    async with opened():
        calls(get_session_manager() if calls is old_sessions else get_agent_context_manager())


class Awaited:
    """An asynchronous manager, called as the other kind is; on a thread of its own."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            async def run() -> Any:
                return await getattr(self._manager, name)(*args, **options)

            return anyio.from_thread.run(run)

        return call


@pytest.mark.anyio
@pytest.mark.parametrize("calls", [old_sessions, old_contexts])
async def test_for_tasks(calls: Callable[[Any], None]) -> None:
    async with opened():
        manager = AsyncSessionManager() if calls is old_sessions else AsyncAgentContextManager()
        await anyio.to_thread.run_sync(calls, Awaited(manager))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(SessionManager, AsyncSessionManager), (AgentContextManager, AsyncAgentContextManager)]
)
def test_tasks_have_the_same_calls(ours: type, theirs: type) -> None:
    calls = {name: call for name, call in vars(ours).items() if name[0] != "_"}
    assert {name for name in vars(theirs) if name[0] != "_"} == set(calls)
    for name, call in calls.items():
        twin = vars(theirs)[name]
        assert inspect.signature(twin) == inspect.signature(call)
        assert (inspect.iscoroutinefunction(twin), inspect.iscoroutinefunction(call)) == (True, False)
        assert twin.__doc__ == call.__doc__


@pytest.mark.parametrize(
    "owner",
    [SessionManager, AgentContextManager, AsyncSessionManager, AsyncAgentContextManager, AgentContext, SessionState],
)
def test_each_call_names_the_new_one(owner: type) -> None:
    assert owner.__deprecated__  # type: ignore[attr-defined]
    for name, member in vars(owner).items():
        call = member.fget if isinstance(member, property) else member
        if name[0] != "_" and inspect.isfunction(call) and name != "session_id":
            assert call.__deprecated__.startswith(("use ", "leave ")), name
            assert call.__doc__, name


# --- metadata ---------------------------------------------------------------------------------------------------------

CHANGES: list[Callable[[dict[str, Any]], Any]] = [
    lambda metadata: metadata.__setitem__("c", {"d": None}),
    lambda metadata: metadata.__setitem__("a", None),
    lambda metadata: metadata.__delitem__("a"),
    lambda metadata: metadata.pop("b"),
    lambda metadata: metadata.pop("nothing", 7),
    lambda metadata: metadata.popitem(),
    lambda metadata: metadata.setdefault("a", 5),
    lambda metadata: metadata.setdefault("e", [1]),
    lambda metadata: metadata.update({"f": 1}, g=2),
    lambda metadata: metadata.clear(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_metadata_changed_in_place_is_saved(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    expected: dict[str, Any] = {"a": 1, "b": [1, {"x": 2}]}
    with open_managers(database(tmp_path)):
        context = agent_context_manager.get_or_create("s1")
        context.metadata.update(expected)
        held = context.metadata
        context.add_metadata("others", "too")
        expected["others"] = "too"
        held |= {}
        assert change(held) == change(expected)
        assert held == context.metadata == expected
        assert json.loads(json.dumps(held)) == expected
    with open_managers(database(tmp_path)):
        assert agent_context_manager.get_or_create("s1").metadata == expected


INNER: list[Callable[[Any, Any], Any]] = [
    lambda inner, _: inner.__setitem__("x", 1),
    lambda inner, _: inner.update(x=1),
    lambda inner, _: inner.pop("y"),
    lambda inner, _: inner.popitem(),
    lambda inner, _: inner.setdefault("z", 1),
    lambda inner, _: inner.clear(),
    lambda inner, _: inner.__delitem__("y"),
    lambda inner, _: inner.__ior__({}),
    lambda _, items: items.append(1),
    lambda _, items: items.extend([1]),
    lambda _, items: items.insert(0, 1),
    lambda _, items: items.remove(1),
    lambda _, items: items.sort(),
    lambda _, items: items.reverse(),
    lambda _, items: items.__setitem__(0, 1),
    lambda _, items: items.__iadd__([1]),
    lambda _, items: items.__imul__(2),
]


def test_what_lies_within_metadata_refuses_to_be_changed() -> None:
    with open_managers("memory:"):
        context = agent_context_manager.get_or_create("s1")
        context.add_metadata("inner", {"y": 1})
        context.add_metadata("items", [1])
        context.switch_agent("coder", "why")
        for change in INNER:
            with pytest.raises(TypeError, match=r"call context.add_metadata\(key, value\)"):
                change(context.get_metadata("inner"), context.get_metadata("items"))
        with pytest.raises(TypeError):
            context.agent_history.append({})
        with pytest.raises(TypeError):
            context.agent_history[0]["to"] = "x"
        assert context.metadata == {"inner": {"y": 1}, "items": [1]}
        for copied in (context.metadata.copy(), copy.deepcopy(context.metadata), pickle.loads(pickle.dumps(context.metadata))):
            assert copied == context.metadata
            copied["inner"]["y"] = 2  # a copy is one's own
            copied["items"].append(2)
        assert context.get_metadata("inner") == {"y": 1}
        assert (context.get_metadata("nothing"), context.get_metadata("nothing", 5)) == (None, 5)
        with pytest.raises(KeyError):
            del context.metadata["nothing"]
        with pytest.raises(InvalidInput):
            context.add_metadata("x", float("nan"))
        context.get_agent_history().clear()
        assert len(context.agent_history) == 1


# --- cleanup ----------------------------------------------------------------------------------------------------------


def test_what_nobody_used_for_long_is_cleaned_up() -> None:
    with open_managers("memory:") as runtime:
        before = datetime.now(UTC) - timedelta(hours=25)
        for session_id in ("old", "used"):
            runtime.call(
                lambda it, session_id=session_id: it._archives.put(session_id, before)  # type: ignore[misc]
            ) if False else runtime.create_session(session_id)
        assert agent_context_manager.cleanup_old_sessions() == 0
        assert agent_context_manager.cleanup_old_sessions(max_age_hours=10**9) == 0
        for wrong in (-1, float("nan")):
            with pytest.raises(ValueError, match="max_age_hours must be 0 or more"):
                agent_context_manager.cleanup_old_sessions(wrong)
        assert agent_context_manager.cleanup_old_sessions(max_age_hours=0) == 2
        assert agent_context_manager.get_all_sessions() == []
