"""YAML and environment → one frozen object.

Owns every key: its name, type, bounds, default and meaning; and how the three sources are laid over each other: options
over the environment over the file over the defaults. All that is wrong is found in one go and raised as one
ConfigError, a line a fault, each with its place (`file:line`, a variable's name) and the way out. Values never stand in
those lines: a value may be a secret. Nothing is opened but the file, nothing is read at import.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from .errors import ConfigError

__all__ = [
    "Config",
    "HttpSection",
    "JournalSection",
    "LeaseSection",
    "LoggingSection",
    "PluginsSection",
    "ResidentsSection",
    "RetentionSection",
    "StorageSection",
    "WriteBehindSection",
    "config_schema",
    "did_you_mean",
    "known_keys",
    "load_config",
    "redact_url",
]

PREFIX: Final = "AGENT_RUNTIME__"
STORAGE_URL: Final = f"{PREFIX}STORAGE__URL"
DB_URL: Final = f"{PREFIX}DB_URL"
ALIASES: Final = {DB_URL: ("storage", "url"), "LOG_LEVEL": ("logging", "level")}
LATER: Final = ("INTERNAL_API_KEY", f"{PREFIX}INTERNAL_API_KEY")
"""Variables of the old service that a later plugin reads."""
IGNORED: Final = ("LLM_PROXY_URL", "GATEWAY_URL", "LLM_MODEL", "VERSION")
"""Variables of the old service that mean nothing any more."""

_log: Final = logging.getLogger("agent_runtime")
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
    r"(password|passwd|passphrase|secret|tokens?|credentials?|(api|access|private|secret|signing)[_-]?key)$",
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


# -- the keys ---------------------------------------------------------------------------------------------------------


def _key(default: _Value, meaning: str, **bounds: Any) -> _Value:
    field: _Value = Field(default=default, description=meaning, **bounds)
    return field


def _later(default: _Value, meaning: str) -> _Value:
    """A key of a feature that has not landed: only its default is accepted, and the schema says so."""
    return _key(default, meaning, json_schema_extra={"const": default})


def _printable(url: str) -> str:
    if not url.isprintable():
        raise ValueError("must not hold control characters")
    return url


def _landed_level(level: object) -> object:
    if level in ("journaled", "synced"):
        raise ValueError("the journal is not in this version yet; use buffered or stored")
    return level


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


class _Section(BaseModel):
    """What all sections share: no unknown key, no coercion, no change, and no secret in what is printed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _prepare(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, list):
            value = tuple(value)  # YAML and JSON have lists only; what is kept can't be changed
        extra = cls.model_fields[info.field_name].json_schema_extra if info.field_name else None
        if isinstance(extra, dict) and "const" in extra and value != extra["const"]:
            default = msgspec.json.encode(extra["const"]).decode()
            raise ValueError(f"its feature is not in this version yet; only the default ({default}) is accepted")
        return value

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, _redacted(name, value)) for name, value in self]


class StorageSection(_Section):
    """Where sessions are stored."""

    url: Annotated[str, AfterValidator(_printable)] = _key(
        "sqlite:///data/agent_runtime.db", "The database, as a URL.", min_length=1
    )
    options: Mapping[str, Any] = _key({}, "Handed to the storage as they are; its documentation names them.")


class JournalSection(_Section):
    """The journal. Not in this version."""

    enabled: bool = _key(True, "Whether changes go to a journal; without effect in this version.")
    directory: str | None = _later(None, "Where the journal lies; null: beside the SQLite file.")
    sync_interval_s: float = _later(1.0, "Seconds between two syncs of the journal.")
    segment_bytes: int = _later(67_108_864, "Bytes at which a new segment begins.")
    retain_s: float = _later(0.0, "Seconds a segment is kept after all of it is stored.")


class WriteBehindSection(_Section):
    """When changes go to the database, and how much may wait."""

    durability: Annotated[Literal["buffered", "stored"], BeforeValidator(_landed_level)] = _key(
        "buffered", "The level a call waits for unless it names one: buffered (in memory) or stored."
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
    unreachable: Literal["continue", "refuse"] = _later(
        "continue", "With the database away: continue, or refuse writes."
    )
    wait: bool = _later(False, "Whether to wait for a lease that another runtime holds.")


class RetentionSection(_Section):
    """When sessions are deleted by themselves. Not in this version."""

    max_idle: str | None = _later(None, "How long a session may lie idle before it is deleted; null: for ever.")
    sweep_interval_s: float = _later(3600.0, "Seconds between two searches for idle sessions.")


class HttpSection(_Section):
    """The HTTP surface. Not in this version."""

    host: str = _later("127.0.0.1", "The address to listen on.")
    port: int = _later(8001, "The port to listen on.")
    body_bytes_max: int = _later(1_048_576, "Bytes that the body of a request may have.")
    tokens: tuple[str, ...] = _later((), "Bearer tokens that are let in.")
    tokens_file: str | None = _later(None, "A file with a token a line.")
    insecure: bool = _later(False, "Whether to listen beyond this machine without tokens.")


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
            _Setting((section, key), value, "option", f"{section}.{key}")
            for section, values in sections.items()
            for key, value in values.items()
        ]
        if url is not None:
            settings.append(_Setting(("storage", "url"), url, "option", "storage.url"))
        return _build(settings, [])

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


