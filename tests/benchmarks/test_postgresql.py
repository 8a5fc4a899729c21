"""PostgreSQL: storing and loading against the bare driver on the same server, and what a long way to it costs.

One process measures its server, on the same machine; so the server's own work is on both sides of every ratio.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import msgspec
import pytest

from agent_runtime import Message, Runtime, SessionHandle
from agent_runtime.bridge import AsyncioBridge
from agent_runtime.changes import message_row
from agent_runtime.identifiers import utc_now
from agent_runtime.rows import MessageRow
from agent_runtime.testing import faulty_plugin
from agent_runtime_postgresql import open_postgresql
from places import Place, forget
from postgres_proxy import proxied
from postgres_server import migrated_schema, server, url_of

from .callers import EventLoop, appends_per_second, name_of, on_every_event_loop
from .measure import compare, figure, seconds
from .sample import Chat, median_message, messages
from .test_flush import Watch, append_all, collected

__all__ = ["collected"]

pytestmark = [pytest.mark.anyio, pytest.mark.benchmark, pytest.mark.timeout(900)]

ROWS = 1000
SESSIONS = 50
CALLERS = 32
STORED = 10  # appends of each caller in a round
FLUSH_AT_LEAST = 0.6
STORED_AT_LEAST = 3.0
TRANSACTIONS_AT_MOST = 1.0
LOAD_AT_MOST = 2.0
FAR_AT_MOST = 1.2
ROUND_TRIP_S = 0.020

_COLUMNS = MessageRow.__struct_fields__
_JSON = ("parts", "tool_calls", "metadata", "extra")
_ARRAYS = {"seq": "bigint", "token_count": "bigint", "created_at": "timestamptz"} | dict.fromkeys(_JSON, "json")
_INSERT = "INSERT INTO messages ({}) SELECT * FROM unnest({})".format(
    ", ".join(_COLUMNS),
    ", ".join(f"${number}::{_ARRAYS.get(name, 'text')}[]" for number, name in enumerate(_COLUMNS, 1)),
)
_INSERT_ONE = (
    f"INSERT INTO messages ({', '.join(_COLUMNS)}) VALUES ({', '.join(f'${n}' for n, _ in enumerate(_COLUMNS, 1))})"
)
_values = attrgetter(*_COLUMNS)
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM messages WHERE incarnation = $1 ORDER BY seq LIMIT $2"


class Plain:
    """The driver and nothing else: one connection, statements kept prepared."""

    def __init__(self, bridge: AsyncioBridge, connection: Any) -> None:
        self._bridge = bridge
        self.connection = connection

    async def timed(self, call: Callable[[Any], Awaitable[object]]) -> float:
        """The seconds that `call` takes on the loop of the connection."""

        async def run() -> float:
            return await seconds(call(self.connection))

        return await self._bridge.run(run)


@asynccontextmanager
async def plain(schema: str) -> AsyncIterator[Plain]:
    async with AsyncioBridge.open() as bridge:
        connection = await bridge.run(_connect, schema)
        try:
            yield Plain(bridge, connection)
        finally:
            await bridge.run(connection.close)


async def _connect(schema: str) -> Any:
    return await asyncpg.connect(server().url, server_settings={"search_path": schema})


def copy_sessions(schema: str, other: str) -> None:
    """Have the sessions of a schema in another one, for rows that belong to them."""
    for row in server().rows("SELECT incarnation, session_id FROM sessions", schema=schema):
        insert = "INSERT INTO sessions VALUES ('{}', 0, '{}', null, null, null, '{{}}', now(), now(), 0, 1, 0, 1)"
        server().execute(insert.format(*row), schema=other)


def row_of(session: SessionHandle, seq: int, chat: Chat) -> MessageRow:
    """The row of a message, as appending it to the session makes it."""
    message = Message(seq=seq, id=f"{seq:036}", created_at=utc_now(), **chat)
    return message_row(session.incarnation, msgspec.json.encode(message))


def arrays_of(sessions: Sequence[SessionHandle], first_seq: int) -> list[list[Any]]:
    """The columns of the rows that `append_all` leads to."""
    rows = [
        row_of(sessions[number % len(sessions)], first_seq + number // len(sessions), chat)
        for number, chat in enumerate(messages(ROWS))
    ]
    rows.sort(key=attrgetter("incarnation", "seq"))
    return [list(column) for column in zip(*map(_values, rows), strict=True)]


@pytest.mark.parametrize("part", ["apply", "flush"])
async def test_rows_per_second(tmp_path: Path, part: str, anyio_backend: str) -> None:
    """Batches of 1,000 real messages of 50 sessions, against such rows handed to the driver as arrays, committed.

    `apply` is the storage's part; `flush` is all of it, coalescing included, from the call to its return.
    """
    watch, schema, other = Watch(), migrated_schema(), migrated_schema()
    place = Place(f"faulty:{url_of(schema)}", faulty_plugin(open_postgresql, watch), journal=tmp_path / "journal")
    async with place.open(write_behind={"batch_changes": ROWS}) as runtime, plain(other) as bare:
        sessions = [await runtime.create_session() for _ in range(SESSIONS)]
        await runtime.flush()
        copy_sessions(schema, other)
        first_seqs = count(1, ROWS // SESSIONS)

        async def ours() -> float:
            await append_all(sessions, messages(ROWS))
            took = await seconds(runtime.flush())
            return ROWS / (watch.took_s if part == "apply" else took)

        async def theirs() -> float:
            arrays = arrays_of(sessions, next(first_seqs))
            return ROWS / await bare.timed(lambda connection: connection.execute(_INSERT, *arrays))

        name = f"{part} / unnest of 1,000 messages by the driver, {anyio_backend}"
        await compare(name, ours, theirs, rounds=25, unit="rows/s", at_least=FLUSH_AT_LEAST)


@on_every_event_loop
async def test_stored_appends(tmp_path: Path, anyio_backend: EventLoop) -> None:
    """32 callers that wait until theirs is stored, against one connection that commits such rows INSERT by INSERT."""
    schema, other = migrated_schema(), migrated_schema()
    place = Place(url_of(schema), journal=tmp_path / "journal")
    async with place.open() as runtime, plain(other) as bare:
        sessions = [await runtime.create_session() for _ in range(CALLERS)]
        await runtime.flush()
        copy_sessions(schema, other)
        seqs = count(1)

        async def ours() -> float:
            return await appends_per_second(sessions, STORED, "stored")

        async def theirs() -> float:
            seq = next(seqs)
            rows = [_values(row_of(session, seq, median_message())) for session in sessions]

            async def insert(connection: Any) -> None:
                for row in rows:
                    await connection.execute(_INSERT_ONE, *row)

            return CALLERS / await bare.timed(insert)

        name = f"stored appends of 32 callers / INSERTs committed one by one, {name_of(anyio_backend)}"
        await compare(name, ours, theirs, rounds=10, unit="/s", at_least=STORED_AT_LEAST)


async def test_transactions(tmp_path: Path, anyio_backend: str) -> None:
    """Of 10,000 appends by a call each, for every 1,000."""
    thousands, schema = 10, migrated_schema()
    async with Place(url_of(schema), journal=tmp_path / "journal").open() as runtime:
        sessions = [await runtime.create_session() for _ in range(SESSIONS)]
        await runtime.flush()
        before = runtime.status().flush.batches
        await append_all(sessions, messages(1000 * thousands))
        await runtime.flush()
        batches = runtime.status().flush.batches - before
    name = f"transactions per 1,000 appended messages, {anyio_backend}"
    figure(name, batches / thousands, at_most=TRANSACTIONS_AT_MOST)


@pytest.mark.usefixtures("collected")
async def test_cold_load(tmp_path: Path, anyio_backend: str) -> None:
    """A page of 1,000 messages of a session of which nothing is in memory, against a select of their rows by the driver
    alone, as it gives them: with their JSON as text.
    """
    schema = migrated_schema()
    async with Place(url_of(schema), journal=tmp_path / "journal").open() as runtime, plain(schema) as bare:
        session = await runtime.create_session()
        await session.append_many(messages(ROWS))
        await runtime.flush()

        async def load() -> float:
            forget(runtime)
            return await seconds(session.messages(limit=ROWS))

        async def fetch(connection: Any) -> object:
            return await connection.fetch(_SELECT, session.incarnation, ROWS)

        name = f"cold page of 1,000 messages / a select by the driver, {anyio_backend}"
        await compare(name, load, lambda: bare.timed(fetch), rounds=100, at_most=LOAD_AT_MOST)


async def append_p95(runtime: Runtime, sessions: Sequence[SessionHandle]) -> float:
    """The 95th percentile of appends at `journaled` that tasks make side by side, while batches are stored."""
    message, took = median_message(), list[float]()

    async def append(session: SessionHandle) -> None:
        for _ in range(100):
            took.append(await seconds(session.append(**message)))
            await anyio.sleep(0.001)

    async with anyio.create_task_group() as tasks:
        for session in sessions:
            tasks.start_soon(append, session)
    await runtime.flush()
    return sorted(took)[int(len(took) * 0.95)]


async def test_a_long_way_to_the_database(tmp_path: Path, anyio_backend: str) -> None:
    """What an append at `journaled` takes with a database that is 20 ms away, there and back, against one nearby."""
    with proxied(url_of(migrated_schema())) as far, proxied(url_of(migrated_schema())) as near:
        far.slow_down(ROUND_TRIP_S / 2)
        write_behind = {"interval_s": 0.05, "batch_changes": 100}
        async with (
            Place(far.url, journal=tmp_path / "far").open(write_behind=write_behind) as there,
            Place(near.url, journal=tmp_path / "near").open(write_behind=write_behind) as here,
        ):
            of_far = [await there.create_session() for _ in range(CALLERS)]
            of_near = [await here.create_session() for _ in range(CALLERS)]

            async def appended_far() -> float:
                return await append_p95(there, of_far)

            async def appended_near() -> float:
                return await append_p95(here, of_near)

            name = f"append p95, database 20 ms away / nearby, {anyio_backend}"
            await compare(name, appended_far, appended_near, rounds=6, at_most=FAR_AT_MOST)
