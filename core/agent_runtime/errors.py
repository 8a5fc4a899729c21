"""Every error a caller can meet, and the few that only a storage and the scheduler exchange.

    AgentRuntimeError
    ├── InvalidInput              refused at the door; names the field
    ├── SessionNotFound
    ├── SessionExists
    ├── SessionHeld               an earlier change of the session waits in quarantine
    ├── ApprovalNotFound
    ├── ApprovalDecided           somebody decided before, or it has expired
    ├── IdempotencyConflict       the key was used with another body
    ├── Overloaded                the budget for unstored changes stayed full; nothing was changed
    ├── DurabilityNotReached      applied, but not yet at the level asked for
    ├── Quarantined               a change waited for can never be stored as it is
    ├── StorageError
    │   ├── StorageUnavailable    try again: the database is away, busy or shutting down
    │   │   └── DrainIncomplete   closed with changes that could not be stored
    │   ├── StorageFatal          trying again can't help: corrupt, too new, credentials
    │   ├── ChangeRejected        (storage → scheduler) this batch holds a change that can never apply
    │   └── SequenceMismatch      (storage → scheduler) the database stands at another sequence
    ├── JournalError
    │   ├── JournalFull
    │   ├── JournalCorrupt
    │   └── JournalMismatch
    ├── LeaseHeld                 another runtime has the right to write
    ├── LeaseLost                 this runtime had it, and has lost it
    ├── ConfigError
    ├── PluginError
    └── RuntimeClosed

Messages name ids, fields and counts; never the content of a session.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from .approvals import Approval

__all__ = [
    "AgentRuntimeError",
    "ApprovalDecided",
    "ApprovalNotFound",
    "ChangeRejected",
    "ConfigError",
    "DrainIncomplete",
    "DurabilityNotReached",
    "IdempotencyConflict",
    "InvalidInput",
    "JournalCorrupt",
    "JournalError",
    "JournalFull",
    "JournalMismatch",
    "LeaseHeld",
    "LeaseLost",
    "Overloaded",
    "PluginError",
    "Quarantined",
    "RuntimeClosed",
    "SequenceMismatch",
    "SessionExists",
    "SessionHeld",
    "SessionNotFound",
    "StorageError",
    "StorageFatal",
    "StorageUnavailable",
]


class AgentRuntimeError(Exception):
    """The root of the tree."""


AnyError = TypeVar("AnyError", bound=AgentRuntimeError)


def again(error: AnyError) -> AnyError:
    """The same error once more: what several tasks raise must not be one object, or they share its traceback."""
    twin = error.__class__.__new__(error.__class__, *error.args)
    twin.__dict__.update(error.__dict__)
    return twin


class InvalidInput(AgentRuntimeError):
    """An argument that is refused before anything happens.

    `path` names the field for people, as in `messages[3].metadata.tags[0]`, long keys cut. `keys` is the same way step
    by step, for programs, and exact: `("messages", 3, "metadata", "tags", 0)`; by default it is read from the path.
    """

    def __init__(self, path: str, problem: str, keys: Sequence[str | int] | None = None) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem
        self.keys = tuple(path_keys(path)) if keys is None else tuple(keys)

    def below(self, path: str) -> InvalidInput:
        """The same refusal, where the value in question lies under `path`."""
        joined = f"{path}.{self.path}" if path and self.path else path or self.path
        return InvalidInput(joined, self.problem, (*path_keys(path), *self.keys))


_STEP: Final = re.compile(r'\[([0-9]+)\]|\["(.*?)"\]|([^.\[\]]+)')


def path_keys(path: str) -> Iterator[str | int]:
    """The steps of a path, as far as its text tells them."""
    for index, quoted, name in _STEP.findall(path):
        yield int(index) if index else quoted or name


class _SessionError(AgentRuntimeError):
    def __init__(self, session_id: str, message: str) -> None:
        super().__init__(message)
        self.session_id = session_id


class SessionNotFound(_SessionError):
    """No such session: never created, deleted, or re-created since the handle was made."""

    def __init__(self, session_id: str) -> None:
        super().__init__(session_id, f"there is no session {session_id!r}")


class SessionExists(_SessionError):
    """`create_session` with an id that is taken."""

    def __init__(self, session_id: str) -> None:
        super().__init__(session_id, f"the session {session_id!r} exists already")


class SessionHeld(_SessionError):
    """A change of this session is in quarantine: reads go on, writes wait until it is replayed or dropped."""

    def __init__(self, session_id: str) -> None:
        super().__init__(
            session_id,
            f"the session {session_id!r} is held: one of its changes is in quarantine; replay or drop it first",
        )


class ApprovalNotFound(AgentRuntimeError):
    """The session has no such approval, or its request is not stored yet."""

    def __init__(self, approval_id: str) -> None:
        super().__init__(f"there is no approval {approval_id!r}")
        self.approval_id = approval_id


class ApprovalDecided(AgentRuntimeError):
    """An approval that can't be decided any more. `approval` says what was decided, and when; or it has expired."""

    def __init__(self, approval: Approval) -> None:
        at = approval.expires_at if approval.status == "expired" else approval.decided_at
        when = "" if at is None else f" at {at.isoformat()}"
        super().__init__(f"the approval {approval.approval_id!r} is {approval.status}{when}, which stands")
        self.approval = approval


