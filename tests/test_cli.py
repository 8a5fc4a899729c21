"""The command line on sessions: what goes in, what is shown, what comes out."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from agent_runtime import ConfigError, LeaseHeld, LeaseLost, StorageUnavailable
from agent_runtime.cli.exits import failure_of
from shell import Shell, chat

SAMPLE = gzip.decompress((Path(__file__).parent / "data" / "airline-sample.jsonl.gz").read_bytes())
AT = "2026-03-01T12:00:00Z"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


# --- import and export ------------------------------------------------------------------------------------------------


def test_conversations_go_in_once_and_come_out_as_they_were(shell: Shell) -> None:
    (shell.directory / "sample.jsonl").write_bytes(SAMPLE)
    output, errors = shell.run("import", "sample.jsonl")
    assert (output, errors) == ("sample.jsonl: 30 created, 0 resumed, 0 unchanged, 0 refused\n", [])
    output, _ = shell.here("import", "--format", "chat", "sample.jsonl")
    assert output == "sample.jsonl: 0 created, 0 resumed, 30 unchanged, 0 refused\n"
    plain, _ = shell.here("export", "-", "--plain")
    assert list(map(json.loads, plain.splitlines())) == list(map(json.loads, SAMPLE.splitlines()))
    output, errors = shell.here("export", "all.jsonl")
    assert (output, errors) == ("all.jsonl: 30 exported\n", [])
    file = (shell.directory / "all.jsonl").read_bytes()
    # Into a database that is not there yet, where it is by default.
    elsewhere = {"AGENT_RUNTIME__STORAGE__URL": ""}
    output, _ = shell.run("import", "-", given=file, environment=elsewhere)
    assert output == "standard input: 30 created, 0 resumed, 0 unchanged, 0 refused\n"
    assert (shell.directory / "data" / "agent_runtime.db").exists()
    output, errors = shell.run("export", "-", environment=elsewhere)
    assert (output.encode(), errors) == (file, [])


def test_what_is_refused_is_named_and_the_rest_goes_in(shell: Shell) -> None:
    file = shell.file("f.jsonl", chat("a", "1"), chat("b", "bad\0"), chat("c", "1"))
    output, errors = shell.here("import", file, code=1)
    assert output == "f.jsonl: 2 created, 0 resumed, 0 unchanged, 1 refused\n"
    assert errors == [
        "agent-runtime: f.jsonl:2: messages[0].content: must not contain NUL characters (one is at position 3)"
    ]
    assert shell.here("export", "--plain", "-", "--session", "c", "--session", "a")[0].splitlines() == [
        '{"session_id":"c","messages":[{"role":"user","content":"1"}]}',
        '{"session_id":"a","messages":[{"role":"user","content":"1"}]}',
    ]
    assert shell.fails("export", "out.jsonl", "--session", "b") == "there is no session 'b'"
    assert not (shell.directory / "out.jsonl").exists()


def test_long_work_tells_how_far_it_is(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.cli.terminal._LINE_INTERVAL_S", 0.0)
    file = shell.file("f.jsonl", chat("a", "1"), chat("b", "1"), chat("c", "1"), chat("d", "1"))
    _, errors = shell.here("import", file)
    assert errors == [f"importing f.jsonl: {share} %, {n} session(s)" for n, share in enumerate((25, 50, 75, 100), 1)]
    _, errors = shell.here("export", "out.jsonl")
    assert errors[-1] == "exporting to out.jsonl: 4 session(s), 0.0 MB"


def test_files_that_can_not_be_read_or_written_are_named(shell: Shell) -> None:
    shell.here("import", shell.file("f.jsonl", chat("a", "1")))
    assert shell.fails("import", "missing.jsonl") == "missing.jsonl: No such file or directory"
    assert shell.fails("export", "missing/f") == f"{shell.directory}/missing/f: No such file or directory"
    assert shell.fails("export", "/dev/full") == "/dev/full: No space left on device"
    assert sorted(path.name for path in shell.directory.iterdir() if path.suffix == ".draft") == []


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_sessions_are_listed_the_newest_first(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.cli.sessions.PAGE_ITEMS_MAX", 2)
    lines = [
        chat(
            f"s{day}", "x\ty\nz", created_at=f"2026-03-0{day}T00:00:00Z", last_activity=AT, user_id=["u", "v"][day % 2]
        )
        for day in range(1, 6)
    ]
    shell.here("import", shell.file("f.jsonl", *lines))
    output, errors = shell.here("sessions", "list")
    assert output.splitlines() == [f"s{day}\t{'uv'[day % 2]}\tx\\ty\\nz\t1\t{AT}" for day in (5, 4, 3, 2, 1)]
    assert errors == []
    assert ids(shell.here("sessions", "list", "--limit", "3")) == ["s5", "s4", "s3"]
    assert ids(shell.here("sessions", "list", "--user", "v", "--limit", "2")) == ["s5", "s3"]
    records = [json.loads(line) for line in shell.here("sessions", "list", "--json")[0].splitlines()]
    assert [record["session_id"] for record in records] == ["s5", "s4", "s3", "s2", "s1"]
    assert records[0]["title"] == "x\ty\nz"
    assert records[0]["message_count"] == 1


def ids(ran: tuple[str, list[str]]) -> list[str]:
    return [line.split("\t")[0] for line in ran[0].splitlines()]


STORY = {
    "session_id": "story",
    "user_id": "ada",
    "title": "A [bold]title[/bold]",
    "metadata": {"b": 1, "a": [None]},
    "created_at": "2026-03-01T11:00:00Z",
    "last_activity": AT,
    "context": {"current_agent": "coder", "switch_count": 1, "last_switch_at": AT, "metadata": {"k": "v"}},
    "switches": [{"from_agent": "first", "to_agent": "coder", "reason": "it is\ncode", "switched_at": AT}],
    "messages": [
        {"role": "system", "content": "Be brief.\n\n  Always."},
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image", "url": "x" * 500}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"a":\t1}'}},
                {"id": "c2", "type": "other"},
            ],
            "refusal": None,
            "annotations": ["seen"],
        },
        {"role": "tool", "name": "find", "tool_call_id": "c1", "content": "ésc \x1b[31mred\x9b \u202etxt"},
    ],
    "message_details": [{"seq": seq, "id": f"m{seq}", "created_at": AT} for seq in (1, 2, 5, 6)],
    "next_seq": 9,
}
SHOWN = """\
session       story
user          ada
title         A [bold]title[/bold]
metadata      {"b":1,"a":[null]}
created       2026-03-01 11:00:00Z
last activity 2026-03-01 12:00:00Z
messages      4
agent         coder, since 2026-03-01 12:00:00Z
agent data    {"k":"v"}
switch 1      2026-03-01 12:00:00Z  first → coder: it is\\ncode

