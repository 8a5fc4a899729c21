"""A runtime on the storage keeps its promises, also while commits fail, come late, or end in a way nobody knows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from agent_runtime.config import Config
from agent_runtime.errors import LeaseHeld
from agent_runtime.runtime import Runtime, open_runtime
from agent_runtime.session import SessionHandle

from ..faults import Faults
from ..faulty import faulty_plugin
from .contract import Opener, StorageContract, needs

FAULTS: dict[str, Callable[[Faults], object]] = {
    "none": lambda _: None,
    "commits fail": lambda faults: [faults.fail("apply", nth=nth) for nth in (1, 3, 4)],
    "the answer to a commit is lost": lambda faults: [
        faults.fail("apply", nth=nth, after_effect=True) for nth in (1, 3)
    ],
    "commits come late": lambda faults: [faults.commit_late(nth=nth) for nth in (1, 3)],
    "the lease is hard to renew": lambda faults: faults.fail("renew"),
}


def running(opener: Opener, faults: Faults, journal: Path) -> AbstractAsyncContextManager[Runtime]:
    """A runtime that stores soon and keeps little in memory."""
    config = Config.of(
        "faulty:kit",
        journal={"directory": str(journal)},
        residents={"tail_messages": 2},
        write_behind={"interval_s": 0.005},
    )
    return open_runtime(config, plugins=[faulty_plugin(lambda _: opener(), faults)])


async def converse(session: SessionHandle) -> None:
    """A short conversation, in which every kind of call is made and much is stored one by one."""
    await session.append("user", "What is the weather in Århus? 🌧", durability="stored")
    call = {"id": "call", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Århus"}'}}
    await session.append("assistant", None, tool_calls=[call])
    await session.append_tool_result("call", "weather", {"rain_mm": 1.50}, durability="stored")
    await session.put_document("notes", "places", {"b": 1, "a": [1e2, None]})
    await session.switch_agent("poet", reason="asked for", durability="stored")
    for _ in range(2):
        await session.append("assistant", "It rains.", idempotency_key="k", durability="stored")
    await session.append("user", "Never mind.")
    await session.pop(durability="stored")
    await session.put_document("notes", "bytes", b"\x00\xff", media_type="image/png")
    await session.put_document("notes", "gone", 1)
    await session.delete_document("notes", "gone")
    await session.update(title="Rain", durability="stored")


async def shown(session: SessionHandle) -> list[Any]:
    """All that the session shows."""
    return [
        await session.record(),
        (await session.messages()).items,
        (await session.messages(limit=3, order="desc")).items,
        await session.history(),
        await session.context(),
        await session.switches(),
        (await session.list_documents("notes")).items,
    ]


class RuntimeContract(StorageContract):
    """A runtime on it."""

    @pytest.mark.parametrize("kind", FAULTS)
    async def test_a_conversation(self, opener: Opener, tmp_path: Path, kind: str) -> None:
        faults = Faults()
        async with running(opener, faults, tmp_path / "journal") as runtime:
            FAULTS[kind](faults)
            session = await runtime.create_session("s1", user_id="u", system_prompt="Be kind.")
            await runtime.create_session("s2")
            await (await runtime.get_session("s2")).delete()
            await converse(session)
            await runtime.flush()
            expected = await shown(session)
            assert [message.role for message in expected[1]] == ["system", "user", "assistant", "tool", "assistant"]
            assert [message.seq for message in expected[1]] == [1, 2, 3, 4, 5]
            assert [document.key for document in expected[-1]] == ["bytes", "places"]
            assert runtime.status().quarantine.changes == 0
            assert runtime.watermarks.stored == runtime.watermarks.accepted
            faults.clear()
        if "reopening" not in self.lacks:
            async with running(opener, Faults(), tmp_path / "journal") as runtime:
                assert await shown(await runtime.get_session("s1")) == expected
                assert [each.session_id for each in (await runtime.list_sessions(user_id="u")).items] == ["s1"]
                assert [each.session_id for each in (await runtime.list_sessions()).items] == ["s1"]

    @needs("openings")
    async def test_the_second_runtime_is_refused(self, opener: Opener, tmp_path: Path) -> None:
        async with running(opener, Faults(), tmp_path / "journal") as runtime:
            with pytest.raises(LeaseHeld):
                async with running(opener, Faults(), tmp_path / "another"):
                    pass
            await runtime.create_session("s1", durability="stored")
