"""Appending: what it costs in a long session and in a short one, and what the runtime adds to the bare work."""

from __future__ import annotations

import random
import shutil
from itertools import count
from pathlib import Path
from time import perf_counter, time_ns

import msgspec
import pytest
from anyio.lowlevel import checkpoint

from agent_runtime import Message, SessionHandle
from agent_runtime.identifiers import Identifiers, utc_now
from agent_runtime.records import Durability
from places import Place, forget, in_file

from .measure import Side, compare, seconds
from .sample import Chat, median_message, messages

pytestmark = [pytest.mark.anyio, pytest.mark.benchmark, pytest.mark.timeout(900)]

LONG, SHORT = 100_000, 10
AT_MOST = 1.1
BARE_AT_MOST = 5.0
SHORT_ROUNDS = 15  # then a new short session takes over
TURN = 64  # so many writes make one turn: then the runtime yields to the event loop


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the sessions `long` and `short`, of 100,000 and 10 messages."""
    place = in_file(tmp_path_factory.mktemp("filled"))
    with place.open_blocking() as runtime:
        for name, size in (("long", LONG), ("short", SHORT)):
            session = runtime.create_session(name)
            chats = messages(size)
            for start in range(0, size, 1000):
                session.append_many(chats[start : start + 1000])
                runtime.flush()
    return place.path


@pytest.fixture
def place(filled: Path, tmp_path: Path) -> Place:
    path = tmp_path / "sessions.db"
    shutil.copyfile(filled, path)
    return Place(f"sqlite:///{path}", path=path)


def appending(session: SessionHandle, durability: Durability | None = None) -> Side:
    """Appends the median message."""
    message = median_message()
    return lambda: seconds(session.append(**message, durability=durability))


@pytest.mark.parametrize("flushing", [False, True], ids=["quiet", "flushing"])
async def test_at_message_100_000_resident(place: Place, flushing: bool, anyio_backend: str) -> None:
    """Both sessions are in memory, with the newest 200 and all 10 of their messages.

    `flushing`: a batch is under way nearly all of the time. Else nothing is stored while it is measured.
    """
    async with place.open(write_behind={"interval_s": 0.001 if flushing else 1e6}) as runtime:
        long = await runtime.get_session("long")
        await long.messages(limit=200, order="desc")
        short = long
        rounds = count()

        async def turn_of(session: SessionHandle) -> float:
            if flushing:
                await checkpoint()
            return await appending(session)()

        async def turn_of_short() -> float:
            nonlocal short
            if next(rounds) % SHORT_ROUNDS == 0:
                short = await runtime.create_session()
                await short.append_many(messages(SHORT))
                await runtime.flush()
            return await turn_of(short)

        state = "a batch under way" if flushing else "no batch under way"
        name = f"append at message 100,000 / 10, resident, {state}, {anyio_backend}"
        await compare(name, lambda: turn_of(long), turn_of_short, rounds=3000, at_most=AT_MOST)
        assert runtime.status().residents.misses == 1


async def test_at_message_100_000_evicted(place: Place, anyio_backend: str) -> None:
    """Nothing of either session is in memory: the append has to load a head."""

    def cold(session: SessionHandle) -> Side:
        async def side() -> float:
            await runtime.flush()
            forget(runtime)
            missed = runtime.status().residents.misses
            took = await appending(session)()
            assert runtime.status().residents.misses == missed + 1
            return took

        return side

    async with place.open() as runtime:
        long, short = [await runtime.get_session(name) for name in ("long", "short")]
        name = f"append at message 100,000 / 10, not resident, {anyio_backend}"
        await compare(name, cold(long), cold(short), rounds=200, at_most=AT_MOST)


async def test_at_message_100_000_just_opened(place: Place, anyio_backend: str) -> None:
    """The first call of all after opening the database."""

    def first(name: str) -> Side:
        async def side() -> float:
            async with place.open() as runtime:
                started = perf_counter()
                session = await runtime.get_session(name)
                await session.append(**median_message())
                return perf_counter() - started

        return side

    name = f"append at message 100,000 / 10, just opened, {anyio_backend}"
    await compare(name, first("long"), first("short"), rounds=25, at_most=AT_MOST)


async def test_at_message_100_000_stored(place: Place, anyio_backend: str) -> None:
    """Resident, at the level `stored`: a transaction each."""
    async with place.open() as runtime:
        long, short = [appending(await runtime.get_session(name), "stored") for name in ("long", "short")]
        name = f"append at message 100,000 / 10, stored, {anyio_backend}"
        await compare(name, long, short, rounds=200, at_most=AT_MOST)


async def test_against_the_bare_work(tmp_path: Path, anyio_backend: str) -> None:
    """A buffered append, against a coroutine that yields once, builds the same record and encodes it."""
    message = median_message()
    identifiers = Identifiers(lambda: time_ns() // 1_000_000, random.Random(1).getrandbits)
    encode = msgspec.json.Encoder().encode
    seqs = count(1)

    async def bare(chat: Chat) -> Message:
        await checkpoint()
        record = Message(seq=next(seqs), id=identifiers.new(), created_at=utc_now(), **chat)
        encode(record)
        return record

    async def bare_turn() -> float:
        started = perf_counter()
        for _ in range(TURN):
            await bare(message)
        return (perf_counter() - started) / TURN

    async def turn() -> float:
        started = perf_counter()
        for _ in range(TURN):
            await session.append(**message)
        took = (perf_counter() - started) / TURN
        await runtime.flush()
        return took

    async with in_file(tmp_path).open() as runtime:
        session = await runtime.create_session()
        name = f"buffered append / the bare work, {anyio_backend}"
        await compare(name, turn, bare_turn, rounds=150, at_most=BARE_AT_MOST)
