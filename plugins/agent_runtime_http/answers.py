"""What is sent back: one response, whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import msgspec
from starlette.types import Receive, Scope, Send

__all__ = ["NO_CONTENT", "Answer", "Disconnected", "Headers", "json_answer"]

Headers: TypeAlias = Sequence[tuple[bytes, bytes]]

_encode: Final = msgspec.json.Encoder().encode


class Disconnected(Exception):
    """The client has gone: there is nobody to answer."""


class Answer:
    """A response; an ASGI application that sends it. Without a media type it has no body."""

    __slots__ = ("body", "headers", "media_type", "status")

    def __init__(
        self, body: bytes = b"", status: int = 200, media_type: bytes = b"application/json", headers: Headers = ()
    ) -> None:
        self.body = body
        self.status = status
        self.media_type = media_type
        self.headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = self.body
        headers = [*self.headers]
        if self.media_type:
            headers += ((b"content-type", self.media_type), (b"content-length", b"%d" % len(body)))
            if scope["method"] == "HEAD":
                body = b""
        try:
            await send({"type": "http.response.start", "status": self.status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        except OSError as error:  # how servers say so, since version 2.4 of the specification
            raise Disconnected from error


def json_answer(value: Any, status: int = 200, headers: Headers = ()) -> Answer:
    """A value as JSON."""
    return Answer(_encode(value), status, headers=headers)


NO_CONTENT: Final = Answer(status=204, media_type=b"")
