"""The configuration: one frozen object.

Owns every key: its name, type, bounds, default and meaning, and what is said of a value that does not fit (values never
stand in those lines: a value may be a secret). Where values come from is `sources`.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails

from .durations import duration
from .errors import ConfigError
from .records import Durability

__all__ = [
    "FIELDS",
    "FREE",
    "SECTIONS",
    "Config",
    "HttpSection",
    "JournalSection",
    "LeaseSection",
    "LoggingSection",
    "PluginsSection",
    "ResidentsSection",
    "RetentionSection",
    "Setting",
    "StorageSection",
    "WriteBehindSection",
    "build",
    "config_schema",
    "did_you_mean",
    "known_keys",
    "redact_url",
    "token_digest",
    "worded",
]

_Value = TypeVar("_Value")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, else all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(names) or 'none'}"


# -- secrets ----------------------------------------------------------------------------------------------------------

# Up to the *last* "@": whatever a password holds that should have been escaped, nothing of it is shown.
_USERINFO: Final = re.compile(r"^([\w+.-]+:/{0,2}[^:/@]*):.*@", re.DOTALL)
_SECRET_PARAMETER: Final = re.compile(r"((?:password|passwd|secret|token|api_?key)=)[^&\s]+", re.IGNORECASE)
_SECRET_NAME: Final = re.compile(
    r"(password|passwd|passphrase|secret|token|credential|(api|access|private|secret|signing)[_-]?key)s?$",
    re.IGNORECASE,
)


def redact_url(url: str) -> str:
    """The URL with its password, and what its parameters hold of secrets, as `***`."""
    return _SECRET_PARAMETER.sub(r"\1***", _USERINFO.sub(r"\1:***@", url))


def _redacted(name: str, value: object) -> object:
    if value and _SECRET_NAME.search(name):
        return "***"
    if isinstance(value, Mapping):
        return {key: _redacted(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(name, item) for item in value]
    return redact_url(value) if isinstance(value, str) else value


_is_token: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*").fullmatch  # RFC 6750, section 2.1
_is_digest: Final = re.compile(r"sha256:[0-9a-f]{64}").fullmatch


def token_digest(text: str) -> str:
    """What is kept of a bearer token: `sha256:` and the SHA-256 of it in hex. What looks like that is one already.

    Raises:
        ValueError: it is neither; the message does not repeat it.
    """
    if text.startswith("sha256:"):
        digest = text.lower()
        if not _is_digest(digest):
            raise ValueError("must have 64 hexadecimal digits after sha256:")
        return digest
    if not _is_token(text):
        raise ValueError(
            "must be a token (letters, digits and -._~+/, then perhaps =) or sha256: and its SHA-256 in hex"
        )
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


# -- the keys ---------------------------------------------------------------------------------------------------------


def _key(default: _Value, meaning: str, **bounds: Any) -> _Value:
    field: _Value = Field(default=default, description=meaning, **bounds)
    return field


def _printable(url: str) -> str:
    if not url.isprintable():
        raise ValueError("must not hold control characters")
    return url


_is_origin: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+").fullmatch


def _origin(text: str) -> str:
    if not _is_origin(origin := text.lower()):
        raise ValueError("must be an origin, such as https://console.example.com")
    return origin


def _duration(text: str | None) -> str | None:
    if text is not None:
        duration(text)
    return text


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


class _Section(BaseModel):
    """What all sections share: no unknown key, no coercion, no change, and no secret in what is printed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _prepare(cls, value: object) -> object:
        # YAML and JSON have lists only; what is kept can't be changed.
        return tuple(value) if isinstance(value, list) else value

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, _redacted(name, value)) for name, value in self]


class StorageSection(_Section):
    """Where sessions are stored."""

    url: Annotated[str, AfterValidator(_printable)] = _key(
        "sqlite:///data/agent_runtime.db", "The database, as a URL.", min_length=1
    )
    options: Mapping[str, Any] = _key({}, "Handed to the storage as they are; its documentation names them.")
    read_timeout_s: float = _key(30.0, "Seconds a read may take; what is written meanwhile stays in memory.", gt=0)


class JournalSection(_Section):
    """The journal: where changes are written before they are acknowledged."""

    enabled: bool = _key(True, "Whether changes go to a journal; without one a crash loses what is not stored.")
    directory: str | None = _key(
        None, "Where the journal lies; null: beside the SQLite file. Other databases need it set.", min_length=1
    )
    sync_interval_s: float = _key(1.0, "Seconds between two syncs of the journal while nobody waits for one.", gt=0)
    segment_bytes: int = _key(67_108_864, "Bytes at which a new segment begins.", ge=4096)
    retain_s: float = _key(0.0, "Seconds a segment is kept after all of it is stored.", ge=0)


