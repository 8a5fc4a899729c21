"""Real conversations over the wire: what went in message by message comes out, whatever server carries it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from http_rig import Server, conversations, free_port, serving, started
from places import Place, place_of

pytestmark = pytest.mark.anyio

CONNECTIONS = 16
Start = Callable[[], AbstractContextManager[Server]]


@pytest.fixture
def anyio_backend() -> str:
    """The loop of the clients; the servers have their own."""
    return "asyncio"


class Sender:
    """Puts conversations in, over 16 connections, and goes on where it was once the server is back."""

    def __init__(self) -> None:
        self.acknowledged = 0
        self._left = conversations()
        self._next = 0  # message of the conversation that is at the end of `_left` of each worker

    async def run(self, url: str, stop_after: int | None = None, stop: Callable[[], None] | None = None) -> bool:
        """Send until everything is in, or the server ends. `stop` is called once so many are acknowledged."""
        limits = httpx.Limits(max_connections=CONNECTIONS)
        self._stop_after, self._stop = stop_after, stop
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30) as client:
            async with anyio.create_task_group() as tasks:
                for number in range(CONNECTIONS):
                    tasks.start_soon(self._send, client, self._left[number::CONNECTIONS])
            return await self._complete(client)

    async def _send(self, client: httpx.AsyncClient, mine: list[dict[str, Any]]) -> None:
        try:
            for conversation in mine:
                target = f"/v1/sessions/{conversation['session_id']}"
                shown = await client.put(target)
                shown.raise_for_status()
                for message in conversation["messages"][shown.json()["message_count"] :]:
                    reply = await client.post(f"{target}/messages", json=message)
                    if reply.status_code == 503:
                        return
                    assert reply.status_code == 201
                    self.acknowledged += 1
                    if self._stop is not None and self.acknowledged == self._stop_after:
                        self._stop()
        except httpx.TransportError:
            assert self._stop is not None, "the server went without being told"

    async def _complete(self, client: httpx.AsyncClient) -> bool:
        try:
            listed = (await client.get("/v1/sessions?limit=1000")).json()["items"]
        except httpx.TransportError:
            return False
        counts = {item["session_id"]: item["message_count"] for item in listed}
        return counts == {each["session_id"]: len(each["messages"]) for each in self._left}


def start(kind: str, place: Place, port: int) -> Start:
    if kind == "fastapi":
        command = [sys.executable, str(Path(__file__).parent / "http_parent.py"), place.url, str(port)]
        return partial(started, command, 1)
    directory = place.config().journal.directory
    environ = {} if directory is None else {"AGENT_RUNTIME__JOURNAL__DIRECTORY": directory}
    return partial(serving, "--storage", place.url, "--loop", kind, port=port, environ=environ)


@pytest.mark.parametrize(
    ("kind", "database"),
    [
        ("asyncio", "sqlite"),
        ("trio", "sqlite"),
        ("fastapi", "sqlite"),
        pytest.param("asyncio", "postgresql", marks=pytest.mark.long),
        ("trio", "postgresql"),
    ],
)
async def test_conversations_survive_a_restart_in_their_midst(kind: str, database: str, tmp_path: Path) -> None:
    start_server = start(kind, place_of(database, tmp_path), free_port())
    given = conversations()
    half = sum(len(each["messages"]) for each in given) // 2
    sender = Sender()
    with start_server() as server:
        assert not await sender.run(server.url, half, partial(server.signal, signal.SIGTERM))
        assert server.ended() == (-signal.SIGTERM if kind == "fastapi" else 0)  # uvicorn by itself ends by the signal
    acknowledged = sender.acknowledged
    assert half <= acknowledged < 2 * half
    with start_server() as server:
        async with httpx.AsyncClient(base_url=server.url) as client:
            listed = (await client.get("/v1/sessions?limit=1000")).json()["items"]
            kept = sum(item["message_count"] for item in listed)
            assert acknowledged <= kept <= acknowledged + CONNECTIONS  # answers may be lost as connections close
        assert await sender.run(server.url)
        async with httpx.AsyncClient(base_url=server.url) as client:
            for conversation in given:
                history = await client.get(f"/v1/sessions/{conversation['session_id']}/history")
                assert history.json() == conversation
