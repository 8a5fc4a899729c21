"""The command `torture`."""

from __future__ import annotations

import secrets
import shutil
import signal
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import anyio
import typer

from agent_runtime import load_config
from agent_runtime.cli.exits import FAILED, SIGNALLED, Failure
from agent_runtime.cli.logs import configure_logging
from agent_runtime.cli.options import AsJson, ConfigFile
from agent_runtime.cli.terminal import progress

if TYPE_CHECKING:
    from .books import Figures
    from .run import Options

__all__ = ["command"]


def command(
    cycles: Annotated[int, typer.Option("--cycles", min=1, help="How many servers to kill.")] = 20,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="URL",
            help="Database to use: one of its own, without sessions. Default: a new SQLite file.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="What decides all that is done. Default: one by chance.", show_default=False),
    ] = None,
    connections: Annotated[int, typer.Option("--connections", min=1, max=256, help="How many write at a time.")] = 8,
    durability: Annotated[
        Literal["buffered", "journaled", "synced", "stored"] | None,
        typer.Option("--durability", help="The level to wait for. Default: the configured one.", show_default=False),
    ] = None,
    failpoints: Annotated[
        bool,
        typer.Option("--failpoints", help="Let every third server kill itself at a named point of journal or storage."),
    ] = False,
    config_file: ConfigFile = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            metavar="DIR",
            help="Put the database, its journal and the servers' log here, and leave them there.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Kill servers, and see whether anything that they acknowledged is lost.

    A server is started on a database of its own, sessions are written from several connections, and it is killed with
    SIGKILL: while it works, starts, recovers, is read from, or stops. Then it is started again, and everything that it
    ever acknowledged is compared with what it shows. What was under way may be there whole, once, or not at all. At the
    end the server is stopped in order while it works, and everything compared once more.

    A database that has sessions is refused; one that was named has none afterwards, if all was well. Segments are small
    and batches quick, unless the configuration says otherwise. Exit code 0: all was well; 1: it was not, with a line
    for each finding, and everything kept.
    """
    from .report import report, summary
    from .run import Options  # every command is loaded with this module, whoever is called

    directory = Path(tempfile.mkdtemp(prefix="agent-runtime-torture-")) if keep is None else keep.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    url = storage if storage is not None else f"sqlite:///{directory / 'torture.db'}"
    config = load_config(config_file, overrides={"storage.url": url})
    configure_logging(config)
    arguments = ["--storage", url] if config_file is None else ["--storage", url, "--config", str(config_file)]
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    with progress(f"torturing (seed {seed})", cycles) as told:
        options = Options(
            cycles=cycles,
            seed=seed,
            connections=connections,
            durability=durability or config.write_behind.durability,
            failpoints=failpoints,
            arguments=arguments,
            config=config,
            log=directory / "server.log",
            clean=storage is not None,
            told=lambda figures: told(summary(figures), figures.cycles),
        )
        figures = anyio.run(_tortured, options)
    if isinstance(figures, Failure):
        if keep is None:
            shutil.rmtree(directory)
        raise figures
    anyio.run(partial(report, figures, as_json=as_json))
    if not figures.well:
        raise Failure(*figures.findings, f"seed {seed}; what there was is kept in {directory}", code=FAILED)
    if keep is None:
        shutil.rmtree(directory)


async def _tortured(options: Options) -> Figures | Failure:
    """Torture, until SIGTERM or Ctrl-C. A failure: it did not come to that.

    Raises:
        Failure: it was interrupted.
    """
    from .run import torture

    received: list[signal.Signals] = []
    outcome: Figures | Failure | None = None

    async def heed(scope: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for number in signals:
                received.append(number)
                scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(heed, tasks.cancel_scope)
        try:
            outcome = await torture(options)
        except Failure as failure:
            outcome = failure
        tasks.cancel_scope.cancel()
    if outcome is None:
        raise Failure(f"interrupted; what there was is kept in {options.log.parent}", code=SIGNALLED + received[0])
    return outcome
