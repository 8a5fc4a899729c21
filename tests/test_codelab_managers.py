"""The old service's managers: their names, what they answered, from threads and from within running loops; none of it lost."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import threading
from collections.abc import AsyncIterator, Callable
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
    with pytest.raises(ValueError, match="Session s4 not found"):
        manager.append_message("s4", "user", "x")
    with pytest.raises(ValueError, match="Session s4 not found"):
        manager.append_tool_result("s4", "c", "t", "x")
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
    assert vars(owner)["__deprecated__"]
    for name, member in vars(owner).items():
        call = member.fget if isinstance(member, property) else member
        if name[0] != "_" and inspect.isfunction(call) and name != "session_id":
            assert vars(call)["__deprecated__"].startswith(("use ", "leave ")), name
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
        for copied in (
            context.metadata.copy(),
            copy.deepcopy(context.metadata),
            pickle.loads(pickle.dumps(context.metadata)),
        ):
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


def test_what_nobody_used_for_long_is_cleaned_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ago = timedelta(hours=25)
    monkeypatch.setattr("agent_runtime.runtime.utc_now", lambda: datetime.now(UTC) - ago)
    with open_managers("memory:"):
        for session_id in ("idle", "used", "switched"):
            session_manager.create(session_id, "Be nice.")
        ago = timedelta()
        session_manager.append_message("used", "user", "hello")
        agent_context_manager.get_or_create("switched").switch_agent("coder", "why")
        for wrong in (-1, float("nan")):
            with pytest.raises(ValueError, match="max_age_hours must be 0 or more"):
                agent_context_manager.cleanup_old_sessions(wrong)
        for hours in (26, 10**9):
            assert agent_context_manager.cleanup_old_sessions(max_age_hours=hours) == 0
        assert agent_context_manager.cleanup_old_sessions() == 1
        assert agent_context_manager.get_all_sessions() == ["used", "switched"]
        assert agent_context_manager.cleanup_old_sessions(max_age_hours=0) == 2


# --- which runtime ----------------------------------------------------------------------------------------------------


def test_without_a_runtime_it_says_what_to_do() -> None:
    with pytest.raises(NotOpened, match="enter open_managers"):
        session_manager.exists("s1")
    with open_managers("memory:") as first, open_managers("memory:") as second:
        with pytest.raises(NotOpened, match="hand one to the manager"):
            session_manager.exists("s1")
        SessionManager(first).create("s1")
        assert (SessionManager(first).exists("s1"), SessionManager(second).exists("s1")) == (True, False)
    with pytest.raises(RuntimeClosed):
        SessionManager(first).exists("s1")


@pytest.mark.anyio
async def test_asynchronous_managers_open_one_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_RUNTIME__DB_URL", database(tmp_path))
    sessions, contexts = AsyncSessionManager(), AsyncAgentContextManager()
    for _ in range(2):
        async with anyio.create_task_group() as tasks:
            for manager in (sessions, contexts, sessions):
                tasks.start_soon(manager.initialize)
        await sessions.get_or_create("s1")
        await sessions.shutdown()
        await sessions.shutdown()
        assert await contexts.exists("s1")  # it is still in use
        session_manager.append_message("s1", "user", "hello")
        await contexts.shutdown()
        with pytest.raises(NotOpened):
            session_manager.exists("s1")
    async with opened():
        await sessions.initialize()  # there is one
        assert not await sessions.exists("s1")
        await sessions.shutdown()
        assert not await sessions.exists("s1")
    with open_runtime_blocking(database(tmp_path)) as runtime:
        assert runtime.get_session("s1").record().message_count == 2


@pytest.mark.anyio
async def test_what_fails_to_open_can_be_opened_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_RUNTIME__DB_URL", database(tmp_path))
    manager = AsyncSessionManager()
    (tmp_path / "new.db").mkdir()
    with pytest.raises(Exception, match="is a directory"):
        await manager.initialize()
    (tmp_path / "new.db").rmdir()
    await manager.initialize()
    await manager.create("s1")
    await manager.shutdown()


class Curious:
    """A plugin that calls a manager from the runtime's own thread."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    @hookimpl
    def agent_runtime_before_append(self, session_id: str, message: NewMessage) -> None:
        try:
            session_manager.get_history(session_id)
        except RuntimeError as error:
            self.error = error


