"""Databases of the old service, imported: to the letter, again and again, and nothing of them is lost or changed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import stat
from contextlib import aclosing, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from agent_runtime import Runtime, SessionNotFound, StorageError
from agent_runtime.formats import ImportRequest
from agent_runtime.transfer import Imported, import_sessions, read_archive
from agent_runtime_codelab.rows import FIRST_FROM, SET_ASIDE
from agent_runtime_codelab.source import open_source
from old_database import OldDatabase, empty, sample, sample_given, sample_rows
from places import SHORT, in_memory, place_of, texts
from shell import Shell

pytestmark = pytest.mark.anyio

KINDS = ("sqlite", "postgresql")
DAY = "2026-01-01 09:00:00"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


async def imported(runtime: Runtime, source: str, *, deleted: bool = False, told: list[str] | None = None) -> Imported:
    """Import an old database; every problem must be expected."""
    problems: list[str] = []
    with open_source(ImportRequest(source=source, deleted=deleted)) as opened:
        async with aclosing(opened.entries) as entries:
            result = await import_sessions(runtime, entries, refused=problems.append)
    assert sorted(problem.replace(f"{opened.name}: ", "") for problem in problems) == sorted(told or [])
    assert runtime.watermarks.stored == runtime.watermarks.accepted
    return result


def utc(text: str) -> datetime:
    """A time of the old tables."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def old_rows(table: str, **wanted: Any) -> list[dict[str, Any]]:
    """The sample's rows with these values."""
    return [row for row in sample_rows()[table] if all(row[name] == value for name, value in wanted.items())]


async def seen(runtime: Runtime, session_id: str) -> dict[str, Any]:
    """A session in the form of codelab_sample.json."""
    session = await runtime.get_session(session_id)
    messages = []
    async for message in session.scan_messages():
        chat = message.to_chat()
        messages.append(chat if message.metadata is None else chat | {"metadata": message.metadata})
    context = await session.context()
    return {
        "session_id": session_id,
        "messages": messages,
        "last_activity": (await session.record()).last_activity.isoformat(),
        "agent_context": {
            "current_agent": context.current_agent,
            "agent_history": [
                {
                    "from": switch.from_agent if FIRST_FROM not in (switch.metadata or {}) else None,
                    "to": switch.to_agent,
                    "reason": switch.reason,
                    "timestamp": switch.switched_at.isoformat(),
                }
                for switch in await session.switches()
            ],
            "metadata": context.metadata,
            "created_at": context.created_at.isoformat(),
            "switch_count": context.switch_count,
            "last_switch_at": context.last_switch_at and context.last_switch_at.isoformat(),
        },
        "approvals": [
            {name: getattr(each, name) for name in ("call_id", "tool_name", "arguments", "reason")}
            for each in await session.approvals()
        ],
    }


def expected(given: dict[str, Any]) -> dict[str, Any]:
    """What was given to the old service, as far as its tables can hold it.

    They have no column for the time of the last switch, which the old service took from the switches; and a session
    without a context has the one that every session begins with.
    """
    [row] = old_rows("sessions", id=given["session_id"])
    context = given["agent_context"] or {
        "current_agent": "orchestrator",
        "agent_history": [],
        "metadata": {},
        "created_at": utc(row["created_at"]).isoformat(),
        "switch_count": 0,
    }
    history = context["agent_history"]
    context = context | {"last_switch_at": history[-1]["timestamp"] if history else None}
    return {name: given[name] for name in ("session_id", "messages", "last_activity", "approvals")} | {
        "agent_context": context
    }


