"""`agent-runtime import` and `agent-runtime export`."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import anyio.to_thread
import typer

from ..config import Config, did_you_mean
from ..formats import Entry, ImportFormat, ImportRequest, ImportSource
from ..plugins import PluginManager
from ..runtime import Runtime
from ..transfer import Imported, chat_entries, export_sessions, import_sessions, new_file, read_lines
from .exits import FAILED, tell
from .options import ConfigFile, StorageUrl, load
from .running import run
from .terminal import progress
from .text import visible

__all__ = ["export", "import_"]

CHAT: Final = "chat"
_STANDARD = Path("-")


def import_(
    source: Annotated[
        str, typer.Argument(metavar="FILE|URL", help="JSON Lines, one session a line; - reads standard input.")
    ],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="chat: messages in chat format, or what export writes. Plugins bring others, such as databases.",
        ),
    ] = CHAT,
    deleted: Annotated[
        bool, typer.Option("--deleted", help="Restore sessions too that the source keeps, but marks as deleted.")
    ] = False,
    config_file: ConfigFile = None,
    storage: StorageUrl = None,
) -> None:
    """Import sessions from a file, or from what a plugin can read.

    A line is a JSON object with a session_id and messages in chat format; what export writes is restored fully.

    Sessions that are there already stay as they are, so an import may be repeated; one that was interrupted goes on
    where it stopped. A session that can't be stored, or differs from the one that is there, is refused, naming its line
    and the field; the others go in, and the exit code is 1.
    """
    config = load(config_file, storage)
    with _format(config, format_)(ImportRequest(source=source, deleted=deleted)) as opened:
        imported = run(config, partial(_import, source=opened))
    typer.echo(f"{opened.name}: {_summary(imported)}")
    if not imported.complete:
        raise typer.Exit(FAILED)


def _format(config: Config, name: str) -> ImportFormat:
    """The format of this name."""
    plugins = PluginManager(disabled=config.plugins.disabled)
    plugins.load()
    formats = plugins.import_formats() | {CHAT: open_chat}
    if name not in formats:
        raise typer.BadParameter(f"there is no format {name!r}{did_you_mean(name, formats)}", param_hint="'--format'")
    return formats[name]


@contextmanager
def open_chat(request: ImportRequest) -> Iterator[ImportSource]:
    """The format `chat`: JSON Lines in a file, or from standard input."""
    if request.deleted:
        raise typer.BadParameter("files in the format chat mark no session as deleted", param_hint="--deleted")
    file = Path(request.source)
    name = _name(file, "standard input")
    with _reading(file) as lines:
        yield ImportSource(name=name, entries=_chat_entries(name, lines), total=_size(lines))


async def _chat_entries(name: str, file: BinaryIO) -> AsyncGenerator[Entry, None]:
    async with aclosing(read_lines(file)) as lines, aclosing(chat_entries(name, lines)) as entries:
        async for entry in entries:
            yield entry


async def _import(runtime: Runtime, *, source: ImportSource) -> Imported:
    with progress(f"importing {source.name}", source.total) as told:
        async with aclosing(source.entries) as entries:
            return await import_sessions(
                runtime,
                entries,
                refused=tell,
                progress=lambda imported, size: told(f"{imported.sessions} session(s)", size),
            )


def _summary(imported: Imported) -> str:
    parts = {
        "created": imported.created,
        "resumed": imported.resumed,
        "unchanged": imported.unchanged,
        "refused": imported.refused,
    }
    if imported.problems:
        parts["problem(s)"] = imported.problems
    return ", ".join(f"{count} {what}" for what, count in parts.items())


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; - writes standard output.")],
    plain: Annotated[
        bool, typer.Option("--plain", help="Write only session_id and messages, as in other people's files.")
    ] = False,
    session_ids: Annotated[
        list[str] | None,
        typer.Option("--session", metavar="ID", help="Export this session; may be repeated. Default: all."),
    ] = None,
    config_file: ConfigFile = None,
    storage: StorageUrl = None,
) -> None:
    """Export sessions to a file.

    A line is a session, the oldest first, as a JSON object with all it has, so that import restores it fully. The file
    appears, or is replaced, in one step once everything is written.
    """
    config = load(config_file, storage)
    with ExitStack() as stack:
        target = sys.stdout.buffer if file == _STANDARD else stack.enter_context(new_file(file))
        count = run(
            config,
            partial(_export, target=target, file=file, plain=plain, session_ids=session_ids),
            existing=True,
        )
    if file != _STANDARD:
        typer.echo(f"{_name(file, '')}: {count} exported")


async def _export(runtime: Runtime, *, target: BinaryIO, file: Path, plain: bool, session_ids: list[str] | None) -> int:
    async def write(line: bytes) -> None:
        await anyio.to_thread.run_sync(target.write, line)

    with progress(f"exporting to {_name(file, 'standard output')}", None) as told:
        count = await export_sessions(
            runtime,
            write,
            session_ids=session_ids or None,
            plain=plain,
            progress=lambda sessions, size: told(f"{sessions} session(s), {size / 1e6:.1f} MB", sessions),
        )
    await anyio.to_thread.run_sync(target.flush)
    return count


@contextmanager
def _reading(file: Path) -> Iterator[BinaryIO]:
    if file == _STANDARD:
        yield sys.stdin.buffer
        return
    with file.open("rb") as lines:
        yield lines


def _size(file: BinaryIO) -> int | None:
    """How many bytes there are to be read, if that is known."""
    status = os.fstat(file.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _name(file: Path, standard: str) -> str:
    return standard if file == _STANDARD else visible(str(file))
