"""`agent-runtime config …`: what is configured, and whether that is right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ..config import Config, config_schema, known_keys
from ..errors import AgentRuntimeError
from ..plugins import PluginManager
from .exits import USAGE, Failure
from .invocation import Invocation
from .options import AsJson, ConfigFile, StorageUrl, load
from .running import with_place
from .terminal import console, output_is_terminal
from .text import json_line, visible

__all__ = ["app"]

app = typer.Typer(help="Check, show and describe the configuration.", no_args_is_help=True)


@app.command()
def check(
    context: typer.Context,
    argument: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Configuration file (YAML).", show_default=False)
    ] = None,
    config_file: ConfigFile = None,
) -> None:
    """Say whether the configuration can be used; if not, every fault in a line of its own, and exit with 1.

    What is checked is what would be in force: the file, if one is named, and the environment over it. Nothing is
    opened: whether the database is there, and takes its options, is seen by those who open it.
    """
    if argument is not None and config_file is not None:
        raise Failure("name the file once: as an argument, or with --config", code=USAGE)
    file = argument or config_file
    config = load(file)
    try:
        _check_plugins(Invocation.of(context), config)
    except AgentRuntimeError as error:
        raise with_place(error, config) from error
    typer.echo(f"ok: {visible(str(file)) if file else 'the environment and the defaults'}")


def _check_plugins(invocation: Invocation, config: Config) -> None:
    """Whether there are the plugins that the configuration names."""
    manager = PluginManager(disabled={*config.plugins.disabled, *invocation.broken})
    manager.load()
    if not invocation.broken:  # one of them might be the storage's
        manager.storage_for(config.storage.url)


@app.command()
def show(config_file: ConfigFile = None, storage: StorageUrl = None, as_json: AsJson = False) -> None:
    """Show every key with the value in force and where that comes from. Secrets are shown as ***."""
    config = load(config_file, storage)
    shown = config.shown()
    rows = [
        (key, shown[section][name], config.origin(key)) for key in known_keys() for section, name in [key.split(".")]
    ]
    if as_json:
        sys.stdout.write(json_line({key: {"value": value, "origin": origin} for key, value, origin in rows}))
        return
    lines = [(key, visible(msgspec.json.encode(value).decode()), visible(origin)) for key, value, origin in rows]
    if not output_is_terminal():
        sys.stdout.writelines("\t".join(line) + "\n" for line in lines)
        return
    from rich.table import Table

    table = Table("key", "value", "from", box=None, pad_edge=False)
    for line in lines:
        table.add_row(*line)
    console(sys.stdout).print(table)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration file, for editors."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(config_schema()), indent=2).decode() + "\n")