async def check_everything(runtime: Runtime, *, deleted: bool) -> None:
    """What is there is the sample: what was given, and besides the ids, times and titles of the rows."""
    sessions = [given for given in sample_given() if deleted or not given["deleted"]]
    found = {record.session_id: record async for record in runtime.scan_sessions()}
    assert list(found) == [given["session_id"] for given in sessions]
    for given in sessions:
        session_id = given["session_id"]
        assert json.dumps(await seen(runtime, session_id), sort_keys=True) == json.dumps(
            expected(given), sort_keys=True
        )
        record, [row] = found[session_id], old_rows("sessions", id=session_id)
        assert (record.title, record.description) == (row["title"], row["description"])
        assert (record.created_at, record.last_activity) == (utc(row["created_at"]), utc(row["last_activity"]))
        session = await runtime.get_session(session_id)
        messages = [message async for message in session.scan_messages()]
        rows = old_rows("messages", session_db_id=session_id)
        assert [(each.id, each.created_at, each.seq) for each in messages] == [
            (row["id"], utc(row["timestamp"]), seq) for seq, row in enumerate(rows, 1)
        ]
        assert [each.token_count for each in messages] == [row["token_count"] for row in rows]
        for row in old_rows("agent_contexts", session_db_id=session_id):
            assert (await session.context()).updated_at == utc(row["updated_at"])
        approvals = await session.approvals(status=None)
        assert [(each.approval_id, each.created_at, each.status) for each in approvals] == [
            (row["id"], utc(row["created_at"]), row["status"])
            for row in old_rows("pending_approvals", session_id=session_id)
        ]
        assert (await session.list_documents(SET_ASIDE)).items == []
    for given in sample_given():
        if given not in sessions:
            with pytest.raises(SessionNotFound):
                await runtime.get_session(given["session_id"])


@pytest.mark.parametrize("target", ["sqlite", "postgresql"])
async def test_the_sample_is_imported_to_the_letter_twice_in_a_row(target: str, tmp_path: Path) -> None:
    old = sample("sqlite", tmp_path)
    before = old.contents()
    place = place_of(target, tmp_path)
    async with place.open() as runtime:
        assert await imported(runtime, old.url) == Imported(created=18)
        await check_everything(runtime, deleted=False)
        assert await imported(runtime, old.url) == Imported(unchanged=18)
    async with place.open() as runtime:
        await check_everything(runtime, deleted=False)
        accepted = runtime.watermarks.accepted
        assert await imported(runtime, old.url) == Imported(unchanged=18)
        assert runtime.watermarks.accepted == accepted
    assert old.contents() == before


@pytest.mark.parametrize("kind", KINDS)
async def test_deleted_sessions_are_restored_when_asked_for(kind: str, tmp_path: Path) -> None:
    old = sample(kind, tmp_path)
    before = old.contents()
    async with in_memory().open() as runtime:
        assert await imported(runtime, old.url) == Imported(created=18)
        await check_everything(runtime, deleted=False)
        assert await imported(runtime, old.url, deleted=True) == Imported(created=2, unchanged=18)
        records = [record async for record in runtime.scan_sessions()]
        assert [each.session_id for each in records] == [given["session_id"] for given in sample_given()]
    assert old.contents() == before


def test_the_command_imports_twice(shell: Shell) -> None:
    old = sample("sqlite", shell.directory)
    file = old.url.removeprefix("sqlite:///")
    for summary in ("18 created, 0 resumed, 0 unchanged, 0 refused", "0 created, 0 resumed, 18 unchanged, 0 refused"):
        output, errors = shell.here("import", "--format", "codelab", old.url)
        assert output == f"{file}: {summary}\n"
        [line] = errors
        assert line.endswith("2 session(s) marked as deleted were left out; --deleted restores them")
    output, errors = shell.here("import", "--format", "codelab", "--deleted", file)
    assert (output, errors) == (f"{file}: 2 created, 0 resumed, 18 unchanged, 0 refused\n", [])


# --- the old database stays as it is ----------------------------------------------------------------------------------


def looks(directory: Path) -> dict[str, tuple[str, float]]:
    """The files of a directory, their content and times."""
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime) for path in directory.iterdir()
    }


