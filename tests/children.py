"""Processes that tests start and kill: `python children.py NAME LOOP DATABASE JOURNAL`. They report in lines of JSON.

JOURNAL is the journal's directory; empty where that is the storage's to say.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any

import anyio
import anyio.lowlevel
import asyncpg
import psutil
import trio

from agent_runtime import Config, DurabilityNotReached, LeaseHeld, Runtime, SessionHandle, open_runtime
from places import forget_what_is_stored

LEASE_S = 60.0
CANCELLED_CALLS = 200
AT_ONCE = 8


def report(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def living_tasks() -> int:
    """Tasks that have not ended, of every event loop of the process."""
    count = sum(1 for each in gc.get_objects() if isinstance(each, asyncio.Task) and not each.done())
    if not isinstance(anyio.lowlevel.current_token().native_token, asyncio.AbstractEventLoop):
        count += trio.lowlevel.current_statistics().tasks_living
    return count


def footprint() -> dict[str, int]:
    """What the process holds."""
    gc.collect()
    return {
        "threads": threading.active_count(),
        "tasks": living_tasks(),
        "files": psutil.Process().num_fds(),
    }


async def left_on_server(config: Config, *, idle: bool) -> list[str]:
    """What a server does for this process, soon: nothing, unless something was left behind; `idle` ones included."""
    if not config.storage.url.startswith("postgresql:"):
        return []
    url = config.storage.url.partition("?")[0]
    query = "SELECT state, query FROM pg_stat_activity WHERE application_name = $1 AND ($2 OR state <> 'idle')"

    async def ask() -> list[str]:
        connection = await asyncpg.connect(url)
        try:
            return [f"{state}: {text}" for state, text in await connection.fetch(query, application_name(), idle)]
        finally:
            await connection.close()

    found: list[str] = []
    for _ in range(20):
        with ThreadPoolExecutor(1) as thread:  # one of an event loop would be kept, and counted
            found = thread.submit(asyncio.run, ask()).result()
        if not found:
            break
        await anyio.sleep(0.05)
    return found


def application_name() -> str:
    return f"child {os.getpid()}"


def config_of(url: str, journal: str, **sections: dict[str, Any]) -> Config:
    if journal:
        sections["journal"] = {"directory": journal}
        sections["storage"] = {"options": {"application_name": application_name()}}
    return Config.of(url, lease={"duration_s": LEASE_S}, **sections)


class Cancelling:
    """Calls of each kind, cancelled after some time. `standing` has the text of each message that was appended."""

    def __init__(self, runtime: Runtime, target: SessionHandle) -> None:
        self.cancelled = dict.fromkeys(("load", "history", "list", "append", "flush"), 0)
        self.standing: list[str] = []
        self._runtime = runtime
        self._target = target

    async def call(self, kind: str, number: int, after_s: float) -> None:
        with anyio.move_on_after(after_s) as scope:
            try:
                await getattr(self, f"_{kind}")(number)
            except DurabilityNotReached as error:
                self.standing.append(error.outcome.content)
        self.cancelled[kind] += scope.cancel_called

    async def _load(self, number: int) -> SessionHandle:
        return await self._runtime.get_session(f"s{number % AT_ONCE}")

    async def _history(self, number: int) -> None:
        await (await self._load(number)).history()

    async def _list(self, _: int) -> None:
        await self._runtime.list_sessions()

    async def _append(self, number: int) -> None:
        text = f"message {number}"
        await self._target.append("user", text, durability="stored")
        self.standing.append(text)

    async def _flush(self, number: int) -> None:
        text = f"flushed {number}"
        await self._target.append("user", text)
        self.standing.append(text)
        await self._runtime.flush()


async def cancel_calls(url: str, journal: str) -> None:
    """Cancel many calls of every kind, at every moment of theirs; report what is left of them."""
    generator = random.Random(7)
    before_open = footprint()
    config = config_of(url, journal, residents={"tail_messages": 5})
    queries: list[str] = []
    async with open_runtime(config) as runtime:
        for number in range(AT_ONCE):
            session = await runtime.create_session(f"s{number}")
            await session.append_many([{"role": "user", "content": "x" * 200}] * 300)
        target = await runtime.create_session("target")
        calls = Cancelling(runtime, target)
        before: dict[str, int] = {}
        for round_number, longest_s in enumerate((60.0, 0.012)):  # the first to their end
            for kind in calls.cancelled:
                for first in range(0, CANCELLED_CALLS if round_number else AT_ONCE, AT_ONCE):
                    await runtime.flush()
                    forget_what_is_stored(runtime)
                    async with anyio.create_task_group() as tasks:
                        for number in range(first, first + AT_ONCE):
                            after_s = longest_s * generator.uniform(0 if round_number else 1, 1) ** 2
                            tasks.start_soon(calls.call, kind, 1000 * round_number + number, after_s)
                queries += await left_on_server(config, idle=False)
            await runtime.flush()
            async with AsyncExitStack() as views:
                for _ in range(runtime.status().pool.size - 1):  # all that read; one writes
                    await views.enter_async_context(runtime._storage.snapshot())
            await anyio.sleep(0.2)  # the views' connections are put back behind the readers' backs
            before = before or footprint()
        in_use = runtime.status().pool.in_use
        after = footprint()
        kept = [str(message.content) async for message in target.scan_messages()]
    queries += await left_on_server(config, idle=True)
    report(
        before_open=before_open,
        before=before,
        after=after,
        closed=footprint(),
        in_use=in_use,
        queries=queries,
        cancelled=calls.cancelled,
        lost=sorted(set(calls.standing) - set(kept)),
        unknown=sorted(set(kept) - set(calls.standing)),
        twice=len(kept) - len(set(kept)),
    )


async def hold(url: str, journal: str) -> None:
    """Hold the lease, show that a forked child doesn't get it, and write until killed; report what is stored."""
    config = config_of(url, journal, write_behind={"interval_s": 0.05})
    loop = "trio" if "trio" in sys.argv else "asyncio"
    async with open_runtime(config) as runtime:
        report(pid=os.getpid(), forked=_open_in_fork(config, loop))

        async def write(name: str) -> None:
            session = await runtime.create_session(name, durability="stored")
            for number in range(1_000_000):
                await session.append("user", str(number))  # in the batch of the next, or lost with it
                message = await session.append("user", f"{number} stored", durability="stored")
                report(session=name, seq=message.seq)

        async with anyio.create_task_group() as tasks:
            for number in range(AT_ONCE):
                tasks.start_soon(write, f"s{number}")


def _open_in_fork(config: Config, loop: str) -> str:
    """What becomes of an open of the same database in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"

        def try_it() -> None:
            nonlocal said
            try:
                anyio.run(_open_once, config, backend=loop)
            except LeaseHeld as error:
                said = f"LeaseHeld: {error.holder}"
            except BaseException as error:
                said = repr(error)
            else:
                said = "opened"

        thread = threading.Thread(target=try_it)  # this one belongs to the parent's event loop
        thread.start()
        thread.join(30)
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    said = os.read(reading, 1000).decode()
    os.close(reading)
    return said


async def _open_once(config: Config) -> None:
    async with open_runtime(config):
        pass


if __name__ == "__main__":
    _, chosen, backend, database_url, journal_directory = sys.argv
    anyio.run({"cancel": cancel_calls, "hold": hold}[chosen], database_url, journal_directory, backend=backend)
    report(ended_at=time.time())
