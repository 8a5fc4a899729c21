"""FastAPI and Starlette: an application of the old service's users that runs as it was, and what endpoints can ask for."""

from __future__ import annotations

import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent_runtime import (
    Config,
    DurabilityNotReached,
    InvalidInput,
    Runtime,
    SessionExists,
    SessionHandle,
    SessionNotFound,
    open_runtime,
    open_runtime_blocking,
)
from agent_runtime_codelab import dependencies, sql
from agent_runtime_codelab.dependencies import connection, get_runtime, get_session, read_connection, runtime_lifespan
from agent_runtime_codelab.elsewhere import runtime_elsewhere
from agent_runtime_codelab.managers import session_manager
from agent_runtime_codelab.opened import NotOpened
from agent_runtime_codelab.sql import SqlDatabase
from codelab_app import app as old_app
from places import NEVER_S, Place, place_fixture

TESTS = Path(__file__).parent


def url_in(directory: Path) -> str:
    return f"sqlite:///{directory / 'new.db'}"


@asynccontextmanager
async def client_of(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    """Requests to an application of this process, on the event loop of the test."""
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client,
    ):
        yield client


@contextmanager
def served(directory: Path) -> Iterator[httpx.Client]:
    """The old application in a process of its own, served by uvicorn."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "codelab_app:app", "--port", str(port), "--log-level", "warning"],
        cwd=TESTS,
        env=os.environ | {"AGENT_RUNTIME__DB_URL": url_in(directory)},
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
            deadline = time.monotonic() + 30
            while True:
                try:
                    client.get("/openapi.json")
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


# --- the old application ----------------------------------------------------------------------------------------------


def use(client: Any, session_id: str) -> None:
    """A session of an old client."""
    path = f"/sessions/{session_id}"
    assert client.post(path).json() == {"session_id": session_id, "messages": []}
    taken = client.post(path)
    assert (taken.status_code, taken.json()) == (409, {"error": f"Session {session_id} already exists"})
    said = client.post(f"{path}/messages", params={"content": "hello"}).json()
    assert said == {"history": [{"role": "user", "content": "hello"}]}
    for count, agent in enumerate(("coder", "ask"), 1):
        switched = client.post(f"/agents/{session_id}/switch", params={"agent": agent, "reason": "why"}).json()
        assert (switched["current_agent"], switched["switch_count"]) == (agent, count)
        assert switched["metadata"] == {"switched": True, "count": count}
        assert [each["to"] for each in switched["agent_history"]] == ["coder", "ask"][:count]
    assert client.post(f"{path}/tool-results", params={"call_id": "c1", "result": "ok"}).json() == {"count": 2}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "tool", "content": "ok", "name": "read_file", "tool_call_id": "c1"},
    ]
    assert client.get(f"{path}/history").json() == {"messages": messages, "current_agent": "ask"}
    new = client.post(f"/new{path}/messages", params={"content": "bye"})
    assert new.json() == {"seq": 3, "stored": True}
    both = [{"role": "user", "content": "hello"}, {"role": "user", "content": "bye"}]
    assert client.get(f"/new{path}").json() == {"title": "hello", "messages": both}
    client.post(f"/notes/{session_id}", params={"body": "kept"})
    client.post(f"/notes/{session_id}", params={"body": "forget"})
    assert client.get(f"/notes/{session_id}").json() == {"notes": ["kept"]}


def test_the_old_application_runs_on_a_real_server(tmp_path: Path) -> None:
    """Served, used by several clients at once, stopped, started again: all is there."""
    with served(tmp_path) as client:
        with ThreadPoolExecutor(8) as clients:
            list(clients.map(lambda number: use(client, f"s{number}"), range(8)))
        assert client.get("/sessions/nobody/history").status_code == 404
        assert client.get("/new/sessions/nobody").json() == {"detail": "there is no session 'nobody'"}
        assert client.get(f"/new/sessions/{'x' * 256}").status_code == 422
        assert client.delete("/sessions/s7").json() == {"deleted": True}
    with served(tmp_path) as client:
        assert client.get("/sessions/s7/history").status_code == 404
        for number in range(7):
            assert len(client.get(f"/sessions/s{number}/history").json()["messages"]) == 3
            assert client.get(f"/notes/s{number}").json() == {"notes": ["kept"]}
        switched = client.post("/agents/s1/switch", params={"agent": "ask", "reason": "again"}).json()
        assert switched["metadata"] == {"switched": True, "count": 3}


@pytest.mark.anyio
async def test_and_on_both_event_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_RUNTIME__DB_URL", url_in(tmp_path))
    async with client_of(old_app) as client:

        class Waiting:
            def __getattr__(self, method: str) -> Any:
                return lambda *args, **options: anyio.from_thread.run(lambda: getattr(client, method)(*args, **options))

        await anyio.to_thread.run_sync(use, Waiting(), "s1")
    with open_runtime_blocking(url_in(tmp_path)) as runtime:
        assert runtime.get_session("s1").record().message_count == 3


def test_the_session_is_a_path_parameter_in_the_document() -> None:
    operation = old_app.openapi()["paths"]["/new/sessions/{session_id}"]["get"]
    assert [(each["name"], each["in"]) for each in operation["parameters"]] == [("session_id", "path")]


# --- Starlette, and an application that has moved on ------------------------------------------------------------------


async def say(request: Request) -> Response:
    session = await get_session(request, request.path_params["id"])
    async with connection(request) as connected:
        await connected.execute(text("CREATE TABLE IF NOT EXISTS app_said (id TEXT)"))
        await connected.execute(text("INSERT INTO app_said VALUES (:id)"), [{"id": session.session_id}] * 2)
        await connected.commit()
    async with read_connection(request) as connected:
        said = (await connected.execute(text("SELECT count(*), max(id) FROM app_said"))).one()
    await get_runtime(request).get_or_create_session("made")
    return JSONResponse({"seq": (await session.append("user", "hi")).seq, "said": list(said)})


@pytest.mark.anyio
@pytest.mark.parametrize("old_calls", [True, False])
async def test_plain_functions_for_starlette(tmp_path: Path, old_calls: bool) -> None:
    app = Starlette(
        routes=[Route("/{id}", say, methods=["POST"])],
        lifespan=runtime_lifespan(Config.of(url_in(tmp_path)), old_calls=old_calls),
    )
    for turn in (1, 2):
        async with client_of(app) as client:
            if turn == 1:
                await app.state.runtime.create_session("s1")
            assert (await client.post("/s1")).json() == {"seq": turn, "said": [2 * turn, "s1"]}
            assert (await client.post("/s2")).status_code == 404
            if not old_calls:
                assert isinstance(app.state.runtime, Runtime)
                with pytest.raises(NotOpened):
                    session_manager.exists("s1")
        assert app.state._state == {}


@pytest.mark.anyio
async def test_a_runtime_that_the_application_opened_itself() -> None:
    app = FastAPI()

    @app.get("/{session_id}")
    async def title(session: dependencies.SessionDep) -> str | None:
        return (await session.record()).title

    async with open_runtime("memory:") as app.state.runtime, client_of(app) as client:
        await app.state.runtime.create_session("s1", title="t")
        assert (await client.get("/s1")).json() == "t"


@pytest.mark.anyio
async def test_what_is_missing_is_named() -> None:
    request = HTTPConnection({"type": "http", "app": Starlette()})
    with pytest.raises(NotOpened, match="give it lifespan=runtime_lifespan"):
        get_runtime(request)
    with pytest.raises(NotOpened, match="with old_calls"):
        dependencies.get_session_manager_dep(request)
    with pytest.raises(NotOpened, match="a storage that is not memory:"):
        async with connection(request):
            pass
    with pytest.raises(InvalidInput, match="has no SQL"):
        async with SqlDatabase.open(Config.of("duckdb:///x")):
            pass
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = dependencies.Nothing


def test_without_fastapi_the_functions_are_there_and_the_aliases_say_why_not() -> None:
    program = """
        import sys
        sys.modules["fastapi"] = None
        from agent_runtime_codelab import dependencies, sql
        dependencies.get_runtime, dependencies.runtime_lifespan
        try:
            from agent_runtime_codelab.dependencies import RuntimeDep
        except ImportError as error:
            assert "needs FastAPI, which is not installed: pip install fastapi" in str(error), error
        else:
            raise SystemExit("it is there")
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(program)], check=True, timeout=60)


