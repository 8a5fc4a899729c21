"""The plugin manager, with real distributions: a module and its metadata in a directory on the path."""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import pytest
import typer

from agent_runtime import open_runtime
from agent_runtime.changes import Batch, Change, Receipt
from agent_runtime.errors import ConfigError, InvalidInput, PluginError
from agent_runtime.hookspecs import HookSpecs, hookimpl
from agent_runtime.plugins import CheckedFactory, PluginManager
from agent_runtime.records import NewMessage
from agent_runtime.storage import Storage, StorageConfig, StorageFactory

MESSAGE = NewMessage(role="user", content="a secret")
RECEIPT = Receipt(after=0, last=1, changes=1, sessions=1, messages=1, rows=1)
BATCH = Batch(after=0, last=1, changes=1, sessions=1)
STORAGES = """
from agent_runtime.hookspecs import hookimpl

@hookimpl
def agent_runtime_storages():
    return {SCHEMES}
"""


class Install(Protocol):
    def __call__(self, name: str, source: str, *, plugin: str | None = None, value: str | None = None) -> None: ...


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution of one module, with one entry point (`plugin`, by default named as the distribution)."""
    modules = []

    def install(name: str, source: str, *, plugin: str | None = None, value: str | None = None) -> None:
        root = tmp_path / name
        metadata = root / f"{name}-1.5.dist-info"
        metadata.mkdir(parents=True)
        (root / f"{name}_module.py").write_text(source)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (metadata / "entry_points.txt").write_text(f"[agent_runtime]\n{plugin or name} = {value or f'{name}_module'}\n")
        monkeypatch.syspath_prepend(str(root))
        modules.append(f"{name}_module")

    yield install
    for module in modules:
        sys.modules.pop(module, None)


def storing(*schemes: str) -> str:
    return STORAGES.replace("{SCHEMES}", repr(dict.fromkeys(schemes, print)).replace(repr(print), "print"))


def loaded(*extra: object) -> PluginManager:
    manager = PluginManager()
    manager.load(extra)
    return manager


def refused(*extra: object) -> PluginError:
    with pytest.raises(PluginError) as caught:
        loaded(*extra)
    assert "\n" not in str(caught.value)
    return caught.value


def none() -> dict[str, StorageFactory]:
    return {}


def plugin(**hooks: Callable[..., object]) -> object:
    """A plugin object of some hooks, named without their prefix."""
    namespace = type("Plugin", (), {})()
    for hook, function in hooks.items():
        setattr(namespace, f"agent_runtime_{hook}", hookimpl(function))
    return namespace


# -- loading ----------------------------------------------------------------------------------------------------------


def test_plugins_load_by_name_then_by_hand_and_are_described(install: Install) -> None:
    install("zoo", storing("zoo"))
    install("ant", storing("ant"), value="ant_module")

    class Hands:
        __version__ = "7"

        @hookimpl
        def agent_runtime_commands(self, app: typer.Typer) -> None: ...

        @hookimpl
        def agent_runtime_batch_stored(self) -> None: ...

    manager = PluginManager(disabled=["off"])
    install("off", "raise RuntimeError('a disabled plugin is not even imported')")
    manager.load([Hands(), ("named", plugin(storages=none))])
    infos = [info for info in manager.describe() if info.name in ("zoo", "ant", "off", "Hands", "named")]
    assert [(i.name, i.origin, i.version, i.module, i.hooks, i.disabled) for i in infos] == [
        ("ant", "ant", "1.5", "ant_module", ["agent_runtime_storages"], False),
        ("off", "off", "1.5", "off_module", [], True),
        ("zoo", "zoo", "1.5", "zoo_module", ["agent_runtime_storages"], False),
        ("Hands", "by hand", "7", __name__, ["agent_runtime_batch_stored", "agent_runtime_commands"], False),
        ("named", "by hand", None, __name__, ["agent_runtime_storages"], False),
    ]
    assert {"zoo", "ant"} <= manager.storages().keys()


def test_a_plugin_may_be_an_object_in_a_module(install: Install) -> None:
    source = """
