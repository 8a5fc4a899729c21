"""Another process is said to be dead only when that is certain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent_runtime.process import ProcessFacts, is_dead, this_process

LINUX = sys.platform == "linux"
"""Elsewhere nothing is certain."""


def facts_of(pid: int) -> ProcessFacts:
    """What `this_process` would have said in the process with that id."""
    started = int(Path(f"/proc/{pid}/stat").read_text().split()[21]) if LINUX else None
    return replace(this_process(), pid=pid, process_started=started)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_this_process() -> None:
    mine = this_process()
    assert mine == this_process() == facts_of(os.getpid())
    assert mine.pid == os.getpid()
    assert (None in (mine.process_started, mine.boot_id, mine.pid_namespace)) != LINUX
    assert not is_dead(mine)


def test_a_process_whose_name_looks_like_the_fields_behind_it(tmp_path: Path) -> None:
    """The name in /proc/<pid>/stat stands in brackets, and may hold brackets and spaces."""
    program = tmp_path / "a) Z 1 (b"
    program.symlink_to(sys.executable)
    code = "import sys; sys.path[:] = sys.argv[1:]; from agent_runtime.process import is_dead, this_process; "
    code += "print(is_dead(this_process()), this_process().process_started)"
    output = subprocess.run([program, "-c", code, *sys.path], capture_output=True, check=True, text=True).stdout
    assert output.split()[0] == "False"
    assert (output.split()[1] == "None") != LINUX


def test_a_living_and_a_stopped_process(child: subprocess.Popen[bytes]) -> None:
    facts = facts_of(child.pid)
    assert not is_dead(facts)
    child.send_signal(signal.SIGSTOP)
    assert not is_dead(facts)


def test_a_killed_process_before_and_after_its_parent_took_note(child: subprocess.Popen[bytes]) -> None:
    facts = facts_of(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(facts) == LINUX
    child.wait()
    assert is_dead(facts) == LINUX


def test_another_process_has_the_id_now(child: subprocess.Popen[bytes]) -> None:
    facts = facts_of(child.pid)
    assert is_dead(replace(facts, process_started=(facts.process_started or 0) - 1)) == LINUX


@pytest.mark.parametrize("field", ["host", "boot_id", "pid_namespace"])
def test_a_process_of_elsewhere(child: subprocess.Popen[bytes], field: str) -> None:
    facts = facts_of(child.pid)
    child.kill()
    child.wait()
    assert is_dead(facts) == LINUX
    assert not is_dead(replace(facts, **{field: "elsewhere"}))


@pytest.mark.parametrize("field", ["process_started", "boot_id", "pid_namespace"])
def test_facts_that_are_not_known(child: subprocess.Popen[bytes], field: str) -> None:
    facts = facts_of(child.pid)
    child.kill()
    child.wait()
    assert not is_dead(replace(facts, **{field: None}))


@pytest.mark.parametrize("pid", [0, -1])
def test_ids_that_name_no_process(pid: int) -> None:
    assert not is_dead(replace(this_process(), pid=pid))
