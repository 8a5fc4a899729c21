"""The command line as a process: configuration, plugins, and every way in which a command ends."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agent_runtime import open_runtime_blocking
from shell import Shell, chat


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


# --- the configuration ------------------------------------------------------------------------------------------------


def test_a_configuration_is_checked_with_every_fault_a_line(shell: Shell) -> None:
    good = "storage:\n  url: 'memory:'\nwrite_behind:\n  interval_s: 2\n"
    bad = "storage:\n  url: 'memory:'\n  option: {}\nlease:\n  duration_s: 0\n"
    no_environment = {"AGENT_RUNTIME__STORAGE__URL": ""}
    (shell.directory / "good.yaml").write_text(good)
    (shell.directory / "bad.yaml").write_text(bad)
    for arguments in (["good.yaml"], ["--config", "good.yaml"]):
        assert shell.here("config", "check", *arguments, environment=no_environment) == ("ok: good.yaml\n", [])
    assert shell.here("config", "check")[0] == "ok: the environment and the defaults\n"
    output, errors = shell.here("config", "check", "bad.yaml", code=1, environment=no_environment)
    assert output == ""
    assert errors == [
        "agent-runtime: bad.yaml:3: storage.option: unknown key; did you mean options?",
        "agent-runtime: bad.yaml:5: lease.duration_s: must be greater than or equal to 1",
    ]
    assert shell.fails("config", "check", "missing.yaml") == "missing.yaml: can't be read: No such file or directory"
    assert shell.fails("config", "check", "good.yaml", "--config", "bad.yaml", code=2).startswith("name the file once")


def test_what_plugins_are_wanted_for_is_checked_with_its_place(shell: Shell) -> None:
    (shell.directory / "f.yaml").write_text("storage:\n  url: sqlit:///x\nplugins:\n  disabled: [memry]\n")
    no_environment = {"AGENT_RUNTIME__STORAGE__URL": ""}
    for arguments in (["config", "check"], ["sessions", "list"]):
        told = shell.fails(*arguments, "--config", "f.yaml", environment=no_environment)
        assert told == "f.yaml:4: plugins.disabled: there is no plugin 'memry'; did you mean memory?"
    no_disabled = no_environment | {"AGENT_RUNTIME__PLUGINS__DISABLED": "[]"}
    for arguments in (["config", "check"], ["sessions", "list"]):
        told = shell.fails(*arguments, "--config", "f.yaml", environment=no_disabled)
        assert told.startswith("f.yaml:2: storage.url: no plugin stores under 'sqlit'; there are: memory, ")


def test_the_configuration_in_force_is_shown_with_its_origins_and_no_secret(shell: Shell) -> None:
    (shell.directory / "f.yaml").write_text("logging:\n  format: json\nplugins:\n  config: {x: {password: hidden}}\n")
    url = {"AGENT_RUNTIME__STORAGE__URL": "sqlite://ada:hidden@/x.db"}
    output, _ = shell.here("config", "show", "--config", "f.yaml", environment=url)
    lines = dict(line.split("\t", 1) for line in output.splitlines())
    assert lines["logging.format"] == '"json"\tf.yaml:2'
    assert lines["storage.url"] == '"sqlite://ada:***@/x.db"\tAGENT_RUNTIME__STORAGE__URL'
    assert lines["write_behind.interval_s"] == "5.0\tdefault"
    assert "hidden" not in output
    output, _ = shell.here("config", "show", "--json", "--storage", "memory:", environment=url)
    assert json.loads(output)["storage.url"] == {"value": "memory:", "origin": "option"}
    schema = json.loads(shell.here("config", "schema")[0])
    assert set(schema["properties"]) >= {"storage", "write_behind", "plugins"}


def test_variables_of_the_old_service_are_ignored_with_one_warning(shell: Shell) -> None:
    _, errors = shell.here("sessions", "list", environment={"LLM_MODEL": "x", "VERSION": "1"})
    (warning,) = errors
    assert warning.endswith("WARNING agent_runtime: ignored, as this version has no use for them: LLM_MODEL, VERSION")


# --- plugins ----------------------------------------------------------------------------------------------------------

HELLO = """
import typer
from agent_runtime.hookspecs import hookimpl

