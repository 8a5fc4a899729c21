"""The documentation that the server gives of itself: the OpenAPI document."""

from __future__ import annotations

import msgspec

from .answers import Answer
from .openapi import document
from .operations import Gives, Operations, operation
from .resources import Call

__all__ = ["documented"]


def documented(operations: Operations) -> Operations:
    """These operations, and the one that describes them all."""

    @operation(Gives(200, dict))
    async def get_openapi(call: Call) -> Answer:
        """Get this document.

        It has what the plugins of this server bring, too.
        """
        return Answer(_encoded(call, everything))

    everything = {**operations, "/openapi.json": {"GET": get_openapi}}
    return everything


def _encoded(call: Call, operations: Operations) -> bytes:
    """The document, made once for as long as the runtime is open and the application stays where it is mounted."""
    call.service.running()
    extensions = call.service.extensions
    if extensions.document is None or extensions.document[0] != call.root:
        made = document(
            operations,
            extensions.routes,
            root=call.root,
            authenticates=extensions.authenticates or bool(call.service.tokens),
        )
        extensions.document = call.root, msgspec.json.encode(made)
    return extensions.document[1]