# --- the runtime from another loop ------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_runtime_elsewhere_has_the_calls_of_the_runtime(tmp_path: Path) -> None:
    config = Config.of(url_in(tmp_path), write_behind={"interval_s": NEVER_S, "durability_timeout_s": 0.05})
    with open_runtime_blocking(config) as threads:
        runtime = runtime_elsewhere(threads)
        session = await runtime.create_session("s1", title="t")
        assert (session.session_id, session.created, repr(session)) == ("s1", True, "<SessionHandle 's1'> elsewhere")
        with pytest.raises(SessionExists):
            await runtime.create_session("s1")
        with pytest.raises(SessionNotFound):
            await runtime.get_session("s2")
        for number in range(3):
            await (await runtime.get_session("s1")).append("user", str(number))
        assert [each.content async for each in session.scan_messages(after=1)] == ["1", "2"]
        assert [each.session_id async for each in runtime.scan_sessions(order="desc")] == ["s1"]
        assert runtime.watermarks.accepted == 4
        assert runtime.status().pending.changes == 4
        assert await runtime.quarantine.entries() == []
        assert runtime.config is config
        for owner, stand_in in ((Runtime, runtime), (SessionHandle, session)):
            for name, member in vars(owner).items():
                if name[0] != "_" and inspect.isfunction(member):
                    assert inspect.signature(getattr(stand_in, name)) == inspect.signature(member.__get__(object()))
        with pytest.raises(AttributeError):
            _ = session._door
        await runtime.flush()
        with pytest.raises(DurabilityNotReached) as caught:
            async with slow_storage(threads):
                await runtime.create_session("s3", durability="stored")
        assert repr(caught.value.outcome) == "<SessionHandle 's3'> elsewhere"
        assert await caught.value.outcome.history() == []
    with pytest.raises(Exception, match="closed"):
        await session.record()


