"""A copy is to the letter, whatever it is copied from and to, and whatever interrupts it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given

from agent_runtime import InvalidInput, LeaseHeld, Quarantined, Runtime, StorageUnavailable, open_runtime_blocking
from agent_runtime.changes import Batch, coalesce
from agent_runtime.copying import Copied, Progress, copy, quiet
from agent_runtime.directories import journal_places
from agent_runtime.errors import ChangeRejected, JournalError, LeaseLost
from agent_runtime.journal import LocalFiles
from agent_runtime.storage import Storage, StorageConfig
from agent_runtime.testing import CallName, Faults, FaultyStorage
from agent_runtime.testing.kit.dump import Dump, dump
from agent_runtime.testing.kit.world import Call, World, calls
from agent_runtime.testing.kit.writer import (
    NOON,
    claim,
    context_row,
    document_row,
    message_row,
    outcome_row,
    quarantine_row,
    session_row,
    switch_row,
    writing,
)
from agent_runtime.transfer import chat_entries, import_sessions
from agent_runtime_memory import MemoryDatabase
from agent_runtime_postgresql import open_postgresql
from agent_runtime_sql.tables import metadata, time_text
from agent_runtime_sqlite import open_sqlite
from crash import Left, leave_crash
from places import SHORT, Place, in_file, in_schema
from postgres_server import migrated_schema, server, url_of
from shell import Shell

pytestmark = pytest.mark.anyio

SAMPLE = Path(__file__).parent / "data" / "airline-sample.jsonl.gz"
ROUNDS = 5  # of the 30 conversations
TABLES = ("sessions", "contexts", "switches", "documents", "messages", "quarantine", "outcomes")
KEYS = {table: [column.name for column in metadata.tables[table].primary_key] for table in TABLES}
LIVING = "incarnation IN (SELECT incarnation FROM sessions WHERE deleted_at IS NULL)"
ABOVE = "seq > (SELECT floor FROM sessions WHERE sessions.incarnation = messages.incarnation)"
SEEN = dict.fromkeys(TABLES, "true") | {
    "sessions": "deleted_at IS NULL",
    "contexts": LIVING,
    "switches": LIVING,
    "documents": LIVING,
    "messages": f"{LIVING} AND {ABOVE}",
    "outcomes": "expires_at > '{now}'",
}
"""Of the rows that a database has: those that can be seen."""


def sqlite(path: Path) -> AbstractAsyncContextManager[Storage]:
    return open_sqlite(StorageConfig(url=f"sqlite:///{path}"))


def file_rows(path: Path, table: str, *, seen: bool = False) -> list[tuple[Any, ...]]:
    """All rows of a table, or those that can be seen."""
    where = SEEN[table].format(now=time_text(datetime.now(UTC))) if seen else "true"
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"SELECT * FROM {table} WHERE {where} ORDER BY {', '.join(KEYS[table])}").fetchall()


def schema_rows(schema: str, table: str) -> list[tuple[Any, ...]]:
    """The same of a PostgreSQL schema, in SQLite's types."""
    rows = server().rows(f"SELECT * FROM {table} ORDER BY {', '.join(KEYS[table])}", schema=schema)
    return [tuple(time_text(each) if isinstance(each, datetime) else each for each in row) for row in rows]