@hookimpl
def agent_runtime_commands(app):
    @app.command()
    def hello(fail: bool = False):
        "Say hello."
        if fail:
            raise ZeroDivisionError("a secret")
        typer.echo("hello")
"""
BROKEN = {
    "raise ImportError('no module named it')": "ImportError: no module named it",
    HELLO.replace("(app):", "(app):\n    raise ValueError('no')"): "ValueError",
    HELLO.replace("fail: bool", "fail: 'unheard'"): "typer refuses its commands: NameError: name 'unheard'",
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Install a plugin: a module, and a distribution that brings it."""
    names = []

    def install(name: str, source: str) -> None:
        metadata = tmp_path / "site" / f"{name}-1.5.dist-info"
        metadata.mkdir(parents=True)
        (metadata.parent / f"{name}.py").write_text(source)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (metadata / "entry_points.txt").write_text(f"[agent_runtime]\n{name} = {name}\n")
        monkeypatch.syspath_prepend(str(metadata.parent))
        names.append(name)

    yield install
    for name in names:
        sys.modules.pop(name, None)


SPEAKING = """
import logging
from agent_runtime.hookspecs import hookimpl

@hookimpl
def agent_runtime_lifespan(runtime):
    logging.getLogger("speaker").info("a\\nword")
"""


def test_logging_is_quiet_unless_it_is_configured(shell: Shell, install: Callable[[str, str], None]) -> None:
    install("speaker", SPEAKING)
    assert shell.here("sessions", "list") == ("", [])
    _, (opened, line, closed) = shell.here("sessions", "list", environment={"LOG_LEVEL": "INFO"})
    assert opened.endswith(f"Z INFO agent_runtime: database initialized: sqlite:///{shell.database}")
    assert closed.endswith("Z INFO agent_runtime: shutdown complete")
    assert line.endswith("Z INFO speaker: a\\nword")
    as_json = {"LOG_LEVEL": "info", "AGENT_RUNTIME__LOGGING__FORMAT": "json"}
    _, (_, line, _) = shell.here("sessions", "list", environment=as_json)
    entry = json.loads(line)
    assert list(entry) == ["time", "level", "logger", "message"]
    assert (entry["level"], entry["logger"], entry["message"]) == ("INFO", "speaker", "a\nword")


def test_plugins_are_listed_and_add_commands(shell: Shell, install: Callable[[str, str], None]) -> None:
    install("greeter", HELLO)
    assert shell.here("hello") == ("hello\n", [])
    output, _ = shell.here("plugins")
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in output.splitlines()}
    assert rows["greeter"] == ["1.5", "enabled", "greeter", "agent_runtime_commands"]
    assert rows["sqlite"][1:] == ["enabled", "agent-runtime", "agent_runtime_storages"]
    disabled = {"AGENT_RUNTIME__PLUGINS__DISABLED": '["greeter"]'}
    output, _ = shell.here("plugins", "--json", environment=disabled)
    (greeter,) = [it for it in map(json.loads, output.splitlines()) if it["name"] == "greeter"]
    assert (greeter["state"], greeter["version"], greeter["hooks"]) == ("disabled", "1.5", [])
    assert "No such command" in shell.here("hello", code=2, environment=disabled)[1][-2]
    (shell.directory / "f.yaml").write_text("plugins: {disabled: [greeter]}\n")
    for option in (["--config", "f.yaml"], ["--config=f.yaml"]):
        assert "disabled" in shell.here("plugins", *option)[0]


@pytest.mark.parametrize("source", BROKEN)
def test_a_broken_plugin_is_named_and_leaves_the_other_commands(
    shell: Shell, install: Callable[[str, str], None], source: str
) -> None:
    install("greeter", HELLO)
    install("rotten", source)
    output, errors = shell.here("plugins", code=1)
    assert "rotten\t1.5\tbroken" in output
    assert "greeter\t1.5\tenabled" in output
    (told,) = errors
    assert told.startswith("agent-runtime: plugin 'rotten'")
    assert BROKEN[source] in told
    for arguments in (["config", "check"], ["config", "schema"], ["hello"], ["--help"]):
        output, errors = shell.here(*arguments)
        assert output
        assert errors == [told]
    disabled = {"AGENT_RUNTIME__PLUGINS__DISABLED": '["rotten"]'}
    assert shell.here("config", "check", environment=disabled)[1] == []
    assert shell.here("sessions", "list", environment=disabled) == ("", [])


