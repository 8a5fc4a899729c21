"""`agent-runtime journal …`: what a journal holds, whether somebody writes to it or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ..config import Config
from ..directories import journal_place
from ..errors import StorageError
from ..journal import read_directory
from ..journal.inspection import DamageFound, Inspection, SegmentFound, inspect
from ..journal.still import StillFiles
from ..storage import Storage
from .exits import Failure
from .options import AsJson, ConfigFile, StorageUrl, load
from .reading import read, still, undisturbed
from .terminal import console, output_is_terminal, progress
from .text import json_line, moment, visible

__all__ = ["app"]

app = typer.Typer(help="Look into the journal.", no_args_is_help=True)


class _Database(msgspec.Struct, frozen=True, kw_only=True):
    """What the database says of the journal: it stands at `sequence`, at `journal_sequence` by what this journal gave.

    `generation` is the one of the journal that it knows; None: it does not know the journal.
    """

    database_id: str
    sequence: int
    journal_sequence: int | None = None
    generation: int | None = None


class _Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where to look. `stored`: the database's watermark, if the two belong together; `problem`: why it is not known."""

    path: Path
    journal_id: str | None = None
    files: StillFiles | None = None
    stored: int | None = None
    database: _Database | None = None
    problem: str | None = None


@app.callback()
def _journal() -> None:
    """Nothing of its own; it makes `inspect` a command below `journal`."""


@app.command("inspect")
def inspect_journal(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIRECTORY]",
            help="The journal's directory. Default: the one of the configured database.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
    storage: StorageUrl = None,
) -> None:
    """Show what a journal holds: segments, sequences, damage, and how much of it the database has.

    Nothing is locked or changed, so it may be done while a server runs. Named by its DIRECTORY alone, a journal is
    looked at without its database.

    A torn tail is what a crash leaves; it is no loss, for nobody was told that those bytes were written. With damage in
    the middle the exit code is 1.
    """
    configured = directory is None or config_file is not None or storage is not None
    place = _find(load(config_file, storage) if configured else None, directory)
    if place.files is None:
        raise Failure(f"there is no journal at {place.path}")
    with (
        closing(place.files),
        undisturbed("agent_runtime.journal"),
        progress(f"reading {place.path}", place.files.bytes) as told,
    ):
        found = inspect(place.files, journal_id=place.journal_id, stored=place.stored, progress=told)
    if as_json:
        sys.stdout.write(json_line({"journal": found, "database": place.database, "problem": place.problem}))
    else:
        _print(found, place)
    if found.damaged:
        raise Failure(f"the journal {place.path} is damaged: {_extent(found)}")


def _find(config: Config | None, directory: Path | None) -> _Place:
    """The journal as it is now, and then what the database says of it."""
    if config is None:
        path = (directory or Path()).absolute()
        return _Place(path=path, files=still(path))
    named = directory or (None if config.journal.directory is None else Path(config.journal.directory))

    async def find(storage: Storage) -> _Place:
        path = named.absolute() if named is not None else journal_place(config, storage.abilities)
        if path is None:
            raise Failure("journal.directory is not set: name the journal's directory")
        return await _ask(storage, path)

    try:
        return read(config, find)
    except StorageError as error:
        if named is None:
            raise
        return _Place(path=named.absolute(), files=still(named.absolute()), problem=str(error))


async def _ask(storage: Storage, path: Path) -> _Place:
    files = still(path)
    if files is None:
        return _Place(path=path)
    async with storage.snapshot() as snapshot:
        lease = await snapshot.lease()
        if lease is None:
            return _Place(path=path, files=files, problem="it is new: no runtime ever had it open")
        with undisturbed("agent_runtime.journal"):
            directory = read_directory(files, lease.journal_id)
        journal_id = directory.journal_id
        row = None if journal_id is None else await snapshot.journal(journal_id)
        database = _Database(
            database_id=lease.database_id,
            sequence=snapshot.watermark,
            journal_sequence=None if row is None else row.sequence,
            generation=None if row is None else row.generation,
        )
    stored = database.sequence if directory.database_id in (None, database.database_id) else None
    return _Place(path=path, journal_id=journal_id, files=files, stored=stored, database=database)


def _extent(found: Inspection) -> str:
    middle = [damage for damage in found.damage if not damage.torn]
    parts = []
    if middle:
        parts.append(f"{len(middle)} place(s) in the middle, {sum(damage.bytes for damage in middle)} bytes")
    if found.missing:
        parts.append(f"{sum(last - first + 1 for first, last in found.missing)} change(s) are missing")
    return "; ".join(parts)


def _print(found: Inspection, place: _Place) -> None:
    sys.stdout.writelines(f"{label:<14}{visible(text)}\n" for label, text in _facts(found, place))
    rows = [_row(segment) for segment in found.segments]
    if not output_is_terminal():
        sys.stdout.writelines("\t".join(["segment", *row]) + "\n" for row in rows)
    elif rows:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        table.add_column("segment", no_wrap=True)
        for name in ("bytes", "generation", "first", "last", "changes"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("begun")
        for row in rows:
            table.add_row(*row)
        console(sys.stdout).print("", table, sep="\n")


def _facts(found: Inspection, place: _Place) -> Iterator[tuple[str, str]]:
    yield "journal", found.journal_id or "none yet"
    yield "directory", found.directory
    if found.database_id is not None:
        yield "pairing", f"database {found.database_id}, generation {found.generation}"
    yield "size", f"{found.bytes} bytes in {len(found.segments)} segment(s)"
    yield "changes", f"{found.changes}{_from_to(found.first, found.last)}"
    yield from _of_database(found, place)
    for first, last in found.voids:
        yield "void", f"{_range(first, last)}: a write that failed, and was not acknowledged"
    for first, last in found.missing:
        yield "missing", _range(first, last)
    for damage in found.damage:
        yield "damage", _describe(damage)
    for file in found.kept:
        yield "kept", f"{file.file}: {file.bytes} bytes, cut from a torn tail"


def _of_database(found: Inspection, place: _Place) -> Iterator[tuple[str, str]]:
    database = place.database
    if place.problem is not None:
        yield "database", f"can't be asked: {place.problem}"
    if database is None:
        return
    if place.stored is None:
        yield "database", f"{database.database_id}: another one than the journal belongs to"
        return
    known = "does not know this journal"
    if database.journal_sequence is not None:
        known = f"has this journal up to {database.journal_sequence}"
    yield "database", f"stands at {database.sequence}, {known}"
    yield "not stored", f"{found.unstored} change(s)"


def _describe(damage: DamageFound) -> str:
    kind = "a torn tail" if damage.torn else "in the middle"
    return f"{damage.file}, at byte {damage.offset}: {damage.bytes} bytes, {kind}"


def _row(segment: SegmentFound) -> Sequence[str]:
    numbers = (segment.generation, segment.first, segment.last)
    generation, first, last = ("" if number is None else str(number) for number in numbers)
    begun = "" if segment.created_at is None else moment(segment.created_at)
    return visible(segment.file), str(segment.bytes), generation, first, last, str(segment.frames), begun


def _from_to(first: int | None, last: int | None) -> str:
    return "" if first is None or last is None else f", {_range(first, last)}"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"
