"""Approvals: shown once stored, decided once by whoever is first, expired by themselves, kept with their session."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import anyio
import pytest
from hypothesis import given

from agent_runtime import (
    Approval,
    ApprovalDecided,
    ApprovalNotFound,
    DurabilityNotReached,
    InvalidInput,
    Quarantined,
    Runtime,
    SessionHandle,
    SessionNotFound,
)
from agent_runtime.approvals import APPROVALS, ApprovalStatus, Deciding, Decision
from agent_runtime.archive import archive_line, parse_line
from agent_runtime.identifiers import utc_now
from agent_runtime.testing import Faults, faulty_plugin, writes_session
from agent_runtime.transfer import read_archive, restore_session
from agent_runtime_memory import MemoryDatabase
from places import KINDS, SHORT, Place, forget, in_file, in_memory, place_of, values

pytestmark = pytest.mark.anyio


async def asked(session: SessionHandle, call_id: str = "c1", **options: Any) -> Approval:
    return await session.request_approval(call_id, "write_file", {"path": "a.txt"}, **options)


async def test_a_request_has_what_it_was_made_with() -> None:
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        begun_at = utc_now()
        approval = await asked(session, reason="dangerous", expires_in_s=60)
        assert (approval.call_id, approval.tool_name, approval.arguments) == ("c1", "write_file", {"path": "a.txt"})
        assert (approval.reason, approval.status, approval.decided_at) == ("dangerous", "pending", None)
        assert begun_at <= approval.created_at <= utc_now()
        assert approval.expires_at == approval.created_at + timedelta(seconds=60)
        assert await session.approvals() == [approval]
        assert await session.approval(approval.approval_id) == approval


@pytest.mark.parametrize("kind", KINDS)
async def test_every_outcome_outlives_the_runtime(kind: str, tmp_path: Path) -> None:
    place = place_of(kind, tmp_path)
    async with place.open() as runtime:
        session = await runtime.create_session("s1")
        made = [await asked(session) for _ in range(4)]  # one call_id, four approvals
        await session.decide_approval(made[1].approval_id, "approve")
        await session.decide_approval(made[2].approval_id, "edit", arguments={"path": "b.txt"}, reason="not there")
        await session.decide_approval(made[3].approval_id, "reject", reason="no")
        seen = await session.approvals(status=None)
        await runtime.flush()
        forget(runtime)
        assert await session.approvals(status=None) == seen
    async with place.open() as runtime:
        session = await runtime.get_session("s1")
        found = await session.approvals(status=None)
        assert found == seen
        assert [each.approval_id for each in found] == [each.approval_id for each in made]
        assert [each.status for each in found] == ["pending", "approved", "edited", "rejected"]
        assert [each.edited_arguments for each in found] == [None, None, {"path": "b.txt"}, None]
        assert [each.decision_reason for each in found] == [None, None, "not there", "no"]
        assert await session.approvals() == [made[0]]
        for status in get_args(ApprovalStatus):
            expected = [each for each in found if each.status == status]
            assert await session.approvals(status=status) == expected


async def test_a_request_is_shown_only_once_it_is_stored() -> None:
    """Nothing is stored here but on demand."""
    shown: list[Approval] = []
    async with in_memory().open() as runtime, anyio.create_task_group() as tasks:
        session = await runtime.create_session("s1")
        unstored = await asked(session, durability="buffered")
        assert await session.approvals(status=None) == []
        with pytest.raises(ApprovalNotFound):
            await session.approval(unstored.approval_id)
        (document,) = (await session.list_documents(APPROVALS)).items  # as every read, it shows what was accepted
        assert document.key == unstored.approval_id

        async def watch() -> None:
            while not (found := await session.approvals()):
                await anyio.sleep(0.001)
            shown.extend(found)

        tasks.start_soon(watch)
        await anyio.sleep(0.01)
        assert shown == []
        await runtime.flush()
    assert shown == [unstored]


async def test_by_default_a_request_waits_until_it_is_stored() -> None:
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        await asked(session)
        assert runtime.watermarks.stored == runtime.watermarks.accepted
        assert len(await session.approvals()) == 1


async def test_a_request_that_is_not_stored_in_time_is_hidden_until_it_is() -> None:
    async with in_memory().open(write_behind={"durability_timeout_s": 0.05}) as runtime:
        session = await runtime.create_session("s1")
        await runtime.flush()
        apply, runtime._storage.apply = runtime._storage.apply, _never  # type: ignore[method-assign]
        with pytest.raises(DurabilityNotReached) as caught:
            await asked(session)
        assert await session.approvals() == []
        runtime._storage.apply = apply  # type: ignore[method-assign]
        with anyio.fail_after(20):
            while runtime.watermarks.stored < runtime.watermarks.accepted:
                await anyio.sleep(0.01)
        assert await session.approvals() == [caught.value.outcome]


async def _never(*_args: Any, **_kwargs: Any) -> Any:
    raise OSError("the database is away")


async def test_a_request_that_is_stored_is_shown_while_another_s_read_is_slow() -> None:
    faults = Faults()
    place = Place("faulty:memory:", faulty_plugin(MemoryDatabase().open, faults))
    async with place.open() as runtime, anyio.create_task_group() as tasks:
        other = await runtime.create_session("s2", system_prompt="Be kind.")
        session = await runtime.create_session("s1", durability="stored")
        forget(runtime)
        gate = faults.hold("messages", nth=1)
        tasks.start_soon(other.history)
        await gate.reached.wait()
        approval = await asked(session)
        assert await session.approvals() == [approval]
        assert await session.approval(approval.approval_id) == approval
        gate.open()


async def test_of_many_who_decide_at_once_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them have seen that nothing is decided yet. Each is told what was."""
    read = Deciding.read
    seen = 0
    all_have_seen = anyio.Event()

    async def read_with_the_others(self: Deciding) -> None:
        nonlocal seen
        await read(self)
        seen += 1
        if seen == 20:
            all_have_seen.set()
        await all_have_seen.wait()

    monkeypatch.setattr(Deciding, "read", read_with_the_others)
    outcomes: list[Approval] = []
    refusals: list[ApprovalDecided] = []

    async def decide(session: SessionHandle, approval_id: str, number: int) -> None:
        decision: Decision = ("approve", "edit", "reject")[number % 3]
        arguments = {"by": number} if decision == "edit" else None
        try:
            outcomes.append(
                await session.decide_approval(approval_id, decision, arguments=arguments, reason=f"{number}")
            )
        except ApprovalDecided as error:
            refusals.append(error)

    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        approval = await asked(session)
        forget(runtime)
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(decide, session, approval.approval_id, number)
        assert (len(outcomes), len(refusals)) == (1, 19)
        assert all(error.approval == outcomes[0] for error in refusals)
        assert await session.approval(approval.approval_id) == outcomes[0]
        assert outcomes[0].status in str(refusals[0])


