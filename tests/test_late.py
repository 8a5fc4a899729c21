"""Late replay: a journal that another runtime has overtaken comes in when it is opened, and overwrites nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from itertools import count, product
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest
from msgspec.structs import replace

from agent_runtime import (
    Config,
    IdempotencyConflict,
    InvalidInput,
    JournalCorrupt,
    LeaseLost,
    Runtime,
    SessionHandle,
    SessionNotFound,
    StorageUnavailable,
    open_runtime,
)
from agent_runtime.errors import DrainIncomplete
from agent_runtime.history import INTERRUPTED
from agent_runtime.identifiers import utc_now
from agent_runtime.late import MARK
from agent_runtime.records import LATE
from agent_runtime.storage import Abilities, Fence, StorageConfig, StorageFactory
from agent_runtime.testing import Fault, Faults, FaultyStorage, faulty_plugin
from agent_runtime.testing.faults import writes_message
from agent_runtime_memory import MemoryDatabase
from agent_runtime_sqlite import open_sqlite
from crash import Left
from places import NEVER_S, in_file

pytestmark = pytest.mark.anyio


class _Kept(FaultyStorage):
    """What is stored outlives the runtime, also in memory."""

    @property
    def abilities(self) -> Abilities:
        return replace(super().abilities, survives="power", journal_directory=None)


class World:
    """A database, and two runtimes that use it in turns, each with a journal of its own."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.directory = directory
        self.faults = Faults()
        self.factory: StorageFactory
        if kind == "memory":
            self.url, self.factory = "memory:", MemoryDatabase().open
        else:
            self.url, self.factory = f"sqlite:///{in_file(directory).path}", open_sqlite

    def config(self, name: str, **write_behind: Any) -> Config:
        settings = {"interval_s": NEVER_S, "drain_timeout_s": 20.0, "durability_timeout_s": 20.0}
        return Config.of(
            f"faulty:{self.url}",
            journal={"directory": str(self.directory / name)},
            write_behind=settings | write_behind,
            lease={"duration_s": 60.0},
        )

    @asynccontextmanager
    async def open(self, name: str = "first", **write_behind: Any) -> AsyncIterator[Runtime]:
        plugins = [faulty_plugin(self.factory, self.faults)]
        async with open_runtime(self.config(name, **write_behind), plugins=plugins) as runtime:
            yield runtime

    @asynccontextmanager
    async def losing(self, name: str = "first") -> AsyncIterator[Runtime]:
        """A runtime that stores nothing: what is written stays in its journal."""
        try:
            async with self.open(name, drain_timeout_s=0.02) as runtime:
                outage = self.faults.fail("apply")
                yield runtime
        except DrainIncomplete:
            pass
        finally:
            outage.stop()

    @contextmanager
    def away_after(self, batches: int, *, stored: bool = False) -> Iterator[None]:
        """The database takes so many batches more, then is away; `stored`: one more, and it says that it did not."""
        faults, seen = self.faults, self.faults.count("apply")
        first = faults.fail("apply", nth=batches + 1, after_effect=stored)

        async def refuse(_: object) -> None:
            raise StorageUnavailable("it is away")

        rest = Fault("apply", None, condition=lambda _: faults.count("apply") > seen + batches + 1, before=refuse)
        faults._plan(rest)
        try:
            yield
        finally:
            first.stop()
            rest.stop()

    def second(self) -> Any:
        """The runtime that takes over."""
        return self.open("second")


BOTH = pytest.mark.parametrize("world", ["memory", "sqlite"], indirect=True)


@pytest.fixture(params=["memory", pytest.param("sqlite", marks=pytest.mark.long)])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr("agent_runtime.testing.faulty.FaultyStorage", _Kept)
    return World(request.param, tmp_path)


async def shown(runtime: Runtime, session_id: str = "s") -> list[object]:
    session = await runtime.get_session(session_id)
    return [message.content async for message in session.scan_messages()]


async def late_of(runtime: Runtime, session_id: str = "s") -> dict[object, int]:
    """The messages that are marked as late, with the seq that they had."""
    session = await runtime.get_session(session_id)
    return {
        message.content: message.metadata[LATE]["seq"]
        async for message in session.scan_messages()
        if message.late and message.metadata is not None
    }


async def opened(runtime: Runtime, session_id: str = "s") -> SessionHandle:
    return await runtime.get_session(session_id)


