"""A batch is one transaction: all of it or nothing, once, in order, by who has the right to write."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from msgspec.structs import replace

from agent_runtime.changes import Details
from agent_runtime.errors import ChangeRejected, SequenceMismatch

from .contract import Opener, StorageContract, needs
from .dump import dump
from .writer import (
    NOON,
    Writer,
    context_row,
    document_row,
    message_row,
    outcome_row,
    quarantine_row,
    session_row,
    switch_row,
    writing,
)

GOOD = {
    "created": (session_row("new", message_count=1, next_seq=2),),
    "contexts": (context_row("new"),),
    "messages": (message_row("new", 1),),
    "outcomes": (outcome_row("new", "key"),),
    "quarantined": (quarantine_row(70),),
}
"""A batch that any database takes, after which "a" is there with one message, and "gone" was there."""

BAD: dict[str, Callable[[Writer], dict[str, Any]]] = {
    "session id taken": lambda _: {
        "created": (session_row("b", session_id="session a"),),
        "contexts": (context_row("b"),),
    },
    "incarnation created twice": lambda _: {
        "created": (session_row("a", session_id="another"),),
        "contexts": (context_row("a"),),
    },
    "touched, never there": lambda writer: {"touched": (writer.touch("nobody"),)},
    "touched, deleted": lambda writer: {"touched": (writer.touch("gone"),)},
    "touched, deleted by the same batch": lambda writer: {"deleted": ("a",), "touched": (writer.touch("a"),)},
    "edited, never there": lambda _: {"edited": (("nobody", Details("title", None, "{}")),)},
    "edited, deleted": lambda _: {"edited": (("gone", Details("title", None, "{}")),)},
    "cleared, never there": lambda _: {"cleared": (("nobody", 1),)},
    "cleared, deleted": lambda _: {"cleared": (("gone", 1),)},
    "deleted, never there": lambda _: {"deleted": ("nobody",)},
    "deleted, deleted": lambda _: {"deleted": ("gone",)},
    "message there already": lambda _: {"messages": (message_row("a", 1),)},
    "message of nobody": lambda _: {"messages": (message_row("nobody", 1),)},
    "context of nobody": lambda _: {"contexts": (context_row("nobody"),)},
    "switch there already": lambda _: {"switches": (switch_row("a", 1),)},
    "switch of nobody": lambda _: {"switches": (switch_row("nobody", 1),)},
    "document of nobody": lambda _: {"documents": (document_row("nobody", "notes", "1"),)},
}


class BatchContract(StorageContract):
    """Each batch whole or not at all."""

    async def test_every_kind_of_row_is_written(self, opener: Opener) -> None:
        session, context = session_row("a", message_count=1, next_seq=2), context_row("a")
        message, switch = message_row("a", 1), switch_row("a", 1)
        document, outcome, quarantined = document_row("a", "notes", "1"), outcome_row("a", "key"), quarantine_row(1)
        async with writing(opener) as writer:
            receipt = await writer.apply(
                created=(session,),
                contexts=(context,),
                messages=(message,),
                switches=(switch,),
                documents=(document,),
                outcomes=(outcome,),
                quarantined=(quarantined,),
            )
            async with writer.storage.snapshot() as snapshot:
                head = await snapshot.head("session a", outcomes_max=10)
                assert head is not None
                assert (head.session, head.context, list(head.outcomes)) == (session, context, [outcome])
                assert list(await snapshot.messages("a", limit=10)) == [message]
                assert list(await snapshot.switches("a")) == [switch]
                assert await snapshot.document("a", "notes", "1") == document
                assert await snapshot.outcome("a", "key") == outcome
                assert list(await snapshot.quarantine(limit=10)) == [quarantined]
                assert snapshot.watermark == 1
        assert (receipt.after, receipt.last, receipt.changes, receipt.messages, receipt.rows) == (0, 1, 1, 1, 7)

    async def test_columns_of_a_session_change_alone(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=3, user_id="u", title="old")
            touch = writer.touch("a", last_activity=NOON.replace(second=9), message_count=2, next_seq=7)
            await writer.apply(touched=(touch,))
            await writer.apply(edited=(("a", Details("new", "described", '{"b": 1}')),))
            await writer.apply(cleared=(("a", 2),), contexts=(context_row("a", current_agent="coder", switch_count=1),))
            async with writer.storage.snapshot() as snapshot:
                head = await snapshot.head("session a", outcomes_max=0)
        assert head is not None
        assert head.context == context_row("a", current_agent="coder", switch_count=1)
        assert head.session == session_row(
            "a",
            user_id="u",
            title="new",
            description="described",
            metadata='{"b": 1}',
            last_activity=NOON.replace(second=9),
            message_count=2,
            next_seq=7,
            floor=2,
            sequence=2,
        )

    async def test_a_replayed_batch_is_recognised_and_changes_nothing(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=2)
            batch = writer.batch(touched=(writer.touch("a"),), messages=(message_row("a", 3),))
            await writer.storage.apply(batch, writer.fence)
            before = await dump(writer.storage)
            for _ in range(2):
                with pytest.raises(SequenceMismatch) as caught:
                    await writer.storage.apply(batch, writer.fence)
                assert (caught.value.expected, caught.value.found) == (batch.after, batch.last)
            assert await dump(writer.storage) == before

    async def test_a_batch_from_another_place_changes_nothing(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a")
            for after in (0, 2, 10):
                batch = replace(writer.batch(messages=(message_row("a", 1),)), after=after, last=after + 5)
                with pytest.raises(SequenceMismatch) as caught:
                    await writer.storage.apply(batch, writer.fence)
                assert (caught.value.expected, caught.value.found) == (after, 1)
            async with writer.storage.snapshot() as snapshot:
                assert snapshot.watermark == 1
                assert not await snapshot.messages("a", limit=10)

    async def test_a_batch_with_a_bad_row_is_refused_whole(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("gone")
            await writer.apply(deleted=("gone",))
            await writer.create("a", messages=1)
            await writer.apply(touched=(writer.touch("a"),), switches=(switch_row("a", 1),))
            before = await dump(writer.storage)
            for reason, rows in BAD.items():
                bad = rows(writer)
                with suppress(ChangeRejected):
                    await writer.apply(**{name: GOOD.get(name, ()) + bad.get(name, ()) for name in (*GOOD, *bad)})
                    pytest.fail(f"not refused: {reason}")
                assert await dump(writer.storage) == before, reason
            await writer.apply(**GOOD)

    async def test_a_batch_without_rows_moves_the_watermark(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.storage.apply(replace(writer.batch(), last=41), writer.fence)
            async with writer.storage.snapshot() as snapshot:
                assert snapshot.watermark == 41

    async def test_a_deleted_session_is_gone_and_its_id_free(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=3, user_id="u")
            await writer.apply(
                touched=(writer.touch("a"),),
                switches=(switch_row("a", 1),),
                documents=(document_row("a", "notes", "1"),),
            )
            await writer.apply(deleted=("a",))
            async with writer.storage.snapshot() as snapshot:
                assert await snapshot.head("session a", outcomes_max=1) is None
                assert not await snapshot.sessions(limit=10)
                assert not await snapshot.sessions(user_id="u", limit=10)
                assert not await snapshot.messages("a", limit=10)
                assert not await snapshot.switches("a")
                assert await snapshot.document("a", "notes", "1") is None
                assert not await snapshot.documents("a", "notes", limit=10)
            await writer.create("b", session_id="session a", messages=1)
            async with writer.storage.snapshot() as snapshot:
                head = await snapshot.head("session a", outcomes_max=1)
                assert head is not None
                assert head.session.incarnation == "b"
                assert [row.incarnation for row in await snapshot.messages("b", limit=10)] == ["b"]

    async def test_a_session_is_re_created_by_the_batch_that_deletes_it(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=1)
            await writer.apply(
                deleted=("a",), created=(session_row("b", session_id="session a"),), contexts=(context_row("b"),)
            )
            async with writer.storage.snapshot() as snapshot:
                head = await snapshot.head("session a", outcomes_max=1)
                assert head is not None
                assert head.session.incarnation == "b"
                assert [row.incarnation for row in await snapshot.sessions(limit=10)] == ["b"]

    async def test_removed_messages_are_gone_and_no_others(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=5)
            await writer.create("b", messages=5)
            await writer.apply(touched=(writer.touch("a"),), removed=(("a", 2), ("a", 5)))
            async with writer.storage.snapshot() as snapshot:
                assert [row.seq for row in await snapshot.messages("a", limit=10)] == [1, 3, 4]
                assert [row.seq for row in await snapshot.messages("b", limit=10)] == [1, 2, 3, 4, 5]

    async def test_documents_are_replaced_and_discarded(self, opener: Opener) -> None:
        old, new = document_row("a", "notes", "1"), document_row("a", "notes", "1", value=None, data=b"\x00\xff")
        other, elsewhere = document_row("a", "notes", "2"), document_row("a", "drafts", "1")
        async with writing(opener) as writer:
            await writer.create("a")
            await writer.apply(touched=(writer.touch("a"),), documents=(old, other, elsewhere))
            await writer.apply(touched=(writer.touch("a"),), documents=(new,), discarded=(("a", "notes", "2"),))
            async with writer.storage.snapshot() as snapshot:
                assert list(await snapshot.documents("a", "notes", limit=10)) == [new]
                assert list(await snapshot.documents("a", "drafts", limit=10)) == [elsewhere]
            discarded = (("a", "notes", "1"), ("a", "notes", "never there"))
            await writer.apply(touched=(writer.touch("a"),), discarded=discarded, documents=(other,))
            async with writer.storage.snapshot() as snapshot:
                assert list(await snapshot.documents("a", "notes", limit=10)) == [other]

    async def test_an_outcome_replaces_an_earlier_one(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a")
            for outcome in (outcome_row("a", "key"), outcome_row("a", "key", sequence=9, outcome="[1]")):
                await writer.apply(outcomes=(outcome, outcome_row("create", "key")))
                async with writer.storage.snapshot() as snapshot:
                    assert await snapshot.outcome("a", "key") == outcome
                    assert await snapshot.outcome("b", "key") is None
                    assert await snapshot.outcome("a", "other") is None

    async def test_quarantine_takes_in_and_lets_go(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            rows = [quarantine_row(number, state="queued") for number in range(1, 6)]
            await writer.apply(quarantined=tuple(rows))
            await writer.apply(discharged=(2, 5, 77))
            async with writer.storage.snapshot() as snapshot:
                assert list(await snapshot.quarantine(limit=10)) == [rows[0], rows[2], rows[3]]

    @needs("reopening")
    async def test_everything_is_there_when_opened_again(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=3)
            await writer.apply(**GOOD)
            before = await dump(writer.storage)
        async with writing(opener) as writer:
            assert writer.sequence == 2
            assert await dump(writer.storage) == before
            await writer.apply(touched=(writer.touch("a"),))
