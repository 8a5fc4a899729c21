"""A model of the old service: written anew, with nothing left but its faults and what they need to show.

It keeps every session in memory and writes the changed ones to SQLite now and then, each as a whole: all rows of its
messages away, and all of them again. What it does wrong is marked with the fault's number in `test_codelab_faults.py`.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import anyio
import anyio.lowlevel

from old_database import TABLES

__all__ = ["OldService", "journal_mode", "messages_in"]

logger: Final = logging.getLogger("old_service")


class OldService:
    """The old managers in one: sessions, contexts, approvals."""

    def __init__(self, path: Path) -> None:
        # 11: SQLite does not know this parameter, and nobody looks what became of it.
        self._database = sqlite3.connect(f"{path.as_uri()}?journal_mode=WAL", uri=True, timeout=0.1)
        self._database.row_factory = sqlite3.Row
        self._sessions: dict[str, list[dict[str, Any]]] = {}
        self._metadata: dict[str, dict[str, Any]] = {}
        self._created_at: dict[str, datetime] = {}
        self._changed: set[str] = set()
        self._changed_contexts: set[str] = set()
        self._lock = anyio.Lock()
        self._has_writer = False
        self._writing: anyio.CancelScope | None = None
        self.before_write: Callable[[str], Any] | None = None
        """What happens before a session is written: for tests, to fail or to take its time."""

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path) -> AsyncIterator[OldService]:
        """The service on a file, from start-up to shutdown."""
        service = cls(path)
        try:
            service._start()
            yield service
            await service._shut_down()
        finally:
            service._database.close()

    def _start(self) -> None:
        try:
            for statement in TABLES:
                self._database.execute(statement.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
            with suppress(sqlite3.OperationalError):
                self._database.execute("CREATE UNIQUE INDEX one_call ON pending_approvals (call_id)")
            for row in self._database.execute("SELECT * FROM sessions WHERE is_active = 1 AND deleted_at IS NULL"):
                self._sessions[row["id"]] = [
                    # 1: the class of messages has no tool_calls, and wants a text.
                    {"role": message["role"], "content": message["content"] or "", "name": message["name"]}
                    for message in self._rows(row["id"])
                ]
            for row in self._database.execute("SELECT * FROM agent_contexts"):
                self._metadata[row["session_db_id"]] = json.loads(row["metadata_json"] or "{}")
                self._created_at[row["session_db_id"]] = datetime.fromisoformat(row["created_at"])  # 8: naive
            self._has_writer = True
        except sqlite3.Error as error:
            logger.error("start-up failed, going on with an empty cache: %s", error)  # 12: and without a writer

    async def _shut_down(self) -> None:
        if self._writing is not None:
            self._writing.cancel()  # 3: what the writer has in hand is in no list any more
            await anyio.lowlevel.checkpoint()
        changed, self._changed = self._changed, set()
        for session_id in changed:
            await self._save(session_id)
        for session_id in self._changed_contexts:
            self._save_context(session_id)

    async def flush(self) -> None:
        """A turn of the background writer, which comes every five seconds."""
        if not self._has_writer:
            return
        with anyio.CancelScope() as self._writing:
            async with self._lock:
                changed, self._changed = sorted(self._changed), set()  # 2: forgotten before they are written
            try:
                for session_id in changed:
                    await self._save(session_id)
                for session_id in sorted(self._changed_contexts):
                    self._save_context(session_id)
                self._changed_contexts.clear()
            except (sqlite3.Error, OSError) as error:
                logger.error("the background writer failed: %s", error)
        self._writing = None

    # Sessions

    async def create(self, session_id: str) -> None:
        async with self._lock:
            if session_id in self._sessions:
                raise ValueError(f"Session {session_id} already exists")
            self._sessions[session_id] = []
        try:
            await self._save(session_id)  # 5: all that the database has of it is replaced by nothing
        except (sqlite3.Error, OSError) as error:
            logger.error("not saved: %s", error)

    async def get_or_create(self, session_id: str) -> None:
        if session_id not in self._sessions:  # 4: looked at outside of the lock
            await self.create(session_id)

    async def append(self, session_id: str, message: dict[str, Any]) -> None:
        async with self._lock:
            self._sessions[session_id].append(message)
            self._changed.add(session_id)

    async def delete(self, session_id: str) -> None:
        self._sessions.pop(session_id, None)
        self._changed.discard(session_id)
        with self._database as database:
            now = str(datetime.now(UTC).replace(tzinfo=None))
            database.execute("UPDATE sessions SET is_active = 0, deleted_at = ? WHERE id = ?", (now, session_id))

    async def history(self, session_id: str) -> list[dict[str, Any]]:
        return self._sessions.get(session_id, [])

    async def history_for_endpoint(self, session_id: str) -> list[dict[str, Any]]:
        """What an endpoint with a database session of its own reads: 13, around the cache."""
        return [{"role": row["role"], "content": row["content"]} for row in self._rows(session_id)]

    # Contexts

    async def create_context(self, session_id: str) -> None:
        self._metadata[session_id] = {}
        self._created_at[session_id] = datetime.now(UTC)
        self._save_context(session_id)

    async def set_metadata(self, session_id: str, key: str, value: Any) -> None:
        """What callers did: 9, the context hands out its own dict, and does not know that it was changed."""
        self._metadata[session_id][key] = value

    async def metadata(self, session_id: str) -> dict[str, Any]:
        return self._metadata[session_id]

    async def cleanup(self, max_age: timedelta) -> int:
        """Delete what is older."""
        now = datetime.now(UTC)
        old = [each for each, created_at in self._created_at.items() if now - created_at > max_age]  # 8
        for session_id in old:
            await self.delete(session_id)
        return len(old)

    # Approvals

    async def request_approval(self, session_id: str, call_id: str) -> None:
        now = str(datetime.now(UTC).replace(tzinfo=None))
        try:
            with self._database as database:
                database.execute(
                    "INSERT INTO pending_approvals VALUES (?, ?, ?, 'tool', '{}', NULL, ?, 'pending')",
                    (str(uuid4()), call_id, session_id, now),
                )
        except sqlite3.IntegrityError as error:
            logger.error("not added: %s", error)  # 7: one call_id for all sessions

    async def approvals(self, session_id: str) -> list[str]:
        """The call ids of those that wait, read from the database itself."""
        rows = self._database.execute("SELECT call_id FROM pending_approvals WHERE session_id = ?", (session_id,))
        return [row["call_id"] for row in rows]

    async def approvals_in_a_request(self, session_id: str) -> list[str]:
        """What a request is told, by a function that is not asynchronous."""
        return self._approvals_now(session_id)

    def _approvals_now(self, session_id: str) -> list[str]:
        try:
            anyio.lowlevel.current_token()
        except anyio.NoEventLoopError:
            return anyio.run(self.approvals, session_id)
        return []  # 10: within a running loop nothing can be awaited from here

    # The database

    def _rows(self, session_id: str) -> list[sqlite3.Row]:
        statement = "SELECT * FROM messages WHERE session_db_id = ? ORDER BY timestamp, rowid"
        return self._database.execute(statement, (session_id,)).fetchall()

    async def _save(self, session_id: str) -> None:
        if self.before_write is not None:
            await self.before_write(session_id)
        messages = self._sessions[session_id]
        now = str(datetime.now(UTC).replace(tzinfo=None))
        with self._database as database:
            if database.execute("SELECT 1 FROM sessions WHERE id = ?", (session_id,)).fetchone() is None:
                columns = "(id, created_at, last_activity, is_active)"
                database.execute(f"INSERT INTO sessions {columns} VALUES (?, ?, ?, 1)", (session_id, now, now))
            else:  # 6: what is marked as deleted stays so
                database.execute("UPDATE sessions SET last_activity = ? WHERE id = ?", (now, session_id))
            database.execute("DELETE FROM messages WHERE session_db_id = ?", (session_id,))
            for message in messages:
                calls = message.get("tool_calls")
                database.execute(
                    "INSERT INTO messages (id, session_db_id, role, content, timestamp, name, tool_call_id, tool_calls) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        str(uuid4()),
                        session_id,
                        message["role"],
                        message["content"],
                        str(datetime.now(UTC).replace(tzinfo=None)),
                        message.get("name"),
                        message.get("tool_call_id"),
                        None if calls is None else json.dumps(calls),
                    ),
                )

    def _save_context(self, session_id: str) -> None:
        with self._database as database:
            database.execute("DELETE FROM agent_contexts WHERE session_db_id = ?", (session_id,))
            created_at = self._created_at[session_id].replace(tzinfo=None)
            database.execute(
                "INSERT INTO agent_contexts VALUES (?, ?, 'orchestrator', ?, ?, 0, ?)",
                (str(uuid4()), session_id, str(created_at), str(created_at), json.dumps(self._metadata[session_id])),
            )


def journal_mode(path: Path) -> str:
    """The journal mode of a file."""
    return str(_asked(path, "PRAGMA journal_mode"))


def messages_in(path: Path) -> int:
    """How many messages are in a file."""
    return int(_asked(path, "SELECT count(*) FROM messages"))


def _asked(path: Path, statement: str) -> Any:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchone()[0]
