"""Every error of the driver becomes one of the core's here, and only here, by its SQLSTATE.

    ChangeRejected       data in a batch is refused and always will be: constraints, types, sizes, a trigger's veto
    StorageFatal         credentials, no such database, not permitted, tables that are not ours: a person must act
    StorageUnavailable   all the rest, the unknown included: connection lost, serialization, deadlock, shutting down,
                         too many connections, timeouts, disk full

The server's messages and their details quote values. So of what concerns rows only the SQLSTATE and the names of table,
column and constraint are shown, and the error is raised without its cause, whose text a log would print.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import asyncpg

from agent_runtime.errors import AgentRuntimeError, ChangeRejected, StorageFatal, StorageUnavailable

__all__ = ["is_lost", "rejecting", "translated"]

_POOLED: Final = "as some poolers do: set storage.options.prepared_statements to never"
# Classes and codes, by https://www.postgresql.org/docs/current/errcodes-appendix.html; the longest that fits counts.
_FATAL: Final = {
    "0A": "can't do what agent-runtime needs",
    "28": "refuses this user",
    "3D": "does not exist",
    "3F": "has no such schema",
    "42": "has not the tables of agent-runtime as they were made, or other rights on them",
    "42501": "does not permit it to this user",
    "42P05": f"mixes up the statements that its connections keep, {_POOLED}",
    "XX001": "is damaged",
    "XX002": "is damaged",
}
_UNAVAILABLE: Final = {
    "08": "can't be reached",
    "26000": f"has lost a statement that a connection keeps, {_POOLED} if that goes on",
    "25006": "can't be written: it is a standby, or set to read only",
    "25P03": "ended a transaction that was silent for too long",
    "40": "was busy with another transaction",
    "40P01": "found a deadlock",
    "53": "has not enough resources",
    "53100": "can't grow: the disk is full",
    "53300": "has too many connections",
    "55P03": "has a row locked by somebody else",
    "57": "was interrupted",
    "57014": "took too long",
    "57P01": "is shutting down",
    "57P02": "has crashed",
    "57P03": "is starting or stopping",
}
# Data, integrity, views' checks, sizes; and what a trigger raises, who has seen the row.
_REJECTED: Final = frozenset({"22", "23", "44", "54", "P0001"})
# What the driver can't encode (lone surrogates, too large integers): in arrays that is an error of class 22, its own.
_NOT_ENCODED: Final = (TypeError, OverflowError, UnicodeEncodeError)
_DATA: Final = ("22", "23", "44", "54", "P0")


def _state(error: BaseException) -> str:
    return getattr(error, "sqlstate", None) or ""


def _class(codes: dict[str, str], state: str) -> str | None:
    return codes.get(state) or codes.get(state[:2])


def _shown(error: Exception) -> str:
    """What of an error holds no values."""
    state = _state(error)
    if not isinstance(error, asyncpg.PostgresError):
        return type(error).__name__  # its text may hold anything
    if not state.startswith(_DATA):
        return f"{error.args[0] if error.args else type(error).__name__} ({state})"
    names = {kind: getattr(error, f"{kind}_name", None) for kind in ("table", "column", "constraint")}
    return ", ".join([f"{type(error).__name__} ({state})", *(f"{kind} {name}" for kind, name in names.items() if name)])


def is_lost(error: BaseException) -> bool:
    """Whether the connection is gone with this error, and another one may do better."""
    lost = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError, asyncio.IncompleteReadError)
    return isinstance(error, lost) or _state(error)[:2] in {"08", "57"} or _state(error) == "25P03"


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Raise what goes wrong inside as StorageFatal or StorageUnavailable, after the database's `name`. Ours pass."""
    try:
        yield
    except AgentRuntimeError:
        raise
    except (asyncpg.InvalidCachedStatementError, asyncpg.InvalidBinaryRepresentationError):
        raise StorageUnavailable(f"{name} has altered its tables meanwhile") from None
    except asyncpg.PostgresError as exc:
        state = _state(exc)
        if problem := _class(_FATAL, state):
            raise StorageFatal(f"{name} {problem}: {_shown(exc)}") from None
        raise StorageUnavailable(f"{name} {_class(_UNAVAILABLE, state) or 'failed'}: {_shown(exc)}") from None
    except ssl.SSLError as exc:
        reason = getattr(exc, "verify_message", None) or getattr(exc, "reason", None) or type(exc).__name__
        raise StorageFatal(f"{name} can't be trusted, TLS fails: {reason}") from exc
    except asyncpg.exceptions.ClientConfigurationError as exc:
        raise StorageFatal(f"{name} can't be opened as storage.url asks: {exc.args[0]}") from exc
    except TimeoutError as exc:
        raise StorageUnavailable(f"{name} does not answer in time") from exc
    except OSError as exc:
        raise StorageUnavailable(f"{name} can't be reached: {exc.strerror or exc}") from exc
    except Exception as exc:  # noqa: BLE001 - whatever it is, its text may hold values, and so may its cause's
        raise StorageUnavailable(f"{name} failed: {_shown(exc)}") from None


@contextmanager
def rejecting(field: str) -> Iterator[None]:
    """Raise what is refused of the rows written inside as ChangeRejected, naming the field of the batch."""
    try:
        yield
    except asyncpg.InvalidBinaryRepresentationError:  # the driver's, for columns that are not what they were
        raise
    except Exception as exc:
        state = _state(exc)
        if state in _REJECTED or state[:2] in _REJECTED or isinstance(exc, _NOT_ENCODED):
            raise ChangeRejected(f"the database refuses a row of {field}: {_shown(exc)}") from None
        raise