@asynccontextmanager
async def slow_storage(threads: Any) -> AsyncIterator[None]:
    """Batches that take their time."""
    storage = threads._runtime._storage
    apply = storage.apply

    async def slow(*args: Any) -> Any:
        await anyio.sleep(0.3)
        return await apply(*args)

    storage.apply = slow
    try:
        yield
    finally:
        storage.apply = apply


# --- connections ------------------------------------------------------------------------------------------------------


place = place_fixture(("sqlite", "postgresql"))
INSERT = text("INSERT INTO app_numbers VALUES (:number)")
COUNT = text("SELECT count(*) FROM app_numbers")


@asynccontextmanager
async def with_numbers(place: Place) -> AsyncIterator[tuple[Runtime, SqlDatabase]]:
    """A runtime, and a table beside its own."""
    async with place.open() as runtime, SqlDatabase.open(place.config()) as database:
        async with database.connect() as connected:
            await connected.run_sync(
                lambda sync: sync.execute(text("CREATE TABLE app_numbers (number INTEGER PRIMARY KEY)"))
            )
            await connected.commit()
        yield runtime, database


@pytest.mark.anyio
async def test_own_tables_beside_the_runtimes(place: Place) -> None:
    async with with_numbers(place) as (runtime, database):
        await (await runtime.create_session("s1")).append("user", "hi")
        async with database.connect() as connected:
            await connected.execute(INSERT, [{"number": 1}, {"number": 2}])
            await connected.commit()
            await connected.execute(INSERT, {"number": 3})
            await connected.rollback()
            await connected.execute(INSERT, {"number": 4})
        async with database.connect(read_only=True) as connected:
            assert await connected.scalar(COUNT) == 2
            with pytest.raises(DBAPIError) as caught:
                await connected.execute(INSERT, {"number": 54321})
            assert "54321" not in str(caught.value)
        async with database.connect() as connected:
            assert list(await connected.scalars(text("SELECT number FROM app_numbers ORDER BY 1"))) == [1, 2]
            await connected.commit()
            await runtime.flush()
            assert await connected.scalar(text("SELECT count(*) FROM messages")) == 1
    assert place.query("SELECT count(*) FROM app_numbers") == [(2,)]


