"""The first schema: all tables. As it was then; `agent_runtime_sql.tables` is as it is now."""

from alembic import op
from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    Text,
    text,
)
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

TIME = Text().with_variant(DateTime(timezone=True), "postgresql")
JSON = Text().with_variant(postgresql.JSON(), "postgresql")
LABEL = Text().with_variant(Text(collation="C"), "postgresql")
UNDELETED = text("deleted_at IS NULL")


def _incarnation() -> Column[str]:
    return Column("incarnation", LABEL, ForeignKey("sessions.incarnation"), nullable=False)


def upgrade() -> None:
    op.create_table(
        "partitions",
        Column("partition", Integer, nullable=False, autoincrement=False),
        Column("database_id", Text, nullable=False),
        Column("epoch", BigInteger, nullable=False),
        Column("journal_id", LABEL),
        Column("sequence", BigInteger, nullable=False),
        Column("holder", Text),
        Column("host", Text),
        Column("pid", BigInteger),
        Column("process_started", BigInteger),
        Column("pid_namespace", Text),
        Column("boot_id", Text),
        Column("address", Text),
        Column("acquired_at", TIME),
        Column("expires_at", Float),
        Column("duration_s", Float),
        PrimaryKeyConstraint("partition"),
    )
    op.create_table(
        "journals",
        Column("partition", Integer, nullable=False, autoincrement=False),
        Column("journal_id", LABEL, nullable=False),
        Column("generation", BigInteger, nullable=False),
        Column("previous_generation", BigInteger, nullable=False),
        Column("sequence", BigInteger, nullable=False),
        PrimaryKeyConstraint("partition", "journal_id"),
    )
    op.create_table(
        "sessions",
        Column("incarnation", LABEL, nullable=False),
        Column("partition", Integer, nullable=False),
        Column("session_id", LABEL, nullable=False),
        Column("user_id", LABEL),
        Column("title", Text),
        Column("description", Text),
        Column("metadata", JSON, nullable=False),
        Column("created_at", TIME, nullable=False),
        Column("last_activity", TIME, nullable=False),
        Column("message_count", BigInteger, nullable=False),
        Column("next_seq", BigInteger, nullable=False),
        Column("floor", BigInteger, nullable=False),
        Column("sequence", BigInteger, nullable=False),
        Column("deleted_at", TIME),
        PrimaryKeyConstraint("incarnation"),
    )
    for name, columns, unique in (
        ("sessions_by_id", ["partition", "session_id"], True),
        ("sessions_by_creation", ["partition", "created_at", "incarnation"], False),
        ("sessions_by_user", ["partition", "user_id", "created_at", "incarnation"], False),
    ):
        op.create_index(name, "sessions", columns, unique=unique, sqlite_where=UNDELETED, postgresql_where=UNDELETED)
    op.create_table(
        "contexts",
        _incarnation(),
        Column("current_agent", Text, nullable=False),
        Column("switch_count", BigInteger, nullable=False),
        Column("last_switch_at", TIME),
        Column("metadata", JSON, nullable=False),
        Column("created_at", TIME, nullable=False),
        Column("updated_at", TIME, nullable=False),
        PrimaryKeyConstraint("incarnation"),
    )
    op.create_table(
        "messages",
        _incarnation(),
        Column("seq", BigInteger, nullable=False, autoincrement=False),
        Column("id", Text, nullable=False),
        Column("role", Text, nullable=False),
        Column("content", Text),
        Column("parts", JSON),
        Column("name", Text),
        Column("tool_calls", JSON),
        Column("tool_call_id", Text),
        Column("token_count", BigInteger),
        Column("metadata", JSON),
        Column("extra", JSON),
        Column("created_at", TIME, nullable=False),
        PrimaryKeyConstraint("incarnation", "seq"),
    )
    op.create_table(
        "switches",
        _incarnation(),
        Column("number", BigInteger, nullable=False, autoincrement=False),
        Column("from_agent", Text, nullable=False),
        Column("to_agent", Text, nullable=False),
        Column("reason", Text),
        Column("switched_at", TIME, nullable=False),
        Column("metadata", JSON),
        PrimaryKeyConstraint("incarnation", "number"),
    )
    op.create_table(
        "documents",
        _incarnation(),
        Column("collection", LABEL, nullable=False),
        Column("key", LABEL, nullable=False),
        Column("value", JSON),
        Column("data", LargeBinary),
        Column("media_type", Text),
        Column("updated_at", TIME, nullable=False),
        PrimaryKeyConstraint("incarnation", "collection", "key"),
    )
    op.create_table(
        "outcomes",
        Column("partition", Integer, nullable=False, autoincrement=False),
        Column("scope", LABEL, nullable=False),
        Column("key", LABEL, nullable=False),
        Column("route", Text, nullable=False),
        Column("body_hash", Text, nullable=False),
        Column("outcome", JSON, nullable=False),
        Column("sequence", BigInteger, nullable=False),
        Column("expires_at", TIME, nullable=False),
        PrimaryKeyConstraint("partition", "scope", "key"),
    )
    op.create_index("outcomes_by_sequence", "outcomes", ["partition", "scope", "sequence"])
    op.create_index("outcomes_by_expiry", "outcomes", ["partition", "expires_at"])
    op.create_table(
        "quarantine",
        Column("partition", Integer, nullable=False, autoincrement=False),
        Column("sequence", BigInteger, nullable=False, autoincrement=False),
        Column("session_id", LABEL, nullable=False),
        Column("incarnation", LABEL, nullable=False),
        Column("state", Text, nullable=False),
        Column("error", Text, nullable=False),
        Column("change", LargeBinary, nullable=False),
        Column("quarantined_at", TIME, nullable=False),
        PrimaryKeyConstraint("partition", "sequence"),
    )
    op.create_table(
        "purges",
        Column("partition", Integer, nullable=False, autoincrement=False),
        Column("incarnation", LABEL, nullable=False),
        Column("floor", BigInteger),
        PrimaryKeyConstraint("partition", "incarnation"),
    )
