"""A seeded simulation: callers, a runtime, its database and its journal, and all that may happen to them.

One seed is one history. A runtime is opened, callers write to a few sessions at all levels, and disk and database fail
as they may; then the process dies, or the machine loses its power, or the disk with the journal is lost: at a random
moment, or in the middle of a call of the disk or the database, also while the runtime is being opened or closed. It is
opened again, and `Ledger` compares. At the end, with all faults gone, everything has to work.

Time is virtual. Nothing depends on anything but the seed, so that a history can be repeated.
"""

from __future__ import annotations

import io
import random
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args
from unittest.mock import patch

import trio
import trio.testing

from agent_runtime import (
    AgentRuntimeError,
    Config,
    Quarantined,
    Runtime,
    SessionNotFound,
    hookimpl,
    open_runtime,
)
from agent_runtime.journal import Frame, Journal
from agent_runtime.journal.frames import scan
from agent_runtime.log import Log
from agent_runtime.records import Durability
from agent_runtime.storage import StorageFactory, Survival
from agent_runtime.testing import SimulatedDisk
from ledger import Broken, Ledger
from simulated_callers import LEVELS, Caller, accepting
from simulated_database import SimulatedDatabase
from simulated_weather import Weather

__all__ = ["Broken", "Loss", "Result", "simulate"]

Loss: TypeAlias = Literal["process", "power", "journal"]
"""What is lost: the process; all that was not synced; the disk with the journal, with or without power."""

LOSSES: Final[tuple[Loss, ...]] = get_args(Loss)
SURVIVES: Final[dict[Loss, Durability]] = {"process": "journaled", "power": "synced", "journal": "stored"}
NOON: Final = datetime(2030, 1, 1, 12, tzinfo=UTC)
HEALING_S: Final = 300.0
"""How long it may take until all is well again when nothing fails any more."""


class Result(NamedTuple):
    """What a history was like. `trace` tells it line by line."""

    changes: int
    lost: int
    lives: int
    losses: tuple[Loss, ...]
    trace: tuple[str, ...]


def simulate(seed: int) -> Result:
    """Play one history.

    Raises:
        Broken: a promise was not kept; the seed is a note of it.
    """
    world = World(seed)
    try:
        with _determined(seed, world):
            trio.run(world.run, clock=trio.testing.MockClock(autojump_threshold=0), strict_exception_groups=True)
    except BaseException as error:
        error.add_note(f"seed {seed}\n" + "\n".join(world.trace[-60:]))
        raise
    return Result(world.ledger.accepted, world.ledger.lost, world.lives, tuple(world.losses), tuple(world.trace))


@contextmanager
def _determined(seed: int, world: World) -> Iterator[None]:
    """Whatever the code under test takes from chance and from clocks, it takes from the seed; its log is ours."""
    chance = random.Random(seed)
    accept, accept_all = Log.accept, Log.accept_all

    def accept_there(log: Log, sequence: int, data: bytes) -> None:
        world.accept(log, [(sequence, data)], lambda: accept(log, sequence, data))

    def accept_all_there(log: Log, frames: Sequence[tuple[int, bytes]]) -> None:
        world.accept(log, frames, lambda: accept_all(log, frames))

    with ExitStack() as stack:
        for target, replacement in {
            "trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING": True,
            "trio._core._run._r": random.Random(seed),
            "random.SystemRandom.getrandbits": lambda _, bits: chance.getrandbits(bits),
            "agent_runtime.opening.uuid4": lambda: uuid.UUID(int=chance.getrandbits(128)),
            "agent_runtime.lease.boot_clock": trio.current_time,
            "agent_runtime.runtime.utc_now": world.now,
            "agent_runtime.runtime.time.time_ns": lambda: int(world.now().timestamp() * 1e9),
            "agent_runtime.plugins._installed": list,
            "agent_runtime.log.Log.accept": accept_there,
            "agent_runtime.log.Log.accept_all": accept_all_there,
        }.items():
            stack.enter_context(patch(target, replacement))
        stack.enter_context(patch.dict(_BEGIN_DEFAULTS, now=world.now, clock=trio.current_time))
        yield


_BEGIN_DEFAULTS: Final[dict[str, Any]] = Journal.begin.__func__.__kwdefaults__  # type: ignore[attr-defined]


class _Plugin:
    def __init__(self, factory: StorageFactory) -> None:
        self._factory = factory

    @hookimpl
    def agent_runtime_storages(self) -> dict[str, StorageFactory]:
        return {"simulated": self._factory}


