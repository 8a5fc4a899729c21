"""`agent-runtime sessions …`: a look at what is stored, its deletion, and its purge."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated

import anyio
import typer

from ..client import SessionClient, SessionsClient
from ..durations import duration
from ..errors import SessionNotFound
from ..records import Message, PurgedSession, Session
from ..session import PAGE_ITEMS_MAX
from .conversation import Line, head_lines, message_lines, switch_lines
from .exits import FAILED, USAGE, Failure, tell
from .options import AsJson, ConfigFile, ServerUrl, StorageUrl, load
from .running import run_anywhere
from .terminal import console, is_terminal, output_is_terminal, progress, write
from .text import json_line, moment, visible

__all__ = ["app"]

_PORTION = 100

app = typer.Typer(help="List, show, delete and purge sessions.", no_args_is_help=True)


@app.command("list")
def list_sessions(
    user: Annotated[
        str | None, typer.Option("--user", metavar="ID", help="Only the sessions of this user.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most so many; default: all.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
    storage: StorageUrl = None,
    server: ServerUrl = None,
) -> None:
    """List sessions, the newest first.

    On a terminal as a table; elsewhere a line each, with tabs between id, user, title, messages and last activity;
    with --json a JSON object a line.
    """
    run_anywhere(load(config_file, storage), server, partial(_list, user=user, limit=limit, as_json=as_json))


async def _list(sessions: SessionsClient, *, user: str | None, limit: int | None, as_json: bool) -> None:
    cursor: str | None = None
    listed = 0
    while limit is None or listed < limit:
        count = PAGE_ITEMS_MAX if limit is None else min(limit - listed, PAGE_ITEMS_MAX)
        page = await sessions.list_sessions(user_id=user, limit=count, cursor=cursor)
        if as_json:
            await write("".join(map(json_line, page.items)))
        elif output_is_terminal():
            await anyio.to_thread.run_sync(_print_table, page.items)
        else:
            await write("".join(map(_tabbed, page.items)))
        listed += len(page.items)
        cursor = page.next
        if cursor is None:
            return


def _print_table(sessions: list[Session]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("session", overflow="fold")
    table.add_column("user", overflow="fold")
    table.add_column("title", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("messages", justify="right")
    table.add_column("last activity", no_wrap=True)
    for it in sessions:
        texts = (it.session_id, it.user_id or "", it.title or "", str(it.message_count), moment(it.last_activity))
        table.add_row(*map(visible, texts))
    console(sys.stdout).print(table if sessions else "no sessions")


def _tabbed(it: Session) -> str:
    last_activity = it.last_activity.isoformat().replace("+00:00", "Z")
    texts = (it.session_id, it.user_id or "", it.title or "", str(it.message_count), last_activity)
    return "\t".join(map(visible, texts)) + "\n"


@app.command("show")
def show_session(
    session_id: Annotated[str, typer.Argument(metavar="ID", help="The session.", show_default=False)],
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only so many of the newest messages.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
    storage: StorageUrl = None,
    server: ServerUrl = None,
) -> None:
    """Show a session: what is known of it, which agents had it, and the conversation.

    With --json as one JSON object with the keys session, context, switches and messages.
    """
    run_anywhere(
        load(config_file, storage), server, partial(_show, session_id=session_id, limit=limit, as_json=as_json)
    )


async def _show(sessions: SessionsClient, *, session_id: str, limit: int | None, as_json: bool) -> None:
    session = await sessions.get_session(session_id)
    record, context, switches = await session.record(), await session.context(), await session.switches()
    newest = None if limit is None else await _newest(session, limit)
    if as_json:
        messages = newest if newest is not None else [message async for message in session.scan_messages()]
        found = {"session": record, "context": context, "switches": switches, "messages": messages}
        await write(json_line(found))
        return
    await _print([*head_lines(record, context), *switch_lines(switches)])
    if newest is not None:
        await _print([line for message in newest for line in message_lines(message)])
        return
    after: int | None = None
    while True:
        page = await session.messages(after=after, limit=100)
        await _print([line for message in page.items for line in message_lines(message)])
        after = page.next
        if after is None:
            return


async def _newest(session: SessionClient, limit: int) -> list[Message]:
    """The newest messages, the oldest of them first."""
    newest: list[Message] = []
    after: int | None = None
    while len(newest) < limit:
        page = await session.messages(after=after, limit=min(limit - len(newest), PAGE_ITEMS_MAX), order="desc")
        newest += page.items
        after = page.next
        if after is None:
            break
    return newest[::-1]


async def _print(lines: list[Line]) -> None:
    if output_is_terminal():
        await anyio.to_thread.run_sync(_print_styled, lines)
    else:
        await write("".join((" " * line.indent + line.text).rstrip() + "\n" for line in lines))


def _print_styled(lines: list[Line]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    terminal = console(sys.stdout)
    for line in lines:
        terminal.print(Padding(Text(line.text, line.style), (0, 0, 0, line.indent), expand=False))


@app.command("delete")
def delete_sessions(
    session_ids: Annotated[list[str], typer.Argument(metavar="ID", help="The sessions.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    config_file: ConfigFile = None,
    storage: StorageUrl = None,
    server: ServerUrl = None,
) -> None:
    """Delete sessions with all they have. Asks first; without a terminal to ask on, --yes is needed."""
    config = load(config_file, storage)
    if not yes:
        _ask("delete", _named(session_ids))
    missing = run_anywhere(config, server, partial(_delete, session_ids=list(dict.fromkeys(session_ids))))
    if missing:
        raise typer.Exit(FAILED)


def _named(session_ids: list[str]) -> str:
    return f"session {session_ids[0]!r}" if len(session_ids) == 1 else f"{len(session_ids)} sessions"


def _ask(verb: str, what: str) -> None:
    """Ask whether to go on. Before the database is opened: nobody else could open it while we wait for an answer."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        raise Failure(f"there is no terminal to ask on: say --yes to {verb} without a question", code=USAGE)
    if not typer.confirm(f"{verb.capitalize()} {visible(what)} with all messages?", err=True):
        raise Failure(f"nothing is {verb}d")