#1 system  2026-03-01 12:00:00Z
  Be brief.

    Always.

#2 user  2026-03-01 12:00:00Z
  Look:
  {"type":"image","url":"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx… (525 characters)

#5 assistant  2026-03-01 12:00:00Z
  → find({"a":\\t1}) [c1]
  → {"id":"c2","type":"other"}
  annotations: ["seen"]

#6 tool find [c1]  2026-03-01 12:00:00Z
  ésc \\x1b[31mred\\x9b \\u202etxt
"""


def test_a_session_is_shown_as_people_read_it(shell: Shell) -> None:
    shell.here("import", shell.file("f.jsonl", STORY))
    output, errors = shell.here("sessions", "show", "story")
    assert re.sub("xxx+…", "x" * 42 + "…", output) == SHOWN
    assert errors == []
    head, _, messages = SHOWN.partition("\n\n")
    assert shell.here("sessions", "show", "story", "--limit", "1")[0] == f"{head}\n\n#6{messages.partition('#6')[2]}"
    assert shell.fails("sessions", "show", "nobody") == "there is no session 'nobody'"


def test_a_session_is_shown_as_programs_read_it(shell: Shell) -> None:
    shell.here("import", shell.file("f.jsonl", STORY))
    output, _ = shell.here("sessions", "show", "story", "--json")
    assert "\x9b" not in output
    assert "\u202e" not in output
    shown = json.loads(output)
    assert list(shown) == ["session", "context", "switches", "messages"]
    assert shown["session"]["title"] == STORY["title"]
    assert shown["context"]["current_agent"] == "coder"
    assert [message["seq"] for message in shown["messages"]] == [1, 2, 5, 6]
    assert shown["messages"][3]["content"] == "ésc \x1b[31mred\x9b \u202etxt"
    limited = json.loads(shell.here("sessions", "show", "story", "--json", "--limit", "2")[0])
    assert limited["messages"] == shown["messages"][2:]


def test_sessions_are_deleted_without_a_terminal_only_on_their_word(shell: Shell) -> None:
    shell.here("import", shell.file("f.jsonl", chat("a"), chat("b"), chat("c")))
    asked = shell.fails("sessions", "delete", "a", code=2)
    assert asked == "there is no terminal to ask on: say --yes to delete without a question"
    output, errors = shell.here("sessions", "delete", "a", "nobody", "a", "b", "--yes", code=1)
    assert output == "deleted a\ndeleted b\n"
    assert errors == ["agent-runtime: there is no session 'nobody'"]
    assert ids(shell.here("sessions", "list")) == ["c"]


def test_on_a_terminal_a_deletion_is_asked_about(shell: Shell) -> None:
    shell.here("import", shell.file("f.jsonl", chat("a"), chat("b")))
    code, shown = shell.on_terminal("sessions", "delete", "a", typed="n\n")
    assert code == 1
    assert "Delete session 'a' with all messages? [y/N]: " in shown
    assert shown.endswith("agent-runtime: nothing is deleted\n")
    code, shown = shell.on_terminal("sessions", "delete", "a", "b", typed="y\n")
    assert code == 0
    assert "Delete 2 sessions with all messages? [y/N]: " in shown
    assert shown.endswith("deleted a\ndeleted b\n")


def test_a_terminal_gets_tables_colours_and_a_bar(shell: Shell) -> None:
    file = shell.file("f.jsonl", STORY, chat("long", "x" * 200, created_at=AT, last_activity=AT))
    code, shown = shell.on_terminal("import", file)
    assert code == 0
    assert "importing f.jsonl" in shown
    assert shown.endswith("f.jsonl: 2 created, 0 resumed, 0 unchanged, 0 refused\n")
    _, shown = shell.on_terminal("sessions", "list")
    table = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()]
    assert table[0].split() == ["session", "user", "title", "messages", "last", "activity"]
    assert re.fullmatch(r"long +x+… +1  2026-03-01 12:00:00Z", table[1])
    assert re.fullmatch(r"story +ada +A \[bold\]title\[/bold\] +4  2026-03-01 12:00:00Z", table[2])
    assert {len(line) for line in table[1:]} == {100}
    _, shown = shell.on_terminal("sessions", "show", "story")
    assert "\x1b[1;33m#6 tool find [c1]" in shown
    assert "ésc \\x1b[31mred\\x9b \\u202etxt" in shown
    assert "title         A [bold]title[/bold]" in shown


# --- how commands end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LeaseHeld("pid 1 on host"), 3),
        (LeaseLost("another runtime has taken over"), 3),
        (ExceptionGroup("", [LeaseLost("another runtime has taken over")]), 3),
        (StorageUnavailable("it is away"), 1),
        (ConfigError(["storage.url: no"]), 1),
        (OSError(2, "No such file", "x"), 1),
        (ValueError("what was said"), 1),
    ],
)
def test_exit_codes(error: Exception, code: int) -> None:
    failure = failure_of(error)
    assert failure.code == code
    assert "what was said" not in "".join(failure.lines)
