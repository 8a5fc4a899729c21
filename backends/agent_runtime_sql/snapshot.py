"""Every read there is, on a transaction whose view does not change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import starmap
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import msgspec
from sqlalchemy import Select

from agent_runtime.errors import StorageFatal
from agent_runtime.records import Order
from agent_runtime.rows import (
    ContextRow,
    DocumentRow,
    MessageRow,
    OutcomeRow,
    QuarantineRow,
    SessionRow,
    SwitchRow,
)
from agent_runtime.storage import FirstReads, HeadRead, HeadRows, JournalRow, LeaseRow, MessagesRead, SessionKey

from .apply import partition_row
from .leases import Remaining, lease_row
from .reads import (
    SELECT_COLLECTIONS,
    SELECT_DOCUMENT,
    SELECT_DOCUMENTS,
    SELECT_HEAD,
    SELECT_JOURNAL,
    SELECT_NEWEST_OUTCOMES,
    SELECT_OUTCOME,
    SELECT_QUARANTINE,
    SELECT_SEQUENCE,
    SELECT_SWITCHES,
    select_messages,
    select_outcomes,
    select_sessions,
)
from .transaction import Transaction
from .writes import SEQ_MAX

__all__ = ["Call", "Foreseen", "SqlSnapshot", "foresee"]

Item = TypeVar("Item", bound=msgspec.Struct)
T = TypeVar("T")
P = ParamSpec("P")
_PIECE_ROWS: Final = 1000
_SESSION_COLUMNS: Final = len(SessionRow.__struct_fields__)


class Call(Protocol):
    """How a backend runs a function on the loop of its connections, with the transaction of one snapshot."""

    async def __call__(
        self, function: Callable[Concatenate[Transaction, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Await `function(transaction, *args)`; raises StorageError when the snapshot is closed, or it fails."""


class Foreseen(msgspec.Struct, frozen=True):
    """What was read when a view was taken: its watermark, and what the caller means to read first."""

    watermark: int
    heads: Mapping[HeadRead, HeadRows | None]
    pages: Mapping[MessagesRead, Sequence[MessageRow]]


async def foresee(transaction: Transaction, partition: int, first: FirstReads = ()) -> Foreseen:
    """Read what is to be read first in a view, which fixes it, and the sequence that the partition stands at in it."""
    watermark: int | None = None
    heads: dict[HeadRead, HeadRows | None] = {}
    pages: dict[MessagesRead, Sequence[MessageRow]] = {}
    for read in first:
        if isinstance(read, HeadRead):
            watermark, heads[read] = await _head(transaction, partition, read)
        else:
            pages[read] = await _messages(transaction, partition, read)
    if watermark is None:
        rows = await transaction.fetch(SELECT_SEQUENCE, {"partition": partition})
        watermark = rows[0][0] if rows else 0
    return Foreseen(watermark, heads, pages)


class SqlSnapshot:
    """See `agent_runtime.storage.Snapshot`. Each read is one call on the connection's loop.

    `lease` selects the partition's row for `remaining`.
    """

    def __init__(
        self, call: Call, partition: int, foreseen: Foreseen, *, lease: Select[Any], remaining: Remaining
    ) -> None:
        self._call = call
        self._partition = partition
        self._foreseen = foreseen
        self._lease = lease
        self._remaining = remaining

    @property
    def watermark(self) -> int:
        return self._foreseen.watermark

    async def head(self, session_id: str, *, outcomes_max: int) -> HeadRows | None:
        read = HeadRead(session_id=session_id, outcomes_max=outcomes_max)
        if read in self._foreseen.heads:
            return self._foreseen.heads[read]
        return (await self._call(_head, self._partition, read))[1]

    async def messages(
        self, incarnation: str, *, after: int = 0, before: int | None = None, limit: int, order: Order = "asc"
    ) -> Sequence[MessageRow]:
        read = MessagesRead(incarnation=incarnation, after=after, before=before, limit=limit, order=order)
        for page, rows in self._foreseen.pages.items():
            if (part := _part(page, rows, read)) is not None:
                return part
        return await self._call(_messages, self._partition, read)

    async def switches(self, incarnation: str) -> Sequence[SwitchRow]:
        return await self._rows(SwitchRow, SELECT_SWITCHES, incarnation=incarnation)

    async def document(self, incarnation: str, collection: str, key: str) -> DocumentRow | None:
        return _single(
            await self._rows(DocumentRow, SELECT_DOCUMENT, incarnation=incarnation, collection=collection, key=key)
        )

    async def documents(
        self, incarnation: str, collection: str, *, after: str = "", limit: int
    ) -> Sequence[DocumentRow]:
        place = {"incarnation": incarnation, "collection": collection, "after": after}
        return await self._rows(DocumentRow, SELECT_DOCUMENTS, limit=limit, **place)

    async def collections(self, incarnation: str) -> Sequence[str]:
        return await self._call(_collections, self._partition, incarnation)

    async def sessions(
        self, *, user_id: str | None = None, after: SessionKey | None = None, limit: int, order: Order = "asc"
    ) -> Sequence[SessionRow]:
        statement = select_sessions(order, of_user=user_id is not None, behind=after is not None)
        place = msgspec.structs.asdict(after) if after else {}
        return await self._rows(SessionRow, statement, user_id=user_id, limit=limit, **place)

    async def outcome(self, scope: str, key: str) -> OutcomeRow | None:
        return _single(await self._rows(OutcomeRow, SELECT_OUTCOME, scope=scope, key=key))

    async def outcomes(self, *, after: tuple[str, str] | None = None, limit: int) -> Sequence[OutcomeRow]:
        place = {} if after is None else {"scope": after[0], "key": after[1]}
        return await self._rows(OutcomeRow, select_outcomes(behind=after is not None), limit=limit, **place)

    async def quarantine(self, *, after: int = 0, limit: int) -> Sequence[QuarantineRow]:
        return await self._rows(QuarantineRow, SELECT_QUARANTINE, after=after, limit=limit)

    async def journal(self, journal_id: str) -> JournalRow | None:
        return _single(await self._rows(JournalRow, SELECT_JOURNAL, journal_id=journal_id))

    async def lease(self) -> LeaseRow | None:
        row = await self._call(partition_row, self._partition, self._lease)
        return None if row is None else lease_row(row, self._remaining)

    async def _rows(self, kind: type[Item], statement: Select[Any], **parameters: Any) -> list[Item]:
        return await self._call(_rows, kind, statement, {"partition": self._partition, **parameters})


