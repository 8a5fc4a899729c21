"""No read is torn, however loads, commits, evictions and calls of the storage are interleaved.

Every call of the storage waits at a turnstile, and so does every task between its calls; the tests say who goes next.
A read is right if its result is that of the plain model at one moment between its start and its end.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, NamedTuple, TypeAlias, TypeVar

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_runtime import Message, NewMessage, Runtime, Session, SessionExists, SessionHandle, SessionNotFound
from agent_runtime.changes import Batch
from agent_runtime.testing import CallName, Faults
from model import Model, ModelSession, place
from rig import all_wait, audit, audit_at_rest, running

pytestmark = pytest.mark.anyio

T = TypeVar("T")
Choose: TypeAlias = Callable[[list[str]], int]


class Turnstile(Faults):
    """Lets one task at a time go on, once it is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.shut = False
        self._waiting: dict[str, anyio.Event] = {}

    async def call(self, name: CallName, effect: Callable[[], Awaitable[T]], batch: Batch | None = None) -> T:
        if name == "purge":
            return await effect()
        if not self.shut:
            return await super().call(name, effect, batch)
        if name == "apply":  # for a read, to wait before a call is to wait after the last one
            await self.turn()
        result = await effect()
        await self.turn()
        return result

    async def turn(self) -> None:
        """Wait to be let through."""
        if self.shut:
            self._waiting[_task()] = turn = anyio.Event()
            await turn.wait()

    async def play(self, choose: Choose, *actors: Callable[[], Awaitable[object]]) -> None:
        """Run the actors, one step of one of them at a time, as chosen among the names of those who wait."""
        left = len(actors)

        async def act(actor: Callable[[], Awaitable[object]]) -> None:
            nonlocal left
            await self.turn()
            await actor()
            left -= 1

        self.shut = True
        try:
            async with anyio.create_task_group() as tasks:
                for number, actor in enumerate(actors):
                    tasks.start_soon(act, actor, name=f"actor {number}")
                while True:
                    await all_wait()
                    if not self._waiting and not left:
                        break
                    names = sorted(self._waiting)
                    assert names, "everyone waits for someone else"
                    self._waiting.pop(names[choose(names)]).set()
        finally:
            self.shut = False
            while self._waiting:
                self._waiting.popitem()[1].set()


def _task() -> str:
    task = anyio.get_current_task()
    return task.name if task.name is not None and task.name.startswith("actor") else f"of the runtime, {task.id}"


def every_order() -> Iterator[Choose]:
    """Choices, until every order in which the same actors can go on has been had."""
    made: list[tuple[int, int]] = []  # the choice, and among how many
    while True:
        prefix, made = [choice for choice, _ in made], []

        def choose(names: list[str], prefix: list[int] = prefix, made: list[tuple[int, int]] = made) -> int:
            choice = prefix[len(made)] if len(made) < len(prefix) else 0
            made.append((choice, len(names)))
            return choice

        yield choose
        while made and made[-1][0] + 1 == made[-1][1]:
            made.pop()
        if not made:
            return
        made[-1] = (made[-1][0] + 1, made[-1][1])


