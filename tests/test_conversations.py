"""Real conversations, written one message at a time by many at once, across a restart: what comes out, what it costs.

Counted from outside: rows by a person's own queries, transactions by the commits that reach the driver.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import msgspec
import pytest
from sqlalchemy import Connection, Engine, event

from agent_runtime import Runtime, hookimpl
from agent_runtime.changes import Receipt
from places import Place, forget, place_fixture

pytestmark = pytest.mark.anyio

SAMPLE = Path(__file__).parent / "data" / "airline-sample.jsonl.gz"
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    conversation["session_id"]: conversation["messages"]
    for conversation in map(json.loads, gzip.decompress(SAMPLE.read_bytes()).splitlines())
}
MESSAGES = sum(map(len, CONVERSATIONS.values()))
WRITERS = 16
INTERVAL_S = 5.0
BATCH_CHANGES = 1000
OPENING_COMMITS = {"sqlite": 2, "postgresql": 3}
"""The lease taken and given back; and one look at a server's settings."""
TOOLS = {
    "sqlite": "json_extract(call.value, '$.function.name') AS tool, count(*) FROM messages, json_each(tool_calls)",
    "postgresql": "call.value #>> '{function,name}' AS tool, count(*) FROM messages, json_array_elements(tool_calls)",
}
HOUR_AGO = {"sqlite": "strftime('%Y-%m-%dT%H:%M:%S', 'now', '-1 hour')", "postgresql": "now() - interval '1 hour'"}

place = place_fixture(("sqlite", "postgresql"))


class Receipts:
    """An observer that keeps what it is told, and when."""

    def __init__(self) -> None:
        self.receipts: list[tuple[float, Receipt]] = []

    @hookimpl
    def agent_runtime_batch_stored(self, receipt: Receipt) -> None:
        self.receipts.append((time.monotonic(), receipt))


@contextmanager
def counted_commits() -> Iterator[list[float]]:
    """When transactions were committed, whoever did it."""
    commits: list[float] = []
    execute = asyncpg.Connection.execute

    def commit(_: Connection) -> None:
        commits.append(time.monotonic())

    async def executed(connection: asyncpg.Connection, query: str, *args: Any, **options: Any) -> Any:
        if query == "COMMIT":
            commits.append(time.monotonic())
        return await execute(connection, query, *args, **options)

    event.listen(Engine, "commit", commit)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncpg.Connection, "execute", executed)
            yield commits
    finally:
        event.remove(Engine, "commit", commit)


