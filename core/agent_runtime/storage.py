"""The contract of a storage: a database behind a plugin.

The runtime is the only caller. It never calls `apply`, `purge` and the lease's calls at the same time as one another
except `LeaseDesk.renew`, which may come at any time; snapshots may be open, several at once, at any time.

What a storage promises:

- `apply` is one transaction. It first compares the fence and the sequence, and moves the sequence, on one row that a
  takeover also updates (so two writers exclude each other there); then it writes the rows of the batch. When it
  returns, the batch is as safe as `Abilities.survives` says. When it raises, either nothing of the batch is there, or
  (the outcome of a commit being unknown) all of it.
- A snapshot is one consistent view, taken when it is entered, that includes every batch whose `apply` returned before.
- Values come back to the letter: text and bytes unchanged, times as aware UTC with microseconds.
- Every error it raises is one of `errors.StorageUnavailable` (try again), `errors.ChangeRejected` (`apply` only: data
  in this batch is refused and always will be), `errors.StorageFatal`, `errors.SequenceMismatch`, `errors.LeaseLost` or
  `errors.LeaseHeld`. Anything else is taken for StorageUnavailable. Messages never hold data of a session.
- After it is closed every call raises a `StorageError`.
- A cancelled call leaves no statement running and no connection lost. `apply` is called shielded; it is cancelled only
  when a stop runs out of time.

Tables are keyed by partition from the first day; it is always 0 for now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from .changes import Batch, Receipt
from .records import Order
from .rows import ContextRow, DocumentRow, MessageRow, OutcomeRow, QuarantineRow, SessionRow, SwitchRow

__all__ = [
    "Abilities",
    "Claim",
    "Fence",
    "FirstReads",
    "Grant",
    "HeadRead",
    "HeadRows",
    "JournalRow",
    "LeaseDesk",
    "LeaseRow",
    "MessagesRead",
    "PoolFigures",
    "Scrubs",
    "SessionKey",
    "Snapshot",
    "Storage",
    "StorageConfig",
    "StorageFactory",
    "Survival",
]

Survival: TypeAlias = Literal["nothing", "power", "machine"]
"""What a stored batch survives: not even the process; power loss; the loss of this machine."""


class StorageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a factory is given: the URL as configured and the `storage.options` of the configuration.

    `existing`: the database is to be looked at as it is. One that is missing is refused, not made, and one of another
    schema refused, not migrated: both are a StorageFatal.
    """

    url: str
    options: dict[str, Any] = {}
    existing: bool = False


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a storage declares of itself; nothing is found out by trying.

    `journal_directory` is where the journal lies unless the configuration says so: beside a database that is a local
    file. None: the configuration must say. `scrubs`: the storage is one that `Scrubs`, too.
    """

    survives: Survival
    journal_directory: str | None = None
    scrubs: bool = False


class Fence(msgspec.Struct, frozen=True, kw_only=True):
    """The proof of the right to write that goes with every write: it must equal what the partition's row holds."""

    partition: int
    epoch: int
    journal_id: str | None


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A request for the lease. The process fields let a storage on the same machine see that a holder is dead.

    `generation` is the new generation of the journal, written with the grant. `boot_id` names the machine's boot,
    `process_started` is the process's start in clock ticks since then, `pid_namespace` the namespace `pid` counts in;
    they are None where the platform has no such thing. `address` is the URL of the holder's server, if it has one.
    `reclaims` says that the claimant has the journal's own directory under its lock, not a copy of it: whoever held
    the lease with this `journal_id` is dead.
    """

    partition: int = 0
    holder: str
    host: str
    pid: int
    process_started: int | None = None
    pid_namespace: str | None = None
    boot_id: str | None = None
    address: str | None = None
    journal_id: str | None = None
    generation: int = 0
    reclaims: bool = False
    duration_s: float


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """The lease as granted: the fence to write with, and where the log goes on (after `sequence`)."""

    fence: Fence
    database_id: str
    sequence: int


class LeaseRow(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds the lease. `expires_in_s` is by the storage's own clock, negative once expired; None when released.

    `database_id` is the one that grants name.
    """

    partition: int
    database_id: str
    epoch: int
    holder: str | None
    host: str | None
    pid: int | None
    address: str | None
    journal_id: str | None
    acquired_at: datetime | None
    expires_in_s: float | None


class JournalRow(msgspec.Struct, frozen=True):
    """How far one journal has been stored: kept a row a journal, never overwritten by another's.

    `generation` is that of the last claim, `previous_generation` the last one under which a batch was applied, or the
    first one that was claimed: a journal that is older than that is a copy that was left behind.
    """

    partition: int
    journal_id: str
    generation: int
    previous_generation: int
    sequence: int


class PoolFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Connections to the database: how many there may be, how many are in use."""

    size: int
    in_use: int


class SessionKey(msgspec.Struct, frozen=True):
    """The place of a session in lists. Neither part ever changes, so that paging misses and repeats nothing."""

    created_at: datetime
    incarnation: str


class HeadRead(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of `Snapshot.head`."""

    session_id: str
    outcomes_max: int


