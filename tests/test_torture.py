"""`agent-runtime torture`: servers that are killed lose nothing, and the comparison finds what was lost, if it was."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_runtime import load_config, open_runtime_blocking
from agent_runtime.testing.failpoints import FAILPOINTS, Failpoint
from agent_runtime_http.torture.books import Books, Figures
from agent_runtime_http.torture.calls import (
    Append,
    Batch,
    Call,
    Create,
    PatchContext,
    PatchSession,
    Pop,
    PutDocument,
    Switch,
    ToolResult,
)
from agent_runtime_http.torture.compare import KINDS
from agent_runtime_http.torture.plan import POINTS, plans
from agent_runtime_http.torture.run import Options, torture
from agent_runtime_http.torture.state import State, tag_of
from agent_runtime_http.torture.tracked import Tracked, next_call
from http_rig import environment
from postgres_server import migrated_schema, server, url_of

WORKING_SEED = next(
    seed for seed in range(1000) if (plan := next(plans(seed, failpoints=False))).kind == "load" and plan.delay_s > 0.6
)
"""With this one the first server has some time to work before it is killed."""
UNHARMED = dict.fromkeys(("failures", "lost", "doubled", "out_of_order", "torn", "invented"), 0)


def tortured(
    *arguments: str, environ: Mapping[str, str] = {}, timeout_s: float = 280
) -> tuple[int, dict[str, Any], str]:
    """Run the command: its exit code, the figures, and what it said."""
    command = [sys.executable, "-m", "agent_runtime.cli", "torture", "--json", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env=environment(environ), check=False
    )
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


# --- servers that are killed ------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_twenty_killed_servers_lose_nothing(tmp_path: Path) -> None:
    environ = {"AGENT_RUNTIME__HTTP__TOKENS": "[t]"}  # which its own servers do not ask for
    code, figures, said = tortured("--cycles", "20", "--failpoints", "--keep", str(tmp_path), environ=environ)
    assert figures | UNHARMED == figures, said
    assert code == 0
    assert figures["cycles"] == 20
    assert sum(figures["kills"].values()) >= 15  # one that is told to stop may have stopped before it is killed
    assert figures["acknowledged"] > 200
    assert figures["recoveries"] >= 5
    assert figures["changes_recovered"] >= 20


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_three_hundred_killed_servers_lose_nothing_wherever_they_die(tmp_path: Path) -> None:
    arguments = ["--cycles", "300", "--failpoints", "--keep", str(tmp_path)]
    code, figures, said = tortured(*arguments, timeout_s=2900)
    assert figures | UNHARMED == figures, said
    assert code == 0
    assert set(POINTS) | {"start", "recovery", "reading", "load", "stop"} == set(figures["kills"])


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("cycles", [3, pytest.param(100, marks=pytest.mark.long)])
def test_killed_servers_lose_nothing_on_postgresql(tmp_path: Path, cycles: int) -> None:
    schema = migrated_schema()
    arguments = ["--cycles", f"{cycles}", "--seed", "5", "--failpoints", "--keep", str(tmp_path)]
    code, figures, said = tortured(*arguments, "--storage", url_of(schema), timeout_s=1400)
    assert figures | UNHARMED == figures, said
    assert (code, figures["cycles"]) == (0, cycles)
    assert sum(figures["kills"].values()) >= cycles * 3 // 4  # one that is told to stop may have stopped before
    assert figures["acknowledged"] > 10 * cycles
    assert server().rows("SELECT count(*) FROM sessions", schema=schema) == [(0,)]
    assert (tmp_path / "journal").is_dir()


@pytest.mark.long
def test_a_database_of_its_own_is_left_empty_and_one_that_has_sessions_alone(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'own.db'}"
    code, figures, said = tortured("--cycles", "1", "--seed", "7", "--storage", storage, "--connections", "2")
    assert (code, figures["seed"]) == (0, 7), said
    with open_runtime_blocking(storage) as runtime:
        assert runtime.list_sessions().items == []
        runtime.create_session("mine").append("user", "hi")
    code, figures, said = tortured("--cycles", "1", "--storage", storage)
    assert (code, figures) == (1, {})
    assert said == f"agent-runtime: {storage} has 1 session(s) already: name a database that nobody else uses\n"
    with open_runtime_blocking(storage) as runtime:
        assert [record.session_id for record in runtime.list_sessions().items] == ["mine"]


def test_a_server_that_does_not_start_is_named_with_its_reason(tmp_path: Path) -> None:
    code, figures, said = tortured("--cycles", "1", "--keep", str(tmp_path), "--storage", "nowhere:x")
    assert (code, figures) == (1, {})
    problem = "storage.url: no plugin stores under 'nowhere'; there are: "
    assert said.startswith(f"agent-runtime: the server does not start: {problem}")
    assert "Traceback" not in (tmp_path / "server.log").read_text()


# --- faults that are found --------------------------------------------------------------------------------------------


def test_without_a_journal_losses_are_found_and_everything_is_kept(tmp_path: Path) -> None:
    off = {"AGENT_RUNTIME__JOURNAL__ENABLED": "false", "AGENT_RUNTIME__WRITE_BEHIND__INTERVAL_S": "60"}
    arguments = ["--cycles", "1", "--seed", str(WORKING_SEED), "--durability", "buffered", "--keep", str(tmp_path)]
    code, figures, said = tortured(*arguments, environ=off)
    assert code == 1
    assert figures["lost"] > 0
    assert not figures["well"]
    assert re.search(r"^agent-runtime: cycle \d: lost: torture-", said, re.MULTILINE)
    assert said.endswith(f"seed {figures['seed']}; what there was is kept in {tmp_path}\n")
    assert (tmp_path / "torture.db").exists()


TAMPERED = {
    "doubled": "UPDATE messages SET content = (SELECT content FROM messages AS first WHERE seq = 1 "
    "AND first.incarnation = messages.incarnation) WHERE seq = 2",
    "lost": "DELETE FROM messages WHERE seq = 3",
    "invented": "UPDATE messages SET content = '#999999.0/1 by nobody' WHERE seq = 4",
}


@pytest.mark.long
def test_what_somebody_does_to_the_database_between_two_servers_is_found(tmp_path: Path) -> None:
    def tamper(_: Figures) -> None:
        database = sqlite3.connect(tmp_path / "torture.db")
        with database:
            assert all(database.execute(statement).rowcount > 0 for statement in TAMPERED.values())
        database.close()

    storage = f"sqlite:///{tmp_path / 'torture.db'}"
    options = Options(
        cycles=1,
        seed=WORKING_SEED,
        connections=2,
        durability="stored",
        failpoints=False,
        arguments=["--storage", storage],
        config=load_config(environ={}, overrides={"storage.url": storage}),
        log=tmp_path / "server.log",
        clean=False,
        told=tamper,
    )
    figures = anyio.run(torture, options)
    for kind in TAMPERED:
        assert getattr(figures, kind) > 0
        assert any(f": {kind}: " in line for line in figures.findings)


class Kept:
    """A server that makes no mistakes: what it answers, and what it shows."""

    def __init__(self) -> None:
        self.state = State()

    def do(self, call: Call) -> tuple[int, Any]:
        """Carry out a call: its status and what is answered."""
        status = call.expected(self.state)
        before = self.state.messages.copy()
        call.apply(self.state, None)
        self.state.messages = [{"id": f"m{m['seq']}", "created_at": "now", **m} for m in self.state.messages]
        new = self.state.messages[len(before) :]
        match call:
            case Create():
                self.state.born = {"incarnation": f"i{call.number}", "created_at": "now"}
                return status, {**self.state.born, "message_count": 1, "title": call.tag}
            case Append() | ToolResult():
                return status, new[0]
            case Batch():
                return status, {"items": new}
            case _:
                return status, {"switch_count": len(self.state.switches), **(before[-1] if before else {})}

    def shown(self) -> State:
        """What a reader finds: no more than that."""
        found = self.state.copy()
        found.removed, found.former = set(), set()
        return found


def told(tracked: Tracked, server: Kept, random: Any, calls: int) -> None:
    """Make calls that are acknowledged."""
    for _ in range(calls):
        call = next_call(tracked, random)
        status, answer = server.do(call)
        if status < 300:
            assert tracked.acknowledge(call, answer) == []


@settings(deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 60), st.sampled_from(["none", "done", "lost"]))
def test_a_server_that_keeps_all_is_never_accused(random: Any, calls: int, open_call: str) -> None:
    tracked, server = Tracked("s1"), Kept()
    for _ in range(3):  # each followed by a crash
        told(tracked, server, random, calls)
        if open_call != "none":
            call = next_call(tracked, random)
            if open_call == "done":
                server.do(call)
            tracked.leave_open(call)
        assert tracked.compare(server.shown()) == []


Tampering = Callable[[State], None]


def swap(found: State) -> None:
    one, other = found.messages[-1], found.messages[-2]
    found.messages[-2:] = [{**other, "content": one["content"]}, {**one, "content": other["content"]}]


def renumber(found: State) -> None:
    found.messages[-1] = {**found.messages[-1], "seq": found.messages[-1]["seq"] + 1}


STEPS = (Append, Switch, PutDocument, PatchSession, PatchContext, Append, Batch)
FAULTS: dict[str, list[Tampering]] = {
    "lost": [
        lambda found: found.messages.clear(),
        lambda found: found.end(),
        lambda found: setattr(found, "metadata", {"n": 0}),
        lambda found: found.documents.clear(),
        lambda found: found.switches.clear(),
        lambda found: setattr(found, "born", {"incarnation": "another", "created_at": "now"}),
    ],
    "doubled": [lambda found: found.messages.append({**found.messages[-1], "seq": 1000})],
    "out of order": [swap, renumber],
    "torn": [lambda found: found.messages.__delitem__(-1)],
    "invented": [
        lambda found: found.messages.append({"role": "user", "content": "#5000.0/1 x", "seq": 1000}),
        lambda found: setattr(found, "title", "#5000"),
        lambda found: found.messages.__setitem__(-1, {**found.messages[-1], "role": "system"}),
        lambda found: found.messages.__setitem__(-1, {**found.messages[-1], "id": "another"}),
    ],
}


@pytest.mark.parametrize(("kind", "number"), [(kind, n) for kind, each in FAULTS.items() for n in range(len(each))])
@settings(deadline=None, max_examples=20)
@given(random=st.randoms(use_true_random=False), calls=st.integers(0, 30))
def test_every_fault_is_called_by_its_name(kind: str, number: int, random: Any, calls: int) -> None:
    assert list(FAULTS) == list(KINDS)
    tracked, server = Tracked("s1"), Kept()
    told(tracked, server, random, calls)
    for call_type in (*([] if tracked.state.alive else [Create]), *STEPS):
        call = call_type(tracked.number(), "text")
        assert tracked.acknowledge(call, server.do(call)[1]) == []
    found = server.shown()
    FAULTS[kind][number](found)
    assert kind in {difference.kind for difference in tracked.compare(found)}
    assert tracked.compare(found) == []  # told once


def test_a_part_of_an_unanswered_batch_is_torn_and_what_was_removed_is_not_to_come_back() -> None:
    tracked, server = Tracked("s1"), Kept()
    for call in (Create(tracked.number()), Append(tracked.number())):
        tracked.acknowledge(call, server.do(call)[1])
    before = server.shown()
    batch = Batch(tracked.number(), size=3)
    server.do(batch)
    tracked.leave_open(batch)
    found = server.shown()
    found.messages.pop()
    assert [each.kind for each in tracked.compare(found)] == ["torn"]

    tracked, server = Tracked("s1"), Kept()
    for removing in (Create(tracked.number()), Append(tracked.number()), Pop(tracked.number())):
        tracked.acknowledge(removing, server.do(removing)[1])
    assert [each.kind for each in tracked.compare(before)] == ["lost"]


def test_in_a_common_session_any_of_the_open_calls_may_have_happened() -> None:
    tracked, server = Tracked("s1", shared=True), Kept()
    create = Create(tracked.number())
    tracked.acknowledge(create, server.do(create)[1])
    calls = [Batch(tracked.number(), size=2), Append(tracked.number()), Append(tracked.number())]
    answers = {call.number: server.do(call)[1] for call in calls[:2]}
    tracked.acknowledge(calls[1], answers[3])
    tracked.leave_open(calls[0])
    tracked.leave_open(calls[2])
    assert tracked.compare(server.shown()) == []
    assert [tag_of(message) for message in tracked.state.messages] == ["#1.0/1", "#2.0/2", "#2.1/2", "#3.0/1"]
    gap = server.shown()
    del gap.messages[2]
    assert {each.kind for each in tracked.compare(gap)} == {"torn", "lost"}


def test_the_list_is_compared_as_well() -> None:
    books = Books(seed=1)
    alive, gone, twice = books.new("a"), books.new("b"), books.new("c")
    alive.state.alive = twice.state.alive = True
    books.compare_list([twice.session_id, gone.session_id, twice.session_id, "stranger"])
    figures = books.figures
    assert (figures.lost, figures.doubled, figures.invented) == (2, 1, 1)
    assert not figures.well


# --- failpoints -------------------------------------------------------------------------------------------------------


def test_the_plan_is_made_by_the_seed_and_comes_to_every_point() -> None:
    first, again, other = (list(islice(plans(seed, failpoints=True), 60)) for seed in (1, 1, 2))
    assert first == again != other
    assert {plan.failpoint.rpartition(":")[0] for plan in first if plan.failpoint} == set(POINTS) <= set(FAILPOINTS)
    assert not any(plan.failpoint for plan in islice(plans(1, failpoints=False), 60))


def test_a_failpoint_strikes_once_the_nth_time_and_nowhere_else() -> None:
    failpoint = Failpoint("journal.write:before", 2)
    passed = [failpoint.strikes(point) for point in ("journal.write:after", *["journal.write:before"] * 4)]
    assert passed == [False, False, True, False, False]


@pytest.mark.parametrize(
    "text", ["journal.write", "journal.wrote:before", "journal.write:before:x", "journal.write:before:0"]
)
def test_what_names_no_failpoint_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a failpoint|number of a time|counted from 1"):
        Failpoint.parse(text)


@pytest.mark.parametrize("point", ["journal.write:torn:2", "storage.apply:after", "storage.open:before"])
def test_a_process_dies_at_its_failpoint(tmp_path: Path, point: str) -> None:
    messages = tmp_path / "chat.jsonl"
    messages.write_text('{"session_id": "s1", "messages": [{"role": "user", "content": "hi"}]}\n', encoding="utf-8")
    storage = f"sqlite:///{tmp_path / 'sessions.db'}"
    arguments = ["agent_runtime.cli", "import", str(messages), "--storage", storage]
    done = subprocess.run(
        [sys.executable, "-m", "agent_runtime.testing.failpoints", point, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment({}),
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stderr.splitlines()[-1] == f"killed at {':'.join(point.split(':')[:2])}"
