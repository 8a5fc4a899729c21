"""The typed plugin manager: one a runtime, made when a runtime opens; nothing happens at import.

Owns which plugins there are and how their hooks are called. Whatever a plugin does wrong, at load or in a hook, is
raised as a PluginError that names it. Hooks are called in the order of registration: entry points by name, then what
was handed in, as handed in (pluggy's `tryfirst` and `trylast` move one to either end). Observers are different: they
never make a caller fail; one that raises is logged by name and switched off.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import logging
import re
import traceback
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import pluggy

from .changes import Batch, Change, Receipt
from .client import ClientFactory
from .config import did_you_mean
from .errors import ConfigError, InvalidInput, PluginError
from .formats import ImportFormat
from .hookspecs import PROJECT, HookSpecs
from .records import Durability, NewMessage
from .storage import LeaseDesk, Storage, StorageConfig, StorageFactory

if TYPE_CHECKING:
    import typer

    from .runtime import Runtime

__all__ = ["ENTRY_POINTS", "HookCall", "PluginInfo", "PluginManager", "raised"]

ENTRY_POINTS: Final = "agent_runtime"
"""The group of entry points in which plugins register."""

BY_HAND: Final = "by hand"
_STORAGES: Final = "agent_runtime_storages"
_APPENDED: Final = "agent_runtime_appended"
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*")
_log: Final = logging.getLogger("agent_runtime")


class PluginInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a plugin. `origin` is the distribution that brings it, or "by hand"."""

    name: str
    version: str | None
    origin: str
    module: str
    hooks: list[str]
    disabled: bool


class _Source(NamedTuple):
    """A plugin that is to be loaded. `described` says in a message where it comes from."""

    name: str
    origin: str
    version: str | None
    module: str
    described: str
    load: Callable[[], object]

    def refused(self, hook: str | None, problem: str) -> PluginError:
        way_out = f"; disable it with plugins.disabled: [{self.name}]" if self.origin != BY_HAND else ""
        return PluginError(self.name, hook, f"({self.described}) {problem}{way_out}")

    def invalid(self, error: pluggy.PluginValidationError) -> PluginError:
        # The first line of several says "Plugin …", as ours will.
        return self.refused(None, "; ".join(str(error).splitlines()[1:]))


class HookCall(NamedTuple):
    """One plugin's implementation of one hook. Called with the arguments by name, it takes those that it wants."""

    plugin: str
    function: Callable[..., Any]
    argnames: tuple[str, ...]

    def __call__(self, arguments: Mapping[str, object]) -> Any:
        return self.function(*[arguments[name] for name in self.argnames])


class CheckedFactory:
    """The factory of a plugin for one scheme; what it opens is a storage, or the plugin is named."""

    def __init__(self, plugin: str, scheme: str, function: StorageFactory) -> None:
        self.function = function
        self._plugin = plugin
        self._scheme = scheme

    def __call__(self, config: StorageConfig) -> AbstractAsyncContextManager[Storage]:
        """Opens the storage, or raises a PluginError if it is none."""
        return self._opened(config)

    @asynccontextmanager
    async def _opened(self, config: StorageConfig) -> AsyncIterator[Storage]:
        opening: object = self.function(config)
        if not isinstance(opening, AbstractAsyncContextManager):
            if inspect.iscoroutine(opening):
                opening.close()
            problem = f"returned {_kind(opening)}, not an async context manager of a storage"
            raise self._refused(f"{problem}: mark it with @asynccontextmanager")
        async with opening as storage:
            missing = _missing(Storage, storage) or _missing(LeaseDesk, storage.leases, "leases.")
            if missing:
                raise self._refused(f"opened {_kind(storage)}, which is no storage: it has no {', '.join(missing)}")
            yield storage

    def _refused(self, problem: str) -> PluginError:
        return PluginError(self._plugin, _STORAGES, f"its factory for {self._scheme!r} {problem}")


def _missing(protocol: type, value: object, prefix: str = "") -> list[str]:
    """What of a protocol a value does not have."""
    return [prefix + name for name in vars(protocol) if name[0] != "_" and not hasattr(value, name)]


