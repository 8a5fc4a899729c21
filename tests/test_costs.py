"""What opening and writing ask of a database, and what a write costs it: the same, however much there is already.

Counted in calls and rows. How long it takes is measured in benchmarks/.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from agent_runtime import Runtime, hookimpl
from agent_runtime.changes import Receipt
from agent_runtime.testing import Faults
from agent_runtime_memory import MemoryDatabase
from places import fill, forget
from rig import config, opened
from writes import WRITE_IDS, WRITES, Write, begin

pytestmark = pytest.mark.anyio

IN_THEIR_TIME = frozenset({"purge", "renew"})


class Counted:
    """A database that counts what it is asked, and what it is given."""

    def __init__(self) -> None:
        self._database, self._faults = MemoryDatabase(), Faults()
        self._receipts: list[Receipt] = []

    def open(self) -> AbstractAsyncContextManager[Runtime]:
        options = config(residents={"bytes_max": 10_000_000, "tail_messages": 200})
        return opened(options, self._database.open, self._faults, self)

    @hookimpl
    def agent_runtime_batch_stored(self, receipt: Receipt) -> None:
        self._receipts.append(receipt)

    def begin(self) -> None:
        """Count from here on."""
        self._faults.calls.clear()
        self._receipts.clear()

    def asked(self) -> list[str]:
        """The calls since then."""
        return [name for name in self._faults.calls if name not in IN_THEIR_TIME]

    def given(self) -> list[tuple[int, int]]:
        """The rows of each batch since then, and how many of them are messages."""
        return [(receipt.rows, receipt.messages) for receipt in self._receipts]


async def test_opening_asks_the_same_of_many_sessions_as_of_none() -> None:
    database = Counted()
    async with database.open():
        pass
    asked = []
    for number in range(3):
        database.begin()
        async with database.open() as runtime:
            assert runtime.status().residents.count == 0
        asked.append(database.asked())
        async with database.open() as runtime:
            for _ in range(1 + 50 * number):
                await fill(await runtime.create_session(), 3)
    assert asked[0] == asked[1] == asked[2]
    assert not {"head", "messages", "sessions", "outcomes", "documents"} & {*asked[0]}


async def cost(write: Write, messages: int, *, cold: bool, **options: Any) -> tuple[list[str], list[tuple[int, int]]]:
    """What a write asks for and gives, in a session that has so many messages, and documents and hand-overs."""
    database = Counted()
    async with database.open() as runtime:
        session = await begin(runtime)
        await fill(session, messages)
        for number in range(messages // 10):
            await session.put_document("c", f"d{number}", number)
            await session.switch_agent(f"agent {number}")
        await runtime.flush()
        if cold:
            forget(runtime)
        database.begin()
        await write.call(runtime, session, **options)
        asked = database.asked()
        await runtime.flush()
        return asked, database.given()


@pytest.mark.parametrize("write", WRITES, ids=WRITE_IDS)
async def test_a_write_costs_the_same_in_a_long_session_as_in_a_short_one(write: Write) -> None:
    for cold in (False, True):
        asked, given = await cost(write, 1, cold=cold)
        assert (asked, given) == await cost(write, 100, cold=cold)
        if write.method.startswith("append"):
            assert asked == (["snapshot", "head"] if cold else [])
    _, keyed = await cost(write, 1, cold=True, idempotency_key="k")
    assert [(rows - 1, messages) for rows, messages in keyed] == given
