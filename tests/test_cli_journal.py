"""`journal inspect`: what a journal holds, whole or damaged, idle or being written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_runtime import Config, open_runtime_blocking
from agent_runtime.journal import LocalFiles, read_directory
from agent_runtime.journal.headers import encode_headers, number_of, segment_name
from agent_runtime.journal.inspection import Inspection, inspect
from agent_runtime.journal.still import StillFiles
from crash import END, STORED, Left, leave_crash
from journal_rig import Image
from shell import Shell

CHILDREN = Path(__file__).parent / "children.py"
UUID = r"[0-9a-f-]{36}"


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


def shown(shell: Shell, *arguments: str, code: int = 0) -> Any:
    output, errors = shell.here("journal", "inspect", "--json", *arguments, code=code)
    assert len(errors) == (code != 0)
    return json.loads(output)


def facts(output: str) -> dict[str, str]:
    return {line[:14].rstrip(): line[14:] for line in output.splitlines() if "\t" not in line}


def footprint(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.suffix != ".db-shm"
    }


# --- a journal that is whole ------------------------------------------------------------------------------------------


def test_a_journal_is_shown_with_what_the_database_lacks_of_it(shell: Shell, left: Left) -> None:
    output, errors = shell.here("journal", "inspect")
    assert errors == []
    told = facts(output)
    assert re.fullmatch(UUID, told["journal"])
    assert told["directory"] == str(left.journal)
    assert re.fullmatch(rf"database {UUID}, generation 1", told["pairing"])
    size = sum(path.stat().st_size for path in left.segments)
    assert told["size"] == f"{size} bytes in {len(left.segments)} segment(s)"
    first = min(left.frames())
    assert told["changes"] == f"{END - first + 1}, {first} to {END}"
    assert told["database"] == f"stands at {STORED}, has this journal up to {STORED}"
    assert told["not stored"] == f"{END - STORED} change(s)"
    rows = [line.split("\t") for line in output.splitlines() if "\t" in line]
    assert [row[:3] for row in rows] == [["segment", path.name, str(path.stat().st_size)] for path in left.segments]
    assert len(rows) > 1
    assert [int(row[4]) for row in rows[1:]] == [int(row[5]) + 1 for row in rows[:-1]]
    assert sum(int(row[6]) for row in rows) == END - first + 1
    assert "said" not in output
    assert "unstored" not in output


def test_programs_get_all_of_it(shell: Shell, left: Left) -> None:
    found = shown(shell)
    assert found["problem"] is None
    assert found["database"] == {
        "database_id": left.value("SELECT database_id FROM partitions"),
        "sequence": STORED,
        "journal_sequence": STORED,
        "generation": 1,
    }
    journal = msgspec.convert(found["journal"], Inspection)
    assert journal.journal_id == left.journal_id
    assert (journal.last, journal.unstored, journal.generation, journal.partition) == (END, END - STORED, 1, 0)
    assert (journal.damage, journal.voids, journal.missing, journal.kept) == ((), (), (), ())
    assert [segment.begins for segment in journal.segments] == [segment.first for segment in journal.segments]


def test_nothing_is_changed_by_a_look(shell: Shell, left: Left) -> None:
    before, epoch = footprint(left.journal), left.value("SELECT epoch FROM partitions")
    shell.here("journal", "inspect")
    shell.here("journal", "inspect", str(left.journal))
    shell.here("check")
    shell.here("quarantine", "list")
    assert footprint(left.journal) == before
    assert left.value("SELECT epoch FROM partitions") == epoch


def test_a_terminal_gets_a_table(shell: Shell, left: Left) -> None:
    code, seen = shell.on_terminal("journal", "inspect", columns=80)
    assert code == 0
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen).splitlines()]
    assert "segment             bytes  generation  first  last  changes  begun" in lines
    assert sum(line.startswith("0000000") for line in lines) >= len(left.segments)


def test_a_journal_alone_is_shown_without_its_database(shell: Shell, left: Left) -> None:
    left.database.unlink()
    output, errors = shell.here("journal", "inspect", "sessions.db.journal")
    assert errors == []
    assert facts(output)["directory"] == str(left.journal)
    assert not {"database", "not stored"} & set(facts(output))
    assert not left.database.exists()


@pytest.mark.parametrize("command", [["journal", "inspect"], ["check"]])
def test_the_help_names_the_other_journals_beside_a_file(shell: Shell, command: list[str]) -> None:
    assert "FILE.journal.2" in shell.here(*command, "--help")[0]  # in <> the terminal's markup would swallow it


def test_a_journal_that_is_not_there_is_named(shell: Shell, tmp_path: Path) -> None:
    assert shell.fails("journal", "inspect", "nowhere") == f"there is no journal at {tmp_path}/nowhere"
    assert shell.fails("journal", "inspect") == f"there is no journal at {shell.database}.journal"
    (tmp_path / "a file").touch()
    told = shell.fails("journal", "inspect", "a file")
    assert told == f"the journal's directory {tmp_path}/a file can't be read: Not a directory"
    (tmp_path / "empty").mkdir()
    output, _ = shell.here("journal", "inspect", "empty")
    assert facts(output) == {
        "journal": "none yet",
        "directory": str(tmp_path / "empty"),
        "size": "0 bytes in 0 segment(s)",
        "changes": "0",
    }
    assert shell.fails("journal", "inspect", "--storage", "memory:") == (
        "journal.directory is not set: name the journal's directory"
    )


def test_a_database_that_can_not_be_read_leaves_the_journal_to_be_seen(shell: Shell, left: Left) -> None:
    left.database.write_text("this is a text file, and a long one\n" * 100)
    assert "is not a SQLite database" in shell.fails("journal", "inspect")  # nobody says where the journal would be
    output, _ = shell.here("journal", "inspect", str(left.journal), "--storage", f"sqlite:///{left.database}")
    assert "is not a SQLite database" in facts(output)["database"]
    environment = {"AGENT_RUNTIME__JOURNAL__DIRECTORY": str(left.journal)}
    output, _ = shell.here("journal", "inspect", environment=environment)
    assert "is not a SQLite database" in facts(output)["database"]
    assert facts(output)["changes"].endswith(f"to {END}")


def test_a_journal_of_another_database_is_not_measured_by_this_one(shell: Shell, left: Left) -> None:
    left.sql("UPDATE partitions SET database_id = 'another'")
    told = facts(shell.here("journal", "inspect")[0])
    assert told["database"] == "another: another one than the journal belongs to"
    assert "not stored" not in told


def test_the_journal_id_comes_from_the_database_where_no_header_is_left(shell: Shell, left: Left) -> None:
    journal_id, count = left.journal_id, len(left.segments)
    for path in left.segments:
        data = path.read_bytes()
        path.write_bytes(bytes(1024) + data[1024:])
    found = shown(shell, code=1)["journal"]
    assert found["journal_id"] == journal_id
    assert (len(found["segments"]), found["last"], found["generation"]) == (count, END, 0)
    assert [(each["offset"], each["bytes"], each["torn"]) for each in found["damage"]] == [(0, 1024, False)] * count


def test_every_journal_beside_the_file_is_shown(shell: Shell, left: Left) -> None:
    with left.overtaken() as second:
        output, errors = shell.here("journal", "inspect")
        assert errors == []
        sections = [facts(each) for each in output.split("\n\n")]
        assert [each["directory"] for each in sections] == [str(left.journal), str(second.journal)]
        assert [each["not stored"] for each in sections] == [
            f"{END - STORED} change(s); another runtime has written since, they come in late",
            "1 change(s)",
        ]
        assert [each["database"] for each in sections] == [
            f"stands at {STORED + 1}, has this journal up to {STORED + number}" for number in (0, 1)
        ]
        lines = [json.loads(each) for each in shell.here("journal", "inspect", "--json")[0].splitlines()]
        assert [each["journal"]["directory"] for each in lines] == [str(left.journal), str(second.journal)]
        assert [each["journal"]["unstored"] for each in lines] == [END - STORED, 1]
        assert shown(shell, str(second.journal))["journal"]["unstored"] is None
        alone = {"AGENT_RUNTIME__JOURNAL__DIRECTORY": str(left.journal)}
        assert facts(shell.here("journal", "inspect", environment=alone)[0]) == sections[0]


def test_each_journal_that_is_damaged_is_named_and_the_others_are_shown(shell: Shell, left: Left) -> None:
    places = [Path(f"{left.journal}.{number}") for number in (2, 3, 10)]
    for place in places:
        shutil.copytree(left.journal, place)
    shutil.rmtree(left.journal)
    second, third, tenth = (Left(left.database.parent, place.name) for place in places)
    path = second.segments[0]
    path.rename(path.with_name(segment_name(99)))
    third.damage(STORED + 2)
    output, errors = shell.here("journal", "inspect", code=1)
    assert [facts(each)["directory"] for each in output.split("\n\n")] == [str(third.journal), str(tenth.journal)]
    wrong, damaged = errors
    assert wrong.startswith(f"agent-runtime: {segment_name(99)} in {second.journal} is segment ")
    assert damaged.startswith(f"agent-runtime: the journal {third.journal} is damaged: 1 place(s) in the middle, ")


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_torn_tail_is_no_failure(shell: Shell, left: Left) -> None:
    newest = left.segments[-1]
    size = newest.stat().st_size
    with newest.open("ab") as file:
        file.write(b"000001f4 00ab")
    output, errors = shell.here("journal", "inspect")
    assert errors == []
    assert facts(output)["damage"] == f"{newest.name}, at byte {size}: 13 bytes, a torn tail"
    (damage,) = shown(shell)["journal"]["damage"]
    assert damage == {"file": newest.name, "offset": size, "bytes": 13, "torn": True}


def test_an_unfinished_segment_is_a_torn_tail(shell: Shell, left: Left) -> None:
    newest = left.segments[-1]
    unfinished = newest.with_name(f"{int(newest.stem) + 1:010}.segment")
    unfinished.write_bytes(newest.read_bytes()[:100])
    (damage,) = shown(shell)["journal"]["damage"]
    assert damage == {"file": unfinished.name, "offset": 0, "bytes": 100, "torn": True}


def test_damage_in_the_middle_is_a_failure_and_names_the_place(shell: Shell, left: Left) -> None:
    path, frame = left.damage(STORED + 2)
    output, errors = shell.here("journal", "inspect", code=1)
    size = frame.end - frame.start
    assert facts(output)["damage"] == f"{path.name}, at byte {frame.start}: {size} bytes, in the middle"
    assert facts(output)["missing"] == str(STORED + 2)
    assert facts(output)["not stored"] == f"{END - STORED - 1} change(s)"
    place = f"1 place(s) in the middle, {size} bytes; 1 change(s) are missing"
    assert errors == [f"agent-runtime: the journal {left.journal} is damaged: {place}"]
    assert shown(shell, code=1)["journal"]["missing"] == [[STORED + 2, STORED + 2]]


def test_a_damaged_copy_of_a_header_is_told(shell: Shell, left: Left) -> None:
    data = bytearray(left.segments[0].read_bytes())
    data[600] ^= 1
    left.segments[0].write_bytes(data)
    found = shown(shell, code=1)["journal"]
    assert found["damage"] == [{"file": left.segments[0].name, "offset": 512, "bytes": 512, "torn": False}]
    assert found["missing"] == []


def test_a_segment_that_is_gone_is_missed(shell: Shell, left: Left) -> None:
    middle = sorted(left.frames())[len(left.frames()) // 2]
    path, _ = left.frames()[middle]
    assert path not in (left.segments[0], left.segments[-1])
    lost = [sequence for sequence, (file, _) in left.frames().items() if file == path]
    path.unlink()
    found = shown(shell, code=1)["journal"]
    assert found["missing"] == [[lost[0], lost[-1]]]
    assert found["damage"] == []


def test_writes_that_failed_are_void_and_no_damage(shell: Shell, left: Left) -> None:
    with closing(StillFiles(left.journal)) as files:
        header = read_directory(files).header
    assert header is not None
    void = (END + 1, END + 2)
    newer = msgspec.structs.replace(header, segment=header.segment + 1, first=END + 3, voids=(void,))
    left.append(END + 1, left.change(END))
    (left.journal / f"{newer.segment:010}.segment").write_bytes(encode_headers(newer))
    output, _ = shell.here("journal", "inspect")
    assert facts(output)["void"] == f"{END + 1} to {END + 2}: a write that failed, and was not acknowledged"
    assert facts(output)["not stored"] == f"{END - STORED} change(s)"


def test_torn_tails_that_were_cut_are_kept_and_shown(shell: Shell, left: Left) -> None:
    newest = left.segments[-1]
    size = newest.stat().st_size
    with newest.open("ab") as file:
        file.write(b"torn")
    left.sql("UPDATE partitions SET expires_at = 0")
    with open_runtime_blocking(f"sqlite:///{left.database}"):
        output, _ = shell.here("journal", "inspect")
    assert facts(output)["kept"] == f"{newest.name}.torn-{size}: 4 bytes, cut from a torn tail"
    assert facts(output)["not stored"] == "0 change(s)"


def test_a_journal_switched_off_and_on_again_misses_nothing(shell: Shell) -> None:
    for enabled in (True, False, True):
        config = Config.of(f"sqlite:///{shell.database}", journal={"enabled": enabled, "retain_s": 1000.0})
        with open_runtime_blocking(config) as runtime:
            runtime.create_session().append("user", "hi")
    assert shown(shell)["journal"]["missing"] == []


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=100, deadline=None)
def test_whatever_is_damaged_is_told_and_everything_else_is_there(crash: Path, at: float, bit: int, cut: bool) -> None:
    contents = {path.name: path.read_bytes() for path in sorted((crash / "sessions.db.journal").glob("*.segment"))}
    oldest, *_, newest = contents
    files = Image(contents)
    before = inspect(files)
    offset = int(at * before.bytes)
    name = oldest
    while offset >= len(contents[name]):
        offset -= len(contents[name])
        name = segment_name(number_of(name) + 1)
    data = contents[name]
    contents[name] = data[:offset] if cut else data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]
    found = inspect(files, journal_id=before.journal_id, stored=0)
    lost = sum(last - first + 1 for first, last in found.missing)
    if cut:  # nobody can tell what the newest has lost at a frame's end, and the oldest with its header
        assert found.changes + lost == before.changes or name == newest or (name == oldest and found.damaged)
        assert found.changes + lost <= before.changes
    else:
        assert found.damage
        assert found.damaged or name == newest
        assert before.changes - 1 <= found.changes <= before.changes
    assert found.unstored == found.changes


# --- a picture of what moves ------------------------------------------------------------------------------------------


def test_a_picture_does_not_move(left: Left) -> None:
    first, *_, newest = left.segments
    with closing(StillFiles(left.journal)) as files:
        contents = {path.name: path.read_bytes() for path in left.segments}
        left.append(END + 1, left.change(END))
        first.unlink()
        (left.journal / "0000000099.segment").touch()
        assert {name: files.read(name).read() for name in files.names()} == contents
        assert files.bytes == sum(map(len, contents.values()))
        newest.write_bytes(b"")
        assert files.read(newest.name).read() == b""
    with pytest.raises(FileNotFoundError):
        files.read(newest.name)


def test_a_picture_has_what_is_begun_while_others_are_cut(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = LocalFiles.names
    moves = iter((left.segments[0], left.segments[1]))

    def names(files: LocalFiles) -> list[str]:
        listed = listing(files)
        if (path := next(moves, None)) is not None:
            path.rename(path.with_name(segment_name(number_of(path.name) + 100)))
        return listed

    monkeypatch.setattr(LocalFiles, "names", names)
    with closing(StillFiles(left.journal)) as files:
        assert files.names() == [path.name for path in left.segments]


def test_half_a_write_is_waited_for(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = left.segments[-1]
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-10])
    monkeypatch.setattr("agent_runtime.journal.still.time.sleep", lambda _: newest.write_bytes(whole))
    with closing(StillFiles(left.journal)) as files:
        assert files.read(newest.name).read() == whole


@pytest.fixture
def writing(shell: Shell) -> Any:
    """A process that writes as fast as it can."""
    command = [sys.executable, str(CHILDREN), "hold", "asyncio", f"sqlite:///{shell.database}", ""]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "AGENT_RUNTIME__JOURNAL__SEGMENT_BYTES": "4096",
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        for _ in range(10):
            assert process.stdout.readline()
        yield process
        process.kill()


def test_looks_while_a_process_writes_and_after_it_is_killed(shell: Shell, writing: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 2
    looks = 0
    while looks < 3 or time.monotonic() < deadline:
        looks += 1
        found = shown(shell)
        assert found["journal"]["damage"] == []
        assert found["journal"]["missing"] == []
        assert found["database"]["journal_sequence"] == found["database"]["sequence"]
        output, errors = shell.here("check")
        assert (output[:4], errors) == ("ok: ", [])
        assert shell.here("quarantine", "list") == ("", [])
    assert writing.poll() is None
    writing.kill()
    writing.wait()
    found = shown(shell)
    assert found["journal"]["missing"] == []
    assert shell.here("check")[0][:4] == "ok: "
    with open_runtime_blocking(f"sqlite:///{shell.database}"):
        pass
    assert shown(shell)["journal"]["unstored"] == 0
    assert shell.here("check")[0][:4] == "ok: "
