"""A database that takes a quarter of what is offered: the rest is refused and told when to come back, nobody waits for
long, and what was accepted is there, once.

By default in virtual time, over a database in memory; by hand for a real minute, of a server with SQLite.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import anyio
import httpx
import pytest
from anyio import current_time

from agent_runtime import Config
from agent_runtime.testing import Faults, faulty_plugin
from agent_runtime_memory import MemoryDatabase
from http_rig import install, opened, runtime_of, serving
from rig import virtual_time as anyio_backend

__all__ = ["anyio_backend"]

pytestmark = pytest.mark.anyio

BATCH = 5
BATCH_S = 0.2
OFFERED = 4 * BATCH / BATCH_S
"""Requests a second; the database stores a quarter of that."""
WAIT_S = 0.3
WRITE_BEHIND = {
    "batch_changes": BATCH,
    "pending_bytes_max": 65536,
    "append_timeout_s": WAIT_S,
    "interval_s": 1.0,
}
MESSAGES = "/v1/sessions/s1/messages"

PLUGIN = f"""
import agent_runtime_sqlite
from agent_runtime.testing import Faults, faulty_plugin

faults = Faults()
faults.delay({BATCH_S}, "apply")
throttled = faulty_plugin(agent_runtime_sqlite.agent_runtime_storages()["sqlite"], faults, scheme="throttled")
agent_runtime_storages = throttled.agent_runtime_storages
"""


class Load:
    """Requests that come at their time, whether the ones before are answered or not; what came of them."""

    def __init__(
        self, duration_s: float, append: Callable[[dict[str, str]], Awaitable[tuple[int, dict[str, str], bytes]]]
    ) -> None:
        self._count = int(OFFERED * duration_s)
        self._append = append
        self.statuses: Counter[int] = Counter()
        self.accepted: dict[int, int] = {}
        self.slowest_s = 0.0

    async def run(self) -> None:
        began = current_time()
        async with anyio.create_task_group() as tasks:
            for number in range(self._count):
                await anyio.sleep(max(0.0, began + number / OFFERED - current_time()))
                tasks.start_soon(self._offer, number)

    async def _offer(self, number: int) -> None:
        started = current_time()
        status, headers, body = await self._append({"role": "user", "content": f"{number} {'x' * 2000}"})
        self.slowest_s = max(self.slowest_s, current_time() - started)
        self.statuses[status] += 1
        answer = json.loads(body)
        if status == 201:
            self.accepted[answer["seq"]] = number
        else:
            assert (status, answer["type"]) == (503, "urn:agent-runtime:problem:overloaded")
            assert headers["retry-after"] == "1"

    def check(self, stored: dict[int, int]) -> None:
        """All that was accepted is there, once, and nothing else; it was no more than was stored, and no less."""
        assert stored == self.accepted
        assert list(stored) == list(range(1, len(stored) + 1))
        assert self._count / 4 * 0.8 < len(stored) < self._count / 4 * 1.2
        assert self.statuses == {201: len(stored), 503: self._count - len(stored)}


async def test_in_virtual_time() -> None:
    faults, database = Faults(), MemoryDatabase()
    faults.delay(BATCH_S, "apply")
    config = Config.of("faulty:memory:", write_behind=WRITE_BEHIND, lease={"duration_s": 1000.0})
    plugins = [faulty_plugin(database.open, faults)]
    async with opened(config, plugins) as app:

        async def append(message: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
            reply = await app("POST", MESSAGES, message)
            return reply.status, reply.headers, reply.body

        await app("PUT", "/v1/sessions/s1")
        load = Load(20.0, append)
        await load.run()
        assert (await app("GET", "/readyz")).status == 200
        assert runtime_of(app).status().pending.changes > 0
    async with opened(config, plugins) as app:
        session = await runtime_of(app).get_session("s1")
        stored = {message.seq: int(str(message.content).split()[0]) async for message in session.scan_messages()}
    load.check(stored)
    assert load.slowest_s <= WAIT_S + 0.001


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_on_sqlite_for_a_minute(tmp_path: Path) -> None:
    database = tmp_path / "sessions.db"
    environ = {f"AGENT_RUNTIME__WRITE_BEHIND__{name.upper()}": str(value) for name, value in WRITE_BEHIND.items()}
    environ["PYTHONPATH"] = install(tmp_path / "throttled", "throttled", PLUGIN)
    environ["AGENT_RUNTIME__JOURNAL__DIRECTORY"] = str(tmp_path / "journal")
    with serving("--storage", f"throttled:sqlite:///{database}", environ=environ) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:

            async def append(message: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
                reply = await client.post(MESSAGES, json=message)
                return reply.status_code, dict(reply.headers), reply.content

            (await client.put("/v1/sessions/s1")).raise_for_status()
            load = Load(60.0, append)
            await load.run()
            (await client.post("/v1/flush")).raise_for_status()
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT seq, content FROM messages ORDER BY seq").fetchall()
    load.check({seq: int(content.split()[0]) for seq, content in rows})
    assert (
        load.slowest_s < WAIT_S + 5.0
    )  # on a machine that does other things as well; without a bound it is most of 60
