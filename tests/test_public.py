"""What users hold on to: names, signatures, errors, documents. What is written down is what there is."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal
from sqlalchemy import MetaData

import agent_runtime
from agent_runtime import BlockingRuntime, BlockingSessionHandle, Runtime, SessionHandle, blocking, errors
from agent_runtime.hookspecs import HookSpecs
from agent_runtime.quarantine import Quarantine
from agent_runtime_sql.tables import metadata
from agent_runtime_sqlite.settings import Settings
from places import in_file

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = ("core", "backends", "plugins")
FOLDERS = ("backends", "configs", "plugins", "tests")
DOCUMENTS = [
    "README.md",
    "CHANGELOG.md",
    *(f"{folder}/README.md" for folder in FOLDERS),
    "plugins/agent_runtime_codelab/README.md",
    "plugins/agent_runtime_http/README.md",
    "plugins/agent_runtime_metrics/README.md",
    "plugins/agent_runtime_opentelemetry/README.md",
    "plugins/agent_runtime_ratelimit/README.md",
]

PUBLIC = [
    "AgentContext",
    "AgentRuntimeError",
    "AgentSwitch",
    "Approval",
    "ApprovalDecided",
    "ApprovalNotFound",
    "BlockingRuntime",
    "BlockingSessionHandle",
    "Config",
    "ConfigError",
    "Document",
    "DrainIncomplete",
    "DurabilityNotReached",
    "IdempotencyConflict",
    "InvalidInput",
    "JournalCorrupt",
    "JournalError",
    "JournalFull",
    "JournalMismatch",
    "LeaseHeld",
    "LeaseLost",
    "Message",
    "NewMessage",
    "Overloaded",
    "Page",
    "PluginError",
    "PurgedSession",
    "Quarantined",
    "QuarantinedChange",
    "Runtime",
    "RuntimeClosed",
    "Session",
    "SessionExists",
    "SessionHandle",
    "SessionHeld",
    "SessionNotFound",
    "Status",
    "StorageError",
    "StorageFatal",
    "StorageUnavailable",
    "Watermarks",
    "hookimpl",
    "load_config",
    "open_runtime",
    "open_runtime_blocking",
]


def document(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of a document in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document(name), re.MULTILINE | re.DOTALL)


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_public_names_are_these() -> None:
    assert agent_runtime.__all__ == PUBLIC == sorted(PUBLIC)
    assert all(hasattr(agent_runtime, name) for name in PUBLIC)


@pytest.mark.parametrize(
    "name", ["storage", "rows", "changes", "hookspecs", "bridge", "formats", "keyed", "process", "testing"]
)
def test_the_modules_for_authors_of_plugins_say_what_is_in_them(name: str) -> None:
    assert re.search(rf"`(agent_runtime\.)?{name}`", agent_runtime.__doc__ or "")
    module = importlib.import_module(f"agent_runtime.{name}")
    assert module.__all__ == sorted(module.__all__, key=lambda each: (each.upper() != each, each[0].islower(), each))
    assert all(hasattr(module, each) for each in module.__all__)


def test_importing_it_imports_no_database_no_http_and_no_plugin() -> None:
    unwanted = {
        "agent_runtime_memory", "agent_runtime_sql", "agent_runtime_sqlite", "aiosqlite", "alembic", "asyncpg", "pytest",
        "rich", "sqlalchemy", "sqlite3", "starlette", "trio", "typer", "uvicorn",
    }  # fmt: skip
    program = f"""
        import sys
        import agent_runtime, agent_runtime.testing, agent_runtime.bridge, agent_runtime.keyed, agent_runtime.process
        found = {unwanted!r} & set(sys.modules)
        assert not found, found
        with agent_runtime.open_runtime_blocking("memory:") as runtime:
            runtime.create_session("s1")
        found = {unwanted - {"agent_runtime_memory", "agent_runtime_sqlite"}!r} & set(sys.modules)
        assert not found, found
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(program)], check=True, timeout=60)


# --- two APIs that are one --------------------------------------------------------------------------------------------

TWINS: list[tuple[type, type]] = [
    (SessionHandle, BlockingSessionHandle),
    (Runtime, BlockingRuntime),
    (Quarantine, blocking.BlockingQuarantine),
]
NO_TWIN = {"wait_fenced"}
"""A thread that waited for this could not be told that the runtime closes."""
WAYS = {"call", "call_async"}
"""How to get at the runtime from other threads, and other event loops."""


def calls_of(owner: type) -> dict[str, Callable[..., Any]]:
    """The public methods, and what is behind the public properties."""
    members = {name: getattr(member, "fget", member) for name, member in vars(owner).items()}
    return {name: member for name, member in members.items() if inspect.isfunction(member) and name[0] != "_"}


def without_await(annotation: str) -> str:
    """An annotation as it is for threads."""
    for name in ("SessionHandle", "Runtime", "Quarantine"):
        annotation = re.sub(rf"\b{name}\b", f"Blocking{name}", annotation)
    return annotation.replace("AsyncIterator[", "Iterator[")


