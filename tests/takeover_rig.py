"""Two runtimes that take over from one another, a client that never gives up, and its book of what was promised."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from subprocess import PIPE
from typing import Any, NamedTuple

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from agent_runtime import Runtime

__all__ = ["Book", "Child", "Figures", "Takeovers"]

CHILD = Path(__file__).with_name("takeover_child.py")
POINTS = (
    "storage.apply:before",
    "storage.apply:after",
    "storage.renew:before",
    "storage.renew:after",
    "journal.write:before",
    "journal.write:after",
    "journal.sync:before",
    "journal.sync:after",
)
CALLERS = 6
PATIENCE_S = 60.0
GRACE_S = 15.0
"""A holder that is frozen within a transaction on SQLite keeps all others out: after this it is killed."""


_LATE = re.compile(r"(\d+) change\(s\) of the journal \S+ came in late; (\d+) went to quarantine")


class Call(NamedTuple):
    key: str
    what: str
    session: str
    value: str


class Figures:
    """What happened."""

    def __init__(self) -> None:
        self.fates: Counter[str] = Counter()
        self.acknowledged = 0
        self.retried = 0
        self.woken = 0
        self.late = 0
        self.orphaned = 0
        self.takeover_s: list[float] = []


class Child:
    """One process. `answers` are told by key, `batches` are what it says it has stored."""

    def __init__(self, process: Process, log: Path) -> None:
        self.ready = anyio.Event()
        self.frozen = anyio.Event()
        self.ended = anyio.Event()
        self.gone = False  # killed, or soon
        self.answers: dict[str, tuple[anyio.Event, list[dict[str, Any]]]] = {}
        self.batches: list[tuple[int, int, int]] = []
        self.code: int | None = None
        self._process = process
        self._log = log

    async def listen(self) -> None:
        """Until it has ended."""
        assert self._process.stdout is not None
        lines = BufferedByteReceiveStream(self._process.stdout)
        try:
            while True:
                self._heed(json.loads(await lines.receive_until(b"\n", 1 << 20)))
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.ClosedResourceError):
            pass
        self.gone = True
        self.code = await self._process.wait()
        self.ended.set()
        for event, _ in self.answers.values():
            event.set()

    def _heed(self, said: dict[str, Any]) -> None:
        if "epoch" in said:
            self.batches.append((said["last"], said["after"], said["epoch"]))
        elif "ready" in said:
            self.ready.set()
        elif "frozen" in said:
            self.frozen.set()
        elif "done" in said or "failed" in said:
            event, answers = self.answers[said.get("done") or said["failed"]]
            answers.append(said)
            event.set()

    async def send(self, **command: Any) -> None:
        assert self._process.stdin is not None
        try:
            await self._process.stdin.send(json.dumps(command).encode() + b"\n")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            await anyio.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        if not self.ended.is_set():
            os.kill(self._process.pid, number)

    def said(self) -> str:
        return self._log.read_text()


class Book:
    """What the client was promised, session by session."""

    def __init__(self) -> None:
        self.standing: dict[str, dict[str, Child]] = defaultdict(dict)
        self.removed: dict[str, set[str]] = defaultdict(set)
        self.document: dict[str, int] = {}
        self.deleting: set[str] = set()
        """Sessions that were told to go, by a call that nobody has acknowledged: all of theirs may be there or not."""

    def promise(self, call: Call, by: Child) -> None:
        """The call was acknowledged.

        Who deletes a session may not know of what another runtime has in its journal: that may come in late.
        """
        if call.what == "append":
            self.standing[call.session][call.value] = by
        elif call.what == "put":
            self.document[call.session] = int(call.value)
        elif call.what == "delete":
            before = self.standing.pop(call.session, {})
            self.removed[call.session] |= {text for text, child in before.items() if child is by}
            self.document.pop(call.session, None)
            self.deleting.discard(call.session)

    async def broken(self, runtime: Runtime) -> list[str]:
        """Every promise that was not kept."""
        broken: list[str] = []
        entries = await runtime.quarantine.entries()
        for session_id in {*self.standing, *self.removed}:
            shown: Counter[object] = Counter()
            session = await runtime.get_or_create_session(session_id)
            async for message in session.scan_messages():
                shown[message.content] += 1
            held = sum(entry.session_id == session_id for entry in entries)
            lost = self.standing[session_id].keys() - shown.keys()
            if lost and session_id not in self.deleting:
                broken.append(f"{session_id}: lost {sorted(lost)} ({held} in quarantine)")
            doubled = [text for text, count in shown.items() if count > 1]
            if doubled:
                broken.append(f"{session_id}: doubled {doubled}")
            back = self.removed[session_id] & shown.keys()
            if back and session_id.startswith("s"):  # else whoever deleted it may not have known of them
                broken.append(f"{session_id}: came back {sorted(map(str, back))}")
            wanted = self.document.get(session_id)
            if wanted is not None and session_id not in self.deleting:
                document = await session.get_document("notes", "n")
                if document is None or document.value < wanted:
                    broken.append(f"{session_id}: document {document and document.value}, promised {wanted}")
        return broken


class Takeovers:
    """Rounds of one holder that ends or freezes, and another that takes over."""

    def __init__(self, url: str, journals: tuple[str, str], directory: Path, seed: int, loop: str = "asyncio") -> None:
        self.book = Book()
        self.figures = Figures()
        self.children: list[Child] = []
        self._url = url
        self._journals = journals
        self._directory = directory
        self._random = random.Random(seed)
        self._loop = loop
        self._holder: Child
        self._numbers = 0
        self._tasks: anyio.abc.TaskGroup

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Processes are dead at the end."""
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                yield
                tasks.cancel_scope.cancel()
        finally:
            for child in self.children:
                child.signal(signal.SIGKILL)

    async def start(self, place: int) -> Child:
        log = self._directory / f"child {len(self.children)}.log"
        with log.open("wb") as errors:
            command = [sys.executable, str(CHILD), self._loop, self._url, self._journals[place]]
            process = await anyio.open_process(command, stdin=PIPE, stdout=PIPE, stderr=errors)
        child = Child(process, log)
        self.children.append(child)
        self._tasks.start_soon(child.listen)
        return child

    async def run(self, rounds: int) -> None:
        """The rounds, under load; afterwards both have stopped in order."""
        at, standby = 0, await self.start(0)
        await self._ready(standby)
        self._holder, standby = standby, await self.start(1)
        async with anyio.create_task_group() as load:
            for number in range(CALLERS):
                load.start_soon(self._call_on, f"{'sj'[number % 2]}{number}")
            for number in range(rounds):
                await anyio.sleep(self._random.uniform(0.3, 0.7))
                old, began = self._holder, time.monotonic()
                fate = await self._strike(old, number)
                self.figures.fates[fate] += 1
                if not await self._ready(standby, giving_up=old if self._url.startswith("sqlite") else None):
                    self.figures.fates["frozen within a transaction"] += 1
                self.figures.takeover_s.append(time.monotonic() - began)
                self._holder = standby
                await anyio.sleep(self._random.uniform(0.1, 0.4))
                if fate != "kill" and not old.ended.is_set():
                    old.signal(signal.SIGCONT)
                    self.figures.woken += 1
                await self._end(old)
                standby, at = await self.start(at), 1 - at
            load.cancel_scope.cancel()
        for child in self.children:
            for late, orphaned in _LATE.findall(child.said()):
                self.figures.late += int(late)
                self.figures.orphaned += int(orphaned)
        standby.signal(signal.SIGKILL)
        await self._end(standby)
        self._holder.signal(signal.SIGKILL)
        await self._end(self._holder)

    async def _ready(self, child: Child, giving_up: Child | None = None) -> bool:
        """Wait until it serves; who keeps it from that for too long is killed."""
        with anyio.move_on_after(GRACE_S if giving_up else PATIENCE_S):
            await child.ready.wait()
            return True
        if giving_up is not None and not child.ended.is_set():
            giving_up.signal(signal.SIGKILL)
            with anyio.move_on_after(PATIENCE_S):
                await child.ready.wait()
                return False
        raise AssertionError(f"it does not serve: {child.said()}")

    async def _strike(self, child: Child, number: int) -> str:
        choice = number % (len(POINTS) + 2)
        if choice == 0:
            child.gone = True
            child.signal(signal.SIGKILL)
            return "kill"
        if choice == 1:
            child.signal(signal.SIGSTOP)
            return "stop"
        point = POINTS[choice - 2]
        await child.send(arm=point)
        with anyio.move_on_after(10):
            await child.frozen.wait()
            return point
        raise AssertionError(f"it never came to {point}: {child.said()}")

    async def _end(self, child: Child) -> None:
        with anyio.move_on_after(PATIENCE_S):
            await child.ended.wait()
            return
        raise AssertionError(f"it goes on: {child.said()}")

    async def _call_on(self, session: str) -> None:
        """One caller: each call is repeated, with its key, until somebody acknowledges it."""
        while True:
            self._numbers += 1
            number = self._numbers
            chance = self._random.random()
            what = "append" if chance < 0.5 else "put" if chance < 0.8 else "delete" if chance < 0.92 else "create"
            call = Call(f"k{number}", what, session, str(number) if what == "put" else f"text {number}")
            if what == "delete":
                self.book.deleting.add(session)
            while (by := await self._asked(self._holder, call)) is None:
                self.figures.retried += 1
            self.figures.acknowledged += 1
            self.book.promise(call, by)
            await anyio.sleep(0.005)

    async def _asked(self, holder: Child, call: Call) -> Child | None:
        """Who has acknowledged the call; None: nobody yet."""
        while self._holder is holder and holder.gone:
            await anyio.sleep(0.05)
        holder = self._holder
        event, answers = holder.answers[call.key] = anyio.Event(), []
        await holder.send(**call._asdict())
        while not answers and not holder.ended.is_set() and self._holder is holder:
            with anyio.move_on_after(0.1):
                await event.wait()
        if answers and "done" in answers[0]:
            return holder
        await anyio.sleep(0.02)
        return None

    def check_batches(self) -> list[str]:
        """Two batches of different epochs that overlap, or that stand in the wrong order."""
        batches = sorted(batch for child in self.children for batch in child.batches)
        wrong = []
        for (last, _, epoch), (next_last, after, next_epoch) in pairwise(batches):
            if after < last or next_epoch < epoch:
                wrong.append(f"epoch {epoch} up to {last}, then epoch {next_epoch} after {after} up to {next_last}")
        return wrong
