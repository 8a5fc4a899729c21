"""`agent-runtime copy`: from one database to another."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Annotated

import anyio
import typer
from anyio.abc import TaskStatus

from ..config import Config
from ..copying import Copied, Progress, Source, copy, quiet
from ..directories import journal_places
from ..errors import InvalidInput, LeaseHeld
from ..journal import LocalFiles
from ..plugins import PluginManager
from ..storage import Storage, StorageConfig
from .exits import SIGNALLED, Failure
from .options import AsJson, ConfigFile, load
from .reading import undisturbed
from .running import opened
from .terminal import progress
from .text import json_line

__all__ = ["copy_all"]


def copy_all(
    from_url: Annotated[
        str, typer.Option("--from", metavar="URL", help="Database to copy, such as sqlite:///data/agent_runtime.db.")
    ],
    to_url: Annotated[
        str,
        typer.Option(
            "--to", metavar="URL", help="An empty database, or one with a part of this copy; its options in the URL."
        ),
    ],
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """Copy all that a database has into another one, of whatever kind, to the letter.

    Neither may be open: the copy holds both. What the journals of the one to copy have must be stored. The
    configuration is that database's: its options, and the directory of its journal. The other one is not made its
    successor anywhere: that is what storage.url is for.

    A copy that was interrupted goes on where it was when it is run again; until then nobody else can open its target.
    In the end both are read and compared, table by table, and the exit code is 1 if they differ.
    """
    config = load(config_file, from_url)
    copied = anyio.run(_interruptible, lambda: _copy(config, to_url))
    if as_json:
        sys.stdout.write(
            json_line(
                {
                    "resumed": copied.resumed,
                    "differing": copied.differing,
                    "source": copied.source,
                    "target": copied.target,
                }
            )
        )
    else:
        sys.stdout.writelines(_lines(copied))
    if copied.differing:
        raise Failure(f"the copy differs from its source in {', '.join(copied.differing)}: copy to an empty database")


async def _copy(config: Config, to_url: str) -> Copied:
    with undisturbed("agent_runtime.journal"):
        async with _source(config) as source, _target(config, to_url) as target:
            total = 2 * (source.sessions + source.messages)
            with progress("copying", total) as told, _concerning("--to"):

                def tell(so_far: Progress) -> None:
                    done = so_far.sessions + so_far.messages + (total // 2 if so_far.stage == "comparing" else 0)
                    told(f"{so_far.stage}: {so_far.sessions} session(s), {so_far.messages} message(s)", done)

                return await copy(source, target, _journals(target), now=datetime.now(UTC), progress=tell)


@asynccontextmanager
async def _source(config: Config) -> AsyncIterator[Source]:
    async with opened(config) as storage, AsyncExitStack() as stack:
        with _concerning("--from"):
            source = await stack.enter_async_context(quiet(storage, _journals(storage, config)))
        yield source


@asynccontextmanager
async def _target(config: Config, url: str) -> AsyncIterator[Storage]:
    plugins = PluginManager(disabled=config.plugins.disabled)
    plugins.load()
    async with AsyncExitStack() as stack:
        with _concerning("--to"):
            factory = plugins.storage_for(url)
            target = await stack.enter_async_context(factory(StorageConfig(url=url)))
        yield target


def _journals(storage: Storage, config: Config | None = None) -> list[LocalFiles]:
    """Where the journals of a database lie; the target's where the storage says, as nobody has configured it."""
    return [LocalFiles(place) for place in journal_places(config, storage.abilities)]


@contextmanager
def _concerning(option: str) -> Iterator[None]:
    """Errors tell which of the two databases they are of."""
    try:
        yield
    except InvalidInput as error:
        path = option if error.path in ("source", "target") else error.path.replace("storage.url", option)
        raise InvalidInput(path, error.problem) from error
    except LeaseHeld as error:
        error.add_note(f"that is the database of {option}")
        raise


def _lines(copied: Copied) -> Iterator[str]:
    """What both sides have, table by table."""
    for table, of_source in copied.source.items():
        of_target = copied.target[table]
        if of_source == of_target:
            yield f"{table:<12}{of_source.rows:>12}  sha256 {of_source.sha256}\n"
        else:
            yield f"{table:<12}{of_source.rows:>12}  sha256 {of_source.sha256} in the source\n"
            yield f"{'':<12}{of_target.rows:>12}  sha256 {of_target.sha256} in the target\n"
    if not copied.differing:
        yield f"the same on both sides{', a part of it from before' if copied.resumed else ''}\n"


async def _interruptible(work: Callable[[], Awaitable[Copied]]) -> Copied:
    """Do the work; Ctrl-C and SIGTERM end it in order.

    Raises:
        Failure: it was interrupted.
    """
    results: list[Copied] = []
    errors: list[Exception] = []
    async with anyio.create_task_group() as tasks:

        async def watch(*, task_status: TaskStatus[None]) -> None:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                async for number in signals:
                    told = "interrupted; run it again, and it goes on where it was"
                    errors.append(Failure(told, code=SIGNALLED + number))
                    break
            tasks.cancel_scope.cancel()

        await tasks.start(watch)
        try:
            results.append(await work())
        except Exception as error:  # noqa: BLE001 — raised below, outside of the task group's exception group
            errors.insert(0, error)
        tasks.cancel_scope.cancel()
    if errors:
        raise errors[0]
    return results[0]
