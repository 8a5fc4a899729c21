"""`agent-runtime quarantine …`: the changes that the database refused, shown, tried again, or given up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import typer
from msgspec import Raw

from ..changes import Change, decode_change
from ..config import Config
from ..errors import LeaseHeld, Quarantined, SessionNotFound
from ..quarantined import QuarantinedChange, quarantine_rows
from ..rows import QuarantineRow
from ..runtime import Runtime
from ..storage import Storage
from .exits import HELD, USAGE, Failure
from .options import AsJson, ConfigFile, StorageUrl, load
from .reading import read, undisturbed
from .running import run
from .terminal import console, is_terminal, output_is_terminal
from .text import json_line, moment, visible

__all__ = ["app"]

T = TypeVar("T")

_HELP = """
Show, replay and drop changes that the database refused.

A session with such a change is held: it can be read, and not written to, until the change is replayed or dropped. The
later changes of the session wait behind it.
"""
app = typer.Typer(help=_HELP, no_args_is_help=True)

_SessionId = Annotated[str, typer.Argument(metavar="SESSION", help="The session that is held.", show_default=False)]


class _Effect(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that a change would do: how much of it, and to which messages."""

    kind: str
    count: int = 1
    bytes: int = 0
    seqs: tuple[int, ...] = ()


class _Seq(msgspec.Struct):
    seq: int


@app.command("list")
def list_changes(as_json: AsJson = False, config_file: ConfigFile = None, storage: StorageUrl = None) -> None:
    """List the changes in quarantine, in the order in which they were made.

    On a terminal as a table; elsewhere a line each, with tabs between sequence, session, state, bytes, time and error;
    with --json a JSON object a line. It works while a server runs, which may have more that is not stored yet.
    """
    changes = _kept(load(config_file, storage), QuarantinedChange.of)
    if as_json:
        sys.stdout.writelines(map(json_line, changes))
    elif output_is_terminal():
        _print_table(changes)
    else:
        sys.stdout.writelines("\t".join(_texts(change)) + "\n" for change in changes)


def _texts(change: QuarantinedChange) -> tuple[str, ...]:
    at = moment(change.quarantined_at)
    return str(change.sequence), visible(change.session_id), change.state, str(change.bytes), at, visible(change.error)


