"""What the surface is measured against, as a process: `python bare_server.py PORT HISTORY`.

Routes that decode with msgspec and answer with a `Response`, and nothing else; the history is the content of a file. The
server is the same, set up in the same way.
"""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import anyio
import msgspec
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


async def main(port: int, history: bytes) -> None:
    engine = Uvicorn(application(history))
    listener = socket.create_server(("127.0.0.1", port))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(engine.serve, listener)
        with anyio.open_signal_receiver(signal.SIGTERM) as signals:
            sys.stdout.write(f"listens on http://127.0.0.1:{port}\n")
            sys.stdout.flush()
            async for _ in signals:
                break
        engine.stop()


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]), Path(sys.argv[2]).read_bytes(), backend_options={"use_uvloop": True})
