"""Databases of the old service: the sample that it wrote itself, and empty ones with its tables, on SQLite and PostgreSQL.

The sample was written by the old service's own code; `sample_given()` is what it was given to keep.
"""

from __future__ import annotations

import gzip
import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from postgres_server import new_schema, server

DATA: Final = Path(__file__).parent / "data"

TABLES: Final = (
    """CREATE TABLE sessions (
        id VARCHAR(36) NOT NULL PRIMARY KEY, title VARCHAR(500), description TEXT, created_at DATETIME NOT NULL,
        last_activity DATETIME NOT NULL, is_active BOOLEAN NOT NULL, deleted_at DATETIME)""",
    """CREATE TABLE messages (
        id VARCHAR(36) NOT NULL PRIMARY KEY, session_db_id VARCHAR(36) NOT NULL, role VARCHAR(50) NOT NULL,
        content TEXT, timestamp DATETIME NOT NULL, name VARCHAR(255), tool_call_id VARCHAR(255), tool_calls TEXT,
        token_count INTEGER, metadata_json TEXT)""",
    """CREATE TABLE agent_contexts (
        id VARCHAR(36) NOT NULL PRIMARY KEY, session_db_id VARCHAR(36) NOT NULL, current_agent VARCHAR(100) NOT NULL,
        created_at DATETIME NOT NULL, updated_at DATETIME NOT NULL, switch_count INTEGER NOT NULL, metadata_json TEXT)""",
    """CREATE TABLE agent_switches (
        id VARCHAR(36) NOT NULL PRIMARY KEY, context_db_id VARCHAR(36) NOT NULL, from_agent VARCHAR(100),
        to_agent VARCHAR(100) NOT NULL, switched_at DATETIME NOT NULL, reason TEXT, metadata_json TEXT)""",
    """CREATE TABLE pending_approvals (
        id VARCHAR(36) NOT NULL PRIMARY KEY, call_id VARCHAR(255) NOT NULL, session_id VARCHAR(255) NOT NULL,
        tool_name VARCHAR(255) NOT NULL, arguments JSON NOT NULL, reason TEXT, created_at DATETIME NOT NULL,
        status VARCHAR(50) NOT NULL)""",
)
"""The old tables, but for what keeps faulty rows out: constraints and foreign keys, which SQLite never checked."""

NAMES: Final = ("sessions", "messages", "agent_contexts", "agent_switches", "pending_approvals")


@cache
def sample_given() -> list[dict[str, Any]]:
    """What the old service was given for the sample."""
    given: list[dict[str, Any]] = json.loads(gzip.decompress((DATA / "codelab-sample.json.gz").read_bytes()))
    return given


def sample_file(directory: Path) -> Path:
    """The sample, as the old service left it."""
    path = directory / "codelab.db"
    path.write_bytes(gzip.decompress((DATA / "codelab-sample.db.gz").read_bytes()))
    return path


@cache
def sample_rows() -> Mapping[str, Sequence[dict[str, Any]]]:
    """The rows of the sample, as SQLite has them."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(gzip.decompress((DATA / "codelab-sample.db.gz").read_bytes()))
        connection.row_factory = sqlite3.Row
        return {name: [dict(row) for row in connection.execute(f"SELECT * FROM {name}")] for name in NAMES}


class OldDatabase:
    """An old database of one kind, at `url`; `path` is SQLite's file."""

    def __init__(self, url: str, *, path: Path | None = None, schema: str | None = None) -> None:
        self.url = url
        self.path = path
        self._schema = schema

    def insert(self, table: str, **row: Any) -> None:
        """Add a row, as the old service would, or as it never should."""
        columns = ", ".join(row)
        if self.path is not None:
            with closing(sqlite3.connect(self.path)) as connection, connection:
                marks = ", ".join("?" * len(row))
                connection.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", tuple(row.values()))
            return
        marks = ", ".join(f"${number}" for number in range(1, len(row) + 1))
        values = [self._typed(table, column, value) for column, value in row.items()]

        async def add(connection: Any) -> None:
            await connection.execute(f"INSERT INTO {self._schema}.{table} ({columns}) VALUES ({marks})", *values)

        server().ask(add)

    @staticmethod
    def _typed(table: str, column: str, value: Any) -> Any:
        if value is not None and (
            column.endswith(("_at", "_activity")) or (table, column) == ("messages", "timestamp")
        ):
            return datetime.fromisoformat(value)
        return bool(value) if column == "is_active" else value

    def contents(self) -> Any:
        """Everything in it, to the letter."""
        if self.path is not None:
            return self.path.read_bytes()
        return [server().rows(f"SELECT * FROM {name} ORDER BY ctid", schema=self._schema) for name in NAMES]


def empty(kind: str, directory: Path) -> OldDatabase:
    """An old database without sessions: `sqlite` or `postgresql`."""
    if kind == "sqlite":
        path = directory / "codelab.db"
        with closing(sqlite3.connect(path)) as connection:
            for statement in TABLES:
                connection.execute(statement)
        return OldDatabase(f"sqlite:///{path}", path=path)
    schema = new_schema()
    tables = (statement.replace("DATETIME", "TIMESTAMP") for statement in TABLES)
    server().execute(f"CREATE SCHEMA {schema}; SET search_path TO {schema}", *tables)
    parts = urlsplit(server().url)
    query = "&".join(filter(None, [parts.query, f"search_path={schema}"]))
    return OldDatabase(urlunsplit(parts._replace(query=query)), schema=schema)


def sample(kind: str, directory: Path) -> OldDatabase:
    """The sample: as the old service wrote it, or the same rows on PostgreSQL."""
    if kind == "sqlite":
        path = sample_file(directory)
        return OldDatabase(f"sqlite:///{path}", path=path)
    database = empty(kind, directory)

    async def fill(connection: Any) -> None:
        await connection.execute(f"SET search_path TO {database._schema}")
        for name, rows in sample_rows().items():
            typed = [[database._typed(name, column, value) for column, value in row.items()] for row in rows]
            await connection.copy_records_to_table(name, records=typed, columns=list(rows[0]))

    server().ask(fill)
    return database
