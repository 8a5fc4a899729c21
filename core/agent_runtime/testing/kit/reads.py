"""Order, bounds and paging of every read; and what is read of nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import product

import msgspec

from agent_runtime.records import Order
from agent_runtime.rows import SessionRow
from agent_runtime.storage import HeadRead, MessagesRead, SessionKey, Snapshot

from .contract import Opener, StorageContract
from .writer import DAY, NOON, context_row, document_row, outcome_row, quarantine_row, session_row, switch_row, writing

ORDERS: tuple[Order, ...] = ("asc", "desc")
KEYS = ["!", "1", "10", "2", "A", "Z", "a", "ab", "b", "z", "é", "ü", "中", "\uffff", "𐀀", "😀"]
"""By code points. UTF-16 would put the last two before \\uffff, a collation of a language nearly all elsewhere."""


class ReadContract(StorageContract):
    """Order, bounds, pages."""

    async def test_nothing_is_read_of_an_empty_database(self, opener: Opener) -> None:
        async with opener() as storage, storage.snapshot() as snapshot:
            assert snapshot.watermark == 0
            assert await snapshot.head("a", outcomes_max=1) is None
            assert not await snapshot.messages("a", limit=1)
            assert not await snapshot.switches("a")
            assert await snapshot.document("a", "notes", "1") is None
            assert not await snapshot.documents("a", "notes", limit=1)
            assert not await snapshot.sessions(limit=1)
            assert await snapshot.outcome("a", "1") is None
            assert not await snapshot.quarantine(limit=1)
            assert await snapshot.lease() is None
            assert await snapshot.journal("j") is None

    async def test_messages_between_two_bounds(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=6)
            await writer.create("b", messages=9)
            await writer.apply(touched=(writer.touch("a"),), removed=(("a", 3),))
            async with writer.storage.snapshot() as snapshot:
                for after, before, limit, order in product((0, 1, 3, 6), (None, 1, 3, 4, 9), (1, 2, 10), ORDERS):
                    rows = await snapshot.messages("a", after=after, before=before, limit=limit, order=order)
                    seqs = [seq for seq in (1, 2, 4, 5, 6) if after < seq < (before or 10)]
                    expected = seqs if order == "asc" else seqs[::-1]
                    assert [row.seq for row in rows] == expected[:limit]
                    assert all(row.incarnation == "a" for row in rows)

    async def test_what_is_foreseen_is_read_the_same(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a", messages=6)
            await writer.create("b", messages=2)
            await writer.apply(touched=(writer.touch("a"),), removed=(("a", 3),))
            foreseen = [
                MessagesRead(incarnation=incarnation, after=after, before=before, limit=limit, order=order)
                for incarnation, after, before, limit, order in product("ac", (0, 2), (None, 5), (2, 10), ORDERS)
            ]
            asked = [*foreseen, MessagesRead(incarnation="a", after=3, before=6, limit=1)]
            for first in foreseen:
                heads = [HeadRead(session_id=f"session {name}", outcomes_max=1) for name in "abc"]
                async with writer.storage.snapshot(0, [heads[0], first, heads[2]]) as view:
                    await writer.apply(touched=(writer.touch("a"),))
                    async with writer.storage.snapshot() as plain:
                        assert plain.watermark == view.watermark + 1
                        for read in asked:
                            arguments = msgspec.structs.asdict(read)
                            assert [*await view.messages(**arguments)] == [*await plain.messages(**arguments)]
                    found = [await view.head(read.session_id, outcomes_max=read.outcomes_max) for read in heads]
                    assert [head and head.session.incarnation for head in found] == ["a", "b", None]
                    assert found[0] is not None
                    assert found[0].session.sequence == view.watermark

    async def test_switches_in_order_of_number(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a")
            await writer.create("b")
            for numbers in ((1, 2), (10, 11), (3,)):
                await writer.apply(switches=tuple(switch_row(who, number) for number in numbers for who in "ab"))
            async with writer.storage.snapshot() as snapshot:
                assert list(await snapshot.switches("a")) == [switch_row("a", number) for number in (1, 2, 3, 10, 11)]

    async def test_documents_in_order_of_code_points(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a")
            await writer.create("b")
            documents = [document_row(who, name, key) for key in KEYS for name in ("m", "n", "o") for who in "ab"]
            await writer.apply(documents=tuple(documents[::-1]))
            async with writer.storage.snapshot() as snapshot:
                for place, limit in product(range(len(KEYS)), (1, 3, 100)):
                    rows = await snapshot.documents("a", "n", after=KEYS[place], limit=limit)
                    assert [row.key for row in rows] == KEYS[place + 1 :][:limit]
                rows = await snapshot.documents("a", "n", limit=100)
                assert list(rows) == [document_row("a", "n", key) for key in KEYS]
                assert not await snapshot.documents("a", "never", limit=1)

    async def test_collections_that_have_documents_in_order_of_code_points(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            await writer.create("a")
            await writer.create("b")
            await writer.apply(documents=tuple(document_row("a", name, key) for name in KEYS[::-1] for key in "xy"))
            await writer.apply(documents=(document_row("b", "only", "x"), document_row("b", "gone", "x")))
            await writer.apply(discarded=(("b", "gone", "x"),))
            async with writer.storage.snapshot() as snapshot:
                assert list(await snapshot.collections("a")) == KEYS
                assert list(await snapshot.collections("b")) == ["only"]
                assert not await snapshot.collections("never")

    async def test_sessions_by_creation_and_incarnation(self, opener: Opener) -> None:
        """Many share a time, and the order of incarnations is not that of creation."""
        sessions = [
            session_row(
                f"{number * 7 % 10}",
                created_at=NOON + timedelta(microseconds=number // 4),
                last_activity=NOON - timedelta(seconds=number),
                user_id=(None, "u", "v")[number % 3],
            )
            for number in range(10)
        ]
        async with writing(opener) as writer:
            for session in sessions:
                await writer.apply(created=(session,), contexts=(context_row(session.incarnation),))
            async with writer.storage.snapshot() as snapshot:
                for user_id, order, limit in product((None, "u", "v", "nobody"), ORDERS, (1, 3, 100)):
                    wanted = [session for session in sessions if user_id in (None, session.user_id)]
                    wanted.sort(key=lambda session: (session.created_at, session.incarnation), reverse=order == "desc")
                    assert await self._page_through(snapshot, user_id, order, limit) == wanted

    async def _page_through(
        self, snapshot: Snapshot, user_id: str | None, order: Order, limit: int
    ) -> list[SessionRow]:
        found: list[SessionRow] = []
        while True:
            after = SessionKey(found[-1].created_at, found[-1].incarnation) if found else None
            page = await snapshot.sessions(user_id=user_id, after=after, limit=limit, order=order)
            assert len(page) <= limit
            if not page:
                return found
            found.extend(page)

    async def test_the_newest_outcomes_come_with_the_head(self, opener: Opener) -> None:
        now = datetime.now(UTC)
        outcomes = [outcome_row("a", f"{number}", sequence=number, expires_at=now + DAY) for number in (3, 1, 4, 2, 5)]
        expired = outcome_row("a", "expired", sequence=9, expires_at=now - DAY)
        async with writing(opener) as writer:
            await writer.create("a")
            await writer.apply(outcomes=(*outcomes, expired, outcome_row("create", "9", sequence=9)))
            async with writer.storage.snapshot() as snapshot:
                for most, expected in ((0, []), (3, [5, 4, 3]), (10, [5, 4, 3, 2, 1])):
                    head = await snapshot.head("session a", outcomes_max=most)
                    assert head is not None
                    assert [row.sequence for row in head.outcomes] == expected
                assert await snapshot.outcome("a", "expired") == expired

    async def test_outcomes_in_order_of_scope_and_key(self, opener: Opener) -> None:
        places = sorted(product(("a", "create", "z"), KEYS))
        now = datetime.now(UTC)
        outcomes = [outcome_row(*place, expires_at=now + (DAY, -DAY)[n % 2]) for n, place in enumerate(places)]
        async with writing(opener) as writer:
            await writer.create("a")
            await writer.apply(outcomes=tuple(outcomes[::-1]))
            async with writer.storage.snapshot() as snapshot:
                assert list(await snapshot.outcomes(limit=1000)) == outcomes
                for number, limit in product(range(0, len(places), 3), (1, 3, 1000)):
                    page = await snapshot.outcomes(after=places[number], limit=limit)
                    assert list(page) == outcomes[number + 1 :][:limit]

    async def test_quarantine_in_order_of_sequence(self, opener: Opener) -> None:
        async with writing(opener) as writer:
            for numbers in ((2, 30), (4,), (100, 9)):
                await writer.apply(quarantined=tuple(quarantine_row(number) for number in numbers))
            async with writer.storage.snapshot() as snapshot:
                for after, limit in product((0, 3, 4, 100), (1, 2, 10)):
                    rows = await snapshot.quarantine(after=after, limit=limit)
                    assert [row.sequence for row in rows] == [n for n in (2, 4, 9, 30, 100) if n > after][:limit]
