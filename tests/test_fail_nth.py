"""One call of the storage fails, the first, the second, …, until none is left to fail: nothing acknowledged is lost or doubled.

The same tale is told each time: everything that sessions can do, with evictions, refusals and restarts. A call that fails
is made again, as it changed nothing. Over a database in memory time is virtual, so that waiting for the next try takes a
moment; over PostgreSQL, with a journal, it is real, and the wait short.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import anyio
import msgspec
import pytest

from agent_runtime import (
    Config,
    LeaseHeld,
    NewMessage,
    Quarantined,
    Runtime,
    SessionHandle,
    SessionNotFound,
    StorageUnavailable,
    scheduler,
)
from agent_runtime.storage import StorageFactory
from agent_runtime.testing import CallName, Fault, Faults, writes_message
from agent_runtime_memory import MemoryDatabase
from agent_runtime_postgresql import open_postgresql
from model import Model, ModelSession
from postgres_server import migrated_schema, url_of
from rig import audit, audit_at_rest, config, opened
from rig import virtual_time as anyio_backend

__all__ = ["anyio_backend"]

pytestmark = pytest.mark.anyio

T = TypeVar("T")
Database: TypeAlias = tuple[Config, StorageFactory]

CALLS_MAX: Final = 1000
"""More than a tale takes."""
LEASE_S: Final = 1.0
WITH_EFFECT: Final[tuple[CallName, ...]] = ("open", "acquire", "apply", "purge", "release")
SECTIONS: Final[dict[str, dict[str, Any]]] = {
    "residents": {"tail_messages": 2},
    "write_behind": {"interval_s": 60.0, "batch_changes": 4, "drain_timeout_s": 60.0},
}


def in_memory() -> Database:
    """A new database in memory."""
    return config(**SECTIONS), MemoryDatabase().open


class Tale:
    """Tells the tale to a runtime and to the model."""

    def __init__(self, database: Database) -> None:
        self.faults = Faults()
        self.planned: list[Fault] = []
        self.poison = self.faults.reject(writes_message("poison"))  # before all others, so that it is never stored
        self.config, self.factory = database
        self.model = Model()
        self.stack = AsyncExitStack()
        self.runtime: Runtime
        self.handles: dict[str, SessionHandle] = {}

    async def told(self) -> None:
        """From the beginning to the end, which comes after everything was checked once more."""
        async with self.stack:
            await self.open()
            await self.chapter_of_messages()
            await self.reopen()
            await self.chapter_of_other_things()
            await self.reopen()
            await self.chapter_of_poison()
            await self.chapter_of_endings()
            await self.reopen()
            await self.check()
            await self.again(self.runtime.flush)
            audit_at_rest(self.runtime)

    async def again(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call until it works; what did not work has changed nothing, and was planned."""
        while True:
            hits, accepted = self.hits, self.runtime.watermarks.accepted
            try:
                return await call()
            except StorageUnavailable:
                assert self.hits > hits
                assert self.runtime.watermarks.accepted == accepted
                audit(self.runtime)

    @property
    def hits(self) -> int:
        return sum(fault.hits for fault in self.planned)

    async def open(self) -> None:
        while True:
            hits = self.hits
            try:
                self.runtime = await self.stack.enter_async_context(opened(self.config, self.factory, self.faults))
            except (StorageUnavailable, OSError):
                assert self.hits > hits
            except LeaseHeld:  # by the first opening, which never heard that it had it: the lease has to expire
                assert self.hits
                await anyio.sleep(LEASE_S / 10)
            else:
                return

    async def reopen(self) -> None:
        accepted = self.runtime.watermarks.accepted
        await self.stack.aclose()
        await self.open()
        assert self.runtime.watermarks.stored == accepted
        for session_id, session in self.model.sessions.items():
            handle = await self.again(lambda: self.runtime.get_session(session_id))  # noqa: B023 — called at once
            assert handle.incarnation == session.incarnation
            self.handles[session_id] = handle

    async def forget(self) -> None:
        """Let go of all that is stored."""
        await self.again(self.runtime.flush)
        books = self.runtime._residents
        bytes_max, books.bytes_max = books.bytes_max, 0
        books._evict()
        books.bytes_max = bytes_max

    async def create(self, session_id: str, **fields: Any) -> None:
        key = f"create {session_id}"
        create = self.runtime.create_session
        handle = await self.again(lambda: create(session_id, **fields, idempotency_key=key))
        self.handles[session_id] = handle
        await self.again(lambda: self.model.create(handle, **fields))
        repeated = await self.again(lambda: create(session_id, **fields, idempotency_key=key))
        assert repeated.incarnation == handle.incarnation

    async def change(
        self,
        session_id: str,
        call: Callable[[SessionHandle], Awaitable[T]],
        effect: Callable[[ModelSession, T], object],
    ) -> None:
        session, handle = self.model.sessions[session_id], self.handles[session_id]
        effect(session, await self.again(lambda: call(handle)))
        await self.again(lambda: session.settle(handle))

    async def append(self, session_id: str, *new: NewMessage, **options: Any) -> None:
        await self.change(
            session_id,
            lambda handle: handle.append_many(new, **options),
            lambda session, messages: session.append(new, messages),
        )

    async def pop(self, session_id: str, **options: Any) -> None:
        await self.change(
            session_id, lambda handle: handle.pop(**options), lambda session, message: session.pop(message)
        )

    async def put(self, session_id: str, key: str, value: Any) -> None:
        media_type = "text/plain" if isinstance(value, bytes) else None
        await self.change(
            session_id,
            lambda handle: handle.put_document("notes", key, value, media_type=media_type),
            lambda session, document: session.put("notes", key, value, media_type, document),
        )

    async def chapter_of_messages(self) -> None:
        await self.create("a", system_prompt="lead", user_id="u", metadata={"n": 1})
        await self.create("b")
        for number in range(5):
            await self.append("a", user(f"a{number}"))
        await self.append("b", user("b"), durability="stored")
        await self.append("a", call("t1"), result("t1"))
        await self.forget()
        await self.pop("a")
        await self.append("a", user("kept"), idempotency_key="k")
        accepted = self.runtime.watermarks.accepted
        await self.forget()
        repeated = await self.again(lambda: self.handles["a"].append_many([user("kept")], idempotency_key="k"))
        assert repeated == self.model.sessions["a"].messages[-1:]
        assert self.runtime.watermarks.accepted == accepted
        await self.check()

    async def chapter_of_other_things(self) -> None:
        await self.put("a", "1", {"x": [1, 2.5, None]})
        await self.put("a", "2", b"bytes")
        await self.change(
            "a",
            lambda handle: handle.switch_agent("coder", reason="why", durability="stored"),
            lambda session, context: session.switch("coder", "why", context),
        )
        await self.change(
            "a",
            lambda handle: handle.update_context(metadata={"m": 2}),
            lambda session, _: setattr(session, "context_metadata", {"m": 2}),
        )
        await self.change(
            "b", lambda handle: handle.update(title="new"), lambda session, _: setattr(session, "title", "new")
        )
        await self.forget()
        await self.change(
            "a",
            lambda handle: handle.delete_document("notes", "1"),
            lambda session, _: session.documents.pop(("notes", "1")),
        )
        await self.change("b", lambda handle: handle.clear(), lambda session, _: session.clear())
        await self.append("b", NewMessage(role="system", content="new lead"), user("anew"))
        await self.check()

    async def chapter_of_poison(self) -> None:
        await self.create("p")
        await self.append("p", user("before"))
        await self.again(self.runtime.flush)
        await self.append("p", user("refused", id="poison"))
        await self.append("p", user("behind"))
        await self.append("b", user("beside"))
        with pytest.raises(Quarantined):
            await self.again(self.runtime.flush)
        assert len(await self.again(self.runtime.quarantine.entries)) == 2
        await self.reopen()
        await self.check()
        with pytest.raises(Quarantined):
            await self.again(lambda: self.runtime.quarantine.replay("p"))
        self.poison.stop()
        assert await self.again(lambda: self.runtime.quarantine.replay("p")) == 2
        await self.check()

    async def chapter_of_endings(self) -> None:
        handle = self.handles["b"]
        await self.again(lambda: handle.delete(idempotency_key="end"))
        del self.model.sessions["b"]
        await self.create_anew()
        await self.forget()
        await self.again(lambda: handle.delete(idempotency_key="end"))
        with pytest.raises(SessionNotFound):
            await self.again(handle.history)
        await self.pop("a", durability="stored")
        await self.check()

    async def create_anew(self) -> None:
        handle = self.handles["b"] = await self.again(lambda: self.runtime.get_or_create_session("b", user_id="u"))
        await self.again(lambda: self.model.create(handle, user_id="u"))
        await self.append("b", user("second life"))

    async def check(self) -> None:
        """Everything is as the model says."""
        audit(self.runtime)
        page = await self.again(self.runtime.list_sessions)
        assert page.items == self.model.listing(None, "desc")
        for session in self.model.sessions.values():
            await self.check_session(session, self.handles[session.session_id])

    async def check_session(self, session: ModelSession, handle: SessionHandle) -> None:
        assert await self.again(lambda: handle.history(3)) == session.history(3)
        assert await self.again(lambda: handle.messages(after=1)) == session.page(1, 100, "asc")
        assert await self.again(handle.record) == session.record
        assert await self.again(handle.context) == session.context
        assert await self.again(handle.switches) == session.switches
        documents = await self.again(lambda: handle.list_documents("notes"))
        assert documents == session.document_page("notes", None, 100)


