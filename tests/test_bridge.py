"""The bridge: asyncio code for callers on either event loop, cancelled once, with nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import traceback
from collections.abc import AsyncIterator
from contextvars import ContextVar

import anyio
import pytest

from agent_runtime.bridge import AsyncioBridge, on_cancel
from agent_runtime.errors import StorageUnavailable

pytestmark = pytest.mark.anyio

variable: ContextVar[str] = ContextVar("variable")


@pytest.fixture
async def bridge() -> AsyncIterator[AsyncioBridge]:
    async with AsyncioBridge.open(name="bridge under test") as bridge:
        yield bridge


class Boom(Exception):
    pass


async def boom() -> None:
    await asyncio.sleep(0)
    raise Boom


async def task_names() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks()]


def bridge_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "bridge under test"]


async def test_calls_run_on_an_asyncio_loop(bridge: AsyncioBridge, anyio_backend: str) -> None:
    async def where(number: int, text: str) -> tuple[int, str, asyncio.AbstractEventLoop, threading.Thread]:
        return number, text, asyncio.get_running_loop(), threading.current_thread()

    number, text, loop, thread = await bridge.run(where, 7, "seven")
    assert (number, text) == (7, "seven")
    if anyio_backend == "asyncio":
        assert loop is asyncio.get_running_loop()
        assert not bridge_threads()
    else:
        assert [thread] == bridge_threads()
    assert (await bridge.run(where, 8, "eight"))[2] is loop


async def test_calls_run_side_by_side(bridge: AsyncioBridge) -> None:
    """Each of ten calls waits for the nine others."""
    barrier = asyncio.Barrier(10)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(bridge.run, barrier.wait)


async def test_an_exception_arrives_as_itself_with_the_frames_of_both_sides(bridge: AsyncioBridge) -> None:
    with pytest.raises(Boom) as caught:
        await bridge.run(boom)
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[0] == "test_an_exception_arrives_as_itself_with_the_frames_of_both_sides"
    assert names[-1] == "boom"

    async def group() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(boom)

    with pytest.raises(ExceptionGroup) as grouped:
        await bridge.run(group)
    assert grouped.group_contains(Boom)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
async def test_exceptions_that_end_a_loop_go_past_it(bridge: AsyncioBridge, kind: type[BaseException]) -> None:
    async def leave() -> None:
        raise kind("bye") from Boom()

    async def leave_grouped() -> None:
        raise BaseExceptionGroup("several", [kind("bye"), Boom()])

    with pytest.raises(kind, match="bye") as caught:
        await bridge.run(leave)
    assert isinstance(caught.value.__cause__, Boom)
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "leave"
    with pytest.raises(BaseExceptionGroup, match="several"):
        await bridge.run(leave_grouped)
    assert await bridge.run(asyncio.sleep, 0, "alive") == "alive"


async def test_a_cancellation_that_the_caller_did_not_ask_for(bridge: AsyncioBridge) -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(StorageUnavailable, match="cancelled on the database's side"):
        await bridge.run(cancelled)
    assert await bridge.run(asyncio.sleep, 0, "alive") == "alive"


async def test_context_variables_go_in_and_do_not_come_out(bridge: AsyncioBridge) -> None:
    async def read_and_set() -> str:
        value = variable.get()
        variable.set("of the call")
        return value

    variable.set("of the caller")
    assert await bridge.run(read_and_set) == "of the caller"
    assert variable.get() == "of the caller"


async def test_what_is_called_soon_comes_before_later_calls(bridge: AsyncioBridge) -> None:
    seen: list[tuple[asyncio.AbstractEventLoop, str]] = []
    variable.set("soon")
    for _ in range(3):
        bridge.call_soon(lambda: seen.append((asyncio.get_running_loop(), variable.get())))
    assert await bridge.run(look_at, seen) == [(await bridge.run(loop_of_calls), "soon")] * 3


async def look_at(seen: list[tuple[asyncio.AbstractEventLoop, str]]) -> list[tuple[asyncio.AbstractEventLoop, str]]:
    return seen.copy()


async def loop_of_calls() -> asyncio.AbstractEventLoop:
    with anyio.CancelScope():  # anyio too knows where it is
        await anyio.sleep(0)
    return asyncio.get_running_loop()


async def test_a_call_is_cancelled_once_and_its_end_waited_for(bridge: AsyncioBridge) -> None:
    """anyio would cancel the clean-up again at each of its steps."""
    steps: list[str] = []

    async def clean_up_slowly() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            for step in range(5):
                await asyncio.sleep(0.01)
                steps.append(f"step {step}")

    with anyio.fail_after(10), anyio.move_on_after(0.02) as scope:
        await bridge.run(clean_up_slowly)
    assert scope.cancelled_caught
    assert steps == [f"step {step}" for step in range(5)]


async def test_what_a_cancelled_call_raises_is_not_raised(bridge: AsyncioBridge) -> None:
    async def fail_when_cancelled() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise Boom from None

    with anyio.move_on_after(0.02) as scope:
        await bridge.run(fail_when_cancelled)
    assert scope.cancelled_caught


async def test_a_call_that_fails_while_its_caller_is_cancelled(
    bridge: AsyncioBridge, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error is nobody's business any more, and asyncio does not complain of one that nobody has looked at."""
    failed = threading.Event()

    async def fail() -> None:
        asyncio.get_running_loop().call_soon(failed.set)
        raise Boom

    async with anyio.create_task_group() as group:
        group.start_soon(bridge.run, fail)
        await anyio.sleep(0)
        failed.wait(0.2)  # on trio the call ends while this loop is busy
        group.cancel_scope.cancel()
    gc.collect()
    await bridge.run(asyncio.sleep, 0)
    assert caplog.records == []


