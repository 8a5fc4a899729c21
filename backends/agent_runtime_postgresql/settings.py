"""What the URL and the options of the configuration ask for.

A URL is libpq's, with libpq's parameters (https://www.postgresql.org/docs/current/libpq-connect.html), as far as the
driver knows them; it reads libpq's environment variables (PGHOST, PGPASSWORD, …) and password file too. Our own options
stand in `storage.options` or beside libpq's in the URL, which keeps every part of a connection in one secret.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

import msgspec

from agent_runtime.errors import InvalidInput
from agent_runtime.storage import StorageConfig
from agent_runtime_sql.options import known_options

__all__ = ["Settings", "parse_settings"]

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
_FORM: Final = "write postgresql://user:password@host:5432/database"
_TLS: Final = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
_TARGET: Final = Literal["any", "primary", "read-write", "standby", "read-only", "prefer-standby"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `storage.options`, or of the URL's query.

    - `dsn` is the URL for the driver, `name` the same without anything secret, `local` whether every host in it is this
      machine.
    - `pool_size`: connections, one to write, the others for snapshots, which is how many may be open at once.
    - `schema`: where the tables are, made if it is missing; the user's own search path by default.
    - `application_name`: how the connections call themselves in pg_stat_activity.
    - `prepared_statements`: `auto` has connections keep statements where no pooler is seen, `never` none.
    - `connect_timeout_s`: how long a connection may take to open, or an idle one to answer.
    - `statement_timeout_s`, `lock_timeout_s`, `idle_in_transaction_timeout_s`: after which the server ends a statement,
      its wait for a lock, and a transaction that writes and has fallen silent. The latter two never exceed half of the
      lease's duration, so that a writer that hangs keeps nobody from taking over.
    - `snapshot_timeout_s`: the same for the silence of a transaction that reads; it is in nobody's way but a vacuum's.
    """

    dsn: str
    name: str
    local: bool
    pool_size: Annotated[int, msgspec.Meta(ge=2, le=100)] = 5
    schema: Annotated[str, msgspec.Meta(min_length=1, max_length=63, pattern='^[^"\0]+$')] | None = None
    application_name: Annotated[str, msgspec.Meta(max_length=63)] = "agent-runtime"
    prepared_statements: Literal["auto", "never"] = "auto"
    connect_timeout_s: _Seconds = 10.0
    statement_timeout_s: _Seconds = 30.0
    lock_timeout_s: _Seconds = 4.0
    idle_in_transaction_timeout_s: _Seconds = 4.0
    snapshot_timeout_s: _Seconds = 300.0


_OPTIONS: Final = {
    field.name: field.type for field in msgspec.structs.fields(Settings) if field.name not in {"dsn", "name", "local"}
}
# What the driver makes of them is checked by it, when it connects.
_LIBPQ: Final[Mapping[str, Any]] = {
    **dict.fromkeys(("host", "port", "user", "password", "dbname", "database", "passfile", "service", "options"), str),
    **dict.fromkeys(("sslcert", "sslkey", "sslpassword", "sslrootcert", "sslcrl", "krbsrvname", "gsslib"), str),
    **dict.fromkeys(("ssl_min_protocol_version", "ssl_max_protocol_version"), str),
    "sslmode": _TLS,
    "sslnegotiation": Literal["postgres", "direct"],
    "target_session_attrs": _TARGET,
}
_FILES: Final = frozenset({"passfile", "sslcert", "sslkey", "sslrootcert", "sslcrl"})
# What other drivers do, and ours either does anyway or can't.
_ACCEPTED: Final[Mapping[str, Any]] = {
    "channel_binding": Literal["prefer", "disable"],
    "client_encoding": Literal["utf8", "UTF8", "auto"],
    "fallback_application_name": str,
    "gssencmode": Literal["prefer", "disable"],
}
_SECONDS: Final[Mapping[str, Any]] = {"connect_timeout": Annotated[int, msgspec.Meta(ge=0)]}


def parse_settings(config: StorageConfig) -> Settings:
    """Raises InvalidInput, naming `storage.url` or `storage.options.…`."""
    try:
        parts = urlsplit(config.url)
        query = dict(parse_qsl(parts.query, strict_parsing=True, keep_blank_values=True)) if parts.query else {}
        unquote(parts.netloc, errors="strict")
    except ValueError:
        raise InvalidInput("storage.url", f"not a URL of a PostgreSQL database: {_FORM}") from None
    if parts.fragment or not config.url.startswith(f"{parts.scheme}://"):
        problem = "what follows a # is lost, write %23 for one in a password" if parts.fragment else _FORM
        raise InvalidInput("storage.url", f"not a URL of a PostgreSQL database: {problem}")
    kinds = {**_OPTIONS, **_LIBPQ, **_ACCEPTED, **_SECONDS}
    asked = known_options("storage.url", query, kinds, "PostgreSQL", strict=False)
    libpq = {name: query[name] for name in asked if name in _LIBPQ}
    for name in _FILES & libpq.keys():
        if not Path(libpq[name]).is_file():
            raise InvalidInput(f"storage.url.{name}", f"there is no file {libpq[name]}")
    options = {name: value for name, value in asked.items() if name in _OPTIONS}
    if timeout := asked.get("connect_timeout"):
        options.setdefault("connect_timeout_s", float(timeout))
    if "fallback_application_name" in asked:
        options.setdefault("application_name", asked["fallback_application_name"])
    options |= known_options("storage.options", config.options, _OPTIONS, "PostgreSQL", strict=True)
    # Not urlencode's default of "+" for a space, which libpq takes for a plus.
    dsn = urlunsplit(("postgresql", parts.netloc, parts.path, urlencode(libpq, quote_via=quote), ""))
    hosts = _hosts(parts.netloc, libpq)
    database = libpq.get("dbname") or libpq.get("database") or unquote(parts.path.lstrip("/"))
    name = f"the database {database or 'of the user'} at {hosts or 'the local socket'}"
    return Settings(dsn=dsn, name=name, local=all(map(_is_local, hosts.split(","))), **options)


def _hosts(netloc: str, libpq: Mapping[str, str]) -> str:
    """As the URL has them, with commas between."""
    return unquote(netloc.rpartition("@")[2]) or libpq.get("host") or os.environ.get("PGHOST", "")


def _is_local(host: str) -> bool:
    """Whether a host, with or without a port, is this machine: a socket, or a loopback address."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name in {"", "localhost"} or name.startswith("/"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
