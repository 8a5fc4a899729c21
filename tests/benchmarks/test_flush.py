"""Storing: how fast batches go to the database, how long they hold the event loop, and what sharing one saves."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, TypeVar

import anyio
import msgspec
import pytest

from agent_runtime import Message, Runtime, SessionHandle
from agent_runtime.changes import Batch, message_row
from agent_runtime.identifiers import utc_now
from agent_runtime.testing import CallName, Faults, faulty_plugin
from agent_runtime_sqlite import open_sqlite
from places import Place, in_file

from .measure import compare, seconds, spread
from .plain import insert_messages, plain_engine
from .sample import Chat, median_message, messages

pytestmark = [pytest.mark.anyio, pytest.mark.benchmark, pytest.mark.timeout(900)]
T = TypeVar("T")

ROWS = 1000
SESSIONS = 50
AT_LEAST = 0.6
CALLERS = 64
WRITERS = 16
TICK_S = 0.001
BACKLOG = 20_000


class Watch(Faults):
    """No faults at all: tells the seconds that the last batch took to apply."""

    def __init__(self) -> None:
        super().__init__()
        self.took_s = 0.0

    async def call(self, name: CallName, effect: Callable[[], Awaitable[T]], batch: Batch | None = None) -> T:
        started = perf_counter()
        result = await super().call(name, effect, batch)
        if batch is not None:
            self.took_s = perf_counter() - started
        return result


async def append_all(sessions: Sequence[SessionHandle], chats: Sequence[Chat]) -> None:
    """Append the messages by a call each, to the sessions in turn."""
    for number, chat in enumerate(chats):
        await sessions[number % len(sessions)].append_message(chat)


def rows_of(sessions: Sequence[SessionHandle], first_seq: int) -> list[dict[str, Any]]:
    """The rows that `append_all` leads to, in the order of the key."""
    rows = []
    for number, chat in enumerate(messages(ROWS)):
        seq = first_seq + number // len(sessions)
        message = Message(seq=seq, id=f"{number:036}", created_at=utc_now(), **chat)
        encoded = msgspec.json.encode(message)
        rows.append(msgspec.structs.asdict(message_row(sessions[number % len(sessions)].incarnation, encoded)))
    return sorted(rows, key=lambda row: (row["incarnation"], row["seq"]))


@pytest.mark.parametrize("part", ["apply", "flush"])
async def test_rows_per_second(tmp_path: Path, part: str, anyio_backend: str) -> None:
    """Batches of 1,000 real messages of 50 sessions, against such rows handed to SQLAlchemy's executemany as they are.

    Each side has its own copy of one file. `apply` is the storage's part; `flush` is all of it, coalescing included,
    from the call to its return.
    """
    watch = Watch()
    file = in_file(tmp_path)
    place = Place(f"faulty:{file.url}", faulty_plugin(open_sqlite, watch), path=file.path)
    async with place.open() as runtime:
        names = [(await runtime.create_session()).session_id for _ in range(SESSIONS)]
    engine = plain_engine(shutil.copyfile(file.path, tmp_path / "plain.db"))
    first_seqs = count(1, ROWS // SESSIONS)

    async with place.open(write_behind={"batch_changes": ROWS}) as runtime:
        sessions = [await runtime.get_session(name) for name in names]

        async def ours() -> float:
            await append_all(sessions, messages(ROWS))
            batches = runtime.status().flush.batches
            took = await seconds(runtime.flush())
            assert runtime.status().flush.batches == batches + 1
            return ROWS / (watch.took_s if part == "apply" else took)

        async def theirs() -> float:
            rows = rows_of(sessions, next(first_seqs))
            started = perf_counter()
            insert_messages(engine, rows)
            return ROWS / (perf_counter() - started)

        name = f"{part} / executemany of 1,000 messages, {anyio_backend}"
        await compare(name, ours, theirs, rounds=40, unit="rows/s", at_least=AT_LEAST)
    engine.dispose()


class Stalls:
    """How long others hold the event loop, seen by a task that sleeps a millisecond at a time. All in seconds.

    `late`: how late it wakes, which is also the doing of the timer and of other programs. `held`: the processor time
    that the loop's thread used meanwhile, which is only what our own code and the load did.
    """

    def __init__(self) -> None:
        self.late: list[float] = []
        self.held: list[float] = []

    async def watch(self) -> None:
        while True:
            started, used = perf_counter(), thread_time()
            await anyio.sleep(TICK_S)
            self.late.append(perf_counter() - started - TICK_S)
            self.held.append(thread_time() - used)


@pytest.fixture
def collected() -> Iterator[None]:
    """Keeps what the tests and their imports have in memory from the garbage collector: its rounds are not ours."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("collected")
async def test_loop_stall(tmp_path: Path, anyio_backend: str) -> None:
    """With nothing to do; with 16 tasks that append every millisecond; and with full batches, one after the other,
    under way besides.
    """
    chats = messages(BACKLOG)
    stalls = {state: Stalls() for state in ("idle", "appends", "appends and batches")}

    async def write(session: SessionHandle) -> None:
        for chat in chats:
            await session.append_message(chat)
            await anyio.sleep(TICK_S)

    async def measure(runtime: Runtime, state: str) -> None:
        sessions = [await runtime.create_session() for _ in range(SESSIONS)]
        await runtime.flush()
        if state == "appends and batches":
            await append_all(sessions, chats)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stalls[state].watch)
            if state != "idle":
                for session in sessions[:WRITERS]:
                    tasks.start_soon(write, session)
            await (runtime.flush() if state == "appends and batches" else anyio.sleep(1.0))
            tasks.cancel_scope.cancel()
        await runtime.flush()

    async with in_file(tmp_path).open() as runtime:
        for _ in range(5):
            for state in stalls:
                await measure(runtime, state)
    for state, each in stalls.items():
        spread(f"woken late, {state}, {anyio_backend}", each.late)
        spread(f"loop held, {state}, {anyio_backend}", each.held)


async def test_group_commit(tmp_path: Path, anyio_backend: str) -> None:
    """64 appends at `stored`, one after the other and all at once: then they share transactions."""
    message = median_message()

    async def one_by_one() -> float:
        started = perf_counter()
        for session in sessions:
            await session.append(**message, durability="stored")
        return perf_counter() - started

    async def at_once() -> float:
        async def append(session: SessionHandle) -> None:
            await session.append(**message, durability="stored")

        started = perf_counter()
        async with anyio.create_task_group() as tasks:
            for session in sessions:
                tasks.start_soon(append, session)
        return perf_counter() - started

    async with in_file(tmp_path).open() as runtime:
        sessions = [await runtime.create_session() for _ in range(CALLERS)]
        await runtime.flush()
        name = f"64 stored appends one by one / at once, {anyio_backend}"
        await compare(name, one_by_one, at_once, rounds=15)
