"""What lies in configs/: each configuration is loaded and served, and what stands around them asks for what there is."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from agent_runtime import Config, load_config
from agent_runtime.cli.exits import FAILED, HELD, LEFT, USAGE
from agent_runtime_http.engines import GRACE_S
from http_rig import environment, free_port, run, serving
from postgres_server import migrated_schema, url_of

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
FILES = ["postgresql", "sqlite", "standby"]


def config_file(name: str) -> Path:
    return CONFIGS / f"{name}.yaml"


@pytest.fixture
def place(tmp_path: Path) -> dict[str, dict[str, str]]:
    """What each configuration is given so that its database is one of this test."""
    url = url_of(migrated_schema())
    server = {"AGENT_RUNTIME__STORAGE__URL": url, "AGENT_RUNTIME__JOURNAL__DIRECTORY": str(tmp_path / "journal")}
    return {
        "sqlite": {"AGENT_RUNTIME__STORAGE__URL": f"sqlite:///{tmp_path}/sessions.db"},
        "postgresql": server,
        "standby": server,
    }


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_it_is_accepted_as_it_is_and_with_what_it_shows(tmp_path: Path, name: str) -> None:
    load_config(config_file(name), environ={})
    shown = re.sub(r"^( *)# (?=[a-z_]+: \S+$)", r"\1", config_file(name).read_text(), flags=re.MULTILINE)
    file = tmp_path / "shown.yaml"
    file.write_text(shown)
    config = load_config(file, environ={})
    assert config.write_behind.drain_timeout_s + GRACE_S < stop_timeout_s()


@pytest.mark.parametrize("name", FILES)
def test_what_is_commented_out_is_the_default(name: str) -> None:
    """Unless it says something of a place."""
    text = config_file(name).read_text()
    section = ""
    for line in text.splitlines():
        if found := re.match(r"([a-z_]+):$", line):
            section = found[1]
        if found := re.match(r" +# ([a-z_]+): (\S+)$", line):
            value = getattr(getattr(Config(), section), found[1], None)
            if section != "storage" and found[1] != "tokens_file":
                assert yaml.safe_load(found[2]) == value, line


@pytest.mark.parametrize("name", FILES)
def test_it_is_served(place: dict[str, dict[str, str]], name: str) -> None:
    with serving("--config", str(config_file(name)), "--host", "127.0.0.1", environ=place[name]) as server:
        assert httpx.put(f"{server.url}/v1/sessions/s1").status_code == 201
        level = load_config(config_file(name), environ={}).write_behind.durability
        assert server.output[1].endswith(f"(durability: {level})")
        server.signal(signal.SIGTERM)
        assert server.ended() == 0


def test_every_file_stands_in_the_document() -> None:
    text = (CONFIGS / "README.md").read_text()
    files = {file.name for file in CONFIGS.iterdir()} - {"README.md"}
    assert {name for name in re.findall(r"\]\(([\w.-]+)\)", text) if "/" not in name} == files


# --- the systemd unit -------------------------------------------------------------------------------------------------


def unit() -> dict[str, dict[str, list[str]]]:
    """The unit's settings by section; each may stand there more than once."""
    sections: dict[str, dict[str, list[str]]] = {}
    current: dict[str, list[str]] = {}
    for line in (CONFIGS / "agent-runtime.service").read_text().splitlines():
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            current.setdefault(name, []).append(value)
    return sections


def stop_timeout_s() -> float:
    return float(unit()["Service"]["TimeoutStopSec"][0])


def test_the_unit_runs_the_command_and_waits_for_its_drain() -> None:
    service = unit()["Service"]
    program, command, option, file = shlex.split(service["ExecStart"][0])
    assert (Path(program).name, command, option) == ("agent-runtime", "serve", "--config")
    assert option in run("serve", "--help").stdout
    assert Path(file).is_absolute()
    assert stop_timeout_s() > Config().write_behind.drain_timeout_s + GRACE_S
    assert int(service["RestartPreventExitStatus"][0]) == USAGE
    told = " ".join((CONFIGS / "agent-runtime.service").read_text().split())
    for code in (FAILED, HELD, LEFT):
        assert re.search(rf"\b{code}: ", told)


