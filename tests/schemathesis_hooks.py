"""What schemathesis is told of the surface: why a request may be refused that no schema forbids, and what of its own rules
holds here only in part: how long what was created is there, and what is gone once it was deleted.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote, urlsplit

import schemathesis
from schemathesis.generation import GenerationMode
from schemathesis.openapi.checks import EnsureResourceAvailability, UseAfterFree
from schemathesis.specs.openapi.checks import ensure_resource_availability, use_after_free

REASONS = re.compile(
    "is not one that a list gave"  # a cursor
    "|is given twice: here and as a key"  # of `extra`, and of the message
    "|is given by the runtime; leave it out"  # `seq`: of a message any other key is kept
    "|is a field of the message itself and can't be an extra key"
    "|must be an int, not float"  # 1.0 is an integer to JSON Schema
    "|must lie in the years 1970 to 9999"
)
MESSAGES = "/v1/sessions/{session_id}/messages"
APPENDS = {f"POST {MESSAGES}", f"POST {MESSAGES}/batch", "POST /v1/sessions/{session_id}/tool-results"}

Path = tuple[str, ...]

answers: dict[Path, object] = {}
"""What was answered when the resource of a path was created."""
may_be_gone: set[Path] = set()
"""Of these, what was taken away since without a DELETE of its own, or may have been."""


def _path(response: schemathesis.Response) -> Path:
    return tuple(map(unquote, urlsplit(str(response.request.url)).path.split("/")[1:]))


@schemathesis.hook
def after_call(
    context: schemathesis.HookContext, case: schemathesis.Case[Any], response: schemathesis.Response
) -> None:
    """Keep what was created, and what of it may be gone.

    A POST that comes again with its Idempotency-Key has the first answer again, word for word, "also when what was
    written has been changed or deleted since" (plugins/agent_runtime_http/README.md), be it by another sequence: all
    have one server. And a pop takes away the message it answers with, a DELETE of the messages those that are there.
    """
    if response.status_code not in (200, 201, 204):
        return
    label, path = f"{case.method} {case.path}", _path(response)  # with the method that was sent: it tries others too
    created: dict[Path, object] = {}
    if label == "POST /v1/sessions":
        created = {(*path, response.json()["session_id"]): response.json()}
    elif label in APPENDS:
        messages = response.json().get("items", [response.json()])
        created = {(*path[:3], "messages", str(each["seq"])): each for each in messages}
    elif label == f"POST {MESSAGES}/pop":
        may_be_gone.add((*path[:-1], str(response.json()["seq"])))
    elif label == f"DELETE {MESSAGES}":
        may_be_gone.update(each for each in answers if each[: len(path)] == path)
    for resource, answer in created.items():
        if answers.get(resource) == answer:
            may_be_gone.add(resource)
        else:
            answers[resource] = answer
            may_be_gone.discard(resource)


@schemathesis.check
def what_was_created_is_there(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    """As `ensure_resource_availability` has it, but for what may be gone."""
    try:
        ensure_resource_availability(ctx, response, case)
    except EnsureResourceAvailability:
        path = _path(response)
        if not any(path[: len(each)] == each for each in may_be_gone):
            raise


@schemathesis.check
def what_was_deleted_is_gone(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    """As `use_after_free` has it; but where the messages were deleted, a list of them is there, and are later ones."""
    try:
        use_after_free(ctx, response, case)
    except UseAfterFree as found:
        path, clear = _path(response), f"DELETE {MESSAGES}".format(**case.path_parameters)
        is_there = path[-1] == "messages" or (path in answers and path not in may_be_gone)
        if not (unquote(found.free) == unquote(clear) and is_there):
            raise


@schemathesis.check
def refused_for_a_reason(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    """What the document allows is refused only for what it can't say."""
    if case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE and response.status_code == 422:
        assert REASONS.search(response.json()["detail"]), f"refused, though the document allows it: {response.text}"
