"""What the storage is measured against: SQLAlchemy Core on the same tables, under the same pragmas, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, select

from agent_runtime_sql.tables import messages

__all__ = ["insert_messages", "plain_engine", "select_messages"]

_PRAGMAS = ("journal_mode=wal", "synchronous=full", "fullfsync=1", "foreign_keys=1")


def plain_engine(path: Path) -> Engine:
    """An engine of the synchronous driver: there is no faster one, as it needs no thread."""
    engine = create_engine(f"sqlite:///{path}", connect_args={"isolation_level": None})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: object) -> None:
        with closing(connection.cursor()) as cursor:
            for pragma in _PRAGMAS:
                cursor.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def insert_messages(engine: Engine, rows: Sequence[dict[str, Any]]) -> None:
    """One transaction, one executemany."""
    with engine.begin() as connection:
        connection.execute(insert(messages), rows)


def select_messages(engine: Engine, incarnation: str, limit: int) -> int:
    """The first messages of a session, every column of them; how many there are."""
    query = select(messages).where(messages.c.incarnation == incarnation).order_by(messages.c.seq).limit(limit)
    with engine.connect() as connection:
        return len(connection.execute(query).all())
