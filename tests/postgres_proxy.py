"""A TCP proxy between a storage and its server, which cuts connections, makes the way longer, or speaks TLS.

(The server of the tests may be built without TLS. What is tested is the client's part.)
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from anyio.from_thread import start_blocking_portal

_TLS_REQUEST = bytes.fromhex("0000000804d2162f")
"""https://www.postgresql.org/docs/current/protocol-message-formats.html, SSLRequest"""


class Proxy:
    """`url` leads through it. `delay_s` is how long a byte takes, each way; `secured` counts connections with TLS."""

    def __init__(self, url: str, tls: ssl.SSLContext | None) -> None:
        self.delay_s = 0.0
        self.secured = 0
        self._tls = tls
        self._target = urlsplit(url)
        self._links: set[asyncio.Task[None]] = set()
        self.url = ""

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        user = self._target.netloc.rpartition("@")[0]
        self.url = urlunsplit(self._target._replace(netloc=f"{user}@127.0.0.1:{port}"))
        return server

    async def cut(self) -> None:
        """End every connection, on the storage's side at once; the server sees it when it next reads or writes."""
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("not in a task")
        self._links.add(task)
        try:
            if self._tls is not None:
                await self._secure(reader, writer, self._tls)
            far_reader, far_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
            try:
                both = (self._pump(reader, far_writer), self._pump(far_reader, writer))
                pumps = [asyncio.create_task(pump) for pump in both]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
            finally:
                far_writer.close()
        except (asyncio.CancelledError, ssl.SSLError, OSError, asyncio.IncompleteReadError):
            pass  # cut, on this side or the other
        finally:
            writer.transport.abort()
            self._links.discard(task)

    async def _secure(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tls: ssl.SSLContext) -> None:
        """Whoever does not ask for TLS is turned away."""
        if await reader.readexactly(len(_TLS_REQUEST)) != _TLS_REQUEST:
            raise ConnectionAbortedError
        writer.write(b"S")
        await writer.start_tls(tls)
        self.secured += 1

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bytes arrive in order, each `delay_s` after it was sent."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if self.delay_s:
                    loop.call_later(self.delay_s, _write, writer, data)
                else:
                    writer.write(data)


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if not writer.transport.is_closing():
        writer.write(data)


class RunningProxy:
    """A proxy in a thread of its own; its methods may be called from any."""

    def __init__(self, proxy: Proxy, call: Callable[..., Any]) -> None:
        self._proxy = proxy
        self._call = call
        self.url = proxy.url

    @property
    def secured(self) -> int:
        return self._proxy.secured

    def slow_down(self, delay_s: float) -> None:
        self._proxy.delay_s = delay_s

    def cut(self) -> None:
        self._call(self._proxy.cut)


@contextlib.contextmanager
def proxied(url: str, tls: ssl.SSLContext | None = None) -> Iterator[RunningProxy]:
    """A proxy to the server of the URL."""
    with start_blocking_portal("asyncio") as portal:
        proxy = Proxy(url, tls)
        server = portal.call(proxy.start)
        try:
            yield RunningProxy(proxy, portal.call)
        finally:
            portal.call(server.close)
            portal.call(proxy.cut)
