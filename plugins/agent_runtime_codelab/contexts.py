"""What the old managers hand out: sessions and agent contexts under their old names.

Nothing here is a copy that could be changed and forgotten. An `AgentContext` looks at the runtime whenever it is looked
at; what is changed in its metadata is saved before the statement ends, and what can't be saved (a list or dict within
it, the history) refuses to be changed with a TypeError that says how to.

All of it is synchronous, as it was. A task may use it too: each look holds up its event loop for as long as the
runtime, on its own thread, takes to answer, mostly some 0.1 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from enum import Enum
from typing import Any, Final, NoReturn, TypeVar

from typing_extensions import deprecated

from agent_runtime import AgentContext as NewAgentContext
from agent_runtime import BlockingRuntime, Runtime, Session, SessionHandle

from .routes import history_of

__all__ = ["AgentContext", "Metadata", "SessionState", "agent_name", "messages_of"]

T = TypeVar("T")


def agent_name(agent: str | Enum) -> str:
    """The name of an agent; the old service also had them as members of an enumeration."""
    return str(agent.value) if isinstance(agent, Enum) else agent


async def messages_of(session: SessionHandle) -> list[dict[str, Any]]:
    """All messages in chat format, as they are stored."""
    return [message.to_chat() async for message in session.scan_messages()]


@deprecated("use session.record() and session.messages()", category=None)
class SessionState:
    """A session as the old managers gave it: its record at that moment, and its messages."""

    def __init__(self, runtime: BlockingRuntime, record: Session) -> None:
        self._runtime = runtime
        self.session_id: Final = record.session_id
        self.title: Final = record.title
        self.description: Final = record.description
        self.message_count: Final = record.message_count
        self.created_at: Final = record.created_at
        self.last_activity: Final = record.last_activity

    def __repr__(self) -> str:
        return f"<SessionState {self.session_id!r}>"

    @property
    @deprecated("use session.messages()", category=None)
    def messages(self) -> tuple[dict[str, Any], ...]:
        """The messages in chat format, as they are now. A tuple: the manager's `append_message` appends."""

        async def asked(runtime: Runtime) -> list[dict[str, Any]]:
            return await messages_of(await runtime.get_session(self.session_id))

        return tuple(self._runtime.call(asked))