class Story:
    """Two sessions of one user, and what the model says after each change of them."""

    def __init__(self, runtime: Runtime, turnstile: Turnstile, number: int) -> None:
        self.runtime = runtime
        self.turnstile = turnstile
        self.user_id = f"user {number}"
        self.first_id, self.second_id = f"{number} a", f"{number} b"
        self.model = Model()
        self.states: list[Model] = []
        self.handles: dict[str, SessionHandle] = {}

    async def begin(self, messages: int) -> None:
        """Both sessions, stored and out of memory; the first with messages, a switch and documents."""
        for session_id in (self.first_id, self.second_id):
            handle = self.handles[session_id] = await self.runtime.create_session(
                session_id, user_id=self.user_id, system_prompt="lead"
            )
            await self.model.create(handle, user_id=self.user_id, system_prompt="lead")
        new = [NewMessage(role="user", content=f"message {number}") for number in range(messages)]
        session, handle = self.first
        session.append(new, await handle.append_many(new))
        session.switch("coder", None, await handle.switch_agent("coder"))
        for key in ("1", "2"):
            session.put("notes", key, 0, None, await handle.put_document("notes", key, 0))
        await self.changed(session)
        await self.runtime.flush()
        evict(self.runtime)

    @property
    def first(self) -> tuple[ModelSession, SessionHandle]:
        return self.model.sessions[self.first_id], self.handles[self.first_id]

    async def changed(self, session: ModelSession) -> None:
        await session.settle(self.handles[session.session_id])
        self.states.append(self.model.copy())

    # Changes of the first session. Nothing waits between a change and the model's.

    async def append(self, role: Any = "user", content: str = "new") -> None:
        session, handle = self.first
        session.append([NewMessage(role=role, content=content)], [await handle.append(role, content)])
        await self.changed(session)

    async def pop(self) -> None:
        session, handle = self.first
        session.pop(await handle.pop())
        await self.changed(session)

    async def clear(self) -> None:
        session, handle = self.first
        await handle.clear()
        session.clear()
        await self.changed(session)

    async def switch(self, agent: str) -> None:
        session, handle = self.first
        session.switch(agent, None, await handle.switch_agent(agent))
        await self.changed(session)

    async def put(self, key: str, value: int) -> None:
        session, handle = self.first
        session.put("notes", key, value, None, await handle.put_document("notes", key, value))
        await self.changed(session)

    async def discard(self, key: str) -> None:
        session, handle = self.first
        deleted = await handle.delete_document("notes", key)
        assert deleted == (session.documents.pop(("notes", key), None) is not None)
        await self.changed(session)

    async def delete(self) -> None:
        await self.first[1].delete()
        del self.model.sessions[self.first_id]
        self.states.append(self.model.copy())

    async def create(self) -> None:
        handle = await self.runtime.create_session(self.first_id, user_id=self.user_id)
        self.handles[self.first_id] = handle
        await self.model.create(handle, user_id=self.user_id)
        self.states.append(self.model.copy())

    # What befalls it

    async def flush(self) -> None:
        await self.runtime.flush()

    async def evict(self) -> None:
        evict(self.runtime)


def evict(runtime: Runtime) -> None:
    """Let go of all that may be."""
    books = runtime._residents
    bytes_max, books.bytes_max = books.bytes_max, 0
    books._evict()
    books.bytes_max = bytes_max


class Read(NamedTuple):
    """A read: how a story's first session, or the runtime, is asked; and what a model of both sessions says."""

    ask: Callable[[Story, SessionHandle], Awaitable[object]]
    expect: Callable[[Story, SessionHandle, Model], object]


def of_session(ask: Callable[[SessionHandle], Awaitable[object]], expect: Callable[[ModelSession], object]) -> Read:
    def expected(_: Story, handle: SessionHandle, model: Model) -> object:
        session = model.sessions.get(handle.session_id)
        there = session is not None and session.incarnation == handle.incarnation
        return expect(session) if session is not None and there else SessionNotFound

    return Read(lambda _, handle: ask(handle), expected)


async def listed(story: Story, order: Any) -> list[Session]:
    return (await story.runtime.list_sessions(user_id=story.user_id, order=order, limit=9)).items


async def found(story: Story) -> str:
    return (await story.runtime.get_session(story.first_id)).incarnation


def there(story: Story, model: Model) -> object:
    session = model.sessions.get(story.first_id)
    return SessionNotFound if session is None else session.incarnation


READS: dict[str, Read] = {
    "oldest": of_session(lambda handle: handle.messages(limit=3), lambda session: session.page(None, 3, "asc")),
    "newest": of_session(
        lambda handle: handle.messages(limit=3, order="desc"), lambda session: session.page(None, 3, "desc")
    ),
    "backwards": of_session(
        lambda handle: handle.messages(limit=20, order="desc"), lambda session: session.page(None, 20, "desc")
    ),
    "middle": of_session(
        lambda handle: handle.messages(after=5, limit=9, order="desc"), lambda session: session.page(5, 9, "desc")
    ),
    "message": of_session(lambda handle: handle.message(4), lambda session: session.message(4)),
    "history": of_session(lambda handle: handle.history(), lambda session: session.history(None)),
    "short history": of_session(lambda handle: handle.history(2), lambda session: session.history(2)),
    "record": of_session(lambda handle: handle.record(), lambda session: session.record),
    "context": of_session(lambda handle: handle.context(), lambda session: session.context),
    "switches": of_session(lambda handle: handle.switches(), lambda session: session.switches),
    "document": of_session(
        lambda handle: handle.get_document("notes", "1"), lambda session: session.documents.get(("notes", "1"))
    ),
    "documents": of_session(
        lambda handle: handle.list_documents("notes", limit=2), lambda session: session.document_page("notes", None, 2)
    ),
    "sessions": Read(
        lambda story, _: listed(story, "asc"), lambda story, _, model: model.listing(story.user_id, "asc")
    ),
    "newest sessions": Read(
        lambda story, _: listed(story, "desc"), lambda story, _, model: model.listing(story.user_id, "desc")
    ),
    "incarnation": Read(lambda story, _: found(story), lambda story, _, model: there(story, model)),
}