def test_a_plugin_that_can_not_be_imported_keeps_a_database_shut(
    shell: Shell, install: Callable[[str, str], None]
) -> None:
    install("rotten", "raise ImportError('no module named it')")
    assert shell.fails("sessions", "list") == (
        "plugin 'rotten': (rotten 1.5, rotten) ImportError: no module named it; "
        "disable it with plugins.disabled: [rotten]"
    )


def test_a_bug_is_one_line_unless_it_is_to_be_found(shell: Shell, install: Callable[[str, str], None]) -> None:
    install("greeter", HELLO)
    told = shell.fails("hello", "--fail")
    assert told.startswith("an unexpected ZeroDivisionError at ")
    assert told.endswith("greeter.py:11; agent-runtime --debug … shows where it comes from")
    process = shell.start("--debug", "hello", "--fail", environment={"PYTHONPATH": os.pathsep.join(sys.path)})
    _, errors = process.communicate()
    assert b"Traceback" in errors
    assert b"ZeroDivisionError: a secret" in errors
    assert process.returncode == 1


# --- how commands end -------------------------------------------------------------------------------------------------


def test_help_and_version_open_nothing(shell: Shell) -> None:
    code = """
import sys
from agent_runtime.cli import main
sys.argv = ["agent-runtime", "--help"]
try:
    main()
except SystemExit as end:
    assert end.code == 0
    assert not {"sqlalchemy", "alembic", "aiosqlite", "sqlite3", "trio"} & set(sys.modules), set(sys.modules)
"""
    process = subprocess.run([sys.executable, "-c", code], env=shell.environment, capture_output=True, check=False)
    assert process.returncode == 0, process.stderr.decode()
    assert b"sessions" in process.stdout
    assert shell.here("--version")[0].startswith("agent-runtime 0.")
    for arguments in (["sessions", "list", "-h"], ["import", "--help"], ["config", "check", "--help"]):
        assert "Usage: agent-runtime" in shell.here(*arguments)[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["sessions", "list", "--limit", "0"],
        ["import"],
        ["import", "f", "--format", "x"],
        ["sessions", "delete"],
    ],
)
def test_a_wrong_call_ends_with_2(shell: Shell, arguments: list[str]) -> None:
    output, errors = shell.here(*arguments, code=2)
    assert output == ""
    assert errors[0].startswith("Usage: agent-runtime")


def test_a_second_process_is_refused_with_the_name_of_the_first(shell: Shell) -> None:
    with open_runtime_blocking(shell.environment["AGENT_RUNTIME__STORAGE__URL"]):
        output, errors = shell.run("sessions", "list", code=3)
        _, (_, way_out) = shell.run("export", "-", code=3)
    assert way_out == "agent-runtime: stop that first: no server can be asked to do this"
    assert output == ""
    (told,) = errors
    assert told.startswith(f"agent-runtime: the database is in use by pid {os.getpid()} on ")
    assert shell.here("sessions", "list") == ("", [])


def broken_database(shell: Shell, kind: str) -> str:
    path = shell.database
    match kind:
        case "no database":
            path.write_text("this is a text file, and a long one\n" * 100)
        case "cut off":
            path.write_bytes(path.read_bytes()[:8192])
        case "newer":
            with closing(sqlite3.connect(path)) as connection:
                connection.execute("UPDATE agent_runtime_version SET version_num = '9999'")
                connection.commit()
        case "directory":
            return f"sqlite:///{shell.directory}"
        case "missing":
            path.unlink()
    return f"sqlite:///{path}"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no database", "is not a SQLite database"),
        ("cut off", "is damaged"),
        ("newer", "newer than schema"),
        ("directory", "is a directory"),
        ("missing", "there is no database"),
    ],
)
def test_a_database_that_can_not_be_opened_is_one_line(shell: Shell, kind: str, words: str) -> None:
    url = broken_database(shell, kind)
    told = shell.fails("sessions", "list", "--storage", url)
    assert words in told
    assert url.removeprefix("sqlite:///").removesuffix("/sessions.db") in told


