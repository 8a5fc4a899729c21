"""What may go wrong in a simulation, and when: faults of the disk and of the database, and the moment of a death."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final

import trio

from agent_runtime.testing import CallName, DiskCallName, SimulatedDisk
from simulated_database import EFFECTS, SimulatedDatabase

__all__ = ["Weather"]

_SMALL_CALLS: Final[tuple[DiskCallName, ...]] = ("sync_directory", "unlink", "create", "read", "names", "lock")


class Weather:
    """Plans faults, as `random` has it, and tells of it."""

    def __init__(
        self, random: Random, disk: SimulatedDisk, database: SimulatedDatabase, tell: Callable[[str], None]
    ) -> None:
        self._random = random
        self._disk = disk
        self._database = database
        self._tell = tell

    def clear(self) -> None:
        """Nothing fails any more."""
        self._disk.clear()
        self._disk.capacity_bytes = None
        self._database.faults.clear()

    def plan_end(self, die: Callable[[], None]) -> None:
        """Perhaps: in a certain call, call `die`."""
        chance = self._random
        kind = chance.randrange(4)
        if kind == 0:
            name: DiskCallName = chance.choice(
                ("write", "write", "write", "sync", "sync", "create", "unlink", "sync_directory", "truncate", "read")
            )
            nth = int(chance.lognormvariate(1.5, 1.5 if name == "write" else 0.7)) + 1
            self._disk.at(name, die, nth=nth, done=chance.choice((0.0, chance.random(), 1.0)))
            self._tell(f"to die in {name} {nth}")
        elif kind == 1:
            call: CallName = chance.choice(("open", "acquire", "apply", "apply", "apply", "snapshot", "release"))
            nth = int(chance.lognormvariate(0.7, 0.7)) + 1 if call == "apply" else 1
            self._database.at(call, die, nth=nth, effect=chance.choice(EFFECTS))
            self._tell(f"to die in {call} {nth}")
        elif kind == 2:  # what a sync that failed leaves behind
            nth = int(chance.lognormvariate(1.0, 0.7)) + 1
            self._disk.fail("sync", nth=nth, done=chance.random())
            later = nth + chance.choice((1, 1, 2, 3))
            self._disk.at("sync", die, nth=later, done=1.0)
            self._tell(f"to die in sync {later}, after {nth} has failed")

    def plan_fault(self) -> None:
        """Something is going to fail."""
        chance, disk, faults = self._random, self._disk, self._database.faults
        nth = chance.choice((1, 1, 2, 3, 10))
        now = trio.current_time()
        match chance.randrange(14):
            case 0:
                disk.fail("write", nth=nth, done=chance.choice((0.0, chance.random())))
            case 1:
                disk.write_short(nth=nth, done=chance.random())
            case 2:
                disk.write_short(nth=nth, done=chance.random())
                disk.fail("truncate", nth=1)
            case 3:
                disk.fail("write", nth=nth, done=chance.choice((0.0, chance.random(), 1.0)))
                disk.fail("truncate", nth=1)
            case 4:
                disk.fail("sync", nth=nth, done=chance.random())
            case 5:
                disk.fail("sync", nth=1, done=chance.random())
                disk.fail("sync", nth=2, done=chance.random())
            case 6:
                disk.delay(chance.choice((0.01, 1.0, 8.0)), "sync", nth=nth)
            case 7:
                disk.fail(chance.choice(_SMALL_CALLS), nth=chance.randint(1, 3))
            case 8:
                disk.capacity_bytes = sum(map(len, disk.contents().values())) + chance.randint(0, 20_000)
            case 9:
                faults.fail("apply", nth=nth, after_effect=chance.random() < 0.5)
            case 10:
                faults.commit_late(nth=nth)
            case 11:
                faults.delay(chance.choice((0.1, 3.0)), "apply", nth=nth)
            case 12:
                faults.fail_between(now + chance.random() * 5, now + 5 + chance.random() * 10)
            case _:
                faults.fail(chance.choice(("snapshot", "head", "messages", "outcome", "purge")), nth=nth)

    async def run(self) -> None:
        """Things fail every now and then, and come right again."""
        chance = self._random
        every_s = chance.choice((0.3, 3.0, 1000.0))
        while True:
            await trio.sleep(chance.expovariate(1 / every_s))
            if chance.random() < 0.7:
                self._tell("weather")
                self.plan_fault()
            else:
                self._disk.capacity_bytes = None
