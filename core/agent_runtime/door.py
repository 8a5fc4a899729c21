"""The door: every call on a session comes in here, and every change is acknowledged here.

A write may wait at the door (for a head that is not in memory, for room in the budget). Then it commits in one
synchronous step: plan the change from the session's state, take its sequence, encode it, write it to the journal, show
it in memory, hand it to the scheduler. There is no lock, no await and no task in that step, so it is whole or has not
happened, whatever is cancelled. After it the change stands; waiting for a higher level may fail, the change does not.

Guarantees: a failure or cancellation before the commit changes nothing; one load at a time for a session, whose failure
all who wait for it share; no history is loaded to write; calls from another thread, where that step would not be whole,
are refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta
from threading import get_ident
from typing import Final, Generic, NoReturn, TypeVar, cast, get_args

import anyio
import msgspec
from anyio.lowlevel import checkpoint

from .budget import CHANGE_BYTES, Budget
from .changes import Change, encode_change
from .errors import (
    AgentRuntimeError,
    DurabilityNotReached,
    IdempotencyConflict,
    InvalidInput,
    LeaseLost,
    RuntimeClosed,
    SessionHeld,
    SessionNotFound,
    StorageError,
    StorageUnavailable,
    again,
)
from .histograms import SECONDS, Histogram
from .lease import LeaseKeeper
from .log import Log
from .records import Durability
from .residents import OUTCOMES_MAX, Resident, Residents, Unknown
from .rows import OutcomeRow
from .scheduler import Pending, Scheduler
from .storage import FirstReads, HeadRead, Snapshot, Storage

__all__ = ["CREATION_SCOPE", "Door", "Plan", "Request"]

CREATION_SCOPE: Final = "create"
_OUTCOME_LIFE: Final = timedelta(hours=24)
_CREATIONS_MAX: Final = 4096
_TURN: Final = 64  # writes between two yields to the loop: one takes about 15 µs, so this is about a millisecond
_WAITED: Final = frozenset({"synced", "stored"})

T = TypeVar("T")


class Request(msgspec.Struct, Generic[T], frozen=True):
    """A call with an idempotency key: which call, the hash of its arguments, and how its outcome is read again."""

    key: str
    route: str
    body_hash: str
    read_outcome: Callable[[str], T]


class Plan(msgspec.Struct, Generic[T], frozen=True):
    """What a write is going to do: the change (None: there is nothing to change), and what the call returns."""

    change: Change | None
    result: T


class _Flight:
    """A load under way, and the error it ended with."""

    __slots__ = ("error", "landed")

    def __init__(self) -> None:
        self.landed = anyio.Event()
        self.error: AgentRuntimeError | None = None


class Door:
    """What all handles share. `appends` has, by level, the seconds that calls took which appended messages. `guard` is
    called before each write, and raises what refuses it. Nothing is written without being sure of the `lease`.
    """

    def __init__(
        self,
        *,
        storage: Storage,
        log: Log,
        budget: Budget,
        residents: Residents,
        scheduler: Scheduler,
        lease: LeaseKeeper,
        now: Callable[[], datetime],
        levels: Sequence[Durability],
        durability: Durability,
        read_timeout_s: float,
        guard: Callable[[], None] | None = None,
    ) -> None:
        self.durability = durability
        self.storage = storage
        self.log = log
        self.residents = residents
        self.now = now
        self._budget = budget
        self._scheduler = scheduler
        self._lease = lease
        self._levels = levels
        self._read_timeout_s = read_timeout_s
        self._guard = guard
        self._flights: dict[str, _Flight] = {}
        self._creations: OrderedDict[str, OutcomeRow] = OrderedDict()
        self._turn = _TURN
        self._closed: AgentRuntimeError | None = None
        self._thread = get_ident()
        self.appends: dict[Durability, Histogram] = {level: Histogram.of(SECONDS) for level in levels}

    def close(self, error: AgentRuntimeError | None = None) -> None:
        """From now on every call raises `error` (default: RuntimeClosed)."""
        if self._closed is None or error is not None:
            self._closed = error or RuntimeClosed()

    def check_open(self) -> None:
        """Raise what every call raises now, if the door is closed or the call comes from another thread."""
        if self._closed is not None or get_ident() != self._thread:
            self._refuse()

    def _refuse(self) -> NoReturn:
        if self._closed is not None:
            raise again(self._closed)
        raise RuntimeError(
            "the runtime is used from another thread than that of the event loop which opened it; threads, and event "
            "loops of their own, use one of open_runtime_blocking"
        )

    def level(self, durability: str | None) -> Durability:
        """The level that a call waits for."""
        level = self.durability if durability is None else durability
        if level in self._levels:
            return cast("Durability", level)
        known = ", ".join(map(repr, self._levels))
        if level in get_args(Durability):
            lacking = "this database can't promise it" if "journaled" in self._levels else "it needs the journal"
            raise InvalidInput("durability", f"{level!r} can't be had here, {lacking}: use one of {known}")
        raise InvalidInput("durability", f"{level!r} is not a level: use one of {known}")

    # Finding sessions

    async def locate(self, session_id: str) -> Resident | None:
        """The session with this id, loaded if need be; None when there is none.

        Nothing happens between this call's last look at memory and its return.
        """
        while True:
            self.check_open()
            resident = self.residents.find(session_id)
            if not isinstance(resident, Unknown):
                return resident
            await self._load(session_id)

    async def resident(self, session_id: str, incarnation: str) -> Resident:
        """The session that a handle means, loaded if need be.

        Raises:
            SessionNotFound: it is deleted; perhaps another one has its id.
        """
        while (resident := self.find(session_id, incarnation)) is None:
            await self._load(session_id)
        return resident

    def find(self, session_id: str, incarnation: str) -> Resident | None:
        """The session that a handle means, if it is in memory; None when it is to be loaded.

        Raises:
            SessionNotFound: it is deleted; perhaps another one has its id.
        """
        self.check_open()
        resident = self.residents.find(session_id)
        if isinstance(resident, Unknown):
            return None
        if resident is None or resident.incarnation != incarnation or resident.deleted:
            raise SessionNotFound(session_id)
        return resident

    @asynccontextmanager
    async def reading(
        self, session_id: str, incarnation: str, resident: Resident | None, first: FirstReads = ()
    ) -> AsyncIterator[tuple[Resident, Snapshot]]:
        """A session, and a view to lay its changes over; `resident` is what `find` said of it just now.

        A session that has to be loaded is loaded in that same view. `first` is what will be read first besides.
        """
        while resident is None and session_id in self._flights:
            await self._load(session_id)
            resident = self.find(session_id, incarnation)
        if resident is not None:
            async with self.view(resident, first) as snapshot:
                yield resident, snapshot
            return
        with self._flight(session_id) as land:
            async with self.view(None, [_head_of(session_id), *first]) as snapshot:
                self.residents.admit(session_id, await snapshot.head(session_id, outcomes_max=OUTCOMES_MAX))
                resident = await self.resident(session_id, incarnation)  # at once
                pin = self.residents.open_view(resident, self.log.stored)
                land()
                try:
                    yield resident, snapshot
                finally:
                    self.residents.close_view(pin)

    async def _load(self, session_id: str, *, cold: bool = False) -> None:
        """Bring a session into memory, or that there is none, for the caller's next step."""
        flight = self._flights.get(session_id)
        if flight is not None:
            self.residents.missed(cold=cold)
            await flight.landed.wait()
            if flight.error is not None:
                raise again(flight.error)
            return
        with self._flight(session_id, cold=cold):
            async with self.view(None, [_head_of(session_id)]) as snapshot:
                rows = await snapshot.head(session_id, outcomes_max=OUTCOMES_MAX)
            # Not before: without room, the view's end would let it go again.
            self.residents.admit(session_id, rows, cold=cold)

    @contextmanager
    def _flight(self, session_id: str, *, cold: bool = False) -> Iterator[Callable[[], None]]:
        """Load a session. Many who want the same one share a load: until this is left, or says that it has landed."""
        self.residents.missed(cold=cold)
        flight = self._flights[session_id] = _Flight()

        def land() -> None:
            if not flight.landed.is_set():
                del self._flights[session_id]
                flight.landed.set()

        try:
            yield land
        except StorageError as error:
            if not flight.landed.is_set():
                flight.error = error
            raise
        finally:
            land()

    @asynccontextmanager
    async def view(self, resident: Resident | None, first: FirstReads = ()) -> AsyncIterator[Snapshot]:
        """A view of the database over which the changes in memory may be laid until it is left.

        `first` is what will be read in it first, if that is known.

        Until then the changes it may lack stay in memory, and keep their room in the budget: so it has limited time.
        """
        start = self.log.stored
        view = self.residents.open_view(resident, start)
        try:
            with anyio.move_on_after(self._read_timeout_s) as limit:
                async with self.storage.snapshot(first=first) as snapshot:
                    if snapshot.watermark < start:
                        raise StorageUnavailable(
                            f"the database answers from {snapshot.watermark}, {start} is stored already"
                        )
                    yield snapshot
            if limit.cancelled_caught:
                raise StorageUnavailable(f"a read took more than storage.read_timeout_s ({self._read_timeout_s:g} s)")
        except AgentRuntimeError:
            raise
        except Exception as error:  # whatever else a storage raises is taken for this
            raise StorageUnavailable(f"the storage failed with {type(error).__name__}") from error
        finally:
            self.residents.close_view(view)

    # Writing

    async def write(
        self,
        session_id: str,
        scope: str,
        decide: Callable[[Resident | None], Plan[T]],
        *,
        durability: str | None,
        request: Request[T] | None = None,
        fresh: bool = False,
        cold: bool = False,
        held: bool = False,
    ) -> T:
        """Change a session: call `decide` with what there is under the id, and carry out the plan it returns.

        `decide` is synchronous and changes nothing; it may be called again when the state moved while the call waited.
        `scope` is where the idempotency key counts: the session's incarnation, or CREATION_SCOPE. `fresh`: the id was
        made for this call, so that the database need not be asked. `cold`: nobody has asked for the session, so that it
        takes no other's place in memory. `held`: also a session that is held takes it, and it queues behind what is in
        quarantine.
        """
        level = self.durability if durability is None else self.level(durability)
        self._turn -= 1
        if self._turn <= 0:
            self._turn = _TURN
            await checkpoint()
        reserved = 0
        asked = False
        try:
            while True:
                if self._closed is not None or get_ident() != self._thread:  # check_open, without the call
                    self._refuse()
                if self._lease.in_doubt:
                    await self._lease.confirm()
                    asked = False
                    continue
                if self._guard is not None:
                    self._guard()
                current = None if fresh else self.residents.find(session_id)
                if isinstance(current, Unknown):
                    await self._load(session_id, cold=cold)
                    continue
                if request is not None:
                    outcome = self._known_outcome(scope, current, request.key)
                    asks = outcome is None and not asked and not self._knows_all_outcomes(scope, current)
                    if asks:
                        asked = True
                        outcome = await self._stored_outcome(scope, current, request.key)
                    if outcome is not None and outcome.expires_at > self.now():
                        return await self._repeat(outcome, request, level)
                    if asks:  # nothing that counts was found, but meanwhile anything may have happened
                        continue
                plan = decide(current)
                change = plan.change
                if change is None and request is not None and scope != CREATION_SCOPE and current is not None:
                    change = self._without_effect(current)  # or a repetition, later, would do what this call did not
                if change is None:
                    if current is not None:  # what the result tells may not be at that level yet
                        await self._wait(current.sequence, level, plan.result)
                    return plan.result
                if current is not None and current.held and not held:
                    raise SessionHeld(session_id)
                if request is not None:
                    change = self._with_outcome(change, scope, request, plan.result)
                data = encode_change(change)
                size = CHANGE_BYTES + len(data)
                if reserved and not self._budget.adjust(size - reserved):
                    self._budget.release(reserved)
                    reserved = 0
                if not reserved and not self._budget.admit(size):
                    if size > self._budget.bytes_max:
                        raise InvalidInput(
                            "call",
                            f"its change takes {size} bytes, more than all of write_behind.pending_bytes_max "
                            f"({self._budget.bytes_max}): split the call",
                        )
                    await self._budget.reserve(size)
                    reserved, asked = size, False
                    continue
                reserved = size
                self.log.accept(change.sequence, data)
                reserved = 0
                self._commit(change, current, size)
                break
        finally:
            if reserved:
                self._budget.release(reserved)
        if level in _WAITED:
            await self._wait(change.sequence, level, plan.result)
        return plan.result

    def _commit(self, change: Change, current: Resident | None, size: int) -> None:
        """The change stands: show it, and have it stored. Nothing here fails."""
        if current is None or change.birth is not None:
            current = Resident(change.session_id, change.incarnation)
        self.residents.add(change, current)
        self._scheduler.add(Pending(change, current, size))
        if change.outcome is not None:
            self.remember(change.outcome)

    async def _wait(self, sequence: int, level: Durability, result: object) -> None:
        """Wait until a change that stands already has reached a level."""
        if level not in _WAITED:
            return
        cause: BaseException | None = None
        try:
            await self.log.wait(sequence, level)
            return
        except TimeoutError:
            reason = f"it took more than {self.log.timeout_s:g} s"
        except (LeaseLost, RuntimeClosed) as error:
            cause, reason = error, str(error)
        except anyio.get_cancelled_exc_class() as error:
            cause, reason = error, "the wait was cancelled"
        raise DurabilityNotReached(result, sequence, level, self.log.reached(sequence), reason) from cause

    # Idempotency keys

    def _known_outcome(self, scope: str, current: Resident | None, key: str) -> OutcomeRow | None:
        if scope == CREATION_SCOPE:
            return self._creations.get(key)
        mine = current if current is not None and current.incarnation == scope else self.residents.dirty.get(scope)
        return None if mine is None else mine.outcomes.get(key)

    @staticmethod
    def _knows_all_outcomes(scope: str, current: Resident | None) -> bool:
        return current is not None and current.incarnation == scope and current.outcomes_complete

    async def _stored_outcome(self, scope: str, current: Resident | None, key: str) -> OutcomeRow | None:
        async with self.view(current) as snapshot:
            return await snapshot.outcome(scope, key)

    async def _repeat(self, outcome: OutcomeRow, request: Request[T], level: Durability) -> T:
        """Answer a call that was made before with what it gave then."""
        if outcome.route != request.route or outcome.body_hash != request.body_hash:
            raise IdempotencyConflict(request.key)
        result = request.read_outcome(outcome.outcome)
        await self._wait(outcome.sequence, level, result)
        return result

    def _without_effect(self, current: Resident) -> Change:
        """A change that brings nothing but the outcome it will be given."""
        return Change(
            sequence=self.log.next,
            previous=current.sequence,
            session_id=current.session_id,
            incarnation=current.incarnation,
            last_activity=current.last_activity,
            message_count=current.message_count,
            next_seq=current.next_seq,
        )

    def _with_outcome(self, change: Change, scope: str, request: Request[T], result: T) -> Change:
        outcome = OutcomeRow(
            scope=scope,
            key=request.key,
            route=request.route,
            body_hash=request.body_hash,
            outcome=msgspec.json.encode(result).decode(),
            sequence=change.sequence,
            expires_at=self.now() + _OUTCOME_LIFE,
        )
        return msgspec.structs.replace(change, outcome=outcome)

    def remember(self, outcome: OutcomeRow) -> None:
        """If it is that of a creation, keep it in memory: a session's own are kept with the session."""
        if outcome.scope != CREATION_SCOPE:
            return
        creations = self._creations
        creations[outcome.key] = outcome
        while len(creations) > _CREATIONS_MAX and next(iter(creations.values())).sequence <= self.residents.settled:
            creations.popitem(last=False)

    @property
    def creations(self) -> list[OutcomeRow]:
        """The outcomes of creations that are in memory: at least all that a view of the database may lack."""
        return [*self._creations.values()]

    def forget(self, outcome: OutcomeRow) -> None:
        """If it is that of a creation: it is given up."""
        if outcome.scope == CREATION_SCOPE:
            self._creations.pop(outcome.key, None)


def _head_of(session_id: str) -> HeadRead:
    return HeadRead(session_id=session_id, outcomes_max=OUTCOMES_MAX)