async def _delete(sessions: SessionsClient, *, session_ids: list[str]) -> int:
    """Delete what is there, all or nothing of each. Returns how many are not."""
    deleted: list[str] = []
    missing = 0
    for session_id in session_ids:
        try:
            await (await sessions.get_session(session_id)).delete(durability="buffered")
        except SessionNotFound as error:
            tell(str(error))
            missing += 1
        else:
            deleted.append(session_id)
    await sessions.flush()
    await write("".join(f"deleted {visible(session_id)}\n" for session_id in deleted))
    return missing


@app.command("purge")
def purge_sessions(
    session_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]…", help="The sessions.", show_default=False)
    ] = None,
    idle_longer_than: Annotated[
        str | None,
        typer.Option(
            "--idle-longer-than",
            metavar="LENGTH",
            help="Only sessions in which nothing has changed for so long, such as 30d or 12h; without IDs all of them.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing, tell what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
    storage: StorageUrl = None,
    server: ServerUrl = None,
) -> None:
    """Delete sessions so that nothing of them is left: rows, documents, quarantine, idempotency keys, and the journal.

    A line for each session, with tabs between id, messages, documents, changes in quarantine and bytes; with --json a
    JSON object a line. Asks first; without a terminal to ask on, --yes is needed.

    Backups, and what a database keeps for itself (PostgreSQL until VACUUM), are not within its reach.
    """
    config = load(config_file, storage)
    if not session_ids and idle_longer_than is None:
        raise Failure("name sessions, or say --idle-longer-than", code=USAGE)
    try:
        idle = None if idle_longer_than is None else duration(idle_longer_than)
    except ValueError as error:
        raise Failure(f"--idle-longer-than: {error}", code=USAGE) from error
    wanted = list(dict.fromkeys(session_ids or ()))
    if not (yes or dry_run):
        whose = _named(wanted) if wanted else "all sessions"
        _ask("purge", whose if idle_longer_than is None else f"{whose} idle for longer than {idle_longer_than}")
    work = partial(_purge, session_ids=wanted, idle=idle, dry_run=dry_run, as_json=as_json)
    missing = run_anywhere(config, server, work)
    if missing:
        raise typer.Exit(FAILED)


async def _purge(
    sessions: SessionsClient, *, session_ids: list[str], idle: timedelta | None, dry_run: bool, as_json: bool
) -> int:
    """Purge, some at a time. Returns how many of those that were named are not there."""
    count = messages = size = missing = done = 0
    verb = "would purge" if dry_run else "purged"
    with progress("looking" if dry_run else "purging", len(session_ids) or None) as told:
        async with aclosing(_portions(sessions, session_ids, idle)) as portions:
            async for portion in portions:
                found = await sessions.purge_sessions(portion, idle_longer_than=idle, dry_run=dry_run)
                await write("".join(map(json_line if as_json else _purged_line, found)))
                count += len(found)
                messages += sum(it.messages for it in found)
                size += sum(it.bytes for it in found)
                done += len(portion)
                told(f"{count} session(s)", done)
                if idle is None:
                    left = set(portion).difference(it.session_id for it in found)
                    for session_id in [each for each in portion if each in left]:
                        tell(str(SessionNotFound(session_id)))
                    missing += len(left)
    typer.echo(f"{verb} {count} session(s): {messages} message(s), {size} bytes", err=True)
    return missing


async def _portions(
    sessions: SessionsClient, session_ids: list[str], idle: timedelta | None
) -> AsyncGenerator[list[str], None]:
    """The sessions named; without names those that are idle, as the list has them."""
    for first in range(0, len(session_ids), _PORTION):
        yield session_ids[first : first + _PORTION]
    if session_ids or idle is None:
        return
    before = datetime.now(UTC) - idle
    cursor: str | None = None
    while True:
        page = await sessions.list_sessions(limit=_PORTION, cursor=cursor, order="asc")
        if found := [it.session_id for it in page.items if it.last_activity < before]:
            yield found
        cursor = page.next
        if cursor is None:
            return


def _purged_line(it: PurgedSession) -> str:
    return f"{visible(it.session_id)}\t{it.messages}\t{it.documents}\t{it.quarantined}\t{it.bytes}\n"
