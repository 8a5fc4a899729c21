"""Opening the sessions for a command, and closing them whatever happens.

Ctrl-C and SIGTERM cancel the work; what was changed by then is stored before the command ends. A second one ends it at
once.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import anyio
from anyio.abc import TaskStatus

from ..client import SessionsClient
from ..config import Config, known_keys
from ..directories import journal_place
from ..errors import AgentRuntimeError, ConfigError, InvalidInput, LeaseHeld, StorageUnavailable
from ..plugins import PluginManager
from ..runtime import Runtime, open_runtime
from ..storage import Storage, StorageConfig
from .exits import HELD, LEFT, SIGNALLED, Failure, failure_of

__all__ = ["opened", "run", "run_anywhere", "with_place"]

T = TypeVar("T")


def run(config: Config, work: Callable[[Runtime], Awaitable[T]], *, existing: bool = False) -> T:
    """Open the sessions, do the work, store everything, close. `existing`: a database that is missing is not made.

    Raises:
        Failure: it was interrupted, or changes are left that could not be stored.
        Exception: what opening, the work, or closing raised.
    """
    return _Run(config, work, existing=existing).run()


def run_anywhere(config: Config, server: str | None, work: Callable[[SessionsClient], Awaitable[T]]) -> T:
    """Do the work where the sessions are: with this server; without one as `run` with `existing`, or if a server has
    them, with that.

    Raises:
        Failure, Exception: as `run`.
    """
    return _Run(config, work, lambda url: _at_server(config, url, work), server, existing=True).run()


@asynccontextmanager
async def opened(config: Config) -> AsyncIterator[Storage]:
    """The database of the configuration, which must be there: nothing is made or migrated.

    Its errors name the key that is to be mended, and where that is set.
    """
    try:
        plugins = PluginManager(disabled=config.plugins.disabled)
        plugins.load()
        factory = plugins.storage_for(config.storage.url)
        options = dict(config.storage.options)
        async with factory(StorageConfig(url=config.storage.url, options=options, existing=True)) as storage:
            yield storage
    except AgentRuntimeError as error:
        raise with_place(error, config) from error


async def _at_server(config: Config, url: str, work: Callable[[SessionsClient], Awaitable[T]]) -> T:
    plugins = PluginManager(disabled=config.plugins.disabled)
    plugins.load()
    async with plugins.client_for(url)(url) as sessions:
        return await work(sessions)


class _Run(Generic[T]):
    def __init__(
        self,
        config: Config,
        work: Callable[[Runtime], Awaitable[T]],
        at_server: Callable[[str], Awaitable[T]] | None = None,
        server: str | None = None,
        *,
        existing: bool,
    ) -> None:
        self._config = config
        self._work = work
        self._at_server = at_server
        self._server = server
        self._existing = existing
        self._runtime: Runtime | None = None
        self._results: list[T] = []
        self._error: Exception | None = None
        self._signal: signal.Signals | None = None

    def run(self) -> T:
        anyio.run(self._watched)
        runtime, error = self._runtime, self._error
        left = 0 if runtime is None else runtime.watermarks.accepted - runtime.watermarks.stored
        if left:
            lines = failure_of(error).lines if error is not None else (f"{left} change(s) could not be stored",)
            raise Failure(*lines, code=LEFT) from error
        if error is not None:
            raise error
        if self._signal is not None:
            raise Failure("interrupted; everything done before is stored", code=SIGNALLED + self._signal)
        return self._results[0]

    async def _watched(self) -> None:
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._watch, tasks.cancel_scope)
            try:
                await self._done()
            except Exception as error:  # noqa: BLE001 — kept out of the task group's exception group, raised by run()
                self._error = error
            tasks.cancel_scope.cancel()

    async def _watch(self, scope: anyio.CancelScope, *, task_status: TaskStatus[None]) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                self._signal = number
                break
        scope.cancel()

    async def _done(self) -> None:
        if self._at_server is not None and self._server is not None:
            self._results.append(await self._at_server(self._server))
            return
        try:
            await self._opened()
        except LeaseHeld as held:
            if self._at_server is None:
                held.add_note("stop that first: no server can be asked to do this")
                raise
            if held.address is None:
                raise
            try:
                self._results.append(await self._at_server(held.address))
            except StorageUnavailable as error:
                raise Failure(str(held), str(error), code=HELD) from error

    async def _opened(self) -> None:
        if self._existing:
            async with opened(self._config) as storage:  # it is there
                if self._at_server is not None and journal_place(self._config, storage.abilities) is None:
                    await _check_no_server(storage)
        try:
            async with open_runtime(self._config) as runtime:
                self._runtime = runtime
                self._results.append(await self._work(runtime))
        except AgentRuntimeError as error:
            if self._runtime is not None:
                raise
            raise with_place(error, self._config) from error


async def _check_no_server(storage: Storage) -> None:
    """Say that a server has the database, where opening it would end sooner, as nobody said where its journal lies."""
    async with storage.snapshot() as snapshot:
        lease = await snapshot.lease()
    if lease is not None and lease.holder is not None and lease.address is not None:
        raise LeaseHeld(lease.holder, lease.expires_in_s, lease.address)


def with_place(error: AgentRuntimeError, config: Config) -> AgentRuntimeError:
    """The error; if it names keys of the configuration, with the places where they are set."""
    match error:
        case ConfigError():
            return ConfigError([_placed(problem, config) for problem in error.problems])
        case InvalidInput():
            return ConfigError([_placed(str(error), config)])
        case _:
            return error


def _placed(problem: str, config: Config) -> str:
    for key in known_keys():
        if problem.startswith((f"{key}:", f"{key}.")) and config.origin(key) not in ("default", "option"):
            return f"{config.origin(key)}: {problem}"
    return problem
