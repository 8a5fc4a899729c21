"""`agent-runtime plugins`: what is installed, and what it implements."""

from __future__ import annotations

import sys

import msgspec
import typer

from ..errors import PluginError
from ..plugins import PluginInfo
from .exits import Failure
from .invocation import Invocation
from .options import AsJson, ConfigFile, load
from .terminal import console, output_is_terminal
from .text import json_line, visible

__all__ = ["list_plugins"]


def list_plugins(context: typer.Context, config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """List the plugins that are installed.

    With name, version, state (enabled, disabled, broken), the package that brings each, and its hooks. A plugin is
    broken if it can't be loaded; then the reason follows, and the exit code is 1.
    """
    load(config_file)
    invocation = Invocation.of(context)
    broken = invocation.broken
    rows = [(plugin, _state(plugin, broken)) for plugin in invocation.plugins]
    if as_json:
        for plugin, state in rows:
            sys.stdout.write(json_line(msgspec.structs.asdict(plugin) | {"state": state}))
    else:
        _print([(it.name, it.version or "", state, it.origin, " ".join(it.hooks)) for it, state in rows])
    if broken:
        raise Failure(*map(str, broken.values()))


def _state(plugin: PluginInfo, broken: dict[str, PluginError]) -> str:
    if plugin.name in broken:
        return "broken"
    return "disabled" if plugin.disabled else "enabled"


def _print(rows: list[tuple[str, ...]]) -> None:
    if not output_is_terminal():
        sys.stdout.writelines("\t".join(map(visible, row)) + "\n" for row in rows)
        return
    from rich.table import Table

    table = Table("plugin", "version", "state", "from", "hooks", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(visible, row))
    console(sys.stdout).print(table)