async def begin(world: World, *texts: str) -> None:
    """A session that is stored."""
    async with world.open() as runtime:
        session = await runtime.create_session("s")
        for text in texts:
            await session.append("user", text)


# --- messages ---------------------------------------------------------------------------------------------------------


@BOTH
async def test_messages_come_behind_those_that_were_appended_meanwhile(world: World) -> None:
    await begin(world, "stored")
    async with world.losing() as runtime:
        session = await opened(runtime)
        await session.append("user", "a", metadata={"mine": [1e2, {"z": 1, "a": 2}]})
        ids = [message.id for message in await session.append_many([{"role": "user", "content": "b"}] * 2)]
    async with world.second() as runtime:
        await (await opened(runtime)).append("user", "meanwhile")
    async with world.open() as runtime:
        assert await shown(runtime) == ["stored", "meanwhile", "a", "b", "b"]
        page = (await (await opened(runtime)).messages()).items
        assert [message.seq for message in page] == [1, 2, 3, 4, 5]
        assert [message.id for message in page[3:]] == ids
        assert page[2].metadata == {"mine": [1e2, {"z": 1, "a": 2}], LATE: {"seq": 2}}
        assert [message.metadata for message in page[3:]] == [{LATE: {"seq": 3}}, {LATE: {"seq": 4}}]
        assert (await (await opened(runtime)).record()).message_count == 5
    async with world.second() as runtime:
        assert len(await shown(runtime)) == 5


async def test_a_session_that_nobody_has_appended_to_goes_on_as_if_nothing_had_happened(world: World) -> None:
    await begin(world, "stored")
    async with world.losing() as runtime:
        await (await opened(runtime)).append("user", "a")
        new = await runtime.create_session("new", system_prompt="lead", user_id="u")
        await new.append("user", "b")
        await new.switch_agent("coder")
    async with world.second() as runtime:
        await (await opened(runtime)).put_document("notes", "n", 1)
        await runtime.create_session("other")
    async with world.open() as runtime:
        assert await shown(runtime) == ["stored", "a"]
        assert await shown(runtime, "new") == ["lead", "b"]
        assert await late_of(runtime) == await late_of(runtime, "new") == {}
        new = await opened(runtime, "new")
        assert [switch.to_agent for switch in await new.switches()] == ["coder"]
        assert (await new.record()).user_id == "u"


async def test_what_is_taken_away_later_does_not_come_in(world: World) -> None:
    await begin(world, "x", "y", "z")
    async with world.losing() as runtime:
        session = await opened(runtime)
        await session.pop()
        await session.append("user", "a")
        await session.append("user", "b")
        await session.pop()
        await session.append("user", "c")
    async with world.second() as runtime:
        await (await opened(runtime)).append("user", "meanwhile")
    async with world.open() as runtime:
        assert await shown(runtime) == ["x", "y", "meanwhile", "a", "c"]
        assert await late_of(runtime) == {"a": 4, "c": 6}
        assert (await (await opened(runtime)).record()).message_count == 5


async def test_a_late_clearing_takes_only_what_it_saw(world: World) -> None:
    await begin(world, "x", "y")
    async with world.losing() as runtime:
        session = await opened(runtime)
        await session.append("user", "a")
        await session.clear()
        await session.append("user", "b")
    async with world.second() as runtime:
        session = await opened(runtime)
        for number in range(3):
            await session.append("user", f"meanwhile {number}")
    async with world.open() as runtime:
        assert await shown(runtime) == ["meanwhile 0", "meanwhile 1", "meanwhile 2", "b"]
        assert (await (await opened(runtime)).record()).message_count == 4


async def test_a_message_that_the_other_runtime_removed_is_not_removed_twice(world: World) -> None:
    await begin(world, "x", "y")
    async with world.losing() as runtime:
        await (await opened(runtime)).pop()
    async with world.second() as runtime:
        await (await opened(runtime)).pop()
    async with world.open() as runtime:
        assert await shown(runtime) == ["x"]
        assert (await (await opened(runtime)).record()).message_count == 1


# --- tool calls -------------------------------------------------------------------------------------------------------


def call(call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "look", "arguments": "{}"}}