class PluginManager:
    """Loads plugins and calls their hooks. `disabled` names those that are not even imported.

    `watching`: some are told of appends; where none is, an append is spared the call.
    """

    def __init__(self, disabled: Collection[str] = ()) -> None:
        self._disabled = frozenset(disabled)
        self._plugins = pluggy.PluginManager(PROJECT)
        self._plugins.add_hookspecs(HookSpecs)
        self._calls: dict[str, list[HookCall]] = {}
        self._infos: list[PluginInfo] = []
        self._appending: tuple[HookCall, ...] = ()
        self.watching = False

    # -- loading ------------------------------------------------------------------------------------------------------

    def load(self, extra: Iterable[object] = ()) -> None:
        """Register what installed distributions bring, one by one, and then `extra`: objects, or pairs (name, object).

        Called once. After an error the manager is of no use.

        Raises:
            PluginError: names the plugin that can't be imported or registered, and how to go on without it.
            ConfigError: a name in `disabled` is no plugin's.
        """
        sources = [*_installed(), *map(_handed_in, extra)]
        names = [source.name for source in sources]
        if unknown := sorted(self._disabled.difference(names)):
            raise ConfigError([f"plugins.disabled: there is no plugin {n!r}{did_you_mean(n, names)}" for n in unknown])
        enabled = [source for source in sources if source.name not in self._disabled]
        _refuse_namesakes(enabled)
        for source in enabled:
            self._register(source)
        for source in enabled:
            self._specify(source, enabled)
        # Looked at only now: a plugin may implement hooks that another one specifies.
        hooks = {source.name: self._checked_hooks(source) for source in enabled}
        for hook, caller in vars(self._plugins.hook).items():
            found = caller.get_hookimpls()
            ordered = sorted(found, key=lambda it: (it.trylast - it.tryfirst, names.index(it.plugin_name)))
            self._calls[hook] = [HookCall(it.plugin_name, it.function, it.argnames) for it in ordered]
        self._appending = tuple(self._calls["agent_runtime_before_append"])
        self.watching = bool(self._calls[_APPENDED])
        self._infos = [
            PluginInfo(
                name=source.name,
                version=source.version,
                origin=source.origin,
                module=source.module,
                hooks=hooks.get(source.name, []),
                disabled=source.name in self._disabled,
            )
            for source in sources
        ]

    def _register(self, source: _Source) -> None:
        try:
            plugin = source.load()
            if inspect.isclass(plugin):
                raise TypeError("it is a class; register an instance of it, or its module")
            if other := self._plugins.get_name(plugin):
                raise ValueError(f"it is registered already, as {other!r}")
            self._plugins.register(plugin, source.name)
        except pluggy.PluginValidationError as error:
            raise source.invalid(error) from error
        except (Exception, SystemExit) as error:  # a module may even exit when it is imported
            raise source.refused(None, f"{type(error).__name__}: {' '.join(str(error).split())}") from error

    def _specify(self, source: _Source, sources: Iterable[_Source]) -> None:
        """Add the hooks that a plugin specifies, and check the implementations of them that others brought."""
        try:
            for specs in self.hookspecs(source.name):
                self._plugins.add_hookspecs(specs)
        except pluggy.PluginValidationError as error:
            owner = self._plugins.get_name(error.plugin)
            raise next(each for each in sources if each.name == owner).invalid(error) from error
        except Exception as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise source.refused("agent_runtime_hookspecs", problem) from error

    def hookspecs(self, name: str) -> list[type]:
        """The classes in which the plugin of this name specifies hooks."""
        plugin = self._plugins.get_plugin(name)
        found = [it for it in self._plugins.hook.agent_runtime_hookspecs.get_hookimpls() if it.plugin is plugin]
        return [specs for it in found for specs in HookCall(name, it.function, it.argnames)({})]

    def _checked_hooks(self, source: _Source) -> list[str]:
        """The hooks a plugin implements. Refuses what pluggy would let pass, and then call never or to no effect."""
        plugin = self._plugins.get_plugin(source.name)
        callers = self._plugins.get_hookcallers(plugin) or []
        for caller in callers:
            for found in caller.get_hookimpls():
                if found.plugin is not plugin:
                    continue
                if not caller.has_spec() and not found.optionalhook:
                    specified = [name for name, other in vars(self._plugins.hook).items() if other.has_spec()]
                    raise source.refused(caller.name, f"there is no such hook{did_you_mean(caller.name, specified)}")
                if inspect.iscoroutinefunction(found.function) or inspect.isasyncgenfunction(found.function):
                    raise source.refused(caller.name, "it is async; hooks are synchronous, and return what is awaited")
                if inspect.isgeneratorfunction(found.function):
                    raise source.refused(caller.name, "it yields; hooks are plain functions, never wrappers")
        hooks = sorted(caller.name for caller in callers)
        unmarked = [
            hook
            for hook in vars(self._plugins.hook)
            if hook not in hooks and inspect.isroutine(getattr(plugin, hook, None))
        ]
        if unmarked:
            raise source.refused(unmarked[0], "it is not marked with @hookimpl")
        if not hooks:
            raise source.refused(
                None, "it has no hooks; a plugin is a module or an object with functions marked @hookimpl"
            )
        return hooks

    def describe(self) -> list[PluginInfo]:
        """Every plugin, in the order of registration; disabled ones as well."""
        return list(self._infos)

    # -- storages and clients -----------------------------------------------------------------------------------------

    def storages(self) -> dict[str, StorageFactory]:
        """The factory of each URL scheme."""
        return self._factories(_STORAGES, "stores under")[0]

    def clients(self) -> dict[str, ClientFactory]:
        """The factory of each URL scheme."""
        return self._factories("agent_runtime_clients", "talks to servers under")[0]

    def import_formats(self) -> dict[str, ImportFormat]:
        """What opens a source of each format."""
        return self._factories("agent_runtime_import_formats", "imports", "the name of a format")[0]

    def _factories(self, hook: str, does: str, what: str = "a URL scheme") -> tuple[dict[str, Any], dict[str, str]]:
        """The factory of each scheme (or whatever these names are), and the plugin that brings it."""
        factories: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for plugin, result in self.results(hook):
            if not isinstance(result, Mapping):
                raise PluginError(plugin, hook, f"returned {_kind(result)}, not a mapping of scheme to factory")
            for scheme, factory in result.items():
                if not (isinstance(scheme, str) and _SCHEME.fullmatch(scheme) and callable(factory)):
                    raise PluginError(plugin, hook, f"{scheme!r} is not {what} (lower case) with a callable factory")
                if scheme in owners:
                    raise PluginError(
                        plugin, hook, f"{does} {scheme!r}, as {owners[scheme]!r} does; disable one of the two"
                    )
                owners[scheme], factories[scheme] = plugin, factory
        return factories, owners

    def storage_for(self, url: str) -> StorageFactory:
        """The factory for a URL, by its scheme: the text before the first colon, as in `sqlite+aiosqlite`.

        What it opens is checked to be a storage: if it is none, opening raises a PluginError.

        Raises:
            InvalidInput: it is not a URL, or no plugin stores under its scheme.
        """
        scheme, colon, _ = url.partition(":")
        scheme = scheme.lower()
        if not colon or not _SCHEME.fullmatch(scheme):
            raise InvalidInput("storage.url", "is not a URL" + _as_file(url))
        factories, owners = self._factories(_STORAGES, "stores under")
        if scheme not in factories:
            known = ", ".join(sorted(factories)) or "none"
            near = did_you_mean(scheme, factories) if difflib.get_close_matches(scheme, factories) else ""
            raise InvalidInput("storage.url", f"no plugin stores under {scheme!r}; there are: {known}{near}")
        return CheckedFactory(owners[scheme], scheme, factories[scheme])

    def client_for(self, url: str) -> ClientFactory:
        """The factory for the URL of a server, by its scheme.

        Raises:
            InvalidInput: no plugin talks to servers under its scheme.
        """
        scheme = url.partition(":")[0].lower()
        clients = self.clients()
        if scheme not in clients:
            known = ", ".join(sorted(clients)) or "none"
            raise InvalidInput("server", f"is not a URL that a plugin talks to; their schemes are: {known}")
        return clients[scheme]

    # -- commands, lifespans, messages --------------------------------------------------------------------------------

    def commands(self, app: typer.Typer) -> None:
        """Let every plugin add its commands."""
        for _ in self.results("agent_runtime_commands", app=app):
            pass

    def lifespans(self, runtime: Runtime) -> list[tuple[str, AbstractAsyncContextManager[object]]]:
        """What each plugin wants entered while the runtime serves, with the plugin's name."""
        hook = "agent_runtime_lifespan"
        lifespans = []
        for plugin, result in self.results(hook, runtime=runtime):
            if result is None:
                continue
            if not isinstance(result, AbstractAsyncContextManager):
                raise PluginError(plugin, hook, f"returned {_kind(result)}, not an async context manager or None")
            lifespans.append((plugin, result))
        return lifespans

    @property
    def appending(self) -> bool:
        """Whether any plugin looks at messages; where none does, an append is spared the call."""
        return bool(self._appending)

    def before_append(self, session_id: str, message: NewMessage) -> NewMessage:
        """The message as the plugins leave it, each given what the one before returned.

        Raises:
            InvalidInput: a plugin refuses the message.
            PluginError: a plugin failed. What it said is not repeated, as it may say what is in the message.
        """
        hook = "agent_runtime_before_append"
        for call in self._appending:
            try:
                result = call({"session_id": session_id, "message": message})
            except InvalidInput:
                raise
            except Exception as error:
                raise PluginError(call.plugin, hook, raised(error)) from error
            if isinstance(result, NewMessage):
                message = result
            elif result is not None:
                raise PluginError(call.plugin, hook, f"returned {_kind(result)}, not a NewMessage or None")
        return message

    # -- observers ----------------------------------------------------------------------------------------------------

    def batch_stored(self, receipt: Receipt) -> None:
        """Tell that a batch is in the database."""
        self._observe("agent_runtime_batch_stored", receipt=receipt)

    def flush_failed(self, batch: Batch, error: Exception, attempt: int) -> None:
        """Tell that a try to store a batch failed."""
        self._observe("agent_runtime_flush_failed", batch=batch, error=error, attempt=attempt)

    def change_quarantined(self, change: Change, error: Exception) -> None:
        """Tell that a change is in quarantine."""
        self._observe("agent_runtime_change_quarantined", change=change, error=error)

    def appended(self, session_id: str, messages: int, durability: Durability, duration_s: float) -> None:
        """Tell that messages were appended. To be called where `watching`."""
        self._observe(_APPENDED, session_id=session_id, messages=messages, durability=durability, duration_s=duration_s)

    # -- calling ------------------------------------------------------------------------------------------------------

    def calls(self, hook: str) -> Sequence[HookCall]:
        """Every implementation of a hook, in the order in which they are called; none if nobody specifies it."""
        return self._calls.get(hook, ())

    def results(self, hook: str, **arguments: object) -> Iterator[tuple[str, Any]]:
        """Call a hook, plugin by plugin: the name of each, and what it returns.

        Raises:
            PluginError: a plugin failed.
            ConfigError: as a plugin raises it: what it finds in `plugins.config` can't be used.
        """
        for call in self.calls(hook):
            try:
                result = call(arguments)
            except ConfigError:
                raise
            except Exception as error:
                raise PluginError(call.plugin, hook, f"{raised(error)}: {' '.join(str(error).split())}") from error
            yield call.plugin, result

    def _observe(self, hook: str, **arguments: object) -> None:
        for call in self._calls[hook]:
            try:
                call(arguments)
            except Exception as error:  # noqa: BLE001 - whatever it is, the caller's work is done and stands
                self._calls[hook] = [other for other in self._calls[hook] if other is not call]
                # Without the exception's text: it may say what is in a message.
                _log.error("plugin %r, hook %s: %s; it is not called again", call.plugin, hook, raised(error))


