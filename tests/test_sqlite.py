"""What is particular to SQLite: what stands in the file, how its errors are classed, what a cancelled call leaves."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiosqlite
import anyio
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, text
from sqlalchemy.dialects import sqlite

from agent_runtime.changes import Details, Touch
from agent_runtime.errors import AgentRuntimeError, ChangeRejected, StorageFatal, StorageUnavailable
from agent_runtime.rows import MessageRow
from agent_runtime.storage import StorageConfig
from agent_runtime.testing.kit import Opener
from agent_runtime.testing.kit.writer import (
    NOON,
    context_row,
    document_row,
    message_row,
    outcome_row,
    quarantine_row,
    session_row,
    switch_row,
    writing,
)
from agent_runtime_sql import reads, snapshot, writes
from agent_runtime_sql.tables import messages, metadata, time_text
from agent_runtime_sqlite import open_sqlite
from agent_runtime_sqlite.errors import rejecting, translated
from agent_runtime_sqlite.prepared import Prepared, PreparedRows

pytestmark = pytest.mark.anyio


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "agent_runtime.db"


@pytest.fixture
def opener(file: Path) -> Opener:
    return lambda: open_sqlite(StorageConfig(url=f"sqlite:///{file}", options={"busy_timeout_s": 0.2}))


def rows_of(file: Path, query: str, *parameters: object) -> list[tuple[Any, ...]]:
    """What another program reads."""
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute(query, parameters).fetchall()


def run_in(file: Path, statement: str) -> None:
    """What another program writes."""
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(statement)


async def test_it_declares_what_stored_survives(opener: Opener) -> None:
    async with opener() as storage:
        assert storage.abilities.survives == "power"
        assert storage.figures().size == 4


# What stands in the file

odd = st.sampled_from(["", "1e2", "1E+2", "0.10", "NULL", "ß🎉\U0010ffff", "a'b\"c", "\n\t\x01"]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20
)
times = st.datetimes(timezones=st.just(NOON.tzinfo)) | st.just(NOON.replace(microsecond=0))
integers = st.integers(0, 2**63 - 1)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(t=odd, moment=times, n=integers, data=st.binary(max_size=20))
async def test_another_program_reads_each_field_in_a_column_of_its_name(
    tmp_path_factory: pytest.TempPathFactory, t: str, moment: Any, n: int, data: bytes
) -> None:
    file = tmp_path_factory.mktemp("columns") / "x.db"
    session = session_row("a", user_id=t, title=t, metadata=t, created_at=moment, next_seq=n, floor=n, sequence=n)
    kinds: dict[str, tuple[str, Any]] = {
        "created": ("sessions", session),
        "contexts": ("contexts", context_row("a", current_agent=t, last_switch_at=moment, metadata=t)),
        "messages": ("messages", message_row("a", n, content=t, parts=t, token_count=n, extra=t, created_at=moment)),
        "switches": ("switches", switch_row("a", n, from_agent=t, reason=t, switched_at=moment, metadata=t)),
        "documents": ("documents", document_row("a", t, t, value=t, data=data, media_type=t, updated_at=moment)),
        "outcomes": ("outcomes", outcome_row(t, t, outcome=t, sequence=n, expires_at=moment)),
        "quarantined": ("quarantine", quarantine_row(n, error=t, change=data, quarantined_at=moment)),
    }
    async with writing(lambda: open_sqlite(StorageConfig(url=f"sqlite:///{file}"))) as writer:
        await writer.apply(**{field: (row,) for field, (_, row) in kinds.items()})
        for table, row in kinds.values():
            expected = msgspec.structs.asdict(row)
            quoted = ", ".join(f'"{name}"' for name in expected)
            (found,) = rows_of(file, f"SELECT {quoted} FROM {table}")
            for (name, value), stored in zip(expected.items(), found, strict=True):
                is_time = hasattr(value, "tzinfo")
                assert stored == (value.strftime("%4Y-%m-%dT%H:%M:%S.%fZ") if is_time else value), (table, name)


async def test_tombstones_and_notes_of_what_to_purge(file: Path, opener: Opener) -> None:
    async with writing(opener) as writer:
        for incarnation in "abcd":
            await writer.create(incarnation, messages=3)
        await writer.apply(deleted=("a",), touched=(writer.touch("b"), writer.touch("c")), cleared=(("b", 2), ("c", 0)))
        await writer.apply(touched=(writer.touch("b"),), cleared=(("b", 3),))
        deleted = rows_of(file, "SELECT incarnation FROM sessions WHERE deleted_at IS NOT NULL")
        assert deleted == [("a",)]
        assert rows_of(file, "SELECT * FROM purges ORDER BY 2") == [(0, "a", None), (0, "b", 3)]
        await writer.apply(deleted=("b",))
        assert rows_of(file, "SELECT * FROM purges ORDER BY 2") == [(0, "a", None), (0, "b", None)]
        while await writer.storage.purge(writer.fence, now=NOON, rows_max=2):
            pass
        assert rows_of(file, "SELECT * FROM purges") == []
        assert rows_of(file, "SELECT incarnation FROM sessions ORDER BY 1") == [("c",), ("d",)]
        assert rows_of(file, "SELECT DISTINCT incarnation FROM messages ORDER BY 1") == [("c",), ("d",)]


def test_times_sort_as_their_texts() -> None:
    times = [NOON.replace(microsecond=m, year=y) for y in (1, 999, 2026, 9999) for m in (0, 1, 10, 999_999)]
    assert sorted(map(time_text, times)) == [time_text(time) for time in times]
    assert {len(time_text(time)) for time in times} == {27}
    with pytest.raises(ValueError, match="not in UTC"):
        time_text(NOON.replace(tzinfo=None))


QUERIES: dict[str, tuple[Any, str]] = {
    "head": (reads.SELECT_HEAD, "sessions_by_id (partition=? AND session_id=?)"),
    "outcomes": (reads.SELECT_NEWEST_OUTCOMES, "outcomes_by_sequence (partition=? AND scope=?)"),
    "messages": (reads.select_messages("desc"), "(incarnation=? AND seq>? AND seq<?)"),
    "documents": (reads.SELECT_DOCUMENTS, "(incarnation=? AND collection=? AND key>?)"),
    "collections": (reads.SELECT_COLLECTIONS, "COVERING INDEX sqlite_autoindex_documents_1 (incarnation=?)"),
    "all": (reads.select_sessions("asc", of_user=False, behind=False), "sessions_by_creation (partition=?)"),
    "all on": (
        reads.select_sessions("desc", of_user=False, behind=True),
        "(partition=? AND (created_at,incarnation)<(",
    ),
    "user": (reads.select_sessions("desc", of_user=True, behind=False), "sessions_by_user (partition=? AND user_id=?)"),
    "user on": (reads.select_sessions("asc", of_user=True, behind=True), "user_id=? AND (created_at,incarnation)>("),
    "expired": (writes.DELETE_EXPIRED_OUTCOMES, "outcomes_by_expiry (partition=? AND expires_at<?)"),
    "outcome": (writes.DELETE_EXPIRED_OUTCOMES, "(partition=? AND scope=? AND key=?)"),
    "cleared": (writes.DELETE_MESSAGES, "(incarnation=? AND seq<?)"),
    "message": (writes.DELETE_MESSAGES, "(incarnation=? AND seq=?)"),
    "document": (writes.DELETES_OF_SESSION[1], "(incarnation=? AND collection=? AND key=?)"),
}


@pytest.mark.parametrize("name", QUERIES)
def test_queries_go_by_an_index_and_sort_nothing(name: str) -> None:
    statement, index = QUERIES[name]
    query = statement.compile(dialect=sqlite.dialect(paramstyle="named"))
    explained = text(f"EXPLAIN QUERY PLAN {query}")
    database = create_engine("sqlite://")
    with database.begin() as connection:
        metadata.create_all(connection)
        plan = "\n".join(row[3] for row in connection.execute(explained, dict.fromkeys(query.params, 1)))
    database.dispose()
    assert index in plan
    assert "SCAN" not in plan
    assert "TEMP B-TREE" not in plan


# Errors

SECRET = "what a person said"


@pytest.mark.parametrize(
    "bad",
    [
        message_row("a", 2**63, content=SECRET),
        message_row("a", 1, content=SECRET + "\ud800"),
        message_row("a", 1, content=[SECRET]),
        message_row("a", 1, role=None, content=SECRET),
        message_row("nobody", 1, content=SECRET),
    ],
    ids=["too large an integer", "lone surrogate", "a value of another type", "null", "no such session"],
)
async def test_data_that_sqlite_refuses_rejects_the_batch(opener: Opener, bad: Any) -> None:
    async with writing(opener) as writer:
        await writer.create("a")
        good = [message_row("a", seq) for seq in range(10, 400)]
        with pytest.raises(ChangeRejected, match="refuses a row of messages") as caught:
            await writer.apply(touched=(writer.touch("a"),), messages=(*good, bad))
        assert SECRET not in "".join(traceback.format_exception(caught.value))
        await writer.apply(touched=(writer.touch("a"),), messages=tuple(good))


async def test_a_trigger_that_refuses_a_row_and_a_table_that_is_gone(file: Path, opener: Opener) -> None:
    async with writing(opener) as writer:
        run_in(file, "CREATE TRIGGER no BEFORE INSERT ON messages BEGIN SELECT RAISE(ABORT, 'not today'); END")
        with pytest.raises(ChangeRejected, match="not today"):
            await writer.create("a", messages=1)
        run_in(file, "DROP TRIGGER no")
        run_in(file, "ALTER TABLE messages RENAME TO elsewhere")
        with pytest.raises(ChangeRejected, match="no such table"):
            await writer.create("a", messages=1)
        run_in(file, "ALTER TABLE elsewhere RENAME TO messages")
        await writer.create("a", messages=1)


async def test_a_lock_of_another_program_is_waited_for_and_harmless(file: Path, opener: Opener) -> None:
    async with writing(opener) as writer:
        await writer.create("a")
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(2):
                with pytest.raises(StorageUnavailable, match="is locked by another program"):
                    await writer.create("b")
            with pytest.raises(StorageUnavailable, match="is locked by another program"):
                await writer.storage.leases.renew(writer.fence, 10.0)
        await writer.create("b")
        assert writer.storage.figures().in_use == 0


async def test_after_an_unknown_failure_the_connection_is_of_use_or_replaced(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here within the transaction, with rows written; then by a driver that was closed under our hands."""
    run = Prepared.run

    async def fail(prepared: Prepared, driver: Any, *arguments: Any) -> int:
        await run(prepared, driver, *arguments)
        raise OSError(SECRET)

    async def close(prepared: Prepared, driver: Any, *arguments: Any) -> int:
        await run(prepared, driver, *arguments)
        await driver.close()
        return await run(prepared, driver, *arguments)

    async with writing(opener) as writer:
        for failing in (fail, close):
            with monkeypatch.context() as patch:
                patch.setattr(Prepared, "run", failing)
                with pytest.raises(StorageUnavailable) as caught:
                    await writer.create("a")
            assert SECRET not in str(caught.value)
            assert writer.storage.figures().in_use == 0
        await writer.create("a")