async def test_a_late_message_never_enters_a_tool_pair(world: World) -> None:
    """Ids of calls repeat within a session: a late result is not for a call that it did not know of."""
    await begin(world, "question")
    async with world.losing() as runtime:
        session = await opened(runtime)
        await session.append("assistant", None, tool_calls=[call("1"), call("2")])
        await session.append_tool_result("1", "look", "late result")
    async with world.second() as runtime:
        session = await opened(runtime)
        await session.append("assistant", None, tool_calls=[call("1")])
    async with world.open() as runtime:
        session = await opened(runtime)
        await session.append_tool_result("1", "look", "result")
        await session.append_tool_result("2", "look", "of no call")
        history = [(each["role"], each.get("tool_call_id"), each.get("content")) for each in await session.history()]
    assert history == [
        ("user", None, "question"),
        ("assistant", None, None),
        ("tool", "1", "result"),
        ("assistant", None, None),
        ("tool", "1", "late result"),
        ("tool", "2", INTERRUPTED),
    ]


# --- idempotency keys -------------------------------------------------------------------------------------------------


async def test_a_call_that_was_repeated_elsewhere_does_not_come_in(world: World) -> None:
    await begin(world)
    async with world.losing() as runtime:
        session = await opened(runtime)
        await session.append("user", "a", idempotency_key="ka")
        await session.append("user", "b", idempotency_key="kb")
        await session.put_document("notes", "n", 1, idempotency_key="kd")
    async with world.second() as runtime:
        session = await opened(runtime)
        await session.append("user", "meanwhile")
        again = await session.append("user", "a", idempotency_key="ka")
    async with world.open() as runtime:
        session = await opened(runtime)
        assert await shown(runtime) == ["meanwhile", "a", "b"]
        assert await session.append("user", "a", idempotency_key="ka") == again
        second = await session.append("user", "b", idempotency_key="kb")
        assert (second.seq, second.content, second.metadata) == (3, "b", {LATE: {"seq": 2}})
        await session.put_document("notes", "n", 1, idempotency_key="kd")
        with pytest.raises(IdempotencyConflict):
            await session.append("user", "c", idempotency_key="kb")
        assert await shown(runtime) == ["meanwhile", "a", "b"]


async def test_what_follows_a_creation_that_was_repeated_goes_to_the_session_that_came_of_that(world: World) -> None:
    async with world.losing() as runtime:
        session = await runtime.create_session(system_prompt="lead", idempotency_key="k")
        await session.append("user", "a", idempotency_key="ka")
        await session.append("user", "b")
    async with world.second() as runtime:
        session = await runtime.create_session(system_prompt="lead", idempotency_key="k")
        await session.append("user", "a", idempotency_key="ka")
    async with world.open() as runtime:
        assert (
            await runtime.create_session(system_prompt="lead", idempotency_key="k")
        ).session_id == session.session_id
        assert await shown(runtime, session.session_id) == ["lead", "a", "b"]
        assert len((await runtime.list_sessions()).items) == 1


async def test_a_session_whose_id_was_taken_meanwhile_is_joined_to_that_one(world: World) -> None:
    async with world.losing() as runtime:
        session = await runtime.get_or_create_session("s", system_prompt="lead", title="mine", idempotency_key="k")
        await session.append("user", "a")
        await session.put_document("notes", "n", 1)
        await session.put_document("notes", "m", 1)
        await session.switch_agent("coder")
    async with world.second() as runtime:
        session = await runtime.get_or_create_session("s", system_prompt="lead")
        await session.append("user", "b")
        await session.put_document("notes", "n", 2)
    async with world.open() as runtime:
        session = await runtime.get_or_create_session("s", system_prompt="lead", title="mine", idempotency_key="k")
        assert await shown(runtime) == ["lead", "b", "a"]
        documents = {each.key: each.value for each in (await session.list_documents("notes")).items}
        assert documents == {"n": 2, "m": 1}
        assert (await session.record()).title == "b"


# --- what is older never overwrites -----------------------------------------------------------------------------------


async def test_older_contexts_and_documents_give_way(world: World) -> None:
    await begin(world, "x")
    async with world.losing() as runtime:
        session = await opened(runtime)
        await session.switch_agent("coder", reason="late")
        await session.update_context(metadata={"late": True})
        await session.put_document("notes", "n", "late")
        await session.put_document("notes", "only late", "late")
        await session.update(title="late", description="late")
    async with world.second() as runtime:
        session = await opened(runtime)
        await session.switch_agent("writer")
        await session.update_context(metadata={"late": False})
        await session.put_document("notes", "n", "newer")
        await session.put_document("notes", "new", "newer")
        await session.update(title="newer")
    async with world.open() as runtime:
        session = await opened(runtime)
        context = await session.context()
        assert (context.current_agent, context.metadata, context.switch_count) == ("writer", {"late": False}, 1)
        assert [switch.to_agent for switch in await session.switches()] == ["writer"]
        documents = {each.key: each.value for each in (await session.list_documents("notes")).items}
        assert documents == {"n": "newer", "new": "newer", "only late": "late"}
        record = await session.record()
        assert (record.title, record.description) == ("newer", "late")


