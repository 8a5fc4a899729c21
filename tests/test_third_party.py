"""A stranger's storage: a distribution of its own, found by its URL's scheme, proved by the kit; and broken ones.

`third_party/agent_runtime_duckdb` is what backends/README.md tells an author to write, to the letter.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from agent_runtime import AgentRuntimeError, open_runtime
from http_rig import environment, install, run, serving

ROOT = Path(__file__).parent.parent
STRANGERS = Path(__file__).parent / "third_party"
DUCKDB = STRANGERS / "agent_runtime_duckdb"
LINES_MAX = 150

BROKEN = {
    "raises_at_import": "ImportError: the library of the engine is missing; disable it with ",
    "wrong_argument": "hookimpl definition: agent_runtime_storages(config: ",
    "taken_scheme": "plugin 'taken_scheme', hook agent_runtime_storages: stores under 'sqlite', as 'sqlite' does; disable",
    "no_context_manager": "plugin 'no_context_manager', hook agent_runtime_storages: its factory for 'broken' returned a "
    "coroutine, not an async context manager of a storage: mark it with @asynccontextmanager",
    "no_storage": "plugin 'no_storage', hook agent_runtime_storages: its factory for 'broken' opened a Bucket, which is no "
    "storage: it has no abilities, leases, purge, figures",
}

FOUND_OUT = [
    "TestTorn::test_a_batch_with_a_bad_row_is_refused_whole",
    "TestDoubling::test_a_replayed_batch_is_recognised_and_changes_nothing",
    "TestUnfenced::test_an_expired_lease_is_taken_over",
    "TestHalfCancelled::test_apply",
    "TestBehind::test_none_is_torn_or_late_while_batches_come",
    "TestNeverDescending::test_messages_between_two_bounds",
    "TestTidied::test_documents_are_replaced_and_discarded",
    "TestLeaking::test_figures",
    "TestRowByRow::test_a_row_more_is_not_a_batch_more",
    "TestBoasting::test_the_journal_lies_beside_a_database_that_is_a_file",
    "TestForgetful::test_opening_it_again_changes_nothing",
    "TestSkipping::test_figures",
    "TestExpectedToFail::test_two_are_two",
    "TestExpectedToFail::test_figures",
    "TestSkipped::test_figures",
]


def installed(directory: Path) -> dict[str, str]:
    """Install the distribution as pip does, without its network; what processes need in their environment to see it."""
    project = tomllib.loads((DUCKDB / "pyproject.toml").read_text())["project"]
    [(plugin, module)] = project["entry-points"]["agent_runtime"].items()
    shutil.copy(DUCKDB / f"{module}.py", directory)
    metadata = directory / f"{module}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (metadata / "entry_points.txt").write_text(f"[agent_runtime]\n{plugin} = {module}\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))}


def kit(directory: Path, environ: dict[str, str], *tests: str) -> tuple[int, str]:
    """Run tests as their author would, in a directory that knows nothing of ours; the exit code and what is said."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-W",
        "error",
        "--tb=short",
        "-q",
        "-rA",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    ended = subprocess.run(
        command, cwd=directory, env=environment(environ), capture_output=True, text=True, check=False, timeout=600
    )
    return ended.returncode, ended.stdout + ended.stderr


def ask(url: str, method: str = "GET", body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


# --- the storage of a stranger ----------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("selected", "least"),
    [
        ("asyncio and (figures or snapshot or sequence)", 5),
        pytest.param("asyncio", 70, marks=pytest.mark.long),
        pytest.param("trio", 70, marks=pytest.mark.long),
    ],
)
def test_it_passes_the_kit(tmp_path: Path, selected: str, least: int) -> None:
    environ = installed(tmp_path)
    shutil.copy(DUCKDB / "test_agent_runtime_duckdb.py", tmp_path)
    code, said = kit(tmp_path, environ, "test_agent_runtime_duckdb.py", "-k", selected)
    assert code == 0, said
    passed = re.search(r"^(\d+) passed, \d+ deselected in [^,]*$", said, re.MULTILINE)
    assert passed, said
    assert int(passed[1]) >= least


def test_it_is_found_by_its_scheme_and_serves_a_conversation(tmp_path: Path) -> None:
    environ = installed(tmp_path)
    text = (DUCKDB / "sessions.yaml").read_text()
    assert text.count("duckdb:///sessions.duckdb") == 1
    config = tmp_path / "sessions.yaml"
    config.write_text(text.replace("sessions.duckdb", f"{tmp_path}/sessions.duckdb"))
    said = ["Be kind.", "Find me a train to Porto.", "There is one at 09:30. 🚆"]
    with serving("--config", str(config), environ=environ) as server:
        ask(f"{server.url}/v1/sessions", "POST", {"session_id": "s1", "system_prompt": said[0]})
        for role, content in (("user", said[1]), ("assistant", said[2])):
            ask(f"{server.url}/v1/sessions/s1/messages", "POST", {"role": role, "content": content})
    assert (tmp_path / "sessions.duckdb.journal").is_dir()
    with serving("--config", str(config), environ=environ) as server:
        history = ask(f"{server.url}/v1/sessions/s1/history")
        assert [message["content"] for message in history["messages"]] == said
        assert ask(f"{server.url}/v1/status")["quarantine"]["changes"] == 0
    shown = run("plugins", "--json", environ=environ)
    assert "agent-runtime-duckdb" in shown.stdout, shown.stderr