class World:
    """Everything of one history."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.disk = SimulatedDisk(random.Random(seed + 1))
        survives: Survival = self.random.choice(("power",) * 5 + ("nothing",))
        self.database = SimulatedDatabase(random.Random(seed + 2), now=self.now, survives=survives)
        self.levels = LEVELS if survives == "power" else tuple(level for level in LEVELS if level != "synced")
        self.ledger = Ledger()
        self.trace: list[str] = []
        self._weather = Weather(self.random, self.disk, self.database, self.tell)
        self.lives = 0
        self.losses: list[Loss] = []
        self.broken: Broken | None = None
        self.dead = False
        self.held: dict[str, str] = {}
        self._healing = False
        self._power_lost = False
        self._watermarks = dict.fromkeys(LEVELS, 0)
        self._runtime: Runtime | None = None
        self._scope = trio.CancelScope()

    def now(self) -> datetime:
        """The time of day."""
        try:
            return NOON + timedelta(seconds=trio.current_time())
        except RuntimeError:
            return NOON

    def tell(self, what: str) -> None:
        self.trace.append(f"{trio.current_time():10.4f} {what}")

    # What the log says

    def accept(self, log: Log, frames: Sequence[tuple[int, bytes]], accept: Callable[[], None]) -> None:
        """A change is being written. If the process dies in that, it may be there or not: then it stands for now."""
        ours = not self.dead and log is getattr(self._runtime, "_log", None)
        try:
            accept()
        except BaseException as error:
            if ours and self.dead:
                self._stand(frames, "perhaps")
            elif ours:
                self.ledger.refuse(frames, used_up=log.next > frames[0][0])
                self.tell(f"refused {frames[0][0]}: {error}")
            raise
        if ours:
            self._stand(frames, "")

    def _stand(self, frames: Sequence[tuple[int, bytes]], how: str) -> None:
        try:
            changes = self.ledger.accept(frames)
        except Broken as error:
            self.fail(error)
            return
        accepting.get([]).extend(changes)
        self.tell(f"accepted {frames[0][0]}{'' if len(frames) == 1 else f' to {frames[-1][0]}'} {how}")

    def fail(self, error: Broken, cause: Exception | None = None) -> None:
        """A promise is broken: the history ends."""
        error.__cause__ = error.__cause__ or cause
        self.broken = self.broken or error
        self.end()

    # Dying

    def die(self, loss: Loss) -> None:
        """Now. Synchronous: the process may be in the middle of anything."""
        if self.dead:
            return
        self.note_watermarks()
        self.dead = True
        self.losses.append(loss)
        self.ledger.require(self._watermarks[SURVIVES[loss]])
        self.tell(f"LOST: {loss} at {self._watermarks}")
        match loss:
            case "process":
                self.disk.crash()
                self.database.crash()
            case "power":
                self._power_lost = True
                self.disk.lose_power()
                self.database.lose_power()
            case "journal":
                self.disk.lose_directory()
                self.random.choice((self.database.crash, self.database.lose_power))()
        self._scope.cancel()

    def end(self) -> None:
        """The process is to end by itself."""
        self._scope.cancel()

    def note_watermarks(self) -> None:
        """What the runtime says of itself."""
        if self._runtime is None:
            return
        marks = self._runtime.watermarks
        for level in self.levels:
            sequence = getattr(marks, level)
            if sequence < self._watermarks[level]:
                self.fail(Broken(f"the watermark {level} went from {self._watermarks[level]} back to {sequence}"))
            self._watermarks[level] = sequence
        in_order = [getattr(marks, level) for level in reversed(self.levels)]
        if in_order != sorted(in_order) or marks.journaled != marks.accepted:
            self.fail(Broken(f"watermarks that can't be: {marks}"))

    # The course of things

    async def run(self) -> None:
        """All lives, the last of them without faults."""
        for _ in range(self.random.randint(2, 7)):
            await self._live()
        self.database.sync_s = 0.0
        self._healing = True
        await self._open(self._prove)
        if self.database.survives != "nothing":
            self.ledger.require(self._watermarks["stored"])
            self.disk.lose_directory()
        await self._open(self._prove)

    async def _live(self) -> None:
        """One process, from its start to its end."""
        self.database.sync_s = self.random.choice((0.0, 0.01, 0.5))
        loss = self._any_loss()
        self._weather.plan_end(lambda: self.die(loss))
        if self.random.random() < 0.3:
            self._weather.plan_fault()
        await self._open(self._work)
        self._weather.clear()

    async def _open(self, work: Callable[[Runtime], Awaitable[None]]) -> None:
        """Open a runtime, check what it found, let it work, and see it end in one way or the other."""
        self.lives += 1
        self.dead = False
        self._runtime = None
        self._scope = trio.CancelScope()
        self.tell(f"life {self.lives}")
        try:
            with self._scope:
                async with open_runtime(
                    self._config(), plugins=[_Plugin(self.database.factory())], files=self.disk.files()
                ) as runtime:
                    await self._settle(runtime)
                    await work(runtime)
                    self.note_watermarks()
        except Broken as error:
            self.fail(error)
        except AgentRuntimeError as error:
            self.tell(f"ended by {type(error).__name__}: {error}")
            if not self.dead and self._healing:
                self.fail(Broken(f"without a fault it ends with {type(error).__name__}: {error}"))
        except Exception as error:
            self.fail(Broken(f"{type(error).__name__} came out of the runtime"), error)
        if self.broken is not None:
            raise self.broken
        if not self.dead:
            self.note_watermarks()
            self.disk.crash()
            self.database.crash()
            self.ledger.require(self._watermarks["journaled"])
        self._runtime = None

    def _config(self) -> Config:
        chance = self.random
        return Config.of(
            "simulated:",
            journal={
                "sync_interval_s": chance.choice((0.05, 1.0, 30.0)),
                "segment_bytes": chance.choice((4096, 4096, 16_384)),
                "retain_s": chance.choice((0.0, 0.0, 3.0)),
            },
            write_behind={
                "interval_s": chance.choice((0.1, 2.0, 30.0)),
                "batch_changes": chance.choice((3, 20, 1000)),
                "drain_timeout_s": 10.0,
                "durability_timeout_s": chance.choice((2.0, 30.0)),
            },
            residents={"bytes_max": chance.choice((65_536, 10_000_000)), "tail_messages": chance.choice((3, 200))},
            lease={"duration_s": 1e6},
        )

    async def _settle(self, runtime: Runtime) -> None:
        """What is there? It is all in the database when a runtime opens."""
        async with runtime._door.view(None) as snapshot:
            rows = list(await snapshot.sessions(limit=1000))
            self.held = {row.session_id: row.incarnation for row in await snapshot.quarantine(limit=10_000)}
        if self.dead:
            return
        self.tell(f"opened at {runtime.watermarks}, must have {self.ledger.must_have}")
        self._check_sequences(runtime)
        found = {row.incarnation: row.sequence for row in rows}
        self.ledger.settle(found, runtime.watermarks.accepted, power_lost=self._power_lost)
        self._power_lost = False
        self._runtime = runtime
        self._watermarks = dict.fromkeys(LEVELS, 0)
        self.note_watermarks()
        if self.held and (self._healing or self.random.random() < 0.7):
            self.tell(f"{', '.join(self.held)} was held")
            await self._let_go(runtime)
        for session_id, incarnation in self.ledger.sessions.items():
            if session_id in self.held:
                continue
            try:
                handle = await runtime.get_session(session_id)
            except SessionNotFound as error:
                raise Broken(f"the session {session_id} is gone") from error
            if handle.incarnation != incarnation:
                raise Broken(f"another incarnation of {session_id}")
            resident = await runtime._door.resident(session_id, incarnation)
            await self.ledger.compare(handle, resident.next_seq)

    async def _let_go(self, runtime: Runtime) -> None:
        """Give up what can't be stored, until nothing is held any more."""
        while entries := await runtime.quarantine.entries():
            with suppress(Quarantined):  # another change of the same session
                await runtime.quarantine.drop(entries[0].session_id)
        self.held.clear()

    def _check_sequences(self, runtime: Runtime) -> None:
        """Whether a sequence that is about to be given out is on the disk already."""
        keeper = runtime._journal
        if keeper is None:
            raise Broken("there is no journal")
        seed = keeper.journal._seed
        for name, data in self.disk.contents().items():
            if name.endswith(".segment"):
                for item in scan(io.BytesIO(data), seed):
                    if isinstance(item, Frame) and item.sequence >= runtime._log.next:
                        raise Broken(f"{runtime._log.next} is to be the next sequence, {name} holds {item.sequence}")

    async def _work(self, runtime: Runtime) -> None:
        """Callers at work, until the end that is planned."""
        chance = self.random
        duration_s = chance.choice((0.1, 5.0, 40.0))
        levels: Sequence[Durability] = ("journaled", "journaled", "journaled", *chance.choice((self.levels, ())))
        async with trio.open_nursery() as tasks:
            for number in range(chance.randint(1, 6)):
                pause_s = duration_s / chance.choice((10, 40, 120))
                tasks.start_soon(Caller(self, runtime, random.Random(chance.random()), number, pause_s, levels).run)
            tasks.start_soon(self._weather.run)
            await trio.sleep(duration_s)
            if chance.random() < 0.5:
                self.die(self._any_loss())
            tasks.cancel_scope.cancel()

    async def _prove(self, runtime: Runtime) -> None:
        """Nothing fails any more: all levels are reached, and the journal is cut."""
        with trio.move_on_after(HEALING_S) as scope:
            for level in self.levels:
                handle = await runtime.get_or_create_session("proof", durability=level)
                await handle.append("user", f"proof of {level}", durability=level)
            await runtime.flush()
        if scope.cancelled_caught:
            raise Broken(f"after {HEALING_S:g} s without a fault it still does not work")

    def _any_loss(self) -> Loss:
        if self.database.survives == "nothing":
            return "process"  # with it goes the database, and the journal brings back all of it
        return self.random.choices(LOSSES, (3, 3, 1))[0]
