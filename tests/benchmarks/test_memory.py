"""Memory: what sessions and unstored changes take, and whether the runtime counts that when it keeps to its budgets."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from agent_runtime import Runtime, SessionNotFound
from places import Place, forget, in_file

from .measure import figure
from .sample import messages

pytestmark = [pytest.mark.anyio, pytest.mark.benchmark, pytest.mark.timeout(900)]

SESSIONS, TAIL, EACH = 100, 200, 100
HEADS = 3000
ENDLESS = 2**40


@pytest.fixture
def anyio_backend() -> str:
    """One event loop will do: the objects are the same on both."""
    return "asyncio"


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@asynccontextmanager
async def opened(place: Place) -> AsyncIterator[Runtime]:
    """A runtime without limits that has written and read before, so that its own caches are filled."""
    async with place.open(
        residents={"bytes_max": ENDLESS, "tail_messages": TAIL},
        write_behind={"pending_bytes_max": ENDLESS, "batch_changes": ENDLESS},
    ) as runtime:
        session = await runtime.create_session()
        await session.append_many(messages(TAIL))
        await runtime.flush()
        forget(runtime)
        await session.messages(limit=TAIL, order="desc")
        forget(runtime)
        yield runtime


class Weight(NamedTuple):
    """Bytes: what Python has allocated, and what the runtime counts in its two budgets."""

    taken: int
    resident: int
    pending: int


def weigh(runtime: Runtime) -> Weight:
    gc.collect()
    status = runtime.status()
    return Weight(tracemalloc.get_traced_memory()[0], status.residents.bytes, status.pending.bytes)


def show(name: str, number: int, taken: int, counted: int, *, at_most: float) -> None:
    """Print what is counted over what is taken, of `number` things; fail when the runtime deceives itself."""
    figure(f"counted / taken by {name} ({counted / number:,.0f} / {taken / number:,.0f} bytes)", counted / taken)
    assert 0.9 <= counted / taken <= at_most


async def test_messages(tmp_path: Path) -> None:
    """Real messages in full tails: appended, and read from the database."""
    chats, number = messages(TAIL), SESSIONS * TAIL
    async with opened(in_file(tmp_path)) as runtime:
        sessions = [await runtime.create_session() for _ in range(SESSIONS)]
        await runtime.flush()
        before = weigh(runtime)
        for session in sessions:
            for chat in chats:
                await session.append_message(chat)
        await runtime.flush()
        after = weigh(runtime)
        taken = after.taken - before.taken
        show("a message, appended", number, taken, after.resident - before.resident, at_most=1.25)
        page = await sessions[0].messages(limit=TAIL)
        size = sum(len(msgspec.json.encode(message)) for message in page.items) / TAIL
        figure(
            f"bytes per resident message / its JSON ({taken / number:,.0f} / {size:,.0f} bytes)", taken / number / size
        )

        forget(runtime)
        for session in sessions:
            await session.record()
        before = weigh(runtime)
        for session in sessions:
            await session.messages(limit=TAIL, order="desc")
        after = weigh(runtime)
        show("a message, read", number, after.taken - before.taken, after.resident - before.resident, at_most=1.25)


async def test_heads(tmp_path: Path) -> None:
    """Sessions with a user and a title but without messages; and ids that have no session."""
    async with opened(in_file(tmp_path)) as runtime:
        before = weigh(runtime)
        names = [
            (await runtime.create_session(user_id=f"user {n}", title=f"Title {n}")).session_id for n in range(HEADS)
        ]
        await runtime.flush()
        after = weigh(runtime)
        show("a session, created", HEADS, after.taken - before.taken, after.resident - before.resident, at_most=1.5)

        forget(runtime)
        before = weigh(runtime)
        for name in names:
            await runtime.get_session(name)
        after = weigh(runtime)
        show("a session, read", HEADS, after.taken - before.taken, after.resident - before.resident, at_most=1.5)

        before = after
        for number in range(HEADS):
            with suppress(SessionNotFound):
                await runtime.get_session(f"there is no session with the id {number:09}")
        after = weigh(runtime)
        show("an id of no session", HEADS, after.taken - before.taken, after.resident - before.resident, at_most=2.0)


async def test_outcomes(tmp_path: Path) -> None:
    """Short messages, each with the outcome of its idempotency key."""
    async with opened(in_file(tmp_path)) as runtime:
        sessions = [await runtime.create_session() for _ in range(SESSIONS)]
        await runtime.flush()
        before = weigh(runtime)
        for session in sessions:
            for number in range(EACH):
                await session.append("user", "hello", idempotency_key=f"a key of the usual length {number:09}")
        await runtime.flush()
        after = weigh(runtime)
        taken, counted = after.taken - before.taken, after.resident - before.resident
        show("a short message and its outcome", SESSIONS * EACH, taken, counted, at_most=1.25)


@pytest.mark.parametrize("kind", ["append", "creation", "document"])
async def test_unstored_changes(tmp_path: Path, kind: str) -> None:
    """What is let go of when they are stored.

    More is counted: the JSON of a message is in the tail as well, which stays, and counts it too.
    """
    async with opened(in_file(tmp_path)) as runtime:
        sessions = [await runtime.create_session() for _ in range(SESSIONS)]
        await runtime.flush()
        for session in sessions:
            for number, chat in enumerate(messages(EACH)):
                if kind == "append":
                    await session.append_message(chat)
                elif kind == "creation":
                    await runtime.create_session(user_id=f"user {number}", title=f"Title {number}")
                else:
                    await session.put_document("notes", f"note {number}", chat)
        unstored = weigh(runtime)
        await runtime.flush()
        stored = weigh(runtime)
        show(f"an unstored {kind}", SESSIONS * EACH, unstored.taken - stored.taken, unstored.pending, at_most=3.0)
