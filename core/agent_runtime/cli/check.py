"""`agent-runtime check`: whether database and journals can be as they are."""

from __future__ import annotations

import sys
from functools import partial

import typer

from ..check import Checked, Finding, check
from ..config import Config
from ..directories import journal_places
from ..storage import Storage
from .exits import FAILED, Failure
from .options import AsJson, ConfigFile, StorageUrl, load
from .reading import pictures, read, undisturbed
from .terminal import is_terminal, progress
from .text import json_line, visible

__all__ = ["check_all"]


def check_all(as_json: AsJson = False, config_file: ConfigFile = None, storage: StorageUrl = None) -> None:
    """Check the database and its journals against each other.

    Every session's messages, switches and context against what it says of them; changes that are not stored against the
    sessions that they belong to; quarantine, watermarks, and whether journals and database belong together. That is the
    journal in journal.directory, or, beside an SQLite file, each one that is there, also FILE.journal.2. Each finding
    is a line that names session, seq and change; with --json a JSON object, and one more with the totals.

    Nothing is locked or changed, so it may be done while a server runs. The exit code is 1 if anything was found.
    """
    config = load(config_file, storage)
    checked = read(config, partial(_check, config=config, as_json=as_json))
    if as_json:
        sys.stdout.write(json_line(checked))
    else:
        looked_at = (
            f"{checked.sessions} session(s), {checked.messages} message(s), {checked.changes} change(s) not stored, "
            f"{checked.quarantined} in quarantine"
        )
        typer.echo(f"{f'{checked.findings} finding(s)' if checked.findings else 'ok'}: {looked_at}")
    if checked.findings:
        raise typer.Exit(FAILED)


async def _check(storage: Storage, *, config: Config, as_json: bool) -> Checked:
    async with storage.snapshot() as snapshot:
        if await snapshot.lease() is None:
            raise Failure("the database is new: no runtime ever had it open; is storage.url right?")
    output = sys.stdout  # a bar takes its place, which moves out of the way of what is shown, but not of what is piped

    def tell(finding: Finding) -> None:
        stream = sys.stdout if is_terminal(output) else output
        stream.write(json_line(finding) if as_json else f"{visible(str(finding))}\n")

    with undisturbed("agent_runtime.journal"), progress("checking", None) as told:
        return await check(
            storage,
            lambda: pictures(journal_places(config, storage.abilities)),
            found=tell,
            progress=lambda so_far: told(_so_far(so_far), so_far.sessions + so_far.changes),
        )


def _so_far(checked: Checked) -> str:
    changes = f", {checked.changes} change(s)" if checked.changes else ""
    return f"{checked.sessions} session(s), {checked.messages} message(s){changes}"