async def test_other_documents_do_not_disturb_a_decision() -> None:
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        approval = await asked(session)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(session.decide_approval, approval.approval_id, "approve")
            for number in range(10):
                tasks.start_soon(session.put_document, "notes", f"n{number}", number)
        assert (await session.approval(approval.approval_id)).status == "approved"
        assert len((await session.list_documents("notes")).items) == 10


async def test_what_is_not_decided_in_time_expires() -> None:
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        approval = await asked(session, expires_in_s=0.05)
        other = await asked(session, expires_in_s=60)
        await anyio.sleep(0.06)
        assert await session.approvals() == [other]
        assert [each.approval_id for each in await session.approvals(status="expired")] == [approval.approval_id]
        with pytest.raises(ApprovalDecided, match="is expired at 20") as caught:
            await session.decide_approval(approval.approval_id, "approve")
        assert caught.value.approval.status == "expired"
        await session.decide_approval(other.approval_id, "approve")


async def test_the_moment_at_which_it_expires_is_too_late() -> None:
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        moment = utc_now()
        runtime._door.now = lambda: moment
        approval = await asked(session, expires_in_s=60)
        moment += timedelta(seconds=60) - timedelta(microseconds=1)
        assert await session.approvals() == [approval]
        moment += timedelta(microseconds=1)
        assert await session.approvals() == []
        with pytest.raises(ApprovalDecided):
            await session.decide_approval(approval.approval_id, "approve")


