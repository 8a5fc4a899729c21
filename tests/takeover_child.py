"""A runtime that stands by, takes over, and does what it is told in lines of JSON: for the tests of takeovers.

`python takeover_child.py LOOP DATABASE JOURNAL`; JOURNAL is the journal's directory, empty where that is the storage's
to say. Every batch that it stores is reported with the epoch it was written under.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread

from agent_runtime import (
    AgentRuntimeError,
    Config,
    DrainIncomplete,
    LeaseLost,
    Runtime,
    SessionHandle,
    SessionNotFound,
    open_runtime,
)
from agent_runtime.changes import Batch, Receipt
from agent_runtime.plugins import PluginManager
from agent_runtime.records import Durability
from agent_runtime.storage import Fence, Storage, StorageConfig, StorageFactory
from agent_runtime.testing import failpoints
from agent_runtime.testing.failpoints import Failpoint

LEASE_S = 1.0
FENCED, LEFT = 3, 4


def report(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


class Freezing(Failpoint):
    """Stops the process, as SIGSTOP does, at a point that is named while it runs."""

    def __init__(self) -> None:
        self.armed: str | None = None

    def strikes(self, point: str) -> bool:
        if point != self.armed:
            return False
        self.armed = None
        report(frozen=point)
        os.kill(os.getpid(), signal.SIGSTOP)
        return False


class Recording:
    """A storage that reports its batches."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        receipt = await self._inner.apply(batch, fence)
        report(epoch=fence.epoch, after=batch.after, last=batch.last)
        return receipt


def install(failpoint: Freezing) -> None:
    storage_for = PluginManager.storage_for

    def recorded(manager: PluginManager, url: str) -> StorageFactory:
        factory = storage_for(manager, url)

        @asynccontextmanager
        async def opened(config: StorageConfig) -> AsyncIterator[Storage]:
            async with factory(config) as storage:
                yield Recording(storage)

        return opened

    PluginManager.storage_for = recorded  # type: ignore[assignment, method-assign]
    failpoints.install(failpoint)


async def carry_out(runtime: Runtime, what: str, session_id: str, key: str, value: str) -> None:
    """Sessions whose name begins with an "s" are created in the database, others may be known to a journal only."""
    level: Durability = "stored" if session_id.startswith("s") else "journaled"
    if what == "create":
        await runtime.get_or_create_session(session_id, idempotency_key=key, durability=level)
        return
    try:
        session: SessionHandle = await runtime.get_session(session_id)
    except SessionNotFound:
        if what == "delete":
            return
        session = await runtime.get_or_create_session(session_id, durability=level)
    if what == "append":
        await session.append("user", value, idempotency_key=key)
    elif what == "put":
        await session.put_document("notes", "n", int(value), idempotency_key=key)
    else:
        await session.delete(idempotency_key=key)


async def serve(url: str, journal: str, failpoint: Freezing) -> None:
    config = Config.of(
        url,
        journal={"directory": journal or None},
        lease={"duration_s": LEASE_S, "wait": True},
        write_behind={"interval_s": 0.15},
    )

    async def one(runtime: Runtime, key: str, what: str, session_id: str, value: str) -> None:
        try:
            await carry_out(runtime, what, session_id, key, value)
        except AgentRuntimeError as error:
            report(failed=key, error=f"{type(error).__name__}: {error}")
        else:
            report(done=key)

    async with open_runtime(config) as runtime, anyio.create_task_group() as tasks:

        async def heed_takeover() -> None:
            await runtime.wait_fenced()
            tasks.cancel_scope.cancel()

        tasks.start_soon(heed_takeover)
        report(ready=True, unfinished=len(runtime.status().unfinished))
        while line := await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            command = json.loads(line)
            if "arm" in command:
                failpoint.armed = command["arm"]
            else:
                tasks.start_soon(one, runtime, command["key"], command["what"], command["session"], command["value"])
        tasks.cancel_scope.cancel()


def main() -> None:
    _, loop, url, journal = sys.argv
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    failpoint = Freezing()
    install(failpoint)
    code = 0
    try:
        anyio.run(serve, url, journal, failpoint, backend=loop)
    except DrainIncomplete:
        code = LEFT
    except LeaseLost:
        code = FENCED
    report(ended=code)
    os._exit(code)  # a thread may wait for the next line


if __name__ == "__main__":
    main()
