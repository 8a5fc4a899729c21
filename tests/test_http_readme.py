"""What is said of the HTTP surface is so: the README's conversation, tables of endpoints, errors and options, hooks."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from agent_runtime.cli import exits
from agent_runtime_http.application import OPERATIONS
from agent_runtime_http.commands import serve
from agent_runtime_http.engines import GRACE_S
from agent_runtime_http.hookspecs import HttpHookSpecs
from agent_runtime_http.problems import FAILURES, REFUSALS
from http_rig import App, opened, run, serving

ROOT = Path(__file__).parent.parent
DOCUMENT = "plugins/agent_runtime_http/README.md"
SHOWN = "http://127.0.0.1:8001"


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the tables in the section under a heading, without the heads."""
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- the conversation of the README -----------------------------------------------------------------------------------


CURL = shutil.which("curl") or f"{sys.executable} {Path(__file__).parent / 'http_curl.py'}"
"""Curl, or where there is none, what can do as much of it as the README asks for."""


def test_the_conversation_of_the_readme(tmp_path: Path) -> None:
    text = text_of("README.md").split("\n## Try it\n")[1].split("\n## ")[0]
    first, conversation, _ = blocks(text, "sh")
    assert first.endswith("agent-runtime serve\n")
    [announced], [history], [program] = blocks(text, "text"), blocks(text, "json"), blocks(text, "python")
    storage = f"sqlite:///{tmp_path / 'agent_runtime.db'}"
    with serving("--storage", storage) as server:
        shown = [line.replace(server.url, SHOWN).replace(str(tmp_path), "data") for line in server.output]
        assert announced.splitlines() == shown
        script = conversation.replace(SHOWN, server.url).replace("curl ", f"{CURL} --silent --show-error --fail ")
        assert script.count(server.url) == 3
        asked = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, timeout=30)
        assert (asked.returncode, asked.stderr) == (0, "")
        assert asked.stdout.endswith("}" + history.strip())
        went_on = subprocess.run(
            [sys.executable, "-c", program.replace(SHOWN, server.url)], capture_output=True, text=True, timeout=30
        )
        assert (went_on.returncode, went_on.stderr) == (0, "")
        assert went_on.stdout.splitlines() == [
            "system You are a travel agent.",
            "user Find me a train to Porto.",
            "assistant None",
            'tool {"departs":"09:30"}',
            "assistant There is one at 09:30.",
        ]
        [command] = re.findall(r"`\.venv/bin/agent-runtime (sessions show \w+)`", text)
        running = run(*command.split(), "--storage", storage).stdout
        assert "There is one at 09:30." in running
    assert run(*command.split(), "--storage", storage).stdout == running


# --- tables -----------------------------------------------------------------------------------------------------------


def test_every_endpoint_stands_in_its_table_with_its_parameters() -> None:
    described = {quoted(request)[0]: quoted(query) for request, query, *_ in rows(text_of(DOCUMENT), "Endpoints")[1:]}
    assert described == {
        f"{method} {path}": list(operation.parameters)
        for path, operations in OPERATIONS.items()
        for method, operation in operations.items()
    }


def test_every_error_stands_in_its_table() -> None:
    described = {
        quoted(slug)[0]: (int(status), "`Retry-After`" in when)
        for status, slug, when in rows(text_of(DOCUMENT), "Errors")[1:]
    }
    kinds = {*REFUSALS.values(), *FAILURES.values()}
    assert described == {kind.slug: (kind.status, kind.again) for kind in kinds} | {"internal-error": (500, False)}


@pytest.mark.anyio
async def test_the_problem_that_is_shown_is_answered() -> None:
    [shown] = blocks(text_of(DOCUMENT), "json")
    async with opened() as app:
        await app("PUT", "/v1/sessions/s1")
        assert (await app("POST", "/v1/sessions/s1/messages", {"role": "robot"})).json == json.loads(shown)


def test_every_option_and_exit_code_of_serve_stands_there() -> None:
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    section = rows(text_of(DOCUMENT), "`agent-runtime serve`")
    options = [name for cells in section for name in quoted(cells[0])]
    assert options == [name for option in typer.main.get_command(app).params for name in option.opts]
    codes = [int(cells[0]) for cells in section if cells[0].isdigit()]
    assert codes == [0, exits.FAILED, exits.USAGE, exits.HELD, exits.LEFT]
    assert f"requests under way {GRACE_S} seconds" in text_of(DOCUMENT)


# --- hooks, and other applications ------------------------------------------------------------------------------------


def test_every_hook_has_a_section_with_its_signature_in_its_example() -> None:
    sections = re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", text_of(DOCUMENT), re.MULTILINE | re.DOTALL)
    hooks = [name for name, member in vars(HttpHookSpecs).items() if inspect.isfunction(member)]
    assert [name for name, _ in sections] == hooks
    for name, section in sections:
        parameters = [each for each in inspect.signature(getattr(HttpHookSpecs, name)).parameters if each != "self"]
        [given] = re.findall(rf"^@hookimpl\ndef {name}\((.*)\) ->", section, re.MULTILINE)
        assert re.findall(r"(\w+):", given) == parameters


def module(name: str, sources: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile("\n".join(sources), f"{name}.py", "exec", dont_inherit=True), vars(made))
    return made


@pytest.fixture
def examples() -> list[str]:
    """The Python of the document: a plugin in pieces, then an application."""
    found = blocks(text_of(DOCUMENT), "python")
    assert len(found) == 5
    return found


@pytest.mark.anyio
async def test_the_example_plugin_does_what_it_says(examples: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(plugins=[module("front_desk", examples[:4], monkeypatch)]) as app:
        known = {"authorization": "Bearer correct horse"}
        for headers in ({}, {"authorization": "Bearer wrong"}):
            refused = await app("GET", "/v1/sessions", headers=headers)
            assert (refused.status, refused.json["detail"]) == (401, "send your key as a bearer token")
        for session_id, user_id in (("s1", "ada"), ("s2", "bob")):
            await app("PUT", f"/v1/sessions/{session_id}", {"user_id": user_id}, headers=known)
        mine = await app("GET", "/mine", headers=known)
        assert mine.json == ["s1"]
        assert 0 < float(mine.headers["x-took-s"]) < 10
        service: Any = app.app
        service.state.service.stop()
        assert (await app("GET", "/ticks", headers=known)).body == b""


@pytest.mark.anyio
async def test_the_example_application_serves_sessions(
    examples: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = module("main", examples[4:], monkeypatch).app
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        assert (await App(app, root="/agents")("PUT", "/v1/sessions/s1")).status == 201
        assert (await App(app)("GET", "/sessions/count")).json == 1
    assert (tmp_path / "data" / "agent_runtime.db").exists()
