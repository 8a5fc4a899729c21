"""The cycles: start the server, read everything back, put load on it, kill it.

Every decision is made by the seed: what each connection does in each cycle, when the server is killed, and how it is
configured. The moments at which things happen are the machine's, so no two runs are the same.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Final

import anyio
import msgspec

from agent_runtime import Config
from agent_runtime.cli.exits import Failure
from agent_runtime.records import Durability

from .books import Books, Figures
from .drive import Connections
from .plan import Plan, plans
from .process import Gone, Server, started
from .wire import Unanswered

__all__ = ["Options", "torture"]

_CYCLES_SHARED: Final = 25  # after which there is another common session
_END_S: Final = 60.0
_FIRST: Final = Plan(kind="first")
_END: Final = Plan(kind="end", work_s=0.3)
_AGAIN: Final = Plan(kind="again")
_STOPPED: Final = frozenset({"first", "stop", "end", "again"})


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for.

    `arguments` are those of `serve`, `config` is what they come to; servers write their log to `log`. `clean`: when all
    was well the sessions are deleted. `told` is given the figures after each cycle.
    """

    cycles: int
    seed: int
    connections: int
    durability: Durability
    failpoints: bool
    arguments: Sequence[str]
    config: Config
    log: Path
    clean: bool
    told: Callable[[Figures], None]


class _Stop(Exception):
    """There is no going on."""


async def torture(options: Options) -> Figures:
    """Do it, and tell what came of it.

    Raises:
        Failure: the server does not start for the first time, or has sessions already; nothing was done.
    """
    run = _Run(options)
    coming = plans(options.seed, failpoints=options.failpoints)
    with suppress(_Stop):
        await run.cycle("first", _FIRST)
        for number, plan in enumerate(islice(coming, options.cycles)):
            await run.cycle(str(number), plan)
            run.figures.cycles += 1
            options.told(run.figures)
        await run.cycle("end", _END)
        await run.cycle("again", _AGAIN)
    return run.figures


class _Run:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._books = Books(options.seed)
        self._connections = Connections(self._books, options.connections, options.durability)
        self._start_s = self._open_s = 0.0
        self._refusal: str | None = None
        self.figures: Final = self._books.figures

    async def cycle(self, name: str, plan: Plan) -> None:
        """One server, from its start to its end."""
        if name.isdecimal() and int(name) % _CYCLES_SHARED == _CYCLES_SHARED - 1:
            self._connections.renew_shared()
        options = self._options
        environ = _environment(options, plan)
        async with started(options.arguments, environ, options.log, plan.failpoint) as server:
            self.figures.starts += 1
            strike = _Strike(server, plan, {"start": self._start_s, "recovery": self._open_s})
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server.watch)
                tasks.start_soon(strike.run)
                with suppress(Gone, Unanswered):
                    await self._use(server, name, plan, strike)
                with anyio.move_on_after(_END_S):
                    await server.ended.wait()
                tasks.cancel_scope.cancel()
            self._judge(server, plan, strike)

    async def _use(self, server: Server, name: str, plan: Plan, strike: _Strike) -> None:
        """What is done with a server until it is killed, or told to stop."""
        strike.reach("start")
        await server.listening()
        listening_at = anyio.current_time()
        strike.reach("recovery")
        await server.ready()
        self._start_s, self._open_s = server.start_s, anyio.current_time() - listening_at
        self.figures.longest_start_s = max(self.figures.longest_start_s, server.start_s)
        if plan is _FIRST:
            await self._check_empty(server)
            return
        strike.reach("reading")
        await self._connections.compare(server.port)
        if plan is _AGAIN:
            if not self.figures.acknowledged:
                self._books.fail("nothing was acknowledged, so nothing is proved")
            if self._options.clean and self.figures.well:
                await self._connections.remove(server.port)
            server.signal(signal.SIGTERM)
            return
        strike.reach("load")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._connections.work, server.port, f"{self._options.seed}/{name}")
            if plan.kind in _STOPPED:
                await anyio.sleep(plan.work_s)
                strike.reach("stop")
                server.signal(signal.SIGTERM)

    async def _check_empty(self, server: Server) -> None:
        found = self._books.strangers(await self._connections.list_ids(server.port))
        if found:
            place = self._options.config.shown()["storage"]["url"]
            self._refusal = f"{place} has {len(found)} session(s) already: name a database that nobody else uses"
        server.signal(signal.SIGTERM)

    def _judge(self, server: Server, plan: Plan, strike: _Strike) -> None:
        """Note how the server ended, and whether it was to end like that."""
        if self._refusal is not None:
            raise Failure(self._refusal)
        figures = self.figures
        recovered = server.recovered()
        figures.recoveries += recovered > 0
        figures.changes_recovered += recovered
        if not server.ended.is_set():
            self._books.fail(f"the server does not end; it said: {server.last_words()}")
            raise _Stop
        if server.code == 0 and plan.kind in _STOPPED:
            return
        if server.code == -signal.SIGKILL and (strike.struck or plan.failpoint):
            where = plan.kind if strike.struck or not plan.failpoint else plan.failpoint.rpartition(":")[0]
            figures.kills[where] = figures.kills.get(where, 0) + 1
            return
        if plan is _FIRST:
            raise Failure(f"the server does not start: {server.last_words()}", code=max(server.code, 1))
        self._books.fail(f"the server ended by itself with exit code {server.code}; it said: {server.last_words()}")
        raise _Stop


class _Strike:
    """Kills a server at the moment that its plan names. `struck`: it did."""

    def __init__(self, server: Server, plan: Plan, lasting_s: Mapping[str, float]) -> None:
        self.struck = False
        self._server = server
        self._kind = plan.kind
        self._delay_s = plan.delay_s * lasting_s.get(plan.kind, 1.0)
        self._reached = anyio.Event()

    def reach(self, kind: str) -> None:
        """A phase begins."""
        if kind == self._kind:
            self._reached.set()

    async def run(self) -> None:
        """Wait for the moment, and kill."""
        await self._reached.wait()
        await anyio.sleep(self._delay_s)
        if not self._server.ended.is_set():
            self.struck = True
            self._server.signal(signal.SIGKILL)


def _environment(options: Options, plan: Plan) -> dict[str, str]:
    """The environment of a server: ours, and the plan's settings, but for those that somebody chose.

    It asks for no token: it serves this machine only, on a port that nobody knows, what nobody needs.
    """
    settings = {**plan.settings, "journal.directory": options.log.parent / "journal"}
    values = {key: value for key, value in settings.items() if options.config.origin(key) == "default"}
    values |= {"write_behind.durability": options.durability, "logging.level": "INFO", "logging.format": "text"}
    values |= {"http.tokens": "[]", "http.tokens_file": "null"}
    variables = {f"AGENT_RUNTIME__{key.replace('.', '__').upper()}": str(value) for key, value in values.items()}
    return {**os.environ, **variables, "PYTHONUNBUFFERED": "1"}
