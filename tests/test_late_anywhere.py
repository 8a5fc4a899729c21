"""Whole sessions after a journal came in late: in one go and broken off after each change, whatever the clocks say."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agent_runtime import Runtime, SessionNotFound, StorageUnavailable
from agent_runtime.identifiers import utc_now
from test_late import World, _Kept

pytestmark = pytest.mark.anyio

STORED = ("put", "append", "switch", "title", "other", "context")
STEPS = (*STORED, "discard", "delete", "create", "several", "pop", "clear", "describe")
CLOCKS = ("right", "ahead", "behind", "set back")


class Case(NamedTuple):
    """One session: what was stored of it, and what either runtime does to it. `clock` is that of the one that is late."""

    clock: str
    stored: tuple[str, ...]
    late: tuple[str, ...]
    second: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return ":".join("_".join(part) for part in ((self.clock.replace(" ", "_"),), *self[1:]))


async def do(runtime: Runtime, name: str, steps: Iterable[str], who: str) -> None:
    for number, step in enumerate(steps):
        value = f"{who} {number}"
        try:
            session = await runtime.get_session(name)
        except SessionNotFound:
            if step in {"discard", "delete", "pop", "clear"}:
                continue
            key = f"{name} {value}"
            session = await runtime.get_or_create_session(name, title=f"born {value}", idempotency_key=key)
        match step:
            case "put":
                await session.put_document("notes", "n", value, idempotency_key=value)
            case "other":
                await session.put_document("notes", "m", value)
            case "discard":
                await session.delete_document("notes", "n")
            case "delete":
                await session.delete()
            case "append":
                await session.append("user", value, idempotency_key=value)
            case "several":
                await session.append_many([{"role": "user", "content": value}] * 2)
            case "pop":
                await session.pop()
            case "clear":
                await session.clear()
            case "switch":
                await session.switch_agent(value)
            case "title":
                await session.update(title=value)
            case "describe":
                await session.update(description=value)
            case "context":
                await session.update_context(metadata={"by": value})


async def session_of(runtime: Runtime, name: str) -> object:
    """All that a caller can see of a session; None: there is none."""
    try:
        session = await runtime.get_session(name)
    except SessionNotFound:
        return None
    messages = [message async for message in session.scan_messages()]
    documents = (await session.list_documents("notes")).items
    return await session.record(), await session.context(), await session.switches(), messages, documents


async def all_of(runtime: Runtime, cases: Iterable[Case]) -> dict[str, object]:
    found: dict[str, Any] = {case.name: await session_of(runtime, case.name) for case in cases}
    found["in quarantine"] = sorted((each.session_id, each.state) for each in await runtime.quarantine.entries())
    return found


def unlike(found: dict[str, object], wanted: dict[str, object]) -> dict[str, object]:
    return {name: (found[name], wanted[name]) for name in wanted if found[name] != wanted[name]}


class Clock:
    """The clock of the runtime that is late, as it is for the session at hand."""

    def __init__(self) -> None:
        self.kind = "right"
        self._ticks = 0

    def now(self) -> datetime:
        self._ticks += 1
        shift_s = {"right": 0, "ahead": 3600, "behind": -3600, "set back": -self._ticks}[self.kind]
        return utc_now() + timedelta(seconds=shift_s)


async def check(directory: Path, cases: Iterable[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.testing.faulty.FaultyStorage", _Kept)
    (directory / "one").mkdir()
    world = World("sqlite", directory / "one")
    async with world.open() as runtime:
        for case in cases:
            await do(runtime, case.name, case.stored, "stored")
    clock = Clock()
    with monkeypatch.context() as patched:
        patched.setattr("agent_runtime.runtime.utc_now", clock.now)
        async with world.losing() as runtime:
            for case in cases:
                clock.kind = case.clock
                await do(runtime, case.name, case.late, "late")
            clock.kind = "right"
            knew = await all_of(runtime, cases)
    async with world.second() as runtime:
        for case in cases:
            await do(runtime, case.name, case.second, "second")
    shutil.copytree(directory / "one", directory / "other")
    async with world.open() as runtime:
        whole = await all_of(runtime, cases)
    alone = {case.name: knew[case.name] for case in cases if not case.second}
    assert unlike(whole, alone) == {}

    world.directory = directory / "other"
    world.url = world.url.replace(str(directory / "one"), str(directory / "other"))
    tries = 0
    while True:
        tries += 1
        try:
            with world.away_after(1):
                async with world.open(batch_changes=1, durability_timeout_s=0.01, drain_timeout_s=0.01) as runtime:
                    broken_off = await all_of(runtime, cases)
            break
        except StorageUnavailable:
            assert tries < 1000
    assert tries > sum(not case.second for case in cases)
    assert unlike(broken_off, whole) == {}


async def test_what_comes_in_is_the_same_when_it_is_broken_off_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        Case("behind", ("append",), ("switch", "put", "discard")),
        Case("set back", (), ("put", "title")),
        Case("ahead", ("append",), ("append", "delete"), ("clear",)),
    ]
    await check(tmp_path, cases, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
async def test_any_sessions_are_the_same_when_it_is_broken_off_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    cases = {
        Case(
            chance.choice(CLOCKS),
            tuple(chance.choices(STORED, k=chance.randint(1, 3))) if chance.random() < 0.7 else (),
            tuple(chance.choices(STEPS, k=chance.randint(1, 4))),
            tuple(chance.choices(STEPS, k=chance.choice((0, 0, 1, 2)))),
        )
        for _ in range(40)
    }
    await check(tmp_path, sorted(cases), monkeypatch)