from agent_runtime.hookspecs import hookimpl

class Plugin:
    @hookimpl
    def agent_runtime_storages(self):
        return {"deep": print}

it = Plugin()
"""
    install("deep", source, value="deep_module:it")
    assert "deep" in loaded().storages()


def test_managers_share_nothing(install: Install) -> None:
    install("shared", storing("shared"))
    by_hand = plugin(storages=lambda: {"hand": print})
    assert "hand" in loaded(by_hand).storages()
    assert "hand" not in loaded().storages()
    assert "shared" in loaded(by_hand).storages()


@pytest.mark.parametrize(
    ("source", "value", "expected"),
    [
        ("import no_such_module", "bad_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("", "no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("", "bad_module:it", "AttributeError: module 'bad_module' has no attribute 'it'"),
        ("raise SystemExit('lines\\n  of text')", "bad_module", "SystemExit: lines of text"),
        (
            "it = None",
            "bad_module:it",
            "it has no hooks; a plugin is a module or an object with functions marked @hookimpl",
        ),
        ("class It: ...", "bad_module:It", "TypeError: it is a class; register an instance of it, or its module"),
        (
            "def agent_runtime_commands(app): ...",
            "bad_module",
            "it is not marked with @hookimpl",
        ),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_loaded_is_named(install: Install, source: str, value: str, expected: str) -> None:
    install("bad", source, value=value)
    error = refused()
    assert error.plugin == "bad"
    assert str(error).endswith(f": (bad 1.5, {value}) {expected}; disable it with plugins.disabled: [bad]")


@pytest.mark.parametrize(
    ("source", "hook", "expected"),
    [
        (
            "def agent_runtime_batch_store(receipt): ...",
            "agent_runtime_batch_store",
            "there is no such hook; did you mean agent_runtime_batch_stored?",
        ),
        (
            "async def agent_runtime_batch_stored(receipt): ...",
            "agent_runtime_batch_stored",
            "it is async; hooks are synchronous, and return what is awaited",
        ),
        (
            "async def agent_runtime_lifespan(runtime): yield",
            "agent_runtime_lifespan",
            "it is async; hooks are synchronous, and return what is awaited",
        ),
        (
            "def agent_runtime_commands(app): yield",
            "agent_runtime_commands",
            "it yields; hooks are plain functions, never wrappers",
        ),
    ],
)
def test_a_hook_that_would_never_work_is_refused(install: Install, source: str, hook: str, expected: str) -> None:
    able = ("batch_stored", "lifespan", "commands")
    hooks = "".join(f"@hookimpl\ndef agent_runtime_{name}(): ...\n" for name in able)
    install("able", f"from agent_runtime.hookspecs import hookimpl\n{hooks}")
    install("bad", f"from agent_runtime.hookspecs import hookimpl\n@hookimpl\n{source}\n")
    error = refused()
    assert (error.plugin, error.hook) == ("bad", hook)
    assert f"{expected}; disable it" in str(error)


def test_a_wrapper_is_refused() -> None:
    class Wrapper:
        @hookimpl(wrapper=True)
        def agent_runtime_commands(self, app: typer.Typer) -> Iterator[None]:
            return (yield)

    assert "it yields; hooks are plain functions, never wrappers" in str(refused(Wrapper()))


def test_an_unknown_optional_hook_is_let_pass() -> None:
    class Optional:
        @hookimpl(optionalhook=True)
        def agent_runtime_http_routes(self) -> None: ...

    [info] = [info for info in loaded(Optional()).describe() if info.name == "Optional"]
    assert info.hooks == ["agent_runtime_http_routes"]


def test_a_wrong_argument_is_refused(install: Install) -> None:
    hook = "@hookimpl\ndef agent_runtime_before_append(session, message): ..."
    install("bad", f"from agent_runtime.hookspecs import hookimpl\n{hook}")
    error = refused()
    assert error.plugin == "bad"
    assert "agent_runtime_before_append" in str(error)
    assert "{'session'}" in str(error)


def test_two_distributions_with_one_name(install: Install) -> None:
    install("one", storing("one"), plugin="same")
    install("two", storing("two"), plugin="same")
    error = refused()
    assert error.plugin == "same"
    assert "one 1.5, one_module" in str(error)
    assert "two 1.5, two_module" in str(error)
    manager = PluginManager(disabled=["same"])
    manager.load()
    assert not {"one", "two"} & manager.storages().keys()


def test_one_name_twice_by_hand_and_one_object_twice() -> None:
    first, second = plugin(storages=none), plugin(storages=none)
    assert "hand one in under another name as (name, object)" in str(refused(first, second))
    assert loaded(first, ("other", second)).describe()[-1].name == "other"
    assert "it is registered already, as 'Plugin'" in str(refused(first, ("other", first)))


def test_only_plugins_that_exist_can_be_disabled(install: Install) -> None:
    install("meters", storing("meters"))
    with pytest.raises(ConfigError) as caught:
        PluginManager(disabled=["meterz", "hand"]).load([("hand", plugin(storages=none))])
    assert caught.value.problems == ("plugins.disabled: there is no plugin 'meterz'; did you mean meters?",)
    manager = PluginManager(disabled=["hand"])
    manager.load([("hand", plugin(storages=lambda: {"hand": print}))])
    assert "hand" not in manager.storages()


# -- storages ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def factory(config: StorageConfig) -> AsyncIterator[Storage]:
    yield cast("Storage", config)


def test_storage_for_a_url() -> None:
    manager = loaded(plugin(storages=lambda: {"demo": factory, "demo+driver": print}))

    def found(url: str) -> object:
        return cast("CheckedFactory", manager.storage_for(url)).function

    assert found("demo:") is factory
    assert found("DEMO://h:5/x") is factory
    assert found("demo+driver:///x") is cast("StorageFactory", print)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("dema:///x", r"no plugin stores under 'dema'; there are: .*demo.*; did you mean demo\?$"),
        ("ftp://me:hunter2@h", r"no plugin stores under 'ftp'; there are: .*demo[^;]*$"),
        ("data/x.db", r"is not a URL; a SQLite file is written as sqlite:///data/x\.db$"),
        ("/srv/x.db", r"is not a URL; a SQLite file is written as sqlite:////srv/x\.db$"),
        ("data/x:y.db", r"is not a URL$"),
        ("password=hunter2", r"is not a URL$"),
        ("", r"is not a URL$"),
    ],
)
def test_a_url_that_nobody_stores_under(url: str, expected: str) -> None:
    with pytest.raises(InvalidInput, match=rf"^storage\.url: {expected}") as caught:
        loaded(plugin(storages=lambda: {"demo": factory})).storage_for(url)
    assert "hunter2" not in str(caught.value)


def fail(*_: object) -> object:
    raise ZeroDivisionError("what\nit says")


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        (lambda: None, "returned None, not a mapping of scheme to factory"),
        (lambda: ["x"], "returned a list, not a mapping of scheme to factory"),
        (lambda: {"X:": factory}, "'X:' is not a URL scheme (lower case) with a callable factory"),
        (lambda: {"x": 5}, "'x' is not a URL scheme (lower case) with a callable factory"),
        (lambda: {5: factory}, "5 is not a URL scheme (lower case) with a callable factory"),
        (lambda: {"demo": factory}, "stores under 'demo', as 'first' does; disable one of the two"),
        (lambda: fail(), "ZeroDivisionError at "),
    ],
)
def test_storages_that_are_none(hook: Callable[[], Mapping[str, object]], expected: str) -> None:
    manager = loaded(("first", plugin(storages=lambda: {"demo": factory})), ("second", plugin(storages=hook)))
    with pytest.raises(PluginError) as caught:
        manager.storages()
    assert (caught.value.plugin, caught.value.hook) == ("second", "agent_runtime_storages")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# -- commands, lifespans ----------------------------------------------------------------------------------------------


def test_commands() -> None:
    def add(app: typer.Typer) -> None:
        app.command("demo")(lambda: None)

    app = typer.Typer()
    loaded(plugin(commands=add)).commands(app)
    assert "demo" in [command.name for command in app.registered_commands]
    with pytest.raises(
        PluginError, match=r"^plugin 'Plugin', hook agent_runtime_commands: .*: what it says$"
    ) as caught:
        loaded(plugin(commands=lambda app: fail(app))).commands(app)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_lifespans() -> None:
    runtime: Any = object()
    entered: list[object] = []

    @asynccontextmanager
    async def lifespan(runtime: object) -> AsyncIterator[None]:
        entered.append(runtime)
        yield

    def nothing(runtime: object) -> None: ...

    first = ("first", plugin(lifespan=lambda runtime: lifespan(runtime)))
    second = ("second", plugin(lifespan=nothing))
    third = ("third", plugin(lifespan=lambda runtime: lifespan(runtime)))
    lifespans = loaded(first, second, third).lifespans(runtime)
    assert [name for name, _ in lifespans if name in ("first", "second", "third")] == ["first", "third"]
    assert all(isinstance(manager, AbstractAsyncContextManager) for _, manager in lifespans)
    assert not entered
    with pytest.raises(PluginError, match=r"'wrong'.*returned a str, not an async context manager or None"):
        loaded(("wrong", plugin(lifespan=lambda runtime: str(runtime)))).lifespans(runtime)
    with pytest.raises(PluginError, match=r"'wrong'.*ZeroDivisionError"):
        loaded(("wrong", plugin(lifespan=lambda runtime: fail(runtime)))).lifespans(runtime)


# -- before_append ----------------------------------------------------------------------------------------------------


def add(text: str) -> Callable[[str, NewMessage], NewMessage]:
    return lambda session_id, message: NewMessage(role=message.role, content=f"{message.content}{session_id}{text}")


def test_messages_pass_from_plugin_to_plugin() -> None:
    class Last:
        @hookimpl(trylast=True)
        def agent_runtime_before_append(self, message: NewMessage) -> NewMessage:
            return NewMessage(role="user", content=f"{message.content}|last")

    class First:
        @hookimpl(tryfirst=True)
        def agent_runtime_before_append(self, session_id: str) -> NewMessage | None:
            seen.append(session_id)
            return None

    seen: list[str] = []
    manager = loaded(
        Last(), ("z", plugin(before_append=add("z"))), ("a", plugin(before_append=add("a"))), ("first", First())
    )
    assert manager.appending
    assert manager.before_append("s", MESSAGE).content == "a secretszsa|last"
    assert seen == ["s"]


def test_without_such_plugins_nothing_is_called() -> None:
    manager = loaded(plugin(storages=none))
    assert not manager.appending
    assert manager.before_append("s", MESSAGE) is MESSAGE


def test_a_message_may_be_refused() -> None:
    refusal = InvalidInput("content", "too rude")

    def refuse(message: NewMessage) -> NewMessage:
        raise refusal

    with pytest.raises(InvalidInput) as caught:
        loaded(plugin(before_append=refuse)).before_append("s", MESSAGE)
    assert caught.value is refusal


def test_a_failure_before_an_append_is_named_without_the_message() -> None:
    def trip(message: NewMessage) -> NewMessage:
        raise ValueError(message.content)

    with pytest.raises(PluginError) as caught:
        loaded(("tripping", plugin(before_append=trip))).before_append("s", MESSAGE)
    assert (caught.value.plugin, caught.value.hook) == ("tripping", "agent_runtime_before_append")
    assert f"ValueError at {__file__}:{trip.__code__.co_firstlineno + 1}" in str(caught.value)
    assert "secret" not in str(caught.value)
    with pytest.raises(PluginError, match="returned a dict, not a NewMessage or None") as caught:
        loaded(plugin(before_append=lambda message: {"content": message.content})).before_append("s", MESSAGE)
    assert "secret" not in str(caught.value)


BAD = NewMessage(role="user", content="\ud800")


@pytest.mark.anyio
async def test_what_plugins_make_of_a_message_passes_the_door_last() -> None:
    """One message that a database would refuse would take a whole batch with it."""
    async with open_runtime("memory:", plugins=[plugin(before_append=lambda message: BAD)]) as runtime:
        with pytest.raises(InvalidInput, match=r"^system_prompt\.content: must not contain lone surrogates"):
            await runtime.create_session("s", system_prompt="hi")
        session = await runtime.create_session("s")
        for append, path in (
            (session.append("user", "hi"), "content"),
            (session.append_message({"role": "user"}), "content"),
            (session.append_json({"role": "user"}), "content"),
            (session.append_tool_result("c", "f", 1), "content"),
            (session.append_many([{"role": "user"}]), r"messages\[0\].content"),
        ):
            with pytest.raises(InvalidInput, match=f"^{path}: must not contain lone surrogates"):
                await append
        assert runtime.watermarks.accepted == 1


# -- observers --------------------------------------------------------------------------------------------------------

NOTES: list[tuple[str, Callable[[PluginManager], None]]] = [
    ("batch_stored", lambda manager: manager.batch_stored(RECEIPT)),
    ("flush_failed", lambda manager: manager.flush_failed(BATCH, OSError(), 3)),
    ("change_quarantined", lambda manager: manager.change_quarantined(cast("Change", "change"), OSError())),
]


@pytest.mark.parametrize(("hook", "tell"), NOTES, ids=[name for name, _ in NOTES])
def test_an_observer_that_raises_is_switched_off_for_that_hook_only(
    caplog: pytest.LogCaptureFixture, hook: str, tell: Callable[[PluginManager], None]
) -> None:
    calls: list[str] = []

    class Failing:
        @hookimpl
        def agent_runtime_batch_stored(self, receipt: object) -> None:
            self.fail("batch_stored")

        @hookimpl
        def agent_runtime_flush_failed(self, batch: object, error: object, attempt: object) -> None:
            assert attempt == 3
            self.fail("flush_failed")

        @hookimpl
        def agent_runtime_change_quarantined(self, change: object, error: object) -> None:
            assert change == "change"
            self.fail("change_quarantined")

        def fail(self, called: str) -> None:
            calls.append(f"failing {called}")
            raise ValueError("a secret")

    others = [(name, plugin(**{hook: lambda name=name: calls.append(name)})) for name in ("before", "after")]
    manager = loaded(others[0], Failing(), others[1])
    with caplog.at_level(logging.INFO, logger="agent_runtime"):
        tell(manager)
        tell(manager)
    assert calls == ["before", f"failing {hook}", "after", "before", "after"]
    [record] = caplog.records
    assert (record.name, record.levelno) == ("agent_runtime", logging.ERROR)
    for part in ("'Failing'", f"agent_runtime_{hook}", "ValueError at ", __file__, "it is not called again"):
        assert part in record.getMessage()
    assert "secret" not in caplog.text
    # The other hooks of the plugin go on.
    calls.clear()
    for other, tell_other in NOTES:
        if other != hook:
            tell_other(manager)
            assert calls.pop() == f"failing {other}"


def test_observers_are_given_what_happened() -> None:
    seen: list[object] = []
    manager = loaded(plugin(batch_stored=lambda receipt: seen.append(receipt)))
    manager.batch_stored(RECEIPT)
    assert seen == [RECEIPT]


def test_what_ends_the_process_is_not_held_up() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    manager = loaded(plugin(batch_stored=interrupt))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            manager.batch_stored(RECEIPT)


def test_every_hook_has_a_typed_call() -> None:
    hooks = [name.removeprefix("agent_runtime_") for name in vars(HookSpecs) if name.startswith("agent_runtime_")]
    calls = {"lifespan": "lifespans"}
    assert [hook for hook in hooks if not hasattr(PluginManager, calls.get(hook, hook))] == []