def test_the_unit_is_one_to_systemd(tmp_path: Path) -> None:
    """To systemd itself where it is there; else at least to who reads such files."""
    text = (CONFIGS / "agent-runtime.service").read_text()
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    assert parser.sections() == ["Unit", "Service", "Install"]
    if analyze := shutil.which("systemd-analyze"):
        file = tmp_path / "agent-runtime.service"
        file.write_text(text.replace("/opt/agent-runtime/bin/agent-runtime", sys.executable))
        done = subprocess.run([analyze, "verify", str(file)], capture_output=True, text=True, timeout=60, check=False)
        assert str(file) not in done.stderr, done.stderr
        assert "agent-runtime.service:" not in done.stderr, done.stderr


# --- the container file -----------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The container file's instructions, with what follows them."""
    lines = [line for line in (CONFIGS / "Containerfile").read_text().splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_what_the_container_copies_is_all_that_a_wheel_is_made_of() -> None:
    copied = set()
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            *sources, _ = rest.split()
            copied.update(sources)
    assert all((ROOT / source).exists() for source in copied)
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.findall(r'^    "((?:core|backends|plugins)/\w+)",$', project, re.MULTILINE)
    assert packages
    assert {package.partition("/")[0] for package in packages} | {"pyproject.toml", "README.md", "LICENSE"} <= copied


def test_what_the_container_sets_is_a_configuration_that_serves(tmp_path: Path) -> None:
    environ = dict(rest.split("=", 1) for name, rest in instructions() if name == "ENV")
    keys = {name: value for name, value in environ.items() if name.startswith("AGENT_RUNTIME__")}
    (volume,) = [rest for name, rest in instructions() if name == "VOLUME"]
    config = load_config(environ=keys)
    assert config.journal.directory is not None
    assert config.journal.directory.startswith(f"{volume}/")
    assert config.storage.url.startswith(f"sqlite:///{volume}/")
    assert str(config.http.port) in [rest for name, rest in instructions() if name == "EXPOSE"]
    here = {name: value.replace(volume, str(tmp_path)) for name, value in keys.items()}
    (entrypoint,) = [json.loads(rest) for name, rest in instructions() if name == "ENTRYPOINT"]
    assert entrypoint == ["agent-runtime", "serve"]
    refused = run("serve", "--port", str(free_port()), environ=here)
    assert refused.returncode == 1  # the token is what is missing
    token = here | {"AGENT_RUNTIME__HTTP__TOKENS": '["a-long-secret"]'}
    with serving(environ=token) as server:
        (check,) = [rest for name, rest in instructions() if name == "HEALTHCHECK"]
        command: list[str] = json.loads(check.partition("CMD ")[2])
        assert command[:2] == ["python", "-c"]
        code = command[2].replace(f":{config.http.port}/", f":{server.port}/")
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
        server.signal(getattr(signal, dict(instructions())["STOPSIGNAL"]))
        assert server.ended() == 0


@pytest.mark.long
def test_what_is_built_from_what_the_container_copies_runs(tmp_path: Path) -> None:
    """As its instructions say, but without a container: a wheel of the copied files, in an environment of its own."""
    source = tmp_path / "src"
    source.mkdir()
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            *sources, _ = rest.split()
            for each in sources:
                copy: Any = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
                copy(ROOT / each, source / each)
    venv.create(tmp_path / "venv", with_pip=True, system_site_packages=True)
    program = tmp_path / "venv" / "bin"
    subprocess.run([program / "pip", "install", "--quiet", source], check=True)
    done = subprocess.run([program / "agent-runtime", "serve", "--help"], capture_output=True, text=True, check=True)
    assert "--loop" in done.stdout


# --- alerts -----------------------------------------------------------------------------------------------------------


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((CONFIGS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_figure_that_is_watched_is_there(tmp_path: Path) -> None:
    with serving("--storage", f"sqlite:///{tmp_path}/sessions.db") as server:
        text = httpx.get(f"{server.url}/metrics").text
    there = set(re.findall(r"^([a-z_]+)(?:\{| )", text, re.MULTILINE))
    for rule in rules():
        named = set(re.findall(r"agent_runtime_\w+", rule["expr"]))
        assert named <= there, rule["alert"]
        for name, label, value in re.findall(r'(agent_runtime_\w+)\{(\w+)="(\w+)"\}', rule["expr"]):
            assert f'{name}{{{label}="{value}"}}' in text
    assert len(rules()) >= 10


def test_alerts_have_the_shape_that_prometheus_reads() -> None:
    """With promtool where it is there."""
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith((".", "?"))
        assert rule["expr"].count("(") == rule["expr"].count(")")
    if promtool := shutil.which("promtool"):
        command = [promtool, "check", "rules", str(CONFIGS / "alerts.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment({}), check=False)
        assert done.returncode == 0, done.stderr