async def read(story: Story, kind: str) -> None:
    """Read, and check that the result was true at one moment meanwhile."""
    ask, expect = READS[kind]
    handle = story.handles[story.first_id]
    start = len(story.states) - 1
    result: object
    try:
        result = await ask(story, handle)
    except SessionNotFound:
        result = SessionNotFound
    right = [expect(story, handle, model) for model in story.states[start:]]
    assert result in right, f"{kind}: {result!r} is none of {right!r}"


async def follow(story: Story, *steps: Callable[[], Awaitable[object]]) -> None:
    """One step after the other, a turn between them."""
    for step in steps:
        await step()
        audit(story.runtime)
        await story.turnstile.turn()


@asynccontextmanager
async def stories() -> AsyncIterator[Callable[[int], Awaitable[Story]]]:
    """What begins a new story, in one runtime for all."""
    turnstile, numbers = Turnstile(), count()
    async with running(turnstile, residents={"tail_messages": 2}) as runtime:

        async def begin(messages: int) -> Story:
            story = Story(runtime, turnstile, next(numbers))
            await story.begin(messages)
            return story

        yield begin
        await runtime.flush()
        audit_at_rest(runtime)


# --- one read beside a few changes, in every order --------------------------------------------------------------------

Script: TypeAlias = Callable[[Story], list[Callable[[], Awaitable[object]]]]
SCRIPTS: dict[str, tuple[Script, tuple[str, ...]]] = {
    "append, store": (lambda story: [story.append, story.flush, story.evict], ("newest", "short history", "sessions")),
    "pop, store, append": (lambda story: [story.pop, story.flush, story.append], ("oldest", "history")),
    "append, store, clear": (lambda story: [story.append, story.flush, story.clear], ("oldest", "history")),
    "clear, store, append": (lambda story: [story.clear, story.flush, story.append], ("newest", "short history")),
    "delete, store": (lambda story: [story.delete, story.flush], ("history", "newest sessions")),
    "delete, create": (lambda story: [story.delete, story.create, story.flush], ("newest", "sessions", "incarnation")),
    "discard, store, put": (
        lambda story: [lambda: story.discard("1"), story.flush, lambda: story.put("1", 4)],
        ("document", "documents"),
    ),
    "switch, store, switch": (
        lambda story: [lambda: story.switch("writer"), story.flush, lambda: story.switch("coder")],
        ("switches",),
    ),
}


async def in_every_order(script: Script, kind: str) -> None:
    async with stories() as begin:
        for choose in every_order():
            story = await begin(6)
            await story.turnstile.play(
                choose,
                lambda: follow(story, *script(story)),  # noqa: B023 — called at once
                lambda: read(story, kind),  # noqa: B023
            )
            await story.flush()


@pytest.mark.parametrize(
    ("script", "kind"), [(script, kind) for script, (_, kinds) in SCRIPTS.items() for kind in kinds]
)
async def test_a_read_beside_changes_in_every_order(script: str, kind: str) -> None:
    await in_every_order(SCRIPTS[script][0], kind)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("script", SCRIPTS)
async def test_every_read_beside_all_changes_in_every_order(script: str, kind: str) -> None:
    await in_every_order(SCRIPTS[script][0], kind)