class MessagesRead(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of `Snapshot.messages`."""

    incarnation: str
    after: int = 0
    before: int | None = None
    limit: int
    order: Order = "asc"


FirstReads: TypeAlias = Sequence[HeadRead | MessagesRead]
"""What somebody who takes a snapshot means to read first in it."""


class HeadRows(msgspec.Struct, frozen=True, kw_only=True):
    """What of a session is loaded on first touch. `outcomes` are its newest unexpired ones, newest first."""

    session: SessionRow
    context: ContextRow
    outcomes: Sequence[OutcomeRow]


class Snapshot(Protocol):
    """One consistent view of a partition. Not used by two tasks at once.

    Deleted sessions and what belonged to them are not seen. Messages up to a session's floor may be: callers ask above
    it.
    """

    @property
    def watermark(self) -> int:
        """The sequence of the last batch that this view includes."""

    async def head(self, session_id: str, *, outcomes_max: int) -> HeadRows | None:
        """The head of the session with this id; None when there is none. At most `outcomes_max` outcomes."""

    async def messages(
        self, incarnation: str, *, after: int = 0, before: int | None = None, limit: int, order: Order = "asc"
    ) -> Sequence[MessageRow]:
        """Messages with `after` < seq < `before` (None: no bound), in `order` of seq, at most `limit`."""

    async def switches(self, incarnation: str) -> Sequence[SwitchRow]:
        """All hand-overs of the session, in order of number."""

    async def document(self, incarnation: str, collection: str, key: str) -> DocumentRow | None:
        """One document."""

    async def documents(
        self, incarnation: str, collection: str, *, after: str = "", limit: int
    ) -> Sequence[DocumentRow]:
        """Documents of a collection whose key, by code points, comes after `after`, in order of key."""

    async def collections(self, incarnation: str) -> Sequence[str]:
        """The collections in which the session has documents, in order by code points."""

    async def sessions(
        self, *, user_id: str | None = None, after: SessionKey | None = None, limit: int, order: Order = "asc"
    ) -> Sequence[SessionRow]:
        """Sessions (of one user) in `order` of (created_at, incarnation), behind `after` in that order."""

    async def outcome(self, scope: str, key: str) -> OutcomeRow | None:
        """The outcome of an idempotency key, expired or not."""

    async def outcomes(self, *, after: tuple[str, str] | None = None, limit: int) -> Sequence[OutcomeRow]:
        """Outcomes of all scopes, expired or not, in order of (scope, key) by code points, behind `after`."""

    async def quarantine(self, *, after: int = 0, limit: int) -> Sequence[QuarantineRow]:
        """Quarantined changes with a sequence above `after`, in order of sequence."""

    async def lease(self) -> LeaseRow | None:
        """The lease as it stands; None when none was ever granted."""

    async def journal(self, journal_id: str) -> JournalRow | None:
        """How far this journal has been stored; None when it never wrote here."""


class LeaseDesk(Protocol):
    """Grants the right to write one partition to one holder at a time."""

    async def acquire(self, claim: Claim) -> Grant:
        """Take the lease: when nobody holds it, it has expired, its holder is provably dead, or the claim reclaims it.

        One transaction that locks the partition's row: it raises the epoch, so that the fence of every earlier holder
        stops to match, and writes the journal's row. The database's id is made with the first grant.

        Raises:
            LeaseHeld: someone else holds it.
        """

    async def renew(self, fence: Fence, duration_s: float) -> None:
        """Extend the lease by `duration_s` from now, also when it expired and nobody took it.

        Raises:
            LeaseLost: the fence does not match any more.
        """

    async def release(self, fence: Fence) -> None:
        """Give the lease back: the fence stops to match. Nothing happens when it did not match any more."""


class Storage(Protocol):
    """A database. Opened by its factory: connected, verified and migrated when the context manager is entered."""

    @property
    def abilities(self) -> Abilities:
        """What this storage declares."""

    @property
    def leases(self) -> LeaseDesk:
        """The lease of each partition."""

    def snapshot(self, partition: int = 0, first: FirstReads = ()) -> AbstractAsyncContextManager[Snapshot]:
        """A consistent view; never waits for a batch that is being applied.

        `first` is what the caller means to read first, before it knows how far a page may go: a storage may fetch it
        along with the view, which saves ways to a database. It need not; what is read is the same.
        """

    async def apply(self, batch: Batch, fence: Fence) -> Receipt:
        """Store the batch, whole, in one transaction; move the sequence of the partition and of its journal.

        Raises:
            LeaseLost: the fence does not match: another runtime took over.
            SequenceMismatch: the fence matches, the sequence is not `batch.after`; nothing was written.
            ChangeRejected: data in the batch is refused and always will be; nothing was written. So is a batch that
                marks, touches, edits or clears a session that is not there.
            StorageUnavailable: try again. The batch may have been stored: then the next try tells by SequenceMismatch.
            StorageFatal: trying again can't help.
        """

    async def purge(self, fence: Fence, *, now: datetime, rows_max: int) -> int:
        """Delete up to `rows_max` rows that nobody can see: of deleted sessions, below floors, expired outcomes.

        Returns the number of rows deleted; 0 when nothing is left.

        Raises:
            LeaseLost: the fence does not match.
        """

    def figures(self) -> PoolFigures:
        """The pool as it is now; synchronous and cheap."""


class Scrubs(Protocol):
    """What a storage may do besides, if it declares so."""

    async def scrub(self) -> None:
        """Take out of its files, as far as it can, what was deleted before; called when `purge` has nothing left.

        Raises:
            StorageUnavailable: try again.
        """


StorageFactory: TypeAlias = Callable[[StorageConfig], AbstractAsyncContextManager[Storage]]
"""Opens a storage. Entering connects, verifies, migrates; leaving closes every connection.

Raises StorageFatal with one clear line for what a person must mend, StorageUnavailable when waiting may help,
InvalidInput for a URL or an option it does not understand.
"""