async def test_a_caller_cancelled_before_it_calls(bridge: AsyncioBridge) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await bridge.run(asyncio.sleep, 60)
    assert scope.cancelled_caught
    assert await bridge.run(asyncio.sleep, 0, "alive") == "alive"


async def test_hooks_are_called_on_cancellation_before_the_next_step_of_the_call(bridge: AsyncioBridge) -> None:
    events: list[str] = []

    async def too_late() -> None:
        events.append("a hook of a block that was left")

    async def fail() -> None:
        events.append("fails")
        raise Boom

    async def take_time() -> None:
        await asyncio.sleep(0.05)
        events.append("took its time")

    async def call() -> None:
        with on_cancel(too_late):
            await asyncio.sleep(0)
        with on_cancel(fail), on_cancel(take_time):
            try:
                await asyncio.sleep(60)
            finally:
                events.append("call ends")

    with anyio.move_on_after(0.02):
        await bridge.run(call)
    assert events == ["fails", "call ends", "took its time"]


async def test_hooks_are_left_alone_without_cancellation(bridge: AsyncioBridge) -> None:
    async def call(fail: bool) -> None:
        with on_cancel(boom):
            if fail:
                raise ValueError("of the call")

    await bridge.run(call, False)
    with pytest.raises(ValueError, match="of the call"):
        await bridge.run(call, True)


async def test_hooks_need_a_call() -> None:
    with pytest.raises(RuntimeError, match=r"AsyncioBridge\.run"), on_cancel(boom):
        pass


async def test_cancelled_calls_leave_no_task_and_no_thread(bridge: AsyncioBridge) -> None:
    await bridge.run(asyncio.sleep, 0)
    threads = threading.active_count()
    ended = 0

    async def call() -> None:
        nonlocal ended
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended += 1

    with anyio.fail_after(30):
        for _ in range(10):
            async with anyio.create_task_group() as group:
                for _ in range(20):
                    group.start_soon(bridge.run, call)
                await anyio.sleep(0.005)
                group.cancel_scope.cancel()
    assert ended == 200
    assert call.__qualname__ not in await bridge.run(task_names)
    assert threading.active_count() == threads


async def test_a_call_that_outlives_the_grace_is_left_behind_and_cancelled_again_on_closing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cancellations = 0
    hook_cancelled = False

    async def stubborn() -> None:
        nonlocal cancellations
        with on_cancel(endless_hook):
            while cancellations < 2:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    cancellations += 1

    async def endless_hook() -> None:
        nonlocal hook_cancelled
        try:
            await asyncio.sleep(60)
        finally:
            hook_cancelled = True

    async with AsyncioBridge.open(name="bridge under test", grace_s=0.05) as bridge:
        with caplog.at_level(logging.WARNING), anyio.fail_after(10), anyio.move_on_after(0.02) as scope:
            await bridge.run(stubborn)
        assert scope.cancelled_caught
        assert cancellations == 1
        assert stubborn.__qualname__ in await bridge.run(task_names)
        assert hook_cancelled
        assert ["left behind" in record.message for record in caplog.records] == [True]
        assert await bridge.run(asyncio.sleep, 0, "alive") == "alive"
    assert cancellations == 2
    assert not bridge_threads()


async def test_a_call_that_never_ends_does_not_keep_the_bridge_from_closing(anyio_backend: str) -> None:
    end = threading.Event()

    async def endless() -> None:
        while not end.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    try:
        with anyio.fail_after(10):
            async with AsyncioBridge.open(name="bridge under test", grace_s=0.05) as bridge:
                with anyio.move_on_after(0.02):
                    await bridge.run(endless)
        assert [thread.daemon for thread in bridge_threads()] == ([True] if anyio_backend == "trio" else [])
    finally:
        end.set()
    with anyio.fail_after(10):
        while bridge_threads():
            await anyio.sleep(0.01)


async def test_closing_ends_the_thread(anyio_backend: str) -> None:
    with pytest.raises(Boom):
        async with AsyncioBridge.open(name="bridge under test"):
            assert len(bridge_threads()) == (anyio_backend == "trio")
            raise Boom
    assert not bridge_threads()
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with AsyncioBridge.open(name="bridge under test"):
            await anyio.sleep(0)
    assert scope.cancelled_caught
    assert not bridge_threads()


def test_cancellations_of_asyncio_itself_do_not_shorten_the_wait() -> None:
    """Without anyio's scopes: a task that is cancelled while it waits for its cancelled call."""
    ended = False

    async def call() -> None:
        nonlocal ended
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            ended = True

    async def main() -> None:
        async with AsyncioBridge.open() as bridge:
            caller = asyncio.create_task(bridge.run(call))
            for _ in range(3):
                await asyncio.sleep(0.01)
                caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            assert ended

    asyncio.run(main())
