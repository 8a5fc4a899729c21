"""What one call of the command line knows of the plugins, before it knows what is to be done.

A plugin that can't be loaded must not take away the commands that say what is wrong: it is left out, and named.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Collection
from typing import Any, Final

import typer
from typer.main import get_command

from ..errors import PluginError
from ..plugins import ENTRY_POINTS, PluginInfo, PluginManager

__all__ = ["Invocation", "invocation_of"]

_HOOK: Final = "agent_runtime_commands"


class Invocation:
    """The plugins there are, those of them that can't be used, and the commands of all others."""

    def __init__(self, command: Callable[..., Any], plugins: list[PluginInfo], broken: dict[str, PluginError]) -> None:
        self.command = command
        self.plugins = plugins
        self.broken = broken
        self.debug = False
        self._told: set[str] = set()

    @classmethod
    def of(cls, context: typer.Context) -> Invocation:
        """The invocation that a command belongs to."""
        invocation = context.find_object(cls)
        if invocation is None:
            raise RuntimeError("called from elsewhere than main()")
        return invocation

    def told(self, *lines: str) -> None:
        """These lines were told: what they say need not be said again."""
        self._told.update(lines)

    def untold(self) -> list[str]:
        """What there is to be said of plugins that can't be used, as far as that was not told."""
        return [str(error) for error in self.broken.values() if str(error) not in self._told]


def invocation_of(build: Callable[[], typer.Typer], disabled: Collection[str]) -> Invocation:
    """Load the plugins, but for those disabled, and let them add their commands to what `build` gives."""
    installed = {entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    left_out = installed.intersection(disabled)
    broken: dict[str, PluginError] = {}
    while True:
        try:
            command, plugins = _assembled(build, left_out)
        except PluginError as error:
            if error.plugin in left_out:
                raise
            broken[error.plugin] = error
            left_out.add(error.plugin)
        else:
            return Invocation(command, plugins, broken)


def _assembled(
    build: Callable[[], typer.Typer], left_out: Collection[str]
) -> tuple[Callable[..., Any], list[PluginInfo]]:
    """The command line with the commands of all plugins but some, and what these are."""
    manager = PluginManager(disabled=left_out)
    manager.load()
    plugins = manager.describe()
    app = build()
    manager.commands(app)
    try:
        return get_command(app), plugins
    except Exception as error:
        adding = {plugin.name for plugin in plugins if _HOOK in plugin.hooks}
        if len(adding) > 1:  # find out whose it is
            for name in sorted(adding):
                _assembled(build, {*left_out, *adding} - {name})
        raise PluginError(min(adding), _HOOK, f"typer refuses its commands: {type(error).__name__}: {error}") from error
