"""What an operation says of itself, once and next to its handler: the router reads it to serve it, the OpenAPI document
to describe it.

    @operation(Gives(201, Message), takes=Takes(NewChatMessage, example={…}), durability=DURABILITY)
    async def append_message(call: Call) -> Answer:
        \"""Append a message.

        What else is to be known of it.
        \"""

The name of the handler is the operation's id, its docstring the description, its module the tag.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec

from .answers import Answer
from .bodies import JSON
from .keys import KEYED
from .queries import Parameter, Parameters

if TYPE_CHECKING:
    from .resources import Call

__all__ = ["NOTHING", "Gives", "Handler", "Operation", "Operations", "Takes", "operation", "takes_key"]

Handler: TypeAlias = "Callable[[Call], Awaitable[Answer]]"


class Takes:
    """A body that an operation takes: a struct, whose fields are the members that there may be; or any value.

    `example` is one that is accepted. With `may_be_empty` no body is as an empty object.
    """

    def __init__(
        self, shape: Any, *, example: Any, media_types: Collection[str] = JSON, may_be_empty: bool = False
    ) -> None:
        is_struct = isinstance(shape, type) and issubclass(shape, msgspec.Struct)
        fields = msgspec.structs.fields(shape) if is_struct else ()
        self.shape: Final = shape
        self.example: Final = example
        self.media_types: Final = media_types
        self.may_be_empty: Final = may_be_empty
        self.members: Final = tuple(field.encode_name for field in fields)
        self.required: Final = tuple(field.encode_name for field in fields if field.required)


NOTHING: Final = Takes(None, example=None, media_types=())
"""No body: what is sent is not looked at."""


class Gives(NamedTuple):
    """An answer: its status, what is in its body (None: nothing), its media types, and the headers it comes with."""

    status: int
    shape: Any = None
    media_types: Collection[str] = JSON
    headers: Collection[str] = ()


class Operation(NamedTuple):
    """What one method of a path does. `refuses` has the types of problems (their slugs) that are its own. `public` says
    that it is answered to anybody, and whatever the runtime does: it tells nothing of any session, nor of the place
    where they are stored.
    """

    handler: Handler
    gives: tuple[Gives, ...]
    takes: Takes
    refuses: tuple[str, ...]
    public: bool
    parameters: Parameters


Operations: TypeAlias = Mapping[str, Mapping[str, Operation]]
"""Operations by path and method."""


def operation(
    *gives: Gives,
    takes: Takes = NOTHING,
    refuses: Collection[str] = (),
    public: bool = False,
    **parameters: Parameter,
) -> Callable[[Handler], Operation]:
    """Mark a handler as an operation that gives these answers, and takes this body and these query parameters."""
    return lambda handler: Operation(handler, gives, takes, tuple(refuses), public, parameters)


def takes_key(method: str, operation: Operation) -> bool:
    """Whether an idempotency key counts: with the writes that would have their effect twice."""
    return method in KEYED and "durability" in operation.parameters
