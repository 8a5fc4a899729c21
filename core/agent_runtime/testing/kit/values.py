"""Values come back to the letter: any text, JSON as it was written, any bytes, times to the microsecond."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from agent_runtime.rows import (
    ContextRow,
    DocumentRow,
    MessageRow,
    OutcomeRow,
    QuarantineRow,
    SessionRow,
    SwitchRow,
)
from agent_runtime.storage import SessionKey

from .contract import SHARED, NewStorage, StorageContract
from .writer import session_row, writing

LARGE = 2**53

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.sampled_from(
    ["", " ", "null", "'; drop table sessions; --", "%s", ":name", "\x01\x1f\x7f\x85\u2028", "e\u0301", "\U0010ffff😀"]
)
labels = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=255)
times = st.datetimes(timezones=st.just(UTC)) | st.sampled_from(
    [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)]
)
counts = st.integers(0, LARGE)


def _written(value: Any, spaced: bool, ascii_only: bool) -> str:
    return json.dumps(value, separators=(" , ", " : ") if spaced else (",", ":"), ensure_ascii=ascii_only)


json_texts = st.builds(
    _written,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=5,
    ),
    st.booleans(),
    st.booleans(),
) | st.sampled_from(
    [
        '{"b":1e2,"a":1.0}',
        '{"n":100000000000000000000000000000001,"e":1E+2,"z":-0.0}',
        '{"a":1,"a":2}',
        '"\\u00e9é"',
        "{ }",
    ]
)


def rows(kind: Any, **columns: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Rows of the incarnation "a" with any values in `columns`."""
    return st.builds(kind, incarnation=st.just("a"), **columns)


sessions = rows(
    SessionRow,
    session_id=labels,
    user_id=st.none() | labels,
    title=st.none() | texts,
    description=st.none() | texts,
    metadata=json_texts,
    created_at=times,
    last_activity=times,
    message_count=counts,
    next_seq=counts,
    floor=counts,
    sequence=counts,
)
contexts = rows(
    ContextRow,
    current_agent=labels,
    switch_count=counts,
    last_switch_at=st.none() | times,
    metadata=json_texts,
    created_at=times,
    updated_at=times,
)
messages = rows(
    MessageRow,
    seq=st.integers(1, LARGE),
    id=labels,
    role=st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
    content=st.none() | texts,
    parts=st.none() | json_texts,
    name=st.none() | labels,
    tool_calls=st.none() | json_texts,
    tool_call_id=st.none() | texts,
    token_count=st.none() | st.integers(0, 2**31 - 1),
    metadata=st.none() | json_texts,
    extra=st.none() | json_texts,
    created_at=times,
)
switches = rows(
    SwitchRow,
    number=st.integers(1, LARGE),
    from_agent=labels,
    to_agent=labels,
    reason=st.none() | texts,
    switched_at=times,
    metadata=st.none() | json_texts,
)
documents = rows(
    DocumentRow,
    collection=st.just("notes"),
    key=labels,
    value=st.none() | json_texts,
    data=st.none() | st.binary(),
    media_type=st.none() | texts,
    updated_at=times,
)
outcomes = st.builds(
    OutcomeRow,
    scope=st.sampled_from(["a", "create"]),
    key=labels,
    route=labels,
    body_hash=st.text("0123456789abcdef", min_size=64, max_size=64),
    outcome=json_texts,
    sequence=counts,
    expires_at=times,
)
quarantined = rows(
    QuarantineRow,
    sequence=st.integers(1, LARGE),
    session_id=labels,
    state=st.sampled_from(["rejected", "queued"]),
    error=texts,
    change=st.binary(),
    quarantined_at=times,
)
any_value = settings(max_examples=10, deadline=None, suppress_health_check=SHARED)


class ValueContract(StorageContract):
    """Values to the letter."""

    @given(
        rows=st.lists(st.tuples(sessions, contexts), unique_by=lambda row: row[0].session_id, min_size=1, max_size=5)
    )
    @any_value
    async def test_sessions_and_contexts(
        self, new_storage: NewStorage, rows: list[tuple[SessionRow, ContextRow]]
    ) -> None:
        sessions = [replace(session, incarnation=f"{number}") for number, (session, _) in enumerate(rows)]
        contexts = [replace(context, incarnation=f"{number}") for number, (_, context) in enumerate(rows)]
        async with writing(new_storage()) as writer:
            await writer.apply(created=tuple(sessions), contexts=tuple(contexts))
            async with writer.storage.snapshot() as snapshot:
                for session, context in zip(sessions, contexts, strict=True):
                    head = await snapshot.head(session.session_id, outcomes_max=0)
                    assert head is not None
                    assert (head.session, head.context) == (session, context)
                sessions.sort(key=lambda session: (session.created_at, session.incarnation))
                assert list(await snapshot.sessions(limit=10)) == sessions
                for number, session in enumerate(sessions):
                    place = SessionKey(session.created_at, session.incarnation)
                    assert list(await snapshot.sessions(after=place, limit=10)) == sessions[number + 1 :]
                    of_user = [other for other in sessions if other.user_id == session.user_id]
                    if session.user_id is not None:
                        assert list(await snapshot.sessions(user_id=session.user_id, limit=10)) == of_user

    @given(
        messages=st.lists(messages, unique_by=lambda row: row.seq, max_size=5),
        switches=st.lists(switches, unique_by=lambda row: row.number, max_size=3),
        documents=st.lists(documents, unique_by=lambda row: row.key, max_size=5),
    )
    @any_value
    async def test_belongings(
        self,
        new_storage: NewStorage,
        messages: list[MessageRow],
        switches: list[SwitchRow],
        documents: list[DocumentRow],
    ) -> None:
        messages.sort(key=lambda row: row.seq)
        async with writing(new_storage()) as writer:
            await writer.create("a")
            await writer.apply(messages=tuple(messages), switches=tuple(switches), documents=tuple(documents))
            async with writer.storage.snapshot() as snapshot:
                assert list(await snapshot.messages("a", limit=10)) == messages
                assert list(await snapshot.switches("a")) == sorted(switches, key=lambda row: row.number)
                found = await snapshot.documents("a", "notes", limit=10)
                assert list(found) == sorted(documents, key=lambda row: row.key)
                for document in documents:
                    assert await snapshot.document("a", "notes", document.key) == document

    @given(
        outcomes=st.lists(outcomes, unique_by=lambda row: (row.scope, row.key), max_size=5),
        quarantined=st.lists(quarantined, unique_by=lambda row: row.sequence, max_size=5),
    )
    @any_value
    async def test_outcomes_and_quarantine(
        self, new_storage: NewStorage, outcomes: list[OutcomeRow], quarantined: list[QuarantineRow]
    ) -> None:
        async with writing(new_storage()) as writer:
            await writer.create("a")
            await writer.apply(outcomes=tuple(outcomes), quarantined=tuple(quarantined))
            async with writer.storage.snapshot() as snapshot:
                for outcome in outcomes:
                    assert await snapshot.outcome(outcome.scope, outcome.key) == outcome
                found = await snapshot.quarantine(limit=10)
                assert list(found) == sorted(quarantined, key=lambda row: row.sequence)

    async def test_long_values(self, new_storage: NewStorage) -> None:
        long = "😀" * 500_000
        session = session_row("a", title=long, metadata=json.dumps([long]))
        async with writing(new_storage()) as writer:
            await writer.create("a", title=long, metadata=session.metadata)
            async with writer.storage.snapshot() as snapshot:
                assert (await snapshot.sessions(limit=1))[0] == session
