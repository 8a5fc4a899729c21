"""What the URL and the options of the configuration ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from agent_runtime.errors import InvalidInput
from agent_runtime.storage import StorageConfig
from agent_runtime_sql.options import known_options

__all__ = ["Settings", "parse_settings"]

_MEMORY: Final = "SQLite in memory is not offered: for a storage that keeps nothing write memory:"
_SLASHES: Final = "write sqlite:///relative.db or sqlite:////absolute.db"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `storage.options`, or of the URL's query.

    `busy_timeout_s`: how long to wait for another program that has locked the file. `readers`: connections for
    snapshots, which is how many may be open at once.
    """

    path: Path
    busy_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 5.0
    readers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 3


_OPTIONS: Final = {field.name: field.type for field in msgspec.structs.fields(Settings) if field.name != "path"}


def parse_settings(config: StorageConfig) -> Settings:
    """Raises InvalidInput, naming `storage.url` or `storage.options.…`."""
    url = _parse_url(config.url)
    path = _path(url)
    options = {
        **known_options("storage.url", url.query, _OPTIONS, "SQLite", strict=False),
        **known_options("storage.options", config.options, _OPTIONS, "SQLite", strict=True),
    }
    return Settings(path=path, **options)


def _parse_url(text: str) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise InvalidInput("storage.url", f"not a URL of a SQLite database: {_SLASHES}") from None
    if url.host or url.port or url.username or url.password:
        raise InvalidInput("storage.url", f"SQLite has no host: {_SLASHES}")
    return url


def _path(url: URL) -> Path:
    if not url.database or ":memory:" in url.database:
        raise InvalidInput("storage.url", _MEMORY)
    if url.database.startswith("file:") or "\0" in url.database:
        raise InvalidInput("storage.url", f"not the path of a file: {_SLASHES}")
    return Path(url.database).resolve()
