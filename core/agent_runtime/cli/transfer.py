"""`agent-runtime import` and `agent-runtime export`."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, aclosing, contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO

import anyio.to_thread
import typer

from ..runtime import Runtime
from ..transfer import Imported, export_sessions, import_sessions, new_file, read_lines
from .exits import FAILED, tell
from .options import ConfigFile, StorageUrl, load
from .running import run
from .terminal import progress
from .text import visible

__all__ = ["export", "import_"]

_STANDARD = Path("-")


class Format(StrEnum):
    """What a file to import holds."""

    CHAT = "chat"


def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON Lines, one session a line; - reads standard input.")
    ],
    format_: Annotated[
        Format, typer.Option("--format", help="chat: messages in chat format, or what export writes.")
    ] = Format.CHAT,
    config_file: ConfigFile = None,
    storage: StorageUrl = None,
) -> None:
    """Import sessions from a file.

    A line is a JSON object with a session_id and messages in chat format; what export writes is restored fully.

    Sessions that are there already stay as they are, so an import may be repeated; one that was interrupted goes on
    where it stopped. A session that can't be stored, or differs from the one that is there, is refused, naming its line
    and the field; the others go in, and the exit code is 1.
    """
    config = load(config_file, storage)
    with _reading(file) as lines:
        imported = run(config, partial(_import, file=lines, name=_name(file, "standard input"), total=_size(lines)))
    typer.echo(f"{_name(file, 'standard input')}: {_summary(imported)}")
    if imported.refused:
        raise typer.Exit(FAILED)


async def _import(runtime: Runtime, *, file: BinaryIO, name: str, total: int | None) -> Imported:
    with progress(f"importing {name}", total) as told:
        async with aclosing(read_lines(file)) as lines:
            return await import_sessions(
                runtime,
                lines,
                name=name,
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
        count = run(config, partial(_export, target=target, file=file, plain=plain, session_ids=session_ids))
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