@pytest.mark.parametrize(("ours", "theirs"), TWINS)
def test_threads_have_the_same_calls(ours: type, theirs: type) -> None:
    calls, blocking_calls = calls_of(ours), {name: call for name, call in calls_of(theirs).items() if name not in WAYS}
    public = {name for name in vars(ours) if name[0] != "_"} - NO_TWIN - {"restore"}
    assert {name for name in vars(theirs) if name[0] != "_"} - WAYS == public
    for name, call in blocking_calls.items():
        signature, expected = inspect.signature(call), inspect.signature(calls[name])
        assert list(signature.parameters.values()) == list(expected.parameters.values()), name
        assert signature.return_annotation == without_await(expected.return_annotation), name
        assert isinstance(vars(ours)[name], property) == isinstance(vars(theirs)[name], property)


def test_threads_open_a_runtime_in_the_same_way() -> None:
    signature = inspect.signature(agent_runtime.open_runtime_blocking)
    expected = inspect.signature(agent_runtime.open_runtime)
    assert [*expected.parameters.values()] == [each for name, each in signature.parameters.items() if name != "loop"]
    assert signature.return_annotation == without_await(expected.return_annotation)


class Spy:
    """Takes every call, and keeps its arguments."""

    session_id, incarnation, created, config, plugins = "s1", "i1", True, object(), object()

    def __init__(self) -> None:
        self.called: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: object, **kwargs: object) -> object:
            self.called.append((name, args, kwargs))
            return self if name.endswith("session") else name

        return call


@pytest.mark.parametrize(("ours", "theirs"), TWINS)
def test_threads_hand_every_argument_over(ours: type, theirs: type) -> None:
    properties = {name for name, member in vars(ours).items() if isinstance(member, property)}
    spy = Spy()
    with start_blocking_portal() as portal:
        target = theirs(spy, blocking._Loop(portal))
        for name, call in calls_of(ours).items():
            if name in NO_TWIN | properties | {"restore", "status"} or name.startswith("scan_"):
                continue
            given = {parameter: object() for parameter in inspect.signature(call).parameters if parameter != "self"}
            result = getattr(target, name)(**given)
            called, args, kwargs = spy.called.pop()
            assert called == name
            assert inspect.signature(call).bind(None, *args, **kwargs).arguments == {"self": None, **given}, name
            if name.endswith("session"):
                assert (type(result), result.session_id, result.incarnation) == (BlockingSessionHandle, "s1", "i1")
            else:
                assert result in (name, None)


# --- errors -----------------------------------------------------------------------------------------------------------


def drawn_tree(drawing: str) -> dict[str, str]:
    """Each error of the drawing with the one above it."""
    above: dict[str, str] = {}
    path: list[str] = []
    for line in drawing.splitlines():
        if found := re.match(r"    ([│├└─ ]*)([A-Z]\w+)", line):
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            above[found[2]] = path[depth - 1] if depth else "Exception"
    return above


def public_parent(error: type) -> str:
    parent = error.__mro__[1]
    return public_parent(parent) if parent.__name__.startswith("_") else parent.__name__


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    found = {name: public_parent(getattr(errors, name)) for name in errors.__all__}
    assert drawn_tree(errors.__doc__ or "") == found
    assert found["AgentRuntimeError"] == "Exception"


def test_users_can_import_every_error_that_they_can_meet() -> None:
    between_storage_and_scheduler = {"ChangeRejected", "SequenceMismatch"}
    assert set(errors.__all__) - set(PUBLIC) == between_storage_and_scheduler


# --- docstrings -------------------------------------------------------------------------------------------------------


def modules() -> Iterator[Path]:
    for folder in SOURCE_ROOTS:
        yield from sorted(ROOT.joinpath(folder).rglob("*.py"))


def declarations(path: Path) -> Iterator[tuple[str, str | None, list[str]]]:
    """Every public class, function and method: its name, its docstring, and the bases of its class."""

    def walk(body: list[ast.stmt], prefix: str, bases: list[str]) -> Iterator[tuple[str, str | None, list[str]]]:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
                yield f"{prefix}{node.name}", ast.get_docstring(node), bases
                if isinstance(node, ast.ClassDef):
                    yield from walk(node.body, f"{node.name}.", [ast.unparse(base) for base in node.bases])

    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield "", ast.get_docstring(tree), []
    yield from walk(tree.body, "", [])


