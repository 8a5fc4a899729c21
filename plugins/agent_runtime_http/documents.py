"""Documents of a session: JSON, or bytes that come back with the media type they came with."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Final

import msgspec

from agent_runtime import Document, DurabilityNotReached, InvalidInput

from .answers import NO_CONTENT, Answer, json_answer
from .bodies import JSON, check_json_type, decode_json
from .problems import Refusal
from .resources import Call, Operations, operation

__all__ = ["OPERATIONS"]

_is_media_type: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+/[!#$%&'*+.^_`|~0-9A-Za-z-]+ *(;[ -~]*)?").fullmatch
_AS_FILE: Final = [(b"x-content-type-options", b"nosniff"), (b"content-disposition", b"attachment")]


class _Written(msgspec.Struct, frozen=True):
    """A document that was written, without its value."""

    collection: str
    key: str
    media_type: str | None
    updated_at: datetime


def _written(document: Document) -> _Written:
    return _Written(document.collection, document.key, document.media_type, document.updated_at)


@operation()
async def show(call: Call) -> Answer:
    """The value of a document: JSON, or its bytes under their media type."""
    session = await call.session()
    document = await session.get_document(call.path["collection"], call.path["key"])
    if document is None:
        raise _missing()
    media_type = document.media_type
    if media_type is None:
        return json_answer(document.value, headers=_AS_FILE[:1])
    if not _is_media_type(media_type):  # not put in over HTTP; it might not be fit for a header
        media_type = "application/octet-stream"
    return Answer(document.value, 200, media_type.encode(), _AS_FILE)


@operation(durability=str)
async def put(call: Call) -> Answer:
    """Write a document, JSON or bytes by its Content-Type; 200 and what is known of it, without its value."""
    body, content_type = await call.body()
    given = "" if content_type is None else content_type.decode("latin-1")
    if not _is_media_type(given):
        raise Refusal("unsupported-media-type", "say what it is with Content-Type: application/json, image/png, …")
    value: Any = body
    media_type: str | None = given
    if given.partition(";")[0].strip().lower() == "application/json":
        check_json_type(content_type, JSON)
        value, media_type = decode_json(body), None
    session = await call.session()
    collection, key = call.path["collection"], call.path["key"]
    try:
        document = await session.put_document(collection, key, value, media_type=media_type, **call.options)
    except InvalidInput as error:
        if error.keys[:1] != ("value",):
            raise
        raise InvalidInput(error.path, error.problem, error.keys[1:]) from None  # the body is the value
    except DurabilityNotReached as error:
        error.outcome = _written(error.outcome)
        raise
    return json_answer(_written(document))


@operation(durability=str)
async def delete(call: Call) -> Answer:
    """Delete a document; 204, 404 if there is none."""
    session = await call.session()
    if not await session.delete_document(call.path["collection"], call.path["key"], **call.options):
        raise _missing()
    return NO_CONTENT


@operation(cursor=str, limit=int)
async def list_documents(call: Call) -> Answer:
    """A page of the documents of a collection, with their values, by key."""
    return json_answer(await (await call.session()).list_documents(call.path["collection"], **call.options))


def _missing() -> Refusal:
    return Refusal("document-not-found", "the session has no document under this key")


OPERATIONS: Final[Operations] = {
    "/v1/sessions/{session_id}/documents/{collection}": {"GET": list_documents},
    "/v1/sessions/{session_id}/documents/{collection}/{key}": {"GET": show, "PUT": put, "DELETE": delete},
}
