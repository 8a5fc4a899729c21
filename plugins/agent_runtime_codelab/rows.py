"""What the old tables' rows of one session become: the line of an archive. Pure functions.

Nothing is lost silently. A row, or a column of one, that has no valid form here is set aside: the rest goes in, the
whole row is kept as a document of its session, as it stood (JSON, in the collection `codelab.rows`), and a problem says
which row of which table it is. So a session is never refused for one bad row, and a second import finds the same.

What the old tables leave open is settled here: times without a zone are UTC; the order is by time, and among equal
times the order of insertion; the time of the last switch is that of the last row of agent_switches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar, get_args

import msgspec

from agent_runtime import Approval, InvalidInput, NewMessage
from agent_runtime.approvals import APPROVALS, ApprovalStatus
from agent_runtime.formats import Entry
from agent_runtime.plans import TITLE_CHARS_MAX
from agent_runtime.records import DEFAULT_AGENT
from agent_runtime.session import DESCRIPTION_CHARS_MAX, REASON_CHARS_MAX
from agent_runtime.validation import (
    check_id,
    check_json,
    check_label,
    check_message,
    check_name,
    check_text,
    check_time,
    json_object,
)

from .database import Row

__all__ = ["FIRST_FROM", "SET_ASIDE", "OldSession", "entry_of", "named"]

SET_ASIDE: Final = "codelab.rows"
"""The collection of rows that could not become what they should: `<table>-<id>`, each a JSON object, as bytes."""

FIRST_FROM: Final = "codelab.from"
"""The key of a switch's metadata which says what the old table has as from_agent where that is no agent: null."""

_WITHOUT: Final = "the rest went in without it, the row is"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_OPTIONAL: Final = ("name", "tool_calls", "tool_call_id", "token_count", "metadata")
_COLUMNS: Final = {"metadata": "metadata_json"}
T = TypeVar("T")


