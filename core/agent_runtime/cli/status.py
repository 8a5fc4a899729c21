"""`agent-runtime status`: what a server does, live on a terminal.

It only asks: the server that is named, or the one whose address stands in the lease. The database is looked at for
that, and nothing else; where no server has it open there is nothing to show, and one line says what the database knows.
While it is watched a server may go away and come back, or another one take its place.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import anyio
import typer

from ..config import Config
from ..errors import AgentRuntimeError, LeaseHeld, StorageUnavailable
from ..plugins import PluginManager
from ..status import Status
from .dashboard import ASCII, UNICODE, Board, Glyphs, Row, Tone
from .exits import HELD, Failure
from .options import AsJson, ConfigFile, StorageUrl, load
from .running import opened
from .terminal import console, output_is_terminal, write
from .text import json_line, visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["show_status"]

_EVERY_S: Final = 1.0
_ANSWER_S: Final = 5.0
_COLUMNS_MAX: Final = 100
_STYLES: Final[dict[Tone, str]] = {"": "", "good": "green", "warning": "yellow", "bad": "bold red"}


def show_status(
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    every: Annotated[
        float | None,
        typer.Option(
            "--every",
            metavar="SECONDS",
            min=0.1,
            help="Look again after so many seconds; 1 on a terminal. Elsewhere it looks once unless this is given.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
    storage: StorageUrl = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help="Server to ask, such as http://127.0.0.1:8001. Without it, the one that has the database open.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what a server does: on a terminal live, until Ctrl-C; elsewhere once, as lines.

    How far changes are synced and stored, how many are pending, how full memory is, how long appends, flushes and syncs
    take, and what needs somebody to look after it. With --json what GET /v1/status answers, a line a look.

    Without a server it says what the database knows, and exits with 1; with 3 if a process that is no server has it.
    """
    found = _Server(load(config_file, storage), server)
    if not as_json and not once and output_is_terminal() and os.environ.get("TERM", "dumb") != "dumb":
        anyio.run(_watch, found, every or _EVERY_S)
    else:
        anyio.run(_print, found, as_json, None if once else every)


class _Server:
    """The server that is asked. `url` is where it was found last, without the password that the URL may hold."""

    def __init__(self, config: Config, named: str | None) -> None:
        self._config = config
        self._named = self._at = named
        self.url = ""
        self._plugins = PluginManager(disabled=config.plugins.disabled)
        self._plugins.load()

    async def ask(self) -> Status:
        """Its figures. Once it does not answer, the next call looks for another one.

        Raises:
            Failure: there is none, or it does not answer.
            AgentRuntimeError: it has something else to say, or the database can't be looked at.
        """
        if self._at is None:
            held = await self._holder()
            try:
                return await self._asked(str(held.address))
            except StorageUnavailable as error:
                raise self._gone(held, error) from error
        try:
            return await self._asked(self._at)
        except AgentRuntimeError:
            self._at = self._named
            raise

    async def _asked(self, url: str) -> Status:
        try:
            with anyio.fail_after(_ANSWER_S):
                async with self._plugins.client_for(url)(url) as client:
                    status = client.status()
                    if isinstance(status, Awaitable):
                        status = await status
        except TimeoutError:
            raise StorageUnavailable(f"the server at {_shown(url)} does not answer within {_ANSWER_S:g} s") from None
        self._at, self.url = url, _shown(url)
        return status

    async def _holder(self) -> LeaseHeld:
        """Who has the database open; a server."""
        async with opened(self._config) as storage, storage.snapshot() as snapshot:
            lease, stored = await snapshot.lease(), snapshot.watermark
        if lease is None or lease.holder is None:
            where = self._config.shown()["storage"]["url"]
            raise Failure(
                f"no server has {where} open, where changes up to {stored} are stored: start one with "
                "`agent-runtime serve`, or name one with --server"
            )
        held = LeaseHeld(lease.holder, lease.expires_in_s, lease.address)
        if held.address is None:
            raise self._gone(held, "it is no server, so there is nobody to ask")
        return held

    @staticmethod
    def _gone(held: LeaseHeld, why: object) -> Failure:
        if held.expires_in_s is not None and held.expires_in_s <= 0:
            return Failure(
                f"{held.holder} had the database open and has not renewed its lease for {-held.expires_in_s:.0f} s: "
                "what it had not stored is in its journal, and comes back when `agent-runtime serve` opens that"
            )
        return Failure(str(held), str(why), code=HELD)


