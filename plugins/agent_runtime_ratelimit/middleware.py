"""The middleware: who asks too often is told when to come back, before anything is read of the request."""

from __future__ import annotations

import math
from ipaddress import IPv6Address, ip_address
from time import monotonic
from typing import Final

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from agent_runtime_http import token_of
from agent_runtime_http.hookspecs import Middleware

from .buckets import Buckets
from .options import Options

__all__ = ["client_of", "limiting"]

_HEALTH: Final = frozenset({"/health", "/livez", "/readyz"})
_NETWORK_BITS: Final = 64


def limiting(options: Options) -> Middleware:
    """Middleware with buckets of its own."""
    buckets = Buckets(rate=options.requests_per_s, burst=options.burst, clients_max=options.clients_max, now=monotonic)

    def around(app: ASGIApp) -> ASGIApp:
        async def limited(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) not in _HEALTH:
                missing_s = buckets.take(client_of(scope))
                if missing_s:
                    raise HTTPException(
                        429,
                        f"more than {options.requests_per_s:g} requests a second: come back in {missing_s:.3g} s",
                        headers={"Retry-After": str(math.ceil(missing_s))},
                    )
            await app(scope, receive, send)

        return limited

    return around


def client_of(scope: Scope) -> str:
    """Who is counted as one: who has a token that is known, else an address, of IPv6 the network of one (its /64).

    A token that is not known counts as none: or whoever makes some up would be many.
    """
    token = token_of(scope)
    if token is not None:
        return token
    host: str = (scope.get("client") or ("",))[0]
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if not isinstance(address, IPv6Address):
        return host
    mapped = address.ipv4_mapped
    return str(mapped) if mapped else f"{int(address) >> _NETWORK_BITS:x}::"
