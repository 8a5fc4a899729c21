"""Brings the tables to this code's schema when storages open, several processes at the same time included.

SQLAlchemy, which Alembic needs, borrows a connection that is in a transaction already, and begins none of its own. So
the advisory lock, the migration and its record are one transaction, whatever stands between us and the server.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from agent_runtime_sql.schema import HEAD, VERSION_TABLE, migrate

from .database import connect
from .pool import Driver
from .settings import Settings

__all__ = ["is_current", "migrate_alone"]

_LOCK: Final = 0x6167656E74727400
"""The key of the advisory lock, in ASCII: agentrt."""
_WAIT_MS: Final = 60_000


async def is_current(driver: Driver) -> bool:
    """Whether nothing is to be migrated."""
    if await driver.fetchval("SELECT to_regclass($1)", VERSION_TABLE) is None:
        return False
    stored: str | None = await driver.fetchval(f"SELECT version_num FROM {VERSION_TABLE}")  # noqa: S608 - a constant
    return stored == HEAD


async def migrate_alone(settings: Settings, begin: str) -> None:
    """Migrate, while nobody else does; whoever waited finds nothing to do.

    Raises what `agent_runtime_sql.schema.migrate` raises, and what the driver does.
    """
    driver = await connect(settings)
    try:
        await driver.execute(f"{begin}; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = {_WAIT_MS}")
        await driver.execute(f"SELECT pg_advisory_xact_lock({_LOCK})", timeout=2 * _WAIT_MS / 1000)
        if settings.schema is not None and not await _has_schema(driver, settings.schema):
            await driver.execute(f'CREATE SCHEMA "{settings.schema}"')
        async with _borrowing(driver).connect() as connection:
            await connection.run_sync(migrate, settings.name)
            await driver.execute("COMMIT")
    finally:
        driver.terminate()


async def _has_schema(driver: Driver, schema: str) -> bool:
    """By the table itself: IF NOT EXISTS goes by what the connection knew before it waited for the lock."""
    found: int = await driver.fetchval("SELECT count(*) FROM pg_catalog.pg_namespace WHERE nspname = $1", schema)
    return found > 0


def _borrowing(driver: Driver) -> AsyncEngine:
    """An engine whose one connection this is, until it closes it."""

    async def borrow(*_: Any, **__: Any) -> Driver:
        return driver

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=borrow,
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,
        connect_args={"prepared_statement_cache_size": 0, "prepared_statement_name_func": str},
    )
