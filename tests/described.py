"""What is answered, held against the OpenAPI document: status, media type, headers, schema, and the type of a problem."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import unquote

from jsonschema_rs import Draft202012Validator

from agent_runtime_http.application import OPERATIONS
from agent_runtime_http.openapi import document

URN = "urn:agent-runtime:problem:"


@cache
def described() -> dict[str, Any]:
    """The document of the surface, without plugins."""
    return document(OPERATIONS)


@cache
def validator(reference: str) -> Draft202012Validator:
    """A validator of one of the schemas."""
    return Draft202012Validator({"$ref": reference, "components": described()["components"]}, validate_formats=True)


def followed(said: dict[str, Any]) -> dict[str, Any]:
    """What a reference refers to, or the thing itself."""
    for step in said.get("$ref", "").split("/")[1:]:
        said = said[step] if step != "components" else described()[step]
    return said


@cache
def template(path: str) -> str | None:
    """The path of the document that a path is one of; the one with fewest parameters, as routing does it."""
    segments = path.split("/")
    fitting = [
        each
        for each in described()["paths"]
        if len(parts := each.split("/")) == len(segments)
        and all(a == b or (a.startswith("{") and b) for a, b in zip(parts, segments, strict=True))
    ]
    return min(fitting, key=lambda each: each.count("{"), default=None)


def check_described(method: str, target: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """An answer is as the document has it.

    What no operation answers (unknown paths and methods, `OPTIONS`) stands in no document.
    """
    raw_path = target.partition("?")[0]
    path = None if "%2f" in raw_path.lower() else template(unquote(raw_path))
    operation = (
        {} if path is None else described()["paths"][path].get("get" if method == "HEAD" else method.lower(), {})
    )
    if not operation:
        return
    assert str(status) in operation["responses"], f"{method} {path} answers {status}, which is not in the document"
    response = followed(operation["responses"][str(status)])
    for name, header in response.get("headers", {}).items():
        assert not header.get("required") or name.lower() in headers, f"{method} {path} answers without {name}"
    if "content" not in response:
        assert body == b""
        return
    media_type = headers["content-type"].partition(";")[0]
    content = response["content"].get(media_type) or response["content"]["*/*"]
    if method == "HEAD":
        return
    if "$ref" in content["schema"]:
        validator(content["schema"]["$ref"]).validate(json.loads(body))
    if "examples" in content:
        problem = json.loads(body)
        assert problem["type"].removeprefix(URN) in content["examples"], f"{method} {path} answers {problem['type']}"