async def test_a_late_deletion_takes_no_document_that_is_newer(world: World) -> None:
    async with world.open() as runtime:
        session = await runtime.create_session("s")
        for key in ("kept", "newer", "again"):
            await session.put_document("notes", key, "old")
    async with world.losing() as runtime:
        session = await opened(runtime)
        for key in ("newer", "again"):
            assert await session.delete_document("notes", key)
    async with world.second() as runtime:
        session = await opened(runtime)
        await session.put_document("notes", "newer", "new")
        await session.delete_document("notes", "again")
        await session.put_document("notes", "again", "new")
    async with world.open() as runtime:
        documents = (await (await opened(runtime)).list_documents("notes")).items
        assert {each.key: each.value for each in documents} == {"kept": "old", "newer": "new", "again": "new"}


async def test_what_nobody_has_touched_comes_in_as_it_was(world: World) -> None:
    async with world.open() as runtime:
        session = await runtime.create_session("s")
        await session.put_document("notes", "old", 1)
    async with world.losing() as runtime:
        session = await opened(runtime)
        await session.switch_agent("coder")
        await session.update_context(metadata={"late": True})
        await session.put_document("notes", "n", b"late", media_type="image/png")
        assert await session.delete_document("notes", "old")
        await session.update(title="late")
        expected = await session.record(), await session.context(), await session.switches()
    async with world.second() as runtime:
        await runtime.create_session("other")
    async with world.open() as runtime:
        session = await opened(runtime)
        assert (await session.record(), await session.context(), await session.switches()) == expected
        assert [each.key for each in (await session.list_documents("notes")).items] == ["n"]