def watermark(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT sequence FROM partitions").fetchone()
    return 0 if found is None else int(found[0])


def assert_same(source: Path, target: Path) -> None:
    for table in TABLES:
        expected = file_rows(source, table, seen=True)
        assert expected, table
        assert file_rows(target, table) == expected
    assert watermark(target) == watermark(source)


async def copied(
    source: AbstractAsyncContextManager[Storage],
    target: AbstractAsyncContextManager[Storage],
    *,
    now: datetime | None = None,
) -> Copied:
    async with (
        source as from_storage,
        quiet(from_storage, journals_of(from_storage)) as held,
        target as to_storage,
    ):
        return await copy(held, to_storage, journals_of(to_storage), now=now or datetime.now(UTC))


def journals_of(storage: Storage) -> list[LocalFiles]:
    return [LocalFiles(place) for place in journal_places(None, storage.abilities)]


# --- a source with everything in it -----------------------------------------------------------------------------------


async def conversations() -> AsyncIterator[bytes]:
    for number in range(ROUNDS):
        for line in gzip.decompress(SAMPLE.read_bytes()).splitlines():
            conversation = json.loads(line)
            yield json.dumps(conversation | {"session_id": f"{conversation['session_id']}-{number}"}).encode()


async def write_everything(runtime: Runtime) -> None:
    """Rows of every kind, among them some that nobody sees any more."""
    odd = await runtime.create_session("ödd 😀", user_id="ada", metadata={"b": 1e2, "a": [1.50, 10**30, None]})
    await odd.append("user", "one\n\t\u2028\x01 \U0010ffff", metadata={"z": 0.1, "a": {}}, idempotency_key="k")
    await odd.append_message({"role": "assistant", "content": [{"type": "text", "text": "é"}], "refusal": None})
    await odd.append_many([{"role": "user", "content": ""}, {"role": "user", "content": None}])
    await odd.pop()
    await odd.update(title="t", description="d" * 100)
    for agent in ("coder", "writer", "coder"):
        await odd.switch_agent(agent, reason="why", metadata={"n": 1.0})
    for number in range(3):
        await odd.put_document("notes", f"{number}", {"number": number})
        await odd.put_document("ünique", f"é{number}", b"\0\xff" * number, media_type="x/y")
    cleared = await runtime.create_session("cleared", idempotency_key="created")
    await cleared.append_many([{"role": "user", "content": "hushed"}] * 4)
    await cleared.clear()
    await cleared.append("user", "said")
    gone = await runtime.create_session("gone")
    await gone.append("user", "soon forgotten", idempotency_key="outlives")
    await gone.put_document("notes", "gone", 1)
    await gone.switch_agent("coder")
    await gone.delete()


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with rows of every kind, in quarantine too."""
    place = in_file(tmp_path_factory.mktemp("everything"))

    async def write() -> None:
        async with place.open() as runtime:
            await write_everything(runtime)

    anyio.run(write)
    left = Left(place.path.parent)
    with place.open_blocking() as runtime:
        held = runtime.create_session("held")
        held.append("user", "first")
        runtime.flush()
        left.sql(
            "INSERT INTO messages (incarnation, seq, id, role, created_at) "
            "SELECT incarnation, 2, 'in the way', 'user', created_at FROM sessions WHERE session_id = 'held'"
        )
        held.append("user", "refused")
        held.switch_agent("coder", idempotency_key="waits")
        with pytest.raises(Quarantined):
            runtime.flush()
    left.sql(
        "DELETE FROM messages WHERE id = 'in the way'",
        "INSERT INTO outcomes SELECT partition, scope, 'expired', route, body_hash, outcome, sequence, "
        "'2026-01-01T00:00:00.000000Z' FROM outcomes WHERE key = 'k'",
    )
    shutil.rmtree(f"{place.path}.journal")
    return place.path


@pytest.fixture
def source(everything: Path, tmp_path: Path) -> Path:
    with closing(sqlite3.connect(everything)) as connection, closing(sqlite3.connect(tmp_path / "source.db")) as other:
        connection.backup(other)
    return tmp_path / "source.db"


@pytest.fixture(scope="module")
def whole(everything: Path) -> Path:
    """The same, with 150 real conversations."""
    path = Path(shutil.copy(everything, everything.with_name("whole.db")))

    async def write() -> None:
        async with Place(f"sqlite:///{path}", path=path).open() as runtime:
            imported = await import_sessions(runtime, chat_entries("sample", conversations()), refused=pytest.fail)
            assert imported.created == 150

    anyio.run(write)
    return path


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.scan._BATCH_ROWS", 4)
    monkeypatch.setattr("agent_runtime.scan._PAGE", 2)
    monkeypatch.setattr("agent_runtime.scan._PAGE_OF_LARGE", 2)
    monkeypatch.setattr("agent_runtime.quarantined._PAGE", 2)


# --- to the letter ----------------------------------------------------------------------------------------------------


async def test_there_and_back(whole: Path, tmp_path: Path) -> None:
    """Every row of every table, as the databases themselves show them."""
    schema, back = migrated_schema(), tmp_path / "back.db"
    there = await copied(sqlite(whole), open_postgresql(StorageConfig(url=url_of(schema))))
    for table in TABLES:
        assert schema_rows(schema, table) == file_rows(whole, table, seen=True)
    again = await copied(open_postgresql(StorageConfig(url=url_of(schema))), sqlite(back))
    assert_same(whole, back)
    assert there.source == there.target == again.source == again.target
    assert not there.resumed
    assert not there.differing
    counts = {table: len(file_rows(back, table)) for table in TABLES}
    assert {table: found.rows for table, found in there.source.items()} == counts
    async with Place(f"sqlite:///{back}", path=back).open() as runtime:
        assert (await (await runtime.get_session("ödd 😀")).record()).metadata == {"b": 1e2, "a": [1.50, 10**30, None]}
        assert len(await runtime.quarantine.entries()) == 2
        await (await runtime.get_session("cleared")).append("user", "more", idempotency_key="new")


async def test_nothing_of_the_source_is_changed(source: Path, tmp_path: Path) -> None:
    before = {table: file_rows(source, table) for table in (*TABLES, "purges") if table in KEYS}
    with closing(sqlite3.connect(source)) as connection:
        journals = connection.execute("SELECT * FROM journals").fetchall()
        await copied(sqlite(source), sqlite(tmp_path / "target.db"))
        assert connection.execute("SELECT * FROM journals").fetchall() == journals
    assert {table: file_rows(source, table) for table in before} == before


async def every_call(world: World, source: Storage, calls: list[Call]) -> Dump:
    grant = await source.leases.acquire(claim())
    changes = [world.perform(call) for call in calls]
    await source.apply(coalesce(changes, 0, NOON), grant.fence)
    await source.leases.release(grant.fence)
    return world.dump()


@given(calls())
@SHORT
async def test_whatever_is_called_is_copied(called: list[Call]) -> None:
    memory, other = MemoryDatabase(), MemoryDatabase()
    config = StorageConfig(url="memory:")
    async with memory.open(config) as source:
        expected = await every_call(World(), source, called)
    assert not (await copied(memory.open(config), other.open(config))).differing
    async with other.open(config) as target:
        found = await dump(target)
    assert found.watermark >= expected.watermark  # a source of few changes is fewer changes than batches
    assert msgspec.structs.replace(found, watermark=expected.watermark) == expected


# --- interrupted ------------------------------------------------------------------------------------------------------


CONFIG = StorageConfig(url="memory:")


async def small_source() -> MemoryDatabase:
    """Rows of every kind, in three sessions."""
    database = MemoryDatabase()
    async with writing(lambda: database.open(CONFIG)) as writer:
        for number, incarnation in enumerate("cab", 1):
            await writer.apply(
                created=(session_row(incarnation, message_count=3, next_seq=4, sequence=number),),
                contexts=(context_row(incarnation),),
                switches=(switch_row(incarnation, 1),),
                documents=(document_row(incarnation, "m", "1"), document_row(incarnation, "n", "1")),
                messages=tuple(message_row(incarnation, seq) for seq in (1, 2, 3)),
                outcomes=(outcome_row(incarnation, "k"), outcome_row("create", incarnation)),
            )
        await writer.apply(quarantined=tuple(quarantine_row(number) for number in (1, 3, 4)))
        for _ in range(30):
            await writer.apply()
    return database


@pytest.fixture
def tiny_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.scan._BATCH_ROWS", 3)
    monkeypatch.setattr("agent_runtime.scan._PAGE", 2)
    monkeypatch.setattr("agent_runtime.scan._PAGE_OF_LARGE", 2)
    monkeypatch.setattr("agent_runtime.quarantined._PAGE", 2)


@pytest.mark.usefixtures("tiny_batches")
@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("after_effect", [False, True])
async def test_it_goes_on_where_it_was_whichever_call_fails(side: str, *, after_effect: bool) -> None:
    """Each call in turn. Nothing is written twice, and in the end nothing is missing."""
    database = await small_source()
    async with database.open(CONFIG) as storage:
        expected = await dump(storage)
    resumed = 0
    for nth in range(1, 1000):
        faults, other = Faults(), MemoryDatabase()
        fault = faults.fail(nth=nth, after_effect=after_effect)
        failed = False
        try:
            await once(database, other, **{side: faults})
        except StorageUnavailable:
            failed = True
        result = await once(database, other)
        resumed += result.resumed
        assert not result.differing
        async with other.open(CONFIG) as storage, storage.snapshot() as snapshot:
            assert await dump(storage) == expected
            assert len(await snapshot.outcomes(limit=100)) == 6
            lease = await snapshot.lease()
            assert lease is not None
            assert lease.holder is None
        if not fault.hits:
            assert not failed
            break
    assert 20 < nth < 1000
    assert resumed > 10


async def once(
    database: MemoryDatabase, other: MemoryDatabase, *, source: Faults | None = None, target: Faults | None = None
) -> Copied:
    async with (
        database.open(CONFIG) as from_storage,
        other.open(CONFIG) as to_storage,
        quiet(FaultyStorage(from_storage, source or Faults()), []) as held,
    ):
        return await copy(held, FaultyStorage(to_storage, target or Faults()), [], now=datetime.now(UTC))


@pytest.mark.usefixtures("tiny_batches")
@pytest.mark.parametrize(("call", "side", "kept"), [("apply", "target", True), ("head", "source", False)])
async def test_a_target_is_kept_from_others_if_it_may_have_something(call: CallName, side: str, *, kept: bool) -> None:
    database, other, faults = await small_source(), MemoryDatabase(), Faults()
    faults.fail(call, nth=1, after_effect=True)
    with pytest.raises(StorageUnavailable):
        await once(database, other, **{side: faults})
    async with other.open(CONFIG) as storage, storage.snapshot() as snapshot:
        lease = await snapshot.lease()
        assert lease is not None
        assert (lease.holder is not None) == kept


@pytest.mark.usefixtures("tiny_batches")
async def test_a_commit_that_comes_late_is_counted() -> None:
    database, other, faults = await small_source(), MemoryDatabase(), Faults()
    faults.commit_late(nth=3)
    with pytest.raises(StorageUnavailable):
        await once(database, other, target=faults)
    result = await once(database, other, target=faults)
    assert (result.resumed, result.differing) == (True, [])


@pytest.mark.usefixtures("tiny_batches")
async def test_what_is_there_is_not_written_again() -> None:
    database, other, faults = await small_source(), MemoryDatabase(), Faults()
    await once(database, other, target=faults)
    batches = faults.count("apply")
    assert batches > 10
    assert (await once(database, other, target=faults)).resumed
    assert faults.count("apply") == batches


@pytest.mark.usefixtures("tiny_batches")
async def test_outcomes_that_expire_on_the_way_are_left_out() -> None:
    database, other, faults = await small_source(), MemoryDatabase(), Faults()
    async with writing(lambda: database.open(CONFIG)) as writer:
        now = datetime.now(UTC)
        soon = [outcome_row("a", f"{n}", expires_at=now + timedelta(minutes=1)) for n in range(3)]
        await writer.apply(outcomes=(*soon, outcome_row("a", "expired", expires_at=now)))
    faults.reject(lambda batch: any(row.scope == "create" for row in batch.outcomes))
    with pytest.raises(ChangeRejected):
        await once(database, other, target=faults)
    faults.clear()
    result = await copied(database.open(CONFIG), other.open(CONFIG), now=now + timedelta(minutes=2))
    assert (result.differing, result.target["outcomes"].rows) == ([], 6)


def test_a_process_that_is_killed(shell: Shell, tmp_path: Path) -> None:
    """Until the copy is run again its target is nobody's."""
    generate(shell.database, sessions=24, messages=1000)
    target = tmp_path / "target.db"
    command = ("copy", "--from", f"sqlite:///{shell.database}", "--to", f"sqlite:///{target}")
    kills = 0
    for batches in (1, 3):
        with shell.start(*command) as process:
            kill_when_at(process.pid, target, batches)
            process.wait(60)
        kills += process.returncode == -signal.SIGKILL
        assert 1 <= watermark(target) < 24
        refused = shell.here("sessions", "list", "--storage", f"sqlite:///{target}", code=3)[1][-1]
        assert refused.startswith("agent-runtime: the database is in use by an unfinished copy of the database ")
        assert "copy again to finish it" in refused
    assert kills == 2
    output, errors = shell.run(*command)
    assert output.endswith("the same on both sides, a part of it from before\n")
    assert errors == []
    for table in ("sessions", "contexts", "messages"):
        assert file_rows(target, table) == file_rows(shell.database, table)
    assert watermark(target) == watermark(shell.database)
    checked, _ = shell.here("check", "--storage", f"sqlite:///{target}")
    assert checked.startswith("ok: 24 session(s), 24000 message(s)")


def kill_when_at(pid: int, target: Path, batches: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if target.exists() and tables_there(target) and watermark(target) >= batches:
            break
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)


def tables_there(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT count(*) FROM sqlite_master WHERE name = 'partitions'"
        return bool(connection.execute(query).fetchone()[0])


def generate(path: Path, *, sessions: int, messages: int) -> None:
    """Sessions with that many messages each; a batch a thousand messages."""

    async def write() -> None:
        async with writing(lambda: sqlite(path)) as writer:
            for number in range(sessions):
                incarnation = f"{number:06}"
                await writer.create(
                    incarnation,
                    created_at=NOON + timedelta(seconds=number),
                    message_count=messages,
                    next_seq=messages + 1,
                )
                for first in range(1, messages + 1, 1000):
                    seqs = range(first, min(first + 1000, messages + 1))
                    content = f"{incarnation} " + "x" * 150
                    rows = tuple(message_row(incarnation, seq, content=content, metadata='{"n":1}') for seq in seqs)
                    await writer.apply(messages=rows)

    anyio.run(write)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_order(shell: Shell, tmp_path: Path, number: signal.Signals, code: int) -> None:
    generate(shell.database, sessions=20, messages=1000)
    target = tmp_path / "target.db"
    command = ("copy", "--from", f"sqlite:///{shell.database}", "--to", f"sqlite:///{target}")
    with shell.start(*command) as process:
        while not (target.exists() and tables_there(target) and watermark(target)):
            time.sleep(0.002)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    told = errors.decode()
    assert (process.returncode, output) == (code, b""), told
    assert told == "agent-runtime: interrupted; run it again, and it goes on where it was\n"
    assert shell.here("sessions", "list")[0]  # its lease was given back
    assert "has changed since" not in shell.here(*command)[0]


# --- what is refused --------------------------------------------------------------------------------------------------


async def begun(source: Path, target: Path, *, batches: int = 2) -> None:
    """A copy that ends after some batches."""
    faults = Faults()
    faults.fail("apply", nth=batches + 1)
    async with sqlite(source) as storage, quiet(storage, journals_of(storage)) as held, sqlite(target) as other:
        with pytest.raises(StorageUnavailable):
            await copy(held, FaultyStorage(other, faults), [], now=datetime.now(UTC))


@pytest.mark.usefixtures("small_batches")
async def test_a_source_that_has_changed_since(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.db"
    await begun(source, target)
    async with Place(f"sqlite:///{source}", path=source).open() as runtime:
        await runtime.create_session("new")
    before = file_rows(target, "sessions")
    with pytest.raises(InvalidInput, match=r"target: has a copy of this source, which has changed since"):
        await copied(sqlite(source), sqlite(target))
    assert file_rows(target, "sessions") == before


@pytest.mark.usefixtures("small_batches")
async def test_a_source_that_was_only_read_meanwhile(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.db"
    await begun(source, target)
    async with Place(f"sqlite:///{source}", path=source).open() as runtime:
        assert await runtime.get_session("cleared")
    shutil.rmtree(f"{source}.journal")
    result = await copied(sqlite(source), sqlite(target))
    assert (result.resumed, result.differing) == (True, [])
    assert_same(source, target)


async def test_a_target_that_was_written_to_since(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.db"
    await copied(sqlite(source), sqlite(target))
    async with Place(f"sqlite:///{target}", path=target).open() as runtime:
        await runtime.create_session("new")
    with pytest.raises(InvalidInput, match=r"target: has this copy, and was written to since"):
        await copied(sqlite(source), sqlite(target))


async def test_a_target_with_something_in_it(source: Path, tmp_path: Path) -> None:
    target = in_file(tmp_path)  # with the id of the source's database, as its file was made in the same way
    async with target.open() as runtime:
        await runtime.create_session("mine")
    before = {table: file_rows(target.path, table) for table in TABLES}
    with pytest.raises(InvalidInput, match=r"target: has something in it that is not of this copy"):
        await copied(sqlite(source), sqlite(target.path))
    assert {table: file_rows(target.path, table) for table in TABLES} == before
    async with target.open() as runtime:
        assert await runtime.get_session("mine")


async def test_a_target_with_another_copy(source: Path, tmp_path: Path) -> None:
    other, target = Place(f"sqlite:///{tmp_path / 'other.db'}", path=tmp_path / "other.db"), tmp_path / "target.db"
    async with other.open() as runtime:
        await runtime.create_session("other")
    await copied(sqlite(source), sqlite(target))
    with pytest.raises(InvalidInput, match=r"target: has a copy of another database"):
        await copied(sqlite(other.path), sqlite(target))


async def test_a_database_is_not_copied_to_itself(source: Path) -> None:
    with pytest.raises(InvalidInput, match=r"target: is the database that is to be copied"):
        await copied(sqlite(source), sqlite(source))


async def test_a_target_that_was_opened_before_and_is_empty(source: Path, tmp_path: Path) -> None:
    target = in_file(tmp_path)
    async with target.open():
        pass
    await copied(sqlite(source), sqlite(target.path))
    assert_same(source, target.path)
    async with target.open() as runtime:  # with the journal that it had
        await runtime.create_session("new")


def test_either_is_held(shell: Shell, tmp_path: Path) -> None:
    source, target = f"sqlite:///{shell.database}", f"sqlite:///{tmp_path / 'target.db'}"
    for held, option in ((source, "--from"), (target, "--to")):
        with open_runtime_blocking(held) as runtime:
            assert runtime.list_sessions().items == []
            output, errors = shell.here("copy", "--from", source, "--to", target, code=3)
            assert output == ""
            assert errors[0].startswith(f"agent-runtime: the database is in use by pid {os.getpid()} on ")
            assert errors[1:] == [f"agent-runtime: that is the database of {option}"]
            runtime.create_session("in use")
    told = shell.fails("copy", "--from", source, "--to", target)
    assert told == "--to: has something in it that is not of this copy: copy to an empty database"


def test_a_new_source_is_a_mistake(shell: Shell) -> None:
    shell.make_tables("unused.db")
    told = shell.fails("copy", "--from", "sqlite:///unused.db", "--to", "sqlite:///new.db")
    assert told == "--from: is new: no runtime ever had it open; is its URL right?"
    told = shell.fails("copy", "--from", "sqlite:///typo.db", "--to", "sqlite:///new.db")
    assert told.startswith(f"there is no database {shell.directory / 'typo.db'}: ")
    assert not (shell.directory / "new.db").exists()
    told = shell.fails("copy", "--from", f"sqlite:///{shell.database}", "--to", "sqlit:///new.db")
    assert told.startswith("--to: no plugin stores under 'sqlit'")
    told = shell.fails("copy", "--from", f"sqlite:///{shell.database}", "--to", "sqlite:///new.db?reader=1")
    assert told.startswith("--to.reader: SQLite has no such option")


@pytest.mark.parametrize("first", ["it", "empty", "none"])
def test_a_journal_with_changes_that_are_not_stored(shell: Shell, tmp_path: Path, first: str) -> None:
    """The first one beside the file, or a later one."""
    shell.database.unlink()
    leave_crash(tmp_path)
    journal = Left(tmp_path).journal
    if first != "it":
        journal.rename(f"{journal}.2")
    if first == "empty":
        journal.mkdir()
    Left(tmp_path).sql("UPDATE partitions SET expires_at = 0")  # its holder, this process, is not dead
    command = ("copy", "--from", f"sqlite:///{shell.database}", "--to", "sqlite:///target.db")
    told = shell.fails(*command)
    assert "has changes 22 to 32 that the database lacks: open the database once" in told
    assert shell.fails(*command) == told  # to have asked changes nothing
    assert not (tmp_path / "target.db").exists()
    assert shell.here("sessions", "list")[0]
    assert shell.here(*command)[0].endswith("the same on both sides\n")


def test_the_journals_of_other_databases_are_named(shell: Shell, tmp_path: Path) -> None:
    shell.database.unlink()
    leave_crash(tmp_path)
    left = Left(tmp_path)
    shutil.copytree(left.journal, f"{left.journal}.2")
    left.sql("UPDATE partitions SET expires_at = 0, journal_id = 'another'")
    told = shell.fails("copy", "--from", f"sqlite:///{shell.database}", "--to", "sqlite:///target.db")
    assert f"through the journal another, and {left.journal} and {left.journal}.2 are others: set journal.dir" in told


async def test_a_journal_that_nobody_finds(tmp_path: Path) -> None:
    place, target = in_schema(tmp_path), tmp_path / "target.db"
    schema = StorageConfig(url=place.url)
    async with place.open() as runtime:
        await runtime.create_session("s")
    for _ in range(2):
        with pytest.raises(JournalError, match=r"set journal\.directory to where that is"):
            await copied(open_postgresql(schema), sqlite(target))
    async with open_postgresql(schema) as storage, sqlite(target) as other:
        shutil.copytree(tmp_path / "journal", tmp_path / "another")
        for segment in (tmp_path / "another").glob("*.segment"):
            segment.unlink()
        async with quiet(storage, [LocalFiles(tmp_path / "another")]):
            pass
        async with quiet(storage, [LocalFiles(tmp_path / "journal")]) as held:
            assert not (await copy(held, other, [], now=datetime.now(UTC))).differing
    async with place.open() as runtime:  # it is as it was
        assert await runtime.get_session("s")


async def test_a_runtime_that_is_cut_off_from_its_database(tmp_path: Path) -> None:
    """Its lease has expired, and it goes on at its journal."""
    place = in_file(tmp_path)
    async with place.open():
        with closing(sqlite3.connect(place.path)) as connection:
            connection.execute("UPDATE partitions SET expires_at = 0")
            connection.commit()
        async with sqlite(place.path) as storage:
            with pytest.raises(LeaseHeld):
                async with quiet(storage, [LocalFiles(f"{place.path}.journal")]):
                    pass


async def test_a_lease_that_is_lost_ends_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.copying._LEASE_S", 0.3)
    faults = Faults()
    faults.delay(0.5, "messages")
    async with sqlite(source) as storage, sqlite(source) as thief, sqlite(tmp_path / "target.db") as target:
        with pytest.raises(LeaseLost):
            async with quiet(FaultyStorage(storage, faults), journals_of(storage)) as held:
                async with thief.snapshot() as snapshot:
                    lease = await snapshot.lease()
                assert lease is not None
                assert held.has(lease)
                await thief.leases.acquire(claim(journal_id=lease.journal_id, reclaims=True))
                await copy(held, target, [], now=datetime.now(UTC))


# --- found in the end -------------------------------------------------------------------------------------------------

DAMAGE = {
    "sessions": "UPDATE sessions SET title = 'another' WHERE session_id = 'held'",
    "contexts": "UPDATE contexts SET metadata = '{ }' WHERE switch_count = 3",
    "switches": "UPDATE switches SET reason = 'because' WHERE number = 1",
    "documents": "UPDATE documents SET data = x'00' WHERE key = 'é2'",
    "messages": "UPDATE messages SET content = 'changed' WHERE rowid = (SELECT max(rowid) FROM messages)",
    "quarantine": "UPDATE quarantine SET error = 'no' WHERE state = 'queued'",
    "outcomes": "DELETE FROM outcomes WHERE key = 'outlives'",
}


async def test_what_differs_is_found(source: Path, tmp_path: Path) -> None:
    await copied(sqlite(source), sqlite(tmp_path / "whole.db"))
    damaged = Left(tmp_path)
    for table, statement in list(DAMAGE.items())[:-1]:
        damaged.database = Path(shutil.copy(tmp_path / "whole.db", tmp_path / f"{table}.db"))
        damaged.sql(statement)
        assert (await copied(sqlite(source), sqlite(damaged.database))).differing == [table]


@pytest.mark.usefixtures("small_batches")
async def test_what_is_damaged_before_it_goes_on_is_found(source: Path, tmp_path: Path) -> None:
    target = Left(tmp_path)
    target.database = tmp_path / "target.db"
    await begun(source, target.database)
    target.sql("UPDATE sessions SET title = 'not the same'")
    assert (await copied(sqlite(source), sqlite(target.database))).differing == ["sessions"]


def test_what_differs_is_told_and_kept_from_others(source: Path, shell: Shell) -> None:
    command = ("copy", "--from", f"sqlite:///{source}", "--to", "sqlite:///target.db")
    shell.here(*command)
    target = Left(shell.directory)
    target.database = shell.directory / "target.db"
    target.sql(DAMAGE["switches"])
    output, errors = shell.here(*command, code=1)
    assert errors == ["agent-runtime: the copy differs from its source in switches: copy to an empty database"]
    [of_source, of_target] = [
        line for line in output.splitlines() if line.endswith((" in the source", " in the target"))
    ]
    assert of_source.split()[:2] == ["switches", "3"]
    assert of_target.split()[0] == "3"
    assert len(output.splitlines()) == len(TABLES) + 1
    refused = shell.here("sessions", "list", "--storage", "sqlite:///target.db", code=3)[1][-1]
    assert "an unfinished copy" in refused


def test_outcomes_are_mended(source: Path, shell: Shell) -> None:
    """They are written as often as it takes."""
    command = ("copy", "--from", f"sqlite:///{source}", "--to", "sqlite:///target.db", "--json")
    shell.here(*command)
    with closing(sqlite3.connect(shell.directory / "target.db")) as connection:
        connection.execute(DAMAGE["outcomes"])
        connection.commit()
    output, errors = shell.here(*command)
    result = json.loads(output)
    assert errors == []
    assert list(result) == ["resumed", "differing", "source", "target"]
    assert {table: found["rows"] for table, found in result["target"].items()} == {
        table: len(file_rows(source, table, seen=True)) for table in TABLES
    }
    assert (result["resumed"], result["differing"], result["source"]) == (True, [], result["target"])


# --- how it is told, and what it takes ---------------------------------------------------------------------------------


def test_a_terminal_sees_a_bar(source: Path, shell: Shell) -> None:
    code, seen = shell.on_terminal("copy", "--from", f"sqlite:///{source}", "--to", "sqlite:///target.db")
    assert (code, "comparing: 3 session(s)" in seen, seen.endswith("the same on both sides\n")) == (0, True, True), seen


async def test_batches_are_bounded_and_sessions_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.scan._BATCH_ROWS", 40)
    monkeypatch.setattr("agent_runtime.scan._PAGE", 10)
    database, other = MemoryDatabase(), MemoryDatabase()
    async with writing(lambda: database.open(CONFIG)) as writer:
        for incarnation, messages in (("a", 5), ("b", 25), ("c", 30), ("d", 200), ("e", 5), ("f", 5)):
            await writer.create(incarnation, messages=messages, created_at=NOON + timedelta(seconds=ord(incarnation)))
    sizes: list[tuple[str, int]] = []

    def noted(batch: Batch) -> bool:
        sizes.append(("".join(row.incarnation for row in batch.created), len(batch.messages)))
        return False

    faults = Faults()
    faults.reject(noted)
    seen: list[Progress] = []
    async with (
        database.open(CONFIG) as from_storage,
        other.open(CONFIG) as to_storage,
        quiet(from_storage, []) as held,
    ):
        assert (held.sessions, held.messages) == (6, 270)
        await copy(held, FaultyStorage(to_storage, faults), [], now=datetime.now(UTC), progress=seen.append)
    assert sizes == [("ab", 30), ("c", 30), ("d", 40), ("", 40), ("", 40), ("", 40), ("", 40), ("ef", 10)]
    assert seen[-1] == Progress("comparing", 6, 270)
    assert Progress("copying", 6, 270) in seen


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("sessions", "messages"), [(10_000, 100), (1, 1_000_000)])
def test_a_million_messages_there_and_back(shell: Shell, tmp_path: Path, sessions: int, messages: int) -> None:
    """In bounded memory, also where they are of one session."""
    generate(shell.database, sessions=sessions, messages=messages)
    schema, back = url_of(migrated_schema()), f"sqlite:///{tmp_path / 'back.db'}"
    for source, target in ((f"sqlite:///{shell.database}", schema), (schema, back)):
        started = time.monotonic()
        process = shell.start("copy", "--from", source, "--to", target)
        output, errors = process.stdout, process.stderr
        assert output is not None
        assert errors is not None
        with output, errors:
            told = output.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert told.endswith("the same on both sides\n")
        seconds = time.monotonic() - started
        print(f"{sessions * messages} messages in {seconds:.0f} s, {usage.ru_maxrss / 1024:.0f} MB")
        assert usage.ru_maxrss / 1024 < 400
    for table in ("sessions", "contexts", "messages"):
        with closing(sqlite3.connect(shell.database)) as one, closing(sqlite3.connect(tmp_path / "back.db")) as other:
            query = f"SELECT * FROM {table} ORDER BY {', '.join(KEYS[table])}"
            assert all(a == b for a, b in zip(one.execute(query), other.execute(query), strict=True))
