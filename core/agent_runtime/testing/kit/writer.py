"""What the tests are written with: a writer, as the runtime is one, and rows with everything filled in."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from agent_runtime.changes import Batch, Receipt, Touch
from agent_runtime.rows import (
    ContextRow,
    DocumentRow,
    MessageRow,
    OutcomeRow,
    QuarantineRow,
    SessionRow,
    SwitchRow,
)
from agent_runtime.storage import Claim, Fence, Grant, Storage

from .contract import Opener

DAY = timedelta(days=1)
NOON = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)


def claim(holder: str = "the kit", **fields: Any) -> Claim:
    """A claim of this process, which is not known to be dead."""
    defaults: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "duration_s": 60.0}
    return Claim(holder=holder, **(defaults | fields))


class Writer:
    """Applies batches one after the other, as the runtime does. Each is one change."""

    def __init__(self, storage: Storage, grant: Grant) -> None:
        self.storage = storage
        self.fence: Fence = grant.fence
        self.sequence = grant.sequence

    def batch(self, **rows: Any) -> Batch:
        """The batch that would be next."""
        return Batch(after=self.sequence, last=self.sequence + 1, changes=1, sessions=1, **rows)

    async def apply(self, **rows: Any) -> Receipt:
        """Apply the next batch."""
        batch = self.batch(**rows)
        receipt = await self.storage.apply(batch, self.fence)
        self.sequence = batch.last
        return receipt

    async def create(self, incarnation: str, *, messages: int = 0, **columns: Any) -> None:
        """Apply a batch that creates a session with messages 1, 2, …"""
        columns = {"message_count": messages, "next_seq": messages + 1, "sequence": self.sequence + 1} | columns
        await self.apply(
            created=(session_row(incarnation, **columns),),
            contexts=(context_row(incarnation),),
            messages=tuple(message_row(incarnation, seq) for seq in range(1, messages + 1)),
        )

    def touch(self, incarnation: str, **columns: Any) -> Touch:
        """A touch by the batch that would be next."""
        defaults: dict[str, Any] = {"last_activity": NOON, "message_count": 0, "next_seq": 1}
        defaults["sequence"] = self.sequence + 1
        return Touch(incarnation, **(defaults | columns))


@asynccontextmanager
async def writing(opener: Opener, **fields: Any) -> AsyncIterator[Writer]:
    """Open the database, hold its lease, and give both back."""
    async with opener() as storage:
        grant = await storage.leases.acquire(claim(**fields))
        yield Writer(storage, grant)
        await storage.leases.release(grant.fence)


def session_row(incarnation: str, **columns: Any) -> SessionRow:
    """A session; `columns` differ from the usual."""
    defaults: dict[str, Any] = {
        "session_id": f"session {incarnation}",
        "user_id": None,
        "title": None,
        "description": None,
        "metadata": "{}",
        "created_at": NOON,
        "last_activity": NOON,
        "message_count": 0,
        "next_seq": 1,
        "floor": 0,
        "sequence": 1,
    }
    return SessionRow(incarnation=incarnation, **(defaults | columns))


def context_row(incarnation: str, **columns: Any) -> ContextRow:
    """The context of a session; `columns` differ from the usual."""
    defaults: dict[str, Any] = {
        "current_agent": "orchestrator",
        "switch_count": 0,
        "last_switch_at": None,
        "metadata": "{}",
        "created_at": NOON,
        "updated_at": NOON,
    }
    return ContextRow(incarnation=incarnation, **(defaults | columns))


def message_row(incarnation: str, seq: int, **columns: Any) -> MessageRow:
    """A message; `columns` differ from the usual."""
    defaults: dict[str, Any] = {
        "id": f"{incarnation}-{seq}",
        "role": "user",
        "content": f"message {seq}",
        "parts": None,
        "name": None,
        "tool_calls": None,
        "tool_call_id": None,
        "token_count": None,
        "metadata": None,
        "extra": None,
        "created_at": NOON,
    }
    return MessageRow(incarnation=incarnation, seq=seq, **(defaults | columns))


def switch_row(incarnation: str, number: int, **columns: Any) -> SwitchRow:
    """A hand-over; `columns` differ from the usual."""
    defaults: dict[str, Any] = {
        "from_agent": "orchestrator",
        "to_agent": "coder",
        "reason": None,
        "switched_at": NOON,
        "metadata": None,
    }
    return SwitchRow(incarnation=incarnation, number=number, **(defaults | columns))


def document_row(incarnation: str, collection: str, key: str, **columns: Any) -> DocumentRow:
    """A document; `columns` differ from the usual."""
    defaults: dict[str, Any] = {"value": "1", "data": None, "media_type": None, "updated_at": NOON}
    return DocumentRow(incarnation=incarnation, collection=collection, key=key, **(defaults | columns))


def outcome_row(scope: str, key: str, **columns: Any) -> OutcomeRow:
    """An outcome, which expires in a day; `columns` differ from the usual."""
    defaults: dict[str, Any] = {
        "route": "append",
        "body_hash": "0" * 64,
        "outcome": "{}",
        "sequence": 1,
        "expires_at": datetime.now(UTC) + DAY,
    }
    return OutcomeRow(scope=scope, key=key, **(defaults | columns))


def quarantine_row(sequence: int, **columns: Any) -> QuarantineRow:
    """A change in quarantine; `columns` differ from the usual."""
    defaults: dict[str, Any] = {
        "session_id": "session a",
        "incarnation": "a",
        "state": "rejected",
        "error": "refused",
        "change": b"{}",
        "quarantined_at": NOON,
    }
    return QuarantineRow(sequence=sequence, **(defaults | columns))
