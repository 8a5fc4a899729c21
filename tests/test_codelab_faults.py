"""Each fault of the old service: a model of it still has it, the new runtime has not.

A fault is a function that does what callers did, and says so when something of it is lost. It is run twice: on the
model (`old_service.py`) it has to say it, on the runtime it must not. So a test here fails both when the runtime loses
something and when the function has become unable to notice.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import anyio
import pytest

from agent_runtime import Config, LeaseHeld, Runtime, SessionHandle, StorageUnavailable, open_runtime
from old_service import OldService, journal_mode, messages_in
from places import NEVER_S

pytestmark = pytest.mark.anyio

HELLO: Final = {"role": "user", "content": "hello"}
CALL: Final = {"id": "c1", "type": "function", "function": {"name": "t", "arguments": "{}"}}


class Refused(Exception):
    """The service says that it can't: nothing was acknowledged, so nothing is lost."""


class Lost(Exception):
    """Something that was acknowledged, or should have been, is not there."""


class Service(Protocol):
    """What callers of either service do."""

    before_write: Callable[[str], Any] | None

    async def create(self, session_id: str) -> None: ...
    async def get_or_create(self, session_id: str) -> None: ...
    async def append(self, session_id: str, message: dict[str, Any]) -> None: ...
    async def delete(self, session_id: str) -> None: ...
    async def history(self, session_id: str) -> list[dict[str, Any]]: ...
    async def history_for_endpoint(self, session_id: str) -> list[dict[str, Any]]: ...
    async def create_context(self, session_id: str) -> None: ...
    async def set_metadata(self, session_id: str, key: str, value: Any) -> None: ...
    async def metadata(self, session_id: str) -> dict[str, Any]: ...
    async def cleanup(self, max_age: timedelta) -> int: ...
    async def request_approval(self, session_id: str, call_id: str) -> None: ...
    async def approvals(self, session_id: str) -> list[str]: ...
    async def approvals_in_a_request(self, session_id: str) -> list[str]: ...
    async def flush(self) -> None: ...