async def write(runtime: Runtime, halves: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """Append these messages, one call each, by 16 tasks that take turns at the sessions."""
    left = iter(halves)

    async def writer() -> None:
        for session_id, messages in left:
            session = await runtime.get_or_create_session(session_id)
            for message in messages:
                await session.append_message(message)
                await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        for _ in range(WRITERS):
            tasks.start_soon(writer)


async def check_histories(runtime: Runtime) -> None:
    for session_id, messages in CONVERSATIONS.items():
        session = await runtime.get_session(session_id)
        assert await session.history() == messages
        assert msgspec.json.decode(await session.history_json()) == messages


def kind_of(place: Place) -> str:
    return place.url.partition(":")[0]


async def test_conversations_come_out_as_they_went_in_at_a_row_a_message(place: Place) -> None:
    sections: dict[str, dict[str, Any]] = {
        "write_behind": {"interval_s": INTERVAL_S, "batch_changes": BATCH_CHANGES},
        "residents": {"tail_messages": 5},
    }
    observer = Receipts()
    changes = 0
    with counted_commits() as commits:
        for half in (0, 1):
            began, stored_before, committed_before = time.monotonic(), len(observer.receipts), len(commits)
            async with place.open(plugins=[observer], **sections) as runtime:
                parts = {name: len(messages) // 2 for name, messages in CONVERSATIONS.items()}
                halves = [
                    (name, messages[: parts[name]] if half == 0 else messages[parts[name] :])
                    for name, messages in CONVERSATIONS.items()
                ]
                await write(runtime, halves)
                if half == 1:
                    await check_histories(runtime)
                changes = runtime.watermarks.accepted
            took_s = time.monotonic() - began
            batches = len(observer.receipts) - stored_before
            of_this_half = changes - sum(receipt.changes for _, receipt in observer.receipts[:stored_before])
            # One when an interval is over or the batch is full, and one at the close.
            assert 1 <= batches <= took_s // INTERVAL_S + of_this_half // BATCH_CHANGES + 1
            purges = 1  # an earlier run may have left rows
            assert len(commits) - committed_before == batches + OPENING_COMMITS[kind_of(place)] + purges
    assert changes == MESSAGES + len(CONVERSATIONS)
    receipts = [receipt for _, receipt in observer.receipts]
    assert sum(receipt.changes for receipt in receipts) == changes
    assert sum(receipt.messages for receipt in receipts) == MESSAGES
    assert [receipt.after for receipt in receipts] == [0, *[receipt.last for receipt in receipts[:-1]]]
    check_rows(place)
    async with place.open() as runtime:
        await check_histories(runtime)
        forget(runtime)
        assert len([record async for record in runtime.scan_sessions()]) == len(CONVERSATIONS)
        await check_histories(runtime)


def check_rows(place: Place) -> None:
    """What a person finds."""
    kind = kind_of(place)
    counts = {
        name: place.query(f"SELECT count(*) FROM {name}")[0][0]
        for name in ("sessions", "contexts", "messages", "switches", "documents", "outcomes", "quarantine", "purges")
    }
    assert counts == {
        "sessions": len(CONVERSATIONS),
        "contexts": len(CONVERSATIONS),
        "messages": MESSAGES,
        "switches": 0,
        "documents": 0,
        "outcomes": 0,
        "quarantine": 0,
        "purges": 0,
    }
    [(sequence, epoch, holder)] = place.query("SELECT sequence, epoch, holder FROM partitions")
    assert (sequence, holder) == (MESSAGES + len(CONVERSATIONS), None)
    assert epoch >= 2
    if kind == "sqlite":
        assert place.query("PRAGMA integrity_check") == [("ok",)]
        assert place.query("PRAGMA foreign_key_check") == []
    found = place.query(
        "SELECT session_id, role, content, tool_calls, tool_call_id, name"
        " FROM messages JOIN sessions USING (incarnation) ORDER BY session_id, seq",
    )
    assert found == [
        (
            name,
            message["role"],
            message["content"],
            msgspec.json.encode(message["tool_calls"]).decode() if message.get("tool_calls") is not None else None,
            message.get("tool_call_id"),
            message.get("name"),
        )
        for name, messages in sorted(CONVERSATIONS.items())
        for message in messages
    ]
    used = dict(place.query(f"SELECT {TOOLS[kind]} AS call GROUP BY tool ORDER BY 2 DESC"))
    called = [
        call["function"]["name"]
        for messages in CONVERSATIONS.values()
        for message in messages
        for call in message.get("tool_calls") or []
    ]
    assert used == {name: called.count(name) for name in called}
    assert place.query(f"SELECT count(*) FROM messages WHERE created_at > {HOUR_AGO[kind]}") == [(MESSAGES,)]


def test_the_sample_has_what_is_hard() -> None:
    """The conversations are worth the name: null content, repeated call ids, unicode."""
    repeated = 0
    for messages in CONVERSATIONS.values():
        assert messages[0]["role"] == "system"
        ids = [call["id"] for message in messages for call in message.get("tool_calls") or []]
        repeated += len(ids) != len(set(ids))
    everything = json.dumps(list(CONVERSATIONS.values()), ensure_ascii=False)
    assert repeated == 15
    assert '"content": null' in everything
    assert not everything.isascii()
    assert (len(CONVERSATIONS), MESSAGES) == (30, 990)


@pytest.mark.parametrize("batch_changes", [100, 300])
async def test_a_full_batch_is_stored_at_once(place: Place, batch_changes: int) -> None:
    observer = Receipts()
    async with place.open(plugins=[observer], write_behind={"batch_changes": batch_changes}) as runtime:
        await write(runtime, list(CONVERSATIONS.items()))
    sizes = [receipt.changes for _, receipt in observer.receipts]
    assert sum(sizes) == MESSAGES + len(CONVERSATIONS)
    assert sizes[:-1] == [batch_changes] * (len(sizes) - 1)


async def test_an_interval_has_one_transaction(place: Place) -> None:
    observer = Receipts()
    async with place.open(plugins=[observer], write_behind={"interval_s": 0.1}) as runtime:
        session = await runtime.create_session("s1")
        until = time.monotonic() + 0.55
        while time.monotonic() < until or len(observer.receipts) < 2:
            await session.append("user", "hi")
            await anyio.sleep(0.005)
        count, late_s = len(observer.receipts), time.monotonic() - until
    begun = [at - receipt.duration_s for at, receipt in observer.receipts[:count]]
    assert count <= 6 + late_s / 0.1
    assert all(later - earlier >= 0.07 for earlier, later in pairwise(begun))
