"""Problem documents (RFC 9457): what every refusal and failure looks like on the wire.

Owns the table of errors: which status and which type each has, and what may be said of it. A failure that nobody
expected says nothing of itself; it is logged, by its type and place, without its text, which may hold content.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType
from starlette.exceptions import HTTPException

from agent_runtime import (
    ApprovalDecided,
    ApprovalNotFound,
    DurabilityNotReached,
    IdempotencyConflict,
    InvalidInput,
    JournalError,
    JournalFull,
    LeaseLost,
    Overloaded,
    PluginError,
    Quarantined,
    RuntimeClosed,
    SessionExists,
    SessionHeld,
    SessionNotFound,
    StorageFatal,
    StorageUnavailable,
)
from agent_runtime.plugins import raised

from .answers import Answer, Headers

__all__ = [
    "FAILURES",
    "KINDS",
    "PROBLEM",
    "REFUSALS",
    "Fault",
    "Forbidden",
    "Kind",
    "Problem",
    "Refusal",
    "Unauthenticated",
    "answer_to",
    "invalid",
    "pointer_to",
    "urn",
]

logger: Final = logging.getLogger("agent_runtime.http")

PROBLEM: Final = "application/problem+json"
_TYPE: Final = "urn:agent-runtime:problem:"
_POINTER_CHARS_MAX: Final = 1000
_FAULTS_MAX: Final = 20
_RETRY_AFTER_S: Final = 5.0
"""When to come back, where nothing better is known."""


class Kind(NamedTuple):
    """A type of problem: its status, the last part of its URN, its title, and whether to try again later."""

    status: int
    slug: str
    title: str
    again: bool = False


class Fault(msgspec.Struct, frozen=True):
    """One thing that is wrong. `pointer` is a JSON pointer into the body, `?name` for a parameter of the query,
    `{name}` for a part of the path, a header's name for a header.
    """

    pointer: str
    detail: str


class Problem(msgspec.Struct, kw_only=True):
    """What was refused, or failed (RFC 9457). `errors` says where; `applied` that the change stands all the same, and
    must not be sent again: then `outcome` is what the answer would have been, `wanted` and `reached` are levels.
    """

    type: str
    title: str
    status: int
    detail: str
    errors: list[Fault] | UnsetType = UNSET
    applied: bool | UnsetType = UNSET
    outcome: Any = UNSET
    sequence: int | UnsetType = UNSET
    sequences: list[int] | UnsetType = UNSET
    wanted: str | UnsetType = UNSET
    reached: str | UnsetType = UNSET


REFUSALS: Final = {
    kind.slug: kind
    for kind in (
        Kind(400, "malformed", "The request can't be read"),
        Kind(401, "unauthenticated", "Nobody knows who asks"),
        Kind(403, "forbidden", "Not allowed"),
        Kind(403, "cross-origin", "A page of another site sent the request"),
        Kind(404, "not-found", "There is nothing here"),
        Kind(404, "message-not-found", "There is no such message"),
        Kind(404, "document-not-found", "There is no such document"),
        Kind(405, "method-not-allowed", "The method is not allowed here"),
        Kind(413, "too-large", "The body is too large"),
        Kind(415, "unsupported-media-type", "The body is of a type that is not read here"),
        Kind(421, "misdirected", "The request is for another host"),
        Kind(422, "invalid-input", "The request holds what can't be accepted"),
        Kind(429, "too-many-requests", "Too many requests", again=True),
    )
}
"""What this surface refuses by itself, by slug."""

FAILURES: Final[Mapping[type[Exception], Kind]] = {
    InvalidInput: REFUSALS["invalid-input"],
    SessionNotFound: Kind(404, "session-not-found", "There is no such session"),
    SessionExists: Kind(409, "session-exists", "The session exists already"),
    SessionHeld: Kind(409, "session-held", "The session is held until its change in quarantine is dealt with"),
    ApprovalNotFound: Kind(404, "approval-not-found", "There is no such approval"),
    ApprovalDecided: Kind(409, "approval-decided", "The approval can't be decided any more"),
    IdempotencyConflict: Kind(409, "idempotency-conflict", "The idempotency key was used for another request"),
    Quarantined: Kind(409, "quarantined", "Applied, but the database refuses it; it is kept in quarantine"),
    Overloaded: Kind(503, "overloaded", "Too many unstored changes", again=True),
    StorageUnavailable: Kind(503, "storage-unavailable", "The database is away", again=True),
    RuntimeClosed: Kind(503, "runtime-closed", "The runtime is not open", again=True),
    StorageFatal: Kind(503, "storage-fatal", "The database can't be used"),
    LeaseLost: Kind(503, "lease-lost", "Another runtime has taken over"),
    DurabilityNotReached: Kind(504, "durability-not-reached", "Applied, but not yet at the level asked for"),
    JournalFull: Kind(507, "journal-full", "The disk is full"),
    JournalError: Kind(503, "journal-unavailable", "The journal can't be written", again=True),
}
"""What the runtime raises."""

_OF_STATUS: Final = {404: "not-found", 429: "too-many-requests"}
_UNEXPECTED: Final = Kind(500, "internal-error", "The server failed")
KINDS: Final[Mapping[str, Kind]] = {kind.slug: kind for kind in (*REFUSALS.values(), *FAILURES.values(), _UNEXPECTED)}
"""Every type of problem, by slug."""


def urn(slug: str) -> str:
    """The type of a problem, whole."""
    return _TYPE + slug


class Refusal(Exception):
    """A request that the surface refuses. `slug` is one of `REFUSALS`."""

    def __init__(self, slug: str, detail: str, errors: Sequence[Fault] = (), headers: Headers = ()) -> None:
        super().__init__(detail)
        self.kind = REFUSALS[slug]
        self.detail = detail
        self.errors = errors
        self.headers = headers


class Unauthenticated(Refusal):
    """For plugins: the request does not say who makes it, or what it says is wrong. `challenge`: how to say it."""

    def __init__(self, detail: str = "say who you are", *, challenge: str = "Bearer") -> None:
        super().__init__("unauthenticated", detail, headers=[(b"www-authenticate", challenge.encode("latin-1"))])


class Forbidden(Refusal):
    """For plugins: who makes the request is known, and may not."""

    def __init__(self, detail: str = "you may not do this") -> None:
        super().__init__("forbidden", detail)


def invalid(faults: Sequence[Fault]) -> Refusal:
    """The refusal of a request with these faults; the first twenty are told."""
    told = faults[:_FAULTS_MAX]
    return Refusal("invalid-input", "; ".join(f"{fault.pointer} {fault.detail}".strip() for fault in told), told)


def answer_to(error: Exception, *, path: Collection[str] = (), query: Collection[str] = ()) -> Answer:
    """The problem document of an error. `path` and `query` are the names that are not members of the body."""
    if isinstance(error, Refusal):
        return _document(error.kind, error.detail, {"errors": error.errors} if error.errors else {}, error.headers)
    if isinstance(error, HTTPException):
        return _document(_http_kind(error.status_code), error.detail, headers=_http_headers(error))
    kind = next((FAILURES[each] for each in type(error).__mro__ if each in FAILURES), None)
    if kind is None:
        # The text of a PluginError names the plugin and never repeats what is in a session; any other's may.
        logger.error("a request failed: %s", error if isinstance(error, PluginError) else raised(error))
        return _document(_UNEXPECTED, "the request failed inside the server, whose log says where")
    members: dict[str, Any] = {}
    headers: Headers = ()
    match error:
        case InvalidInput():
            members["errors"] = [Fault(_place(error.keys, path, query), error.problem)]
        case DurabilityNotReached():
            members |= {"applied": True, "outcome": error.outcome, "sequence": error.sequence}
            members |= {"wanted": error.wanted, "reached": error.reached}
        case Quarantined():
            members |= {"applied": True, "sequences": error.sequences}
    if kind.again:
        retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else _RETRY_AFTER_S
        headers = [(b"retry-after", b"%d" % math.ceil(retry_after_s))]
    return _document(kind, str(error), members, headers)


def _document(kind: Kind, detail: str, members: Mapping[str, Any] = {}, headers: Headers = ()) -> Answer:
    body = {"type": urn(kind.slug), "title": kind.title, "status": kind.status, "detail": _clean(detail), **members}
    return Answer(msgspec.json.encode(body), kind.status, PROBLEM.encode(), headers)


def _http_kind(status: int) -> Kind:
    """The kind of what routes and middleware of plugins refuse by a status alone."""
    if status in _OF_STATUS:
        return REFUSALS[_OF_STATUS[status]]
    phrase = HTTPStatus(status).phrase
    return Kind(status, phrase.lower().replace(" ", "-"), phrase)


def _http_headers(error: HTTPException) -> Headers:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (error.headers or {}).items()]


def _place(keys: Sequence[str | int], path: Collection[str], query: Collection[str]) -> str:
    first = keys[0] if keys else ""
    return f"{{{first}}}" if first in path else f"?{first}" if first in query else pointer_to(*keys)


def pointer_to(*keys: str | int) -> str:
    """The JSON pointer (RFC 6901) to a member of the body, as far as it is short."""
    pointer = ""
    for key in keys:
        step = "/" + str(key).replace("~", "~0").replace("/", "~1")
        if len(pointer) + len(step) > _POINTER_CHARS_MAX:
            break
        pointer += step
    return _clean(pointer)


def _clean(text: str) -> str:
    """Text that can be encoded: a key that is refused for a lone surrogate is named all the same."""
    return text.encode(errors="backslashreplace").decode()