async def test_a_file_that_may_not_be_written_is_read(tmp_path: Path) -> None:
    old = sample("sqlite", tmp_path)
    assert old.path is not None
    old.path.chmod(stat.S_IRUSR)
    before = looks(tmp_path)
    async with in_memory().open() as runtime:
        assert (await imported(runtime, old.url)).created == 18
    assert looks(tmp_path) == before


async def test_a_statement_that_writes_is_refused_by_the_database(tmp_path: Path) -> None:
    from agent_runtime_codelab.database import opener

    for kind in KINDS:
        old = sample(kind, tmp_path)
        async with opener(old.url).open() as database:
            assert len(await database.rows("SELECT id FROM sessions")) == 20
            with pytest.raises(StorageError, match=r"(?i)read-?only"):
                await database.rows("DELETE FROM sessions")


async def test_the_old_service_may_go_on_writing(tmp_path: Path) -> None:
    """An import shows one moment: sessions that it comes to later are as they were when it began."""
    written_to = "session_012-ключ"
    for kind in KINDS:
        old = sample(kind, tmp_path)
        if old.path is not None:
            with closing(sqlite3.connect(old.path)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
        async with in_memory().open() as runtime:
            with open_source(ImportRequest(source=old.url)) as opened:
                async with aclosing(opened.entries) as entries:
                    first = json.loads((await anext(entries)).line)["session_id"]
                    assert first != written_to
                    add_message(old, "late", session_db_id=written_to, timestamp="2027-01-01 00:00:00")
                    result = await import_sessions(runtime, entries, refused=pytest.fail)
            assert result == Imported(created=17)
            assert (await (await runtime.get_session(written_to)).record()).message_count == 17
            assert (await imported(runtime, old.url)) == Imported(created=1, resumed=1, unchanged=16)
            assert (await (await runtime.get_session(written_to)).record()).message_count == 18


# --- faulty rows ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> OldDatabase:
    """An old database with one session, s1, and its context, c1."""
    database = empty(request.param, tmp_path)
    database.insert("sessions", id="s1", title="t", created_at=DAY, last_activity=DAY, is_active=1)
    context: dict[str, Any] = {"current_agent": "coder", "created_at": DAY, "updated_at": DAY, "switch_count": 0}
    database.insert("agent_contexts", id="c1", session_db_id="s1", **context)
    return database


def add_message(old: OldDatabase, message_id: str, **columns: Any) -> None:
    defaults: dict[str, Any] = {"session_db_id": "s1", "role": "user", "content": message_id, "timestamp": DAY}
    old.insert("messages", id=message_id, **(defaults | columns))


def add_approval(old: OldDatabase, approval_id: str, **columns: Any) -> None:
    defaults: dict[str, Any] = {"session_id": "s1", "call_id": "call", "tool_name": "t", "arguments": "{}"}
    old.insert("pending_approvals", id=approval_id, **(defaults | {"created_at": DAY, "status": "pending"} | columns))


async def set_aside(runtime: Runtime, session_id: str = "s1") -> dict[str, dict[str, Any]]:
    """The rows that are kept with the session as they stood."""
    session = await runtime.get_session(session_id)
    documents = (await session.list_documents(SET_ASIDE)).items
    assert all(document.media_type == "application/json" for document in documents)
    return {document.key: json.loads(document.value) for document in documents}


WITHOUT = "the rest went in without it, the row is kept as the document"


async def test_faulty_columns_are_told_of_and_kept(old: OldDatabase) -> None:
    add_message(old, "m1", tool_calls="[{", metadata_json="5", token_count=-1)
    add_message(old, "m2", tool_calls='[{"function": {}}]', name="x")
    add_message(old, "m3", role="assistant", content=None, tool_calls="not JSON")
    told = [
        f"sessions 's1': messages 'm1': tool_calls: is not JSON (character 3); {WITHOUT} messages-m1 in codelab.rows",
        f"sessions 's1': messages 'm1': token_count: must be from 0 to 2147483647; {WITHOUT} messages-m1 in codelab.rows",
        f"sessions 's1': messages 'm1': metadata_json: must be a dict, not int; {WITHOUT} messages-m1 in codelab.rows",
        f"sessions 's1': messages 'm2': tool_calls: is missing; results are matched to calls by it; {WITHOUT} messages-m2 in codelab.rows",
        f"sessions 's1': messages 'm3': tool_calls: is not JSON (character 1); {WITHOUT} messages-m3 in codelab.rows",
    ]
    async with in_memory().open() as runtime:
        assert await imported(runtime, old.url, told=told) == Imported(created=1, problems=5)
        assert await imported(runtime, old.url, told=told) == Imported(unchanged=1, problems=5)
        session = await runtime.get_session("s1")
        messages = [message async for message in session.scan_messages()]
        assert [(each.id, each.content) for each in messages] == [("m1", "m1"), ("m2", "m2"), ("m3", None)]
        assert messages[1].name == "x"
        kept = await set_aside(runtime)
        assert (kept["messages-m1"]["tool_calls"], kept["messages-m1"]["metadata_json"]) == ("[{", "5")
        assert kept["messages-m3"]["tool_calls"] == "not JSON"


async def test_a_row_that_can_be_no_message_is_told_of_and_kept(old: OldDatabase) -> None:
    add_message(old, "m1")
    add_message(old, "m2", role="robot", content="Ω")
    add_message(old, "m3")
    told = [
        (
            "sessions 's1': messages 'm2': role: is unknown; it is one of system, developer, user, assistant, tool; "
            "the row is kept as the document messages-m2 in codelab.rows"
        )
    ]
    async with in_memory().open() as runtime:
        assert await imported(runtime, old.url, told=told) == Imported(created=1, problems=1)
        assert [each["content"] for each in await (await runtime.get_session("s1")).history()] == ["m1", "m3"]
        assert (await set_aside(runtime))["messages-m2"]["content"] == "Ω"
        assert await imported(runtime, old.url, told=told) == Imported(unchanged=1, problems=1)


async def test_rows_that_belong_to_nothing_are_told_of(old: OldDatabase) -> None:
    add_message(old, "m1", session_db_id="gone")
    add_approval(old, "a1", session_id="gone")
    old.insert(
        "agent_contexts", id="c2", session_db_id="no", current_agent="x", created_at=DAY, updated_at=DAY, switch_count=0
    )
    old.insert("agent_switches", id="w1", context_db_id="c9", to_agent="x", switched_at=DAY)
    stays = "; the row stays in the old database"
    told = [
        f"messages 'm1': session_db_id: there is no sessions 'gone'{stays}",
        f"agent_contexts 'c2': session_db_id: there is no sessions 'no'{stays}",
        f"agent_switches 'w1': context_db_id: there is no agent_contexts 'c9'{stays}",
        f"pending_approvals 'a1': session_id: there is no sessions 'gone'{stays}",
    ]
    async with in_memory().open() as runtime:
        assert await imported(runtime, old.url, told=told) == Imported(created=1, problems=4)


async def test_repeated_ids_of_calls_are_no_fault(old: OldDatabase) -> None:
    """Within a session, across sessions, and of approvals."""
    old.insert("sessions", id="s2", created_at=DAY, last_activity=DAY, is_active=1)
    call = json.dumps([{"id": "call", "type": "function", "function": {"name": "t", "arguments": "{}"}}])
    for session_id in ("s1", "s2"):
        for number in (1, 2):
            of = {"session_db_id": session_id, "timestamp": f"2026-01-01 09:00:0{number}"}
            add_message(old, f"{session_id}-{number}", role="assistant", content=None, tool_calls=call, **of)
            of["timestamp"] += ".500000"
            add_message(old, f"{session_id}-r{number}", role="tool", tool_call_id="call", **of)
            add_approval(old, f"{session_id}-a{number}", session_id=session_id)
    async with in_memory().open() as runtime:
        assert await imported(runtime, old.url) == Imported(created=2)
        for session_id in ("s1", "s2"):
            session = await runtime.get_session(session_id)
            assert len([message async for message in session.scan_messages()]) == 4
            assert [each.approval_id for each in await session.approvals()] == [f"{session_id}-a1", f"{session_id}-a2"]


async def test_faulty_approvals_are_told_of_and_kept(old: OldDatabase) -> None:
    add_approval(old, "a1", status="lost")
    add_approval(old, "a2", call_id="")
    add_approval(old, "a3", status="approved", arguments='{"π": 1e2}')
    kept = "the row is kept as the document pending_approvals-{} in codelab.rows"
    told = [
        "sessions 's1': pending_approvals 'a1': status: is none of pending, approved, edited, rejected, expired; "
        + kept.format("a1"),
        "sessions 's1': pending_approvals 'a2': call_id: must not be empty; " + kept.format("a2"),
    ]
    async with in_memory().open() as runtime:
        assert await imported(runtime, old.url, told=told) == Imported(created=1, problems=2)
        [approval] = await (await runtime.get_session("s1")).approvals(status=None)
        assert (approval.status, approval.arguments, approval.decided_at) == ("approved", {"π": 100.0}, None)
        assert set(await set_aside(runtime)) == {"pending_approvals-a1", "pending_approvals-a2"}


async def test_faulty_contexts_and_switches_are_told_of_and_kept(old: OldDatabase) -> None:
    more = {"created_at": DAY, "updated_at": DAY}
    old.insert("agent_contexts", id="c2", session_db_id="s1", current_agent="other", switch_count=1, **more)
    old.insert("agent_switches", id="w1", context_db_id="c1", from_agent="orchestrator", to_agent="", switched_at=DAY)
    old.insert("agent_switches", id="w2", context_db_id="c2", from_agent="orchestrator", to_agent="x", switched_at=DAY)
    old.insert("agent_switches", id="w3", context_db_id="c1", to_agent="y", switched_at=DAY, metadata_json="[]")
    kept = "kept as the document {} in codelab.rows"
    told = [
        "sessions 's1': agent_contexts 'c2': is another context of the session, beside c1; it is "
        + kept.format("agent_contexts-c2"),
        "sessions 's1': agent_switches 'w1': to_agent: must not be empty; the row is "
        + kept.format("agent_switches-w1"),
        "sessions 's1': agent_switches 'w2': belongs to another context; it is " + kept.format("agent_switches-w2"),
        f"sessions 's1': agent_switches 'w3': metadata_json: must be a dict, not list; {WITHOUT} agent_switches-w3 in codelab.rows",
        "sessions 's1': agent_contexts 'c1': switch_count: is 0, but there are 1, which counts; the row is "
        + kept.format("agent_contexts-c1"),
    ]
    async with in_memory().open() as runtime:
        assert await imported(runtime, old.url, told=told) == Imported(created=1, problems=5)
        session = await runtime.get_session("s1")
        [switch] = await session.switches()
        assert (switch.from_agent, switch.to_agent) == ("orchestrator", "y")
        assert (await session.context()).switch_count == 1
        assert len(await set_aside(runtime)) == 5


async def test_an_id_that_no_session_can_have_is_told_of(old: OldDatabase) -> None:
    old.insert("sessions", id="a/b", created_at=DAY, last_activity=DAY, is_active=1)
    add_message(old, "m1", session_db_id="a/b")
    told = [
        "sessions 'a/b': id: must not contain \"/\"; it stays in the old database, with its 1 message(s)",
    ]
    async with in_memory().open() as runtime:
        assert await imported(runtime, old.url, told=told) == Imported(created=1, problems=1)


async def test_only_sqlite_holds_times_that_are_none_and_text_that_is_no_text(tmp_path: Path) -> None:
    old = empty("sqlite", tmp_path)
    old.insert("sessions", id="s1", title="x" * 501, created_at="soon", last_activity=DAY, is_active=1)
    add_message(old, "m1", timestamp="2026-01-01T12:00:00+02:00")
    add_message(old, "m2", timestamp="noon")
    add_message(old, "m3", content="a\0b")
    add_message(old, "m4", content=b"bytes")
    assert old.path is not None
    with closing(sqlite3.connect(old.path)) as connection, connection:
        connection.execute("UPDATE messages SET name = CAST(x'ff41' AS TEXT) WHERE id = 'm1'")
    row = "the row is kept as the document messages-{} in codelab.rows"
    told = [
        (
            "sessions 's1': created_at: is no time; 1970-01-01T00:00:00+00:00 stands for it, "
            "the row is kept as the document sessions-s1 in codelab.rows"
        ),
        "sessions 's1': messages 'm2': timestamp: is no time; 2026-01-01T10:00:00+00:00 stands for it, "
        + row.format("m2"),
        (
            "sessions 's1': messages 'm1': name: must not contain lone surrogates (U+DCFF at position 0); decode the text "
            f"with errors='replace'; {WITHOUT} messages-m1 in codelab.rows"
        ),
        "sessions 's1': messages 'm3': content: must not contain NUL characters (one is at position 1); "
        + row.format("m3"),
        "sessions 's1': messages 'm4': content: must be a str, a list of content parts or None, not bytes; "
        + row.format("m4"),
        f"sessions 's1': title: has 501 characters, at most 500 are allowed; {WITHOUT} sessions-s1 in codelab.rows",
    ]
    async with in_memory().open() as runtime:
        assert (await imported(runtime, old.url, told=told)).created == 1
        messages = [message async for message in (await runtime.get_session("s1")).scan_messages()]
        assert [(each.id, each.created_at.hour) for each in messages] == [("m1", 10), ("m2", 10)]
        kept = await set_aside(runtime)
        assert kept["messages-m1"]["name"] == "\udcffA"
        assert kept["messages-m3"]["content"] == "a\0b"
        assert bytes.fromhex(kept["messages-m4"]["content"]) == b"bytes"
        assert kept["sessions-s1"]["title"] == "x" * 501


def test_the_command_ends_with_1_when_something_was_set_aside(shell: Shell) -> None:
    old = empty("sqlite", shell.directory)
    add_message(old, "m1", session_db_id="gone")
    output, errors = shell.here("import", "--format", "codelab", old.url, code=1)
    assert output.endswith(": 0 created, 0 resumed, 0 unchanged, 0 refused, 1 problem(s)\n")
    assert "messages 'm1': session_db_id: there is no sessions 'gone'" in errors[0]


json_text = st.none() | st.text() | st.sampled_from(["[]", "{}", '{"a":1}', "null", "[{}]", '[{"id":"c"}]', "NaN"])
rows = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "tool", "system", "robot", ""]),
        "content": st.none() | texts | st.binary(max_size=5) | st.integers(0, 9),
        "timestamp": st.sampled_from([DAY, "2026-01-01 09:00:00.5", "2025-06-01T00:00:00+00:00", "x", 5]),
        "name": st.none() | texts,
        "tool_call_id": st.none() | texts,
        "tool_calls": json_text,
        "token_count": st.none() | st.integers(-5, 2**40),
        "metadata_json": json_text,
    }
)


