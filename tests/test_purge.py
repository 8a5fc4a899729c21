"""Purged sessions leave nothing behind: not in the database's file, its log, nor in any file of the journal."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import anyio
import pytest

from agent_runtime import (
    Config,
    InvalidInput,
    Quarantined,
    Runtime,
    SessionNotFound,
    StorageUnavailable,
    open_runtime,
)
from agent_runtime.errors import ChangeRejected
from agent_runtime.residents import Resident
from agent_runtime.rows import OutcomeRow
from agent_runtime.testing import Faults, faulty_plugin, writes_session
from agent_runtime_memory import MemoryDatabase
from agent_runtime_sqlite.storage import open_storage
from http_rig import serving
from places import in_schema
from shell import Shell, chat

pytestmark = pytest.mark.anyio

CANARY = "kanarienvogel"
KEPT = "was bleibt"
QUICK: dict[str, Any] = {"interval_s": 0.05}


def config(url: str, **sections: dict[str, Any]) -> Config:
    """A journal that keeps everything, in small segments."""
    journal = {"retain_s": 1e6, "segment_bytes": 16_384} | sections.pop("journal", {})
    return Config.of(url, **{"journal": journal, "write_behind": QUICK} | sections)


def where(directory: Path, word: str = CANARY) -> list[str]:
    """The files below a directory that hold a word."""
    files = [file for file in directory.rglob("*") if file.is_file()]
    return sorted(file.name for file in files if word.encode() in file.read_bytes())


async def fill(runtime: Runtime, session_id: str, word: str, *, flush: bool = True) -> None:
    """A session with the word in everything that can hold one, stored and unstored, there and taken away."""
    session = await runtime.create_session(
        session_id,
        user_id=f"user {word}",
        system_prompt=f"{word} prompt",
        title=word,
        description=word,
        metadata={"word": word},
        idempotency_key=f"birth of {session_id}",
    )
    for turn in range(2):
        for number in range(30):
            text = f"{word} {number} " * (1 + number * 7)
            await session.append("user", text, metadata={"word": word}, idempotency_key=f"{turn} {number}")
        await session.append_many([{"role": "assistant", "content": [{"type": "text", "text": word}]}] * 20)
        await session.append("assistant", tool_calls=[call(word)])
        await session.append_tool_result("c1", "look", {"word": word})
        await session.switch_agent(f"agent {turn}", reason=word, metadata={"word": word})
        await session.update_context(metadata={"word": word})
        await session.put_document("notes", f"{turn}", {"word": word * 2000})
        await session.put_document("files", f"{turn}", f"{word} bytes".encode() * 2000, media_type="text/plain")
        if turn == 0:
            await session.pop()
            await session.delete_document("notes", "0")
            if flush:
                await runtime.flush()
                await session.clear()


def call(word: str) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "look", "arguments": json.dumps({"word": word})}}


@pytest.mark.parametrize("size", [1, 3])
async def test_nothing_is_left_in_any_file(tmp_path: Path, size: int) -> None:
    """While the runtime goes on, and whatever the journal was to retain."""
    async with open_runtime(config(f"sqlite:///{tmp_path}/sessions.db")) as runtime:
        for number in range(size):
            await fill(runtime, f"gone {number}", CANARY)
            await fill(runtime, f"kept {number}", KEPT)
        kept = [await (await runtime.get_session(f"kept {number}")).history() for number in range(size)]
        assert len(where(tmp_path)) > 3
        gone = [f"gone {number}" for number in range(size)]

        would = await runtime.purge_sessions([*gone, "nobody"], dry_run=True)
        assert [it.session_id for it in would] == gone
        assert {(it.messages, it.documents, it.quarantined) for it in would} == {(52, 3, 0)}
        assert all(it.bytes > 100_000 for it in would)
        assert await runtime.purge_sessions([*gone, "nobody"]) == would

        assert where(tmp_path) == []
        for name in gone:
            with pytest.raises(SessionNotFound):
                await runtime.get_session(name)
        assert [await (await runtime.get_session(f"kept {number}")).history() for number in range(size)] == kept
        assert await runtime.purge_sessions(gone) == []
        again = await runtime.create_session("gone 0", idempotency_key="birth of gone 0")
        assert (await again.record()).message_count == 0
    assert where(tmp_path) == []
    assert where(tmp_path, KEPT)


async def test_others_write_meanwhile_and_lose_nothing(tmp_path: Path) -> None:
    """What they have written lies in the same segments, and is not stored yet."""
    url = f"sqlite:///{tmp_path}/sessions.db"
    acknowledged: list[str] = []
    async with open_runtime(config(url)) as runtime, anyio.create_task_group() as tasks:
        others = await runtime.create_session("others")

        async def write() -> None:
            while True:
                message = await others.append("user", f"{KEPT} {len(acknowledged)}")
                acknowledged.append(str(message.content))
                await anyio.sleep(0.0005)

        tasks.start_soon(write)
        for _ in range(3):
            await fill(runtime, "gone", CANARY)
            assert len(await runtime.purge_sessions(["gone"])) == 1
            assert where(tmp_path) == []
        tasks.cancel_scope.cancel()
    async with open_runtime(config(url)) as runtime:
        session = await runtime.get_session("others")
        assert [str(message.content) async for message in session.scan_messages()] == acknowledged
    assert len(acknowledged) > 50


async def test_what_is_in_quarantine_goes_too(tmp_path: Path) -> None:
    faults = Faults()
    plugin: Any = faulty_plugin(open_storage, faults)
    async with open_runtime(config(f"faulty:sqlite:///{tmp_path}/sessions.db"), plugins=[plugin]) as runtime:
        session = await runtime.create_session("gone", durability="stored")
        await runtime.create_session("kept", durability="stored")
        faults.fail("apply", nth=1, error=ChangeRejected("no"))
        await session.append("user", CANARY)
        with pytest.raises(Exception, match="quarantine"):
            await runtime.flush()
        with pytest.raises(Exception, match="held"):
            await session.append("user", CANARY)
        (it,) = await runtime.purge_sessions(["gone", "kept"], idle_longer_than=timedelta(microseconds=1), dry_run=True)
        assert it.session_id == "kept"  # what waits for a person is not idle
        (it,) = await runtime.purge_sessions(["gone"])
        assert (it.messages, it.quarantined) == (1, 1)
        assert await runtime.quarantine.entries() == []
        assert [found.session_id async for found in runtime.scan_sessions()] == ["kept"]
        assert where(tmp_path) == []


async def test_a_creation_in_quarantine_goes_too(tmp_path: Path) -> None:
    faults = Faults()
    plugin: Any = faulty_plugin(open_storage, faults)
    async with open_runtime(config(f"faulty:sqlite:///{tmp_path}/sessions.db"), plugins=[plugin]) as runtime:
        faults.fail("apply", nth=1, error=ChangeRejected("no"))
        await runtime.create_session("gone", title=CANARY)
        with pytest.raises(Exception, match="quarantine"):
            await runtime.flush()
        assert len(await runtime.purge_sessions(["gone"])) == 1
        assert await runtime.quarantine.entries() == []
        assert where(tmp_path) == []


async def test_what_the_database_refuses_of_others_is_not_the_purge_s_to_tell() -> None:
    faults = Faults()
    plugin: Any = faulty_plugin(MemoryDatabase().open, faults)
    async with open_runtime("faulty:memory:", plugins=[plugin]) as runtime:
        await runtime.create_session("gone")
        other = await runtime.create_session("kept", durability="stored")
        faults.reject(writes_session(other.incarnation))
        gate = faults.hold("head")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(runtime.purge_sessions, ["gone", "nobody"])  # which is looked for behind the deletion
            await gate.reached.wait()
            await other.append("user", "hi")
            gate.open()
        assert [each.session_id for each in await runtime.quarantine.entries()] == ["kept"]


async def test_a_deletion_that_the_database_refuses_is_told() -> None:
    faults = Faults()
    plugin: Any = faulty_plugin(MemoryDatabase().open, faults)
    async with open_runtime("faulty:memory:", plugins=[plugin]) as runtime:
        for session_id in ("s1", "s2"):
            await runtime.create_session(session_id, durability="stored")
        faults.reject(lambda batch: len(batch.deleted) > 0 and batch.after == 2)
        with pytest.raises(Quarantined) as caught:
            await runtime.purge_sessions(["s1", "s2"])
        assert caught.value.sequences == (3,)
        assert [each.sequence for each in await runtime.quarantine.entries()] == [3]


async def test_a_call_that_comes_between_the_looks_goes_too(tmp_path: Path) -> None:
    async with open_runtime(config(f"sqlite:///{tmp_path}/sessions.db")) as runtime:
        session = await runtime.create_session("gone")
        look = runtime._purges._outcomes
        looks = 0

        async def looking(resident: Resident) -> list[OutcomeRow]:
            nonlocal looks
            looks += 1
            found = await look(resident)
            if looks < 3:
                await session.append("user", CANARY, idempotency_key=f"k{looks}")
            return found

        with patch.object(runtime._purges, "_outcomes", looking):
            assert len(await runtime.purge_sessions(["gone"])) == 1
        assert looks == 3
        assert where(tmp_path) == []


async def test_only_what_is_idle_goes() -> None:
    async with open_runtime("memory:") as runtime:
        session = await runtime.create_session("s1")
        await anyio.sleep(0.05)
        await runtime.create_session("s2")
        for length in (timedelta(hours=1), timedelta(milliseconds=40)):
            purged = await runtime.purge_sessions(["s1", "s2"], idle_longer_than=length)
        assert [it.session_id for it in purged] == ["s1"]
        with pytest.raises(SessionNotFound):
            await session.record()


async def test_a_database_that_is_away_is_said_and_made_up_for() -> None:
    faults = Faults()
    plugin: Any = faulty_plugin(MemoryDatabase().open, faults)
    options = Config.of("faulty:memory:", write_behind={"durability_timeout_s": 0.3})
    async with open_runtime(options, plugins=[plugin]) as runtime:
        await runtime.create_session("s1", durability="stored")
        now = anyio.current_time()
        faults.fail_between(now, now + 0.6, "apply")
        with pytest.raises(StorageUnavailable, match="is not gone after"):
            await runtime.purge_sessions(["s1"])
        with pytest.raises(SessionNotFound):
            await runtime.get_session("s1")
        with anyio.fail_after(10):
            while runtime.status().pending.changes:
                await anyio.sleep(0.05)
        assert await runtime.purge_sessions(["s1"]) == []


async def test_input_is_checked() -> None:
    async with open_runtime("memory:") as runtime:
        session = await runtime.create_session("a")
        lists: list[tuple[Any, str]] = [
            ([], "session_ids: must have 1 to 1000 ids, not 0"),
            (["x"] * 1001, "session_ids: must have 1 to 1000 ids, not 1001"),
            (["a", "a/b"], 'session_ids[1]: must not contain "/"'),
            ("a", "session_ids: must be a list of ids, not str"),  # else each of its characters were one
            (b"a", "session_ids: must be a list of ids, not bytes"),
            ({"a": 1}, "session_ids: must be a list of ids, not dict"),
        ]
        for ids, told in lists:
            with pytest.raises(InvalidInput, match=re.escape(told)):
                await runtime.purge_sessions(ids)
        lengths: list[Any] = [timedelta(0), timedelta(days=-1), timedelta(days=36_501), timedelta.max, 60]
        for wrong in lengths:
            with pytest.raises(InvalidInput, match="idle_longer_than"):
                await runtime.purge_sessions(["a"], idle_longer_than=wrong)
        assert await runtime.purge_sessions(["a"], idle_longer_than=timedelta(days=36_500)) == []
        assert await session.record()


async def test_no_row_and_no_frame_is_left_with_postgresql(tmp_path: Path) -> None:
    """What the server keeps in its own files until VACUUM is the server's."""
    place = in_schema(tmp_path)
    async with place.open(journal={"retain_s": 1e6}) as runtime:
        await fill(runtime, "gone", CANARY)
        await fill(runtime, "kept", KEPT)
        tables = [
            name for (name,) in place.query("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")
        ]
        assert {"messages", "outcomes", "purges", "quarantine"} <= set(tables)

        def holding(word: str) -> list[str]:
            return [name for name in tables if place.query(f"SELECT 1 FROM {name} t WHERE t::text LIKE '%{word}%'")]

        await runtime.flush()
        assert len(holding(CANARY)) >= 5
        await runtime.purge_sessions(["gone"])
        assert holding(CANARY) == []
        assert len(holding(KEPT)) >= 5
        assert where(tmp_path) == []


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def imported(shell: Shell) -> None:
    old = {"created_at": "2020-01-01T00:00:00Z", "last_activity": "2020-01-02T00:00:00Z"}
    lines = [chat("old 1", CANARY, **old), chat("old 2", CANARY, CANARY, **old), chat("new", KEPT)]
    shell.here("import", shell.file("f.jsonl", *lines))
    (shell.directory / "f.jsonl").unlink()


