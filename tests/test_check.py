"""`check`: whatever the runtime leaves is right, and each thing that can be wrong is found, named, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_runtime import Quarantined, Runtime, SessionHeld, SessionNotFound
from agent_runtime.changes import Change
from agent_runtime.check import Finding, check
from agent_runtime.cli.reading import pictures
from agent_runtime.journal import read_directory
from agent_runtime.journal.frames import encode_frame, seed_of
from agent_runtime.journal.headers import encode_headers, segment_name
from agent_runtime.journal.still import StillFiles
from agent_runtime.testing import Faults, faulty_plugin
from agent_runtime_sqlite import open_sqlite
from crash import END, STORED, Left, leave_crash
from places import Place, in_file
from shell import Shell
from writes import WRITES, begin

NUMBERS = count()
HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def crash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("crash")
    leave_crash(directory)
    return directory


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture
def left(crash: Path, shell: Shell) -> Left:
    shell.database.unlink()
    return Left.copy(crash, shell.directory)


def found(shell: Shell) -> list[str]:
    """What is wrong; the last line counts it."""
    output, errors = shell.here("check", code=1)
    *findings, total = output.splitlines()
    assert total.startswith(f"{len(findings)} finding(s): ")
    assert errors == []
    assert "said" not in output
    assert "hushed" not in output
    return findings


def test_what_a_crash_leaves_is_right(shell: Shell, left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.check._SESSIONS", 3)
    right = f"4 session(s), 9 message(s), {END - STORED} change(s) not stored, 0 in quarantine"
    assert shell.here("check") == (f"ok: {right}\n", [])
    totals = {"sessions": 4, "messages": 9, "changes": END - STORED, "quarantined": 0, "findings": 0}
    assert json.loads(shell.here("check", "--json")[0]) == totals
    left.sql("UPDATE sessions SET message_count = 6 WHERE session_id = 'plain'")
    finding, last = shell.here("check", "--json", code=1)[0].splitlines()
    assert json.loads(finding) == {
        "problem": "counts 6 message(s), has 5; absent seqs: 6",
        "session_id": "plain",
    }
    assert json.loads(last) == totals | {"findings": 1}


def test_a_terminal_sees_findings_beside_a_bar(shell: Shell, left: Left) -> None:
    code, seen = shell.on_terminal("check")
    assert (code, seen.endswith("0 in quarantine\n")) == (0, True)
    assert "checking" in seen
    left.sql("UPDATE sessions SET message_count = 6 WHERE session_id = 'plain'")
    code, seen = shell.on_terminal("check")
    assert code == 1
    assert "session 'plain': counts 6 message(s), has 5; absent seqs: 6\n" in seen


def test_a_database_that_nobody_has_opened_is_not_all_right(shell: Shell) -> None:
    shell.make_tables("new.db")
    told = shell.fails("check", "--storage", "sqlite:///new.db")
    assert told == "the database is new: no runtime ever had it open; is storage.url right?"


# --- the database -----------------------------------------------------------------------------------------------------

STORED_SESSIONS = ("plain", "cleared", "switched", "ended")
ROOT_OF_AN_EMPTY_ONE = "(SELECT rootpage FROM sqlite_master WHERE name = 'outcomes_by_expiry')"
OF = "(SELECT incarnation FROM sessions WHERE session_id = '{}')".format
INSERT = (
    "INSERT INTO messages (incarnation, seq, id, role, created_at) "
    "SELECT incarnation, {}, 'x', 'user', created_at FROM sessions WHERE session_id = 'plain'"
).format

DATABASE: dict[str, tuple[list[str], list[str]]] = {
    "a message is gone": (
        [f"DELETE FROM messages WHERE seq = 3 AND incarnation = {OF('plain')}"],
        ["session 'plain': counts 5 message(s), has 4; absent seqs: 3, 6"],
    ),
    "the last message is gone, and what is absent is long": (
        [f"DELETE FROM messages WHERE seq > 1 AND incarnation = {OF('plain')}"],
        ["session 'plain': counts 5 message(s), has 1; absent seqs: 2 to 6"],
    ),
    "messages are gone here and there": (
        [
            "UPDATE sessions SET next_seq = 23 WHERE session_id = 'plain'",
            *(INSERT(seq) for seq in range(8, 23, 2)),
        ],
        ["session 'plain': counts 5 message(s), has 13; absent seqs: 6 to 7, 9, 11, 13, 15, …"],
    ),
    "one is counted that never was": (
        ["UPDATE sessions SET message_count = 7 WHERE session_id = 'plain'"],
        ["session 'plain': counts 7 message(s), has 5; absent seqs: 6"],
    ),
    "a message has a seq that is yet to be given": (
        [INSERT(7)],
        [
            "session 'plain', seq 7: is there, although the session's next seq is 7",
            "session 'plain': counts 5 message(s), has 6; absent seqs: 6",
        ],
    ),
    "a floor above everything": (
        ["UPDATE sessions SET floor = 7 WHERE session_id = 'plain'"],
        ["session 'plain': its floor is 7, its next seq 7", "session 'plain': counts 5 message(s), has 0"],
    ),
    "a floor that has slipped": (
        ["UPDATE sessions SET floor = 2 WHERE session_id = 'plain'"],
        ["session 'plain': counts 5 message(s), has 3; absent seqs: 6"],
    ),
    "no context": (
        [f"DELETE FROM contexts WHERE incarnation = {OF('plain')}"],
        ["session 'plain': can't be read: …: the session 'plain' has no context"],
    ),
    "a time that is none": (
        [f"UPDATE messages SET created_at = 'now' WHERE seq = 2 AND incarnation = {OF('plain')}"],
        ["session 'plain': can't be read: …: ValueError"],
    ),
    "a switch is gone": (
        ["DELETE FROM switches WHERE number = 1"],
        [
            "session 'switched': its 1 switch(es) are not numbered from 1 on: there is a number 2",
            "session 'switched': counts 2 switch(es), has 1",
        ],
    ),
    "a switch is not counted": (
        [f"UPDATE contexts SET switch_count = 1 WHERE incarnation = {OF('switched')}"],
        ["session 'switched': counts 1 switch(es), has 2"],
    ),
    "an index that has lost its rows": (
        [
            "PRAGMA writable_schema = ON",
            f"UPDATE sqlite_master SET rootpage = {ROOT_OF_AN_EMPTY_ONE} WHERE name = 'sessions_by_id'",
        ],
        [
            *(f"session '{each}': is in the list, but not under its id" for each in STORED_SESSIONS),
            *(
                f"session '{each}', change {sequence}: follows {previous}, but the session's last change before it is none"
                for each, sequence, previous in (
                    ("plain", 22, 7),
                    ("switched", 30, 15),
                    ("cleared", 31, 11),
                    ("ended", 32, 21),
                )
            ),
        ],
    ),
    "a session ahead of the database": (
        ["UPDATE sessions SET sequence = 99 WHERE session_id = 'plain'"],
        [
            "session 'plain', change 99: its last change is 99, the database has all up to 21",
            "session 'plain', change 22: follows 7, but the session's last change before it is 99",
        ],
    ),
    "a session that has lost a change": (
        ["UPDATE sessions SET sequence = 6 WHERE session_id = 'plain'"],
        ["session 'plain', change 22: follows 7, but the session's last change before it is 6"],
    ),
    "a session that is not there": (
        ["UPDATE sessions SET deleted_at = created_at WHERE session_id = 'plain'"],
        ["session 'plain', change 22: follows 7, but the session's last change before it is none"],
    ),
    "a watermark that has slipped": (
        ["UPDATE partitions SET sequence = 19"],
        [
            "session 'ended', change 21: its last change is 21, the database has all up to 19",
            "the journal is stored up to 21, the database has all up to 19",
            "session 'gone', change 20: follows 17, but the session's last change before it is none",
            "session 'ended', change 21: follows 19, but the session's last change before it is 21",
        ],
    ),
    "a watermark below all that the journal has": (
        ["UPDATE partitions SET sequence = 0", "UPDATE journals SET sequence = 0", "DELETE FROM messages"]
        + [f"DELETE FROM {table}" for table in ("contexts", "switches", "documents", "sessions")],
        [],
    ),
    "another database": (
        ["UPDATE partitions SET database_id = 'another'"],
        ["the journal … belongs to the database …, storage.url leads to the database another. …"],
    ),
    "a newer generation": (
        ["UPDATE journals SET generation = 9, previous_generation = 8"],
        ["the journal … is an old copy: it is of generation 1, the database knows generation 9 of it. …"],
    ),
    "another journal has written since": (
        ["UPDATE journals SET sequence = 20"],
        [
            (
                "the journal … has changes 21 to 32 that the database lacks, and another runtime has written up to 21 "
                "since: they come in late when the journal is opened"
            )
        ],
    ),
    "the journal of whoever held the lease is elsewhere": (
        ["UPDATE partitions SET journal_id = 'another', holder = 'pid 1 on moon'"],
        [
            "pid 1 on moon has, or had when it died, the journal another, and … is another one: what only that one …",
        ],
    ),
}


def normal(findings: list[str]) -> list[str]:
    """Without what differs from run to run, and without advice."""
    texts = (
        (r"(can't be read: )the database.*?(: the session|: ValueError)", r"\1…\2"),
        (r"the database [0-9a-f-]{36}", "the database …"),
        (r"(the journal )/\S+|/\S+( is another one)", r"\1…\2"),
        (r" To go on without .*", " …"),
        (r"(what only that one) holds .*", r"\1 …"),
    )
    for pattern, text in texts:
        findings = [re.sub(pattern, text, finding) for finding in findings]
    return findings


@pytest.mark.parametrize("kind", DATABASE)
def test_what_is_wrong_in_the_database_is_found(shell: Shell, left: Left, kind: str) -> None:
    statements, findings = DATABASE[kind]
    left.sql(*statements)
    if findings:
        assert normal(found(shell)) == findings
    else:
        assert shell.here("check")[0].startswith("ok: 0 session(s), 0 message(s), 32 change(s) not stored")


# --- quarantine -------------------------------------------------------------------------------------------------------


def held(left: Left, sequence: int, **changed: Any) -> Change:
    """A change of the session `plain`, for quarantine."""
    return msgspec.structs.replace(left.change(22), sequence=sequence, **changed)


HELD = "session 'plain', change 12: is held: change 12 was refused, {} wait(s) behind it in quarantine".format
LATER = "session 'plain', change 22: follows 7, but the session's last change before it is {}".format
QUARANTINE: dict[str, tuple[Callable[[Left], object], list[str]]] = {
    "a held session": (lambda left: left.quarantine(held(left, 12)), [HELD(0), LATER(12)]),
    "one with another behind": (
        lambda left: left.quarantine(held(left, 12)).quarantine(held(left, 14, previous=12), "queued"),
        [HELD(1), LATER(14)],
    ),
    "one behind nothing": (
        lambda left: left.quarantine(held(left, 12), "queued"),
        ["session 'plain', change 12: is queued in quarantine, as the first", HELD(0), LATER(12)],
    ),
    "two that were refused": (
        lambda left: left.quarantine(held(left, 12)).quarantine(held(left, 14, previous=12)),
        ["session 'plain', change 14: is rejected in quarantine, behind another", HELD(1), LATER(14)],
    ),
    "one that is missing in between": (
        lambda left: left.quarantine(held(left, 12)).quarantine(held(left, 14, previous=13), "queued"),
        ["session 'plain', change 14: follows 13, but is in quarantine behind 12", HELD(1), LATER(14)],
    ),
    "one that is not stored": (
        lambda left: left.quarantine(held(left, 99)),
        [
            "session 'plain', change 99: is in quarantine, the database has all up to 21",
            "session 'plain', change 99: is held: change 99 was refused, 0 wait(s) behind it in quarantine",
            LATER(99),
        ],
    ),
    "one that went on": (
        lambda left: left.quarantine(held(left, 5)),
        [
            "session 'plain', change 5: is held: change 5 was refused, 0 wait(s) behind it in quarantine",
            "session 'plain', change 5: is held by change 5, and has gone on to 7",
            LATER(5),
        ],
    ),
    "one that can't be read": (
        lambda left: left.quarantine(held(left, 12)).sql("UPDATE quarantine SET change = '{}'"),
        ["session 'plain', change 12: is in quarantine, and can't be read", HELD(0), LATER(12)],
    ),
    "one under another's name": (
        lambda left: left.quarantine(held(left, 12)).sql("UPDATE quarantine SET session_id = 'new'"),
        [
            "session 'new', change 12: is in quarantine, and holds change 12 of 'plain'",
            HELD(0).replace("plain", "new"),
            LATER(12),
        ],
    ),
}


@pytest.mark.parametrize(("previous", "right"), [(12, True), (7, True), (6, False)], ids=["replay", "drop", "neither"])
def test_a_change_that_resolves_another_follows_it_or_what_is_stored(
    shell: Shell, left: Left, previous: int, right: bool
) -> None:
    left.quarantine(held(left, 12))
    left.rewrite(22, msgspec.structs.replace(left.change(22), resolves=12, previous=previous))
    wrong = "session 'plain', change 22: follows 6, but the session's last change before it is 12 or 7"
    assert found(shell) == [HELD(0)] + [wrong] * (not right)


@pytest.mark.parametrize("kind", QUARANTINE)
def test_what_is_wrong_in_quarantine_is_found(shell: Shell, left: Left, kind: str) -> None:
    damage, findings = QUARANTINE[kind]
    damage(left)
    assert found(shell) == findings


# --- the journal ------------------------------------------------------------------------------------------------------


def repeat(left: Left, sequence: int, change: Change) -> None:
    """A segment that was written again after a failed sync, with one change, beside those that there are."""
    with closing(StillFiles(left.journal)) as files:
        header = read_directory(files).header
    assert header is not None
    newer = msgspec.structs.replace(header, segment=header.segment + 1, first=sequence)
    frame = encode_frame(sequence, msgspec.json.encode(change), seed_of(header.journal))
    (left.journal / segment_name(newer.segment)).write_bytes(encode_headers(newer) + frame)


def next_change(left: Left, **changed: Any) -> Change:
    """One more change of the session `plain`."""
    return msgspec.structs.replace(left.change(27), **({"sequence": END + 1, "previous": 27} | changed))


NEXT = f"session 'plain', change {END + 1}: "
JOURNAL: dict[str, tuple[Callable[[Left], object], list[str]]] = {
    "a damaged change": (
        lambda left: left.damage(24),
        [
            "change 24: is lost: not to be read from the journal PLACE",
            "session 'plain', change 25: follows 24, but the session's last change before it is 23",
            "FILE of the journal PLACE is damaged at byte N: N bytes",
        ],
    ),
    "a change that can't be read": (
        lambda left: left.append(END + 1, b'{"sequence":1}'),
        [f"change {END + 1}: is whole in the journal PLACE, but can't be read"],
    ),
    "a change under another's sequence": (
        lambda left: left.append(END + 1, next_change(left, sequence=99)),
        [f"change 99: is written under the sequence {END + 1} in the journal PLACE"],
    ),
    "a change that forgets the one before it": (
        lambda left: left.append(END + 1, next_change(left, previous=26)),
        [NEXT + "follows 26, but the session's last change before it is 27"],
    ),
    "a change of a session that is deleted": (
        lambda left: left.append(
            END + 1, next_change(left, session_id="ended", incarnation=left.change(32).incarnation, previous=32)
        ),
        [f"session 'ended', change {END + 1}: follows 32, but the session's last change before it is its deletion"],
    ),
    "a session that begins again": (
        lambda left: left.append(END + 1, next_change(left, previous=0)),
        [NEXT + "follows nothing, but the session's last change before it is 27"],
    ),
    "a change that resolves nothing": (
        lambda left: left.append(END + 1, next_change(left, resolves=12)),
        [NEXT + "resolves change 12, which is not in quarantine"],
    ),
    "one sequence for two changes": (
        lambda left: repeat(left, 26, next_change(left, sequence=26, previous=25)),
        ["change 26: is in the journal PLACE twice, and differently"],
    ),
    "a segment that is gone": (
        lambda left: left.segments[-2].unlink(),
        ["change N: is lost, and so are all up to N: not to be read from the journal PLACE", "…"],
    ),
    "a segment of another journal": (
        lambda left: (left.journal / segment_name(99)).write_bytes(headers_of_another(left)),
        ["PLACE holds segments of several journals: …"],
    ),
}


def headers_of_another(left: Left) -> bytes:
    with closing(StillFiles(left.journal)) as files:
        header = read_directory(files).header
    assert header is not None
    return encode_headers(msgspec.structs.replace(header, journal="another", segment=99))


@pytest.mark.parametrize("kind", JOURNAL)
def test_what_is_wrong_in_the_journal_is_found(shell: Shell, left: Left, kind: str) -> None:
    damage, findings = JOURNAL[kind]
    damage(left)
    shown = [each.replace(str(left.journal), "PLACE") for each in found(shell)]
    if kind == "a segment that is gone":
        shown = [re.sub(r"\d+", "N", shown[0]), "…"] if len(shown) > 1 else shown
    shown = [re.sub(r"^\S+\.segment (.* byte )\d+: \d+", r"FILE \1N: N", each) for each in shown]
    shown = [re.sub(r"(^PLACE holds .*journals:).*", r"\1 …", each) for each in shown]
    assert shown == findings


def test_what_is_as_it_should_be_is_no_finding(shell: Shell, left: Left) -> None:
    left.append(END + 1, next_change(left))
    repeat(left, 26, left.change(26))
    with left.segments[-1].open("ab") as file:
        file.write(b"torn")
    assert shell.here("check")[0].startswith(f"ok: 4 session(s), 9 message(s), {END - STORED + 1} change(s) not stored")


def test_without_its_journal_a_database_is_looked_at_alone(shell: Shell, left: Left) -> None:
    shutil.rmtree(left.journal)
    (finding,) = found(shell)
    assert finding.endswith("there is no journal here: what only that one holds comes back when it is opened")
    left.sql("UPDATE partitions SET holder = NULL")
    assert shell.here("check")[0] == "ok: 4 session(s), 9 message(s), 0 change(s) not stored, 0 in quarantine\n"


# --- several journals -------------------------------------------------------------------------------------------------


def test_every_journal_beside_the_file_is_looked_at(shell: Shell, left: Left) -> None:
    late = (
        f"the journal {left.journal} has changes {STORED + 1} to {END} that the database lacks, and another runtime has "
        f"written up to {STORED + 1} since: they come in late when the journal is opened"
    )
    changes = END - STORED + 1
    with left.overtaken() as second:
        output, _ = shell.here("check", code=1)
        right = f"4 session(s), 10 message(s), {changes} change(s) not stored, 0 in quarantine"
        assert output.splitlines() == [late, f"1 finding(s): {right}"]
        path, frame = left.damage(24)
        second.append(STORED + 3, b"{}")
        assert found(shell) == [
            late,
            f"change 24: is lost: not to be read from the journal {left.journal}",
            f"{path.name} of the journal {left.journal} is damaged at byte {frame.start}: {frame.end - frame.start} bytes",
            f"change {STORED + 3}: is whole in the journal {second.journal}, but can't be read",
        ]
        *findings, totals = shell.here("check", "--json", code=1)[0].splitlines()
        assert (len(findings), json.loads(totals)["changes"]) == (4, changes)
        # One that the configuration names is the only one.
        alone = {"AGENT_RUNTIME__JOURNAL__DIRECTORY": str(left.journal)}
        assert str(second.journal) not in shell.here("check", code=1, environment=alone)[0]


def test_a_journal_that_is_alone_under_a_later_number_is_looked_at(shell: Shell, left: Left) -> None:
    left.journal.rename(f"{left.journal}.7")
    assert f", {END - STORED} change(s) not stored, " in shell.here("check")[0]


def test_a_journal_that_can_not_be_read_leaves_the_others_to_be_looked_at(shell: Shell, left: Left) -> None:
    third = left.journal.rename(f"{left.journal}.3")
    second = shutil.copytree(third, f"{left.journal}.2")
    left = Left(left.database.parent, third.name)
    (Path(second) / segment_name(99)).write_bytes(headers_of_another(left))
    left.append(END + 1, b"{}")
    mixed, unreadable = found(shell)
    assert mixed.startswith(f"{second} holds segments of several journals: ")
    assert unreadable == f"change {END + 1}: is whole in the journal {third}, but can't be read"


@pytest.mark.parametrize(("others", "told"), [(1, "is another one"), (2, "are others")])
def test_the_journals_that_are_not_the_holders_are_named(shell: Shell, left: Left, others: int, told: str) -> None:
    places = [left.journal, Path(f"{left.journal}.2")][:others]
    for place in places[1:]:
        shutil.copytree(left.journal, place)
    left.sql("UPDATE partitions SET journal_id = 'another', holder = 'pid 1 on moon'")
    names = " and ".join(map(str, places))
    (finding,) = found(shell)
    assert finding.startswith(f"pid 1 on moon has, or had when it died, the journal another, and {names} {told}: what ")


# --- whatever a runtime does is right ---------------------------------------------------------------------------------


async def findings_of(runtime: Runtime, path: Path) -> list[str]:
    told: list[Finding] = []
    await check(runtime._storage, lambda: pictures([path]), found=told.append)
    return [str(finding) for finding in told if " is held: " not in str(finding)]


@pytest.mark.anyio
async def test_after_every_write_all_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.check._SESSIONS", 2)
    monkeypatch.setattr("agent_runtime.check._MESSAGES", 1)
    place = in_file(tmp_path)
    journal = tmp_path / "sessions.db.journal"
    async with place.open(journal={"segment_bytes": 4096}) as runtime:
        session = await begin(runtime)
        for number, write in enumerate(WRITES):
            await write.call(runtime, session, idempotency_key=str(number))
            assert await findings_of(runtime, journal) == []
            if number % 3 == 0:
                await runtime.flush()
                assert await findings_of(runtime, journal) == []
        await runtime.create_session("s1", system_prompt="once more")
        assert await findings_of(runtime, journal) == []
    async with place.open() as runtime:
        assert await findings_of(runtime, journal) == []


STEPS = (
    "append",
    "poison",
    "pop",
    "clear",
    "switch",
    "document",
    "begin",
    "delete",
    "flush",
    "replay",
    "drop",
    "reopen",
)


@pytest.mark.anyio
@given(steps=st.lists(st.sampled_from(STEPS), min_size=5, max_size=25), mended=st.booleans())
@settings(max_examples=6, deadline=None, suppress_health_check=HEALTH)
async def test_whatever_is_held_replayed_or_dropped_is_right(
    tmp_path: Path, anyio_backend_name: str, steps: list[str], mended: bool
) -> None:
    directory = tmp_path / str(next(NUMBERS))
    directory.mkdir()
    path = in_file(directory).path
    journal = path.with_name("sessions.db.journal")
    faults = Faults()
    place = Place(f"faulty:sqlite:///{path}", faulty_plugin(open_sqlite, faults))
    script = deque(steps)
    while script:
        fault = faults.reject(lambda batch: any(row.content == "poison" for row in batch.messages))
        async with place.open(journal={"segment_bytes": 4096}, write_behind={"batch_changes": 2}) as runtime:
            while script and (step := script.popleft()) != "reopen":
                with suppress(SessionHeld, SessionNotFound, Quarantined):
                    await take(runtime, step)
                if step == "flush" and mended:
                    fault.stop()
                assert await findings_of(runtime, journal) == []
                with suppress(Quarantined):
                    await runtime.flush() if step in ("flush", "poison") else None
                assert await findings_of(runtime, journal) == []


async def take(runtime: Runtime, step: str) -> None:
    session = await runtime.get_or_create_session("s")
    match step:
        case "append" | "poison":
            await session.append("user", step)
        case "pop":
            await session.pop()
        case "clear":
            await session.clear()
        case "switch":
            agents = len(await session.switches())
            await session.switch_agent(f"agent {agents}")
        case "document":
            await session.put_document("c", "k", 1, idempotency_key="again")
        case "begin":
            await runtime.create_session(durability="stored")
        case "delete":
            await session.delete()
        case "flush":
            await runtime.flush()
        case "replay":
            await runtime.quarantine.replay("s")
        case "drop":
            await runtime.quarantine.drop("s")
