"""`agent-runtime serve`: the runtime as a server, from before it is opened to the last change stored.

The order is: listen, answer, open, …, stop answering, drain. So health checks are answered while the runtime recovers,
and no way out spares the drain. SIGTERM or Ctrl-C: no more connections, streams are told to end, requests under way
finish, then what is unstored is stored. Ctrl-C again: requests are not waited for, the drain is the same. SIGHUP, where
there is a file with tokens: it is read again.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable
from importlib.metadata import version
from typing import Final

import anyio
import msgspec
from anyio.abc import TaskStatus

from agent_runtime import AgentRuntimeError, Config, ConfigError, DrainIncomplete, LeaseLost, Runtime

from .application import OPERATIONS, create_app, lifespan
from .documentation import openapi
from .engines import Engine, Loop, engine_for
from .service import Service

__all__ = ["describe", "run_server"]

logger: Final = logging.getLogger("agent_runtime.http")


async def run_server(config: Config, loop: Loop, announce: Callable[[str], None]) -> None:
    """Serve until a signal, or until another runtime takes over. `announce` is told what is served, once it is.

    Raises:
        ConfigError: it can't listen there, or may not.
        DrainIncomplete: it has stopped with changes that are not stored.
        LeaseLost: another runtime has taken over; all that was acknowledged is stored.
        LeaseHeld, StorageError, PluginError: as `open_runtime`; nothing was served.
    """
    app = create_app(config)
    service: Service = app.state.service
    listener = _listen(config, asks=bool(service.tokens))
    url = service.address = _url(config.http.host, listener)
    service.guard.host = _only_name(config, listener, asks=bool(service.tokens))
    engine = engine_for(loop, app)
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        opening, ended = anyio.CancelScope(), anyio.Event()
        await tasks.start(_heed_signals, service, engine, opening)
        tasks.start_soon(_serve, engine, listener, ended)
        try:
            with opening:
                async with lifespan(app):
                    runtime = service.running()
                    tasks.start_soon(_heed_takeover, runtime, engine)
                    for line in _announcement(runtime, url):
                        announce(line)
                    await ended.wait()
                    logger.info("stopping; %d change(s) are to be stored", runtime.status().pending.changes)
        except LeaseLost as error:
            status = runtime.status()
            journal = None if status.journal is None else status.journal.place
            left = status.pending.changes
            failure = DrainIncomplete(left, str(error), journal) if left else error
        except AgentRuntimeError as error:
            failure = error
        engine.stop()
        await ended.wait()
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def describe(config: Config) -> str:
    """The OpenAPI document of the server of a configuration. Its runtime is opened, and closed again.

    Raises:
        PluginError: a plugin describes a route in a wrong way.
    """
    app = create_app(config)
    async with lifespan(app):
        return msgspec.json.format(openapi(app.state.service, OPERATIONS)).decode()


async def _serve(engine: Engine, listener: socket.socket, ended: anyio.Event) -> None:
    try:
        await engine.serve(listener)
    finally:
        ended.set()


async def _heed_signals(
    service: Service, engine: Engine, opening: anyio.CancelScope, *, task_status: TaskStatus[None]
) -> None:
    numbers = [signal.SIGINT, signal.SIGTERM]
    if service.config.http.tokens_file is not None:
        numbers.append(signal.SIGHUP)
    with anyio.open_signal_receiver(*numbers) as signals:
        task_status.started()
        async for number in signals:
            if number == signal.SIGHUP:
                service.tokens.reload()
            elif not service.stopping.is_set():
                service.stop()
                engine.stop()
                if service.runtime is None:
                    opening.cancel()
            elif number == signal.SIGINT:
                engine.hurry()


async def _heed_takeover(runtime: Runtime, engine: Engine) -> None:
    await runtime.wait_fenced()
    engine.stop()


def _announcement(runtime: Runtime, url: str) -> list[str]:
    config = runtime.config
    plugins = ", ".join(sorted(plugin.name for plugin in runtime.plugins.describe() if not plugin.disabled))
    return [
        f"agent-runtime {version('agent-runtime')} listens on {url}",
        f"stores in {config.shown()['storage']['url']} (durability: {runtime.status().durability})",
        f"plugins: {plugins}",
    ]


def _listen(config: Config, *, asks: bool) -> socket.socket:
    """A socket that listens where the configuration says: on this machine only, unless it `asks` for tokens, or may."""
    http = config.http
    try:
        found = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        if not (asks or http.insecure or _is_loopback(str(address[0]))):
            problem = f"http.host: {http.host} can be reached from other machines, where all could read every session"
            way_out = "set http.tokens or http.tokens_file, or http.insecure to true if something else guards it"
            raise ConfigError([f"{problem}; {way_out}"])
        return socket.create_server((str(address[0]), http.port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        problem = f"can't listen on {http.host}, port {http.port}: {reason}"
        raise ConfigError([f"{problem}; choose another with --port or --host"]) from None


def _only_name(config: Config, listener: socket.socket, *, asks: bool) -> str | None:
    """The name under which requests must come; None: any, as they have tokens, or something else guards the server."""
    is_open = asks or config.http.insecure or not _is_loopback(listener.getsockname()[0])
    return None if is_open else config.http.host


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _url(host: str, listener: socket.socket) -> str:
    """Where the server is found; one that listens everywhere is found by the name of its machine."""
    address, port = listener.getsockname()[:2]
    if ipaddress.ip_address(address).is_unspecified:
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
