"""Callers that append side by side, each with one append under way, and the event loops on which they do."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any, Final, TypeAlias

import anyio
import pytest

from agent_runtime import SessionHandle
from agent_runtime.records import Durability

from .sample import median_message

__all__ = ["EventLoop", "appends_per_second", "name_of", "on_every_event_loop"]

EventLoop: TypeAlias = tuple[str, dict[str, Any]]

_UVLOOP: Final = {"use_uvloop": True}  # as `agent-runtime serve` does

on_every_event_loop: Final = pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {}), ("asyncio", _UVLOOP), ("trio", {})], ids=["asyncio", "uvloop", "trio"]
)


def name_of(anyio_backend: EventLoop) -> str:
    """What the figures are told of."""
    backend, options = anyio_backend
    return "uvloop" if options == _UVLOOP else backend


async def appends_per_second(sessions: Sequence[SessionHandle], times: int, durability: Durability) -> float:
    """The median message, appended so many times by a task for each session, that waits for its level each time.

    The tasks are there before the clock starts: what is measured is those who write, not their coming.
    """
    message, go = median_message(), anyio.Event()

    async def append(session: SessionHandle) -> None:
        await go.wait()
        for _ in range(times):
            await session.append(**message, durability=durability)

    async with anyio.create_task_group() as tasks:
        for session in sessions:
            tasks.start_soon(append, session)
        await anyio.wait_all_tasks_blocked()
        started = perf_counter()
        go.set()
    return len(sessions) * times / (perf_counter() - started)
