"""PostgreSQL: settings of its transactions, errors by class, connections that are cut, calls that are cancelled."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import msgspec
import pytest
from sqlalchemy import text

from agent_runtime.changes import Details
from agent_runtime.errors import (
    ChangeRejected,
    SequenceMismatch,
    StorageError,
    StorageFatal,
    StorageUnavailable,
)
from agent_runtime.storage import Storage, StorageConfig
from agent_runtime.testing.kit import Opener
from agent_runtime.testing.kit.dump import dump
from agent_runtime.testing.kit.writer import Writer, claim, context_row, message_row, session_row, writing
from agent_runtime_postgresql import open_postgresql, pool
from agent_runtime_postgresql.database import Database
from agent_runtime_postgresql.errors import rejecting, translated
from agent_runtime_postgresql.pool import Connection
from agent_runtime_postgresql.storage import PostgresqlStorage, open_storage
from agent_runtime_postgresql.transaction import PostgresqlTransaction
from agent_runtime_sql import snapshot
from places import fill, forget, in_schema
from postgres_proxy import proxied
from postgres_server import migrated_schema, new_schema, server, url_of

pytestmark = pytest.mark.anyio

SECRET = "what somebody said"
SLOW = text("SELECT pg_sleep(60)")


@pytest.fixture
def schema() -> str:
    return migrated_schema()


def opener_of(schema: str, **options: Any) -> Opener:
    """Connections call themselves like their schema."""
    config = StorageConfig(url=url_of(schema), options={"application_name": schema, **options})
    return lambda: open_postgresql(config)


@pytest.fixture
def opener(schema: str) -> Opener:
    return opener_of(schema)


def activity(name: str, state: str = "%") -> list[tuple[Any, ...]]:
    """What connections of this name do, those apart that do nothing."""
    return server().rows(
        "SELECT state, query FROM pg_stat_activity WHERE application_name = $1 AND state LIKE $2 AND state <> 'idle'",
        name,
        state,
    )


def end_connections(name: str) -> int:
    """Have the server end every connection of this name."""
    ended = server().rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", name)
    return len(ended)


async def asked(storage: Storage, question: Callable[[PostgresqlTransaction], Awaitable[Any]]) -> Any:
    """The answer to a question in a transaction of the writer."""
    assert isinstance(storage, PostgresqlStorage)
    return await storage._writer.run(question)


# Settings


async def settings_of(transaction: PostgresqlTransaction) -> dict[str, str]:
    names = ("synchronous_commit", "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    row = await transaction.driver.fetchrow(
        "SELECT " + ", ".join(f"current_setting('{name}') AS {name}" for name in names)
    )
    return dict(row)


async def test_settings_of_transactions_that_write(schema: str) -> None:
    """Whatever the user's own are; and below the duration of the lease."""
    url = url_of(schema, options="-c%20synchronous_commit%3Doff%20-c%20lock_timeout%3D0")
    async with open_storage(StorageConfig(url=url, options={"statement_timeout_s": 7.0})) as storage:
        expected = {"synchronous_commit": "on", "statement_timeout": "7s"}
        assert await asked(storage, settings_of) == expected | {
            "lock_timeout": "4s",
            "idle_in_transaction_session_timeout": "4s",
        }
        await storage.leases.acquire(claim(duration_s=3.0))
        assert await asked(storage, settings_of) == expected | {
            "lock_timeout": "1500ms",
            "idle_in_transaction_session_timeout": "1500ms",
        }