def test_everything_public_says_what_it_does() -> None:
    found = [(path, *each) for path in modules() for each in declarations(path)]
    documented = {name for _, name, text, _ in found if text}
    methods = {name.partition(".")[2] for name in documented if "." in name}
    beside = {(path, name.partition(".")[2]) for path, name, text, _ in found if text and "." in name}
    missing = []
    for path, name, text, bases in found:
        owner, _, method = name.partition(".")
        twin = f"{owner.removeprefix('Blocking')}.{method}"
        if twin.startswith("Session."):
            twin = f"SessionHandle.{method}"
        implements = path.parts[-2].startswith(("agent_runtime_", "testing", "journal", "keyed")) and method in methods
        overrides = bool(bases) and (path, method) in beside
        library = any(base.startswith("TypeDecorator") for base in bases)  # what its methods do is said there
        migration = "versions" in path.parts and name == "upgrade"
        test = "kit" in path.parts and (method or name).startswith(("test_", "Test"))  # its name is a sentence
        if not (
            text or (twin != name and twin in documented) or implements or overrides or library or migration or test
        ):
            missing.append(f"{path.relative_to(ROOT)}: {name or 'the module'}")
    assert missing == []
    assert len(found) > 300


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = document(name)
    here = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (here / target).exists(), target
    for path in re.findall(r"`((?:tests|configs|core|backends|plugins)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def run_as_module(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, f"{name}.py", "exec", dont_inherit=True), vars(module))
    return module


def test_the_readme_s_program_runs(
    anyio_backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [program] = [block for block in blocks("README.md", "python") if "anyio.run(main)" in block]
    assert program.count("anyio.run(main)") == 1
    program = program.replace("anyio.run(main)", f"anyio.run(main, backend={anyio_backend!r})")
    monkeypatch.chdir(tmp_path)
    for run in (1, 2):
        run_as_module("readme", program, monkeypatch)
        printed = capsys.readouterr().out.splitlines()
        assert printed[0] == "system You are a travel agent."
        assert (
            printed[1:]
            == [
                "user Find me a train to Porto.",
                "assistant None",
                'tool {"departs":"09:30"}',
                "assistant There is one at 09:30.",
            ]
            * run
        )
    assert (tmp_path / "data" / "agent_runtime.db").exists()


def hooks() -> list[str]:
    return [name for name, member in vars(HookSpecs).items() if inspect.isfunction(member)]


def test_every_hook_has_a_section_with_its_signature_and_an_example() -> None:
    sections = dict(
        re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", document("plugins/README.md"), re.MULTILINE | re.DOTALL)
    )
    assert list(sections) == hooks()
    for hook, text in sections.items():
        parameters = [name for name in inspect.signature(getattr(HookSpecs, hook)).parameters if name != "self"]
        [implementation] = [
            node
            for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.FunctionDef) and node.name == hook
        ]
        assert [argument.arg for argument in implementation.args.args] == parameters
        assert [ast.unparse(each) for each in implementation.decorator_list] == ["hookimpl"]


def test_the_example_plugin_does_what_it_says(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "\n".join(blocks("plugins/README.md", "python"))
    example = run_as_module("house_rules", source, monkeypatch)
    example.main(anyio_backend)
    printed = capsys.readouterr().out
    [expected] = blocks("plugins/README.md", "text")
    assert printed == expected


def documented_tables(text: str) -> dict[str, list[str]]:
    """The tables that a document describes, with their columns: the rows `| table | columns | … |`."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE)
    return {name: re.findall(r"`(\w+)`", columns) for name, columns in rows if name in metadata.tables}


def test_the_tables_of_a_file_are_described_as_they_are() -> None:
    tables: MetaData = metadata
    assert documented_tables(document("backends/README.md")) == {
        name: [column.name for column in table.columns] for name, table in tables.tables.items()
    }


def test_the_options_of_sqlite_are_described() -> None:
    options = dict(re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|", document("backends/README.md"), re.MULTILINE))
    fields = {
        name: str(default)
        for name, default in zip(Settings.__struct_fields__[1:], Settings.__struct_defaults__, strict=True)
    }
    assert options == fields


def test_the_queries_of_the_documents_run(tmp_path: Path, anyio_backend: Any) -> None:
    import sqlite3  # the runtime's own connections go through SQLAlchemy; a person's do not

    place = in_file(tmp_path)
    with place.open_blocking(loop=anyio_backend) as runtime:
        session = runtime.create_session("s1", user_id="ada", system_prompt="Be kind.")
        session.append("user", "hi")
        session.append("assistant", tool_calls=[{"id": "c", "function": {"name": "f"}}])
        session.switch_agent("coder", reason="why")
        session.put_document("notes", "k", {"a": 1})
    queries = [query for block in blocks("backends/README.md", "sql") for query in block.split(";") if query.strip()]
    assert len(queries) >= 3
    connection = sqlite3.connect(place.path)
    try:
        for query in queries:
            assert connection.execute(query).fetchall(), query
    finally:
        connection.close()


def test_every_file_of_tests_and_every_promise_stands_in_their_document() -> None:
    text = document("tests/README.md")
    named = set(re.findall(r"`(test_\w+\.py)`", text))
    assert named == {path.name for path in Path(__file__).parent.glob("test_*.py")}
    promises = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert promises == [str(number) for number in range(1, 14)]
    markers = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert markers
    for marker in markers:
        assert f"`{marker}`" in text
