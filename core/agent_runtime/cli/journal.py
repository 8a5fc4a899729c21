"""`agent-runtime journal …`: what a journal holds, whether somebody writes to it or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ..config import Config
from ..directories import Found, journal_places, overtaken_in
from ..errors import JournalError, StorageError
from ..journal import read_directory
from ..journal.inspection import DamageFound, Inspection, SegmentFound, inspect
from ..journal.still import StillFiles
from ..storage import LeaseRow, Snapshot, Storage
from .exits import Failure
from .options import AsJson, ConfigFile, StorageUrl, load
from .reading import pictures, read, undisturbed
from .terminal import console, output_is_terminal, progress
from .text import json_line, moment, visible

__all__ = ["app"]

app = typer.Typer(help="Look into the journal.", no_args_is_help=True)


class _Database(msgspec.Struct, frozen=True, kw_only=True):
    """What the database says of a journal: it stands at `sequence`, at `journal_sequence` by what this journal gave.

    `generation` is the one of the journal that it knows; None: it does not know the journal.
    """

    database_id: str
    sequence: int
    journal_sequence: int | None = None
    generation: int | None = None


class _Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A journal to look into. `stored`: how much of it the database has, if the two belong together; `late`: what it
    has not comes in late; `problem`: why that is not known."""

    files: StillFiles
    journal_id: str | None = None
    stored: int | None = None
    late: bool = False
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
            help="The journal's directory. Default: the one of the configured database; beside an SQLite file each one "
            "that is there.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
    storage: StorageUrl = None,
) -> None:
    """Show what a journal holds: segments, sequences, damage, and how much of it the database has.

    Nothing is locked or changed, so it may be done while a server runs. Named by its DIRECTORY alone, a journal is
    looked at without its database. Beside an SQLite file there may be several, FILE.journal, FILE.journal.2 and so
    on: they are shown in this order, an empty line between two; with --json each is an object on a line.

    A torn tail is what a crash leaves; it is no loss, for nobody was told that those bytes were written. With damage in
    the middle the exit code is 1.
    """
    configured = directory is None or config_file is not None or storage is not None
    failures: list[str] = []
    separator = ""
    with ExitStack() as stack, undisturbed("agent_runtime.journal"):
        subjects = _find(load(config_file, storage) if configured else None, directory, stack)
        for subject in subjects:
            try:
                with progress(f"reading {subject.files.place}", subject.files.bytes) as told:
                    found = inspect(subject.files, journal_id=subject.journal_id, stored=subject.stored, progress=told)
            except JournalError as error:
                failures.append(str(error))
                continue
            if as_json:
                sys.stdout.write(
                    json_line({"journal": found, "database": subject.database, "problem": subject.problem})
                )
            else:
                sys.stdout.write(separator)
                _print(found, subject)
                separator = "\n"
            if found.damaged:
                failures.append(f"the journal {found.directory} is damaged: {_extent(found)}")
    if failures:
        raise Failure(*failures)


def _find(config: Config | None, directory: Path | None, stack: ExitStack) -> list[_Subject]:
    """The journals as they are now, and then what the database says of them. The pictures are closed with `stack`."""
    if config is None:
        return [_Subject(files=files) for files in _taken([(directory or Path()).absolute()], stack)]
    named = directory or (None if config.journal.directory is None else Path(config.journal.directory))

    async def find(storage: Storage) -> list[_Subject]:
        paths = [named.absolute()] if named is not None else journal_places(config, storage.abilities)
        if not paths:
            raise Failure("journal.directory is not set: name the journal's directory")
        return await _ask(storage, _taken(paths, stack))

    try:
        return read(config, find)
    except StorageError as error:
        if named is None:
            raise
        return [_Subject(files=files, problem=str(error)) for files in _taken([named.absolute()], stack)]


def _taken(paths: Sequence[Path], stack: ExitStack) -> list[StillFiles]:
    taken = stack.enter_context(pictures(paths))
    if not taken:
        raise Failure(f"there is no journal at {paths[0]}")
    return taken


async def _ask(storage: Storage, taken: Sequence[StillFiles]) -> list[_Subject]:
    async with storage.snapshot() as snapshot:
        lease = await snapshot.lease()
        if lease is None:
            return [_Subject(files=files, problem="it is new: no runtime ever had it open") for files in taken]
        return [await _measured(storage, snapshot, lease, files) for files in taken]


async def _measured(storage: Storage, snapshot: Snapshot, lease: LeaseRow, files: StillFiles) -> _Subject:
    try:
        directory = read_directory(files, lease.journal_id)
    except JournalError:
        return _Subject(files=files)  # whoever looks into it hears of that again
    row = None if directory.journal_id is None else await snapshot.journal(directory.journal_id)
    database = _Database(
        database_id=lease.database_id,
        sequence=snapshot.watermark,
        journal_sequence=None if row is None else row.sequence,
        generation=None if row is None else row.generation,
    )
    stored, overtaken = None, None
    if directory.database_id in (None, database.database_id):
        overtaken = overtaken_in(files, directory, Found(snapshot.watermark, lease, row), storage.abilities)
        stored = snapshot.watermark if overtaken is None else overtaken.stored
    return _Subject(
        files=files,
        journal_id=directory.journal_id,
        stored=stored,
        late=overtaken is not None,
        database=database,
    )


def _extent(found: Inspection) -> str:
    middle = [damage for damage in found.damage if not damage.torn]
    parts = []
    if middle:
        parts.append(f"{len(middle)} place(s) in the middle, {sum(damage.bytes for damage in middle)} bytes")
    if found.missing:
        parts.append(f"{sum(last - first + 1 for first, last in found.missing)} change(s) are missing")
    return "; ".join(parts)


def _print(found: Inspection, subject: _Subject) -> None:
    sys.stdout.writelines(f"{label:<14}{visible(text)}\n" for label, text in _facts(found, subject))
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


def _facts(found: Inspection, subject: _Subject) -> Iterator[tuple[str, str]]:
    yield "journal", found.journal_id or "none yet"
    yield "directory", found.directory
    if found.database_id is not None:
        yield "pairing", f"database {found.database_id}, generation {found.generation}"
    yield "size", f"{found.bytes} bytes in {len(found.segments)} segment(s)"
    yield "changes", f"{found.changes}{_from_to(found.first, found.last)}"
    yield from _of_database(found, subject)
    for first, last in found.voids:
        yield "void", f"{_range(first, last)}: a write that failed, and was not acknowledged"
    for first, last in found.missing:
        yield "missing", _range(first, last)
    for damage in found.damage:
        yield "damage", _describe(damage)
    for file in found.kept:
        yield "kept", f"{file.file}: {file.bytes} bytes, cut from a torn tail"


def _of_database(found: Inspection, subject: _Subject) -> Iterator[tuple[str, str]]:
    database = subject.database
    if subject.problem is not None:
        yield "database", f"can't be asked: {subject.problem}"
    if database is None:
        return
    if subject.stored is None:
        yield "database", f"{database.database_id}: another one than the journal belongs to"
        return
    known = "does not know this journal"
    if database.journal_sequence is not None:
        known = f"has this journal up to {database.journal_sequence}"
    yield "database", f"stands at {database.sequence}, {known}"
    late = "; another runtime has written since, they come in late" if subject.late and found.unstored else ""
    yield "not stored", f"{found.unstored} change(s){late}"


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
