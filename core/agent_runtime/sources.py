"""Where a configuration comes from: options over the environment over a file over the defaults.

All that is wrong in any of them is found in one go and raised as one ConfigError, a line a fault, each with its place
(`file:line`, a variable's name) and the way out. Nothing is opened but the file, nothing is read at import.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Final, get_args, get_origin

import msgspec
import yaml
from pydantic import TypeAdapter, ValidationError

from .config import FIELDS, FREE, SECTIONS, Config, Setting, build, worded
from .yaml_document import NULL, YamlDocument, YamlError

__all__ = ["load_config"]

PREFIX: Final = "AGENT_RUNTIME__"
STORAGE_URL: Final = f"{PREFIX}STORAGE__URL"
DB_URL: Final = f"{PREFIX}DB_URL"
ALIASES: Final = {DB_URL: ("storage", "url"), "LOG_LEVEL": ("logging", "level")}
THEIRS: Final = ("INTERNAL_API_KEY", f"{PREFIX}INTERNAL_API_KEY")
"""Variables of the old service that the plugin for its users reads."""
IGNORED: Final = ("LLM_PROXY_URL", "GATEWAY_URL", "LLM_MODEL", "VERSION")
"""Variables of the old service that mean nothing any more."""

_log: Final = logging.getLogger("agent_runtime")


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
    settings: list[Setting] = []
    if file is not None:
        settings += _file_settings(os.fspath(file), problems)
    settings += _environment_settings(os.environ if environ is None else environ, problems)
    for key, value in (overrides or {}).items():
        settings.append(Setting(tuple(key.split(".")), value, "option", f"option {key}"))
    return build(settings, problems)


def _environment_settings(environ: Mapping[str, str], problems: list[str]) -> Iterator[Setting]:
    """The settings that variables make. An empty variable counts as not set: compose files leave such."""
    known = {f"{PREFIX}{section}__{key}".upper(): (section, key) for section, key in FIELDS} | ALIASES
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
    if ignored and (ours or THEIRS[0] in environ):  # alone they are too common to mean the old service
        _log.warning("ignored, as this version has no use for them: %s", ", ".join(ignored))
    _warn_of_single_underscores(environ, known)
    # LOG_LEVEL comes first, as our own name wins over it; and a mapping comes before what is laid into it.
    for upper, name in [("LOG_LEVEL", "LOG_LEVEL"), *sorted(ours.items())]:
        path = known.get(upper) or _path_below(upper)
        if upper in THEIRS or (path and not environ.get(name)):
            continue
        try:
            if path is None:
                raise ValueError(f"unknown variable{_nearest_variable(upper, known)}")
            value = _member(environ[name]) if len(path) > 2 else _parsed(FIELDS[path[0], path[1]], environ[name])
        except ValueError as error:
            problems.append(f"{name}: {error}")
        else:
            yield Setting(path, value, name, name)


def _warn_of_single_underscores(environ: Mapping[str, str], known: Iterable[str]) -> None:
    """Tell of variables that would be ours with `__`. No error: Kubernetes makes such, for a service of a like name."""
    meant = {name.replace("__", "_"): name for name in known if name.startswith(PREFIX)}
    for name, value in environ.items():
        near = None if name.upper().startswith(PREFIX) else meant.get(name.upper().replace("__", "_"))
        if near and value:
            _log.warning("%s is not read: did you mean %s?", name, near)


def _path_below(upper: str) -> tuple[str, ...] | None:
    """The path of a variable that names a member of a free mapping."""
    path = tuple(upper.removeprefix(PREFIX).lower().split("__"))
    return path if path[:2] in FREE and len(path) > 2 and all(path) else None


def _nearest_variable(upper: str, known: Iterable[str]) -> str:
    # Without the prefix that all share, or any two would look alike.
    names = [name.removeprefix(PREFIX) for name in known if name.startswith(PREFIX)]
    near = difflib.get_close_matches(upper.removeprefix(PREFIX), names, n=1)
    return f"; did you mean {PREFIX}{near[0]}?" if near else f"; the sections are {', '.join(SECTIONS)}"


def _parsed(kind: object, text: str) -> object:
    """A key's value from text: JSON or YAML for lists and mappings, else what the text says."""
    if get_origin(kind) in (Mapping, tuple):
        return _collection(text)
    if kind in (bool, int, float):
        try:
            return TypeAdapter[object](kind).validate_python(text)
        except ValidationError as error:
            raise ValueError(worded(error.errors()[0])) from None
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
        document = YamlDocument(text)
        value = document.value(document.root)
    except YamlError as error:
        raise ValueError(error.problem) from None
    if document.faults:
        raise ValueError(document.faults[0][1])
    return value


def _file_settings(name: str, problems: list[str]) -> Iterator[Setting]:
    """The settings that a file makes, each with its line."""
    try:
        document = YamlDocument(Path(name).read_bytes().decode())
        problems.extend(f"{name}:{line}: {fault}" for line, fault in document.faults)
        for section, line, node in document.items(document.root):
            if section not in SECTIONS or not (node.tag == NULL or isinstance(node, yaml.MappingNode)):
                yield Setting((section,), None, f"{name}:{line}", f"{name}:{line}: {section}")
                continue
            for key, line, value in document.items(node):
                yield Setting(
                    (section, key), document.value(value), f"{name}:{line}", f"{name}:{line}: {section}.{key}"
                )
    except OSError as error:
        problems.append(f"{name}: can't be read: {error.strerror}")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problems.append(f"{name}:{line}: is not UTF-8 text")
    except YamlError as error:
        problems.append(f"{name}:{error.line}: {error.problem}")