# --- a limited history of a long session that begins anew meanwhile ---------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3])
async def test_the_lead_of_a_session_that_is_cleared(limit: int) -> None:
    async with stories() as begin:
        for choose in every_order():
            story = await begin(120)

            async def anew(story: Story = story) -> None:
                await story.clear()
                for role in ("system", "user", "user"):
                    await story.append(role)

            await story.turnstile.play(choose, anew, lambda: history(story, limit))  # noqa: B023


@pytest.mark.parametrize("limit", [1, 3])
async def test_the_lead_of_a_session_whose_messages_are_popped(limit: int) -> None:
    async with stories() as begin:
        for choose in every_order():
            story = await begin(1)
            for _ in range(2):
                await story.pop()
            for _ in range(60):
                await story.append()
            await story.flush()
            await story.evict()
            for _ in range(59):
                await story.pop()

            async def anew(story: Story = story) -> None:
                await story.pop()
                for role in ("system", "user", "user"):
                    await story.append(role)

            await story.turnstile.play(choose, anew, lambda: history(story, limit))  # noqa: B023
            await history(story, limit)


@pytest.mark.parametrize("limit", [1, 3])
async def test_the_lead_of_a_session_whose_tail_is_popped(limit: int) -> None:
    async with stories() as begin:
        for choose in every_order():
            story = await begin(120)
            await story.first[1].messages(limit=2, order="desc")

            async def pop(story: Story = story) -> None:
                for _ in range(2):
                    await story.pop()

            await story.turnstile.play(choose, pop, lambda: history(story, limit))  # noqa: B023


async def history(story: Story, limit: int) -> None:
    """Read the newest of the history, and check that it was that at one moment meanwhile."""
    start = len(story.states) - 1
    found = await story.first[1].history(limit)
    right = [model.sessions[story.first_id].history(limit) for model in story.states[start:]]
    assert found in right


# --- what needs three ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["history", "backwards"])
async def test_messages_that_leave_the_tail_while_they_are_read(kind: str) -> None:
    """They may leave once they are stored and the last read that began before that has ended: here amid a later read."""
    async with stories() as begin:
        story = await begin(6)
        faults = story.turnstile
        async with anyio.create_task_group() as tasks:
            first = faults.hold("messages", nth=1)
            tasks.start_soon(read, story, "history")
            await first.reached.wait()
            for _ in range(5):
                await story.append()
            await story.flush()
            second = faults.hold("messages", nth=1)
            tasks.start_soon(read, story, kind)
            await second.reached.wait()
            first.open()
            await all_wait()
            second.open()


@pytest.mark.parametrize("named", [False, True], ids=["without id", "with id"])
async def test_one_key_in_two_creations_at_once(named: bool) -> None:
    async with stories() as begin:
        story = await begin(1)
        numbers = count()
        for choose in every_order():
            number = next(numbers)
            incarnations: list[str] = []

            async def create(number: int = number, incarnations: list[str] = incarnations) -> None:
                session_id = f"new {number}" if named else None
                handle = await story.runtime.create_session(session_id, idempotency_key=f"key {number}")
                incarnations.append(handle.incarnation)

            accepted = story.runtime.watermarks.accepted
            await story.turnstile.play(choose, create, create)
            assert len(set(incarnations)) == 1
            assert story.runtime.watermarks.accepted == accepted + 1


# --- many at work, in any order ---------------------------------------------------------------------------------------


async def scan(story: Story, what: str) -> None:
    """Page through a list: nothing comes twice, nothing out of order, and nothing that is there all the time is missed."""
    handle, start = story.handles[story.first_id], len(story.states) - 1
    try:
        seen = [place async for place in SCANS[what][0](story, handle)]
    except SessionNotFound:
        return
    ever = [set(SCANS[what][1](story, handle, model)) for model in story.states[start:]]
    assert seen == sorted(set(seen))
    assert set.intersection(*ever) <= set(seen) <= set.union(*ever)


async def message_places(_: Story, handle: SessionHandle) -> AsyncIterator[Any]:
    after = None
    while True:
        page = await handle.messages(after=after, limit=2)
        for message in page.items:
            yield message.seq
        if page.next is None:
            return
        after = page.next


async def backward_places(_: Story, handle: SessionHandle) -> AsyncIterator[Any]:
    after = None
    while True:
        page = await handle.messages(after=after, limit=2, order="desc")
        for message in page.items:
            yield -message.seq
        if page.next is None:
            return
        after = page.next