async def test_a_request_that_the_database_refuses_is_not_shown() -> None:
    faults = Faults()
    async with Place("faulty:memory:", faulty_plugin(MemoryDatabase().open, faults)).open() as runtime:
        session = await runtime.create_session("s1")
        shown = await asked(session)
        poison = faults.reject(writes_session(session.incarnation))
        with pytest.raises(Quarantined):
            await asked(session)
        assert await session.approvals(status=None) == [shown]
        refused = next(
            each.key for each in (await session.list_documents(APPROVALS)).items if each.key != shown.approval_id
        )
        with pytest.raises(ApprovalNotFound):
            await session.approval(refused)
        poison.stop()
        await runtime.quarantine.replay("s1")
        assert [each.approval_id for each in await session.approvals()] == [shown.approval_id, refused]


async def test_what_was_decided_in_time_does_not_expire() -> None:
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        approval = await asked(session, expires_in_s=0.05)
        decided = await session.decide_approval(approval.approval_id, "approve")
        await anyio.sleep(0.06)
        assert await session.approval(approval.approval_id) == decided


async def test_a_call_id_of_another_session_or_of_before_is_no_conflict() -> None:
    async with in_memory().open() as runtime:
        one, two = await runtime.create_session("s1"), await runtime.create_session("s2")
        first = await asked(one)
        await one.decide_approval(first.approval_id, "reject")
        again = await asked(one)
        other = await asked(two)
        assert await one.approvals() == [again]
        assert await two.approvals() == [other]
        with pytest.raises(ApprovalNotFound):
            await two.decide_approval(again.approval_id, "approve")


async def test_a_key_makes_calls_repeatable() -> None:
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        approval = await asked(session, idempotency_key="k1")
        assert await asked(session, idempotency_key="k1") == approval
        decided = await session.decide_approval(approval.approval_id, "approve", idempotency_key="k2")
        assert await session.decide_approval(approval.approval_id, "approve", idempotency_key="k2") == decided
        assert await session.approvals(status=None) == [decided]


@pytest.mark.parametrize(
    ("call", "refusal"),
    [
        (lambda s, _: s.request_approval("", "t", {}), "call_id: must not be empty"),
        (lambda s, _: s.request_approval("c", "", {}), "tool_name: must not be empty"),
        (lambda s, _: s.request_approval("c", "t", {"a": math.nan}), "arguments.a: must be a finite number"),
        (lambda s, _: s.request_approval("c", "t", {}, reason="\0"), "reason: must not contain NUL"),
        (lambda s, _: s.request_approval("c", "t", {}, expires_in_s=0), "expires_in_s: must be a number of seconds"),
        (lambda s, _: s.request_approval("c", "t", {}, expires_in_s=math.nan), "expires_in_s: must be a number"),
        (lambda s, _: s.request_approval("c", "t", {}, expires_in_s=True), "expires_in_s: must be a number"),
        (lambda s, a: s.decide_approval(a, "allow"), "decision: must be one of 'approve', 'edit', 'reject'"),
        (lambda s, a: s.decide_approval(a, "edit"), "arguments: go with the decision 'edit'"),
        (lambda s, a: s.decide_approval(a, "approve", arguments={}), "arguments: go with the decision 'edit'"),
        (lambda s, a: s.decide_approval(a, "reject", reason=5), "reason: must be a plain str"),
        (lambda s, _: s.decide_approval("a/b", "approve"), "approval_id: must not contain"),
        (lambda s, _: s.approvals(status="open"), "status: must be one of 'pending'"),
        (lambda s, a: s.put_document(APPROVALS, a, {}), "collection: holds approvals"),
        (lambda s, a: s.delete_document(APPROVALS, a), "collection: holds approvals"),
    ],
)
async def test_what_is_refused_changes_nothing(call: Any, refusal: str) -> None:
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        approval = await asked(session)
        with pytest.raises(InvalidInput) as caught:
            await call(session, approval.approval_id)
        assert str(caught.value).startswith(refusal)
        assert await session.approvals(status=None) == [approval]