class IdempotencyConflict(AgentRuntimeError):
    """An idempotency key that was used before, for another call or with another body."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the idempotency key {key!r} was used before with another request")
        self.key = key


class Overloaded(AgentRuntimeError):
    """The budget for unstored changes stayed full for `append_timeout_s`. Nothing was changed."""

    def __init__(self, retry_after_s: float, pending_bytes: int, pending_bytes_max: int) -> None:
        super().__init__(
            f"unstored changes fill their budget ({pending_bytes} of {pending_bytes_max} bytes): "
            f"nothing was changed, try again in {retry_after_s:g} s"
        )
        self.retry_after_s = retry_after_s


class DurabilityNotReached(AgentRuntimeError):
    """The change is applied and visible, and goes on to the database; the level asked for was not reached in time.

    `outcome` is what the call would have returned. Do not repeat the call: it would apply twice.
    """

    def __init__(self, outcome: Any, sequence: int, wanted: str, reached: str, reason: str) -> None:
        super().__init__(
            f"change {sequence} is applied but only {reached}, not yet {wanted} ({reason}); do not repeat the call"
        )
        self.outcome = outcome
        self.sequence = sequence
        self.wanted = wanted
        self.reached = reached


class Quarantined(AgentRuntimeError):
    """Changes that were waited for can't be stored as they are. They are kept, visible, and can be replayed."""

    def __init__(self, sequences: Sequence[int]) -> None:
        shown = ", ".join(map(str, sequences[:5])) + (", …" if len(sequences) > 5 else "")
        super().__init__(f"{len(sequences)} change(s) went to quarantine instead of the database: {shown}")
        self.sequences = tuple(sequences)


class StorageError(AgentRuntimeError):
    """What a storage raises. Each driver's errors are translated in one place of its plugin."""


class StorageUnavailable(StorageError):
    """The database is away, busy or shutting down. Trying again may help, and the scheduler does."""


class DrainIncomplete(StorageUnavailable):
    """The runtime is closed, and `changes` acknowledged changes could not be stored in time.

    They are in the journal at `journal`, and are stored when it is opened again; None: there was no journal.
    """

    def __init__(self, changes: int, reason: str, journal: str | None = None) -> None:
        fate = "without a journal, are lost" if journal is None else f"are kept in the journal {journal}"
        super().__init__(f"{changes} change(s) could not be stored before the stop and {fate}: {reason}")
        self.changes = changes
        self.journal = journal


class StorageFatal(StorageError):
    """Trying again can't help until a person has acted: corrupt, too new, wrong credentials."""


class ChangeRejected(StorageError):
    """The database understood the batch and refused data in it, and always will. Raised by `Storage.apply` only."""


class SequenceMismatch(StorageError):
    """The database stands at another sequence than the batch starts from. Raised by `Storage.apply` only.

    `found` is the sequence of the last batch that the database holds.
    """

    def __init__(self, expected: int, found: int) -> None:
        super().__init__(f"the batch follows sequence {expected}, the database stands at {found}")
        self.expected = expected
        self.found = found


class JournalError(AgentRuntimeError):
    """The journal can't do what was asked."""


class JournalFull(JournalError):
    """Too little free disk for the journal: appends stop, reads and flushes go on."""


class JournalCorrupt(JournalError):
    """The journal is damaged beyond what recovery may mend by itself."""


class JournalMismatch(JournalError):
    """The journal belongs to another database, or the database to another journal."""


class LeaseHeld(AgentRuntimeError):
    """Another runtime holds the right to write. `holder` says who; `address` is its server's URL, if it has one."""

    def __init__(self, holder: str, expires_in_s: float | None = None, address: str | None = None) -> None:
        until = ""
        if expires_in_s is not None and expires_in_s > 0:
            until = f", for {expires_in_s:.1f} s more unless renewed"
        elif expires_in_s is not None:
            until = f", whose lease expired {-expires_in_s:.1f} s ago"
        super().__init__(f"the database is in use by {holder}{until}")
        self.holder = holder
        self.expires_in_s = expires_in_s
        self.address = address


class LeaseLost(AgentRuntimeError):
    """This runtime is no longer the one that writes; it has stopped serving."""


class ConfigError(AgentRuntimeError):
    """Configuration that can't be used. `problems` has one line for each fault, with its place and the way out."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class PluginError(AgentRuntimeError):
    """A plugin that could not be loaded, or a hook that raised. Names both."""

    def __init__(self, plugin: str, hook: str | None, problem: str) -> None:
        where = f"plugin {plugin!r}" + (f", hook {hook}" if hook else "")
        super().__init__(f"{where}: {problem}")
        self.plugin = plugin
        self.hook = hook


class RuntimeClosed(AgentRuntimeError):
    """The runtime is closed, or closing."""

    def __init__(self) -> None:
        super().__init__("the runtime is closed")
