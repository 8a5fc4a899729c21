"""A runtime over a storage does what a plain model does, whatever is called, evicted, failing, closed and opened again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias, TypeVar

import anyio
import msgspec
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from agent_runtime import (
    IdempotencyConflict,
    NewMessage,
    Runtime,
    SessionExists,
    SessionHandle,
    SessionNotFound,
    StorageUnavailable,
    Watermarks,
    scheduler,
)
from agent_runtime.storage import StorageFactory
from agent_runtime.testing import Fault
from agent_runtime_memory import MemoryDatabase
from agent_runtime_postgresql import open_postgresql
from agent_runtime_sqlite import open_sqlite
from model import Model, ModelSession, Outcome
from places import in_file
from postgres_server import migrated_schema, url_of
from rig import MeteredFaults, audit, audit_at_rest, config, opened, quiet

T = TypeVar("T")
Call: TypeAlias = Callable[[], Coroutine[Any, Any, T]]

session_ids = st.sampled_from(["a", "a", "b", "c", "é"])
users = st.sampled_from([None, "u", "v"])
agents = st.sampled_from(["orchestrator", "coder", "writer"])
keys = st.sampled_from([None, None, None, "k1", "k2"])
levels = st.sampled_from(["buffered", "buffered", "buffered", "stored"])
collections = st.sampled_from(["notes", "other"])
document_keys = st.sampled_from(["1", "10", "2", "é"])
limits = st.integers(1, 6)
seqs = st.none() | st.integers(0, 40)
orders = st.sampled_from(["asc", "desc"])
words = st.sampled_from(["hi", "snow ☃", "x" * 700, '"quoted"\\', "long " * 1000])
objects = st.dictionaries(
    st.sampled_from(["b", "a", "ü"]), st.sampled_from([1, 1.0, None, [True], {"z": "1e2"}]), max_size=2
)
calls = st.lists(
    st.sampled_from(["t1", "t2"]).map(lambda name: {"id": name, "function": {"name": "f", "arguments": "{}"}}),
    max_size=2,
)
new_messages = st.one_of(
    st.builds(NewMessage, role=st.just("user"), content=words, metadata=st.none() | objects),
    st.builds(NewMessage, role=st.just("user"), content=words.map(lambda word: [{"type": "text", "text": word}])),
    st.builds(
        NewMessage,
        role=st.just("assistant"),
        content=st.none() | words,
        tool_calls=calls,
        extra=st.just({"refusal": "no"}),
    ),
    st.builds(
        NewMessage, role=st.just("tool"), content=words, tool_call_id=st.sampled_from(["t1", "t2"]), name=st.just("f")
    ),
    st.builds(NewMessage, role=st.just("system"), content=words, token_count=st.integers(0, 9)),
)


class Machine(RuleBasedStateMachine):
    """Every call is made on the runtime, then told to the model."""

    def __init__(self, loop: str, storage: str) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.portal: BlockingPortal = self.stack.enter_context(start_blocking_portal(loop))
        self.model = Model()
        self.handles: dict[str, SessionHandle] = {}
        self.stale: list[SessionHandle] = []
        self.faults = MeteredFaults()
        self.planned: list[Fault] = []
        self.watermarks = Watermarks(accepted=0, journaled=None, synced=None, stored=0)
        self.opened: AbstractContextManager[Runtime]
        self.runtime: Runtime
        self.factory: StorageFactory
        self.journal: dict[str, str] = {}
        if storage == "memory":
            self.url, self.factory = "memory:", MemoryDatabase().open
        else:
            directory = self.stack.enter_context(TemporaryDirectory())
            self.journal["directory"] = f"{directory}/journal"
            if storage == "sqlite":
                self.url, self.factory = in_file(Path(directory)).url, open_sqlite
            else:
                self.url, self.factory = url_of(migrated_schema()), open_postgresql

    @initialize(tail_messages=st.integers(1, 5), bytes_max=st.sampled_from([0, 9_000, 65_536]), batch=st.integers(1, 9))
    def begin(self, tail_messages: int, bytes_max: int, batch: int) -> None:
        self.sections: dict[str, dict[str, Any]] = {
            "residents": {"tail_messages": tail_messages},
            "write_behind": {"interval_s": 1e6, "batch_changes": batch},
            "journal": self.journal,
        }
        self.bytes_max = bytes_max
        self.open()

    def open(self) -> None:
        opening = opened(config(f"faulty:{self.url}", **self.sections), self.factory, self.faults)
        self.opened = self.portal.wrap_async_context_manager(opening)
        self.runtime = self.opened.__enter__()
        self.runtime._residents.bytes_max = self.bytes_max  # less than the configuration allows

    def teardown(self) -> None:
        with self.stack:
            if hasattr(self, "runtime"):
                if sys.exception() is None:
                    self.reopen()
                self.opened.__exit__(None, None, None)

    # Making calls

    def run(self, call: Call[T]) -> T:
        """Make a call, again for as long as planned faults make it fail; one that fails changes nothing."""

        async def quietly() -> T:
            with anyio.fail_after(20):
                try:
                    return await call()
                finally:
                    await quiet(self.runtime, self.faults)

        while True:
            accepted, hits = self.runtime.watermarks.accepted, self.hits
            try:
                return self.portal.call(quietly)
            except StorageUnavailable:
                assert self.hits > hits
                assert self.runtime.watermarks.accepted == accepted

    @property
    def hits(self) -> int:
        return sum(fault.hits for fault in self.planned)

    def write(
        self,
        scope: str,
        key: str | None,
        route: str,
        arguments: object,
        call: Call[T],
        effect: Callable[[T], object],
        *,
        changes: bool = True,
        gives: Callable[[T], object] = lambda result: result,
    ) -> None:
        """Make a call that changes something (or not, if not `changes`), or repeats what its key did before."""
        before = self.runtime.watermarks.accepted
        outcome = None if key is None else self.model.outcomes.get((scope, key))
        if outcome is None:
            result = self.run(call)
            effect(result)
            recorded = changes or (key is not None and scope != "create")  # with a key it is known that it did nothing
            assert self.runtime.watermarks.accepted == before + recorded
            if key is not None and recorded:
                self.model.outcomes[scope, key] = Outcome(route, arguments, gives(result))
        else:
            if (outcome.route, outcome.arguments) == (route, arguments):
                assert gives(self.run(call)) == outcome.result
            else:
                with pytest.raises(IdempotencyConflict):
                    self.run(call)
            assert self.runtime.watermarks.accepted == before

    def session(self, session_id: str) -> tuple[ModelSession, SessionHandle]:
        """The session, which is created if it is not there."""
        if session_id not in self.model.sessions:
            self.handles[session_id] = self.run(lambda: self.runtime.create_session(session_id))
            self.run(lambda: self.model.create(self.handles[session_id]))
        return self.model.sessions[session_id], self.handles[session_id]

    def change(
        self,
        session_id: str,
        key: str | None,
        route: str,
        arguments: object,
        call: Callable[[SessionHandle], Coroutine[Any, Any, T]],
        effect: Callable[[ModelSession, T], object],
        *,
        changes: Callable[[ModelSession], bool] = lambda _: True,
    ) -> None:
        session, handle = self.session(session_id)
        self.write(
            session.incarnation,
            key,
            route,
            arguments,
            lambda: call(handle),
            lambda result: effect(session, result),
            changes=changes(session),
        )
        self.run(lambda: session.settle(handle))

    # Sessions

    @rule(
        session_id=session_ids,
        fields=st.fixed_dictionaries(
            {},
            optional={
                "user_id": users,
                "system_prompt": words,
                "title": words.map(lambda word: word[:500]),
                "description": words,
                "metadata": objects,
                "agent": agents,
            },
        ),
        exist_ok=st.booleans(),
        key=keys,
        level=levels,
    )
    def create(self, session_id: str, fields: dict[str, Any], exist_ok: bool, key: str | None, level: Any) -> None:
        create = self.runtime.get_or_create_session if exist_ok else self.runtime.create_session
        there = session_id in self.model.sessions

        def call() -> Coroutine[Any, Any, SessionHandle]:
            return create(session_id, **fields, durability=level, idempotency_key=key)

        def born(handle: SessionHandle) -> None:
            if there:
                assert handle.incarnation == self.model.sessions[session_id].incarnation
            else:
                self.handles[session_id] = handle
                self.run(lambda: self.model.create(handle, **fields))

        if there and not exist_ok and ("create", key) not in self.model.outcomes:
            with pytest.raises(SessionExists):
                self.run(call)
        else:
            self.write(
                "create",
                key,
                create.__name__,
                (session_id, fields),
                call,
                born,
                changes=not there,
                gives=lambda handle: (handle.session_id, handle.incarnation),
            )

    @rule(session_id=session_ids)
    def get(self, session_id: str) -> None:
        if session_id in self.model.sessions:
            handle = self.handles[session_id] = self.run(lambda: self.runtime.get_session(session_id))
            assert handle.incarnation == self.model.sessions[session_id].incarnation
        else:
            with pytest.raises(SessionNotFound):
                self.run(lambda: self.runtime.get_session(session_id))

    @rule(session_id=session_ids, level=levels)
    def delete(self, session_id: str, level: Any) -> None:
        if session_id in self.model.sessions:
            handle = self.handles.pop(session_id)
            self.write("", None, "delete", None, lambda: handle.delete(durability=level), lambda _: None)
            del self.model.sessions[session_id]
            self.stale.append(handle)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def use_a_stale_handle(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.stale))
        calls: list[Call[object]] = [
            lambda: handle.append("user", "too late"),
            handle.pop,
            handle.clear,
            handle.record,
            handle.messages,
            handle.history,
            handle.context,
            handle.switches,
            handle.delete,
            lambda: handle.update(title="too late"),
            lambda: handle.switch_agent("late"),
            lambda: handle.put_document("notes", "1", 1),
            lambda: handle.get_document("notes", "1"),
            lambda: handle.list_documents("notes"),
            lambda: handle.delete_document("notes", "1"),
        ]
        with pytest.raises(SessionNotFound):
            self.run(data.draw(st.sampled_from(calls)))

    @rule(
        session_id=session_ids,
        given=st.dictionaries(
            st.sampled_from(["title", "description"]), st.none() | words.map(lambda word: word[:500])
        ),
        metadata=st.none() | objects,
        key=keys,
    )
    def update(self, session_id: str, given: dict[str, Any], metadata: dict[str, Any] | None, key: str | None) -> None:
        arguments = given if metadata is None else given | {"metadata": metadata}

        def effect(session: ModelSession, _: object) -> None:
            for name, value in arguments.items():
                setattr(session, name, value)

        self.change(
            session_id, key, "update", arguments, lambda handle: handle.update(**arguments, idempotency_key=key), effect
        )

    # Messages

    @rule(session_id=session_ids, new=new_messages, key=keys, level=levels)
    def append(self, session_id: str, new: NewMessage, key: str | None, level: Any) -> None:
        if new.extra is not None:
            return self.append_many(session_id=session_id, new=[new], key=key, level=level)
        fields = {
            name: getattr(new, name)
            for name in ("role", "content", "name", "tool_calls", "tool_call_id", "token_count", "metadata")
        }
        self.change(
            session_id,
            key,
            "append",
            new,
            lambda handle: handle.append(**fields, durability=level, idempotency_key=key),
            lambda session, message: session.append([new], [message]),
        )
        return None

    @rule(session_id=session_ids, new=st.lists(new_messages, min_size=1, max_size=4), key=keys, level=levels)
    def append_many(self, session_id: str, new: list[NewMessage], key: str | None, level: Any) -> None:
        self.change(
            session_id,
            key,
            "append_many",
            new,
            lambda handle: handle.append_many(new, durability=level, idempotency_key=key),
            lambda session, messages: session.append(new, messages),
        )

    @rule(session_id=session_ids, call_id=st.sampled_from(["t1", "t2"]), result=words | objects, key=keys)
    def append_tool_result(self, session_id: str, call_id: str, result: Any, key: str | None) -> None:
        def effect(session: ModelSession, message: Any) -> None:
            text = result if isinstance(result, str) else message.content
            new = NewMessage(role="tool", content=text, name="f", tool_call_id=call_id)
            session.append([new], [message])

        self.change(
            session_id,
            key,
            "append_tool_result",
            (call_id, result),
            lambda handle: handle.append_tool_result(call_id, "f", result, idempotency_key=key),
            effect,
        )

    @rule(session_id=session_ids, key=keys, level=levels)
    def pop(self, session_id: str, key: str | None, level: Any) -> None:
        self.change(
            session_id,
            key,
            "pop",
            None,
            lambda handle: handle.pop(durability=level, idempotency_key=key),
            lambda session, message: session.pop(message),
            changes=lambda session: bool(session.messages),
        )

    @rule(session_id=session_ids)
    def pop_to_the_ground(self, session_id: str) -> None:
        while self.session(session_id)[0].messages:
            self.pop(session_id=session_id, key=None, level="buffered")

    @rule(session_id=session_ids, key=keys, level=levels)
    def clear(self, session_id: str, key: str | None, level: Any) -> None:
        self.change(
            session_id,
            key,
            "clear",
            None,
            lambda handle: handle.clear(durability=level, idempotency_key=key),
            lambda session, _: session.clear(),
            changes=lambda session: bool(session.messages),
        )

    # The agent, and documents

    @rule(session_id=session_ids, agent=agents, reason=st.none() | words, key=keys)
    def switch(self, session_id: str, agent: str, reason: str | None, key: str | None) -> None:
        self.change(
            session_id,
            key,
            "switch_agent",
            (agent, reason),
            lambda handle: handle.switch_agent(agent, reason=reason, idempotency_key=key),
            lambda session, context: session.switch(agent, reason, context),
            changes=lambda session: session.agent != agent,
        )

    @rule(session_id=session_ids, metadata=objects, key=keys)
    def update_context(self, session_id: str, metadata: dict[str, Any], key: str | None) -> None:
        self.change(
            session_id,
            key,
            "update_context",
            metadata,
            lambda handle: handle.update_context(metadata=metadata, idempotency_key=key),
            lambda session, _: setattr(session, "context_metadata", metadata),
        )

    @rule(
        session_id=session_ids,
        collection=collections,
        key=document_keys,
        value=objects | words | st.binary(max_size=9),
        idempotency_key=keys,
    )
    def put(self, session_id: str, collection: str, key: str, value: Any, idempotency_key: str | None) -> None:
        media_type = "image/png" if isinstance(value, bytes) else None
        self.change(
            session_id,
            idempotency_key,
            "put_document",
            (collection, key, value),
            lambda handle: handle.put_document(
                collection, key, value, media_type=media_type, idempotency_key=idempotency_key
            ),
            lambda session, document: session.put(collection, key, value, media_type, document),
        )

    @rule(session_id=session_ids, collection=collections, key=document_keys, idempotency_key=keys)
    def discard(self, session_id: str, collection: str, key: str, idempotency_key: str | None) -> None:
        def effect(session: ModelSession, deleted: bool) -> None:
            assert deleted == (session.documents.pop((collection, key), None) is not None)

        self.change(
            session_id,
            idempotency_key,
            "delete_document",
            (collection, key),
            lambda handle: handle.delete_document(collection, key, idempotency_key=idempotency_key),
            effect,
            changes=lambda session: (collection, key) in session.documents,
        )

    # Reads

    @rule(session_id=session_ids, after=seqs, limit=limits, order=orders)
    def read_messages(self, session_id: str, after: int | None, limit: int, order: Any) -> None:
        session, handle = self.session(session_id)
        page = self.run(lambda: handle.messages(after=after, limit=limit, order=order))
        assert page == session.page(after, limit, order)

    @rule(session_id=session_ids, seq=st.integers(0, 40))
    def read_message(self, session_id: str, seq: int) -> None:
        session, handle = self.session(session_id)
        assert self.run(lambda: handle.message(seq)) == session.message(seq)

    @rule(session_id=session_ids, limit=st.none() | limits)
    def read_history(self, session_id: str, limit: int | None) -> None:
        session, handle = self.session(session_id)
        assert self.run(lambda: handle.history(limit)) == session.history(limit)
        assert msgspec.json.decode(self.run(lambda: handle.history_json(limit))) == session.history(limit)

    @rule(session_id=session_ids)
    def read_the_head(self, session_id: str) -> None:
        session, handle = self.session(session_id)
        assert self.run(handle.record) == session.record
        assert self.run(handle.context) == session.context
        assert self.run(handle.switches) == session.switches

    @rule(session_id=session_ids, collection=collections, key=document_keys)
    def read_document(self, session_id: str, collection: str, key: str) -> None:
        session, handle = self.session(session_id)
        assert self.run(lambda: handle.get_document(collection, key)) == session.documents.get((collection, key))

    @rule(session_id=session_ids, collection=collections, cursor=st.none() | document_keys, limit=limits)
    def read_documents(self, session_id: str, collection: str, cursor: str | None, limit: int) -> None:
        session, handle = self.session(session_id)
        page = self.run(lambda: handle.list_documents(collection, cursor=cursor, limit=limit))
        assert page == session.document_page(collection, cursor, limit)

    @rule(user_id=users, order=orders, limit=st.integers(1, 2))
    def list_sessions(self, user_id: str | None, order: Any, limit: int) -> None:
        left = self.model.listing(user_id, order)
        cursor = None
        while True:
            page = self.run(
                partial(self.runtime.list_sessions, user_id=user_id, order=order, limit=limit, cursor=cursor)
            )
            assert page.items == left[:limit]
            left, cursor = left[limit:], page.next
            assert (cursor is None) == (not left)
            if cursor is None:
                return

    # What befalls the runtime

    @rule()
    def flush(self) -> None:
        self.run(self.runtime.flush)
        audit_at_rest(self.runtime)

    @rule()
    def evict(self) -> None:
        async def evict() -> None:
            books = self.runtime._residents
            books.bytes_max = 0
            books._evict()
            books.bytes_max = self.bytes_max

        self.run(evict)

    @rule(
        name=st.sampled_from([None, "apply", "apply", "snapshot", "head", "messages", "outcome", "sessions", "purge"]),
        nth=st.integers(1, 3),
        after_effect=st.booleans(),
    )
    def plan_a_failure(self, name: Any, nth: int, after_effect: bool) -> None:
        self.planned.append(self.faults.fail(name, nth=nth, after_effect=after_effect))

    @rule(nth=st.integers(1, 2))
    def plan_a_late_commit(self, nth: int) -> None:
        self.planned.append(self.faults.commit_late(nth=nth))

    @rule()
    def reopen(self) -> None:
        for fault in self.planned:
            fault.stop()
        accepted = self.runtime.watermarks.accepted
        self.opened.__exit__(None, None, None)
        self.open()
        assert self.runtime.watermarks.accepted == self.runtime.watermarks.stored == accepted
        self.stale.clear()
        for session_id in self.model.sessions:
            self.get(session_id=session_id)
            self.check_all_of(session_id)
        self.list_sessions(user_id=None, order="desc", limit=2)

    def check_all_of(self, session_id: str) -> None:
        self.read_the_head(session_id=session_id)
        self.read_messages(session_id=session_id, after=None, limit=1000, order="asc")
        self.read_history(session_id=session_id, limit=None)
        for collection in ("notes", "other"):
            self.read_documents(session_id=session_id, collection=collection, cursor=None, limit=1000)

    @invariant()
    def watermarks_only_grow(self) -> None:
        if hasattr(self, "runtime"):
            before, self.watermarks = self.watermarks, self.runtime.watermarks
            assert before.accepted <= self.watermarks.accepted
            assert before.stored <= self.watermarks.stored <= self.watermarks.accepted

    @invariant()
    def the_books_are_right(self) -> None:
        if hasattr(self, "runtime"):
            audit(self.runtime)


def check(loop: str, storage: str, examples: int, steps: int) -> None:
    run_state_machine_as_test(
        lambda: Machine(loop, storage),  # type: ignore[arg-type]  # hypothesis takes any callable that makes one
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(autouse=True)
def _no_long_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_BACKOFF_FIRST_S", 0.001)


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize(("storage", "examples"), [("memory", 30), ("sqlite", 8), ("postgresql", 4)])
def test_runtime_and_storage_do_what_the_model_does(loop: str, storage: str, examples: int) -> None:
    check(loop, storage, examples, steps=40)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize(("storage", "examples"), [("memory", 1500), ("sqlite", 200), ("postgresql", 100)])
def test_for_long(loop: str, storage: str, examples: int) -> None:
    check(loop, storage, examples, steps=100)
