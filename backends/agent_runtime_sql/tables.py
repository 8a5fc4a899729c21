"""The tables, a column for each field of `agent_runtime.rows`, so that a person can query them with plain SQL.

They are made and changed by the migrations only; a test compares the two.

- `sessions` carry the tombstone: a session with `deleted_at` is seen by nobody; its id is free for another one.
- `contexts`, `messages`, `switches`, `documents` belong to a session by its incarnation, and by it to a partition.
- `partitions` has the one row that every batch, every lease and every takeover updates first: writers exclude each
  other there. `journals` keeps how far each journal has been stored.
- `purges` is the list of what to delete for good: everything of an incarnation, or its messages up to `floor`.

Three types differ between databases, and say so here, by `TypeEngine.with_variant`:

- `Time`: text that sorts where there is nothing better, `timestamptz` on PostgreSQL.
- `Json`: text, to the letter. On SQLite in a column of text, as one of type JSON has numeric affinity and turns 1e2
  into 100; on PostgreSQL in one of type `json`, which keeps what it was given, where `jsonb` would not. (SQLAlchemy's
  type parses and rewrites values; it has no part in these, as the driver takes and gives text.)
- `Label`: text that is compared, by code points. It is SQLite's way; PostgreSQL's default is that of a language.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

import msgspec
from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
)

__all__ = [
    "UtcTime",
    "contexts",
    "documents",
    "fixed_time_text",
    "journals",
    "messages",
    "metadata",
    "outcomes",
    "partitions",
    "purges",
    "quarantine",
    "sessions",
    "switches",
    "time_text",
]


def time_text(value: datetime) -> str:
    """An aware time in UTC in one fixed form that sorts by time: `2026-11-23T03:03:40.568500Z`."""
    # msgspec's form, at a tenth of the time of isoformat(), but it leaves out a fraction of zero.
    return fixed_time_text(msgspec.to_builtins(value))


def fixed_time_text(text: str) -> str:
    """The fixed form of a time in UTC in msgspec's form. Raises ValueError when it is not in UTC."""
    if not text.endswith("Z"):
        raise ValueError("a time that is not in UTC")
    return text if len(text) == 27 else text[:19] + ".000000Z"


class UtcTime(TypeDecorator[datetime]):
    """A time in the form of `time_text`, for databases without a type that keeps microseconds and zone."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        return None if value is None else time_text(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> datetime | None:
        return None if value is None else datetime.fromisoformat(value)


Time: Final = UtcTime().with_variant(DateTime(timezone=True), "postgresql")
Json: Final = Text().with_variant(JSON(), "postgresql")
Label: Final = Text().with_variant(Text(collation="C"), "postgresql")

metadata: Final = MetaData()

partitions: Final = Table(
    "partitions",
    metadata,
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("database_id", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("journal_id", Label),
    Column("sequence", BigInteger, nullable=False),
    Column("holder", Text),
    Column("host", Text),
    Column("pid", BigInteger),
    Column("process_started", BigInteger),
    Column("pid_namespace", Text),
    Column("boot_id", Text),
    Column("address", Text),
    Column("acquired_at", Time),
    # By the clock that the backend grants leases by; on SQLite seconds since the boot that boot_id names.
    Column("expires_at", Float),
    Column("duration_s", Float),
)

journals: Final = Table(
    "journals",
    metadata,
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("journal_id", Label, primary_key=True),
    Column("generation", BigInteger, nullable=False),
    Column("previous_generation", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
)

sessions: Final = Table(
    "sessions",
    metadata,
    Column("incarnation", Label, primary_key=True),
    Column("partition", Integer, nullable=False),
    Column("session_id", Label, nullable=False),
    Column("user_id", Label),
    Column("title", Text),
    Column("description", Text),
    Column("metadata", Json, nullable=False),
    Column("created_at", Time, nullable=False),
    Column("last_activity", Time, nullable=False),
    Column("message_count", BigInteger, nullable=False),
    Column("next_seq", BigInteger, nullable=False),
    Column("floor", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("deleted_at", Time),
)
_undeleted: Final = sessions.c.deleted_at.is_(None)
Index(
    "sessions_by_id",
    sessions.c.partition,
    sessions.c.session_id,
    unique=True,
    sqlite_where=_undeleted,
    postgresql_where=_undeleted,
)
Index(
    "sessions_by_creation",
    sessions.c.partition,
    sessions.c.created_at,
    sessions.c.incarnation,
    sqlite_where=_undeleted,
    postgresql_where=_undeleted,
)
Index(
    "sessions_by_user",
    sessions.c.partition,
    sessions.c.user_id,
    sessions.c.created_at,
    sessions.c.incarnation,
    sqlite_where=_undeleted,
    postgresql_where=_undeleted,
)


def _incarnation() -> Column[str]:
    return Column("incarnation", Label, ForeignKey(sessions.c.incarnation), primary_key=True)


contexts: Final = Table(
    "contexts",
    metadata,
    _incarnation(),
    Column("current_agent", Text, nullable=False),
    Column("switch_count", BigInteger, nullable=False),
    Column("last_switch_at", Time),
    Column("metadata", Json, nullable=False),
    Column("created_at", Time, nullable=False),
    Column("updated_at", Time, nullable=False),
)

messages: Final = Table(
    "messages",
    metadata,
    _incarnation(),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("id", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("content", Text),
    Column("parts", Json),
    Column("name", Text),
    Column("tool_calls", Json),
    Column("tool_call_id", Text),
    Column("token_count", BigInteger),
    Column("metadata", Json),
    Column("extra", Json),
    Column("created_at", Time, nullable=False),
)

switches: Final = Table(
    "switches",
    metadata,
    _incarnation(),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("from_agent", Text, nullable=False),
    Column("to_agent", Text, nullable=False),
    Column("reason", Text),
    Column("switched_at", Time, nullable=False),
    Column("metadata", Json),
)

documents: Final = Table(
    "documents",
    metadata,
    _incarnation(),
    Column("collection", Label, primary_key=True),
    Column("key", Label, primary_key=True),
    Column("value", Json),
    Column("data", LargeBinary),
    Column("media_type", Text),
    Column("updated_at", Time, nullable=False),
)

outcomes: Final = Table(
    "outcomes",
    metadata,
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("scope", Label, primary_key=True),
    Column("key", Label, primary_key=True),
    Column("route", Text, nullable=False),
    Column("body_hash", Text, nullable=False),
    Column("outcome", Json, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("expires_at", Time, nullable=False),
)
Index("outcomes_by_sequence", outcomes.c.partition, outcomes.c.scope, outcomes.c.sequence)
Index("outcomes_by_expiry", outcomes.c.partition, outcomes.c.expires_at)

quarantine: Final = Table(
    "quarantine",
    metadata,
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("session_id", Label, nullable=False),
    Column("incarnation", Label, nullable=False),
    Column("state", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("change", LargeBinary, nullable=False),
    Column("quarantined_at", Time, nullable=False),
)

purges: Final = Table(
    "purges",
    metadata,
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("incarnation", Label, primary_key=True),
    Column("floor", BigInteger),
)
