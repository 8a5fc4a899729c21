"""The servers that carry the application: uvicorn on asyncio, Hypercorn on trio.

Each serves on a socket that listens already until it is told to stop: then it takes no more connections, lets requests
end for as long as `GRACE_S`, and returns. Told to hurry it does not wait for them. Neither handles signals, nor the
lifespan: the runtime is opened and drained around the server, so that no way of ending the server spares the drain.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, cast

import anyio
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    from hypercorn.typing import Framework

__all__ = ["GRACE_S", "Engine", "Loop", "Uvicorn", "engine_for"]

Loop: TypeAlias = Literal["asyncio", "trio"]
GRACE_S: Final = 10
"""Seconds that requests under way have to end after a stop was asked for."""

_BACKLOG: Final = 2048
_GATHERED_BYTES_MAX: Final = 16 * 1024


class Engine(Protocol):
    """A server."""

    async def serve(self, listener: socket.socket) -> None:
        """Serve until stopped. Closes the socket."""

    def stop(self) -> None:
        """Take no more connections, end when the requests under way have ended."""

    def hurry(self) -> None:
        """Do not wait for requests any longer."""


def engine_for(loop: Loop, app: ASGIApp) -> Engine:
    """The server for an event loop."""
    return Uvicorn(app) if loop == "asyncio" else Hypercorn(app)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to who runs the engine: they matter from before the start to after the drain."""
        yield


class _Gathering:
    """A transport that sends at once what is written to it in one turn of the loop.

    uvicorn writes the head and the body of an answer one by one, and uvloop sends each as it comes: two system calls
    and two packets, the first of which wakes a client that can do nothing with it. With 32 connections that took a
    quarter of the server's time for an append, and half of the client's.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._size = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send these bytes, with those before them, at the end of this turn; or now if they are many."""
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size > _GATHERED_BYTES_MAX:  # a stream may not come to the end of its turn until told to pause
            self.flush()

    def flush(self) -> None:
        """Send what is there."""
        if self._parts:
            parts, self._parts, self._size = self._parts, [], 0
            if not self._transport.is_closing():  # else the client has gone since
                self._transport.writelines(parts)

    def close(self) -> None:
        """Close the connection once all is sent."""
        self.flush()
        self._transport.close()


class _HttpProtocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._gathering = _Gathering(transport)
        super().connection_made(cast("asyncio.Transport", self._gathering))

    def eof_received(self) -> None:
        self._gathering.flush()  # the loop closes the connection next, and a client may end its side and still read
        super().eof_received()


class Uvicorn:
    """uvicorn, with httptools."""

    def __init__(self, app: ASGIApp) -> None:
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_HttpProtocol,
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=75,  # longer than clients keep a connection that they mean to use again
                timeout_graceful_shutdown=GRACE_S,
            )
        )

    async def serve(self, listener: socket.socket) -> None:
        await self._server.serve(sockets=[listener])

    def stop(self) -> None:
        self._server.should_exit = True

    def hurry(self) -> None:
        self._server.force_exit = True


class Hypercorn:
    """Hypercorn, on trio. Comes with the extra `trio`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._stop = anyio.Event()
        self._scope = anyio.CancelScope()

    async def serve(self, listener: socket.socket) -> None:
        from hypercorn.config import Config
        from hypercorn.trio import serve

        config = Config()
        config.bind = [f"fd://{os.dup(listener.fileno())}"]
        listener.close()
        config.backlog = _BACKLOG
        config.errorlog = logging.getLogger("hypercorn.error")
        config.include_server_header = False
        config.graceful_timeout = GRACE_S
        with self._scope:
            app = cast("Framework", _without_lifespan(self._app))
            await serve(app, config, shutdown_trigger=self._stop.wait)

    def stop(self) -> None:
        self._stop.set()

    def hurry(self) -> None:
        self._scope.cancel()


def _without_lifespan(app: ASGIApp) -> ASGIApp:
    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})

    return wrapped
