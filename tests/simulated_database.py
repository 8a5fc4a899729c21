"""A database for simulations: the one in memory, on a machine of its own disk, with planned faults.

One that declares that stored batches survive a power loss syncs before `apply` returns. Until then a power loss takes
back what is visible already: the database falls to a transaction between its last sync and now. A process that dies
loses its connections; what it had asked for may still be carried out, or be lost. A database whose batches survive
nothing is gone with the process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from random import Random
from typing import Final, Literal, TypeAlias, TypeVar, get_args

import anyio

from agent_runtime.changes import Batch, Receipt
from agent_runtime.errors import SequenceMismatch, StorageUnavailable
from agent_runtime.storage import (
    Abilities,
    Claim,
    Fence,
    FirstReads,
    Grant,
    LeaseDesk,
    PoolFigures,
    Snapshot,
    Storage,
    StorageConfig,
    StorageFactory,
    Survival,
)
from agent_runtime.testing import CallName, Fault, Faults, FaultyStorage
from agent_runtime_memory import MemoryDatabase
from agent_runtime_memory.storage import _MemoryStorage
from agent_runtime_memory.tables import Transaction, View

__all__ = ["EFFECTS", "Effect", "SimulatedDatabase"]

T = TypeVar("T")
Effect: TypeAlias = Literal["none", "before", "after"]
"""Whether a call has its effect, and when: seen from what happens in it."""

EFFECTS: Final[tuple[Effect, ...]] = get_args(Effect)


class SimulatedDatabase:
    """What a power loss leaves is drawn from `random`. Syncing takes about `sync_s`; `faults` strike every call."""

    def __init__(self, random: Random, *, now: Callable[[], datetime], survives: Survival = "power") -> None:
        self.faults = Faults()
        self.survives = survives
        self.sync_s = 0.0
        self._random = random
        self._now = now
        self._memory = MemoryDatabase(now=now)
        self._unsynced: list[View] = []  # before each transaction since the last sync: the tables as they were then
        self.server = self._connect()
        self._connections: set[_Connection] = set()

    def factory(self) -> StorageFactory:
        """Opens it for a process that starts now."""
        return self._open

    def crash(self) -> None:
        """Every process that has it open dies."""
        for connection in self._connections:
            connection.dead = True
            self._disconnect(connection.session)
        self._connections.clear()
        if self.survives == "nothing":
            self._memory = MemoryDatabase(now=self._now)
            self._unsynced.clear()
            self.server = self._connect()

    def lose_power(self) -> None:
        """Every machine dies; what was not synced is there or not, from the last transaction backwards."""
        self.crash()
        self._disconnect(self.server)
        place = self._random.randint(0, len(self._unsynced))
        if place < len(self._unsynced):
            before = Transaction()
            before._overlay = self._unsynced[place]._overlay
            self._memory._contents.views.difference_update(self._unsynced)
            before.commit(self._memory._contents.views)
        self.synced()
        self.server = self._connect()

    def at(self, name: CallName, action: Callable[[], None], *, nth: int, effect: Effect) -> None:
        """Call `action` in the `nth` of these calls from now on; `effect`: of the call."""

        async def before(_call: object) -> None:
            action()
            if effect == "none":
                raise StorageUnavailable("the simulated database has not heard of this call")

        def after(_call: object) -> None:
            action()

        if effect == "before":
            self.faults._plan(Fault(name, nth, after=after))
        else:
            self.faults._plan(Fault(name, nth, before=before))

    def begin(self) -> None:
        """A transaction is about to be committed."""
        view = View()
        self._memory._contents.views.add(view)
        self._unsynced.append(view)

    def synced(self) -> None:
        """All transactions so far survive a power loss."""
        self._memory._contents.views.difference_update(self._unsynced)
        self._unsynced.clear()

    async def sync(self, server: _MemoryStorage) -> None:
        """Sync, if the machine still runs."""
        if self.sync_s:
            await anyio.sleep(self._random.uniform(0.0, 2 * self.sync_s))
        if server is not self.server:
            raise StorageUnavailable("the simulated database lost its power in a sync")
        self.synced()

    def _connect(self) -> _MemoryStorage:
        memory = self._memory
        opening = next(memory._opening_numbers)
        memory._contents.openings.add(opening)
        return _MemoryStorage(memory._contents, opening)

    def _disconnect(self, session: _MemoryStorage) -> None:
        session._contents.openings.discard(session._opening)

    @asynccontextmanager
    async def _open(self, _config: StorageConfig) -> AsyncIterator[Storage]:
        connection = _Connection(self, self._connect())
        self._connections.add(connection)
        try:
            await connection.call("open", _nothing)
            yield FaultyStorage(_SimulatedStorage(self, connection.session), connection)
        finally:
            self._connections.discard(connection)
            self._disconnect(connection.session)


async def _nothing() -> None:
    """Opening has no effect of its own."""


class _Connection(Faults):
    """What a process calls through, as long as it lives; the faults are those of the database."""

    def __init__(self, database: SimulatedDatabase, session: _MemoryStorage) -> None:
        super().__init__()
        self.dead = False
        self.session = session
        self._database = database

    async def call(self, name: CallName, effect: Callable[[], Awaitable[T]], batch: Batch | None = None) -> T:
        self._check()
        try:
            return await self._database.faults.call(name, effect, batch)
        finally:
            self._check()

    def _check(self) -> None:
        if self.dead:
            raise StorageUnavailable("the process that made this call is dead")


class _SimulatedStorage:
    """The lease is taken through the connection of the process, for it ends with that; all else is done by the server,
    which goes on when the process is dead.
    """

    def __init__(self, database: SimulatedDatabase, session: _MemoryStorage) -> None:
        self._database = database
        self._session = session
        self._server = database.server

    @property
    def abilities(self) -> Abilities:
        return Abilities(survives=self._database.survives)

    @property
    def leases(self) -> LeaseDesk:
        return self

    def snapshot(self, partition: int = 0, first: FirstReads = ()) -> AbstractAsyncContextManager[Snapshot]:
        return self._server.snapshot(partition, first)

    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        self._database.begin()
        try:
            receipt = await self._server.apply(batch, fence)
        except SequenceMismatch:
            await self._database.sync(self._server)  # what it tells of is safe
            raise
        await self._database.sync(self._server)
        return receipt

    async def purge(self, fence: Fence, *, now: datetime, rows_max: int) -> int:
        self._database.begin()
        return await self._server.purge(fence, now=now, rows_max=rows_max)

    def figures(self) -> PoolFigures:
        return self._server.figures()

    async def acquire(self, claim: Claim) -> Grant:
        self._database.begin()
        grant = await self._session.acquire(claim)
        await self._database.sync(self._server)
        return grant

    async def renew(self, fence: Fence, duration_s: float) -> None:
        self._database.begin()
        await self._server.renew(fence, duration_s)

    async def release(self, fence: Fence) -> None:
        self._database.begin()
        await self._server.release(fence)
