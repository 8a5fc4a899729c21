"""The OpenAPI document: what the operations say of themselves, in the form of OpenAPI 3.1.

Nothing is said here that is said elsewhere: paths, parameters, bodies and answers come from the operations, schemas
from the structs, problems from the table of errors, texts from docstrings. Only what follows from those is worked out
here: which problems an operation may have. The document is about the server that gives it: it has the routes of its
plugins too, and asks for a token if the server does.

Format: https://spec.openapis.org/oas/v3.1.1.html
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from importlib.metadata import version
from itertools import groupby
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from starlette.routing import BaseRoute

from agent_runtime.validation import SEQ_MAX

from .keys import HEADER, PATTERN
from .operations import NOTHING, Gives, Operation, Operations, Takes, takes_key
from .problems import KINDS, PROBLEM, Kind, Problem, urn
from .queries import Parameter
from .routes import described
from .shapes import Id

__all__ = ["document"]

Shown: TypeAlias = Mapping[Any, dict[str, Any]]
"""How a shape is referred to."""

_OPENAPI: Final = "3.1.1"
_ABOUT: Final = """\
Sessions of agents over HTTP: answered from memory, written behind in batches, and honest about what is stored.

Bodies and answers are JSON in UTF-8, but for documents of bytes; text has no NUL and no lone surrogates. Times are UTC,
as in RFC 3339. Members and parameters that are not known here are refused. `HEAD` works wherever `GET` does.

