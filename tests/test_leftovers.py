"""Nothing stays behind of cancelled calls or of a killed process; of what was stored or threads wrote, all is there."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from agent_runtime import BlockingRuntime, InvalidInput, LeaseHeld, Message, open_runtime_blocking
from places import Place, in_file, place_fixture, place_of

CHILDREN = Path(__file__).with_name("children.py")
THREADS = 16
CALLS = 200

place = place_fixture()


@contextmanager
def child(name: str, loop: str, place: Place) -> Iterator[subprocess.Popen[str]]:
    """A process of children.py. It is killed at the end, if it still is there."""
    command = [sys.executable, str(CHILDREN), name, loop, place.url, place.config().journal.directory or ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def facts(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line that the process reports."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the process ended with {process.wait()}"
    reported: dict[str, Any] = json.loads(line)
    return reported


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_nothing_is_left_of_cancelled_calls(tmp_path: Path, kind: str, anyio_backend: str) -> None:
    place = place_of(kind, tmp_path)
    with child("cancel", anyio_backend, place) as process:
        found = facts(process)
        ended_at = facts(process)["ended_at"]
        assert process.wait(timeout=10) == 0
        assert time.time() - ended_at < 5
    assert found["in_use"] == 0
    # With every connection open, before and after. SQLite keeps descriptors of closed connections for the next ones.
    for what, kept in (("threads", 0), ("tasks", 0), ("files", 4)):
        assert found["after"][what] <= found["before"][what] + kept, what
    # The event loop may keep a thread for its next call; everything else is as before the runtime was opened.
    assert found["closed"]["threads"] <= found["before_open"]["threads"] + 1
    assert found["closed"]["tasks"] == found["before_open"]["tasks"]
    assert found["closed"]["files"] <= found["before_open"]["files"]
    assert (found["lost"], found["unknown"], found["twice"]) == ([], [], 0)
    assert min(found["cancelled"].values()) >= 20
    assert found["queries"] == []


def test_a_killed_holder_is_followed_at_once_and_what_it_stored_is_there(tmp_path: Path, anyio_backend: Any) -> None:
    place = in_file(tmp_path)
    stored: dict[str, int] = defaultdict(int)
    with child("hold", anyio_backend, place) as process:
        first = facts(process)
        holder = f"pid {first['pid']} on {socket.gethostname()}"
        assert first["forked"] == f"LeaseHeld: {holder}"
        for number in range(300):
            line = facts(process)
            stored[line["session"]] = line["seq"]
            if number == 100:
                with (
                    pytest.raises(LeaseHeld, match=f"the database is in use by {holder}, for") as caught,
                    place.open_blocking(loop=anyio_backend),
                ):
                    pass
                assert caught.value.holder == holder
                assert caught.value.expires_in_s is not None
                assert 0 < caught.value.expires_in_s <= 60
        os.kill(process.pid, 9)
        assert process.wait() == -9
        assert process.stdout is not None
        for text in process.stdout:
            if text.endswith("\n"):
                line = json.loads(text)
                stored[line["session"]] = line["seq"]
    with place.open_blocking(loop=anyio_backend) as runtime:
        assert len(stored) == 8
        for session_id, seq in stored.items():
            messages = list(runtime.get_session(session_id).scan_messages())
            assert len(messages) >= seq
            assert [message.seq for message in messages] == list(range(1, len(messages) + 1))
            for index, message in enumerate(messages):
                assert message.content == (f"{index // 2} stored" if index % 2 else f"{index // 2}")
            assert runtime.get_session(session_id).append("user", "on we go", durability="stored")
    with closing(sqlite3.connect(place.path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_a_second_runtime_of_the_same_process_is_refused_too(place: Place) -> None:
    with (
        place.open_blocking(),
        pytest.raises(LeaseHeld, match=f"in use by pid {os.getpid()} on"),
        place.open_blocking(),
    ):
        pass
    with place.open_blocking() as runtime:
        assert runtime.watermarks.accepted == 0


# --- threads ----------------------------------------------------------------------------------------------------------


def test_of_what_threads_write_nothing_is_lost(tmp_path: Path, anyio_backend: Any) -> None:
    place = in_file(tmp_path)

    def work(runtime: BlockingRuntime, thread: int) -> list[Message]:
        session = runtime.get_or_create_session("s1", system_prompt="Be kind.")
        appended = []
        for number in range(CALLS // 4):
            appended.append(session.append("user", f"{thread} {number}"))
            session.merge({"metadata": {f"{thread} {number}": number}})
            session.put_document("notes", f"{thread}", number)
            session.append_message(
                {"role": "assistant", "content": f"{thread} {number}"}, idempotency_key=f"{number}.{thread}"
            )
        return appended

    with place.open_blocking(loop=anyio_backend) as runtime, ThreadPoolExecutor(THREADS) as threads:
        appended = list(threads.map(lambda thread: work(runtime, thread), range(THREADS)))
    names = {f"{thread} {number}" for thread in range(THREADS) for number in range(CALLS // 4)}
    with place.open_blocking(loop=anyio_backend) as runtime:
        session = runtime.get_session("s1")
        messages = list(session.scan_messages())
        assert [message.seq for message in messages] == list(range(1, 2 * len(names) + 2))
        by_seq = {message.seq: message for message in messages}
        assert all(by_seq[message.seq] == message for each in appended for message in each)
        for role in ("user", "assistant"):
            assert {message.content for message in messages if message.role == role} == names
        for each in appended:
            assert [message.seq for message in each] == sorted(message.seq for message in each)
        assert session.record().metadata.keys() == names
        assert [document.value for document in session.list_documents("notes").items] == [CALLS // 4 - 1] * THREADS


@pytest.mark.anyio
async def test_a_thread_that_runs_an_event_loop_may_call_too(place: Place, anyio_backend: Any) -> None:
    with place.open_blocking() as runtime:
        session = runtime.create_session("s1")
        session.append("user", "hi", durability="stored")
        await anyio.lowlevel.checkpoint()
        assert [message["content"] for message in session.history()] == ["hi"]
    if anyio_backend == "asyncio":
        with place.open_blocking(loop="trio") as runtime:
            assert runtime.get_session("s1").pop()
    else:
        with (
            pytest.raises(
                InvalidInput, match="this thread runs trio, which can't wait for another trio: use 'asyncio'"
            ),
            open_runtime_blocking("memory:", loop="trio"),
        ):
            pass
