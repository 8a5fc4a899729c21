"""Documents of a session: JSON, or bytes that come back with the media type they came with."""

from __future__ import annotations

import re
from typing import Any, Final

from agent_runtime import Document, DurabilityNotReached, InvalidInput

from .answers import NO_CONTENT, Answer, json_answer
from .bodies import JSON, check_json_type, decode_json
from .operations import Gives, Operations, Takes, operation
from .problems import Refusal
from .queries import DURABILITY, KEY_CURSOR, limit
from .resources import Call
from .shapes import DocumentPage, DocumentRecord

__all__ = ["OPERATIONS"]

_GIVEN: Final = ("application/json", "*/*")
_TAKEN: Final = ("application/json", "application/octet-stream")

_is_media_type: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+/[!#$%&'*+.^_`|~0-9A-Za-z-]+ *(;[ -~]*)?").fullmatch
_AS_FILE: Final = [(b"x-content-type-options", b"nosniff"), (b"content-disposition", b"attachment")]


def _record(document: Document) -> DocumentRecord:
    return DocumentRecord(document.collection, document.key, document.media_type, document.updated_at)


@operation(Gives(200, Any, media_types=_GIVEN), refuses=["document-not-found"])
async def get_document(call: Call) -> Answer:
    """Get the value of a document: JSON, or bytes under the media type they came with."""
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


@operation(
    Gives(200, DocumentRecord),
    takes=Takes(dict[str, Any], example={"state": "approved"}, media_types=_TAKEN),
    durability=DURABILITY,
)
async def put_document(call: Call) -> Answer:
    """Write a document, over the one that may be there.

    `Content-Type: application/json` makes it JSON, an object as here or any other value; with another type, `image/png`
    or what it may be, it is bytes, and comes back under that type. The answer is what is known of the document, but its
    value.
    """
    content_type = call.content_type
    given = "" if content_type is None else content_type.decode("latin-1")
    if not _is_media_type(given):
        raise Refusal("unsupported-media-type", "say what it is with Content-Type: application/json, image/png, …")
    value: Any = call.body
    media_type: str | None = given
    if given.partition(";")[0].strip().lower() == "application/json":
        check_json_type(content_type, JSON)
        value, media_type = decode_json(call.body), None
    session = await call.session()
    collection, key = call.path["collection"], call.path["key"]
    try:
        document = await session.put_document(collection, key, value, media_type=media_type, **call.options)
    except InvalidInput as error:
        if error.keys[:1] != ("value",):
            raise
        raise InvalidInput(error.path, error.problem, error.keys[1:]) from None  # the body is the value
    except DurabilityNotReached as error:
        error.outcome = _record(error.outcome)
        raise
    return json_answer(_record(document))


@operation(Gives(204), refuses=["document-not-found"], durability=DURABILITY)
async def delete_document(call: Call) -> Answer:
    """Delete a document."""
    session = await call.session()
    if not await session.delete_document(call.path["collection"], call.path["key"], **call.options):
        raise _missing()
    return NO_CONTENT


@operation(Gives(200, DocumentPage), cursor=KEY_CURSOR, limit=limit(100))
async def list_documents(call: Call) -> Answer:
    """List the documents of a collection, with their values, by key."""
    return json_answer(await (await call.session()).list_documents(call.path["collection"], **call.options))


def _missing() -> Refusal:
    return Refusal("document-not-found", "the session has no document under this key")


OPERATIONS: Final[Operations] = {
    "/v1/sessions/{session_id}/documents/{collection}": {"GET": list_documents},
    "/v1/sessions/{session_id}/documents/{collection}/{key}": {
        "GET": get_document,
        "PUT": put_document,
        "DELETE": delete_document,
    },
}