def test_it_is_short_and_uses_public_names_only() -> None:
    source = (DUCKDB / "agent_runtime_duckdb.py").read_text()
    assert len(source.splitlines()) < LINES_MAX
    modules = set(re.findall(r"^from (agent_runtime[\w.]*) import", source, re.MULTILINE))
    assert modules == {"agent_runtime", "agent_runtime.keyed", "agent_runtime.storage"}
    assert not re.search(r"\b_[a-z]\w*\b(?<!_commit)(?<!_begin)(?<!_rows)", re.sub(r"self\._\w+|def _\w+", "", source))


def test_the_document_for_authors_is_what_is_here() -> None:
    text = (ROOT / "backends" / "README.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert sections == {path.name: path.read_text() for path in DUCKDB.iterdir() if path.is_file()}


# --- broken ones ------------------------------------------------------------------------------------------------------


def test_every_broken_one_is_here() -> None:
    assert set(BROKEN) == {path.stem for path in (STRANGERS / "broken").glob("*.py")}


@pytest.mark.anyio
@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_one_is_refused_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, name, (STRANGERS / "broken" / f"{name}.py").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    url = "broken:" if name.startswith("no_") else f"sqlite:///{tmp_path}/sessions.db"
    with pytest.raises(AgentRuntimeError) as caught:
        async with open_runtime(url):
            pass
    monkeypatch.delitem(sys.modules, name, raising=False)
    message = str(caught.value)
    assert BROKEN[name] in message
    assert message.startswith(f"plugin {name!r}")
    assert "\n" not in message


@pytest.mark.parametrize("name", ["raises_at_import", "no_storage"])
def test_a_command_says_so_in_one_line(name: str, tmp_path: Path) -> None:
    path = install(tmp_path, name, (STRANGERS / "broken" / f"{name}.py").read_text())
    ended = run("sessions", "list", "--storage", "broken:", environ={"PYTHONPATH": path})
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert ended.stderr.startswith(f"agent-runtime: plugin {name!r}")


# --- liars ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_storage_that_breaks_a_promise_does_not_pass(tmp_path: Path) -> None:
    shutil.copy(STRANGERS / "liars.py", tmp_path)
    code, said = kit(tmp_path, {}, *(f"liars.py::{test}" for test in FOUND_OUT))
    assert code == 1
    assert " passed" not in said.splitlines()[-1]
    for test in FOUND_OUT:
        assert re.search(rf"^(FAILED|ERROR) liars\.py::{test}\[asyncio", said, re.MULTILINE), test
        assert not re.search(rf"^(SKIPPED|XFAIL|XPASS).*liars\.py::{test}", said, re.MULTILINE), test
    assert said.count("was skipped or expected to fail: a storage passes all of the kit") == 2 * 4


def test_a_call_that_should_have_raised_is_named(tmp_path: Path) -> None:
    shutil.copy(STRANGERS / "liars.py", tmp_path)
    code, said = kit(tmp_path, {}, "liars.py::TestDeaf::test_a_closed_storage_refuses_every_call")
    assert code == 1
    told = (
        "apply, after the storage was closed, raised nothing: it must raise a StorageError, such as StorageUnavailable"
    )
    assert len(re.findall(rf"^E +Failed: {re.escape(told)}$", said, re.MULTILINE)) == 2  # on asyncio and trio


def test_what_it_lacks_is_left_out_once_it_is_declared(tmp_path: Path) -> None:
    shutil.copy(STRANGERS / "liars.py", tmp_path)
    code, said = kit(tmp_path, {}, "liars.py::TestForgetfulAndSaysSo", "-k", "opening or at_once or bad_row")
    assert code == 0, said
    assert "skipped" not in said
    assert "test_opening_it_again_changes_nothing" not in said
    assert "test_of_many_who_try_at_once_one_is_granted" not in said
    assert "test_a_batch_with_a_bad_row_is_refused_whole[trio]" in said


def test_what_is_left_out_undeclared_is_an_error() -> None:
    from agent_runtime.testing.kit import StorageKit

    with pytest.raises(
        TypeError, match=r"TestMine\.lacks: 'speed' is not an optional ability; those are: openings, reo"
    ):
        type("TestMine", (StorageKit,), {"lacks": ("speed",)})
    with pytest.raises(
        TypeError, match=r"TestMine\.test_apply replaces a test of the kit; name what is missing in `lac"
    ):
        type("TestMine", (StorageKit,), {"test_apply": None})