async def document_places(_: Story, handle: SessionHandle) -> AsyncIterator[Any]:
    cursor = None
    while True:
        page = await handle.list_documents("notes", cursor=cursor, limit=1)
        for document in page.items:
            yield document.key
        if page.next is None:
            return
        cursor = page.next


async def session_places(story: Story, _: SessionHandle) -> AsyncIterator[Any]:
    cursor = None
    while True:
        page = await story.runtime.list_sessions(user_id=story.user_id, order="asc", cursor=cursor, limit=1)
        for record in page.items:
            yield place(record)
        if page.next is None:
            return
        cursor = page.next


def messages_of(handle: SessionHandle, model: Model) -> list[Message]:
    session = model.sessions.get(handle.session_id)
    return session.messages if session is not None and session.incarnation == handle.incarnation else []


SCANS: dict[
    str, tuple[Callable[[Story, SessionHandle], AsyncIterator[Any]], Callable[[Story, SessionHandle, Model], Any]]
] = {
    "messages": (message_places, lambda _, handle, model: [each.seq for each in messages_of(handle, model)]),
    "messages backwards": (
        backward_places,
        lambda _, handle, model: [-each.seq for each in messages_of(handle, model)],
    ),
    "documents": (
        document_places,
        lambda _, handle, model: [
            key
            for session in model.sessions.values()
            if session.incarnation == handle.incarnation
            for _, key in session.documents
        ],
    ),
    "sessions": (session_places, lambda story, _, model: map(place, model.listing(story.user_id, "asc"))),
}

CHANGES: dict[str, Callable[[Story], Awaitable[object]]] = {
    "append": lambda story: story.append(),
    "instruct": lambda story: story.append("system", "new lead"),
    "pop": lambda story: story.pop(),
    "clear": lambda story: story.clear(),
    "switch": lambda story: story.switch("writer"),
    "switch back": lambda story: story.switch("coder"),
    "put 1": lambda story: story.put("1", 1),
    "put 3": lambda story: story.put("3", 3),
    "discard": lambda story: story.discard("1"),
    "delete": lambda story: story.delete(),
    "create": lambda story: story.create(),
}
OTHERS: dict[str, Callable[[Story], Awaitable[object]]] = {
    "flush": lambda story: story.flush(),
    "evict": lambda story: story.evict(),
    **{f"read {kind}": lambda story, kind=kind: read(story, kind) for kind in READS},  # type: ignore[misc]
    **{f"scan {what}": lambda story, what=what: scan(story, what) for what in SCANS},  # type: ignore[misc]
}


async def step(story: Story, name: str) -> None:
    """One step of an actor; what meets a session that is gone, or there already, does nothing."""
    if name in OTHERS:
        await OTHERS[name](story)
        return
    handle = story.handles[story.first_id]
    try:
        if (name == "create") != (story.first_id in story.model.sessions):
            await CHANGES[name](story)
    except SessionNotFound:
        assert there(story, story.model) != handle.incarnation
    except SessionExists:
        assert story.first_id in story.model.sessions


steps = st.sampled_from([*CHANGES, *OTHERS, "flush", "flush", "evict", "evict", "append", "append"])


async def at_once(actors: list[list[str]], order: list[int], messages: int) -> None:
    async with stories() as begin:
        story = await begin(messages)
        choices = iter(order)

        def acting(names: list[str]) -> Callable[[], Awaitable[None]]:
            return lambda: follow(story, *(lambda name=name: step(story, name) for name in names))

        await story.turnstile.play(lambda names: next(choices, 0) % len(names), *map(acting, actors))


some_actors = st.lists(st.lists(steps, min_size=1, max_size=5), min_size=2, max_size=5)
an_order = st.lists(st.integers(0, 4), min_size=30, max_size=60)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(some_actors, an_order, st.integers(1, 8))
async def test_many_at_work(actors: list[list[str]], order: list[int], messages: int) -> None:
    await at_once(actors, order, messages)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(some_actors, an_order, st.integers(1, 8))
async def test_many_at_work_for_long(actors: list[list[str]], order: list[int], messages: int) -> None:
    await at_once(actors, order, messages)
