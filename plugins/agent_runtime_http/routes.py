"""What the OpenAPI document says of routes that plugins bring.

Each method of a route is there, under the name of its function and with its docstring; `include_in_schema=False` leaves
a route out, as everywhere with Starlette. A plugin says more as Starlette's own schemas have it: behind a line `---` of
the docstring stands the Operation Object of OpenAPI in YAML, or as much of it as is to be said.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import count
from typing import Any, Final

import yaml
from starlette.routing import BaseRoute
from starlette.schemas import BaseSchemaGenerator

from agent_runtime import PluginError

from .hookspecs import ROUTES

__all__ = ["described"]

_split: Final = re.compile(r"^---$", re.MULTILINE).split
_names: Final = re.compile(r"{(\w+)}").findall


def described(
    routes: Iterable[tuple[str, BaseRoute]], taken: Collection[str]
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """For each method of each route: the plugin, the path, the method in lower case, the Operation Object.

    `taken` are ids of other operations.

    Raises:
        PluginError: what stands in a docstring is no Operation Object.
    """
    ids = set(taken)
    for plugin, route in routes:
        for path, method, function in BaseSchemaGenerator().get_endpoints([route]):
            said = _said(plugin, function)
            said.setdefault("operationId", _free(function.__name__, ids))
            ids.add(said["operationId"])
            names = _names(path)
            if names:
                said.setdefault("parameters", [_in_path(name) for name in names])
            said.setdefault("responses", {"default": {"description": "What the plugin answers."}})
            yield plugin, path, method, said


def _said(plugin: str, function: Callable[..., Any]) -> dict[str, Any]:
    text, *given = _split(inspect.cleandoc(function.__doc__ or ""), maxsplit=1)
    summary, _, description = text.strip().partition("\n\n")
    said = {"summary": summary.removesuffix("."), "description": description}
    said = {name: value for name, value in said.items() if value}
    try:
        more = yaml.safe_load(given[0]) if given else {}
    except yaml.YAMLError as error:
        raise PluginError(plugin, ROUTES, f"{function.__name__}: behind --- stands no YAML: {error}") from None
    if not isinstance(more, dict):
        raise PluginError(plugin, ROUTES, f"{function.__name__}: behind --- stands no Operation Object of OpenAPI")
    return said | more


def _free(name: str, taken: Collection[str]) -> str:
    free = name
    for number in count(2):
        if free not in taken:
            break
        free = f"{name}_{number}"
    return free


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
