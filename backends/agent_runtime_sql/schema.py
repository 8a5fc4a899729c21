"""Brings a database to the schema of this code, or says why it can't be.

Migrations are Alembic's, in the folder beside this module, without any ini file. They run in the caller's transaction:
after a failure the database is as before. Alembic is imported only when there is something to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sqlalchemy import Column, Connection, MetaData, Table, Text, inspect, select

from agent_runtime.errors import StorageFatal

from .tables import metadata

__all__ = ["HEAD", "VERSION_TABLE", "is_current", "migrate", "not_current"]

HEAD: Final = "0001"
"""The newest revision in migrations/versions."""

# Not Alembic's own name for it: a database may hold the tables of others, who may use Alembic too.
VERSION_TABLE: Final = "agent_runtime_version"
_version: Final = Table(VERSION_TABLE, MetaData(), Column("version_num", Text))


def _stored_version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.scalar(select(_version.c.version_num))


def is_current(connection: Connection, name: str) -> bool:
    """Whether nothing is to be migrated. `name` is the database's in messages.

    Raises StorageFatal when the tables are not there, and someone else's under a name of ours are.
    """
    stored = _stored_version(connection)
    if stored is None:
        found = inspect(connection)
        taken = sorted(metadata.tables.keys() & {*found.get_table_names(), *found.get_view_names()})
        if taken:
            raise StorageFatal(
                f"{name} holds a table {taken[0]!r} that is not agent-runtime's: "
                "give agent-runtime a database of its own"
            )
    return stored == HEAD


def not_current(name: str) -> StorageFatal:
    """The error for a database whose tables are missing or others, where nothing may be made or migrated."""
    return StorageFatal(
        f"{name} has no tables of agent-runtime, or not those of schema {HEAD}, and this command makes none: is "
        f"storage.url right? agent-runtime serve makes and migrates them; if they are newer than schema {HEAD}, "
        "upgrade agent-runtime"
    )


def migrate(connection: Connection, name: str) -> None:
    """Bring the database to HEAD, inside the transaction that `connection` is in, which excludes other writers.

    Raises StorageFatal as `is_current` does, and when the database is newer than this code.
    """
    if is_current(connection, name):  # another process did it, while this one waited for its transaction
        return

    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    stored = _stored_version(connection)
    if stored is not None and stored not in known:
        raise StorageFatal(
            f"{name} has schema {stored}, newer than schema {HEAD} of this code: upgrade agent-runtime, "
            "or restore a copy of the database from before its upgrade"
        )
    config.attributes["connection"] = connection
    config.attributes["version_table"] = VERSION_TABLE
    command.upgrade(config, HEAD)
