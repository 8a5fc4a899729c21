"""The handle of a session: what callers hold, an id and its incarnation, never anything that is in memory of it.

A handle costs nothing to keep, survives eviction, and may be used by any number of tasks at once. When its session is
deleted (even if another is created under the id), every call raises SessionNotFound.

All writes take `durability` (the level to wait for, default from the configuration) and `idempotency_key` (the same key
with the same arguments gives the first call's result again, for 24 h; with others IdempotencyConflict). They raise:

- InvalidInput, SessionNotFound, SessionHeld, IdempotencyConflict, Overloaded, StorageUnavailable (the session had to be
  loaded): nothing was changed.
- DurabilityNotReached: the change stands, with the call's result in `outcome`, but is not at the level yet.
- Quarantined: the change stands in memory, the database refuses it; it is kept in quarantine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from time import perf_counter
from typing import Any, Final, Protocol, TypeVar, cast

import msgspec
from msgspec import UNSET, Raw, UnsetType

from .approvals import APPROVALS, Approval, Approvals, ApprovalStatus, Deciding, Decision, check_decision, check_status
from .door import Door, Plan, Request
from .errors import DurabilityNotReached, InvalidInput
from .plans import TITLE_CHARS_MAX, NotInTail, Planner, Stale, only
from .reads import Reads
from .records import (
    AgentContext,
    AgentSwitch,
    Document,
    Durability,
    Message,
    NewMessage,
    Order,
    Page,
    Role,
    Session,
)
from .residents import Resident
from .validation import (
    body_hash,
    check_id,
    check_json,
    check_label,
    check_limit,
    check_message,
    check_name,
    check_seq,
    check_text,
    json_object,
    parse_message,
)

__all__ = ["DESCRIPTION_CHARS_MAX", "PAGE_ITEMS_MAX", "REASON_CHARS_MAX", "Hooks", "SessionHandle", "request_for"]

DESCRIPTION_CHARS_MAX: Final = 20_000
REASON_CHARS_MAX: Final = 20_000
MEDIA_TYPE_CHARS_MAX: Final = 255
EXPIRY_MAX_S: Final = 10 * 366 * 86_400
PAGE_ITEMS_MAX: Final = 1000
T = TypeVar("T")


class Hooks(Protocol):
    """The hooks that see messages before they are appended, and are told once they are."""

    @property
    def appending(self) -> bool:
        """Whether any plugin looks at messages at all."""

    def before_append(self, session_id: str, message: NewMessage) -> NewMessage:
        """The message as the plugins leave it. Raises InvalidInput when one of them refuses it."""

    @property
    def watching(self) -> bool:
        """Whether any plugin is told of appends."""

    def appended(self, session_id: str, messages: int, durability: Durability, duration_s: float) -> None:
        """Messages were appended."""


def request_for(key: str | None, route: str, arguments: object, read_outcome: Callable[[str], T]) -> Request[T] | None:
    """The request of a call, if it has an idempotency key."""
    if key is None:
        return None
    return Request(check_name("idempotency_key", key), route, body_hash(route, arguments), read_outcome)


def check_order(order: str) -> Order:
    """The order of a list."""
    if order in ("asc", "desc"):
        return cast("Order", order)
    raise InvalidInput("order", f"must be 'asc' or 'desc', not {order!r}")


def _json(kind: type[T]) -> Callable[[str], T]:
    return msgspec.json.Decoder(kind).decode


_read_message: Final = _json(Message)
_read_messages: Final = _json(list[Message])
_read_text: Final = _json(Raw)
_read_popped: Final[Callable[[str], Message | None]] = msgspec.json.Decoder(Message | None).decode
_read_session: Final = _json(Session)
_read_context: Final = _json(AgentContext)
_read_bool: Final = _json(bool)
_read_approval: Final = _json(Approval)


def _read_none(_: str) -> None:
    return None


class SessionHandle:
    """One session, as `create_session` and `get_session` give it; `created` tells whether that call made it.

    `first_record` is the record as a call that may create left it, for a repeated call with an idempotency key the
    record as the first one left it; None where a session is only looked up.
    """

    __slots__ = ("_door", "_hooks", "_planner", "_reads", "created", "first_record", "incarnation", "session_id")

    def __init__(
        self,
        session_id: str,
        incarnation: str,
        door: Door,
        planner: Planner,
        reads: Reads,
        hooks: Hooks,
    ) -> None:
        self.session_id = session_id
        self.incarnation = incarnation
        self.created = False
        self.first_record: Session | None = None
        self._door = door
        self._planner = planner
        self._reads = reads
        self._hooks = hooks

    def __repr__(self) -> str:
        return f"<SessionHandle {self.session_id!r}>"

    # The session itself

    async def record(self) -> Session:
        """The session's record."""
        return (await self._door.resident(self.session_id, self.incarnation)).record()

    async def update(
        self,
        *,
        title: str | UnsetType | None = UNSET,
        description: str | UnsetType | None = UNSET,
        metadata: Mapping[str, Any] | UnsetType | None = UNSET,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Session:
        """Replace what is given (None removes it; `metadata` as a whole). Returns the record."""
        if title is not UNSET and title is not None:
            check_text("title", title, TITLE_CHARS_MAX)
        if description is not UNSET and description is not None:
            check_text("description", description, DESCRIPTION_CHARS_MAX)
        text = UNSET if metadata is UNSET else _object_text("metadata", metadata)
        plan = partial(self._planner.update, title=title, description=description, metadata=text)
        arguments = {
            name: value
            for name, value in (("title", title), ("description", description), ("metadata", text))
            if value is not UNSET
        }
        return await self._write(plan, durability, request_for(idempotency_key, "update", arguments, _read_session))

    async def merge(
        self,
        patch: Mapping[str, Any],
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Session:
        """Apply a merge patch (RFC 7396) to title, description and metadata, as one change. Returns the record."""
        for name in patch:
            if name not in ("title", "description", "metadata"):
                raise InvalidInput(str(name), "can't be changed; a patch has title, description and metadata")
        given: dict[str, str | None] = {}
        if "title" in patch:
            given["title"] = None if patch["title"] is None else check_text("title", patch["title"], TITLE_CHARS_MAX)
        if "description" in patch:
            text = patch["description"]
            given["description"] = None if text is None else check_text("description", text, DESCRIPTION_CHARS_MAX)
        metadata: Mapping[str, Any] | UnsetType | None = UNSET
        if "metadata" in patch:
            metadata = patch["metadata"]
            metadata = None if metadata is None else json_object("metadata", metadata)

        def plan(resident: Resident) -> Plan[Session]:
            merged = UNSET if metadata is UNSET else _merged(resident.metadata, metadata)
            return self._planner.update(
                resident, title=given.get("title", UNSET), description=given.get("description", UNSET), metadata=merged
            )

        return await self._write(plan, durability, request_for(idempotency_key, "merge", dict(patch), _read_session))

    async def delete(self, *, durability: Durability | None = None, idempotency_key: str | None = None) -> None:
        """Delete the session and all it has. Its id is free at once."""
        await self._write(self._planner.delete, durability, request_for(idempotency_key, "delete", None, _read_none))

    # Messages

    async def append(
        self,
        role: Role,
        content: str | list[Any] | None = None,
        *,
        name: str | None = None,
        tool_calls: list[dict[str, Any]] | None = None,
        tool_call_id: str | None = None,
        token_count: int | None = None,
        metadata: dict[str, Any] | None = None,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Message:
        """Append one message. No history is loaded, however long it is."""
        new = NewMessage(
            role=role,
            content=content,
            name=name,
            tool_calls=tool_calls,
            tool_call_id=tool_call_id,
            token_count=token_count,
            metadata=metadata,
        )
        return await self._append_one(
            new, "append", self._planner.append_one, _read_message, durability, idempotency_key
        )

    async def append_message(
        self,
        message: NewMessage | Mapping[str, Any],
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Message:
        """Append one message as `append_many` takes them: a dict in chat format keeps the keys that are not ours."""
        new = parse_message("", message)
        return await self._append_one(
            new, "append_message", self._planner.append_one, _read_message, durability, idempotency_key
        )

    async def append_json(
        self,
        message: NewMessage | Mapping[str, Any],
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> bytes:
        """As `append_message`, but the message is returned as it is kept: as JSON text, in UTF-8."""
        new = parse_message("", message)
        try:
            text = await self._append_one(
                new, "append_json", self._planner.append_json, _read_text, durability, idempotency_key
            )
            return bytes(text)
        except DurabilityNotReached as error:
            error.outcome = bytes(error.outcome)
            raise

    async def append_many(
        self,
        messages: Sequence[NewMessage | Mapping[str, Any]],
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> list[Message]:
        """Append messages, all or none, as one change. Dicts are in chat format; keys that are not ours are kept."""
        if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
            raise InvalidInput("messages", f"must be a list of messages, not {type(messages).__name__}")
        if not messages:
            raise InvalidInput("messages", "must hold at least one message")
        new = [parse_message(f"messages[{index}]", each) for index, each in enumerate(messages)]
        request = None
        if idempotency_key is not None:
            _check_messages(new)
            request = request_for(idempotency_key, "append_many", new, _read_messages)
        if self._hooks.appending:
            new = [self._seen(f"messages[{index}]", each) for index, each in enumerate(new)]
        _check_messages(new)
        return await self._append(partial(self._planner.append, new=new), len(new), durability, request)

    async def append_tool_result(
        self,
        call_id: str,
        tool_name: str,
        result: Any,
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Message:
        """Append a tool's result, a string as it is and any other JSON value encoded, as the answer to `call_id`."""
        check_label("call_id", call_id)
        check_label("tool_name", tool_name)
        if not isinstance(result, str):
            check_json("result", result)
            result = msgspec.json.encode(result).decode()
        new = NewMessage(role="tool", content=result, name=tool_name, tool_call_id=call_id)
        return await self._append_one(
            new, "append_tool_result", self._planner.append_one, _read_message, durability, idempotency_key
        )

    def _append_one(
        self,
        new: NewMessage,
        route: str,
        plan: Callable[[Resident, NewMessage], Plan[T]],
        read_outcome: Callable[[str], T],
        durability: Durability | None,
        idempotency_key: str | None,
    ) -> Awaitable[T]:
        request = None
        if idempotency_key is not None:
            check_message("", new)
            request = request_for(idempotency_key, route, [new], read_outcome)
        if self._hooks.appending:
            new = self._seen("", new)
        check_message("", new)
        return self._append(lambda resident: plan(resident, new), 1, durability, request)

    async def _append(
        self,
        plan: Callable[[Resident], Plan[T]],
        count: int,
        durability: Durability | None,
        request: Request[T] | None,
    ) -> T:
        started = perf_counter()
        result = await self._write(plan, durability, request)
        duration_s = perf_counter() - started
        level = durability or self._door.durability
        self._door.appends[level].observe(duration_s)
        if self._hooks.watching:
            self._hooks.appended(self.session_id, count, level, duration_s)
        return result

    def _seen(self, path: str, message: NewMessage) -> NewMessage:
        """The message as the plugins leave it."""
        try:
            return self._hooks.before_append(self.session_id, message)
        except InvalidInput as error:
            raise error.below(path) from None

    async def pop(self, *, durability: Durability | None = None, idempotency_key: str | None = None) -> Message | None:
        """Remove the newest message and return it; None when there is none. Its seq is not used again."""
        request = request_for(idempotency_key, "pop", None, _read_popped)
        while True:
            try:
                return await self._write(self._planner.pop, durability, request)
            except NotInTail:
                await self._reads.warm(await self._door.resident(self.session_id, self.incarnation))

    async def clear(self, *, durability: Durability | None = None, idempotency_key: str | None = None) -> None:
        """Remove all messages. The session stays, and goes on with the next seq."""
        await self._write(self._planner.clear, durability, request_for(idempotency_key, "clear", None, _read_none))

    async def messages(self, *, after: int | None = None, limit: int = 100, order: Order = "asc") -> Page[Message]:
        """A page of at most `limit` (1–1000) messages in order of seq, behind the seq `after`.

        `next` of the page is the `after` of the following one; None at the end.
        """
        if after is not None:
            check_seq("after", after)
        check_limit("limit", limit, PAGE_ITEMS_MAX)
        return await self._reads.messages(
            self.session_id, self.incarnation, after=after, limit=limit, order=check_order(order)
        )

    async def message(self, seq: int) -> Message | None:
        """The message with this seq; None when it is not there (any more)."""
        check_seq("seq", seq)
        return await self._reads.message(self.session_id, self.incarnation, seq)

    async def scan_messages(self, *, after: int | None = None) -> AsyncIterator[Message]:
        """All messages behind the seq `after`, oldest first; those appended meanwhile may come too, or not."""
        while True:
            page = await self.messages(after=after, limit=PAGE_ITEMS_MAX)
            for message in page.items:
                yield message
            if page.next is None:
                return
            after = page.next

    async def history(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The messages in chat format, valid for a model: each tool call is followed by its results.

        With `limit`, at most that many of the newest, in whole tool groups (but at least one), and the leading system
        message. A call without a result gets one that says it was interrupted; what is stored is not altered.
        """
        if limit is not None:
            check_limit("limit", limit, 2**31)
        return await self._reads.history(self.session_id, self.incarnation, limit)

    async def history_json(self, limit: int | None = None) -> bytes:
        """The same as JSON text, in UTF-8. Asked for again before the next message, it costs next to nothing."""
        if limit is not None:
            check_limit("limit", limit, 2**31)
        return await self._reads.history_json(self.session_id, self.incarnation, limit)

    # The agent

    async def context(self) -> AgentContext:
        """Which agent holds the session."""
        return (await self._door.resident(self.session_id, self.incarnation)).agent_context()

    async def switches(self) -> list[AgentSwitch]:
        """All hand-overs, oldest first."""
        return await self._reads.switches(self.session_id, self.incarnation)

    async def switch_agent(
        self,
        agent: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> AgentContext:
        """Hand the session to `agent`, and record it with its `reason`. To the agent that has it: records nothing."""
        check_name("agent", agent)
        if reason is not None:
            check_text("reason", reason, REASON_CHARS_MAX)
        text = None if metadata is None else _object_text("metadata", metadata)
        plan = partial(self._planner.switch_agent, agent=agent, reason=reason, metadata=text)
        request = request_for(idempotency_key, "switch_agent", [agent, reason, text], _read_context)
        return await self._write(plan, durability, request)

    async def update_context(
        self,
        *,
        metadata: Mapping[str, Any],
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> AgentContext:
        """Replace the metadata of the context, as a whole."""
        text = _object_text("metadata", metadata)
        request = request_for(idempotency_key, "update_context", text, _read_context)
        return await self._write(partial(self._planner.update_context, metadata=text), durability, request)

    async def merge_context(
        self,
        patch: Mapping[str, Any],
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> AgentContext:
        """Apply a merge patch (RFC 7396) to the metadata of the context."""
        given = json_object("metadata", patch)

        def plan(resident: Resident) -> Plan[AgentContext]:
            return self._planner.update_context(resident, metadata=_merged(resident.context.metadata, given))

        return await self._write(plan, durability, request_for(idempotency_key, "merge_context", given, _read_context))

    async def change_context(
        self,
        change: Callable[[dict[str, Any]], Mapping[str, Any]],
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> AgentContext:
        """Replace the metadata of the context by what `change` makes of it, as one change: nothing comes in between.

        `change` is a plain function that may not block, gets a copy that it may alter, and may be called more than
        once. What it raises comes out, and nothing is changed. Functions can't be compared: with an idempotency key
        any of them counts as the same.
        """

        def plan(resident: Resident) -> Plan[AgentContext]:
            changed = change(msgspec.json.decode(resident.context.metadata))
            return self._planner.update_context(resident, metadata=_object_text("metadata", changed))

        return await self._write(plan, durability, request_for(idempotency_key, "change_context", None, _read_context))

    # Documents

    async def put_document(
        self,
        collection: str,
        key: str,
        value: Any,
        *,
        media_type: str | None = None,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Document:
        """Write or replace a document: a JSON value, or bytes with their media type."""
        _check_writable(collection)
        check_id("key", key)
        if isinstance(value, (bytes, bytearray, memoryview)):
            value = bytes(value)
            media_type = check_text("media_type", media_type or "application/octet-stream", MEDIA_TYPE_CHARS_MAX)
            text = None
        else:
            if media_type is not None:
                raise InvalidInput("media_type", "goes with bytes only; a JSON value has none")
            check_json("value", value)
            text = msgspec.json.encode(value).decode()
        document = Document(
            collection=collection, key=key, value=value, media_type=media_type, updated_at=self._door.now()
        )

        def read_outcome(outcome: str) -> Document:
            return msgspec.structs.replace(_json(Document)(outcome), value=value)

        arguments = [collection, key, media_type, value if text is None else text]
        request = request_for(idempotency_key, "put_document", arguments, read_outcome)
        return await self._write(partial(self._planner.put_document, document=document, text=text), durability, request)

    async def get_document(self, collection: str, key: str) -> Document | None:
        """A document; None when there is none under the key."""
        check_id("collection", collection)
        check_id("key", key)
        return await self._reads.document(self.session_id, self.incarnation, collection, key)

    async def list_documents(self, collection: str, *, cursor: str | None = None, limit: int = 100) -> Page[Document]:
        """A page of at most `limit` (1–1000) documents of a collection, in order of key, behind the key `cursor`."""
        check_id("collection", collection)
        if cursor is not None:
            check_id("cursor", cursor)
        check_limit("limit", limit, PAGE_ITEMS_MAX)
        return await self._reads.documents(self.session_id, self.incarnation, collection, cursor=cursor, limit=limit)

    async def delete_document(
        self,
        collection: str,
        key: str,
        *,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> bool:
        """Delete a document. Returns whether there was one."""
        _check_writable(collection)
        check_id("key", key)
        request = request_for(idempotency_key, "delete_document", [collection, key], _read_bool)
        there, seen = False, -1  # whether there is one, as of which change; nobody has looked yet

        def plan(resident: Resident) -> Plan[bool]:
            if resident.documents_at != seen:
                raise Stale
            return self._planner.delete_document(resident, collection, key) if there else Plan(None, False)

        while True:
            try:
                return await self._write(plan, durability, request)
            except Stale:
                row, seen = await self._reads.document_row(self.session_id, self.incarnation, collection, key)
                there = row is not None

    # Approvals

    async def request_approval(
        self,
        call_id: str,
        tool_name: str,
        arguments: Any,
        *,
        reason: str | None = None,
        expires_in_s: float | None = None,
        durability: Durability | None = "stored",
        idempotency_key: str | None = None,
    ) -> Approval:
        """Ask a person about a tool call; by default returns once that is stored, which is when it is shown.

        `arguments` is any JSON value. After `expires_in_s` (seconds; None: never) nobody can decide any more.
        """
        check_label("call_id", call_id)
        check_label("tool_name", tool_name)
        check_json("arguments", arguments)
        if reason is not None:
            check_text("reason", reason, REASON_CHARS_MAX)
        now = self._door.now()
        approval = Approval(
            approval_id=self._planner.identifier(),
            call_id=call_id,
            tool_name=tool_name,
            arguments=arguments,
            reason=reason,
            created_at=now,
            expires_at=None if expires_in_s is None else now + _life(expires_in_s),
        )
        body = [call_id, tool_name, arguments, reason, expires_in_s]
        request = request_for(idempotency_key, "request_approval", body, _read_approval)
        return await self._write(partial(self._approvals.put, approval=approval), durability, request)

    async def approvals(self, *, status: ApprovalStatus | None = "pending") -> list[Approval]:
        """The approvals of a status (None: all), oldest first."""
        if status is not None:
            check_status(status)
        return [each for each in await self._approvals.all() if status in (None, each.status)]

    async def approval(self, approval_id: str) -> Approval:
        """One approval, as it stands now.

        Raises:
            ApprovalNotFound: the session has none with this id.
        """
        return await self._approvals.one(check_id("approval_id", approval_id))

    async def decide_approval(
        self,
        approval_id: str,
        decision: Decision,
        *,
        arguments: Any = None,
        reason: str | None = None,
        durability: Durability | None = None,
        idempotency_key: str | None = None,
    ) -> Approval:
        """Decide: `approve` the call as it is, approve an `edit` with other `arguments`, or `reject` it.

        Raises:
            ApprovalNotFound: the session has none with this id.
            ApprovalDecided: it is decided already, or has expired; nothing was changed.
        """
        check_id("approval_id", approval_id)
        check_decision(decision)
        if (arguments is not None) != (decision == "edit"):
            raise InvalidInput("arguments", "go with the decision 'edit', and only with it")
        check_json("arguments", arguments)
        if reason is not None:
            check_text("reason", reason, REASON_CHARS_MAX)
        body = [approval_id, decision, arguments, reason]
        request = request_for(idempotency_key, "decide_approval", body, _read_approval)
        deciding = Deciding(self._approvals, approval_id, decision, arguments, reason)
        while True:
            try:
                return await self._write(lambda it: deciding.plan(it, self._door.now()), durability, request)
            except Stale:
                await deciding.read()

    @property
    def _approvals(self) -> Approvals:
        return Approvals(self.session_id, self.incarnation, self._door, self._planner, self._reads)

    def _write(
        self, plan: Callable[[Resident], Plan[T]], durability: Durability | None, request: Request[T] | None
    ) -> Awaitable[T]:
        session_id, incarnation = self.session_id, self.incarnation
        return self._door.write(
            session_id,
            incarnation,
            lambda current: plan(only(current, session_id, incarnation)),
            durability=durability,
            request=request,
        )


def _check_messages(new: Sequence[NewMessage]) -> None:
    for index, each in enumerate(new):
        check_message(f"messages[{index}]", each)


def _check_writable(collection: str) -> None:
    """A collection that documents can be put into."""
    if check_id("collection", collection) == APPROVALS:
        raise InvalidInput("collection", "holds approvals: they are requested and decided, not put")


def _life(expires_in_s: float) -> timedelta:
    """How long an approval can be decided."""
    if type(expires_in_s) not in (int, float) or not 0 < expires_in_s <= EXPIRY_MAX_S:
        raise InvalidInput("expires_in_s", f"must be a number of seconds above 0, at most {EXPIRY_MAX_S}")
    return timedelta(seconds=expires_in_s)


def _object_text(path: str, value: object) -> str:
    """A JSON object as text."""
    return msgspec.json.encode(json_object(path, value)).decode()


def _merged(text: str, patch: Mapping[str, Any] | None) -> str:
    """JSON text of the object in `text` with a merge patch applied; None removes all of it."""
    return "{}" if patch is None else msgspec.json.encode(_merge(msgspec.json.decode(text), patch)).decode()


def _merge(target: Any, patch: Any) -> Any:
    """RFC 7396, section 2. Input is at most as deep as the door lets in."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merge(merged.get(name), value)
    return merged
