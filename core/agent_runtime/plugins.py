"""The typed plugin manager: one a runtime, made when a runtime opens; nothing happens at import.

Owns which plugins there are and how their hooks are called. Whatever a plugin does wrong, at load or in a hook, is raised
as a PluginError that names it. Hooks are called in the order of registration: entry points by name, then what was handed
in, as handed in (pluggy's `tryfirst` and `trylast` move one to either end). Observers are different: they never make a
caller fail; one that raises is logged by name and switched off.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import re
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import msgspec
import pluggy

from .changes import Batch, Change, Receipt
from .config import did_you_mean
from .errors import ConfigError, InvalidInput, PluginError
from .hookspecs import PROJECT, HookSpecs
from .records import NewMessage
from .storage import StorageFactory

if TYPE_CHECKING:
    import typer

    from .runtime import Runtime

__all__ = ["ENTRY_POINTS", "PluginInfo", "PluginManager"]

ENTRY_POINTS: Final = "agent_runtime"
"""The group of entry points in which plugins register."""

BY_HAND: Final = "by hand"
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


class _Call(NamedTuple):
    """One plugin's implementation of one hook."""

    plugin: str
    function: Callable[..., Any]
    argnames: tuple[str, ...]

    def __call__(self, arguments: Mapping[str, object]) -> Any:
        return self.function(*[arguments[name] for name in self.argnames])


class PluginManager:
    """Loads plugins and calls their hooks. `disabled` names those that are not even imported."""

    def __init__(self, disabled: Collection[str] = ()) -> None:
        self._disabled = frozenset(disabled)
        self._plugins = pluggy.PluginManager(PROJECT)
        self._plugins.add_hookspecs(HookSpecs)
        self._hooks = tuple(name for name in vars(HookSpecs) if name.startswith(f"{PROJECT}_"))
        self._calls: dict[str, list[_Call]] = {hook: [] for hook in self._hooks}
        self._infos: list[PluginInfo] = []

    # -- loading ------------------------------------------------------------------------------------------------------

    def load(self, extra: Iterable[object] = ()) -> None:
        """Register the plugins of installed distributions, one by one, and then `extra`: objects or (name, object).

        Raises:
            PluginError: names the plugin that can't be imported or registered, and how to go on without it.
            ConfigError: `disabled` has a name that no plugin has.
        """
        sources = _distinct([*_installed(), *map(_handed_in, extra)], self._disabled)
        names = [source.name for source in sources]
        if unknown := sorted(self._disabled - set(names)):
            raise ConfigError([f"plugins.disabled: no plugin is named {n!r}{did_you_mean(n, names)}" for n in unknown])
        for source in sources:
            if source.name not in self._disabled:
                self._register(source)
        # Only now, as a plugin may implement the hooks that another one specifies.
        for source in sources:
            self._infos.append(self._inspect(source))
        for hook, calls in self._calls.items():
            order = {name: index for index, name in enumerate(names)}
            implementations = getattr(self._plugins.hook, hook).get_hookimpls()
            implementations.sort(key=lambda it: (it.trylast - it.tryfirst, order[it.plugin_name]))
            calls.extend(_Call(it.plugin_name, it.function, it.argnames) for it in implementations)

    def _register(self, source: _Source) -> None:
        try:
            plugin = source.load()
            if inspect.isclass(plugin):
                raise TypeError("it is a class; register an instance of it, or the module")
            if other := self._plugins.get_name(plugin):
                raise ValueError(f"it is registered already, as {other!r}")
            self._plugins.register(plugin, source.name)
        except pluggy.PluginValidationError as error:
            _refuse(source, None, "; ".join(str(error).splitlines()[1:]), error)
        except (Exception, SystemExit) as error:  # a module may even call sys.exit
            _refuse(source, None, f"{type(error).__name__}: {' '.join(str(error).split())}", error)

    def _inspect(self, source: _Source) -> PluginInfo:
        """Refuse what pluggy lets pass and would then call wrongly or never."""
        plugin = self._plugins.get_plugin(source.name)
        hooks = []
        for caller in (self._plugins.get_hookcallers(plugin) or []) if plugin is not None else []:
            for implementation in caller.get_hookimpls():
                ...
        return PluginInfo()
