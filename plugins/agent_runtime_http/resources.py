"""A path of the API: what each method does there, and all that is the same for every one of them.

What an operation is declared to take is read for it: the query, the idempotency key of a write, the body. What the
runtime refuses is answered with a pointer to the field.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, Final

from starlette.types import Receive, Scope, Send

from agent_runtime import InvalidInput, Runtime, SessionHandle

from .answers import Answer
from .bodies import check_json_type, decode_json, read_body
from .keys import KEY, read_key
from .operations import NOTHING, Operation, Takes, takes_key
from .problems import Fault, Refusal, answer_to, invalid, pointer_to
from .queries import read_query
from .service import Service

__all__ = ["Call", "Resource"]


class Call:
    """One request, as an operation sees it. `path` has the parts of the path; `options` has the parameters of the query
    that are given, and the `idempotency_key` of a write. `body` is what came, if the operation takes a body, and
    `content_type` what that is said to be.
    """

    __slots__ = ("_scope", "_takes", "body", "content_type", "options", "path", "service")

    def __init__(
        self,
        service: Service,
        scope: Scope,
        path: Mapping[str, str],
        options: dict[str, Any],
        takes: Takes,
        body: bytes,
        content_type: bytes | None,
    ) -> None:
        self.service = service
        self.path = path
        self.options = options
        self.body = body
        self.content_type = content_type
        self._scope = scope
        self._takes = takes

    @property
    def runtime(self) -> Runtime:
        """The runtime.

        Raises:
            RuntimeClosed: it is not open.
        """
        return self.service.running()

    def session(self) -> Awaitable[SessionHandle]:
        """The session that the path names."""
        return self.service.running().get_session(self.path["session_id"])

    @property
    def root(self) -> str:
        """What the paths of this application begin with."""
        root: str = self._scope.get("root_path", "")
        return root

    def object(self) -> dict[str, Any]:
        """The body as the JSON object that the operation takes."""
        takes = self._takes
        if not self.body and takes.may_be_empty:
            return {}
        check_json_type(self.content_type, takes.media_types)
        value = decode_json(self.body)
        if type(value) is not dict:
            raise invalid([Fault("", "the body must be a JSON object")])
        return value

    def members(self) -> dict[str, Any]:
        """The body as a JSON object with the members that the operation takes, and no others."""
        value = self.object()
        known, required = self._takes.members, self._takes.required
        unknown = f"is unknown; there are: {', '.join(known)}"
        faults = [Fault(pointer_to(name), unknown) for name in value if name not in known]
        faults += [Fault(pointer_to(name), "is missing") for name in required if name not in value]
        if faults:
            raise invalid(faults)
        return value


class Resource:
    """One path with its operations by method; an ASGI application."""

    def __init__(self, service: Service, operations: Mapping[str, Operation]) -> None:
        self._service = service
        self._operations: Final = dict(operations)
        self._keyed: Final = frozenset(method for method, each in operations.items() if takes_key(method, each))
        if "GET" in operations:
            self._operations["HEAD"] = operations["GET"]
        self._allow = ", ".join(sorted({*self._operations, "OPTIONS"})).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.respond(scope["path_params"], scope, receive, send)

    async def respond(self, path: Mapping[str, str], scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, given the parts of its path."""
        method = scope["method"]
        operation = self._operations.get(method)
        if operation is None:
            answer = self._without_operation(method)
        else:
            parameters, takes = operation.parameters, operation.takes
            headers = dict(scope["headers"])
            options = read_query(scope["query_string"], parameters) if scope["query_string"] else {}
            if KEY in headers and method in self._keyed:
                options["idempotency_key"] = read_key(scope)
            body = b""
            if takes is not NOTHING:
                body = await read_body(headers, receive, self._service.body_bytes_max)
            try:
                answer = await operation.handler(
                    Call(self._service, scope, path, options, takes, body, headers.get(b"content-type"))
                )
            except InvalidInput as error:
                answer = answer_to(error, path=path, query=parameters)
        await answer(scope, receive, send)

    def _without_operation(self, method: str) -> Answer:
        headers = [(b"allow", self._allow)]
        if method == "OPTIONS":
            return Answer(status=204, media_type=b"", headers=headers)
        raise Refusal("method-not-allowed", f"allowed are {self._allow.decode()}", headers=headers)