_SECTIONS: Final[dict[str, type[_Section]]] = {name: type(section) for name, section in Config()}
_FIELDS: Final = {
    (section, key): field.annotation for section, kind in _SECTIONS.items() for key, field in kind.model_fields.items()
}
"""The type of each key."""
_FREE: Final = tuple(path for path, kind in _FIELDS.items() if get_origin(kind) is Mapping)
"""The keys below which names are free."""


def known_keys() -> list[str]:
    """Every key, as `section.key`."""
    return [f"{section}.{key}" for section, key in _FIELDS]


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file."""
    return Config.model_json_schema()


def load_config(
    file: str | os.PathLike[str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Config:
    """Lay `overrides` (`section.key` → value) over the environment (`os.environ`) over the file over the defaults.

    Raises:
        ConfigError: with one line for each fault in any of them.
    """
    problems: list[str] = []
    settings: list[_Setting] = []
    if file is not None:
        settings += _file_settings(os.fspath(file), problems)
    settings += _environment_settings(os.environ if environ is None else environ, problems)
    for key, value in (overrides or {}).items():
        settings.append(_Setting(tuple(key.split(".")), value, "option", f"option {key}"))
    return _build(settings, problems)


# -- laying the sources over each other -------------------------------------------------------------------------------


class _Setting(NamedTuple):
    """One value from one source. `origin` says where it stands, `label` begins a message about it."""

    path: tuple[str, ...]
    value: object
    origin: str
    label: str


def _build(settings: Iterable[_Setting], problems: list[str]) -> Config:
    """Later settings win; one below a free mapping is laid into it."""
    values: dict[str, Any] = {}
    winners: dict[tuple[str, ...], _Setting] = {}
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
    if problems:
        raise ConfigError(problems)
    config._origins.update({".".join(path): setting.origin for path, setting in winners.items()})
    return config


def _misplaced(path: tuple[str, ...]) -> str | None:
    if path[0] not in _SECTIONS or (len(path) > 1 and path[:2] not in _FIELDS):
        return f"unknown key{_nearest_key(path[:2])}"
    if len(path) == 1:
        return f"must be a mapping of keys ({', '.join(_SECTIONS[path[0]].model_fields)})"
    if len(path) > 2 and path[:2] not in _FREE:
        return "there is nothing below this key; give its value itself"
    return None


def _nearest_key(path: Sequence[str]) -> str:
    """The end of a message about an unknown key: a near one of its section, or of another, else those there are."""
    siblings = list(_SECTIONS[path[0]].model_fields) if path[0] in _SECTIONS else list(_SECTIONS)
    if not difflib.get_close_matches(path[-1], siblings, n=1):
        elsewhere = {key: f"{section}.{key}" for section, key in _FIELDS}
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


def _problems(error: ValidationError, winners: Mapping[tuple[str, ...], _Setting]) -> Iterator[str]:
    """One line a fault. Values are not shown: nobody knows which of them are secrets."""
    for fault in error.errors(include_url=False):
        location = tuple(str(step) for step in fault["loc"])
        path = next(location[:n] for n in range(len(location), -1, -1) if location[:n] in winners)
        below = "".join(f"[{step}]" for step in location[len(path) :] if step != "[key]")
        found = _FOUND.get(type(fault["input"])) if fault["type"].endswith("_type") else None
        yield f"{winners[path].label}{below}: {_worded(fault)}" + (f", not {found}" if found else "")


def _worded(fault: ErrorDetails) -> str:
    """What pydantic says, in the words of the other faults."""
    return _WORDS.get(fault["type"]) or fault["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


# -- the environment --------------------------------------------------------------------------------------------------


def _environment_settings(environ: Mapping[str, str], problems: list[str]) -> Iterator[_Setting]:
    """The settings that variables make. An empty variable counts as not set: compose files leave such."""
    known = {f"{PREFIX}{section}__{key}".upper(): (section, key) for section, key in _FIELDS} | ALIASES
    ours: dict[str, str] = {}
    for name in environ:
        if name.upper().startswith(PREFIX):
            first = ours.setdefault(name.upper(), name)
            if first != name:
                problems.append(f"{name}: is set already, as {first}; unset one of them")
    urls = {environ[ours[name]] for name in (DB_URL, STORAGE_URL) if name in ours and environ[ours[name]]}
    if len(urls) > 1:
        problems.append(f"{DB_URL}: differs from {STORAGE_URL}, of which it is another name; unset one of them")
    ignored = [name for name in IGNORED if name in environ]
    if ignored and (ours or LATER[0] in environ):  # alone they are too common to mean the old service
        _log.warning("ignored, as this version has no use for them: %s", ", ".join(ignored))
    # LOG_LEVEL comes first, as our own name wins over it; and a mapping comes before what is laid into it.
    for upper, name in [("LOG_LEVEL", "LOG_LEVEL"), *sorted(ours.items())]:
        path = known.get(upper) or _path_below(upper)
        if upper in LATER or (path and not environ.get(name)):
            continue
        try:
            if path is None:
                raise ValueError(f"unknown variable{_nearest_variable(upper, known)}")
            value = _member(environ[name]) if len(path) > 2 else _parsed(_FIELDS[path[0], path[1]], environ[name])
        except ValueError as error:
            problems.append(f"{name}: {error}")
        else:
            yield _Setting(path, value, name, name)


def _path_below(upper: str) -> tuple[str, ...] | None:
    """The path of a variable that names a member of a free mapping."""
    path = tuple(upper.removeprefix(PREFIX).lower().split("__"))
    return path if path[:2] in _FREE and len(path) > 2 and all(path) else None


def _nearest_variable(upper: str, known: Iterable[str]) -> str:
    # Without the prefix that all share, or any two would look alike.
    names = [name.removeprefix(PREFIX) for name in known if name.startswith(PREFIX)]
    near = difflib.get_close_matches(upper.removeprefix(PREFIX), names, n=1)
    return f"; did you mean {PREFIX}{near[0]}?" if near else f"; the sections are {', '.join(_SECTIONS)}"


def _parsed(kind: object, text: str) -> object:
    """A key's value from text: JSON or YAML for lists and mappings, else what the text says."""
    if get_origin(kind) in (Mapping, tuple):
        return _collection(text)
    if kind in (bool, int, float):
        try:
            return TypeAdapter[object](kind).validate_python(text)
        except ValidationError as error:
            raise ValueError(_worded(error.errors()[0])) from None
    return None if text == "null" and NoneType in get_args(kind) else text