@pytest.mark.parametrize("kind", ["own", "pooled", "never"])
async def test_what_stays_in_a_connection(schema: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Nothing of a pooler's, which may lend it to somebody else after each transaction; statements in one's own."""
    opener = opener_of(schema, prepared_statements="never" if kind == "never" else "auto")
    if kind == "pooled":  # it greets with a process of its own making
        monkeypatch.setattr(asyncpg.Connection, "get_server_pid", lambda _: 4711)
    left = "SELECT EXISTS (SELECT FROM pg_prepared_statements), current_setting('lock_timeout'), current_schema()"
    async with writing(opener) as writer:
        for number in range(3):
            await writer.create(f"session {number}", messages=2)
            await dump(writer.storage)
        await writer.apply()
        assert isinstance(writer.storage, PostgresqlStorage)
        database = writer.storage._readers._database

        async def look() -> list[tuple[Any, ...]]:
            idle = list(database._pool._idle)
            return [tuple(await connection.driver.fetchrow(left)) for connection in idle]

        found = await database.run(look)
        assert found == [(kind == "own", "0", "public")] * len(found)
        assert found


async def test_plans_do_not_outlive_the_size_of_their_tables(
    schema: str, opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with writing(opener) as writer:
        await writer.create("a")

        async def read() -> None:
            async with writer.storage.snapshot() as view:
                assert await view.head("session a", outcomes_max=1) is not None

        async def plans() -> set[str]:
            """What the server would do, in one of the connections that have kept a plan."""
            connection = await database._pool.take()
            like = "name LIKE 'agent_runtime%' AND statement LIKE '%FROM partitions%sessions%'"
            names = f"SELECT name FROM pg_prepared_statements WHERE {like}"
            try:
                await connection.driver.execute(database.begin_reading())
                (row,) = await connection.driver.fetch(names)
                explain = f"EXPLAIN EXECUTE {row['name']}('session a', 0)"
                return {line for (line,) in await connection.driver.fetch(explain)}
            finally:
                await database.give_back(connection)

        assert isinstance(writer.storage, PostgresqlStorage)
        database = writer.storage._readers._database
        for _ in range(8):  # the first five are planned each time
            await read()
        small = await database.run(plans)
        server().execute(
            """
            INSERT INTO sessions SELECT 'i' || n, 0, 's' || n, null, null, null, '{}', now(), now(), 0, 1, 0, 1
            FROM generate_series(1, 5000) AS n
            """,
            schema=schema,
        )
        await read()
        assert await database.run(plans) == small
        monkeypatch.setattr(pool, "_PLANS_S", 0.0)
        await read()
        assert await database.run(plans) != small


async def test_tables_that_are_altered_meanwhile(schema: str, opener: Opener) -> None:
    """What the server keeps of a statement is of no use any more: the next try has a new connection."""
    async with writing(opener) as writer:
        await writer.create("a")
        async with writer.storage.snapshot() as first, writer.storage.snapshot() as second:
            expected = await first.head("session a", outcomes_max=1)
            assert await second.head("session a", outcomes_max=1) == expected is not None
        await writer.apply()
        server().execute("ALTER TABLE sessions ALTER title TYPE varchar(1000)", schema=schema)
        for _ in range(2):
            with pytest.raises(StorageUnavailable, match="altered"):
                async with writer.storage.snapshot() as view:
                    await view.head("session a", outcomes_max=1)
        async with writer.storage.snapshot() as view:
            assert await view.head("session a", outcomes_max=1) == expected


@pytest.mark.parametrize("column", ["metadata TYPE jsonb", "token_count TYPE integer"])
async def test_messages_that_are_altered_meanwhile(schema: str, opener: Opener, column: str) -> None:
    """A COPY goes by the columns that the driver asked for once, on each connection: no change is refused for that."""
    async with writing(opener) as writer:
        await writer.create("a", messages=1)
        assert await asked(writer.storage, kept_columns) == 1
        server().execute(f"ALTER TABLE messages ALTER {column}", schema=schema)
        message = message_row("a", 2, token_count=7, metadata="{}")
        with pytest.raises(StorageUnavailable):
            await writer.apply(messages=(message,))
        await writer.apply(messages=(message,))
        async with writer.storage.snapshot() as view:
            assert [row.seq for row in await view.messages("a", limit=10)] == [1, 2]


async def kept_columns(transaction: PostgresqlTransaction) -> int:
    """How many statements the driver has kept to know the columns of messages."""
    found = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT%FROM \"messages\" LIMIT 1'"
    return int((await transaction.driver.fetchrow(found))[0])


async def test_statements_that_the_server_has_forgotten(opener: Opener) -> None:
    """Somebody's DISCARD or DEALLOCATE in a function of a trigger; what stood between and hid that it is a pool."""

    async def forget(transaction: PostgresqlTransaction) -> None:
        await transaction.driver.execute("DEALLOCATE ALL")

    async with writing(opener) as writer:
        await writer.create("a")
        async with writer.storage.snapshot() as view:
            expected = await view.head("session a", outcomes_max=1)
        await asked(writer.storage, forget)
        with pytest.raises(StorageUnavailable, match=r"prepared_statements.*26000"):
            async with writer.storage.snapshot():
                pass
        async with writer.storage.snapshot() as view:
            assert await view.head("session a", outcomes_max=1) == expected is not None


async def test_a_pooler_that_mixes_connections_up(opener: Opener) -> None:
    """What a connection would keep is there already, and another's: the error names the option. The next one may do."""
    sql = "SELECT 1"

    async def meet(transaction: PostgresqlTransaction) -> None:
        await transaction.driver.execute(f"PREPARE {pool.statement_name(sql, 1)} AS {sql}")
        await Connection(transaction.driver, prepares=True).fetch(sql, [])

    async with writing(opener) as writer:
        with pytest.raises(StorageFatal, match=r"prepared_statements to never.*42P05"):
            await asked(writer.storage, meet)
    assert pool.statement_name("SELECT 1", 1) != pool.statement_name("SELECT 2", 1)


async def test_a_read_does_not_wait_for_the_end_of_its_transaction(schema: str) -> None:
    """The next one does, and takes the same connection; and so does closing."""
    connections = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
    with proxied(url_of(schema, application_name=schema)) as proxy:
        async with open_postgresql(StorageConfig(url=proxy.url)) as storage:
            for _ in range(2):
                async with storage.snapshot() as view:
                    assert view.watermark == 0
                    proxy.slow_down(0.2)
                    left = time.monotonic()
                assert time.monotonic() < left + 0.1
                assert storage.figures().in_use == 0
                proxy.slow_down(0.0)
            assert server().rows(connections, schema) == [(1,)]
    assert server().rows(connections, schema) == [(0,)]
    assert activity(schema) == []


async def test_json_is_kept_to_the_letter_and_can_be_asked(schema: str, opener: Opener) -> None:
    written = '{"b": 1e2, "a":\t[1.0, 100000000000000000001], "a": null, "u": "\\u00e9é"}'
    async with writing(opener) as writer:
        await writer.create("a", metadata=written)
        async with writer.storage.snapshot() as view:
            assert (await view.sessions(limit=1))[0].metadata == written
    assert server().rows("SELECT metadata ->> 'b', metadata -> 'a' FROM sessions", schema=schema) == [("1e2", "null")]


# Errors


async def test_data_that_is_refused(schema: str, opener: Opener) -> None:
    server().execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN RAISE EXCEPTION ''refused: %'', NEW.content; END';
        CREATE TRIGGER refuse BEFORE INSERT ON messages FOR EACH ROW WHEN (NEW.role = 'tool') EXECUTE FUNCTION refuse();
        ALTER TABLE messages ADD CONSTRAINT short CHECK (length(content) < 100)
        """,
        schema=schema,
    )
    bad: dict[str, dict[str, Any]] = {
        "a trigger's veto": {"messages": (message_row("a", 2, role="tool", content=SECRET),)},
        "a check": {"messages": (message_row("a", 2, content=SECRET * 10),)},
        "a NUL": {"messages": (message_row("a", 2, content=f"{SECRET}\0"),)},
        "a lone surrogate": {"messages": (message_row("a", 2, content=f"{SECRET}\ud800"),)},
        "more than 64 bits": {"messages": (message_row("a", 2, token_count=2**63),)},
        "no JSON": {"messages": (message_row("a", 2, parts=SECRET),)},
        "another type": {"messages": (message_row("a", 2, content=5),)},
        "twice": {"messages": (message_row("a", 1, content=SECRET),)},
        "null": {"edited": (("a", Details("title", None, None)),)},  # type: ignore[arg-type]
        "too large for an index": {"created": (session_row("b", session_id="".join(map(chr, range(40_000, 50_000)))),)},
    }
    async with writing(opener) as writer:
        await writer.create("a", messages=1)
        for reason, rows in bad.items():
            with pytest.raises(ChangeRejected) as caught:
                await writer.apply(**rows)
            shown = "".join(traceback.format_exception(caught.value))
            assert SECRET not in shown, reason
            assert "the database refuses a row of" in str(caught.value), reason
        await writer.apply(messages=(message_row("a", 2),))


async def test_tables_that_were_changed_by_hand(schema: str, opener: Opener) -> None:
    async with writing(opener) as writer:
        await writer.create("a")
        server().execute("ALTER TABLE messages RENAME TO gone", schema=schema)
        with pytest.raises(StorageFatal, match="has not the tables of agent-runtime"):
            await writer.apply(messages=(message_row("a", 1),))
        async with writer.storage.snapshot() as view:
            with pytest.raises(StorageFatal):
                await view.messages("a", limit=1)
        server().execute("ALTER TABLE gone RENAME TO messages", schema=schema)
        await writer.apply(messages=(message_row("a", 1),))


async def test_a_row_that_somebody_else_has_locked(schema: str) -> None:
    async with writing(opener_of(schema, lock_timeout_s=0.2)) as writer, opener_of(schema)() as another:

        async def hold(transaction: PostgresqlTransaction) -> None:
            await transaction.driver.execute("SELECT 1 FROM partitions FOR UPDATE")
            await asyncio.sleep(0.6)

        async with anyio.create_task_group() as group:
            group.start_soon(asked, another, hold)
            await anyio.sleep(0.2)
            with pytest.raises(StorageUnavailable, match="has a row locked by somebody else"):
                await writer.apply()
        await writer.apply()


async def test_a_batch_that_does_not_follow_waits_for_no_session(schema: str, opener: Opener) -> None:
    """Whoever lost its lease must not stand in the way of the one that has it, nor wait for it."""
    async with writing(opener) as writer, opener_of(schema)() as another:
        await writer.create("a")
        stale = msgspec.structs.replace(writer.batch(touched=(writer.touch("a"),)), after=writer.sequence + 5)

        async def hold(transaction: PostgresqlTransaction) -> None:
            await transaction.driver.execute("SELECT 1 FROM sessions FOR UPDATE")
            await asyncio.sleep(0.6)
            ended.append("the other transaction")

        ended: list[str] = []
        async with anyio.create_task_group() as group:
            group.start_soon(asked, another, hold)
            await anyio.sleep(0.2)
            with pytest.raises(SequenceMismatch):
                await writer.storage.apply(stale, writer.fence)
            ended.append("the batch")
        assert ended == ["the batch", "the other transaction"]


async def test_a_statement_that_takes_too_long(schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opener_of(schema, statement_timeout_s=0.1)() as storage:
        with monkeypatch.context() as patch:
            patch.setattr(snapshot, "SELECT_SWITCHES", SLOW)
            async with storage.snapshot() as view:
                with pytest.raises(StorageUnavailable, match="took too long"):
                    await view.switches("a")
        async with storage.snapshot() as view:
            assert not await view.switches("a")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (asyncpg.SerializationError, StorageUnavailable),
        (asyncpg.DeadlockDetectedError, StorageUnavailable),
        (asyncpg.ConnectionDoesNotExistError, StorageUnavailable),
        (asyncpg.AdminShutdownError, StorageUnavailable),
        (asyncpg.CannotConnectNowError, StorageUnavailable),
        (asyncpg.TooManyConnectionsError, StorageUnavailable),
        (asyncpg.DiskFullError, StorageUnavailable),
        (asyncpg.LockNotAvailableError, StorageUnavailable),
        (asyncpg.QueryCanceledError, StorageUnavailable),
        (asyncpg.IdleInTransactionSessionTimeoutError, StorageUnavailable),
        (asyncpg.ReadOnlySQLTransactionError, StorageUnavailable),
        (asyncpg.InterfaceError, StorageUnavailable),
        (asyncpg.InternalClientError, StorageUnavailable),
        (ConnectionResetError, StorageUnavailable),
        (TimeoutError, StorageUnavailable),
        (ZeroDivisionError, StorageUnavailable),
        (asyncpg.InvalidPasswordError, StorageFatal),
        (asyncpg.InvalidAuthorizationSpecificationError, StorageFatal),
        (asyncpg.InvalidCatalogNameError, StorageFatal),
        (asyncpg.InsufficientPrivilegeError, StorageFatal),
        (asyncpg.UndefinedColumnError, StorageFatal),
        (asyncpg.DataCorruptedError, StorageFatal),
        (ssl.SSLCertVerificationError, StorageFatal),
        (asyncpg.UniqueViolationError, ChangeRejected),
        (asyncpg.CheckViolationError, ChangeRejected),
        (asyncpg.UntranslatableCharacterError, ChangeRejected),
        (asyncpg.ProgramLimitExceededError, ChangeRejected),
        (asyncpg.RaiseError, ChangeRejected),
    ],
)
def test_each_error_has_a_class(error: type[Exception], expected: type[StorageError]) -> None:
    with pytest.raises(StorageError) as caught, translated("the database x"), rejecting("messages"):
        raise error("message")
    assert type(caught.value) is expected
    if expected is ChangeRejected:  # outside of the rows of a batch there is nothing to reject
        with pytest.raises(StorageUnavailable), translated("the database x"):
            raise error(SECRET)


# Connections that are cut


async def test_connections_that_died_while_idle_are_replaced(schema: str, opener: Opener) -> None:
    async with writing(opener) as writer:
        await writer.create("a", messages=3)
        expected = await dump(writer.storage)
        for _ in range(3):
            async with writer.storage.snapshot(), writer.storage.snapshot(), writer.storage.snapshot():
                pass
            assert end_connections(schema) >= 3
            assert await dump(writer.storage) == expected
            await writer.apply()
            expected = await dump(writer.storage)
        assert writer.storage.figures().in_use == 0


async def test_a_connection_that_is_cut_while_it_reads(schema: str, opener: Opener) -> None:
    async with writing(opener) as writer:
        await writer.create("a", messages=3)
        async with writer.storage.snapshot() as view:
            end_connections(schema)
            with pytest.raises(StorageUnavailable):
                await view.messages("a", limit=1)
        assert len((await dump(writer.storage)).sessions[0].messages) == 3
        assert writer.storage.figures().in_use == 0


class Log:
    """Appends to a session as the runtime does: what is unknown is found out, and tried again."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.tries = 0
        self.stored_unknown = 0

    async def append(self, seq: int) -> None:
        batch = self.writer.batch(
            messages=(message_row("a", seq),), touched=(self.writer.touch("a", message_count=seq),)
        )
        with anyio.fail_after(30):
            while True:
                self.tries += 1
                try:
                    await self.writer.storage.apply(batch, self.writer.fence)
                except StorageUnavailable:
                    continue
                except SequenceMismatch as mismatch:
                    assert mismatch.found == batch.last
                    self.stored_unknown += 1
                break
        self.writer.sequence = batch.last

    async def check(self, count: int) -> None:
        async with self.writer.storage.snapshot() as view:
            found = [row.seq for row in await view.messages("a", limit=10_000)]
            assert found == list(range(1, count + 1))
            assert view.watermark == self.writer.sequence
        assert self.writer.storage.figures().in_use == 0


def slow_commits(schema: str, seconds: float) -> None:
    """Have every commit of a message take that long."""
    server().execute(
        f"""
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END';
        CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON messages
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()
        """,
        schema=schema,
    )


async def ended_mid_commit(schema: str, opener: Opener, times: int) -> None:
    slow_commits(schema, 0.005)
    async with writing(opener) as writer:
        await writer.create("a")
        log, ended, done = Log(writer), 0, threading.Event()

        def end_commits() -> None:
            nonlocal ended

            async def end(connection: Any) -> None:
                nonlocal ended
                query = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                    WHERE application_name = $1 AND state = 'active' AND query = 'COMMIT'"""
                while ended < times and not done.is_set():
                    found = len(await connection.fetch(query, schema))
                    ended += found
                    if found and ended % 4 == 0:  # let some get through: a fast machine would end them all
                        await asyncio.sleep(0.1)

            server().ask(end)

        async with anyio.create_task_group() as group:
            group.start_soon(anyio.to_thread.run_sync, end_commits)
            seq = 0
            try:
                while ended < times:
                    seq += 1
                    await log.append(seq)
            finally:
                done.set()
        await log.check(seq)


async def test_connections_ended_in_the_middle_of_commits(schema: str, opener: Opener) -> None:
    await ended_mid_commit(schema, opener, 8)


@pytest.mark.long
async def test_connections_ended_in_the_middle_of_200_commits(schema: str, opener: Opener) -> None:
    await ended_mid_commit(schema, opener, 200)


async def test_commits_that_complete_after_the_reconnect(schema: str) -> None:
    """The connection breaks on our side; the server goes on with the commit, and only then sees that nobody listens."""
    slow_commits(schema, 0.3)
    with proxied(url_of(schema)) as proxy:
        async with writing(lambda: open_postgresql(StorageConfig(url=proxy.url))) as writer:
            await writer.create("a")
            log = Log(writer)
            for seq in range(1, 4):
                async with anyio.create_task_group() as group:
                    group.start_soon(log.append, seq)
                    await anyio.sleep(0.15)
                    await anyio.to_thread.run_sync(proxy.cut)
            await log.check(3)
            assert log.tries > 3
            assert log.stored_unknown > 0


# Calls that are cancelled


@pytest.mark.parametrize("rounds", [3, pytest.param(25, marks=pytest.mark.long)])
async def test_no_query_runs_on_after_it_was_cancelled(
    schema: str, opener: Opener, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    threads = threading.active_count()
    async with opener() as storage:
        with monkeypatch.context() as patch:
            patch.setattr(snapshot, "SELECT_SWITCHES", SLOW)

            async def read() -> None:
                async with storage.snapshot() as view:
                    await view.switches("a")

            started = time.monotonic()
            for _ in range(rounds):
                with anyio.move_on_after(0.15) as scope:
                    async with anyio.create_task_group() as group:
                        for _ in range(8):
                            group.start_soon(read)
                assert scope.cancelled_caught
                assert activity(schema) == []
                assert storage.figures().in_use == 0
            assert time.monotonic() - started < 20
        async with storage.snapshot() as view:
            assert not await view.switches("a")
    assert threading.active_count() <= threads
    assert server().rows("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", schema) == [(0,)]


async def test_of_a_begin_that_was_cancelled_no_transaction_is_left(schema: str) -> None:
    """The driver learns only from the server's answer that there is one."""
    with proxied(url_of(schema, application_name=schema)) as proxy:
        async with open_postgresql(StorageConfig(url=proxy.url)) as storage:
            proxy.slow_down(0.1)
            with anyio.move_on_after(0.05) as scope:
                async with storage.snapshot():
                    pass
            assert scope.cancelled_caught
            assert storage.figures().in_use == 0
            await anyio.sleep(0.3)
            assert activity(schema) == []
            async with storage.snapshot() as view:
                assert view.watermark == 0


async def test_a_batch_that_is_cancelled_is_undone(schema: str, opener: Opener) -> None:
    server().execute(
        """
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(60); RETURN NEW; END';
        CREATE TRIGGER wait BEFORE UPDATE OF title ON sessions FOR EACH ROW EXECUTE FUNCTION wait()
        """,
        schema=schema,
    )
    async with writing(opener) as writer:
        await writer.create("a", messages=3)
        expected = await dump(writer.storage)
        with anyio.move_on_after(0.2) as scope:
            await writer.apply(touched=(writer.touch("a"),), edited=(("a", Details("title", None, "{}")),))
        assert scope.cancelled_caught
        assert activity(schema) == []
        assert await dump(writer.storage) == expected
        await writer.create("b")


async def test_a_commit_that_is_cancelled_ends_first(schema: str, opener: Opener) -> None:
    slow_commits(schema, 0.3)
    async with writing(opener) as writer:
        await writer.create("a")
        batch = writer.batch(messages=(message_row("a", 1),))
        with anyio.move_on_after(0.15) as scope:
            await writer.storage.apply(batch, writer.fence)
        assert scope.cancel_called
        with pytest.raises(SequenceMismatch):
            await writer.storage.apply(batch, writer.fence)
        assert activity(schema) == []


# Round trips


async def test_a_batch_is_a_statement_for_each_field(schema: str, opener: Opener) -> None:
    """However many rows it has."""
    async with writing(opener) as writer:
        await writer.create("a")
        executed: list[str] = []
        assert isinstance(writer.storage, PostgresqlStorage)
        run = PostgresqlTransaction.write

        async def counted(self: PostgresqlTransaction, field: str, *args: Any) -> int:
            executed.append(field)
            return await run(self, field, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PostgresqlTransaction, "write", counted)
            receipt = await writer.apply(
                created=tuple(session_row(f"{number}") for number in range(300)),
                contexts=tuple(context_row(f"{number}") for number in range(300)),
                messages=tuple(message_row("a", seq) for seq in range(1, 2001)),
            )
        assert receipt.rows == 2600
        assert executed == ["created", "contexts", "messages"]
        async with writer.storage.snapshot() as view:
            assert [row.seq for row in await view.messages("a", limit=5000)] == list(range(1, 2001))


@pytest.mark.parametrize("read", ["messages", "history", "nothing", "switches"])
async def test_a_session_out_of_memory_is_loaded_in_the_transaction_that_reads_it(tmp_path: Path, read: str) -> None:
    """Besides its beginning and its end: the head with the sequence, and what is read."""
    begun, asked = list[Connection](), list[str]()
    begin, fetch = Database.begun, Connection.fetch

    async def counted_begin(self: Database, statement: str) -> Connection:
        connection = await begin(self, statement)
        if "READ ONLY" in statement:
            begun.append(connection)
        return connection

    async def counted_fetch(self: Connection, sql: str, values: list[Any]) -> list[Any]:
        if self in begun:  # and not the purge's, which may be under way
            asked.append(sql)
        return await fetch(self, sql, values)

    async with in_schema(tmp_path).open() as runtime:
        session = await runtime.create_session()
        if read != "nothing":
            await fill(session, 100)
            await session.switch_agent("another")
        await runtime.flush()
        forget(runtime)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Database, "begun", counted_begin)
            patch.setattr(Connection, "fetch", counted_fetch)
            if read == "switches":
                assert len(await session.switches()) == 1
            elif read == "history":
                assert len(await session.history()) == 100
            else:
                assert len((await session.messages(limit=1000)).items) == (0 if read == "nothing" else 100)
    assert len(begun) == 1
    assert len(asked) == 2


def test_importing_the_plugin_imports_no_driver() -> None:
    program = "import sys, agent_runtime_postgresql; print([m for m in ('asyncpg', 'sqlalchemy', 'alembic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


async def test_tables_lie_in_the_users_own_schema_unless_told_otherwise() -> None:
    name = new_schema()
    server().execute(f"CREATE ROLE {name} LOGIN; CREATE SCHEMA {name} AUTHORIZATION {name}")
    try:
        url = url_of(name).replace("postgres@", f"{name}@").replace(f"schema={name}", "")
        async with writing(lambda: open_postgresql(StorageConfig(url=url))) as writer:
            await writer.create("a")
        assert server().rows("SELECT incarnation FROM sessions", schema=name) == [("a",)]
    finally:
        server().execute(f"DROP SCHEMA {name} CASCADE; DROP ROLE {name}")
