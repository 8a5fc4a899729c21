"""A connection to the server: one request at a time, and whether it was answered.

It knows as much of HTTP/1.1 as our own server speaks: every answer has a Content-Length, or no body. What matters here
is the difference between a request that never left and one whose outcome nobody knows.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import anyio
import msgspec
from anyio.abc import ByteStream

from ..client import authorization

__all__ = ["Reply", "Unanswered", "Wire"]

_TIMEOUT_S: Final = 60.0
_CHUNK_BYTES: Final = 262_144
_STATUS: Final = slice(9, 12)
_LENGTH: Final = b"\r\ncontent-length:"

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode


class Unanswered(Exception):
    """The connection broke. `sent`: the server may have got the request, and carried it out."""

    def __init__(self, *, sent: bool) -> None:
        super().__init__()
        self.sent = sent


class Reply(NamedTuple):
    """An answer; `value` is what its body holds as JSON, None if it has none."""

    status: int
    value: Any

    @property
    def slug(self) -> str:
        """The type of a problem document."""
        return str(self.value["type"]).rpartition(":")[2] if isinstance(self.value, dict) else ""


class Wire:
    """Connects with the first request. After `Unanswered` it is of no use any more, but to be closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stream: ByteStream | None = None
        headers = {"host": f"127.0.0.1:{port}", **authorization(), "content-type": "application/json"}
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        self._head = f" HTTP/1.1\r\n{''.join(lines)}content-length: ".encode()

    async def ask(self, method: str, target: str, body: object = None) -> Reply:
        """Make a request.

        Raises:
            Unanswered: the server has gone, or keeps silent.
        """
        data = b"" if body is None else _encode(body)
        sent = False
        try:
            if self._stream is None:
                self._stream = await anyio.connect_tcp("127.0.0.1", self._port)
            sent = True
            with anyio.fail_after(_TIMEOUT_S):
                await self._stream.send(
                    b"%b %b%b%d\r\n\r\n%b" % (method.encode(), target.encode(), self._head, len(data), data)
                )
                return await self._answer(self._stream)
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream) as error:
            raise Unanswered(sent=sent) from error

    async def _answer(self, stream: ByteStream) -> Reply:
        data = b""
        while True:
            data += await stream.receive(_CHUNK_BYTES)
            head, end, body = data.partition(b"\r\n\r\n")
            if end:
                break
        place = head.lower().find(_LENGTH)
        length = int(head[place + len(_LENGTH) :].partition(b"\r\n")[0]) if place >= 0 else 0
        parts = [body]
        missing = length - len(body)
        while missing > 0:
            parts.append(await stream.receive(_CHUNK_BYTES))
            missing -= len(parts[-1])
        return Reply(int(head[_STATUS]), _decode(b"".join(parts)) if length else None)

    async def aclose(self) -> None:
        """Close the connection."""
        if self._stream is not None:
            await anyio.aclose_forcefully(self._stream)
