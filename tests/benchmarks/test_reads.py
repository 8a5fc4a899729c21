"""Reading: from memory, and from the database against a plain select of the same rows."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import pytest

from places import forget, in_file

from .measure import compare, seconds
from .plain import plain_engine, select_messages
from .sample import messages

pytestmark = [pytest.mark.anyio, pytest.mark.benchmark, pytest.mark.timeout(900)]

MESSAGES = 1000
LIMIT = 100


async def test_history_from_memory(tmp_path: Path, anyio_backend: str) -> None:
    """The history of the newest 100 of 1,000 messages: with nothing of the session in memory, and with its tail."""
    async with in_file(tmp_path).open() as runtime:
        session = await runtime.create_session()
        await session.append_many(messages(MESSAGES))
        await runtime.flush()

        async def cold() -> float:
            forget(runtime)
            return await seconds(session.history(limit=LIMIT))

        async def warm() -> float:
            return await seconds(session.history(limit=LIMIT))

        async def as_json() -> float:
            return await seconds(session.history_json(limit=LIMIT))

        await compare(f"history of 100 messages, cold / from memory, {anyio_backend}", cold, warm, rounds=100)
        await compare(f"history of 100 messages, dicts / kept JSON, {anyio_backend}", warm, as_json, rounds=300)


async def test_cold_load(tmp_path: Path, anyio_backend: str) -> None:
    """A page of 1,000 messages of a session of which nothing is in memory, against a select of their rows."""
    place = in_file(tmp_path)
    engine = plain_engine(place.path)
    async with place.open() as runtime:
        session = await runtime.create_session()
        await session.append_many(messages(MESSAGES))
        await runtime.flush()

        async def load() -> float:
            forget(runtime)
            return await seconds(session.messages(limit=MESSAGES))

        async def select() -> float:
            started = perf_counter()
            assert select_messages(engine, session.incarnation, MESSAGES) == MESSAGES
            return perf_counter() - started

        await compare(f"cold page of 1,000 messages / a plain select, {anyio_backend}", load, select, rounds=100)
    engine.dispose()