def test_from_the_runtimes_own_thread_is_refused() -> None:
    plugin = Curious()
    with open_managers("memory:", plugins=[plugin]):
        session_manager.create("s1")
        session_manager.append_message("s1", "user", "hello")
        assert "cannot be called from the event loop thread" in str(plugin.error)
        assert len(session_manager.get_history("s1")) == 1


# --- all at once ------------------------------------------------------------------------------------------------------

THREADS = 50


@pytest.mark.anyio
@pytest.mark.parametrize("calls", [1_500, pytest.param(20_000, marks=pytest.mark.long)])
async def test_threads_and_a_loop_at_once(tmp_path: Path, calls: int) -> None:
    """Fifty threads and the tasks of a loop, on the same sessions: each message once and in its caller's order, each key."""
    rounds = calls // (THREADS + 2) // 3
    shared = [f"s{number}" for number in range(5)]

    def work(caller: str) -> None:
        for number in range(rounds):
            session_id = shared[number % len(shared)]
            session_manager.append_message(session_id, "user", f"{caller} {number}")
            context = agent_context_manager.get_or_create(session_id)
            context.add_metadata(f"{caller} {number}", {"number": number})
            if number % 3:
                context.switch_agent(f"{caller} {number}", "why")
            else:
                assert f"{caller} {number}" in [each["content"] for each in session_manager.get_history(session_id)]

    async def work_as_task(caller: str) -> None:
        sessions, contexts = AsyncSessionManager(), AsyncAgentContextManager()
        for number in range(rounds):
            session_id = shared[number % len(shared)]
            await sessions.append_message(session_id, "user", f"{caller} {number}")
            context = await contexts.get_or_create(session_id)
            context.add_metadata(f"{caller} {number}", {"number": number})  # holds up the loop, and comes back
            context.switch_agent(f"{caller} {number}", "why")

    async def work_within_the_loop(caller: str) -> None:
        for number in range(rounds):
            session_id = shared[number % len(shared)]
            session_manager.append_message(session_id, "user", f"{caller} {number}")
            context = agent_context_manager.get_or_create(session_id)
            context.metadata[f"{caller} {number}"] = {"number": number}
            context.switch_agent(f"{caller} {number}", "why")
            await anyio.sleep(0)

    callers = [*(f"thread{number}" for number in range(THREADS)), "task", "loop"]

    def check() -> None:
        for index, session_id in enumerate(shared):
            expected = [number for number in range(rounds) if number % len(shared) == index]
            found: dict[str, list[int]] = {}
            for message in session_manager.get_history(session_id):
                caller, number = message["content"].split()
                found.setdefault(caller, []).append(int(number))
            assert found == (dict.fromkeys(callers, expected) if expected else {})
            context = agent_context_manager.get_or_create(session_id)
            assert context.metadata == {
                f"{caller} {number}": {"number": number} for caller in callers for number in expected
            }
            switches = len(callers) * len(expected) - THREADS * sum(number % 3 == 0 for number in expected)
            assert context.switch_count == len(context.agent_history) == switches

    async with opened(database(tmp_path)):
        with anyio.fail_after(100):
            started = [session_manager.get_or_create(session_id) for session_id in shared]
            assert len(started) == len(shared)
            async with anyio.create_task_group() as tasks:
                limiter = anyio.CapacityLimiter(THREADS)
                for number in range(THREADS):
                    tasks.start_soon(
                        lambda caller: anyio.to_thread.run_sync(work, caller, limiter=limiter), f"thread{number}"
                    )
                tasks.start_soon(work_as_task, "task")
                tasks.start_soon(work_within_the_loop, "loop")
            check()
    async with opened(database(tmp_path)):
        check()