def _installed() -> list[_Source]:
    """The entry points of every distribution, by name: the order in which they lie on the path means nothing."""
    sources = []
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda it: (it.name, it.value)):
        origin, version = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", None)
        module = entry.value.partition(":")[0].strip()
        sources.append(_Source(entry.name, origin, version, module, f"{origin} {version}, {entry.value}", entry.load))
    return sources


def _handed_in(item: object) -> _Source:
    match item:
        case (str(name), plugin):
            pass
        case plugin:
            name = str(getattr(plugin, "__name__", type(plugin).__name__))
    module = plugin.__name__ if inspect.ismodule(plugin) else type(plugin).__module__
    version = getattr(plugin, "__version__", None)
    return _Source(name, BY_HAND, version if isinstance(version, str) else None, module, BY_HAND, lambda: plugin)


def _refuse_namesakes(sources: Iterable[_Source]) -> None:
    first: dict[str, _Source] = {}
    for source in sources:
        other = first.setdefault(source.name, source)
        if other is not source:
            raise PluginError(
                source.name,
                None,
                f"two plugins have this name ({other.described}; {source.described}): "
                "uninstall one, or hand one in under another name as (name, object)",
            )


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def raised(error: Exception) -> str:
    """What was raised and where, without what it says."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{type(error).__name__} at {frame.f_code.co_filename}:{line}"


def _as_file(text: str) -> str:
    # Only what looks like a path is repeated: a mistyped URL may hold a password.
    return f"; a SQLite file is written as sqlite:///{text}" if re.fullmatch(r"[\w./ -]+", text) else ""