@for_all(table=st.lists(rows, max_size=5))
@SHORT
def test_whatever_stands_in_the_table_is_there_or_kept_and_told(
    table: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    import anyio

    old = empty("sqlite", tmp_path_factory.mktemp("old"))
    old.insert("sessions", id="s1", created_at=DAY, last_activity=DAY, is_active=1)
    for number, row in enumerate(table):
        clean = {name: value.replace("\ud800", "") if isinstance(value, str) else value for name, value in row.items()}
        add_message(old, f"m{number}", **clean)

    async def check() -> None:
        problems: list[str] = []
        async with in_memory().open() as runtime:
            with open_source(ImportRequest(source=old.url)) as opened:
                async with aclosing(opened.entries) as entries:
                    result = await import_sessions(runtime, entries, refused=problems.append)
            assert (result.created, result.refused) == (1, 0)
            archive = await read_archive(runtime, "s1")
            kept = await set_aside(runtime)
        there = {message.id: message for message in archive.messages}
        for number, row in enumerate(table):
            if f"messages-m{number}" in kept:
                assert any(f"messages 'm{number}'" in problem for problem in problems)
                continue
            message = there[f"m{number}"]
            content = str(row["content"]) if isinstance(row["content"], int) else row["content"]  # as its column has it
            assert (message.role, message.content) == (row["role"], content)
            assert (message.name, message.tool_call_id) == (row["name"], row["tool_call_id"])
            assert message.tool_calls == (None if row["tool_calls"] is None else json.loads(row["tool_calls"]))
            assert message.metadata == (None if row["metadata_json"] is None else json.loads(row["metadata_json"]))
            assert message.token_count == row["token_count"]

    anyio.run(check)


# --- what is no old database ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("sqlite:///none.db", "source: there is no file none.db"),
        (
            "mysql://me:hunter2@host/db",
            "source: is not a URL of an old database; write sqlite:///old.db or postgresql:",
        ),
        ("none.db", "source: is not a URL of an old database"),
    ],
)
def test_a_source_that_can_not_be_one_is_refused(shell: Shell, source: str, problem: str) -> None:
    told = shell.fails("import", "--format", "codelab", source)
    assert told.startswith(problem)
    assert "hunter2" not in told


