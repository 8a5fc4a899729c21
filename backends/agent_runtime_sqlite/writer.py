"""The way to the one connection that writes: calls take turns, each is a transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

import anyio

from agent_runtime.bridge import on_cancel

from .database import Database
from .engine import driver_of
from .transaction import SqliteTransaction

__all__ = ["Writer"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Writer:
    """Runs functions in transactions that exclude every other writer of the file."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turn = anyio.Lock(fast_acquire=True)

    async def run(self, function: Callable[[SqliteTransaction, *Ts], Awaitable[T]], *args: *Ts) -> T:
        """Await `function(transaction, *args)` in a transaction: committed when it returns, undone when it raises.

        Cancelling interrupts the running statement and undoes the transaction, unless it is being committed already.
        """
        async with self._turn:
            return await self._database.run(self._transaction, function, args)

    async def truncate_log(self) -> None:
        """See `Database.truncate_log`."""
        async with self._turn:
            await self._database.run(self._database.truncate_log)

    async def _transaction(self, function: Callable[[SqliteTransaction, *Ts], Awaitable[T]], args: tuple[*Ts]) -> T:
        async with self._database.writer() as connection:
            driver = await driver_of(connection)
            with on_cancel(driver.interrupt):
                async with connection.begin():
                    return await function(SqliteTransaction(connection, driver), *args)