def _print_table(changes: list[QuarantinedChange]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("change", justify="right", no_wrap=True)
    table.add_column("session", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("since", no_wrap=True)
    table.add_column("error", overflow="fold", ratio=1)
    for change in changes:
        table.add_row(*_texts(change))
    if changes:
        console(sys.stdout).print(table)


@app.command("show")
def show_changes(
    which: Annotated[
        str,
        typer.Argument(
            metavar="SEQUENCE|SESSION",
            help="The sequence of a change, or a session: all of its changes that are in quarantine.",
            show_default=False,
        ),
    ],
    content: Annotated[
        bool, typer.Option("--content", help="With the whole change as JSON: it holds what people said.")
    ] = False,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
    storage: StorageUrl = None,
) -> None:
    """Show what changes in quarantine would do, how large they are, and why they were refused.

    A number is taken for a sequence, if there is one. With --json a JSON object a line.
    """
    rows = _kept(load(config_file, storage), lambda row: row if which in (str(row.sequence), row.session_id) else None)
    chosen = [row for row in rows if str(row.sequence) == which] or rows
    if not chosen:
        raise Failure(f"nothing in quarantine has the sequence, or is of the session, {which!r}")
    for row, effects in [(row, list(_effects(_decoded(row)))) for row in chosen]:
        if as_json:
            sys.stdout.write(json_line(_described(row, effects, content=content)))
        else:
            sys.stdout.writelines(f"{label:<14}{text}\n" for label, text in _facts(row, effects, content=content))


def _described(row: QuarantineRow, effects: list[_Effect], *, content: bool) -> dict[str, Any]:
    described = msgspec.structs.asdict(QuarantinedChange.of(row)) | {"effects": effects}
    return described | {"change": Raw(row.change)} if content else described


def _facts(row: QuarantineRow, effects: list[_Effect], *, content: bool) -> Iterator[tuple[str, str]]:
    change = QuarantinedChange.of(row)
    yield "change", f"{change.sequence}, {change.bytes} bytes"
    yield "session", visible(change.session_id)
    yield "state", f"{change.state}, since {moment(change.quarantined_at)}"
    yield "error", visible(change.error)
    for effect in effects:
        count = "" if effect.count == 1 else f" × {effect.count}"
        size = f", {effect.bytes} bytes" if effect.bytes else ""
        yield "effect", f"{effect.kind}{count}{_of_seqs(effect.seqs)}{size}"
    if content:
        yield "content", json_line(Raw(row.change)).rstrip("\n")


def _decoded(row: QuarantineRow) -> Change:
    try:
        return decode_change(row.change)
    except msgspec.MsgspecError as error:
        raise Failure(f"change {row.sequence} can't be read: another version of agent-runtime wrote it") from error


def _of_seqs(seqs: tuple[int, ...]) -> str:
    if not seqs:
        return ""
    return f", seq {seqs[0]}" if len(seqs) == 1 else f", seq {seqs[0]} to {seqs[-1]}"


def _effects(change: Change) -> Iterator[_Effect]:
    """What a change would do, without what it says."""
    if change.birth is not None:
        yield _Effect("creates the session")
    if change.details is not None:
        yield _Effect("sets title, description and metadata", bytes=len(msgspec.json.encode(change.details)))
    if change.context is not None:
        yield _Effect("sets the agent context", bytes=len(msgspec.json.encode(change.context)))
    if change.switches:
        yield _Effect("records a switch of agents", len(change.switches))
    if change.floor is not None:
        yield _Effect("clears all messages up to a seq", seqs=(change.floor,))
    if change.removed:
        yield _Effect("removes a message", len(change.removed), seqs=change.removed)
    if change.messages:
        seqs = tuple(msgspec.json.decode(message, type=_Seq).seq for message in change.messages)
        size = sum(len(bytes(message)) for message in change.messages)
        yield _Effect("appends a message", len(seqs), size, seqs)
    if change.documents:
        size = sum(len(document.data or document.value or "") for document in change.documents)
        yield _Effect("writes a document", len(change.documents), size)
    if change.discarded:
        yield _Effect("deletes a document", len(change.discarded))
    if change.deleted:
        yield _Effect("deletes the session")
    if change.outcome is not None:
        yield _Effect("records the outcome of a call with an idempotency key")


@app.command("replay")
def replay_changes(session_id: _SessionId, config_file: ConfigFile = None, storage: StorageUrl = None) -> None:
    """Try the changes of a held session again, in order, once what they were refused for is mended."""
    stored, _ = _settle(load(config_file, storage), session_id, "replay")
    typer.echo(f"stored {stored} change(s) of {visible(session_id)}")


@app.command("drop")
def drop_change(
    session_id: _SessionId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    config_file: ConfigFile = None,
    storage: StorageUrl = None,
) -> None:
    """Give up the refused change of a held session, and let the ones behind it through.

    If it is the session's creation, those are given up too. Asks first; without a terminal to ask on, --yes is needed.
    """
    config = load(config_file, storage)
    if not yes:
        if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
            raise Failure("there is no terminal to ask on: say --yes to drop without a question", code=USAGE)
        # Asked before the sessions are opened: nobody else could open them while we wait for an answer.
        if not typer.confirm(_question(config, session_id), err=True):
            raise Failure("nothing is dropped")
    stored, dropped = _settle(config, session_id, "drop")
    typer.echo(f"dropped {dropped} change(s) of {visible(session_id)}, stored {stored}")


def _question(config: Config, session_id: str) -> str:
    rows = _kept(config, lambda row: row if row.session_id == session_id else None)
    if not rows:
        raise _not_there(session_id)
    whose = visible(repr(session_id))
    if _decoded(rows[0]).birth is not None:
        return f"Give up the creation of session {whose}, and the {len(rows) - 1} change(s) behind it?"
    return f"Give up change {rows[0].sequence} of session {whose}, and store the {len(rows) - 1} behind it?"


def _settle(config: Config, session_id: str, what: Literal["replay", "drop"]) -> tuple[int, int]:
    """Replay or drop; how many changes were stored, and how many given up."""

    async def settle(runtime: Runtime) -> tuple[int, int]:
        quarantine = runtime.quarantine
        held = sum(change.session_id == session_id for change in await quarantine.entries())
        stored = await (quarantine.replay(session_id) if what == "replay" else quarantine.drop(session_id))
        return stored, held - stored

    try:
        with undisturbed("agent_runtime"):  # it warns of changes in quarantine
            return run(config, settle, existing=True)
    except SessionNotFound as error:
        raise _not_there(session_id) from error
    except LeaseHeld as error:
        raise Failure(f"{error}: stop that first, a {what} needs the database for itself", code=HELD) from error
    except Quarantined as error:
        now = error.sequences[0]
        raise Failure(
            f"refused again, as change {now}: agent-runtime quarantine show {now} tells why; {session_id!r} stays held"
        ) from error


def _not_there(session_id: str) -> Failure:
    return Failure(f"nothing of the session {session_id!r} is in quarantine")


def _kept(config: Config, keep: Callable[[QuarantineRow], T | None]) -> list[T]:
    """What `keep` gives for each row of the quarantine, but for None. It works while another process has the lease."""

    async def kept(storage: Storage) -> list[T]:
        async with storage.snapshot() as snapshot:
            found = [keep(row) async for row in quarantine_rows(snapshot)]
        return [each for each in found if each is not None]

    return read(config, kept)
