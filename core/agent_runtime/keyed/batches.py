"""What a batch writes, and what a purge deletes, planned on a view of the moment before."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from msgspec.structs import asdict, replace

from ..changes import Batch
from ..errors import ChangeRejected
from ..rows import OutcomeRow, SessionRow
from .engine import View
from .layout import BELONGINGS, Purge, Writes, behind, expiry_key, key, outcome_key, session_keys, span, unpack

__all__ = ["plan_batch", "plan_purge"]

_PAGE: Final = 100


async def plan_batch(view: View, partition: int, batch: Batch, writes: Writes) -> None:
    """Write the rows of a batch.

    Raises:
        ChangeRejected: a row is there that must not be, or a session is not there that must be.
    """
    await _write_sessions(view, partition, batch, writes)
    inserted: dict[bytes, object] = {key(partition, "message", row.incarnation, row.seq): row for row in batch.messages}
    inserted |= {key(partition, "switch", row.incarnation, row.number): row for row in batch.switches}
    inserted |= {key(partition, "quarantine", row.sequence): row for row in batch.quarantined}
    outcomes = {outcome_key(partition, row): row for row in batch.outcomes}
    writes.deletes.update(key(partition, "quarantine", sequence) for sequence in batch.discharged)
    writes.deletes.update(key(partition, "message", *place) for place in batch.removed)
    writes.deletes.update(key(partition, "document", *place) for place in batch.discarded)
    found = await view.get([*inserted, *outcomes])
    if any(place in inserted and place not in writes.deletes for place in found):
        raise ChangeRejected("the batch inserts a row that is there already")
    for place, value in found.items():
        if place in outcomes:
            writes.deletes.add(expiry_key(partition, unpack(value, OutcomeRow)))
    for place, row in {**inserted, **outcomes}.items():
        writes.put(place, row)
    for outcome in batch.outcomes:
        writes.put(expiry_key(partition, outcome), outcome_key(partition, outcome))
    for context in batch.contexts:
        writes.put(key(partition, "context", context.incarnation), context)
    for document in batch.documents:
        writes.put(key(partition, "document", document.incarnation, document.collection, document.key), document)


async def _write_sessions(view: View, partition: int, batch: Batch, writes: Writes) -> None:
    belonging = {
        row.incarnation for rows in (batch.contexts, batch.switches, batch.messages, batch.documents) for row in rows
    }
    there = {
        *batch.deleted,
        *(row.incarnation for row in batch.touched),
        *(each for each, _ in (*batch.edited, *batch.cleared)),
    }
    created = {row.incarnation for row in batch.created}
    pointers = await view.get([key(partition, "incarnation", each) for each in belonging | there | created])
    rows = [unpack(value, SessionRow) for value in (await view.get(set(pointers.values()))).values()]
    sessions = {row.incarnation: row for row in rows}
    taken = await view.get([key(partition, "id", row.session_id) for row in batch.created])
    try:
        for incarnation in batch.deleted:
            writes.deletes.update(session_keys(partition, sessions.pop(incarnation)))
            writes.put(key(partition, "purge", incarnation), Purge(incarnation, None))
        for row in batch.created:
            place = key(partition, "id", row.session_id)
            if row.incarnation in sessions or (place in taken and place not in writes.deletes):
                raise ChangeRejected("the batch creates a session that is there already")
            sessions[row.incarnation] = row
        for touch in batch.touched:
            sessions[touch.incarnation] = replace(sessions[touch.incarnation], **asdict(touch))
        for incarnation, details in batch.edited:
            sessions[incarnation] = replace(sessions[incarnation], **asdict(details))
        for incarnation, floor in batch.cleared:
            sessions[incarnation] = replace(sessions[incarnation], floor=floor)
            writes.put(key(partition, "purge", incarnation), Purge(incarnation, floor))
        for incarnation in (there - set(batch.deleted)) | created:
            for place, value in session_keys(partition, sessions[incarnation]).items():
                writes.put(place, value)
        if not belonging <= sessions.keys():
            raise KeyError
    except KeyError:
        raise ChangeRejected("the batch has a row of a session that is not there") from None


async def plan_purge(view: View, partition: int, now: datetime, rows_max: int, writes: Writes) -> int:
    """Delete up to `rows_max` rows that nobody sees; how many they are."""
    rows = 0
    expired = await view.scan(span(key(partition, "expiry"))[0], behind(key(partition, "expiry", now)), limit=rows_max)
    for entry, outcome in expired:
        writes.deletes |= {entry, outcome}
        rows += 1
    start, end = span(key(partition, "purge"))
    while rows < rows_max and (entries := await view.scan(start, end, limit=_PAGE)):
        for entry, value in entries:
            rows += await _purge(view, partition, unpack(value, Purge), rows_max - rows, writes)
            if rows == rows_max:
                break
            writes.deletes.add(entry)
        start = behind(entries[-1][0])
    return rows


async def _purge(view: View, partition: int, purge: Purge, rows_max: int, writes: Writes) -> int:
    rows = 0
    for kind in BELONGINGS if purge.floor is None else ("message",):
        start = key(partition, kind, purge.incarnation)
        end = behind(start if purge.floor is None else key(partition, kind, purge.incarnation, purge.floor))
        found = await view.scan(start, end, limit=rows_max - rows)
        writes.deletes.update(place for place, _ in found)
        rows += len(found)
    return rows
