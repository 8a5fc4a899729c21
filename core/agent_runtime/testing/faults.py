"""Fault injection: a storage around another one, whose calls fail, wait and lie as planned.

A plan is a `Faults`; it owns all state, so that tests don't meet each other's, and does the same whenever the calls
come in the same order. It outlives the storage: hand one plan to several openings, and it goes on counting.

    faults = Faults()
    faults.fail("apply", nth=3)                             # the third apply from now on raises, and has no effect
    faults.fail("apply", nth=1, after_effect=True)          # it raises, but what it did is done: an unknown outcome
    faults.reject(writes_message("m7"))                     # a poisoned message
    async with open_runtime("faulty:memory:", plugins=[faulty_plugin(MemoryDatabase().open, faults)]) as runtime: …
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, Literal, NoReturn, TypeAlias, TypeVar, get_args

import anyio
import msgspec

from agent_runtime.changes import Batch
from agent_runtime.errors import AgentRuntimeError, ChangeRejected, StorageUnavailable

__all__ = [
    "CALL_NAMES",
    "CallName",
    "Fault",
    "Faults",
    "Gate",
    "creates_session",
    "writes_message",
    "writes_session",
]

T = TypeVar("T")
CallName: TypeAlias = Literal[
    "open", "acquire", "renew", "release", "apply", "purge", "snapshot",
    "head", "messages", "switches", "document", "documents", "collections", "sessions",
    "outcome", "outcomes", "quarantine", "lease", "journal",
]  # fmt: skip
"""The calls of a storage: `open` is entering what its factory gave, `snapshot` entering a snapshot."""

CALL_NAMES: Final[tuple[CallName, ...]] = get_args(CallName)


class _Call(msgspec.Struct):
    name: CallName
    effect: Callable[[], Awaitable[Any]]
    batch: Batch | None


class Fault:
    """A planned fault. It strikes calls until it is stopped; `hits` tells how many it has struck."""

    def __init__(
        self,
        name: CallName | None,
        nth: int | None,
        *,
        condition: Callable[[_Call], bool] | None = None,
        before: Callable[[_Call], Awaitable[None]] | None = None,
        after: Callable[[_Call], None] | None = None,
    ) -> None:
        if name is not None and name not in CALL_NAMES:
            raise ValueError(f"{name!r} is not a call of a storage; those are: {', '.join(CALL_NAMES)}")
        self.hits = 0
        self._name = name
        self._nth = nth
        self._condition = condition
        self._before = before
        self._after = after
        self._seen = 0
        self._stopped = False

    def stop(self) -> None:
        """From now on it strikes no call."""
        self._stopped = True

    def strikes(self, call: _Call) -> bool:
        """Whether it is to strike this call, which counts as seen."""
        if self._stopped or (self._name is not None and self._name != call.name):
            return False
        if self._condition is not None and not self._condition(call):
            return False
        self._seen += 1
        return self._nth is None or self._seen == self._nth

    async def before(self, call: _Call) -> None:
        """What happens before the call has its effect."""
        if self._before is not None:
            self.hits += 1
            await self._before(call)

    def after(self, call: _Call) -> None:
        """What happens after it had its effect."""
        if self._after is not None:
            self.hits += 1
            self._after(call)


class Gate:
    """Holds calls. `reached` is set when a call has come to it; `open()` lets it through, and all later ones."""

    def __init__(self) -> None:
        self.reached = anyio.Event()
        self._opened = anyio.Event()

    def open(self) -> None:
        """Let every call through."""
        self._opened.set()

    async def wait(self) -> None:
        """What a held call does."""
        self.reached.set()
        await self._opened.wait()


class Faults:
    """A plan of faults, and the count of calls. `calls` has the names of all calls so far, in order.

    In every method `name` is the call to strike (default: every one) and `nth` which of those, counted from 1 and from
    now on (default: each). Faults strike in the order in which they were planned.
    """

    def __init__(self) -> None:
        self.calls: list[CallName] = []
        self._faults: list[Fault] = []
        self._late: list[Callable[[], Awaitable[Any]]] = []

    def count(self, name: CallName | None = None) -> int:
        """How many calls there were so far."""
        return len(self.calls) if name is None else self.calls.count(name)

    def fail(
        self,
        name: CallName | None = None,
        *,
        nth: int | None = None,
        after_effect: bool = False,
        error: Exception | None = None,
    ) -> Fault:
        """Raise `error` (default: StorageUnavailable), before or after the call has its effect."""

        def after(call: _Call) -> NoReturn:
            raise error or StorageUnavailable(f"a planned fault of {call.name}")

        async def before(call: _Call) -> None:
            after(call)

        return self._plan(Fault(name, nth, after=after) if after_effect else Fault(name, nth, before=before))

    def fail_between(
        self, start_s: float, end_s: float, name: CallName | None = None, *, error: Exception | None = None
    ) -> Fault:
        """Raise `error` without effect while `start_s` <= `anyio.current_time()` < `end_s`."""

        async def before(call: _Call) -> None:
            raise error or StorageUnavailable(f"{call.name} is in a planned outage")

        return self._plan(Fault(name, None, condition=lambda _: start_s <= anyio.current_time() < end_s, before=before))

    def delay(self, delay_s: float, name: CallName | None = None, *, nth: int | None = None) -> Fault:
        """Let the call wait before it has its effect."""

        async def before(_call: _Call) -> None:
            await anyio.sleep(delay_s)

        return self._plan(Fault(name, nth, before=before))

    def hold(self, name: CallName | None = None, *, nth: int | None = None) -> Gate:
        """Let the call wait at a gate before it has its effect."""
        gate = Gate()

        async def before(_call: _Call) -> None:
            await gate.wait()

        self._plan(Fault(name, nth, before=before))
        return gate

    def reject(self, predicate: Callable[[Batch], bool]) -> Fault:
        """Raise ChangeRejected, without effect, for each batch of which the predicate is true."""

        async def before(_call: _Call) -> None:
            raise ChangeRejected("the batch has what a planned fault refuses")

        return self._plan(
            Fault("apply", None, condition=lambda call: call.batch is not None and predicate(call.batch), before=before)
        )

    def commit_late(self, *, nth: int | None = 1) -> Fault:
        """Raise StorageUnavailable for a batch, and apply it just before the next call, whichever that is.

        If there is no next call, or the storage would refuse the batch by then, it is lost.
        """

        async def before(call: _Call) -> None:
            self._late.append(call.effect)
            raise StorageUnavailable("the connection is lost in a commit, by a planned fault")

        return self._plan(Fault("apply", nth, before=before))

    def clear(self) -> None:
        """Forget all faults; calls are still counted, and late commits still come."""
        self._faults.clear()

    async def call(self, name: CallName, effect: Callable[[], Awaitable[T]], batch: Batch | None = None) -> T:
        """Make a call, with the faults that strike it."""
        self.calls.append(name)
        call = _Call(name, effect, batch)
        striking = [fault for fault in self._faults if fault.strikes(call)]
        late, self._late = self._late, []
        for commit in late:
            with suppress(AgentRuntimeError), anyio.CancelScope(shield=True):
                await commit()
        for fault in striking:
            await fault.before(call)
        result = await effect()
        for fault in striking:
            fault.after(call)
        return result

    def _plan(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault


def writes_message(message_id: str) -> Callable[[Batch], bool]:
    """For `Faults.reject`: batches that insert the message with this id."""
    return lambda batch: any(row.id == message_id for row in batch.messages)


def creates_session(session_id: str) -> Callable[[Batch], bool]:
    """For `Faults.reject`: batches that create a session with this id."""
    return lambda batch: any(row.session_id == session_id for row in batch.created)


def writes_session(incarnation: str) -> Callable[[Batch], bool]:
    """For `Faults.reject`: batches that write anything of a session but rows of quarantine and outcomes."""

    def writes(batch: Batch) -> bool:
        with_incarnation = (
            batch.created,
            batch.touched,
            batch.contexts,
            batch.switches,
            batch.messages,
            batch.documents,
        )
        beginning_with_it = (batch.edited, batch.cleared, batch.removed, batch.discarded)
        return (
            incarnation in batch.deleted
            or any(row.incarnation == incarnation for rows in with_incarnation for row in rows)
            or any(row[0] == incarnation for rows in beginning_with_it for row in rows)
        )

    return writes