def test_the_command_purges_what_it_is_told_to(shell: Shell) -> None:
    imported(shell)
    assert where(shell.directory)
    output, errors = shell.here("sessions", "purge", "--idle-longer-than", "52w", "--dry-run")
    assert [line.split("\t")[:4] for line in output.splitlines()] == [
        ["old 1", "1", "0", "0"],
        ["old 2", "2", "0", "0"],
    ]
    assert errors[0].startswith("would purge 2 session(s): 3 message(s), ")
    assert where(shell.directory)
    output, errors = shell.here("sessions", "purge", "old 1", "nobody", "--yes", "--json", code=1)
    assert json.loads(output)["session_id"] == "old 1"
    assert errors[0] == "agent-runtime: there is no session 'nobody'"
    output, errors = shell.here("sessions", "purge", "--idle-longer-than", "52w", "-y")
    assert output.split("\t")[0] == "old 2"
    assert where(shell.directory) == []
    assert shell.here("sessions", "list")[0].startswith("new\t")
    assert "purged 0 session(s)" in shell.here("sessions", "purge", "--idle-longer-than", "52w", "-y")[1][0]


def test_the_command_asks_and_knows_what_it_needs(shell: Shell) -> None:
    imported(shell)
    assert shell.fails("sessions", "purge", "-y", code=2) == "name sessions, or say --idle-longer-than"
    assert "such as 30d" in shell.fails("sessions", "purge", "--idle-longer-than", "month", "-y", code=2)
    assert "say --yes to purge" in shell.fails("sessions", "purge", "new", code=2)
    code, shown = shell.on_terminal("sessions", "purge", "--idle-longer-than", "52w", typed="n\n")
    assert code == 1
    assert "Purge all sessions idle for longer than 52w with all messages?" in shown
    code, shown = shell.on_terminal("sessions", "purge", "old 1", typed="y\n")
    assert code == 0, shown
    assert shell.here("sessions", "list")[0].count("\n") == 2


def test_the_command_goes_through_a_server(shell: Shell) -> None:
    imported(shell)
    with serving("--storage", f"sqlite:///{shell.database}") as server:
        for options in ([], ["--server", server.url]):
            output, _ = shell.here("sessions", "purge", "--idle-longer-than", "52w", "--dry-run", *options)
            assert len(output.splitlines()) == 2
        output, errors = shell.here("sessions", "purge", "--idle-longer-than", "52w", "--yes")
        assert len(output.splitlines()) == 2
        assert where(shell.directory) == []
        _, errors = shell.here("sessions", "purge", "old 1", "--yes", "--server", server.url, code=1)
        assert errors[0] == "agent-runtime: there is no session 'old 1'"
