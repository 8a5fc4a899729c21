"""`agent-runtime import --format codelab URL`: which rows of an old database are read, and in which order.

Sessions come one by one, by id, with all that belongs to them. What is marked as deleted is left out unless it is asked
for. Rows that belong to nothing that is there are told of at the end; they stay where they are.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from agent_runtime import StorageFatal
from agent_runtime.formats import Entry, ImportRequest, ImportSource

from .database import OldDatabase, Opener, Row, opener
from .rows import OldSession, entry_of, named

__all__ = ["open_source"]

logger: Final = logging.getLogger("agent_runtime.codelab")

_NEEDED: Final = {
    "sessions": ("id", "title", "description", "created_at", "last_activity", "is_active", "deleted_at"),
    "messages": ("id", "session_db_id", "role", "content", "timestamp", "tool_call_id", "tool_calls", "metadata_json"),
    "agent_contexts": ("id", "session_db_id", "current_agent", "created_at", "updated_at", "switch_count"),
    "agent_switches": ("id", "context_db_id", "from_agent", "to_agent", "switched_at", "reason"),
    "pending_approvals": ("id", "session_id", "call_id", "tool_name", "arguments", "created_at", "status"),
}
_ORPHANS: Final = {
    "messages": ("session_db_id", "sessions"),
    "agent_contexts": ("session_db_id", "sessions"),
    "agent_switches": ("context_db_id", "agent_contexts"),
    "pending_approvals": ("session_id", "sessions"),
}
_SESSIONS_PAGE: Final = 200
_ORPHANS_PAGE: Final = 1000


@contextmanager
def open_source(request: ImportRequest) -> Iterator[ImportSource]:
    """An old database as a source of sessions."""
    database = opener(request.source)
    yield ImportSource(name=database.name, entries=_entries(database, request.deleted))


async def _entries(database: Opener, deleted: bool) -> AsyncGenerator[Entry, None]:
    async with database.open() as old:
        await _check_tables(database.name, old)
        left_out = 0
        async for session in _sessions(old):
            if not deleted and _is_deleted(session):
                left_out += 1
                continue
            yield entry_of(database.name, await _whole(old, session))
        if left_out:
            logger.warning(
                "%s: %d session(s) marked as deleted were left out; --deleted restores them", database.name, left_out
            )
        async for table, row, parent in _orphans(old):
            column, _ = _ORPHANS[table]
            problem = f"{column}: there is no {parent} {str(row[column])!r}; the row stays in the old database"
            yield Entry(place=f"{database.name}: {named(table, row)}", problems=[problem])


async def _check_tables(name: str, old: OldDatabase) -> None:
    for table, needed in _NEEDED.items():
        columns = await old.columns(table)
        if not columns:
            raise StorageFatal(f"{name}: is no database of the old service: it has no table {table}")
        if missing := set(needed).difference(columns):
            raise StorageFatal(f"{name}: table {table} has no column {', '.join(sorted(missing))}")


def _is_deleted(session: Row) -> bool:
    return not session["is_active"] or session["deleted_at"] is not None


async def _sessions(old: OldDatabase) -> AsyncGenerator[Row, None]:
    last = ""
    while True:
        rows = await old.rows(f"SELECT * FROM sessions WHERE id > ? ORDER BY id LIMIT {_SESSIONS_PAGE}", last)  # noqa: S608 — a constant
        for row in rows:
            yield row
        if len(rows) < _SESSIONS_PAGE:
            return
        last = rows[-1]["id"]


async def _whole(old: OldDatabase, session: Row) -> OldSession:
    """The session with the rows that belong to it."""

    async def of(table: str, column: str, value: object) -> Sequence[Row]:
        return await old.rows(f"SELECT * FROM {table} WHERE {column} = ? ORDER BY {old.position}", value)  # noqa: S608 — our own names

    contexts = await of("agent_contexts", "session_db_id", session["id"])
    return OldSession(
        session=session,
        messages=await of("messages", "session_db_id", session["id"]),
        contexts=contexts,
        switches=[row for context in contexts for row in await of("agent_switches", "context_db_id", context["id"])],
        approvals=await of("pending_approvals", "session_id", session["id"]),
    )


async def _orphans(old: OldDatabase) -> AsyncGenerator[tuple[str, Row, str], None]:
    """Rows that belong to nothing, each with its table and the one where it should have a row to belong to."""
    for table, (column, parent) in _ORPHANS.items():
        last = ""
        while True:
            rows = await old.rows(
                f"SELECT id, {column} FROM {table} WHERE id > ? AND NOT EXISTS "  # noqa: S608 — our own names
                f"(SELECT 1 FROM {parent} WHERE {parent}.id = {table}.{column}) ORDER BY id LIMIT {_ORPHANS_PAGE}",
                last,
            )
            for row in rows:
                yield table, row, parent
            if len(rows) < _ORPHANS_PAGE:
                break
            last = rows[-1]["id"]
