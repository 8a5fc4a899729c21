"""What a browser may be made to send by pages that are not ours.

A page of any site can have its visitor's browser send a `POST` here, without a token but to this machine. It is refused
when it would change something: by `Sec-Fetch-Site`, which browsers set and pages can't, or, from older browsers, by
`Origin`. Who is no browser sends neither, and is let through. The rule is that of Go's `http.CrossOriginProtection`.

A page whose host name is made to mean 127.0.0.1 (DNS rebinding) is of the same origin for its browser. So where only
this machine is served, and no token asked for, a request must be for a name of this machine: `Host` says which.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from ipaddress import ip_address
from typing import Final

from starlette.types import Scope

from .problems import Refusal

__all__ = ["Guard", "is_local"]

_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN: Final = frozenset({b"same-origin", b"none"})


class Guard:
    """Refuses what pages of other sites send. `host`: the name under which only this machine is served; None: any."""

    def __init__(self, origins: Collection[str]) -> None:
        self.host: str | None = None
        self._origins = frozenset(origin.encode() for origin in origins)

    def check(self, scope: Scope) -> None:
        """Look at a request or the start of a WebSocket.

        Raises:
            Refusal: it comes from a page of another site, or is for another host.
        """
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"")
        if host and self.host is not None and not is_local(host, self.host):
            raise Refusal(
                "misdirected",
                "only this machine is served here, under its own name: ask localhost, set http.tokens, "
                "or http.insecure if something else guards it",
            )
        if scope.get("method") in _SAFE:
            return
        origin, site = headers.get(b"origin", b"").lower(), headers.get(b"sec-fetch-site")
        is_same = not origin or origin.partition(b"://")[2] == host.lower()
        if not (is_same if site is None else site in _OWN) and origin not in self._origins:
            raise Refusal(
                "cross-origin", "a page of another site sent this: name its origin in http.origins, if it may"
            )


@lru_cache(maxsize=64)
def is_local(host_header: bytes, own: str) -> bool:
    """Whether a `Host`, with or without a port, is a name of this machine: of its loopback, or its `own` name."""
    host = host_header.decode("latin-1")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    name = name.removeprefix("[").removesuffix("]").lower()
    if name in (own.lower(), "localhost") or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
