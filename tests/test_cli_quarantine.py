"""`quarantine`: what the database refused is listed and shown, tried again, given up; a session that waits for it."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent_runtime import Quarantined, open_runtime_blocking
from agent_runtime.changes import Birth, Change, Details
from agent_runtime.rows import ContextRow, DocumentRow, OutcomeRow, SwitchRow
from crash import Left
from shell import Shell

AT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ"
REFUSED = "the database refuses a row of messages: UNIQUE constraint failed: messages.incarnation, messages.seq"
WAITS = "waits behind an earlier change of its session"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def take_seq(shell: Shell, session_id: str, seq: int) -> None:
    """Put a row into the place of a message that is to come, so that the database refuses that."""
    Left(shell.directory).sql(
        "INSERT INTO messages (incarnation, seq, id, role, created_at) "
        f"SELECT incarnation, {seq}, 'in the way', 'user', created_at FROM sessions WHERE session_id = '{session_id}'"
    )


def free_seq(shell: Shell) -> None:
    Left(shell.directory).sql("DELETE FROM messages WHERE id = 'in the way'")


def hold(shell: Shell, session_id: str = "s") -> None:
    """A session of which the third change is refused; the fourth, and what it does, waits behind it."""
    with open_runtime_blocking(f"sqlite:///{shell.database}") as runtime:
        session = runtime.create_session(session_id)
        session.append("user", "first")
        runtime.flush()
        take_seq(shell, session_id, 2)
        session.append_many([{"role": "user", "content": "a secret"}, {"role": "user", "content": "another"}])
        session.switch_agent("coder", reason="hush", idempotency_key="k")
        with pytest.raises(Quarantined):
            runtime.flush()


def fields(output: str) -> list[tuple[str, str]]:
    return [(line[:14].rstrip(), line[14:]) for line in output.splitlines()]


def contents(shell: Shell, session_id: str = "s") -> list[str]:
    shown = json.loads(shell.here("sessions", "show", session_id, "--json")[0])
    return [message["content"] for message in shown["messages"]]


# --- list and show ----------------------------------------------------------------------------------------------------


def test_nothing_is_listed_as_nothing(shell: Shell) -> None:
    assert shell.here("quarantine", "list") == ("", [])
    assert shell.here("quarantine", "list", "--json") == ("", [])
    assert shell.on_terminal("quarantine", "list") == (0, "")


def test_changes_are_listed_in_order(shell: Shell) -> None:
    hold(shell)
    output, errors = shell.here("quarantine", "list")
    lines = [line.split("\t") for line in output.splitlines()]
    assert errors == []
    assert [line[:3] for line in lines] == [["3", "s", "rejected"], ["4", "s", "queued"]]
    assert [line[5] for line in lines] == [f"{REFUSED} (SQLITE_CONSTRAINT_PRIMARYKEY)", WAITS]
    assert all(re.fullmatch(AT, line[4]) for line in lines)
    records = [json.loads(line) for line in shell.here("quarantine", "list", "--json")[0].splitlines()]
    assert [str(record["bytes"]) for record in records] == [line[3] for line in lines]
    assert [record["sequence"] for record in records] == [3, 4]
    code, seen = shell.on_terminal("quarantine", "list", columns=120)
    assert code == 0
    assert re.sub(r"\x1b\[[0-9;]*m", "", seen).splitlines()[0].split() == [
        "change",
        "session",
        "state",
        "bytes",
        "since",
        "error",
    ]
    assert "secret" not in output + seen


def test_what_a_change_would_do_is_shown_without_what_it_says(shell: Shell) -> None:
    hold(shell)
    output, _ = shell.here("quarantine", "show", "3")
    shown = dict(fields(output))
    assert re.fullmatch(r"3, \d+ bytes", shown["change"])
    assert shown["session"] == "s"
    assert re.fullmatch(f"rejected, since {AT}", shown["state"])
    assert shown["error"].startswith(REFUSED)
    assert re.fullmatch(r"appends a message × 2, seq 2 to 3, \d+ bytes", shown["effect"])
    of_session, _ = shell.here("quarantine", "show", "s")
    assert of_session.startswith(output)
    effects = [text for label, text in fields(of_session.removeprefix(output)) if label == "effect"]
    assert [effect.partition(",")[0] for effect in effects] == [
        "sets the agent context",
        "records a switch of agents",
        "records the outcome of a call with an idempotency key",
    ]
    for word in ("secret", "another", "coder", "hush"):
        assert word not in of_session
    assert shell.fails("quarantine", "show", "7") == "nothing in quarantine has the sequence, or is of the session, '7'"


def test_all_that_a_change_holds_is_shown_when_it_is_asked_for(shell: Shell) -> None:
    hold(shell)
    output, _ = shell.here("quarantine", "show", "3", "--content")
    ((_, content),) = [field for field in fields(output) if field[0] == "content"]
    change = json.loads(content)
    assert [message["content"] for message in change["messages"]] == ["a secret", "another"]
    first, second = (
        json.loads(line) for line in shell.here("quarantine", "show", "s", "--json", "--content")[0].splitlines()
    )
    assert first["change"] == change
    assert first["effects"][0]["seqs"] == [2, 3]
    assert second["change"]["switches"][0]["reason"] == "hush"
    assert "change" not in json.loads(shell.here("quarantine", "show", "3", "--json")[0])


NOW = datetime(2026, 3, 1, tzinfo=UTC)
CONTEXT = ContextRow(
    incarnation="i",
    current_agent="a",
    switch_count=0,
    last_switch_at=None,
    metadata="{}",
    created_at=NOW,
    updated_at=NOW,
)
DOCUMENT = DocumentRow(
    incarnation="i", collection="c", key="k", value="[1]", data=None, media_type=None, updated_at=NOW
)
OUTCOME = OutcomeRow(scope="i", key="k", route="r", body_hash="h", outcome="{}", sequence=7, expires_at=NOW)
SWITCH = SwitchRow(incarnation="i", number=1, from_agent="a", to_agent="b", reason=None, switched_at=NOW, metadata=None)
EFFECTS: dict[str, dict[str, Any]] = {
    "creates the session": {"birth": Birth(created_at=NOW)},
    "sets title, description and metadata, 48 bytes": {"details": Details("t", None, "{}")},
    "sets the agent context, 166 bytes": {"context": CONTEXT},
    "records a switch of agents × 2": {"switches": (SWITCH, SWITCH)},
    "clears all messages up to a seq, seq 3": {"floor": 3},
    "removes a message, seq 2": {"removed": (2,)},
    "appends a message × 2, seq 3 to 4, 18 bytes": {"messages": (msgspec.Raw(b'{"seq":3}'), msgspec.Raw(b'{"seq":4}'))},
    "writes a document × 2, 6 bytes": {"documents": (DOCUMENT, DOCUMENT)},
    "deletes a document": {"discarded": (("c", "k"),)},
    "deletes the session": {"deleted": True},
    "records the outcome of a call with an idempotency key": {"outcome": OUTCOME},
}


@pytest.mark.parametrize("effect", EFFECTS)
def test_each_effect_has_its_words(shell: Shell, effect: str) -> None:
    common: dict[str, Any] = {"session_id": "s", "incarnation": "i", "last_activity": NOW}
    change = Change(sequence=7, previous=6, message_count=1, next_seq=5, **common, **EFFECTS[effect])
    Left(shell.directory).quarantine(change)
    (told,) = [text for label, text in fields(shell.here("quarantine", "show", "7")[0]) if label == "effect"]
    assert told == effect


def test_a_change_of_another_version_is_named(shell: Shell) -> None:
    hold(shell)
    Left(shell.directory).sql("UPDATE quarantine SET change = '{}' WHERE sequence = 3")
    told = "change 3 can't be read: another version of agent-runtime wrote it"
    assert shell.fails("quarantine", "show", "3") == told
    assert len(shell.here("quarantine", "list")[0].splitlines()) == 2


def test_the_number_of_a_change_goes_before_the_name_of_a_session(shell: Shell) -> None:
    hold(shell, session_id="4")
    assert dict(fields(shell.here("quarantine", "show", "4")[0]))["state"].startswith("queued")
    assert len(shell.here("quarantine", "show", "4", "--json")[0].splitlines()) == 1


# --- replay and drop --------------------------------------------------------------------------------------------------


def test_what_was_refused_is_stored_once_it_can_be(shell: Shell) -> None:
    hold(shell)
    output, errors = shell.here("quarantine", "replay", "s", code=1)
    again = "refused again, as change 5: agent-runtime quarantine show 5 tells why; 's' stays held"
    assert (output, errors[-1]) == ("", f"agent-runtime: {again}")
    assert [line.split("\t")[0] for line in shell.here("quarantine", "list")[0].splitlines()] == ["5", "6"]
    free_seq(shell)
    assert shell.here("quarantine", "replay", "s") == ("stored 2 change(s) of s\n", [])
    assert shell.here("quarantine", "list") == ("", [])
    assert contents(shell) == ["first", "a secret", "another"]
    assert shell.here("check")[0].startswith("ok: ")
    assert shell.fails("quarantine", "replay", "s") == "nothing of the session 's' is in quarantine"


def test_a_refused_change_is_given_up_and_the_rest_is_stored(shell: Shell) -> None:
    hold(shell)
    asked = shell.fails("quarantine", "drop", "s", code=2)
    assert asked == "there is no terminal to ask on: say --yes to drop without a question"
    assert shell.here("quarantine", "drop", "s", "--yes") == ("dropped 1 change(s) of s, stored 1\n", [])
    free_seq(shell)
    assert contents(shell) == ["first"]
    assert "switch 1" in shell.here("sessions", "show", "s")[0]
    assert shell.here("check")[0].startswith("ok: ")
    assert shell.fails("quarantine", "drop", "s", "--yes") == "nothing of the session 's' is in quarantine"


def test_on_a_terminal_a_drop_is_asked_about(shell: Shell) -> None:
    hold(shell)
    code, seen = shell.on_terminal("quarantine", "drop", "s", typed="n\n")
    assert code == 1
    assert "Give up change 3 of session 's', and store the 1 behind it? [y/N]: " in seen
    assert seen.endswith("agent-runtime: nothing is dropped\n")
    code, seen = shell.on_terminal("quarantine", "drop", "s", typed="y\n")
    assert code == 0
    assert seen.endswith("dropped 1 change(s) of s, stored 1\n")
    code, seen = shell.on_terminal("quarantine", "drop", "s")
    assert (code, seen) == (1, "agent-runtime: nothing of the session 's' is in quarantine\n")


def test_with_its_creation_a_session_is_given_up_as_a_whole(shell: Shell) -> None:
    Left(shell.directory).sql("CREATE TRIGGER no BEFORE INSERT ON contexts BEGIN SELECT RAISE(ABORT, 'no'); END")
    with open_runtime_blocking(f"sqlite:///{shell.database}") as runtime:
        session = runtime.create_session("s")
        session.append("user", "a secret")
        session.append("user", "another")
        with pytest.raises(Quarantined):
            runtime.flush()
    _, seen = shell.on_terminal("quarantine", "drop", "s", typed="n\n")
    assert "Give up the creation of session 's', and the 2 change(s) behind it? [y/N]: " in seen
    assert shell.here("quarantine", "drop", "s", "--yes") == ("dropped 3 change(s) of s, stored 0\n", [])
    assert shell.fails("sessions", "show", "s") == "there is no session 's'"


def test_while_a_process_has_the_sessions_they_are_listed_and_not_changed(shell: Shell) -> None:
    hold(shell)
    with open_runtime_blocking(f"sqlite:///{shell.database}"):
        output, errors = shell.run("quarantine", "list")
        assert ([line.split("\t")[0] for line in output.splitlines()], errors) == (["3", "4"], [])
        assert shell.here("quarantine", "show", "s")[1] == []
        for arguments in (["replay", "s"], ["drop", "s", "--yes"]):
            told = shell.fails("quarantine", *arguments, code=3)
            assert told.startswith(f"the database is in use by pid {os.getpid()} on ")
            assert told.endswith(f": stop that first, a {arguments[0]} needs the database for itself")
    assert shell.here("quarantine", "drop", "s", "--yes")[0] == "dropped 1 change(s) of s, stored 1\n"
