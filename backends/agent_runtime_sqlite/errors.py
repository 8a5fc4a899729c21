"""Every error of the driver becomes one of the core's here, and only here.

    ChangeRejected       data in a batch is refused and always will be: constraints, types, sizes, encodings
    StorageFatal         corrupt, not a database, read-only, not permitted: a person must act
    StorageUnavailable   all the rest, the unknown included: locked, disk full, input or output failed

Messages are SQLite's own, which name tables and columns but never hold a value; parameters are never shown.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy.exc import DBAPIError

from agent_runtime.errors import AgentRuntimeError, ChangeRejected, StorageFatal, StorageUnavailable

__all__ = ["rejecting", "translated"]

# Primary result codes, by https://www.sqlite.org/rescode.html
_FATAL: Final = {
    sqlite3.SQLITE_CORRUPT: "is damaged: restore a copy, or look at it with `sqlite3 FILE .recover`",
    sqlite3.SQLITE_NOTADB: "is not a SQLite database: choose another path",
    sqlite3.SQLITE_READONLY: "can't be written: give this user the right to write to the file and its directory",
    sqlite3.SQLITE_PERM: "can't be written: give this user the right to write to the file and its directory",
    sqlite3.SQLITE_AUTH: "refuses this user",
}
_UNAVAILABLE: Final = {
    sqlite3.SQLITE_BUSY: "is locked by another program",
    sqlite3.SQLITE_LOCKED: "is locked by another program",
    sqlite3.SQLITE_FULL: "can't grow: the disk is full",
    sqlite3.SQLITE_CANTOPEN: "can't be opened",
    sqlite3.SQLITE_IOERR: "can't be read or written",
}
# SQLITE_ERROR: the statement itself was refused; among rows only what they hold, or a broken schema, can be the reason.
_REJECTED: Final = frozenset(
    {
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_TOOBIG,
        sqlite3.SQLITE_RANGE,
        sqlite3.SQLITE_ERROR,
    }
)


def _driver_error(error: Exception) -> Exception:
    return error.orig if isinstance(error, DBAPIError) and isinstance(error.orig, Exception) else error


def _code(error: Exception) -> int | None:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _shown(error: Exception) -> str:
    if not isinstance(error, sqlite3.Error):
        return type(error).__name__  # its text may hold anything
    name = getattr(error, "sqlite_errorname", None)
    return f"{error} ({name})" if name else str(error)


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Raise what goes wrong inside as StorageFatal or StorageUnavailable, after the database's `name`. Ours pass."""
    try:
        yield
    except AgentRuntimeError:
        raise
    except Exception as exc:
        error = _driver_error(exc)
        code = _code(error)
        if code in _FATAL:
            raise StorageFatal(f"{name} {_FATAL[code]}: {_shown(error)}") from exc
        problem = _UNAVAILABLE.get(code, "failed") if code is not None else "failed"
        raise StorageUnavailable(f"{name} {problem}: {_shown(error)}") from exc


@contextmanager
def rejecting(field: str) -> Iterator[None]:
    """Raise what is refused of the rows written inside as ChangeRejected, naming the field of the batch."""
    try:
        yield
    except Exception as exc:
        error = _driver_error(exc)
        # What Python can't even hand to SQLite: integers beyond 64 bits, lone surrogates, values of other types.
        unfit = isinstance(error, OverflowError | UnicodeEncodeError) or (
            isinstance(error, sqlite3.Error) and str(error).startswith("Error binding parameter")
        )
        if unfit or _code(error) in _REJECTED:
            raise ChangeRejected(f"the database refuses a row of {field}: {_shown(error)}") from exc
        raise
