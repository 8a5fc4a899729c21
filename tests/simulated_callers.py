"""Who calls a runtime in a simulation: any writes, at any levels, some of them with a key and then again."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio

from agent_runtime import (
    AgentRuntimeError,
    DurabilityNotReached,
    Runtime,
    SessionExists,
    SessionHandle,
    SessionNotFound,
)
from agent_runtime.changes import Change
from agent_runtime.records import Durability
from ledger import Broken

if TYPE_CHECKING:
    from simulation import World

__all__ = ["LEVELS", "Caller", "accepting"]

LEVELS: Final[tuple[Durability, ...]] = ("journaled", "synced", "stored")
SESSIONS: Final = ("a", "b", "c", "d")

accepting: ContextVar[list[Change]] = ContextVar("accepting")
"""The changes that the call at hand has made."""


class _Keyed(NamedTuple):
    """A call with an idempotency key, to be made again."""

    incarnation: str
    key: str
    call: Callable[[Durability], Awaitable[Any]]


class Caller:
    """Makes calls, one after the other, and checks what it is told."""

    def __init__(
        self,
        world: World,
        runtime: Runtime,
        chance: random.Random,
        number: int,
        pause_s: float,
        levels: Sequence[Durability],
    ) -> None:
        self._world = world
        self._runtime = runtime
        self._random = chance
        self._number = number
        self._pause_s = pause_s
        self._levels = levels
        self._calls = 0
        self._keyed: _Keyed | None = None

    async def run(self) -> None:
        while True:
            await trio.sleep(self._random.expovariate(1 / self._pause_s))
            try:
                await self._call()
            except Broken as error:
                self._world.fail(error)

    async def _call(self) -> None:
        made: list[Change] = []
        accepting.set(made)
        level = self._random.choice(self._levels)
        error: AgentRuntimeError | None = None
        try:
            await self._some_call(level)
        except DurabilityNotReached as unreached:
            level = unreached.reached  # type: ignore[assignment]
            self._world.tell(f"{self._number}: {type(unreached).__name__}: {unreached}")
        except AgentRuntimeError as failure:
            error = failure
        if self._world.dead:
            return
        if error is not None:
            if made:
                raise Broken(f"{type(error).__name__} of a call that made change {made[0].sequence}") from error
            if not isinstance(error, SessionNotFound | SessionExists):
                self._world.tell(f"{self._number}: {type(error).__name__}: {error}")
            return
        if len(made) > 1:
            raise Broken(f"one call made {len(made)} changes")
        self._world.note_watermarks()
        mark = getattr(self._runtime.watermarks, level)
        if made and (mark is None or mark < made[0].sequence):
            raise Broken(f"change {made[0].sequence} was acknowledged as {level}, at {self._runtime.watermarks}")

    async def _some_call(self, level: Durability) -> None:
        chance = self._random
        if self._keyed is not None and chance.random() < 0.3:
            await self._again(self._keyed, level)
            return
        session_id = chance.choice(SESSIONS)
        if chance.random() < 0.1:
            create = chance.choice((self._runtime.create_session, self._runtime.get_or_create_session))
            await create(session_id, system_prompt=chance.choice((None, "be brief")), durability=level)
            return
        handle = await self._runtime.get_session(session_id)
        self._calls += 1
        key = f"{self._world.lives}-{self._number}-{self._calls}" if chance.random() < 0.2 else None
        call = self._any_write(handle, key)
        if key is not None:
            self._keyed = _Keyed(handle.incarnation, key, call)
        await call(level)

    async def _again(self, keyed: _Keyed, level: Durability) -> None:
        """Whether the first call was answered or not: it counts once."""
        result = await keyed.call(level)
        change = self._world.ledger.outcome(keyed.incarnation, keyed.key)
        if change is None and not self._world.dead and keyed.incarnation not in self._world.held.values():
            raise Broken(f"a keyed call gave {result!r}, but no change of it stands")

    def _any_write(self, handle: SessionHandle, key: str | None) -> Callable[[Durability], Awaitable[Any]]:
        """A call that can be repeated to the letter."""
        chance = self._random
        text = f"{self._number}/{self._calls} " + "x" * int(chance.lognormvariate(3, 2))
        name = chance.choice(("one", "two"))
        calls: dict[Callable[[Durability], Awaitable[Any]], int] = {
            lambda level: handle.append("user", text, durability=level, idempotency_key=key): 60,
            lambda level: handle.append_many(
                [{"role": "user", "content": text}, {"role": "assistant", "content": f"re: {text}"}],
                durability=level,
                idempotency_key=key,
            ): 10,
            lambda level: handle.put_document("notes", name, {"text": text}, durability=level, idempotency_key=key): 8,
            lambda level: handle.delete_document("notes", name, durability=level, idempotency_key=key): 4,
            lambda level: handle.switch_agent(name, reason=text, durability=level, idempotency_key=key): 6,
            lambda level: handle.update(title=text[:50], durability=level, idempotency_key=key): 4,
            lambda level: handle.update_context(metadata={"at": text}, durability=level, idempotency_key=key): 4,
            lambda level: handle.pop(durability=level, idempotency_key=key): 8,
            lambda level: handle.clear(durability=level, idempotency_key=key): 2,
            lambda level: handle.delete(durability=level, idempotency_key=key): 1,
        }
        return chance.choices(list(calls), list(calls.values()))[0]