def _member(text: str) -> object:
    """A member of a free mapping: JSON where it reads as JSON, else the text itself."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return text


def _collection(text: str) -> object:
    value = _member(text)
    if value is not text:
        return value
    try:
        document = _YamlDocument(text)
        value = document.value(document.root)
    except _YamlError as error:
        raise ValueError(error.problem) from None
    if document.faults:
        raise ValueError(document.faults[0][1])
    return value


# -- the file ---------------------------------------------------------------------------------------------------------


def _file_settings(name: str, problems: list[str]) -> Iterator[_Setting]:
    """The settings that a file makes, each with its line."""
    try:
        document = _YamlDocument(Path(name).read_bytes().decode())
        problems.extend(f"{name}:{line}: {fault}" for line, fault in document.faults)
        for section, line, node in document.items(document.root):
            if section not in _SECTIONS or not (node.tag == _NULL or isinstance(node, yaml.MappingNode)):
                yield _Setting((section,), None, f"{name}:{line}", f"{name}:{line}: {section}")
                continue
            for key, line, value in document.items(node):
                yield _Setting(
                    (section, key), document.value(value), f"{name}:{line}", f"{name}:{line}: {section}.{key}"
                )
    except OSError as error:
        problems.append(f"{name}: can't be read: {error.strerror}")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problems.append(f"{name}:{line}: is not UTF-8 text")
    except _YamlError as error:
        problems.append(f"{name}:{error.line}: {error.problem}")


# -- YAML -------------------------------------------------------------------------------------------------------------

_NULL, _TEXT, _LIST, _MAPPING, _MERGE, _DATE = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "str", "seq", "map", "merge", "timestamp")
)
VALUES_MAX: Final = 10_000
DEPTH_MAX: Final = 50
_ENDLESS: Final = (VALUES_MAX + 1, DEPTH_MAX + 1)
_QUOTED: Final = re.compile(r"""'[^']*'|"[^"]*\"""")


