"""What comes in as a body: counted while it is read, checked for its type, decoded.

Guarantees: no more than the limit (and one chunk) is ever held; nothing is decoded that says it is something else, nor
anything taken that is compressed; what is not JSON is told apart from JSON that holds what can't be stored (NaN, lone
surrogates, …), for the runtime to name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Final

import msgspec
from starlette.types import Receive

from .answers import Disconnected
from .problems import Fault, Refusal

__all__ = ["JSON", "MERGE_PATCH", "check_json_type", "decode_json", "read_body"]

JSON: Final = frozenset({"application/json"})
MERGE_PATCH: Final = frozenset({"application/json", "application/merge-patch+json"})

_PLAIN: Final = b"application/json"
_decode: Final = msgspec.json.Decoder().decode


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, bytes_max: int) -> bytes:
    """The whole body.

    Raises:
        Refusal: it has more than `bytes_max` bytes, or is compressed.
        Disconnected: the client went before its end.
    """
    if b"content-encoding" in headers and headers[b"content-encoding"].strip().lower() not in (b"", b"identity"):
        raise Refusal(
            "unsupported-media-type",
            "compressed bodies are not read here: send it as it is, without Content-Encoding",
            headers=[(b"accept-encoding", b"identity")],
        )
    length = headers.get(b"content-length", b"")
    if length.isdigit() and (len(length) > 15 or int(length) > bytes_max):
        raise _too_large(bytes_max)
    message = await receive()
    body: bytes | bytearray = message.get("body", b"")
    if message.get("more_body"):
        body = bytearray(body)
        while message.get("more_body") and len(body) <= bytes_max:
            message = await receive()
            body += message.get("body", b"")
    if message["type"] == "http.disconnect":
        raise Disconnected
    if len(body) > bytes_max:
        raise _too_large(bytes_max)
    return bytes(body)


def _too_large(bytes_max: int) -> Refusal:
    return Refusal("too-large", f"a body may have {bytes_max} bytes (http.body_bytes_max): split the request")


def check_json_type(content_type: bytes | None, types: Collection[str]) -> None:
    """Refuse a body that says it is something else. One that says nothing is taken for JSON."""
    if content_type is None or content_type == _PLAIN:
        return
    media_type, _, parameters = content_type.decode("latin-1").lower().partition(";")
    if media_type.strip() not in types:
        wanted = " or ".join(sorted(types))
        raise Refusal("unsupported-media-type", f"the body must be JSON: send it with Content-Type: {wanted}")
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in ("utf-8", "utf8", "us-ascii"):
            raise Refusal("unsupported-media-type", "JSON is read in UTF-8 only: leave the charset out")


def decode_json(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        Refusal: it is no JSON text.
    """
    try:
        return _decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        problem = str(error) if isinstance(error, msgspec.DecodeError) else None
    return _second_look(body, problem)


def _second_look(body: bytes, problem: str | None) -> Any:
    """A text that could not be decoded: raises what is wrong with it.

    Returns the value if it is JSON but for values that JSON has no form for; the runtime refuses those by their place.
    """
    if not body:
        raise _malformed("the body is empty; it must be JSON")
    try:
        return json.loads(body.decode())
    except UnicodeDecodeError as error:
        problem = f"it is not UTF-8 text (byte {error.start + 1})"
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:
        problem = problem or type(error).__name__
    raise _malformed(f"the body is not JSON: {problem}")


def _malformed(detail: str) -> Refusal:
    return Refusal("malformed", detail, [Fault("", detail)])
