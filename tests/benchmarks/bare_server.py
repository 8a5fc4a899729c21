"""What the surface is measured against, as a process: `python bare_server.py PORT HISTORY uvicorn|ours`.

Routes that decode with msgspec and answer with a `Response`, and nothing else; the history is the content of a file. The
server is uvicorn as it comes, with what is switched off in ours switched off; or ours, which sends an answer at once.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent_runtime_http.engines import Uvicorn


def application(history: bytes) -> Starlette:
    async def append(request: Request) -> Response:
        message = msgspec.json.decode(await request.body())
        return Response(msgspec.json.encode(message), 201, media_type="application/json")

    async def show(_: Request) -> Response:
        return Response(history, media_type="application/json")

    return Starlette(
        routes=[
            Route("/v1/sessions/{session_id}/messages", append, methods=["POST"]),
            Route("/v1/sessions/{session_id}/history", show),
        ]
    )


class Plain(uvicorn.Server):
    """uvicorn, as an engine."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                app, http="httptools", lifespan="off", log_config=None, access_log=False, proxy_headers=False
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def serve_on(self, listener: socket.socket) -> None:
        await self.serve(sockets=[listener])

    def stop(self) -> None:
        self.should_exit = True


async def main(port: int, history: bytes, kind: str) -> None:
    app = application(history)
    engine = Plain(app) if kind == "uvicorn" else Uvicorn(app)
    serve = engine.serve_on if isinstance(engine, Plain) else engine.serve
    listener = socket.create_server(("127.0.0.1", port))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve, listener)
        with anyio.open_signal_receiver(signal.SIGTERM) as signals:
            sys.stdout.write(f"listens on http://127.0.0.1:{port}\n")
            sys.stdout.flush()
            async for _ in signals:
                break
        engine.stop()


if __name__ == "__main__":
    given = int(sys.argv[1]), Path(sys.argv[2]).read_bytes(), sys.argv[3]
    anyio.run(main, *given, backend_options={"use_uvloop": True})