def user(content: str, **fields: Any) -> NewMessage:
    return NewMessage(role="user", content=content, **fields)


def call(call_id: str) -> NewMessage:
    return NewMessage(role="assistant", tool_calls=[{"id": call_id, "function": {"name": "f", "arguments": "{}"}}])


def result(call_id: str) -> NewMessage:
    return NewMessage(role="tool", content=msgspec.json.encode([1]).decode(), tool_call_id=call_id)


async def test_the_tale_as_it_is() -> None:
    tale = Tale(in_memory())
    await tale.told()
    assert tale.faults.count() > 100


async def until_none_is_left(
    plan: Callable[[Faults, int], Fault],
    name: CallName | None = None,
    *,
    first: int = 1,
    step: int = 1,
    new: Callable[[], Database] = in_memory,
) -> None:
    """Tell the tale again and again; in each a fault is planned for the nth call (of that name)."""
    for nth in count(first, step):
        tale = Tale(new())
        fault = plan(tale.faults, nth)
        tale.planned.append(fault)
        await tale.told()
        if nth > tale.faults.count(name):
            return
        assert fault.hits <= 1


def without_effect(faults: Faults, nth: int) -> Fault:
    return faults.fail(nth=nth, error=OSError("odd") if nth % 3 == 0 else None)