class WriteBehindSection(_Section):
    """When changes go to the database, and how much may wait."""

    durability: Durability = _key(
        "journaled",
        "The level a call waits for unless it names one: journaled, synced or stored; without a journal buffered or "
        "stored, and buffered is the default.",
    )
    interval_s: float = _key(5.0, "Seconds between two batches while there are changes.", gt=0)
    batch_changes: int = _key(1000, "Changes at which a batch goes at once; the most it holds.", ge=1)
    pending_bytes_max: int = _key(67_108_864, "Bytes of unstored changes; past it an append waits.", ge=65_536)
    append_timeout_s: float = _key(5.0, "Seconds an append waits for room before it fails with Overloaded.", gt=0)
    durability_timeout_s: float = _key(30.0, "Seconds a call waits for its level; its change stands after.", gt=0)
    drain_timeout_s: float = _key(30.0, "Seconds that closing may take to store what is left.", gt=0)
    quarantine_max: int = _key(10, "Rejected changes in a window that are quarantined; past it batches stop.", ge=1)
    quarantine_window_s: float = _key(60.0, "Seconds of the window in which rejected changes are counted.", gt=0)


class ResidentsSection(_Section):
    """What stays in memory."""

    bytes_max: int = _key(268_435_456, "Bytes of sessions in memory; the least recently used go first.", ge=65_536)
    tail_messages: int = _key(200, "Newest messages of a session that stay in memory.", ge=1)


class LeaseSection(_Section):
    """The right to write."""

    duration_s: float = _key(10.0, "Seconds after which the lease of a silent holder may be taken.", ge=1)
    unreachable: Literal["continue", "refuse"] = _key(
        "continue", "Whether writes continue, or are refused, while the lease has expired because the database is away."
    )
    wait: bool = _key(False, "Whether to wait for a lease that another runtime holds, and take over after it.")


class RetentionSection(_Section):
    """When sessions are deleted by themselves."""

    max_idle: Annotated[str | None, AfterValidator(_duration)] = _key(
        None, "How long a session may lie idle, such as 30d or 12h, before it is deleted; null: for ever."
    )
    sweep_interval_s: float = _key(3600.0, "Seconds between two searches for idle sessions.", gt=0)


class HttpSection(_Section):
    """The HTTP surface."""

    host: str = _key("127.0.0.1", "The address to listen on.", min_length=1)
    port: int = _key(8001, "The port to listen on; 0 takes one that is free.", ge=0, le=65_535)
    body_bytes_max: int = _key(1_048_576, "Bytes that the body of a request may have.", ge=1024)
    tokens: tuple[Annotated[str, AfterValidator(token_digest)], ...] = _key(
        (), "Bearer tokens that are let in, each as it is or as sha256: and its SHA-256 in hex; only that is kept."
    )
    tokens_file: str | None = _key(None, "A file with such a token a line, read again at SIGHUP.", min_length=1)
    origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = _key(
        (), "Origins of other sites whose pages may write, such as https://console.example.com."
    )
    insecure: bool = _key(False, "Whether to serve without tokens beyond this machine, and under any host name.")


class LoggingSection(_Section):
    """What is logged, and how."""

    level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_upper)] = _key(
        "INFO", "The least severe level that is logged."
    )
    format: Literal["text", "json"] = _key("text", "Lines for people (text) or for machines (json).")


class PluginsSection(_Section):
    """Which plugins load, and what they are told."""

    disabled: tuple[str, ...] = _key((), "Names of plugins that are not loaded.")
    config: Mapping[str, Any] = _key({}, "What plugins are told, each under its name.")


class Config(_Section):
    """All of the configuration. Built by `load_config` or `Config.of`; both raise ConfigError."""

    storage: StorageSection = StorageSection()
    journal: JournalSection = JournalSection()
    write_behind: WriteBehindSection = WriteBehindSection()
    residents: ResidentsSection = ResidentsSection()
    lease: LeaseSection = LeaseSection()
    retention: RetentionSection = RetentionSection()
    http: HttpSection = HttpSection()
    logging: LoggingSection = LoggingSection()
    plugins: PluginsSection = PluginsSection()

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, url: str | None = None, /, **sections: Mapping[str, object]) -> Config:
        """A configuration from Python: `Config.of("memory:", write_behind={"interval_s": 1.0})`.

        Raises:
            ConfigError: with one line for each fault.
        """
        settings = [
            Setting((section, key), value, "option", f"{section}.{key}")
            for section, values in sections.items()
            for key, value in values.items()
        ]
        if url is not None:
            settings.append(Setting(("storage", "url"), url, "option", "storage.url"))
        return build(settings, [])

    def origin(self, key: str) -> str:
        """Where the value of a key comes from: "default", "path:line", a variable's name, or "option"."""
        section, _, name = key.partition(".")
        if key in self._origins:
            return self._origins[key]
        if key not in known_keys():
            raise ConfigError([f"{key}: unknown key{_nearest_key(key.split('.'))}"])
        return "option" if name in getattr(self, section).model_fields_set else "default"

    def shown(self) -> dict[str, Any]:
        """Every key with its value, as plain data, with secrets as `***`."""
        return {name: _redacted(name, dict(section)) for name, section in self}

    def __eq__(self, other: object) -> bool:
        # Where a value came from is not part of what a configuration says.
        return isinstance(other, Config) and dict(self) == dict(other)


