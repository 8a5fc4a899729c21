"""What crosses the storage boundary: flat rows, a column a field.

A storage never meets JSON: every JSON value is text here, to be given back to the letter (so a column of type text, or
`json`; never `jsonb`, which loses key order and number forms). Times are aware and in UTC, with microseconds.

No row refers back to itself, so the garbage collector need not look at them (`gc=False`): with hundreds of thousands in
memory its rounds held the loop for 35 ms, and hold it for 21 ms without them. Rows may be made of their values in the
order of the fields, as a storage finds them: a message so takes 0.07 µs, by keywords two to three times as long.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

__all__ = [
    "ContextRow",
    "DocumentRow",
    "MessageRow",
    "OutcomeRow",
    "QuarantineRow",
    "SessionRow",
    "SwitchRow",
]


class SessionRow(msgspec.Struct, frozen=True, gc=False):
    """A session. Identified by `incarnation`; `session_id` is unique among those not deleted.

    `next_seq` is the seq of the next message, `floor` the seq up to which all messages are cleared,
    `sequence` that of the session's last change.
    """

    incarnation: str
    session_id: str
    user_id: str | None
    title: str | None
    description: str | None
    metadata: str
    created_at: datetime
    last_activity: datetime
    message_count: int
    next_seq: int
    floor: int
    sequence: int


class ContextRow(msgspec.Struct, frozen=True, gc=False):
    """The agent context of a session. Identified by `incarnation`."""

    incarnation: str
    current_agent: str
    switch_count: int
    last_switch_at: datetime | None
    metadata: str
    created_at: datetime
    updated_at: datetime


class MessageRow(msgspec.Struct, frozen=True, gc=False):
    """A message. Identified by (`incarnation`, `seq`).

    Content that is a string is in `content`, content that is a list of parts in `parts` (JSON text); null is neither.
    """

    incarnation: str
    seq: int
    id: str
    role: str
    content: str | None
    parts: str | None
    name: str | None
    tool_calls: str | None
    tool_call_id: str | None
    token_count: int | None
    metadata: str | None
    extra: str | None
    created_at: datetime


class SwitchRow(msgspec.Struct, frozen=True, gc=False):
    """A hand-over. Identified by (`incarnation`, `number`), numbered from 1."""

    incarnation: str
    number: int
    from_agent: str
    to_agent: str
    reason: str | None
    switched_at: datetime
    metadata: str | None


class DocumentRow(msgspec.Struct, frozen=True, gc=False):
    """A document. Identified by (`incarnation`, `collection`, `key`). Either `value` (JSON text) or `data` is set."""

    incarnation: str
    collection: str
    key: str
    value: str | None
    data: bytes | None
    media_type: str | None
    updated_at: datetime


class OutcomeRow(msgspec.Struct, frozen=True, gc=False):
    """What a call with an idempotency key gave. Identified by (`scope`, `key`).

    `scope` is the session's incarnation, or `create` for calls that create sessions. `body_hash` is the SHA-256 of the
    call's arguments; `outcome` is JSON text.
    """

    scope: str
    key: str
    route: str
    body_hash: str
    outcome: str
    sequence: int
    expires_at: datetime


class QuarantineRow(msgspec.Struct, frozen=True, gc=False):
    """A change kept aside. Identified by `sequence`.

    `state` is `rejected` for the change that the database refused, `queued` for a later one of the same session that
    waits behind it. `change` is the encoded `Change`.
    """

    sequence: int
    session_id: str
    incarnation: str
    state: Literal["rejected", "queued"]
    error: str
    change: bytes
    quarantined_at: datetime
