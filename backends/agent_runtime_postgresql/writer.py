"""The way to the connection that writes: calls take turns, each is a transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

import anyio

from .database import Database
from .transaction import PostgresqlTransaction

__all__ = ["Writer"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Writer:
    """Runs functions in transactions, one at a time: those of one runtime would wait for the partition's row anyway."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turn = anyio.Lock(fast_acquire=True)

    @property
    def in_use(self) -> int:
        """How many connections it uses."""
        return int(self._turn.locked())

    def heed_lease(self, duration_s: float) -> None:
        """See `Database.heed_lease`."""
        self._database.heed_lease(duration_s)

    async def run(self, function: Callable[[PostgresqlTransaction, *Ts], Awaitable[T]], *args: *Ts) -> T:
        """Await `function(transaction, *args)` in a transaction: committed when it returns, undone when it raises.

        Cancelling ends the running statement and undoes the transaction, unless it is being committed already.
        """
        async with self._turn:
            return await self._database.run(self._transaction, function, args)

    async def _transaction(self, function: Callable[[PostgresqlTransaction, *Ts], Awaitable[T]], args: tuple[*Ts]) -> T:
        async with self._database.transaction() as transaction:
            return await function(transaction, *args)
