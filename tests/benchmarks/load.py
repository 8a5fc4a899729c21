"""A load of HTTP requests: so many connections, each with one request under way, as fast as they are answered.

On raw protocols, as a client that costs more than the server would measure itself. The server is to be another process.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from functools import partial
from time import perf_counter
from typing import Final, NamedTuple

__all__ = ["Load", "drive", "request"]

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)


class Load(NamedTuple):
    """What came of it: requests a second, and the seconds that each took."""

    rate: float
    latencies: list[float]

    @property
    def p95(self) -> float:
        """The seconds that 95 % of the requests did not exceed."""
        return sorted(self.latencies)[len(self.latencies) * 95 // 100]


def request(method: str, path: str, body: bytes | None = None) -> bytes:
    """A request as it is sent."""
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: */*\r\nuser-agent: load\r\n"
    if body is None:
        return head.encode() + b"\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def drive(port: int, requests: list[Iterator[bytes]], count: int, status: bytes) -> Load:
    """Send `count` requests, over one connection for each of `requests`; every answer must have this status.

    Runs on asyncio; best on uvloop.
    """
    loop = asyncio.get_running_loop()
    left = iter(range(count))
    latencies: list[float] = []
    clients = [_Client(each, left, latencies, loop.create_future(), status) for each in requests]
    for client in clients:
        await loop.create_connection(partial(_itself, client), "127.0.0.1", port)
    started = perf_counter()
    for client in clients:
        client.send()
    await asyncio.gather(*(client.end for client in clients))
    rate = len(latencies) / (perf_counter() - started)
    for client in clients:
        client.close()
    return Load(rate, latencies)


def _itself(client: _Client) -> _Client:
    return client


class _Client(asyncio.Protocol):
    def __init__(
        self,
        requests: Iterator[bytes],
        left: Iterator[int],
        latencies: list[float],
        end: asyncio.Future[None],
        status: bytes,
    ) -> None:
        self._requests = requests
        self._left = left
        self._latencies = latencies
        self.end = end
        self._start = b"HTTP/1.1 " + status
        self._answer = b""
        self._wanted = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def send(self) -> None:
        """Send the next request, if there is one."""
        if next(self._left, None) is None:
            self.end.set_result(None)
            return
        self._answer = b""
        self._wanted = 0
        self._sent = perf_counter()
        self._transport.write(next(self._requests))

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if not self._wanted:
            end = self._answer.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self._answer, 0, end)
            self._wanted = end + 4 + (int(length[1]) if length else 0)
        if len(self._answer) < self._wanted:
            return
        self._latencies.append(perf_counter() - self._sent)
        if not self._answer.startswith(self._start):
            self.end.set_exception(AssertionError(self._answer[:300]))
            return
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.end.done():
            self.end.set_exception(exc or ConnectionError("the server closed the connection"))