class OldSession(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one session, each table's in the order of insertion."""

    session: Row
    messages: Sequence[Row] = ()
    contexts: Sequence[Row] = ()
    switches: Sequence[Row] = ()
    approvals: Sequence[Row] = ()


def named(table: str, row: Row) -> str:
    """A row, for people."""
    return f"{table} {str(row['id'])!r}"


def entry_of(source: str, old: OldSession) -> Entry:
    """The session as an entry of an import. `source` is what the database is called."""
    return _Conversion(source, old).entry()


class _Conversion:
    """One session under way. `_kept` are the documents of rows that are set aside, by key."""

    def __init__(self, source: str, old: OldSession) -> None:
        self._place = f"{source}: {named('sessions', old.session)}"
        self._old = old
        self._problems: list[str] = []
        self._kept: dict[str, dict[str, Any]] = {}

    def entry(self) -> Entry:
        old = self._old
        size = 1 + len(old.messages)
        session_id = str(old.session["id"])
        try:
            check_id("id", session_id)
        except InvalidInput as error:
            problem = f"{error}; it stays in the old database, with its {len(old.messages)} message(s)"
            return Entry(place=self._place, problems=[problem], size=size)
        session = old.session
        created_at = self._time("sessions", session, "created_at")
        rows = self._in_order("messages", old.messages, "timestamp")
        messages = [pair for row, time in rows if (pair := self._message(row, time)) is not None]
        context, switches = self._contexts(created_at)
        approvals = [document for row in old.approvals if (document := self._approval(row)) is not None]
        line = {
            "session_id": session_id,
            "title": self._field("sessions", session, "title", _text(TITLE_CHARS_MAX)),
            "description": self._field("sessions", session, "description", _text(DESCRIPTION_CHARS_MAX)),
            "created_at": created_at,
            "last_activity": self._time("sessions", session, "last_activity", created_at),
            "context": context,
            "switches": switches,
            "messages": [message for _, message in messages],
            "message_details": [
                {"seq": seq, "id": message.pop("id"), "created_at": message.pop("created_at")}
                for seq, (_, message) in enumerate(messages, 1)
            ],
        }
        line["documents"] = [*approvals, *self._kept.values()]
        return Entry(
            place=self._place,
            line=msgspec.json.encode(line),
            places={f"messages[{index}]": named("messages", row) for index, (row, _) in enumerate(messages)},
            problems=self._problems,
            size=size,
        )

    # Messages

    def _message(self, row: Row, time: datetime) -> tuple[Row, dict[str, Any]] | None:
        """The message in chat format with its id and time; None if the row is set aside."""
        values: dict[str, Any] = {
            "id": str(row["id"]),
            "created_at": time,
            "role": row["role"],
            "content": row["content"],
            "name": row.get("name"),
            "tool_calls": self._field("messages", row, "tool_calls", _json),
            "tool_call_id": row.get("tool_call_id"),
            "token_count": row.get("token_count"),
            "metadata": self._field("messages", row, "metadata_json", _json),
        }
        while True:
            try:
                check_message("", NewMessage(**values))
            except InvalidInput as error:
                field = str(error.keys[0])
                if field not in _OPTIONAL:
                    self._set_aside("messages", row, f"{error}; the row is")
                    return None
                values[field] = None
                self._set_aside("messages", row, f"{_COLUMNS.get(field, field)}: {error.problem}; {_WITHOUT}")
            else:
                return row, {name: value for name, value in values.items() if value is not None or name == "content"}

    # The agent

    def _contexts(self, created_at: datetime) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """The context and its switches. None: the old service had none, which is one as at the beginning."""
        if not self._old.contexts:
            return None, []
        row, *others = self._old.contexts
        for other in others:
            self._set_aside("agent_contexts", other, f"is another context of the session, beside {row['id']}; it is")
        begun_at = self._time("agent_contexts", row, "created_at", created_at)
        switches: list[dict[str, Any]] = []
        agent = DEFAULT_AGENT
        for switch, time in self._in_order("agent_switches", self._old.switches, "switched_at"):
            if switch["context_db_id"] != row["id"]:
                self._set_aside("agent_switches", switch, "belongs to another context; it is")
                continue
            converted = self._switch(switch, time, agent)
            if converted is not None:
                switches.append(converted)
                agent = converted["to_agent"]
        if row["switch_count"] != len(switches):
            problem = f"switch_count: is {row['switch_count']}, but there are {len(switches)}, which counts; the row is"
            self._set_aside("agent_contexts", row, problem)
        return {
            "current_agent": self._field("agent_contexts", row, "current_agent", check_name) or agent,
            "switch_count": len(switches),
            "last_switch_at": switches[-1]["switched_at"] if switches else None,
            "metadata": self._field("agent_contexts", row, "metadata_json", _json_object) or {},
            "created_at": begun_at,
            "updated_at": self._time("agent_contexts", row, "updated_at", begun_at),
        }, switches

    def _switch(self, row: Row, time: datetime, agent: str) -> dict[str, Any] | None:
        """A switch; None if it is set aside. `agent` had the session before it."""
        metadata = self._field("agent_switches", row, "metadata_json", _json_object)
        if row["from_agent"] is None:
            metadata = (metadata or {}) | {FIRST_FROM: None}
        to_agent = self._field("agent_switches", row, "to_agent", check_name, "the row is")
        if to_agent is None:
            return None
        return {
            "from_agent": self._field("agent_switches", row, "from_agent", check_name) or agent,
            "to_agent": to_agent,
            "reason": self._field("agent_switches", row, "reason", _text(REASON_CHARS_MAX)),
            "switched_at": time,
            "metadata": metadata,
        }

    # Approvals

    def _approval(self, row: Row) -> dict[str, Any] | None:
        """The document of an approval; None if the row is set aside."""
        try:
            status = row["status"]
            if status not in get_args(ApprovalStatus):
                raise InvalidInput("status", f"is none of {', '.join(get_args(ApprovalStatus))}")
            approval = Approval(
                approval_id=check_id("id", str(row["id"])),
                call_id=check_label("call_id", row["call_id"]),
                tool_name=check_label("tool_name", row["tool_name"]),
                arguments=_json("arguments", row["arguments"]),
                reason=None if row["reason"] is None else check_text("reason", row["reason"], REASON_CHARS_MAX),
                created_at=_moment("created_at", row["created_at"]),
                status=status,
            )
        except InvalidInput as error:
            self._set_aside("pending_approvals", row, f"{error}; the row is")
            return None
        return {
            "collection": APPROVALS,
            "key": approval.approval_id,
            "updated_at": approval.created_at,
            "value": approval,
        }

    # Columns

    def _field(
        self, table: str, row: Row, column: str, read: Callable[[str, Any], T], fate: str = _WITHOUT
    ) -> T | None:
        """A column's value; None if it is null, and also if it is set aside. `fate` says what that does to the row."""
        value = row.get(column)
        if value is None:
            return None
        try:
            return read(column, value)
        except InvalidInput as error:
            self._set_aside(table, row, f"{error}; {fate}")
            return None

    def _time(self, table: str, row: Row, column: str, default: datetime = _EPOCH) -> datetime:
        """A time; if it is set aside, the default."""
        try:
            return _moment(column, row[column])
        except InvalidInput as error:
            self._set_aside(table, row, f"{error}; {default.isoformat()} stands for it, the row is")
            return default

    def _in_order(self, table: str, rows: Iterable[Row], column: str) -> list[tuple[Row, datetime]]:
        """The rows by their times. One whose time is set aside stays behind the one that was inserted before it."""
        timed: list[tuple[Row, datetime]] = []
        last = _EPOCH
        for row in rows:
            last = self._time(table, row, column, last)
            timed.append((row, last))
        return sorted(timed, key=lambda pair: pair[1])

    def _set_aside(self, table: str, row: Row, problem: str) -> None:
        """Keep the row as it stands, and tell of it."""
        key = f"{table}-{row['id']}"
        try:
            check_id("key", key)
        except InvalidInput:
            key = f"{table}-number-{len(self._kept)}"
        where = "" if table == "sessions" else f"{named(table, row)}: "  # the entry's place names the session
        self._problems.append(f"{where}{problem} kept as the document {key} in {SET_ASIDE}")
        self._kept[key] = {
            "collection": SET_ASIDE,
            "key": key,
            "updated_at": _EPOCH,
            "data": json.dumps(dict(row), default=_plain).encode(),
            "media_type": "application/json",
        }


def _text(chars_max: int) -> Callable[[str, Any], str]:
    return lambda column, value: check_text(column, value, chars_max)


def _json(column: str, value: object) -> Any:
    """JSON text, read. Its numbers keep their form as far as Python has it."""
    if not isinstance(value, str):
        raise InvalidInput(column, f"is not JSON text but {type(value).__name__}")
    try:
        read = json.loads(value)
    except ValueError as error:
        where = f" (character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidInput(column, f"is not JSON{where}") from None
    except RecursionError:
        raise InvalidInput(column, "is nested too deeply") from None
    check_json(column, read)
    return read


def _json_object(column: str, value: object) -> dict[str, Any]:
    return json_object(column, _json(column, value))


def _moment(column: str, value: object) -> datetime:
    """A time: naive ones are UTC."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise InvalidInput(column, "is no time") from None
    if isinstance(value, datetime) and value.utcoffset() is None:
        value = value.replace(tzinfo=UTC)
    return check_time(column, value)


def _plain(value: object) -> str:
    """What JSON has no form for, as text: times, and bytes in hexadecimal digits."""
    return value.hex() if isinstance(value, bytes) else str(value)