async def test_of_details_and_documents_that_were_given_twice_the_last_ones_come_in(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have changed the session; the clock is set back meanwhile, which is how two documents would be told."""
    await begin(world)
    times = (utc_now() - timedelta(seconds=number) for number in count())
    with monkeypatch.context() as patched:
        patched.setattr("agent_runtime.runtime.utc_now", times.__next__)
        async with world.losing() as runtime:
            session = await opened(runtime)
            await session.append("user", "names the session")
            await session.update(title="first")
            await session.update(title="last", metadata={"last": True})
            await session.put_document("notes", "n", "first")
            await session.put_document("notes", "n", "last")
    async with world.second() as runtime:
        await (await opened(runtime)).put_document("notes", "other", 1)
    async with world.open() as runtime:
        session = await opened(runtime)
        record, document = await session.record(), await session.get_document("notes", "n")
        assert (record.title, record.metadata) == ("last", {"last": True})
        assert document is not None
        assert document.value == "last"


async def test_details_that_are_newer_leave_those_that_they_do_not_give(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change of details states all of them; a first message names its session, and that is such a change."""
    await begin(world)
    with monkeypatch.context() as patched:
        patched.setattr("agent_runtime.runtime.utc_now", lambda: utc_now() + timedelta(hours=1))
        async with world.losing() as runtime:
            await (await opened(runtime)).append("user", "late")
    async with world.second() as runtime:
        await (await opened(runtime)).update(description="meanwhile", metadata={"meanwhile": True})
    async with world.open() as runtime:
        record = await (await opened(runtime)).record()
        assert (record.title, record.description, record.metadata) == ("late", "meanwhile", {"meanwhile": True})


# --- deleted sessions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
async def test_changes_of_a_deleted_session_go_to_quarantine_and_hold_nobody(world: World, again: bool) -> None:
    await begin(world, "x")
    async with world.losing() as runtime:
        session = await opened(runtime)
        await session.append("user", "a")
        await session.append("user", "b")
    async with world.second() as runtime:
        await (await opened(runtime)).delete()
        if again:
            await (await runtime.create_session("s")).append("user", "anew")
    for _ in range(2):
        async with world.open() as runtime:
            entries = await runtime.quarantine.entries()
            assert [(each.session_id, each.state) for each in entries] == [("s", "rejected")] * 2
            assert runtime.status().quarantine.orphans == 2
            assert runtime.status().quarantine.sessions == 0
            if again:
                await (await opened(runtime)).append("user", "and on")
            else:
                with pytest.raises(SessionNotFound):
                    await opened(runtime)
                await (await runtime.create_session("s")).append("user", "anew")
                again = True
    async with world.open() as runtime:
        with pytest.raises(InvalidInput, match="was deleted before these changes came"):
            await runtime.quarantine.replay("s")
        assert await runtime.quarantine.drop("s") == 0
        assert await runtime.quarantine.entries() == []
        assert runtime.status().quarantine.orphans == 0
        with pytest.raises(SessionNotFound):
            await runtime.quarantine.drop("s")
    async with world.open() as runtime:
        assert await runtime.quarantine.entries() == []
        assert (await shown(runtime))[:1] == ["anew"]


async def test_a_late_deletion_deletes_what_nobody_has_changed(world: World) -> None:
    await begin(world, "x")
    async with world.open() as runtime:
        await (await runtime.create_session("t")).append("user", "y")
    async with world.losing() as runtime:
        for name in ("s", "t"):
            session = await opened(runtime, name)
            await session.append("user", "a")
            await session.delete()
        await (await runtime.create_session("s")).append("user", "anew")
    async with world.second() as runtime:
        await (await opened(runtime, "t")).append("user", "meanwhile")
    async with world.open() as runtime:
        assert await shown(runtime, "s") == ["anew"]
        assert await shown(runtime, "t") == ["meanwhile"]
        assert await runtime.quarantine.entries() == []


async def test_a_late_deletion_leaves_a_session_in_which_anything_was_changed_since(world: World) -> None:
    changes: dict[str, Callable[[SessionHandle], Awaitable[object]]] = {
        "document": lambda session: session.put_document("notes", "n", 1),
        "agent": lambda session: session.switch_agent("coder"),
        "context": lambda session: session.update_context(metadata={"a": 1}),
        "title": lambda session: session.update(title="newer"),
        "message": lambda session: session.append("user", "meanwhile"),
    }
    async with world.open() as runtime:
        for name in (*changes, "nothing"):
            await (await runtime.create_session(name)).append("user", "x")
    async with world.losing() as runtime:
        for name in (*changes, "nothing"):
            await (await opened(runtime, name)).delete()
    async with world.second() as runtime:
        for name, change in changes.items():
            await change(await opened(runtime, name))
    async with world.open() as runtime:
        assert {record.session_id async for record in runtime.scan_sessions()} == set(changes)
        for name in changes:
            assert await shown(runtime, name) == (["meanwhile"] if name == "message" else [])


async def test_a_late_deletion_of_a_session_that_is_gone_is_done(world: World) -> None:
    await begin(world, "x")
    async with world.losing() as runtime:
        await (await opened(runtime)).delete()
    async with world.second() as runtime:
        await (await opened(runtime)).delete()
    async with world.open() as runtime:
        assert (await runtime.list_sessions()).items == []
        assert await runtime.quarantine.entries() == []


async def test_what_stood_in_a_session_that_is_deleted_later_does_not_come_in(world: World) -> None:
    """Neither where others go on with the session, nor, in quarantine, where they have deleted it too."""
    async with world.open() as runtime:
        for name in ("changed", "deleted"):
            await (await runtime.create_session(name)).append("user", "x")
    async with world.losing() as runtime:
        for name in ("changed", "deleted"):
            session = await opened(runtime, name)
            await session.append("user", "secret")
            await session.update(description="secret", metadata={"secret": True})
            await session.switch_agent("secret")
            await session.delete()
    async with world.second() as runtime:
        await (await opened(runtime, "changed")).append("user", "meanwhile")
        await (await opened(runtime, "deleted")).delete()
    async with world.open() as runtime:
        session = await opened(runtime, "changed")
        assert await shown(runtime, "changed") == ["meanwhile"]
        record = await session.record()
        assert (record.description, record.metadata) == (None, {})
        assert (await session.context()).current_agent == "orchestrator"
        assert await session.switches() == []
        assert await runtime.quarantine.entries() == []


# --- every order of putting, deleting and creating ---------------------------------------------------------------------

STEPS = ("put", "discard", "delete", "create")
SHORT = [(), *product(STEPS), *product(STEPS, repeat=2)]


class Meanwhile(NamedTuple):
    """What becomes of one session: it was there from before or not, and what either runtime does to it."""

    stored: bool
    late: tuple[str, ...]
    second: tuple[str, ...]

    @property
    def name(self) -> str:
        return "_".join(("stored" if self.stored else "absent", "late", *self.late, "second", *self.second))

    def left_by(self, who: tuple[str, ...], value: str) -> str | None:
        """The document, had nobody else done anything. "none": the session has none; None: there is no session."""
        found = "base" if self.stored else None
        for step in who:
            found = {"put": value, "discard": found and "none", "delete": None, "create": found or "none"}[step]
        return found

    def allowed(self, *, ahead: bool) -> set[str | None]:
        """What may be there in the end. `ahead`: by the clock, all that is late was done after the rest."""
        late, second = self.left_by(self.late, "late"), self.left_by(self.second, "second")
        if not self.second or (self.stored and set(self.second) == {"create"}):  # nobody else has changed anything
            return {late}
        if not self.late or (self.stored and set(self.late) == {"create"}):
            return {second}
        lost = self.stored and "delete" in self.second and "delete" not in self.late  # its changes are in quarantine
        if lost or (second == "second" and not ahead):
            return {second}
        if second == "second" and late != "late":
            removed = self.stored and {"discard", "delete"} & {*self.late}  # by the clock it had seen the other's
            return {second, "none"} if removed else {second}
        if late == "late":
            return {"late"}
        if "base" in (late, second):  # one has created it anew, or discarded it, the other has not
            return {late, second} - {"base"} or {"base"}
        return {late, second} - {None} or {None}


EVERY = [Meanwhile(*each) for each in product((True, False), SHORT, SHORT)]


async def do(runtime: Runtime, name: str, steps: tuple[str, ...], value: str) -> None:
    for step in steps:
        if step in {"put", "create"}:
            session = await runtime.get_or_create_session(name)
            if step == "put":
                await session.put_document("notes", "n", value)
            continue
        try:
            session = await runtime.get_session(name)
        except SessionNotFound:
            continue
        await (session.delete() if step == "delete" else session.delete_document("notes", "n"))


@pytest.mark.parametrize("ahead", [False, True])
async def test_of_two_documents_the_newer_stands_in_every_order_of_deletion_and_creation(
    world: World, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """`ahead`: the clock of the runtime that was overtaken is an hour ahead of the other's."""
    async with world.open() as runtime:
        for each in EVERY:
            if each.stored:
                await do(runtime, each.name, ("put",), "base")
    with monkeypatch.context() as patched:
        if ahead:
            patched.setattr("agent_runtime.runtime.utc_now", lambda: utc_now() + timedelta(hours=1))
        async with world.losing() as runtime:
            for each in EVERY:
                await do(runtime, each.name, each.late, "late")
    async with world.second() as runtime:
        for each in EVERY:
            await do(runtime, each.name, each.second, "second")
    wrong = {}
    async with world.open() as runtime:
        for each in EVERY:
            found: Any = None
            with contextlib.suppress(SessionNotFound):
                document = await (await opened(runtime, each.name)).get_document("notes", "n")
                found = "none" if document is None else document.value
            if found not in each.allowed(ahead=ahead):
                wrong[each.name] = found, each.allowed(ahead=ahead)
    assert wrong == {}


# --- room -------------------------------------------------------------------------------------------------------------


async def test_more_than_there_is_room_for_comes_in_however_slow_the_database_is(world: World) -> None:
    await begin(world, "stored")
    async with world.losing() as runtime:
        session = await opened(runtime)
        for number in range(20):
            await session.append("user", f"{number:10000}")
    async with world.second() as runtime:
        await (await opened(runtime)).append("user", "meanwhile")
    world.faults.delay(0.05, "apply")
    async with world.open(pending_bytes_max=65_536, append_timeout_s=0.01) as runtime:
        assert len(await shown(runtime)) == 22


# --- held sessions ----------------------------------------------------------------------------------------------------


async def test_late_changes_of_a_held_session_queue_behind_what_holds_it(world: World) -> None:
    await begin(world, "x")
    async with world.losing() as runtime:
        await (await opened(runtime)).append("user", "a")
    async with world.second() as runtime:
        session = await opened(runtime)
        message = await session.append("user", "poison")
        world.faults.reject(writes_message(message.id))
        await session.append("user", "queued")
        with pytest.raises(Exception, match="quarantine"):
            await runtime.flush()
    async with world.open() as runtime:
        assert await shown(runtime) == ["x", "poison", "queued", "a"]
        assert [each.state for each in await runtime.quarantine.entries()] == ["rejected", "queued", "queued"]
        world.faults.clear()
        assert await runtime.quarantine.replay("s") == 3
    async with world.second() as runtime:
        assert await shown(runtime) == ["x", "poison", "queued", "a"]


# --- again and again --------------------------------------------------------------------------------------------------


async def write_much(runtime: Runtime) -> None:
    session = await opened(runtime)
    await session.append("user", "a", idempotency_key="ka")
    await session.append("user", "b")
    await session.pop()
    await session.append("user", "c", idempotency_key="kc")
    await session.put_document("notes", "n", 1)
    await session.switch_agent("coder")
    new = await runtime.create_session("new", idempotency_key="kn")
    await new.append("user", "d")
    gone = await opened(runtime, "gone")
    await gone.append("user", "e")
    cleared = await opened(runtime, "cleared")
    await cleared.append("user", "f")
    await cleared.clear()
    await cleared.append("user", "g")


async def all_of(runtime: Runtime) -> list[Any]:
    found: list[Any] = []
    async for record in runtime.scan_sessions():
        session = await runtime.get_session(record.session_id)
        messages = [(each.seq, each.content, each.late) async for each in session.scan_messages()]
        documents = [each.key for each in (await session.list_documents("notes")).items]
        context = await session.context()
        found.append(
            (record.session_id, record.message_count, messages, documents, context.current_agent, context.switch_count)
        )
    return sorted(found) + [(each.session_id, each.state) for each in await runtime.quarantine.entries()]


async def prepare(world: World) -> None:
    await begin(world, "x")
    async with world.open() as runtime:
        for name in ("gone", "cleared"):
            await (await runtime.create_session(name)).append("user", "y")
    async with world.losing() as runtime:
        await write_much(runtime)
    async with world.second() as runtime:
        session = await opened(runtime)
        await session.append("user", "meanwhile")
        await session.append("user", "a", idempotency_key="ka")
        await (await opened(runtime, "gone")).delete()
        await (await opened(runtime, "cleared")).append("user", "meanwhile")


EXPECTED = [
    ("cleared", 2, [(2, "meanwhile", False), (4, "g", True)], [], "orchestrator", 0),
    ("new", 1, [(1, "d", False)], [], "orchestrator", 0),
    ("s", 4, [(1, "x", False), (2, "meanwhile", False), (3, "a", False), (5, "c", True)], ["n"], "coder", 1),
    ("gone", "rejected"),
]


@BOTH
@pytest.mark.parametrize("stored", [False, True])
async def test_replay_may_be_broken_off_anywhere_and_run_again(world: World, stored: bool) -> None:
    """Each try stores one or two batches; `stored`: the last one without an answer."""
    await prepare(world)
    tries = 0
    while True:
        tries += 1
        try:
            with world.away_after(1, stored=stored):
                async with world.open(batch_changes=2, durability_timeout_s=0.05, drain_timeout_s=0.02) as runtime:
                    assert await all_of(runtime) == EXPECTED
            break
        except StorageUnavailable:
            assert tries < 30
    assert tries > 2
    async with world.open() as runtime:
        assert await all_of(runtime) == EXPECTED
    if not stored:  # else the last try had nothing to do, and no look at it
        assert not [path.name for path in (world.directory / "first").glob(f"{MARK}*")]


async def test_a_third_runtime_may_write_between_two_tries(world: World) -> None:
    await prepare(world)
    for number in range(3):
        with world.away_after(1), pytest.raises(StorageUnavailable):
            async with world.open(batch_changes=2, durability_timeout_s=0.05, drain_timeout_s=0.02):
                pass
        async with world.second() as runtime:
            await (await opened(runtime)).append("user", f"third {number}")
    async with world.open() as runtime:
        found = await all_of(runtime)
        (session,) = [each for each in found if each[0] == "s"]
        texts = ["x", "meanwhile", "a", "c", "third 0", "third 1", "third 2"]
        assert sorted(text for _, text, _ in session[2]) == sorted(texts)
        assert [each for each in found if each[0] != "s"] == [each for each in EXPECTED if each[0] != "s"]


async def test_what_a_third_runtime_does_between_two_tries_is_not_taken_for_what_came_in(world: World) -> None:
    await begin(world, "x")
    async with world.losing() as runtime:
        await (await opened(runtime)).append("user", "late")
        await (await opened(runtime)).put_document("notes", "n", "late")
    async with world.second() as runtime:
        await runtime.create_session("other")
    with world.away_after(1), pytest.raises(StorageUnavailable):
        async with world.open(batch_changes=1, durability_timeout_s=0.05, drain_timeout_s=0.02):
            pass
    async with world.second() as runtime:
        assert await shown(runtime) == ["x", "late"]
        await (await opened(runtime)).put_document("notes", "n", "third")
    async with world.open() as runtime:
        document = await (await opened(runtime)).get_document("notes", "n")
        assert document is not None
        assert document.value == "third"


async def test_a_change_whose_commit_was_unknown_and_landed_comes_once(world: World) -> None:
    await begin(world, "x")
    with world.away_after(0, stored=True), pytest.raises(DrainIncomplete):
        async with world.open(drain_timeout_s=0.02) as runtime:
            await (await opened(runtime)).append("user", "landed")
    async with world.second() as runtime:
        await (await opened(runtime)).append("user", "meanwhile")
    async with world.open() as runtime:
        assert await shown(runtime) == ["x", "landed", "meanwhile"]


async def test_the_journal_goes_on_after_it_came_in(world: World) -> None:
    """What is written then is its own again: it comes back on time, unless it is overtaken once more."""
    await begin(world, "x")
    expected = ["x"]
    for number in range(3):
        async with world.losing() as runtime:
            assert sorted(map(str, await shown(runtime))) == sorted(expected)
            await (await opened(runtime)).append("user", f"late {number}")
        async with world.second() as runtime:
            await (await opened(runtime)).append("user", f"meanwhile {number}")
        async with world.losing() as runtime:
            await (await opened(runtime)).append("user", f"on time {number}")
        async with world.open() as runtime:
            expected += [f"meanwhile {number}", f"late {number}", f"on time {number}"]
            assert await shown(runtime) == expected
            assert await late_of(runtime) == {f"late {each}": 2 + 3 * each for each in range(number + 1)}
        async with world.second():
            pass


async def test_a_journal_with_nothing_unstored_goes_on_behind_another_one(world: World) -> None:
    await begin(world, "x")
    async with world.second() as runtime:
        await (await opened(runtime)).append("user", "meanwhile")
    async with world.losing() as runtime:
        await (await opened(runtime)).append("user", "on time")
    async with world.open() as runtime:
        assert await shown(runtime) == ["x", "meanwhile", "on time"]
        assert await late_of(runtime) == {}


async def test_late_replay_that_is_overtaken_itself_keeps_what_is_left(world: World) -> None:
    await prepare(world)
    gate = world.faults.hold("apply", nth=3)

    async def take_over() -> None:
        await gate.reached.wait()
        async with world.factory(StorageConfig(url=world.url)) as storage:
            async with storage.snapshot() as snapshot:
                lease = await snapshot.lease()
            assert lease is not None
            await storage.leases.release(Fence(partition=0, epoch=lease.epoch, journal_id=None))
        gate.open()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take_over)
        with pytest.raises(LeaseLost):
            async with world.open(batch_changes=1):
                pass
    async with world.open() as runtime:
        assert await all_of(runtime) == EXPECTED


@pytest.mark.parametrize("kind", ["another's", "unknown"])
async def test_a_frame_without_the_change_that_it_names_is_refused_and_nothing_comes_in(
    world: World, kind: str
) -> None:
    await begin(world, "x")
    async with world.losing() as runtime:
        for text in ("a", "b", "c"):
            await (await opened(runtime)).append("user", text)
    async with world.second() as runtime:
        await (await opened(runtime)).append("user", "meanwhile")
    left = Left(world.directory, "first")
    sequence = max(left.frames()) - 1
    change = left.change(sequence)
    if kind == "unknown":
        left.rewrite(sequence, b'{"sequence":%d}' % sequence)
        told = f"change {sequence} of the journal .* is whole, but can't be read: it was written by another version"
    else:
        left.rewrite(sequence, left.change(sequence - 1))
        told = f"the frame {sequence} of the journal .* holds change {sequence - 1}"
    with pytest.raises(JournalCorrupt, match=told):
        async with world.open():
            raise AssertionError
    async with world.second() as runtime:
        assert await shown(runtime) == ["x", "meanwhile"]
    left.rewrite(sequence, change)
    async with world.open() as runtime:
        assert await shown(runtime) == ["x", "meanwhile", "a", "b", "c"]