@pytest.mark.anyio
async def test_what_is_added_up_at_once_is_added_up(place: Place) -> None:
    """Read, then written, by many at once while batches are stored: a transaction of SQLite that began to read could not."""
    locked = "" if place.url.startswith("sqlite") else " FOR UPDATE"
    async with with_numbers(place) as (runtime, database):
        async with database.connect() as connected:
            await connected.execute(INSERT, {"number": 0})
            await connected.commit()

        async def add() -> None:
            for _ in range(5):
                async with database.connect() as connected:
                    number = await connected.scalar(text(f"SELECT number FROM app_numbers{locked}"))
                    await connected.execute(text("UPDATE app_numbers SET number = :number"), {"number": number + 1})
                    await connected.commit()

        async def append() -> None:
            session = await runtime.create_session("s1")
            for number in range(10):
                await session.append("user", f"{number}", durability="stored")

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(add)
            tasks.start_soon(append)
        async with database.connect(read_only=True) as connected:
            assert await connected.scalar(text("SELECT number FROM app_numbers")) == 40


@pytest.mark.anyio
async def test_a_statement_given_up_is_ended_and_holds_nothing(place: Place) -> None:
    slow = "SELECT pg_sleep(60)"
    if place.url.startswith("sqlite"):
        slow = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    async with with_numbers(place) as (runtime, database):
        with anyio.fail_after(20):
            for _ in range(7):  # more often than there are connections
                with anyio.move_on_after(0.05) as scope:
                    async with database.connect() as connected:
                        await connected.execute(INSERT, {"number": 7})
                        await connected.scalar(text(slow))
                assert scope.cancelled_caught
            session = await runtime.create_session("s1")
            await session.append("user", "hi", durability="stored")
            async with database.connect() as connected:
                assert await connected.scalar(COUNT) == 0


@pytest.mark.anyio
async def test_pragmas_of_sqlite(tmp_path: Path) -> None:
    async with open_runtime(url_in(tmp_path)), SqlDatabase.open(Config.of(url_in(tmp_path))) as database:
        async with database.connect() as connected:
            for name, value in (
                ("journal_mode", "wal"),
                ("synchronous", 2),
                ("foreign_keys", 1),
                ("busy_timeout", 10_000),
            ):
                assert await connected.scalar(text(f"PRAGMA {name}")) == value
            assert await connected.scalar(text("PRAGMA query_only")) == 0
        async with database.connect(read_only=True) as connected:
            assert await connected.scalar(text("PRAGMA query_only")) == 1


# --- the guide --------------------------------------------------------------------------------------------------------

GUIDE = (TESTS.parent / "plugins" / "agent_runtime_codelab" / "README.md").read_text()


def block(kind: str) -> str:
    """The block of Python that begins with this comment."""
    [found] = [each for each in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if each.startswith(f"# {kind}\n")]
    return str(found)


def test_the_managers_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block("managers"), {})
    with open_runtime_blocking("sqlite:///data/agent_runtime.db") as runtime:
        session = runtime.get_session("s1")
        assert (session.record().message_count, session.context().metadata) == (2, {"language": "de"})


@pytest.mark.anyio
async def test_the_dependencies_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block("dependencies"), "dependencies", "exec", dont_inherit=True), names)
    async with client_of(names["app"]) as client:
        said = [{"role": "user", "content": "hello"}]
        assert (await client.post("/old/s1", params={"content": "hello"})).json() == said
        assert (await client.get("/new/s1")).json() == said
        assert [(await client.post("/rate/s1", params={"stars": 5})).json() for _ in range(2)] == [1, 2]


def test_every_dependency_and_table_stands_in_the_guide(tmp_path: Path) -> None:
    for name in dependencies.__all__:
        assert f"`{name}" in GUIDE or name in {
            "connection",
            "read_connection",
            "get_connection",
            "get_read_connection",
        }, name
    with open_runtime_blocking(url_in(tmp_path)):
        pass
    place = Place(url_in(tmp_path), path=tmp_path / "new.db")
    for (name,) in place.query("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"):
        assert f"`{name}`" in GUIDE or "version" in name
        assert f"`{name}`" in (sql.__doc__ or "") or "version" in name