SECTIONS: Final[dict[str, type[_Section]]] = {name: type(section) for name, section in Config()}
FIELDS: Final = {
    (section, key): field.annotation for section, kind in SECTIONS.items() for key, field in kind.model_fields.items()
}
"""The type of each key."""
FREE: Final = tuple(path for path, kind in FIELDS.items() if get_origin(kind) is Mapping)
"""The keys below which names are free."""


def known_keys() -> list[str]:
    """Every key, as `section.key`."""
    return [f"{section}.{key}" for section, key in FIELDS]


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file."""
    return Config.model_json_schema()


# -- laying the sources over each other -------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One value from one source. `origin` says where it stands, `label` begins a message about it."""

    path: tuple[str, ...]
    value: object
    origin: str
    label: str


def build(settings: Iterable[Setting], problems: list[str]) -> Config:
    """Later settings win; one below a free mapping is laid into it."""
    values: dict[str, Any] = {}
    winners: dict[tuple[str, ...], Setting] = {}
    for setting in settings:
        if misplaced := _misplaced(setting.path):
            problems.append(f"{setting.label}: {misplaced}")
            continue
        target = values
        for step in setting.path[:-1]:
            inner = target.get(step)
            target[step] = dict(inner) if isinstance(inner, Mapping) else {}  # a copy: the source's stays as it is
            target = target[step]
        target[setting.path[-1]] = setting.value
        winners[setting.path] = setting
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems.extend(_problems(error, winners))
    else:
        problems.extend(_conflicts(config, winners))
    if problems:
        raise ConfigError(problems)
    config._origins.update({".".join(path): setting.origin for path, setting in winners.items()})
    return config


def _conflicts(config: Config, winners: Mapping[tuple[str, ...], Setting]) -> Iterator[str]:
    """What is right by itself, and not together."""
    level = config.write_behind.durability
    set_level = winners.get(("write_behind", "durability"))
    if set_level is not None and level in ("journaled", "synced") and not config.journal.enabled:
        yield f"{set_level.label}: {level} needs the journal, which is off: use buffered or stored"


def _misplaced(path: tuple[str, ...]) -> str | None:
    if path[0] not in SECTIONS or (len(path) > 1 and path[:2] not in FIELDS):
        return f"unknown key{_nearest_key(path[:2])}"
    if len(path) == 1:
        return f"must be a mapping of keys ({', '.join(SECTIONS[path[0]].model_fields)})"
    if len(path) > 2 and path[:2] not in FREE:
        return "there is nothing below this key; give its value itself"
    return None


def _nearest_key(path: Sequence[str]) -> str:
    """The end of a message about an unknown key: a near one of its section, or of another, else those there are."""
    siblings = list(SECTIONS[path[0]].model_fields) if path[0] in SECTIONS else list(SECTIONS)
    if not difflib.get_close_matches(path[-1], siblings, n=1):
        elsewhere = {key: f"{section}.{key}" for section, key in FIELDS}
        if near := difflib.get_close_matches(path[-1], elsewhere, n=1):
            return f"; did you mean {elsewhere[near[0]]}?"
    return did_you_mean(path[-1], siblings)


_WORDS: Final = {
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "string_unicode": "must be text in UTF-8",
    "tuple_type": "must be a list, as in [a, b]",
}
_FOUND: Final = {
    str: "text",
    bool: "true or false",
    float: "a fraction",
    tuple: "a list",
    dict: "a mapping",
    NoneType: "null",
}


def _problems(error: ValidationError, winners: Mapping[tuple[str, ...], Setting]) -> Iterator[str]:
    """One line a fault. Values are not shown: nobody knows which of them are secrets."""
    for fault in error.errors(include_url=False):
        location = tuple(str(step) for step in fault["loc"])
        path = next(location[:n] for n in range(len(location), -1, -1) if location[:n] in winners)
        below = "".join(f"[{step}]" for step in location[len(path) :] if step != "[key]")
        found = _FOUND.get(type(fault["input"])) if fault["type"].endswith("_type") else None
        yield f"{winners[path].label}{below}: {worded(fault)}" + (f", not {found}" if found else "")


def worded(fault: ErrorDetails) -> str:
    """What pydantic says, in the words of the other faults."""
    return _WORDS.get(fault["type"]) or fault["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