async def failure(source: str) -> str:
    """The one line of what can't be imported."""
    async with in_memory().open() as runtime:
        with pytest.raises(StorageError) as caught:
            await imported(runtime, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_another_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    path.write_bytes(b"no database at all, whatever its name says, and long enough to look")
    assert re.search(r"other.db: can't be read: file is not a database$", await failure(f"sqlite:///{path}"))
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE sessions (id TEXT, title TEXT)")
    assert await failure(f"sqlite:///{path}") == (
        f"{path}: table sessions has no column created_at, deleted_at, description, is_active, last_activity"
    )
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE sessions")
    assert await failure(f"sqlite:///{path}") == f"{path}: is no database of the old service: it has no table sessions"


async def test_a_file_that_can_not_be_read_now_is_told_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_runtime_codelab.database._BUSY_TIMEOUT_S", 0.1)
    old = sample("sqlite", tmp_path)
    assert old.path is not None
    with closing(sqlite3.connect(old.path, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")  # so that the file and its journal hold halves of a transaction
        connection.execute("BEGIN EXCLUSIVE")
        assert "another process keeps it locked" in await failure(old.url)
        connection.execute("UPDATE messages SET content = content || 'x'")
        left_behind = tmp_path / "left" / "codelab.db"
        left_behind.parent.mkdir()
        for name in ("codelab.db", "codelab.db-journal"):
            shutil.copy(tmp_path / name, left_behind.parent)
    before = looks(left_behind.parent)
    assert "a process died while it wrote; start the old service once" in await failure(f"sqlite:///{left_behind}")
    assert looks(left_behind.parent) == before


async def test_a_server_that_does_not_answer_is_named_without_its_password() -> None:
    told = await failure("postgresql://me:hunter2@127.0.0.1:1/app")
    assert told.startswith("the old database can't be opened: ")
    assert "hunter2" not in told


async def test_a_database_of_the_new_runtime_is_none(tmp_path: Path) -> None:
    place = place_of("sqlite", tmp_path)
    assert "has no" in await failure(place.url)
