"""The connections at work: they make calls until the server has gone, read all back once it is there again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from random import Random
from typing import Final

import anyio

from agent_runtime.records import Durability

from .books import Books
from .calls import Call, Create, Delete
from .compare import Difference, Miscounted, Surprise, read
from .tracked import Tracked, next_call
from .wire import Reply, Unanswered, Wire

__all__ = ["Connections"]

_SESSIONS: Final = 4  # of each connection
_SHARED: Final = 0.15
_STORED: Final = 0.03
_READ: Final = 0.01
_RENAMED: Final = 0.5
_PAUSE_S: Final = 0.01
_PAGE: Final = 1000


class Connections:
    """`count` connections, each with sessions of its own, and all with one in common."""

    def __init__(self, books: Books, count: int, durability: Durability) -> None:
        self._books = books
        self._figures = books.figures
        self._durability: Durability = durability
        self._own = [[books.new(f"c{number}") for _ in range(_SESSIONS)] for number in range(count)]
        self._shared = books.new("shared", shared=True)

    def renew_shared(self) -> None:
        """Let there be another common session from now on; the one so far stays as it is."""
        self._shared = self._books.new("shared", shared=True)

    # Load

    async def work(self, port: int, seed: str) -> None:
        """Make requests until the server has gone."""
        shared = self._shared
        wire = Wire(port)
        try:
            if not shared.state.alive:
                await self._call(wire, shared, Create(shared.number(), session_id=shared.session_id))
        except Unanswered:
            return
        finally:
            await wire.aclose()
        async with anyio.create_task_group() as tasks:
            for number, own in enumerate(self._own):
                tasks.start_soon(self._work, port, number, own, Random(f"{seed}/{number}"))  # noqa: S311 — no secret

    async def _work(self, port: int, number: int, own: list[Tracked], random: Random) -> None:
        wire = Wire(port)
        last_seq = 0
        try:
            while not all(tracked.in_doubt for tracked in own):
                place = random.randrange(_SESSIONS)
                tracked = own[place] if random.random() >= _SHARED else self._shared
                if tracked.in_doubt or (tracked.shared and not tracked.state.alive):
                    continue
                if not tracked.shared and random.random() < _READ:
                    await self._compare(wire, tracked)
                    continue
                call = next_call(tracked, random)
                level: Durability = "stored" if random.random() < _STORED else self._durability
                reply = await self._call(wire, tracked, call, level)
                if isinstance(call, Delete) and reply.status == 204 and random.random() < _RENAMED:
                    own[place] = self._books.new(f"c{number}")
                if tracked.shared and reply.status == 201:
                    seq = reply.value["items"][-1]["seq"] if "items" in reply.value else reply.value["seq"]
                    if seq <= last_seq:
                        wrong = Difference("out of order", f"seq {seq} was given after {last_seq}")
                        self._books.note(tracked.session_id, [wrong])
                    last_seq = seq
        except Unanswered:
            return
        finally:
            await wire.aclose()

    async def _call(self, wire: Wire, tracked: Tracked, call: Call, durability: Durability = "stored") -> Reply:
        """Make a call, and note its outcome."""
        figures = self._figures
        figures.requests += 1
        target = f"{tracked.target(call)}?durability={durability}"
        try:
            reply = await wire.ask(call.method, target, call.body())
        except Unanswered as error:
            if error.sent:
                figures.unknown += 1
                tracked.leave_open(call)
            raise
        expected = call.expected(tracked.state)
        if reply.status == expected and reply.status < 300:
            figures.acknowledged += 1
            self._books.note(tracked.session_id, tracked.acknowledge(call, reply.value))
        elif reply.status in (expected, 503, 507):
            figures.refused += 1
            if reply.status != expected:
                await anyio.sleep(_PAUSE_S)
        elif reply.status >= 500:
            figures.unknown += 1
            tracked.leave_open(call)
            if reply.status != 504:
                self._books.fail(str(Surprise(call.method, target, reply)))
        else:
            figures.refused += 1
            tracked.in_doubt = True
            text = f"{Surprise(call.method, target, reply)}, not with {expected}"
            kind = "lost" if reply.status == 404 else "invented"
            self._books.note(tracked.session_id, [Difference(kind, text)])
        return reply

    # Reading

    async def list_ids(self, port: int) -> list[str]:
        """The ids of all sessions that the server lists.

        Raises:
            Unanswered: it has gone.
        """
        wire = Wire(port)
        ids: list[str] = []
        cursor = ""
        try:
            while True:
                target = f"/v1/sessions?limit={_PAGE}&order=asc{cursor}"
                reply = await wire.ask("GET", target)
                if reply.status != 200:
                    self._books.fail(str(Surprise("GET", target, reply)))
                    return ids
                ids += [record["session_id"] for record in reply.value["items"]]
                if reply.value["next"] is None:
                    return ids
                cursor = f"&cursor={reply.value['next']}"
        finally:
            await wire.aclose()

    async def compare(self, port: int) -> None:
        """Compare every session with what it must be.

        Raises:
            Unanswered: the server has gone; the sessions not yet compared stay in doubt.
        """
        await self._each(port, (it for it in self._books.sessions.values() if not it.settled), self._compare)
        self._books.compare_list(await self.list_ids(port))

    async def remove(self, port: int) -> None:
        """Delete all sessions that there are."""

        async def delete(wire: Wire, tracked: Tracked) -> None:
            await self._call(wire, tracked, Delete(tracked.number()))

        await self._each(port, (it for it in self._books.sessions.values() if it.state.alive), delete)

    async def _each(
        self, port: int, sessions: Iterable[Tracked], work: Callable[[Wire, Tracked], Awaitable[None]]
    ) -> None:
        """Do something with each of the sessions, over all connections."""
        waiting = iter(list(sessions))
        gone: list[Unanswered] = []

        async def connection() -> None:
            wire = Wire(port)
            try:
                for tracked in waiting:
                    await work(wire, tracked)
            except Unanswered as error:
                gone.append(error)
            finally:
                await wire.aclose()

        async with anyio.create_task_group() as tasks:
            for _ in self._own:
                tasks.start_soon(connection)
        if gone:
            raise gone[0]

    async def _compare(self, wire: Wire, tracked: Tracked) -> None:
        self._figures.compared += 1
        try:
            found = await read(wire, tracked.path)
        except Miscounted as error:
            self._books.note(tracked.session_id, [Difference("torn", str(error))])
            found = error.state
        except Surprise as error:
            self._books.fail(str(error))
            tracked.in_doubt = True
            return
        self._books.note(tracked.session_id, tracked.compare(found))
