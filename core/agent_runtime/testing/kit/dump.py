"""All that can be read of a storage, in one snapshot, page by page."""

from __future__ import annotations

import msgspec

from agent_runtime.rows import (
    ContextRow,
    DocumentRow,
    MessageRow,
    OutcomeRow,
    QuarantineRow,
    SessionRow,
    SwitchRow,
)
from agent_runtime.storage import SessionKey, Snapshot, Storage

COLLECTIONS = ("drafts", "notes")
"""The collections that a dump shows."""

_PAGE = 3


class SessionDump(msgspec.Struct, frozen=True, kw_only=True):
    """One session. `outcomes` are those that have not expired, the newest first."""

    session: SessionRow
    context: ContextRow
    outcomes: list[OutcomeRow]
    messages: list[MessageRow]
    switches: list[SwitchRow]
    documents: list[DocumentRow]


class Dump(msgspec.Struct, frozen=True, kw_only=True):
    """A storage: its sessions in the order of lists."""

    watermark: int
    sessions: list[SessionDump]
    quarantine: list[QuarantineRow]


async def dump(storage: Storage) -> Dump:
    """Read everything."""
    async with storage.snapshot() as snapshot:
        return Dump(
            watermark=snapshot.watermark,
            sessions=[await _session(snapshot, row) for row in await _sessions(snapshot)],
            quarantine=await _quarantine(snapshot),
        )


async def _session(snapshot: Snapshot, row: SessionRow) -> SessionDump:
    head = await snapshot.head(row.session_id, outcomes_max=1000)
    assert head is not None
    assert head.session == row
    return SessionDump(
        session=row,
        context=head.context,
        outcomes=list(head.outcomes),
        messages=await _messages(snapshot, row),
        switches=list(await snapshot.switches(row.incarnation)),
        documents=[document for name in COLLECTIONS for document in await _documents(snapshot, row.incarnation, name)],
    )


async def _sessions(snapshot: Snapshot) -> list[SessionRow]:
    rows: list[SessionRow] = []
    while page := await snapshot.sessions(
        after=SessionKey(rows[-1].created_at, rows[-1].incarnation) if rows else None, limit=_PAGE
    ):
        rows.extend(page)
    return rows


async def _messages(snapshot: Snapshot, session: SessionRow) -> list[MessageRow]:
    rows: list[MessageRow] = []
    while page := await snapshot.messages(
        session.incarnation, after=rows[-1].seq if rows else session.floor, limit=_PAGE
    ):
        rows.extend(page)
    return rows


async def _documents(snapshot: Snapshot, incarnation: str, collection: str) -> list[DocumentRow]:
    rows: list[DocumentRow] = []
    while page := await snapshot.documents(incarnation, collection, after=rows[-1].key if rows else "", limit=_PAGE):
        rows.extend(page)
    return rows


async def _quarantine(snapshot: Snapshot) -> list[QuarantineRow]:
    rows: list[QuarantineRow] = []
    while page := await snapshot.quarantine(after=rows[-1].sequence if rows else 0, limit=_PAGE):
        rows.extend(page)
    return rows
