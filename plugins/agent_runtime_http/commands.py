"""The commands `serve`, `openapi` and `token`."""

from __future__ import annotations

import secrets
from importlib.util import find_spec
from typing import Annotated, Final, Literal, TypeAlias

import anyio
import typer

from agent_runtime import AgentRuntimeError, ConfigError, DrainIncomplete, LeaseHeld, load_config
from agent_runtime.cli.exits import HELD, LEFT, Failure
from agent_runtime.cli.logs import configure_logging
from agent_runtime.cli.options import ConfigFile, StorageUrl
from agent_runtime.cli.running import with_place
from agent_runtime.config import token_digest

__all__ = ["openapi", "serve", "token"]

Loop: TypeAlias = Literal["asyncio", "trio"]

_NO_DATABASE: Final = {
    "storage.url": "memory:",
    "storage.options": {},
    "journal.enabled": False,
    "write_behind.durability": "stored",
}


def serve(
    config: ConfigFile = None,
    storage: StorageUrl = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="ADDRESS", help="Address, instead of http.host (127.0.0.1).")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="Port, instead of http.port (8001); 0 takes a free one."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Stand by while another runtime has the lease, and take over after it.")
    ] = False,
    loop: Annotated[Loop, typer.Option("--loop", help="Event loop; trio comes with the extra `trio`.")] = "asyncio",
) -> None:
    """Serve the sessions over HTTP, until SIGTERM or Ctrl-C. Then what is not stored yet is stored.

    Once it serves it says where it listens, where it stores and which plugins are on. Ctrl-C once more: requests under
    way are not waited for, storing is.
    """
    from .serve import run_server  # and the servers, which other commands do not wait for

    given = {"storage.url": storage, "http.host": host, "http.port": port, "lease.wait": wait or None}
    settings = load_config(config, overrides={key: value for key, value in given.items() if value is not None})
    configure_logging(settings, quiet=False)
    if loop == "trio" and find_spec("hypercorn") is None:
        raise ConfigError(["--loop trio needs Hypercorn: pip install 'agent-runtime[trio]'"])
    options = {"use_uvloop": True} if loop == "asyncio" else {}
    try:
        anyio.run(run_server, settings, loop, typer.echo, backend=loop, backend_options=options)
    except DrainIncomplete as error:
        raise Failure(str(error), code=LEFT) from error
    except LeaseHeld as error:
        raise Failure(f"{error}: stop that first, or stand by with --wait", code=HELD) from error
    except AgentRuntimeError as error:
        raise with_place(error, settings) from error


def openapi(config: ConfigFile = None) -> None:
    """Print the OpenAPI document of the server that this configuration makes, with what its plugins bring.

    No database is opened for it.
    """
    from .serve import describe

    settings = load_config(config, overrides=_NO_DATABASE)
    configure_logging(settings)
    typer.echo(anyio.run(describe, settings))


def token() -> None:
    """Make a bearer token: the token itself, then its hash on a line of its own.

    The token is for who asks the server, in AGENT_RUNTIME_TOKEN or the header Authorization. The hash is for the
    server, in http.tokens or a line of http.tokens_file. Nothing is kept of either.
    """
    made = secrets.token_urlsafe(32)
    typer.echo(made)
    typer.echo(token_digest(made))