def test_one_of_many_callers_creates() -> None:
    with open_managers("memory:"), ThreadPoolExecutor(THREADS) as threads:

        def create(number: int) -> bool:
            session_manager.get_or_create("shared", "Be nice.")
            try:
                session_manager.create("contended", f"{number}")
            except ValueError:
                return False
            return True

        assert sum(threads.map(create, range(THREADS))) == 1
        assert [len(session_manager.get_history(each)) for each in ("shared", "contended")] == [1, 1]


@pytest.mark.anyio
async def test_closing_while_everybody_calls(tmp_path: Path) -> None:
    """Each call comes back, with what it did or with RuntimeClosed, and what was acknowledged is there."""
    acknowledged: list[str] = []
    running = threading.Barrier(11)

    def work(caller: int, append: Callable[[str], None]) -> None:
        append(f"{caller} first")
        running.wait()
        with pytest.raises(RuntimeClosed):
            for number in range(10**9):
                append(f"{caller} {number}")

    def in_thread(text: str) -> None:
        manager.append_message("s1", "user", text)
        acknowledged.append(text)

    async def in_task(number: int) -> None:
        with pytest.raises(RuntimeClosed):
            while True:
                number += 1
                await asynchronous.append_message("s1", "user", f"task {number}")
                acknowledged.append(f"task {number}")

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks, opened(database(tmp_path)) as runtime:
            manager, asynchronous = SessionManager(runtime), AsyncSessionManager(runtime)
            manager.create("s1")
            limiter = anyio.CapacityLimiter(12)
            for caller in range(10):
                tasks.start_soon(lambda each: anyio.to_thread.run_sync(work, each, in_thread, limiter=limiter), caller)
            tasks.start_soon(in_task, 0)
            await anyio.to_thread.run_sync(running.wait)
            await anyio.sleep(0.1)
    with open_managers(database(tmp_path)):
        stored = [message["content"] for message in session_manager.get_history("s1")]
    assert len(stored) == len(set(stored))
    assert set(acknowledged) <= set(stored)
    assert len(acknowledged) > 20


@pytest.mark.anyio
async def test_closed_from_the_loop_whose_tasks_are_calling(tmp_path: Path) -> None:
    """The thread that closes is the one that its tasks would need to come back: it must not wait for them."""

    async with anyio.create_task_group() as tasks:
        with open_managers(database(tmp_path)) as runtime:
            tasks.start_soon(runtime.call_async, lambda _: anyio.sleep(0.3))
            await anyio.sleep(0.05)


def test_the_loop_stays_for_calls_that_are_under_way() -> None:
    opening = open_managers("memory:")
    runtime = opening.__enter__()
    portal = runtime._loop.enter()
    closing = threading.Thread(target=opening.__exit__, args=(None, None, None))
    closing.start()
    closing.join(0.3)
    with pytest.raises(RuntimeClosed):
        portal.call(runtime._runtime.get_session, "s1")
    assert closing.is_alive()
    runtime._loop.leave()
    closing.join(20)
    assert not closing.is_alive()
    with pytest.raises(RuntimeClosed):
        runtime.call(lambda it: it.flush())


@pytest.mark.anyio
async def test_a_cancelled_task_waits_for_the_end_of_its_call(tmp_path: Path) -> None:
    async with opened(database(tmp_path)) as runtime:
        session_manager.create("s1")
        begun, ended = threading.Event(), threading.Event()

        async def slow(_: object) -> None:
            begun.set()
            try:
                await anyio.sleep_forever()
            finally:
                ended.set()

        with anyio.move_on_after(0.2) as scope:
            await runtime.call_async(slow)
        assert (scope.cancelled_caught, begun.is_set(), ended.is_set()) == (True, True, True)
        assert session_manager.exists("s1")
