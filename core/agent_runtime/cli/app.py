"""The command line put together, and the one place where a call of it ends."""

from __future__ import annotations

import importlib.metadata
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Final, NoReturn

import typer

from ..errors import ConfigError
from ..sources import load_config
from . import check, config, copy, journal, plugins, quarantine, sessions, status, transfer
from .exits import FAILED, SIGNALLED, failure_of, tell
from .invocation import Invocation, invocation_of
from .logs import configure_logging

__all__ = ["main"]

_HELP: Final = """
Keeps the state of AI agents: conversations, which agent holds them, and what belongs to them.

Commands open the configured database themselves, by default data/agent_runtime.db, an SQLite file. One process at a
time may have it open.
"""
_ENDING: Final = (
    "Exit codes: 0 done, 1 failed, 2 called in a wrong way, 3 another process has the database open, "
    "4 ended with changes that could not be stored."
)


def _build() -> typer.Typer:
    """Our own commands."""
    app = typer.Typer(
        help=_HELP,
        epilog=_ENDING,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    app.add_typer(sessions.app, name="sessions")
    app.command("import")(transfer.import_)
    app.command("export")(transfer.export)
    app.command("copy")(copy.copy_all)
    app.add_typer(journal.app, name="journal")
    app.add_typer(quarantine.app, name="quarantine")
    app.command("status")(status.show_status)
    app.command("check")(check.check_all)
    app.add_typer(config.app, name="config")
    app.command("plugins")(plugins.list_plugins)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"agent-runtime {importlib.metadata.version('agent-runtime')}")
        raise typer.Exit


def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="If the command fails, show where: a traceback.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    Invocation.of(context).debug = debug


def main() -> NoReturn:
    """Run the command line of this process, and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding, nothing is lost
    configure_logging()
    arguments = sys.argv[1:]
    invocation = invocation_of(_build, _disabled(arguments))
    code = _run(invocation, arguments)
    tell(*invocation.untold())
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
    sys.exit(code)


def _run(invocation: Invocation, arguments: Sequence[str]) -> int:
    try:
        invocation.command(list(arguments), prog_name="agent-runtime", obj=invocation)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FAILED
    except KeyboardInterrupt:
        return SIGNALLED + 2
    except Exception as error:  # noqa: BLE001 — nobody catches what is not caught here
        if invocation.debug:
            traceback.print_exc()
        failure = failure_of(error)
        tell(*failure.lines)
        invocation.told(*failure.lines)
        return failure.code
    return 0


def _disabled(arguments: Sequence[str]) -> Sequence[str]:
    """The plugins that the configuration disables, which must be known before the command line can be understood.

    A configuration that can't be read disables none; the command will say what is wrong with it.
    """
    file = None
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--config":
            file = value or next(iter(arguments[index + 1 :]), None)
    logging.disable()  # what is to be logged of the configuration comes when the command loads it
    try:
        return load_config(file).plugins.disabled
    except ConfigError:
        return ()
    finally:
        logging.disable(logging.NOTSET)
