"""Changes and batches: nothing is lost on the wire, and it does not matter how the log is cut into batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec import Raw
from msgspec.structs import replace

from agent_runtime.changes import (
    Batch,
    Birth,
    Change,
    Coalescer,
    Details,
    EncodedMessage,
    coalesce,
    decode_change,
    encode_change,
    encoded_message,
    message_row,
)
from agent_runtime.records import ROLES, Message
from agent_runtime.storage import StorageConfig
from agent_runtime.testing.kit import values
from agent_runtime.testing.kit.dump import Dump, dump
from agent_runtime.testing.kit.world import Call, World, calls
from agent_runtime.testing.kit.writer import NOON, Writer, claim
from agent_runtime.testing.kit.writer import message_row as a_message_row
from agent_runtime_memory import MemoryDatabase

pytestmark = pytest.mark.anyio

ROW_FIELDS = [name for name in Batch.__struct_fields__ if name not in ("after", "last", "changes", "sessions")]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | values.texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(values.texts, inner, max_size=3),
    max_leaves=5,
)
json_objects = st.dictionaries(values.texts, json_values, max_size=3)
messages = st.builds(
    Message,
    seq=st.integers(1, values.LARGE),
    id=values.labels,
    role=st.sampled_from(ROLES),
    content=st.none() | values.texts | st.lists(json_values, max_size=3),
    name=st.none() | values.labels,
    tool_calls=st.none() | st.lists(json_objects, max_size=2),
    tool_call_id=st.none() | values.texts,
    token_count=st.none() | values.counts,
    metadata=st.none() | json_objects,
    extra=st.none() | json_objects,
    created_at=values.times,
)
documents_without_both = values.documents.filter(lambda row: row.value is None or row.data is None)
changes = st.builds(
    Change,
    sequence=values.counts,
    previous=values.counts,
    session_id=values.labels,
    incarnation=values.labels,
    last_activity=values.times,
    message_count=values.counts,
    next_seq=values.counts,
    birth=st.none() | st.builds(Birth, values.times, st.none() | values.labels),
    details=st.none() | st.builds(Details, st.none() | values.texts, st.none() | values.texts, values.json_texts),
    context=st.none() | values.contexts,
    messages=st.lists(messages.map(msgspec.json.encode).map(Raw), max_size=3).map(tuple),
    removed=st.lists(values.counts, max_size=3).map(tuple),
    floor=st.none() | values.counts,
    switches=st.lists(values.switches, max_size=2).map(tuple),
    documents=st.lists(documents_without_both, max_size=2).map(tuple),
    discarded=st.lists(st.tuples(values.labels, values.labels), max_size=2).map(tuple),
    deleted=st.booleans(),
    outcome=st.none() | values.outcomes,
    resolves=st.none() | values.counts,
    void=st.booleans(),
)
relaxed = settings(deadline=None)
few = settings(deadline=None, max_examples=60)


def perform(log: Iterable[Call]) -> tuple[World, list[Change]]:
    world = World()
    return world, [world.perform(call) for call in log]


def row_fields(batch: Batch) -> dict[str, tuple[Any, ...]]:
    return {name: getattr(batch, name) for name in ROW_FIELDS}


async def stored(batches: Iterable[Batch]) -> Dump:
    """What a database shows that was given these batches."""
    async with MemoryDatabase().open(StorageConfig(url="memory:")) as storage:
        writer = Writer(storage, await storage.leases.acquire(claim()))
        for batch in batches:
            await storage.apply(batch, writer.fence)
        return await dump(storage)


# --- on the wire ------------------------------------------------------------------------------------------------------


@given(message=messages)
@relaxed
def test_a_message_survives_as_a_row_byte_for_byte(message: Message) -> None:
    encoded = msgspec.json.encode(message)
    row = message_row("a", Raw(encoded))
    assert row.incarnation == "a"
    assert encoded_message(row) == encoded
    assert row.content == (message.content if isinstance(message.content, str) else None)
    parts = None if row.parts is None else msgspec.json.decode(row.parts)
    assert parts == (message.content if isinstance(message.content, list) else None)


@given(row=values.messages)
@relaxed
def test_json_of_a_row_survives_as_a_message_to_the_letter(row: Any) -> None:
    """However it is spaced, its keys are ordered and its numbers are written."""
    assume(row.parts is None or (row.content is None and row.parts.startswith("[")))
    assume("null" not in (row.tool_calls, row.metadata, row.extra))
    assert message_row("a", encoded_message(row)) == row


def test_the_encoded_message_has_the_fields_of_the_message() -> None:
    assert EncodedMessage.__struct_fields__ == Message.__struct_fields__


def test_null_is_absent() -> None:
    row = a_message_row("a", 1)
    encoded = encoded_message(row)
    with_nulls = encoded.replace(b'"created_at"', b'"name":null,"tool_calls":null,"metadata":null,"created_at"')
    assert message_row("a", with_nulls) == row


@given(change=changes)
@relaxed
def test_a_change_survives_on_one_line(change: Change) -> None:
    encoded = encode_change(change)
    assert decode_change(encoded) == change
    assert encode_change(decode_change(encoded)) == encoded


# --- coalescing -------------------------------------------------------------------------------------------------------


@given(log=calls(), cuts=st.sets(st.integers(1, 29), max_size=4))
@few
async def test_it_does_not_matter_where_the_log_is_cut(log: list[Call], cuts: set[int]) -> None:
    world, changes = perform(log)
    ends = sorted({cut for cut in cuts if cut < len(log)} | {len(log)})
    parts = [changes[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    expected = world.dump()
    assert await stored(coalesce([change], change.sequence - 1, NOON) for change in changes) == expected
    assert await stored(coalesce(part, part[0].sequence - 1, NOON) for part in parts) == expected


@given(log=calls())
@few
def test_no_row_stands_twice_in_a_field(log: list[Call]) -> None:
    _, changes = perform(log)
    batch = coalesce(changes, 0, NOON)
    keys: dict[str, list[Any]] = {
        "created": [(row.incarnation,) for row in batch.created],
        "session ids": [(row.session_id,) for row in batch.created],
        "touched": [(row.incarnation,) for row in batch.touched],
        "edited": [key for key, _ in batch.edited],
        "cleared": [key for key, _ in batch.cleared],
        "contexts": [row.incarnation for row in batch.contexts],
        "switches": [(row.incarnation, row.number) for row in batch.switches],
        "messages": [(row.incarnation, row.seq) for row in batch.messages],
        "documents": [(row.incarnation, row.collection, row.key) for row in batch.documents] + list(batch.discarded),
        "outcomes": [(row.scope, row.key) for row in batch.outcomes],
        "plain": [*batch.deleted, *batch.discharged],
        "removed": list(batch.removed),
    }
    for name, field in keys.items():
        assert len(set(field)) == len(field), name
    assert list(batch.messages) == sorted(batch.messages, key=lambda row: (row.incarnation, row.seq))


@given(log=calls(), start=st.integers(0, 20))
@few
def test_a_deletion_swallows_what_it_deletes(log: list[Call], start: int) -> None:
    """Of a session that ends in a batch nothing is left in it but, if it was stored before, its deletion."""
    assume(start < len(log))
    _, changes = perform(log)
    batch = coalesce(changes[start:], changes[start].sequence - 1, NOON)
    born_before = {change.incarnation for change in changes[:start]}
    ended = [change.incarnation for change in changes[start:] if change.deleted]
    assert sorted(batch.deleted) == sorted(born_before.intersection(ended))
    owned = (batch.created, batch.touched, batch.contexts, batch.switches, batch.messages, batch.documents)
    owners = {row.incarnation for rows in owned for row in rows}
    owners |= {pair[0] for pairs in (batch.edited, batch.cleared, batch.removed, batch.discarded) for pair in pairs}
    assert owners.isdisjoint(ended)


@given(log=calls(), start=st.integers(0, 20))
@few
def test_what_a_clear_takes_is_not_written(log: list[Call], start: int) -> None:
    assume(start < len(log))
    _, changes = perform(log)
    batch = coalesce(changes[start:], changes[start].sequence - 1, NOON)
    floors = dict(batch.cleared) | {row.incarnation: row.floor for row in batch.created}
    seqs = [(row.incarnation, row.seq) for row in batch.messages] + list(batch.removed)
    assert all(seq > floors.get(incarnation, 0) for incarnation, seq in seqs)


@given(log=calls(), data=st.data())
@few
def test_what_is_rejected_or_held_goes_to_quarantine(log: list[Call], data: st.DataObject) -> None:
    _, changes = perform(log)
    incarnations = sorted({change.incarnation for change in changes})
    held = data.draw(st.sets(st.sampled_from(incarnations)), label="held")
    sequences = [change.sequence for change in changes if change.incarnation not in held]
    refused = set(data.draw(st.lists(st.sampled_from(sequences), max_size=3), label="refused") if sequences else [])
    coalescer = Coalescer(0, NOON, held=held, rejected={sequence: f"error {sequence}" for sequence in refused})
    others: list[Change] = []
    aside: list[Change] = []
    behind = set(held)
    for change in changes:
        coalescer.add(change)
        if change.sequence in refused:
            behind.add(change.incarnation)
        (aside if change.incarnation in behind else others).append(change)
    batch = coalescer.batch()
    assert [decode_change(row.change) for row in batch.quarantined] == aside
    for row, change in zip(batch.quarantined, aside, strict=True):
        assert (row.sequence, row.session_id, row.incarnation, row.quarantined_at) == (
            change.sequence,
            change.session_id,
            change.incarnation,
            NOON,
        )
        rejected = change.sequence in refused
        assert row.state == ("rejected" if rejected else "queued")
        assert (row.error == f"error {change.sequence}") == rejected
    assert (batch.last, batch.changes) == (changes[-1].sequence, len(changes))
    rest = row_fields(coalesce(others, 0, NOON)) if others else dict.fromkeys(ROW_FIELDS, ())
    assert row_fields(batch) == rest | {"quarantined": batch.quarantined}


@pytest.mark.parametrize("void", [False, True])
async def test_a_change_leaves_quarantine_when_it_is_replayed_or_dropped(void: bool) -> None:
    _, [creation, append] = perform([_call("append"), _call("append", size=2)])
    again = replace(append, sequence=3, resolves=2, void=void)
    batches = []
    for change in (creation, append, again):
        coalescer = Coalescer(change.sequence - 1, NOON, rejected={2: "refused"})
        coalescer.add(change)
        batches.append(coalescer.batch())
    quarantined = (await stored(batches[:2])).quarantine
    assert [(row.sequence, row.state, row.error) for row in quarantined] == [(2, "rejected", "refused")]
    after = await stored(batches)
    assert (after.watermark, after.quarantine) == (3, [])
    assert len(after.sessions[0].messages) == (1 if void else 3)


def test_a_change_that_drops_another_has_no_effect_of_its_own() -> None:
    _, changes = perform([_call("append")])
    batch = coalesce([replace(changes[0], sequence=9, resolves=4, void=True)], 8, NOON)
    assert row_fields(batch) == dict.fromkeys(ROW_FIELDS, ()) | {"discharged": (4,)}
    assert (batch.after, batch.last, batch.changes) == (8, 9, 1)


def test_an_error_without_a_text_is_an_error() -> None:
    _, changes = perform([_call("append")])
    coalescer = Coalescer(0, NOON, rejected={1: ""})
    coalescer.add(changes[0])
    assert [(row.state, row.error) for row in coalescer.batch().quarantined] == [("rejected", "")]


def test_changes_come_in_the_order_of_the_log() -> None:
    _, [first, second] = perform([_call("append"), _call("append")])
    for log, after in (([second, first], 0), ([first, first], 0), ([first], 1), ([first], 5)):
        with pytest.raises(ValueError, match="order of the log"):
            coalesce(log, after, NOON)
    assert coalesce([replace(first, sequence=7)], 5, NOON).last == 7  # sequences may be left out, not repeated


def test_a_batch_holds_a_change() -> None:
    with pytest.raises(ValueError, match="at least one"):
        coalesce([], 0, NOON)


def test_a_receipt_counts_rows() -> None:
    _, changes = perform([_call("append", size=3), _call("put"), _call("put"), _call("append", session=1)])
    receipt = coalesce(changes, 0, NOON).receipt()
    assert (receipt.after, receipt.last, receipt.changes, receipt.sessions, receipt.messages) == (0, 4, 4, 2, 4)
    assert receipt.rows == 2 + 2 + 4 + 1  # sessions, contexts, messages, a document


def _call(kind: str, *, session: int = 0, size: int = 1) -> Call:
    return Call(kind=kind, session=session, text="hi", size=size, document=("notes", "1"), keyed=False)