LOOKS = [
    ["check"],
    ["export", "-"],
    ["journal", "inspect"],
    ["quarantine", "list"],
    ["quarantine", "show", "s1"],
    ["quarantine", "replay", "s1"],
    ["sessions", "list"],
    ["sessions", "show", "s1"],
    ["sessions", "delete", "s1", "--yes"],
    ["sessions", "purge", "s1", "--yes"],
]


@pytest.mark.parametrize("arguments", LOOKS, ids=" ".join)
def test_who_only_looks_makes_nothing(shell: Shell, arguments: list[str]) -> None:
    """Neither a file nor tables: a mistyped URL is found out."""
    shell.database.unlink()
    assert shell.fails(*arguments) == (
        f"there is no database {shell.database}: is storage.url right? agent-runtime serve makes a new one"
    )
    assert list(shell.directory.iterdir()) == []
    with closing(sqlite3.connect(shell.database)) as connection:
        connection.execute("CREATE TABLE somebodys (id INTEGER)")
        connection.commit()
    before = shell.database.read_bytes()
    told = shell.fails(*arguments)
    assert told.startswith(f"the database {shell.database} has no tables of agent-runtime, or not those of schema ")
    assert (shell.database.read_bytes(), list(shell.directory.iterdir())) == (before, [shell.database])


def test_a_locked_database_is_one_line(shell: Shell) -> None:
    with closing(sqlite3.connect(shell.database)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        told = shell.fails(
            "sessions", "list", environment={"AGENT_RUNTIME__STORAGE__OPTIONS": '{"busy_timeout_s": 0.1}'}
        )
    assert str(shell.database) in told
    assert "locked" in told


IMPATIENT = {
    "AGENT_RUNTIME__STORAGE__OPTIONS": '{"busy_timeout_s": 0.1}',
    "AGENT_RUNTIME__WRITE_BEHIND__DURABILITY_TIMEOUT_S": "0.3",
    "AGENT_RUNTIME__WRITE_BEHIND__DRAIN_TIMEOUT_S": "0.3",
    "AGENT_RUNTIME__LOGGING__LEVEL": "CRITICAL",
}


def test_changes_that_can_not_be_stored_end_an_import_with_4(shell: Shell) -> None:
    process = shell.start("import", "-", stdin=subprocess.PIPE, environment=IMPATIENT)
    with closing(sqlite3.connect(shell.database)) as connection:
        until(lambda: _holder(connection) == process.pid)
        connection.execute("BEGIN IMMEDIATE")
        output, errors = process.communicate(json.dumps(chat("a", "1")).encode(), timeout=30)
    assert process.returncode == 4, errors.decode()
    assert output == b""
    lines = errors.decode().splitlines()
    assert all(line.startswith("agent-runtime: ") for line in lines)
    assert lines[0].startswith("agent-runtime: 1 change(s) are still not stored after 0.3 s: ")
    assert lines[-1].startswith("agent-runtime: 1 change(s) could not be stored before the stop and are kept in the")
    listed, _ = shell.here("sessions", "list")
    assert listed.startswith("a\t")  # the journal had it


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_everything_done_stored(shell: Shell, number: signal.Signals, code: int) -> None:
    often = {"AGENT_RUNTIME__WRITE_BEHIND__INTERVAL_S": "0.05"}
    with shell.start("import", "-", stdin=subprocess.PIPE, environment=often) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps(chat("a", "1")).encode() + b"\n")
        process.stdin.flush()
        with closing(sqlite3.connect(shell.database)) as connection:
            until(lambda: _count(connection) > 0)
            process.stdin.write(json.dumps(chat("b", "1")).encode() + b"\n")
            process.stdin.flush()
            time.sleep(0.02)
            process.send_signal(number)
            assert process.wait(30) == code
            assert process.stderr.read() == b"agent-runtime: interrupted; everything done before is stored\n"
            assert _holder(connection) is None


def test_a_reader_that_has_enough_is_no_error(shell: Shell) -> None:
    shell.here("import", shell.file("f.jsonl", *(chat(f"s{index}", "x" * 500) for index in range(300))))
    with shell.start("sessions", "list", "--json") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) in (0, 1)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _holder(connection: sqlite3.Connection) -> int | None:
    row = connection.execute("SELECT pid FROM partitions").fetchone()
    return None if row is None else row[0]


def _count(connection: sqlite3.Connection) -> int:
    (count,) = connection.execute("SELECT count(*) FROM sessions").fetchone()
    return int(count)
