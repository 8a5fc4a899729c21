"""Logging of a command: to standard error, one line an event, for people or for machines; times are UTC.

A line holds nothing of what is said in sessions. So of an exception only its type is told and where it comes from: its
text may repeat what it was given. Only that of our own errors is told, which never do.

The one place that knows how talkative the libraries below are. They speak from WARNING on, whatever `logging.level`
says: their DEBUG lines hold statements with their parameters.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

import msgspec

from ..config import Config
from ..errors import AgentRuntimeError
from .text import json_line, visible

__all__ = ["configure_logging", "told"]

_QUIET: Final = "WARNING"
_LIBRARIES: Final = ("aiosqlite", "alembic", "asyncio", "hypercorn", "sqlalchemy", "uvicorn")
_BEHIND_THE_FIRST_LINE: Final = frozenset({"asyncio"})  # it puts the reprs of tasks there, which repeat exceptions


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of JSON; README.md has its keys."""

    time: datetime
    level: str
    logger: str
    message: str
    traceback: str | None = None


class _Handler(logging.Handler):
    """Writes to what is standard error at the moment: a progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001 — a log line may be lost, the work goes on
            self.handleError(record)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = _line(record)
        time = f"{line.time:%Y-%m-%dT%H:%M:%S}.{line.time.microsecond // 1000:03}Z"
        text = line.message if line.traceback is None else f"{line.message}\n{line.traceback}"
        return f"{time} {line.level} {line.logger}: {visible(text)}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json_line(_line(record)).rstrip("\n")


def _line(record: logging.LogRecord) -> _Line:
    message = record.getMessage().strip()
    if record.name in _BEHIND_THE_FIRST_LINE:
        message = message.partition("\n")[0]
    error = record.exc_info[1] if record.exc_info else None
    return _Line(
        time=datetime.fromtimestamp(record.created, UTC),
        level=record.levelname,
        logger=record.name,
        message=message,
        traceback=None if error is None else "".join(_trace(error)).rstrip(),
    )


def _trace(error: BaseException, indent: str = "") -> Iterator[str]:
    """As Python shows an exception: what it came of first; but without what exceptions say that are not ours."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _trace(before, indent)
        yield f"{indent}which led to\n"
    for frame in traceback.format_tb(error.__traceback__):
        yield from (f"{indent}{line}\n" for line in frame.splitlines())
    said = f": {error}" if isinstance(error, AgentRuntimeError) else ""
    yield f"{indent}{type(error).__name__}{said}\n"
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _trace(each, indent + "  ")


def configure_logging(config: Config | None = None, *, quiet: bool = True) -> None:
    """Log as configured. `quiet`: a level that nobody chose is WARNING, as commands speak for themselves."""
    handler = _Handler()
    level: str = _QUIET
    as_json = False
    if config is not None:
        as_json = config.logging.format == "json"
        level = _QUIET if quiet and config.origin("logging.level") == "default" else config.logging.level
    handler.setFormatter(_JsonFormatter() if as_json else _TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def told(line: str) -> str:
    """What a command says on standard error: marked as ours or, where lines are JSON, as one of them."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, _JsonFormatter):
            return handler.format(logging.LogRecord("agent_runtime.cli", logging.ERROR, "", 0, "%s", (line,), None))
    return f"agent-runtime: {visible(line)}"