async def _rows(
    transaction: Transaction, kind: type[Item], statement: Select[Any], parameters: Mapping[str, Any]
) -> list[Item]:
    return await _made(kind, await transaction.fetch(statement, parameters))


async def _messages(transaction: Transaction, partition: int, read: MessagesRead) -> list[MessageRow]:
    parameters = {"partition": partition, **msgspec.structs.asdict(read), "before": _before(read)}
    found = await transaction.fetch(select_messages(read.order), parameters)
    return await _made(partial(MessageRow, read.incarnation), found)


def _before(read: MessagesRead) -> int:
    return SEQ_MAX if read.before is None else read.before


def _part(page: MessagesRead, rows: Sequence[MessageRow], read: MessagesRead) -> Sequence[MessageRow] | None:
    """What `read` finds, if the `rows` of a page that was read before have all of it."""
    same = (page.incarnation, page.order) == (read.incarnation, read.order)
    if not same or read.after < page.after or _before(read) > _before(page):
        return None
    if rows and (min(rows[0].seq, rows[-1].seq) <= read.after or max(rows[0].seq, rows[-1].seq) >= _before(read)):
        found: Sequence[MessageRow] = [row for row in rows if read.after < row.seq < _before(read)]
    else:
        found = rows
    whole = len(rows) < page.limit  # there are no others within the page's bounds
    return found[: read.limit] if whole or len(found) >= read.limit else None


async def _made(make: Callable[..., Item], found: Sequence[Sequence[Any]]) -> list[Item]:
    """The structs of rows, made in pieces between which the event loop is free."""
    rows = list(starmap(make, found[:_PIECE_ROWS]))
    for start in range(_PIECE_ROWS, len(found), _PIECE_ROWS):
        await asyncio.sleep(0)
        rows.extend(starmap(make, found[start : start + _PIECE_ROWS]))
    return rows


async def _head(transaction: Transaction, partition: int, read: HeadRead) -> tuple[int, HeadRows | None]:
    """The sequence that the partition stands at, too: a head is mostly the first thing to be read in a view."""
    found = await transaction.fetch(SELECT_HEAD, {"partition": partition, "session_id": read.session_id})
    if not found:
        return 0, None
    watermark, has_outcomes, *values = found[0]
    if values[0] is None:
        return watermark, None
    session = SessionRow(*values[:_SESSION_COLUMNS])
    if values[_SESSION_COLUMNS] is None:
        raise StorageFatal(f"the database is damaged: the session {read.session_id!r} has no context")
    outcomes: list[OutcomeRow] = []
    if has_outcomes and read.outcomes_max:
        newest = {"scope": session.incarnation, "now": datetime.now(UTC), "limit": read.outcomes_max}
        outcomes = await _rows(transaction, OutcomeRow, SELECT_NEWEST_OUTCOMES, {"partition": partition, **newest})
    return watermark, HeadRows(session=session, context=ContextRow(*values[_SESSION_COLUMNS:]), outcomes=outcomes)


async def _collections(transaction: Transaction, partition: int, incarnation: str) -> list[str]:
    parameters = {"partition": partition, "incarnation": incarnation}
    return [collection for (collection,) in await transaction.fetch(SELECT_COLLECTIONS, parameters)]


def _single(rows: Sequence[Item]) -> Item | None:
    return rows[0] if rows else None