Every refusal and failure is a problem document (RFC 9457). What is refused has changed nothing; where a problem says
`applied` the change stands, and must not be sent again.
"""
_BEARER: Final = "A token, where the server asks for one."
_KEY: Final = (
    "A write that is sent again under its key, with the same body, has its effect once and is answered as at first. "
    "Keys are kept for 24 hours."
)
_IN_PATH: Final[Mapping[str, tuple[Any, str]]] = {
    "session_id": (Id, "The id of the session."),
    "seq": (Annotated[int, msgspec.Meta(ge=0, le=SEQ_MAX)], "The place of the message in its session, from 1."),
    "collection": (Id, "The collection of the document."),
    "key": (Id, "The key of the document in its collection."),
}
_HEADERS: Final[Mapping[str, dict[str, Any]]] = {
    "Location": {"description": "Where the session is found.", "required": True, "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 0}},
    "WWW-Authenticate": {"description": "How to say who asks.", "required": True, "schema": {"type": "string"}},
}
_SCHEMAS: Final = "#/components/schemas/{name}"
_RESPONSES: Final = "#/components/responses/{name}"
_PARAMETERS: Final = "#/components/parameters/{name}"
_BYTES: Final = {"schema": {"type": "string", "format": "binary"}}

_ALL: Final = ("malformed", "invalid-input", "internal-error")
_NOT_PUBLIC: Final = (
    "unauthenticated",
    "forbidden",
    "cross-origin",
    "misdirected",
    "too-many-requests",
    "runtime-closed",
    "storage-unavailable",
    "storage-fatal",
    "lease-lost",
)
_OF_BODY: Final = ("too-large", "unsupported-media-type")
_OF_WRITE: Final = (
    "session-held",
    "quarantined",
    "overloaded",
    "journal-unavailable",
    "durability-not-reached",
    "journal-full",
)


def document(
    operations: Operations,
    routes: Iterable[tuple[str, BaseRoute]] = (),
    *,
    root: str = "",
    authenticates: bool = False,
) -> dict[str, Any]:
    """The document of these operations, and of routes of plugins, each with the plugin's name.

    `root` is what the application is mounted at; `authenticates` says whether a request must say who makes it.

    Raises:
        PluginError: a plugin describes a route in a wrong way.
    """
    schemas, shown = _schemas(operations)
    responses: dict[str, Any] = {}
    paths: dict[str, dict[str, Any]] = {}
    tags: dict[str, str] = {}
    for path, method, operation in _each(operations):
        paths.setdefault(path, {})[method.lower()] = _said(path, method, operation, shown, responses)
        tags[_tag(operation)] = _text(operation)
    taken = [said["operationId"] for methods in paths.values() for said in methods.values()]
    for plugin, path, method, said in described(routes, taken):
        if method not in paths.setdefault(path, {}):
            paths[path][method] = {"tags": [plugin], **said}
            tags.setdefault(plugin, f"What the plugin {plugin} brings.")
    info = {
        "title": "agent-runtime",
        "version": version("agent-runtime"),
        "description": _ABOUT,
        "license": {"name": "MIT", "identifier": "MIT"},
    }
    components = {
        "schemas": dict(sorted(schemas.items())),
        "responses": dict(sorted(responses.items())),
        "parameters": {name: _in_path(name) for name in _IN_PATH},
        "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "description": _BEARER}},
    }
    return {
        "openapi": _OPENAPI,
        "info": info,
        "servers": [{"url": root or "/"}],
        "security": [{"bearer": []}] if authenticates else [],
        "tags": [{"name": name, "description": text} for name, text in tags.items()],
        "paths": paths,
        "components": components,
    }


# --- operations -------------------------------------------------------------------------------------------------------


def _each(operations: Operations) -> list[tuple[str, str, Operation]]:
    return [(path, method, each) for path, methods in operations.items() for method, each in methods.items()]


def _tag(operation: Operation) -> str:
    return operation.handler.__module__.rpartition(".")[2]


def _text(operation: Operation) -> str:
    """What the module of an operation says of itself, first of all."""
    return inspect.cleandoc(sys.modules[operation.handler.__module__].__doc__ or "").partition("\n\n")[0]


def _said(path: str, method: str, operation: Operation, shown: Shown, responses: dict[str, Any]) -> dict[str, Any]:
    """An operation; what it shares with others of `responses` is put there."""
    handler: Any = operation.handler
    summary, _, description = inspect.cleandoc(handler.__doc__).partition("\n\n")
    said: dict[str, Any] = {"operationId": handler.__name__, "tags": [_tag(operation)]}
    said |= {"summary": summary.removesuffix(".")} | ({"description": description} if description else {})
    parameters = [{"$ref": _PARAMETERS.format(name=name)} for name in _IN_PATH if f"{{{name}}}" in path]
    parameters += [_in_query(name, parameter) for name, parameter in operation.parameters.items()]
    if takes_key(method, operation):
        parameters.append(_header())
    if parameters:
        said["parameters"] = parameters
    if operation.takes is not NOTHING:
        said["requestBody"] = _body(operation.takes, shown)
    said["responses"] = {str(gives.status): _answer(gives, shown) for gives in operation.gives}
    kinds = sorted({KINDS[slug] for slug in _slugs(path, method, operation)})
    for status, same in groupby(kinds, key=lambda kind: kind.status):
        name, response = _refused([*same])
        responses[name] = response
        said["responses"][str(status)] = {"$ref": _RESPONSES.format(name=name)}
    if operation.public:
        said["security"] = []
    return said


def _slugs(path: str, method: str, operation: Operation) -> list[str]:
    """The problems that an operation may have: its own, and those of all that are like it."""
    slugs = [*_ALL, *operation.refuses]
    if not operation.public:
        slugs += _NOT_PUBLIC
    if "{session_id}" in path:
        slugs.append("session-not-found")
    if operation.takes is not NOTHING:
        slugs += _OF_BODY
    if "durability" in operation.parameters:
        slugs += _OF_WRITE
    if takes_key(method, operation):
        slugs.append("idempotency-conflict")
    return slugs


# --- parameters, bodies, answers --------------------------------------------------------------------------------------


def _in_path(name: str) -> dict[str, Any]:
    shape, text = _IN_PATH[name]
    return {"name": name, "in": "path", "required": True, "description": text, "schema": msgspec.json.schema(shape)}


def _in_query(name: str, parameter: Parameter) -> dict[str, Any]:
    schema = _kind(parameter) if parameter.name is None else {"$ref": _SCHEMAS.format(name=parameter.name)}
    return {"name": name, "in": "query", "description": parameter.description, "schema": schema}


def _kind(parameter: Parameter) -> dict[str, Any]:
    return {"type": "integer" if parameter.kind is int else "string", **parameter.schema}


def _header() -> dict[str, Any]:
    return {"name": HEADER, "in": "header", "description": _KEY, "schema": {"type": "string", "pattern": PATTERN}}


def _body(takes: Takes, shown: Shown) -> dict[str, Any]:
    shape = {"schema": shown[takes.shape], "example": takes.example}
    return {"required": not takes.may_be_empty, "content": _content(takes.media_types, shape)}


def _answer(gives: Gives, shown: Shown) -> dict[str, Any]:
    if gives.shape is None:
        return {"description": "Done; there is nothing to say."}
    said: dict[str, Any] = {"description": HTTPStatus(gives.status).phrase + "."}
    if gives.headers:
        said["headers"] = {name: _HEADERS[name] for name in gives.headers}
    said["content"] = _content(gives.media_types, {"schema": shown[gives.shape]})
    return said


def _content(media_types: Iterable[str], shape: dict[str, Any]) -> dict[str, Any]:
    """What is of this shape where it is JSON, and bytes where it is not."""
    return {each: shape if each.endswith("json") else _BYTES for each in sorted(media_types)}


def _refused(kinds: Sequence[Kind]) -> tuple[str, dict[str, Any]]:
    """The response of the problems of one status, and a name for it."""
    examples = {
        kind.slug: {
            "summary": kind.title,
            "value": {"type": urn(kind.slug), "title": kind.title, "status": kind.status, "detail": "…"},
        }
        for kind in kinds
    }
    said: dict[str, Any] = {
        "description": "\n".join(f"- `{kind.slug}`: {kind.title}." for kind in kinds),
        "content": {PROBLEM: {"schema": {"$ref": _SCHEMAS.format(name="Problem")}, "examples": examples}},
    }
    if any(kind.again for kind in kinds):
        said["headers"] = {"Retry-After": _HEADERS["Retry-After"]}
    elif kinds[0].slug == "unauthenticated":
        said["headers"] = {"WWW-Authenticate": _HEADERS["WWW-Authenticate"]}
    return "Or".join("".join(word.capitalize() for word in kind.slug.split("-")) for kind in kinds), said


# --- schemas ----------------------------------------------------------------------------------------------------------


def _schemas(operations: Operations) -> tuple[dict[str, Any], Shown]:
    """The schemas by name, and how each shape is referred to."""
    found: list[Any] = [Problem]
    for _, _, operation in _each(operations):
        found += [operation.takes.shape, *(gives.shape for gives in operation.gives)]
    shapes = [*dict.fromkeys(found)]
    references, components = msgspec.json.schema_components(shapes, ref_template=_SCHEMAS)
    schemas = {name: _plain(schema) for name, schema in components.items()}
    parameters = [parameter for _, _, operation in _each(operations) for parameter in operation.parameters.values()]
    schemas |= {parameter.name: _kind(parameter) for parameter in parameters if parameter.name is not None}
    return schemas, dict(zip(shapes, references, strict=True))


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of msgspec's for readers that know less: an enum has a type, an array says that it holds anything."""
    said = {name: value for name, value in schema.items() if not (name == "default" and value is None)}
    if "description" in said:
        said["description"] = inspect.cleandoc(said["description"])
    if "enum" in said:
        said = {"type": "string", **said}
    if said.get("type") == "array":
        said = {"items": {}, **said}
    for name, value in said.items():
        if name == "properties":
            said[name] = {each: _plain(inner) for each, inner in value.items()}
        elif name in ("anyOf", "prefixItems"):
            said[name] = [_plain(inner) for inner in value]
        elif name in ("items", "additionalProperties") and isinstance(value, dict):
            said[name] = _plain(value)
    return said
