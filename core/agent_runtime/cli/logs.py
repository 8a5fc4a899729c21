"""Logging of a command: to standard error, as lines for people or for machines."""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Final

import msgspec

from ..config import Config
from .text import visible

__all__ = ["configure_logging"]

_QUIET: Final = "WARNING"


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
        time = datetime.fromtimestamp(record.created, UTC)
        line = f"{time:%Y-%m-%dT%H:%M:%S}Z {record.levelname} {record.name}: {visible(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return msgspec.json.encode(entry).decode()


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