async def test_approvals_go_with_their_session() -> None:
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        approval = await asked(session)
        await session.delete()
        with pytest.raises(SessionNotFound):
            await session.decide_approval(approval.approval_id, "approve")
        again = await runtime.create_session("s1")
        assert await again.approvals(status=None) == []


async def test_more_of_them_than_a_page_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.approvals._PAGE", 3)
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        made = [await asked(session, f"c{number}", durability="buffered") for number in range(10)]
        await runtime.flush()
        assert await session.approvals() == made


async def test_they_are_exported_and_imported(tmp_path: Path) -> None:
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s1")
        approval = await asked(session)
        await session.decide_approval((await asked(session)).approval_id, "reject")
        expected = await session.approvals(status=None)
        line = archive_line(await read_archive(runtime, "s1"))
    async with in_file(tmp_path).open() as runtime:
        await restore_session(runtime, parse_line(line, utc_now()))
        await runtime.flush()
        assert await (await runtime.get_session("s1")).approvals(status=None) == expected
        assert expected[0] == approval
        damaged = line.replace(b'"s1"', b'"s2"').replace(b'"pending"', b'"open"')
        with pytest.raises(InvalidInput, match=r"^documents\[0\].value: is no approval"):
            await restore_session(runtime, parse_line(damaged, utc_now()))
        mixed_up = line.replace(b'"s1"', b'"s2"').replace(b'"key":"' + approval.approval_id.encode(), b'"key":"x')
        with pytest.raises(InvalidInput, match=r"^documents\[\d\].value.approval_id: must be the key"):
            await restore_session(runtime, parse_line(mixed_up, utc_now()))


def test_the_readme_s_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    [program] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "request_approval" in block]
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "readme.py", "exec", dont_inherit=True), {})
    assert capsys.readouterr().out == "buy {'seats': 2} it costs money\nedited {'seats': 1}\n"


async def test_threads_have_them_too() -> None:
    def work(place: Place) -> None:
        with place.open_blocking() as runtime:
            session = runtime.create_session("s1")
            approval = session.request_approval("c1", "write_file", {"path": "a"})
            assert session.approvals() == [approval] == [session.approval(approval.approval_id)]
            decided = session.decide_approval(approval.approval_id, "edit", arguments={"path": "b"})
            with pytest.raises(ApprovalDecided):
                session.decide_approval(approval.approval_id, "approve")
            assert session.approvals(status="edited") == [decided]

    await anyio.to_thread.run_sync(work, in_memory())


@given(arguments=values, edited=values.filter(lambda value: value is not None))
@SHORT
def test_arguments_come_out_as_they_went_in(arguments: Any, edited: Any) -> None:
    async def check() -> None:
        place = in_memory()
        async with place.open() as runtime:
            session = await runtime.create_session("s1")
            approval = await session.request_approval("c1", "t", arguments)
            await session.decide_approval(approval.approval_id, "edit", arguments=edited)
            await _same(runtime, approval.approval_id, arguments, edited)
        async with place.open() as runtime:
            await _same(runtime, approval.approval_id, arguments, edited)

    anyio.run(check)


async def _same(runtime: Runtime, approval_id: str, arguments: Any, edited: Any) -> None:
    found = await (await runtime.get_session("s1")).approval(approval_id)
    assert (repr(found.arguments), repr(found.edited_arguments)) == (repr(arguments), repr(edited))