class _YamlError(Exception):
    def __init__(self, line: int, problem: str) -> None:
        super().__init__(line, problem)
        self.line = line
        self.problem = problem

    @classmethod
    def of(cls, error: yaml.MarkedYAMLError) -> _YamlError:
        mark = error.problem_mark or error.context_mark
        # PyYAML quotes tokens and single characters, but also names from the text, and those may be of a secret.
        problem = _QUOTED.sub(lambda it: it[0] if len(it[0]) < 4 or it[0][1] in "<\\" else "…", error.problem or "")
        return cls(mark.line + 1 if mark else 1, f"is not YAML: {problem}")


class _Loader(yaml.SafeLoader):
    """The safe loader, with dates left as text: no key is a date."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - declared so by the base class
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _YamlDocument:
    """One document as nodes, which know their lines; `faults` has the line and text of what is not plain YAML.

    Nothing is built before all of it was measured. An alias weighs what it stands for, so that neither a cycle nor
    aliases of aliases get past the bounds. What is faulty is noted and mended, so that the rest can be looked at too.
    """

    def __init__(self, text: str) -> None:
        try:
            self._loader = _Loader(text)
            self.root = self._loader.get_single_node() or yaml.MappingNode(_MAPPING, [])
        except yaml.MarkedYAMLError as error:
            raise _YamlError.of(error) from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise _YamlError(line, f"is not YAML: it holds the character U+{error.character:04X}") from None
        except RecursionError:
            raise _YamlError(1, "is nested too deeply") from None
        self.faults: list[tuple[int, str]] = []
        self._measured: dict[int, tuple[int, int]] = {}
        values, depth = self._measure(self.root)
        if values > VALUES_MAX or depth > DEPTH_MAX:
            raise _YamlError(1, f"holds over {VALUES_MAX} values, aliases followed, or over {DEPTH_MAX} levels")

    def items(self, node: yaml.Node) -> Iterator[tuple[str, int, yaml.Node]]:
        """Key, line and value of each entry of a mapping, or of nothing; what is merged (`<<`) comes first."""
        if node.tag == _NULL:
            return  # all that would stand here is commented out
        if not isinstance(node, yaml.MappingNode):
            raise _YamlError(node.start_mark.line + 1, "must be a mapping of sections, as in storage: {url: …}")
        try:
            self._loader.flatten_mapping(node)
        except yaml.MarkedYAMLError as error:
            raise _YamlError.of(error) from None
        for key, value in node.value:
            yield str(key.value), key.start_mark.line + 1, value

    def value(self, node: yaml.Node) -> object:
        """The node as plain Python objects."""
        try:
            return self._loader.construct_object(node, deep=True)
        except yaml.MarkedYAMLError as error:
            raise _YamlError.of(error) from None
        except ValueError:  # a number of thousands of digits
            raise _YamlError(node.start_mark.line + 1, "can't be read as a value; quote it if it is text") from None

    def _measure(self, node: yaml.Node, path: str = "") -> tuple[int, int]:
        """How many values a node stands for, how many levels deep; each node is looked at once."""
        if id(node) not in self._measured:
            self._measured[id(node)] = _ENDLESS  # what a node that holds itself comes upon
            children: list[tuple[str, yaml.Node]] = []
            if isinstance(node, yaml.MappingNode):
                self._check_tag(node, _MAPPING)
                self._check_keys(node, path)
                children = [(f"{path}{key.value}.", child) for key, child in node.value]
            elif isinstance(node, yaml.SequenceNode):
                self._check_tag(node, _LIST)
                children = [(path, child) for child in node.value]
            else:
                self._check_tag(node, _TEXT)
            sizes = [self._measure(child, below) for below, child in children]
            self._measured[id(node)] = (1 + sum(n for n, _ in sizes), 1 + max((depth for _, depth in sizes), default=0))
        return self._measured[id(node)]

    def _check_tag(self, node: yaml.Node, plain: str) -> None:
        if node.tag != plain and node.tag != self._loader.resolve(type(node), node.value, (True, False)):  # type: ignore[no-untyped-call]
            self.faults.append((node.start_mark.line + 1, "tags are not accepted; quote a text that begins with !"))
            node.tag = plain

    def _check_keys(self, node: yaml.MappingNode, path: str) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _YamlError(line, "a key must be text")
            self._check_tag(key, _TEXT)
            if key.value in lines:
                self.faults.append((line, f"{path}{key.value}: stands in line {lines[key.value]} already; remove one"))
            lines.setdefault(key.value, line)