async def test_the_nth_call_fails_without_effect(anyio_backend_name: str) -> None:
    """Half of them on each event loop."""
    await until_none_is_left(without_effect, first=1 + (anyio_backend_name == "trio"), step=2)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_every_nth_call_fails_without_effect() -> None:
    await until_none_is_left(without_effect)


def after_effect(name: CallName) -> Callable[[Faults, int], Fault]:
    return lambda faults, nth: faults.fail(name, nth=nth, after_effect=True)


def late(faults: Faults, nth: int) -> Fault:
    return faults.commit_late(nth=nth)


@pytest.mark.parametrize("name", WITH_EFFECT)
async def test_the_nth_call_fails_after_its_effect(name: CallName) -> None:
    await until_none_is_left(after_effect(name), name)


async def test_the_nth_batch_is_committed_late() -> None:
    await until_none_is_left(late, "apply")


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Database]:
    """Makes a new database with a journal; the first try after a failure comes soon."""
    monkeypatch.setattr(scheduler, "_BACKOFF_FIRST_S", 0.001)

    def new() -> Database:
        schema = migrated_schema()
        journal = {"directory": str(tmp_path / schema)}
        lease = {"duration_s": LEASE_S}
        return config(f"faulty:{url_of(schema)}", journal=journal, lease=lease, **SECTIONS), open_postgresql

    return new


in_real_time = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])


@in_real_time
@pytest.mark.parametrize(
    ("plan", "step"),
    [(without_effect, 13), (after_effect("apply"), 3), (late, 3)],
    ids=["without effect", "after its effect", "late"],
)
async def test_now_and_then_a_call_of_postgresql_fails(
    in_schema: Callable[[], Database], plan: Callable[[Faults, int], Fault], step: int, anyio_backend_name: str
) -> None:
    """Many of one tale, others on each event loop."""
    tale = Tale(in_schema())
    first = 1 if anyio_backend_name == "asyncio" else 1 + step // 2
    tale.planned = [plan(tale.faults, nth) for nth in range(first, CALLS_MAX, step)]
    await tale.told()
    assert tale.hits > 5


@pytest.mark.long
@pytest.mark.timeout(1800)
@in_real_time
@pytest.mark.parametrize(
    ("plan", "name"),
    [(without_effect, None), (late, "apply"), *((after_effect(name), name) for name in WITH_EFFECT)],
    ids=["without effect", "late", *WITH_EFFECT],
)
async def test_the_nth_call_of_postgresql_fails(
    in_schema: Callable[[], Database], plan: Callable[[Faults, int], Fault], name: CallName | None
) -> None:
    await until_none_is_left(plan, name, new=in_schema)