@deprecated("use session.context(), session.switch_agent() and session.merge_context()", category=None)
class AgentContext:
    """Which agent holds a session: what is read is as it is at that moment, what is changed is kept.

    Raises SessionNotFound once the session is deleted.
    """

    def __init__(self, runtime: BlockingRuntime, session: SessionHandle) -> None:
        self._runtime = runtime
        self._session = session

    def __repr__(self) -> str:
        return f"<AgentContext {self.session_id!r}>"

    @property
    def session_id(self) -> str:
        """The id of the session."""
        return self._session.session_id

    @property
    @deprecated("use session.context().current_agent", category=None)
    def current_agent(self) -> str:
        """The agent that holds the session."""
        return self._now().current_agent

    @property
    @deprecated("use session.switches()", category=None)
    def agent_history(self) -> list[dict[str, Any]]:
        """The hand-overs, oldest first: `{from, to, reason, timestamp}`. It can't be changed: see `switch_agent`."""
        history: list[dict[str, Any]] = _frozen(self.get_agent_history())
        return history

    @property
    @deprecated("use session.context().metadata", category=None)
    def metadata(self) -> Metadata:
        """The metadata. A key that is set in it, or taken out, is saved at once."""
        return Metadata(self._now().metadata, self._change)

    @property
    @deprecated("use session.context().created_at", category=None)
    def created_at(self) -> datetime:
        """When the session was created."""
        return self._now().created_at

    @property
    @deprecated("use session.context().last_switch_at", category=None)
    def last_switch_at(self) -> datetime | None:
        """When it was last handed over."""
        return self._now().last_switch_at

    @property
    @deprecated("use session.context().switch_count", category=None)
    def switch_count(self) -> int:
        """How often it was handed over."""
        return self._now().switch_count

    @deprecated("use session.switch_agent(new, reason=reason)", category=None)
    def switch_agent(self, new_agent: str | Enum, reason: str) -> None:
        """Hand the session over, and record it. To the agent that has it: records nothing."""
        self._runtime.call(lambda _: self._session.switch_agent(agent_name(new_agent), reason=reason))

    @deprecated("use session.switches()", category=None)
    def get_agent_history(self) -> list[dict[str, Any]]:
        """The hand-overs as a list of one's own."""
        return history_of(self._runtime.call(lambda _: self._session.switches()))

    @deprecated("use session.merge_context({key: value})", category=None)
    def add_metadata(self, key: str, value: Any) -> None:
        """Set a key of the metadata; what it had before is replaced."""
        self.metadata[key] = value

    @deprecated("use session.context().metadata.get(key)", category=None)
    def get_metadata(self, key: str, default: Any = None) -> Any:
        """What a key of the metadata has. A list or dict can't be changed in place: see `add_metadata`."""
        return self.metadata.get(key, default)

    def _now(self) -> NewAgentContext:
        return self._runtime.call(lambda _: self._session.context())

    def _change(self, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Mapping[str, Any]:
        return self._runtime.call(lambda _: self._session.change_context(change)).metadata


# --- values -----------------------------------------------------------------------------------------------------------


class _Frozen:
    def _refuse(self, *_args: object, **_options: object) -> NoReturn:
        raise TypeError("this is a copy, and a change of it would be lost: call context.add_metadata(key, value)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = _refuse

    def __copy__(self) -> Any:
        return _thawed(self)

    def __deepcopy__(self, _memo: object) -> Any:
        return _thawed(self)

    def __reduce__(self) -> Any:
        return _thawed, (_thawed(self),)

    copy = __copy__


class _FrozenDict(_Frozen, dict[str, Any]):
    popitem = setdefault = update = _Frozen._refuse


class _FrozenList(_Frozen, list[Any]):
    __iadd__ = __imul__ = append = extend = insert = remove = reverse = sort = _Frozen._refuse


def _frozen(value: Any) -> Any:
    """JSON that can't be changed, and is equal to what it was made of."""
    if isinstance(value, dict):
        return _FrozenDict({key: _frozen(item) for key, item in value.items()})
    if isinstance(value, list):
        return _FrozenList(_frozen(item) for item in value)
    return value


def _thawed(value: Any) -> Any:
    """The same as plain dicts and lists, for who wants to alter it and hand it in again."""
    if isinstance(value, dict):
        return {key: _thawed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_thawed(item) for item in value]
    return value


class Metadata(dict[str, Any]):
    """The metadata of a context. Every change of it is saved as one change of the context; nobody else's is lost.

    It is what the metadata was when it was asked for, and after each change what it has become.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        save: Callable[[Callable[[dict[str, Any]], Mapping[str, Any]]], Mapping[str, Any]],
    ) -> None:
        super().__init__(_frozen(metadata))
        self._save = save

    def __setitem__(self, key: str, value: Any) -> None:
        self._changed(lambda metadata: metadata.__setitem__(key, value))

    def __delitem__(self, key: str) -> None:
        self._changed(lambda metadata: metadata.__delitem__(key))

    def __ior__(self, other: Any) -> Metadata:  # type: ignore[override,misc]  # as a dict's, which has two
        self.update(other)
        return self

    def clear(self) -> None:
        self._changed(lambda metadata: metadata.clear())

    def pop(self, key: str, *default: Any) -> Any:
        return self._changed(lambda metadata: metadata.pop(key, *default))

    def popitem(self) -> tuple[str, Any]:
        """Take out the last key."""
        return self._changed(lambda metadata: metadata.popitem())

    def setdefault(self, key: str, default: Any = None) -> Any:
        """What a key has; `default`, which it is set to, if it was not there."""
        return _frozen(self._changed(lambda metadata: metadata.setdefault(key, default)))

    def update(self, *others: Any, **values: Any) -> None:
        given = dict(*others, **values)
        self._changed(lambda metadata: metadata.update(given))

    def copy(self) -> dict[str, Any]:
        """Plain dicts and lists, to be altered at will: nothing of it is saved."""
        copied: dict[str, Any] = _thawed(self)
        return copied

    __copy__ = copy

    def __deepcopy__(self, _memo: object) -> dict[str, Any]:
        return self.copy()

    def __reduce__(self) -> Any:
        return dict, (self.copy(),)

    def _changed(self, change: Callable[[dict[str, Any]], T]) -> T:
        results: list[T] = []

        def changed(metadata: dict[str, Any]) -> dict[str, Any]:
            results.append(change(metadata))
            return metadata

        saved = self._save(changed)
        super().clear()
        super().update(_frozen(saved))
        return results[-1]