async def _print(server: _Server, as_json: bool, every_s: float | None) -> None:
    """Look, once or again and again, and print."""
    board = Board(_glyphs())
    while True:
        status = await server.ask()
        board.add(time.monotonic(), status)
        if as_json:
            await write(json_line(status))
        elif output_is_terminal():
            console(sys.stdout).print(_view(board, server, console(sys.stdout)))
        else:
            await write("".join(map(_line, _all_rows(board, server))) + ("" if every_s is None else "\n"))
        if every_s is None:
            return
        await anyio.sleep(every_s)


def _all_rows(board: Board, server: _Server) -> list[Row]:
    state, tone = board.state
    return [
        Row("server", visible(server.url)),
        Row("state", state, tone=tone),
        Row("at", _now(), board.period),
        *board.troubles(),
        *board.rows(),
    ]


def _line(row: Row) -> str:
    return f"{row.label:<11} {row.value:>12}  {visible(row.text)}".rstrip() + "\n"


async def _watch(server: _Server, every_s: float) -> None:
    """Show it until Ctrl-C, or SIGTERM: that is how it is meant to end. What was seen last stays on the terminal."""
    from rich.live import Live

    board, terminal = Board(_glyphs()), console(sys.stdout)
    board.add(time.monotonic(), await server.ask())  # what fails here is the command's failure
    away: str | None = None
    seen_at = time.monotonic()

    async def look() -> None:
        nonlocal away, seen_at
        try:
            status = await server.ask()
        except (AgentRuntimeError, Failure) as error:
            away = (error.lines if isinstance(error, Failure) else str(error).splitlines())[-1]
        else:
            away, seen_at = None, time.monotonic()
            board.add(seen_at, status)

    async def looks(live: Live, scope: anyio.CancelScope) -> None:
        while not scope.cancel_called:
            absent = None if away is None else (away, time.monotonic() - seen_at)
            live.update(_view(board, server, terminal, absent), refresh=True)
            await anyio.sleep(every_s)
            await look()

    with Live(console=terminal, screen=True, auto_refresh=False) as live:
        async with anyio.create_task_group() as tasks:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                tasks.start_soon(looks, live, tasks.cancel_scope)
                async for _ in signals:
                    tasks.cancel_scope.cancel()
    terminal.print(_view(board, server, terminal))


def _view(board: Board, server: _Server, terminal: Console, absent: tuple[str, float] | None = None) -> RenderableType:
    """All of it. `absent`: why the server does not answer, and for how many seconds; what was seen last pales."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(*rows: Row, wraps: bool) -> Table:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.width = columns
        grid.add_column(no_wrap=True, width=10)
        grid.add_column(no_wrap=True, justify="right", width=widest)
        grid.add_column(no_wrap=not wraps, overflow="fold" if wraps else "ellipsis", ratio=1)
        for row in rows:
            if row.gap:
                grid.add_row()
            tint = "dim" if absent is not None else _STYLES[row.tone]
            grid.add_row(
                Text(row.label, tint or "cyan"), Text(row.value, tint or "bold"), Text(visible(row.text), tint)
            )
        return grid

    columns = min(terminal.width, _COLUMNS_MAX)
    state, tone = board.state
    troubles, figures = list(board.troubles()), list(board.rows(columns))
    widest = max(9, *(len(row.value) for row in [*troubles, *figures]))
    if absent is not None:
        state, tone = f"no answer for {absent[1]:.0f} s", "bad"
        troubles = []
    head = Table.grid(padding=(0, 2, 0, 0))
    head.width = columns
    head.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    head.add_column(no_wrap=True, justify="right")
    head.add_row(Text(visible(server.url), "bold"), Text(f"{board.glyphs.lamp} {state}", _STYLES[tone]))
    head.add_row(Text(board.period, "dim"), Text(_now(), "dim"))
    parts: list[RenderableType] = [head, Text()]
    if absent is not None:
        parts += [Text(visible(absent[0]), "red"), Text()]
    if troubles:
        parts += [table(*troubles, wraps=True), Text()]
    return Group(*parts, table(*figures, wraps=False))


def _shown(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)


def _glyphs() -> Glyphs:
    return UNICODE if (sys.stdout.encoding or "").lower().startswith("utf") else ASCII


def _now() -> str:
    return f"{datetime.now(UTC):%H:%M:%S}Z"
