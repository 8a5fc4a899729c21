"""What endpoints of FastAPI and Starlette need: the runtime, a session, the old managers, a SQL connection.

    app = FastAPI(lifespan=runtime_lifespan("sqlite:///data/agent_runtime.db"))

    @app.post("/say/{session_id}")
    async def say(session: SessionDep, text: str) -> dict:
        await session.append("user", text)
        return {"history": await session.history()}

Each is a plain function of the request, for Starlette and for one's own dependencies, and for FastAPI an alias:

    RuntimeDep              get_runtime(request)                   the runtime
    SessionDep              await get_session(request, id)         the session of the path's `session_id`, or a 404
    SessionManagerDep       get_session_manager_dep(request)       the old manager, asynchronous
    AgentContextManagerDep  get_agent_context_manager_dep(request) likewise
    ConnectionDep           connection(request)                    a SqlConnection that reads and writes
    ReadConnectionDep       read_connection(request)               one that reads

The last two are asynchronous context managers as plain functions. FastAPI is imported when an alias is asked for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from typing_extensions import deprecated

from agent_runtime import (
    BlockingRuntime,
    Config,
    InvalidInput,
    Runtime,
    SessionHandle,
    SessionNotFound,
    load_config,
    open_runtime,
)

from .elsewhere import runtime_elsewhere
from .managers import AsyncAgentContextManager, AsyncSessionManager
from .opened import NotOpened, on_a_thread, open_managers
from .sql import SqlConnection, SqlDatabase

__all__ = [
    "AgentContextManagerDep",
    "ConnectionDep",
    "ReadConnectionDep",
    "RuntimeDep",
    "SessionDep",
    "SessionManagerDep",
    "connection",
    "get_agent_context_manager_dep",
    "get_connection",
    "get_read_connection",
    "get_runtime",
    "get_session",
    "get_session_manager_dep",
    "read_connection",
    "runtime_lifespan",
]


def runtime_lifespan(
    config: Config | str | None = None, *, plugins: Iterable[object] = (), old_calls: bool = True
) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """The lifespan of an application with a runtime: opened before the first request, drained after the last.

    `config` is a configuration or the URL of a storage; None reads the environment. With `old_calls` the runtime has a
    thread of its own, so that the old managers work from every endpoint, `def` or `async def`, and the new calls beside
    them. Without, it runs on the application's event loop, which is what is left when no old call is.

    It sets `app.state.runtime`, which is all that `get_runtime` and `get_session` look for: an application may set it
    by itself, to what `open_runtime` gives.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        settings = load_config() if config is None else Config.of(config) if isinstance(config, str) else config
        async with AsyncExitStack() as stack:
            if old_calls:
                threads = await stack.enter_async_context(on_a_thread(open_managers(settings, plugins=plugins)))
                app.state.blocking_runtime = threads
                app.state.runtime = runtime_elsewhere(threads)
            else:
                app.state.runtime = await stack.enter_async_context(open_runtime(settings, plugins=plugins))
            stack.callback(_forget, app)
            if not settings.storage.url.startswith("memory:"):
                app.state.sql = await stack.enter_async_context(SqlDatabase.open(settings))
            yield

    return lifespan


def _forget(app: Starlette) -> None:
    for name in ("blocking_runtime", "runtime", "sql"):
        app.state._state.pop(name, None)


def _state(request: HTTPConnection, name: str, problem: str) -> Any:
    found = getattr(request.app.state, name, None)
    if found is None:
        raise NotOpened(problem)
    return found


_NO_LIFESPAN: Final = "this application has no runtime: give it lifespan=runtime_lifespan(…)"


def get_runtime(request: HTTPConnection) -> Runtime:
    """The runtime of the application.

    Raises:
        NotOpened: it has none.
    """
    runtime: Runtime = _state(request, "runtime", _NO_LIFESPAN)
    return runtime


async def get_session(request: HTTPConnection, session_id: str) -> SessionHandle:
    """A session of the runtime; in FastAPI that of the path parameter `session_id`.

    Raises:
        HTTPException: 404, there is none; 422, this can't be the id of one.
    """
    try:
        return await get_runtime(request).get_session(session_id)
    except SessionNotFound as error:
        raise HTTPException(404, str(error)) from error
    except InvalidInput as error:
        raise HTTPException(422, str(error)) from error


@deprecated("use get_runtime(request)", category=None)
def get_session_manager_dep(request: HTTPConnection) -> AsyncSessionManager:
    """The old session manager of the application."""
    return AsyncSessionManager(_threads(request))


@deprecated("use get_runtime(request)", category=None)
def get_agent_context_manager_dep(request: HTTPConnection) -> AsyncAgentContextManager:
    """The old context manager of the application."""
    return AsyncAgentContextManager(_threads(request))


def _threads(request: HTTPConnection) -> BlockingRuntime:
    problem = "the old managers need lifespan=runtime_lifespan(…), with old_calls"
    threads: BlockingRuntime = _state(request, "blocking_runtime", problem)
    return threads


async def get_connection(request: HTTPConnection) -> AsyncIterator[SqlConnection]:
    """A connection that reads and writes, until the request is answered. What is not committed is rolled back."""
    async with _sql(request).connect() as connected:
        yield connected


async def get_read_connection(request: HTTPConnection) -> AsyncIterator[SqlConnection]:
    """A connection that reads, until the request is answered."""
    async with _sql(request).connect(read_only=True) as connected:
        yield connected


connection = asynccontextmanager(get_connection)
read_connection = asynccontextmanager(get_read_connection)


def _sql(request: HTTPConnection) -> SqlDatabase:
    problem = "no SQL database: give the application lifespan=runtime_lifespan(…), with a storage that is not memory:"
    database: SqlDatabase = _state(request, "sql", problem)
    return database


if TYPE_CHECKING:
    from fastapi import Depends

    RuntimeDep = Annotated[Runtime, Depends(get_runtime)]
    SessionDep = Annotated[SessionHandle, Depends(get_session)]
    SessionManagerDep = Annotated[AsyncSessionManager, Depends(get_session_manager_dep)]
    AgentContextManagerDep = Annotated[AsyncAgentContextManager, Depends(get_agent_context_manager_dep)]
    ConnectionDep = Annotated[SqlConnection, Depends(get_connection)]
    ReadConnectionDep = Annotated[SqlConnection, Depends(get_read_connection)]

_ALIASES: Final[dict[str, tuple[type, Callable[..., object]]]] = {
    "RuntimeDep": (Runtime, get_runtime),
    "SessionDep": (SessionHandle, get_session),
    "SessionManagerDep": (AsyncSessionManager, get_session_manager_dep),
    "AgentContextManagerDep": (AsyncAgentContextManager, get_agent_context_manager_dep),
    "ConnectionDep": (SqlConnection, get_connection),
    "ReadConnectionDep": (SqlConnection, get_read_connection),
}


def __getattr__(name: str) -> object:
    """The aliases, for whoever has FastAPI."""
    if name not in _ALIASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from fastapi import Depends
    except ImportError as error:
        raise ImportError(
            f"{name} needs FastAPI, which is not installed: pip install fastapi, or call the plain functions"
        ) from error
    kind, function = _ALIASES[name]
    return Annotated[kind, Depends(function)]
