"""The documentation that the server gives of itself: the OpenAPI document, and a page that is made from it.

The page, its style and its script ship with the package, and its policy lets a browser load nothing from anywhere else.
It is served to anybody, since it tells nothing: what it shows is in the document, for which a token may be asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Final

import msgspec

from .answers import Answer
from .openapi import document
from .operations import Gives, Operation, Operations, operation
from .resources import Call
from .service import Service

__all__ = ["PAGES", "documented", "openapi"]

_FILES: Final[Mapping[str, tuple[str, str]]] = {
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/docs/page.css": ("page.css", "text/css; charset=utf-8"),
    "/docs/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/docs/icon.svg": ("icon.svg", "image/svg+xml"),
}
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]


def documented(operations: Operations) -> Operations:
    """These operations, and the one that describes them all."""

    @operation(Gives(200, dict))
    async def get_openapi(call: Call) -> Answer:
        """Get this document.

        It has what the plugins of this server bring, too.
        """
        return Answer(openapi(call.service, everything, call.root))

    everything = {**operations, "/openapi.json": {"GET": get_openapi}}
    return everything


def openapi(service: Service, operations: Operations, root: str = "") -> bytes:
    """The document, made once for as long as the runtime is open and the application stays where it is mounted.

    Raises:
        PluginError: a plugin describes a route in a wrong way.
        RuntimeClosed: the runtime is not open.
    """
    service.running()
    extensions = service.extensions
    if extensions.document is None or extensions.document[0] != root:
        authenticates = extensions.authenticates or bool(service.tokens)
        made = document(operations, extensions.routes, root=root, authenticates=authenticates)
        extensions.document = root, msgspec.json.encode(made)
    return extensions.document[1]


def _page(name: str, media_type: str) -> Operation:
    @operation(Gives(200, str, media_types=[media_type]), public=True)
    async def get_page(_call: Call) -> Answer:
        """Get a part of the page."""
        return Answer(_content(name), 200, media_type.encode(), _HEADERS)

    return get_page


@cache
def _content(name: str) -> bytes:
    return (files(__package__) / "pages" / name).read_bytes()


PAGES: Final[Operations] = {path: {"GET": _page(name, media_type)} for path, (name, media_type) in _FILES.items()}
"""What people look at. It is no part of the interface, and so not in the document."""