class NewService:
    """The same calls on the runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.before_write: Callable[[str], Any] | None = None
        self._apply, runtime._storage.apply = runtime._storage.apply, self._slowed  # type: ignore[method-assign]

    async def _slowed(self, *args: Any, **kwargs: Any) -> Any:
        if self.before_write is not None:
            await self.before_write("")
        return await self._apply(*args, **kwargs)

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path) -> AsyncIterator[NewService]:
        config = Config.of(
            f"sqlite:///{path}",
            storage={"options": {"busy_timeout_s": 0.1}},
            write_behind={"interval_s": NEVER_S, "durability_timeout_s": 20.0},
        )
        try:
            opening = open_runtime(config)
            runtime = await opening.__aenter__()
        except (LeaseHeld, StorageUnavailable) as error:
            raise Refused from error
        try:
            yield cls(runtime)
        finally:
            await opening.__aexit__(None, None, None)

    async def _session(self, session_id: str) -> SessionHandle:
        return await self._runtime.get_session(session_id)

    async def create(self, session_id: str) -> None:
        await self._runtime.create_session(session_id)

    async def get_or_create(self, session_id: str) -> None:
        await self._runtime.get_or_create_session(session_id)

    async def append(self, session_id: str, message: dict[str, Any]) -> None:
        await (await self._session(session_id)).append_message(message)

    async def delete(self, session_id: str) -> None:
        await (await self._session(session_id)).delete()

    async def history(self, session_id: str) -> list[dict[str, Any]]:
        return await (await self._session(session_id)).history()

    history_for_endpoint = history

    async def create_context(self, session_id: str) -> None:
        await self.get_or_create(session_id)

    async def set_metadata(self, session_id: str, key: str, value: Any) -> None:
        await (await self._session(session_id)).merge_context({key: value})

    async def metadata(self, session_id: str) -> dict[str, Any]:
        return (await (await self._session(session_id)).context()).metadata

    async def cleanup(self, max_age: timedelta) -> int:
        begun = datetime.now(UTC) - max_age
        old = [record.session_id async for record in self._runtime.scan_sessions() if record.created_at < begun]
        for session_id in old:
            await self.delete(session_id)
        return len(old)

    async def request_approval(self, session_id: str, call_id: str) -> None:
        await (await self._session(session_id)).request_approval(call_id, "tool", {})

    async def approvals(self, session_id: str) -> list[str]:
        return [approval.call_id for approval in await (await self._session(session_id)).approvals()]

    approvals_in_a_request = approvals

    async def flush(self) -> None:
        await self._runtime.flush()


Open: TypeAlias = Callable[[Path], AbstractAsyncContextManager[Service]]
Fault: TypeAlias = Callable[[Open, Path], Awaitable[None]]

FAULTS: Final[list[Fault]] = []


def fault(function: Fault) -> Fault:
    """One of them. Its docstring is what is lost."""
    FAULTS.append(function)
    return function


def expect(is_there: bool) -> None:
    if not is_there:
        raise Lost


# --- the faults, in the numbers of the model --------------------------------------------------------------------------


@fault
async def tool_calls_after_a_restart_and_the_next_append(open_: Open, path: Path) -> None:
    """1"""
    async with open_(path) as service:
        await service.create("s1")
        await service.append("s1", HELLO)
        await service.append("s1", {"role": "assistant", "content": None, "tool_calls": [CALL]})
        await service.append("s1", {"role": "tool", "content": "ok", "tool_call_id": "c1", "name": "t"})
    async with open_(path) as service:
        await service.append("s1", HELLO)
    async with open_(path) as service:
        _, called, answered, _ = await service.history("s1")
        expect(called.get("tool_calls") == [CALL])
        expect(called["content"] is None)
        expect(answered.get("tool_call_id") == "c1")


@fault
async def the_rest_of_a_batch_whose_flush_failed(open_: Open, path: Path) -> None:
    """2"""
    failures = iter([OSError("the disk is full")])

    async def fail_once(_session_id: str) -> None:
        for failure in failures:
            raise failure

    async with open_(path) as service:
        for session_id in ("s1", "s2"):
            await service.create(session_id)
        await service.flush()
        for session_id in ("s1", "s2"):
            await service.append(session_id, HELLO)
        service.before_write = fail_once
        await service.flush()
        await service.flush()
    async with open_(path) as service:
        for session_id in ("s1", "s2"):
            expect(len(await service.history(session_id)) == 1)


@fault
async def a_batch_whose_flush_is_under_way_at_shutdown(open_: Open, path: Path) -> None:
    """3"""
    begun = anyio.Event()

    async def take_time(_session_id: str) -> None:
        if not begun.is_set():
            begun.set()
            await anyio.sleep(0.1)

    async with anyio.create_task_group() as tasks, open_(path) as service:
        await service.create("s1")
        await service.flush()
        await service.append("s1", HELLO)
        service.before_write = take_time
        tasks.start_soon(service.flush)
        await begun.wait()
    async with open_(path) as service:
        expect(len(await service.history("s1")) == 1)


@fault
async def one_of_two_callers_of_get_or_create(open_: Open, path: Path) -> None:
    """4"""
    failed = 0

    async def call(service: Service) -> None:
        nonlocal failed
        try:
            await service.get_or_create("s1")
        except ValueError:
            failed += 1

    async with open_(path) as service, anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(call, service)
    expect(not failed)


@fault
async def the_history_that_another_process_has_written(open_: Open, path: Path) -> None:
    """5"""
    async with open_(path) as service:
        try:
            async with open_(path) as other:
                await service.create("s1")
                await service.append("s1", HELLO)
                await service.flush()
                await other.get_or_create("s1")
        except Refused:
            await service.create("s1")
            await service.append("s1", HELLO)
    async with open_(path) as service:
        expect(len(await service.history("s1")) == 1)


@fault
async def a_session_created_under_the_id_of_a_deleted_one(open_: Open, path: Path) -> None:
    """6"""
    async with open_(path) as service:
        await service.create("s1")
        await service.append("s1", {"role": "user", "content": "before"})
        await service.flush()
        await service.delete("s1")
        await service.create("s1")
        await service.append("s1", HELLO)
    async with open_(path) as service:
        expect([message["content"] for message in await service.history("s1")] == ["hello"])


@fault
async def an_approval_with_a_call_id_that_is_used_elsewhere(open_: Open, path: Path) -> None:
    """7"""
    async with open_(path) as service:
        for session_id in ("s1", "s2"):
            await service.create(session_id)
            await service.request_approval(session_id, "c1")
        for session_id in ("s1", "s2"):
            expect(await service.approvals(session_id) == ["c1"])


@fault
async def cleaning_up_after_a_restart(open_: Open, path: Path) -> None:
    """8"""
    async with open_(path) as service:
        await service.create("s1")
        await service.create_context("s1")
    async with open_(path) as service:
        try:
            expect(await service.cleanup(timedelta(hours=24)) == 0)
            expect(await service.cleanup(timedelta(0)) == 1)
        except TypeError as error:
            raise Lost from error


@fault
async def metadata_that_is_changed_in_its_place(open_: Open, path: Path) -> None:
    """9"""
    async with open_(path) as service:
        await service.create("s1")
        await service.create_context("s1")
        await service.set_metadata("s1", "answer", 42)
        await service.flush()
    async with open_(path) as service:
        expect(await service.metadata("s1") == {"answer": 42})


@fault
async def pending_approvals_while_the_loop_runs(open_: Open, path: Path) -> None:
    """10"""
    async with open_(path) as service:
        await service.create("s1")
        await service.request_approval("s1", "c1")
        expect(await service.approvals_in_a_request("s1") == ["c1"])


@fault
async def the_write_ahead_log_that_was_asked_for(open_: Open, path: Path) -> None:
    """11"""
    async with open_(path) as service:
        await service.create("s1")
    expect(journal_mode(path) == "wal")


@fault
async def everything_after_a_start_that_failed(open_: Open, path: Path) -> None:
    """12"""
    async with open_(path) as service:
        await service.create("s1")
        await service.append("s1", HELLO)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        try:
            async with open_(path) as service:
                other.execute("ROLLBACK")
                await service.get_or_create("s2")
                await service.append("s2", HELLO)
                await service.flush()
                expect(messages_in(path) == 2)
        except Refused:
            other.execute("ROLLBACK")
    async with open_(path) as service:
        expect(len(await service.history("s1")) == 1)


@fault
async def what_was_just_said_in_a_history_read_elsewhere(open_: Open, path: Path) -> None:
    """13"""
    async with open_(path) as service:
        await service.create("s1")
        await service.append("s1", HELLO)
        expect(len(await service.history_for_endpoint("s1")) == 1)
        await service.flush()
        await service.append("s1", HELLO)
        expect(len(await service.history_for_endpoint("s1")) == 2)


# --- each of them, twice ----------------------------------------------------------------------------------------------

every_fault = pytest.mark.parametrize("fault", FAULTS, ids=[function.__name__ for function in FAULTS])


@every_fault
async def test_the_old_service_loses(fault: Fault, tmp_path: Path) -> None:
    with pytest.raises(Lost):
        await fault(OldService.open, tmp_path / "sessions.db")


@every_fault
async def test_the_new_one_does_not_lose(fault: Fault, tmp_path: Path) -> None:
    await fault(NewService.open, tmp_path / "sessions.db")


def test_there_are_as_many_as_were_found() -> None:
    assert [function.__doc__ for function in FAULTS] == [str(number) for number in range(1, 14)]
