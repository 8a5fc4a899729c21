"""A FastAPI application with ours in it, as a process: `python http_parent.py STORAGE PORT`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from agent_runtime_http import create_app, lifespan


def main(storage: str, port: int) -> None:
    agents = create_app(storage)

    @asynccontextmanager
    async def parents(_: FastAPI) -> AsyncIterator[None]:
        async with lifespan(agents):
            sys.stdout.write(f"listens on http://127.0.0.1:{port}/agents\n")
            sys.stdout.flush()
            yield

    parent = FastAPI(lifespan=parents)
    parent.mount("/agents", agents)
    uvicorn.run(parent, port=port, log_level="warning", timeout_graceful_shutdown=10)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