def refused(kind: type[AgentRuntimeError], provoke: Callable[[sqlite3.Connection], object], directory: Path) -> str:
    """How a real error of SQLite is classed when a statement of `apply` meets it."""
    with closing(sqlite3.connect(directory / "provoked.db", isolation_level=None)) as connection:
        connection.executescript(
            "CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT NOT NULL); INSERT INTO t VALUES (1, 'x')"
        )
        with pytest.raises(kind) as caught, translated("the database"), rejecting("messages"):
            provoke(connection)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def provoke_too_big(connection: sqlite3.Connection) -> None:
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1000)
    connection.execute("INSERT INTO t VALUES (2, ?)", ("x" * 2000,))


def provoke_full(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA max_page_count=3")
    connection.execute("INSERT INTO t VALUES (2, ?)", ("x" * 100_000,))


def provoke_readonly(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA query_only=1")
    connection.execute("DELETE FROM t")


def provoke_interrupt(connection: sqlite3.Connection) -> None:
    connection.set_progress_handler(lambda: 1, 1)
    connection.execute("SELECT count(*) FROM t, t, t")


@pytest.mark.parametrize(
    ("kind", "provoke"),
    [
        (ChangeRejected, lambda connection: connection.execute("INSERT INTO t VALUES (1, 'x')")),
        (ChangeRejected, lambda connection: connection.execute("INSERT INTO t VALUES (2, NULL)")),
        (ChangeRejected, lambda connection: connection.execute("INSERT INTO t VALUES ('text', 'x')")),
        (ChangeRejected, provoke_too_big),
        (StorageUnavailable, provoke_full),
        (StorageUnavailable, provoke_interrupt),
        (StorageUnavailable, lambda _: sqlite3.connect("/nowhere/x.db")),
        (StorageFatal, provoke_readonly),
    ],
)
def test_how_errors_are_classed(kind: type[AgentRuntimeError], provoke: Any, tmp_path: Path) -> None:
    assert "SQLITE_" in refused(kind, provoke, tmp_path)


def test_data_is_rejected_within_a_batch_only() -> None:
    """Elsewhere the statements are ours alone: whatever is wrong with them, waiting is the right thing to do."""
    with closing(sqlite3.connect(":memory:")) as connection:
        for statement in ("SELECT nonsense", "SELECT ?"):
            with pytest.raises(StorageUnavailable), translated("the database"):
                connection.execute(statement, (2**64,) if "?" in statement else ())


# Reading and writing side by side


async def test_a_reader_does_not_wait_for_a_writer(file: Path, opener: Opener) -> None:
    async with writing(opener) as writer:
        await writer.create("a", messages=3)
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("DELETE FROM messages")
            async with writer.storage.snapshot() as view:
                assert len(await view.messages("a", limit=9)) == 3


async def test_a_snapshot_in_the_middle_of_a_batch(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Prepared.run
    half_way, go_on = threading.Event(), threading.Event()

    async def pause(prepared: Prepared, driver: Any, items: Any, constants: Any) -> int:
        hit = await run(prepared, driver, items, constants)
        if isinstance(items, tuple) and isinstance(items[0], Touch):
            half_way.set()
            while not go_on.is_set():
                await asyncio.sleep(0.001)
        return hit

    async with writing(opener) as writer:
        await writer.create("a", messages=1)
        monkeypatch.setattr(Prepared, "run", pause)
        async with anyio.create_task_group() as group:
            touch = writer.touch("a", message_count=2)
            group.start_soon(lambda: writer.apply(touched=(touch,), messages=(message_row("a", 2),)))
            with anyio.fail_after(10):
                while not half_way.is_set():
                    await anyio.sleep(0.001)
                async with writer.storage.snapshot() as before:
                    head = await before.head("session a", outcomes_max=0)
                    assert head is not None
                    assert (before.watermark, head.session.message_count) == (1, 1)
                    go_on.set()
                    while writer.sequence == 1:
                        await anyio.sleep(0.001)
                    async with writer.storage.snapshot() as after:
                        assert (after.watermark, len(await after.messages("a", limit=9))) == (2, 2)
                    assert len(await before.messages("a", limit=9)) == 1


async def test_waiting_for_a_free_reader_can_be_cancelled(opener: Opener) -> None:
    async with opener() as storage, storage.snapshot(), storage.snapshot(), storage.snapshot():
        assert storage.figures().in_use == 3
        with anyio.move_on_after(0.02) as scope:
            async with storage.snapshot():
                pytest.fail("there were three readers")
        assert scope.cancelled_caught


# Cancelled calls


def driver_threads() -> int:
    return sum("_connection_worker_thread" in thread.name for thread in threading.enumerate())


async def threads_become(number: int) -> None:
    with anyio.fail_after(5):
        while driver_threads() != number:
            await anyio.sleep(0.001)


SLOW = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 1000000000) SELECT count(*) FROM c"


async def test_cancelled_reads_leave_no_thread_and_no_connection(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    randomness = random.Random(5)
    await threads_become(0)
    async with writing(opener) as writer:
        await writer.create("a", messages=500)

        async def read(delay_s: float) -> None:
            with anyio.move_on_after(delay_s):
                async with writer.storage.snapshot() as view:
                    while True:
                        await view.messages("a", limit=500)

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for _ in range(100):
                    group.start_soon(read, randomness.uniform(0, 0.3))
            for _ in range(100):
                await read(randomness.uniform(0, 0.004))
        assert writer.storage.figures().in_use == 0
        async with writer.storage.snapshot() as view:
            assert len(await view.messages("a", limit=1000)) == 500
    await threads_become(0)


async def test_a_running_read_is_interrupted(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "SELECT_SWITCHES", text(SLOW))
    async with opener() as storage:
        started = time.monotonic()
        with anyio.move_on_after(0.1):
            async with storage.snapshot() as view:
                with pytest.raises(AgentRuntimeError):
                    await view.switches("a")
        assert time.monotonic() - started < 5
        assert storage.figures().in_use == 0


async def test_a_running_batch_is_interrupted_and_undone(file: Path, opener: Opener) -> None:
    async with writing(opener) as writer:
        await writer.create("a", messages=2000)
        run_in(
            file,
            "CREATE TRIGGER slow BEFORE UPDATE OF title ON sessions BEGIN "
            "SELECT count(*) FROM messages AS a, messages AS b, messages AS c WHERE a.id || b.id || c.id = ''; END",
        )
        started = time.monotonic()
        with anyio.move_on_after(0.1) as scope:
            await writer.apply(
                touched=(writer.touch("a", message_count=7),), edited=(("a", Details("title", None, "{}")),)
            )
        assert scope.cancelled_caught
        assert time.monotonic() - started < 5
        assert rows_of(file, "SELECT sequence, message_count FROM sessions") == [(1, 2000)]
        assert writer.storage.figures().in_use == 0
        await writer.create("b")


def test_rows_are_made_in_pieces_between_which_the_loop_is_free() -> None:
    """A piece of 500 rows takes about half a millisecond; what the driver's thread does with the list is its affair."""
    names = MessageRow.__struct_fields__
    statement = PreparedRows(messages, names)
    given: list[Any] = []
    ticks = 0

    class Driver:
        async def executemany(self, sql: str, steps: list[tuple[Any, ...]]) -> Any:
            count = 0
            for step in steps:
                assert len(step) == sql.count("?")
                given.extend(step)
                count += len(step) // len(names)
            return SimpleNamespace(rowcount=count)

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    async def main() -> None:
        ticking = asyncio.create_task(tick())
        assert await statement.run(cast("aiosqlite.Connection", Driver()), rows, {}) == len(rows)
        ticking.cancel()

    rows = [message_row("a", seq) for seq in range(1037)]
    asyncio.run(main())
    assert ticks >= len(rows) // 500
    assert given[:: len(names)] == ["a"] * len(rows)
    assert given[1 :: len(names)] == list(range(len(rows)))


async def test_a_session_without_its_context_is_damage(file: Path, opener: Opener) -> None:
    async with writing(opener) as writer:
        await writer.create("a")
        run_in(file, "DELETE FROM contexts")
        async with writer.storage.snapshot() as view:
            with pytest.raises(StorageFatal, match="is damaged: the session 'session a' has no context"):
                await view.head("session a", outcomes_max=0)
