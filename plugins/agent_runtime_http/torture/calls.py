"""Every call that changes a session: its request, the status it must be answered with, and what it does to a `State`.

Whatever a call writes holds its number, which no other call of the session has, so that each thing that is read back
tells who wrote it, and how old it is.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import msgspec

from .state import Item, State, Wrong, covers, tag_of

__all__ = [
    "COLLECTION",
    "Append",
    "Batch",
    "Call",
    "Clear",
    "Create",
    "Delete",
    "DiscardDocument",
    "PatchContext",
    "PatchSession",
    "Pop",
    "PutDocument",
    "Switch",
    "ToolResult",
]

COLLECTION: Final = "notes"


class Call(msgspec.Struct, frozen=True):
    """One request on one session. `number` is the call's own, `text` something to fill it with."""

    number: int
    text: str = ""

    method: ClassVar[str] = "POST"
    status: ClassVar[int] = 201

    @property
    def path(self) -> str:
        """Behind that of the session."""
        return "/messages"

    def body(self) -> Item | None:
        """What is sent."""
        return None

    def expected(self, state: State) -> int:
        """The status of the answer."""
        return self.status

    def apply(self, state: State, answer: Any) -> None:
        """Change the state as the call does; `answer` is None if nobody saw it.

        Raises:
            Wrong: it can't be the answer.
        """
        raise NotImplementedError

    def wrote(self) -> list[str]:
        """The tags of the messages that it writes."""
        return []

    @property
    def tag(self) -> str:
        """What the call writes begins with this."""
        return f"#{self.number}"


class Create(Call, frozen=True):
    """The session made, with a title and a system prompt."""

    session_id: str = ""

    @property
    def path(self) -> str:
        return ""

    def body(self) -> Item:
        return {
            "session_id": self.session_id,
            "title": self.tag,
            "metadata": {"n": self.number},
            "system_prompt": self._prompt(),
        }

    def _prompt(self) -> str:
        return f"{self.tag}.0/1 {self.text}"

    def apply(self, state: State, answer: Any) -> None:
        state.end()
        state.alive = True
        state.title, state.metadata = self.tag, {"n": self.number}
        state.append([{"role": "system", "content": self._prompt()}], None)
        if answer is not None:
            state.born = {name: answer[name] for name in ("incarnation", "created_at")}
            if answer["message_count"] != 1 or answer["title"] != self.tag:
                raise Wrong("invented", f"the session was acknowledged with {answer['message_count']} message(s)")

    def wrote(self) -> list[str]:
        return [f"{self.tag}.0/1"]


class Append(Call, frozen=True):
    """One message of a user, or one of an assistant that calls a tool."""

    tool: bool = False

    def body(self) -> Item:
        content = f"{self.tag}.0/1 {self.text}"
        if not self.tool:
            return {"role": "user", "content": content}
        function = {"name": "search", "arguments": '{"q": 1e2}'}
        return {
            "role": "assistant",
            "content": content,
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        }

    def apply(self, state: State, answer: Any) -> None:
        state.append([self.body()], None if answer is None else [answer])

    def wrote(self) -> list[str]:
        return [f"{self.tag}.0/1"]


class ToolResult(Call, frozen=True):
    """The result of a tool."""

    @property
    def path(self) -> str:
        return "/tool-results"

    def body(self) -> Item:
        return {"call_id": "call_1", "tool_name": "search", "result": f"{self.tag}.0/1 {self.text}"}

    def apply(self, state: State, answer: Any) -> None:
        sent = {"role": "tool", "content": self.body()["result"], "name": "search", "tool_call_id": "call_1"}
        state.append([sent], None if answer is None else [answer])

    def wrote(self) -> list[str]:
        return [f"{self.tag}.0/1"]


class Batch(Call, frozen=True):
    """Several messages: all or none."""

    size: int = 2

    @property
    def path(self) -> str:
        return "/messages/batch"

    def body(self) -> Item:
        roles = ("user", "assistant")
        return {
            "messages": [{"role": roles[n % 2], "content": f"{tag} {self.text}"} for n, tag in enumerate(self.wrote())]
        }

    def apply(self, state: State, answer: Any) -> None:
        state.append(self.body()["messages"], None if answer is None else answer["items"])

    def wrote(self) -> list[str]:
        return [f"{self.tag}.{index}/{self.size}" for index in range(self.size)]


class Pop(Call, frozen=True):
    """The last message away; 404 if there is none."""

    status: ClassVar[int] = 200

    @property
    def path(self) -> str:
        return "/messages/pop"

    def expected(self, state: State) -> int:
        return 200 if state.messages else 404

    def apply(self, state: State, answer: Any) -> None:
        if not state.messages:
            return
        message = state.messages.pop()
        state.removed.add(tag_of(message))
        if answer is not None and not covers(message, answer):
            raise Wrong("lost", f"the last message is {tag_of(message)}, {tag_of(answer)} was removed")


class Clear(Call, frozen=True):
    """All messages away."""

    method: ClassVar[str] = "DELETE"
    status: ClassVar[int] = 204

    def apply(self, state: State, answer: Any) -> None:
        state.removed.update(map(tag_of, state.messages))
        state.messages.clear()


class Switch(Call, frozen=True):
    """The session handed over to an agent that never had it."""

    status: ClassVar[int] = 200

    @property
    def path(self) -> str:
        return "/agent"

    def body(self) -> Item:
        return {"agent": f"agent-{self.number}", "reason": f"{self.tag}.0/1 {self.text}"}

    def apply(self, state: State, answer: Any) -> None:
        body = self.body()
        state.switches.append({"from": state.agent, "to": body["agent"], "reason": body["reason"]})
        state.agent = body["agent"]
        if answer is not None and answer["switch_count"] != len(state.switches):
            text = f"the hand-over {self.tag} was acknowledged as number {answer['switch_count']}"
            raise Wrong("lost", f"{text}, it is number {len(state.switches)}")


class PatchSession(Call, frozen=True):
    """Title and metadata changed."""

    method: ClassVar[str] = "PATCH"
    status: ClassVar[int] = 200

    @property
    def path(self) -> str:
        return ""

    def body(self) -> Item:
        return {"title": self.tag, "metadata": {"n": self.number}}

    def apply(self, state: State, answer: Any) -> None:
        state.title, state.metadata = self.tag, {"n": self.number}


class PatchContext(Call, frozen=True):
    """The metadata of the context changed."""

    method: ClassVar[str] = "PATCH"
    status: ClassVar[int] = 200

    @property
    def path(self) -> str:
        return "/context"

    def body(self) -> Item:
        return {"metadata": {"n": self.number}}

    def apply(self, state: State, answer: Any) -> None:
        state.context = {"n": self.number}


class PutDocument(Call, frozen=True):
    """A document written."""

    method: ClassVar[str] = "PUT"
    status: ClassVar[int] = 200
    key: str = ""

    @property
    def path(self) -> str:
        return f"/documents/{COLLECTION}/{self.key}"

    def body(self) -> Item:
        return {"n": self.number, "text": self.text}

    def apply(self, state: State, answer: Any) -> None:
        state.documents[self.key] = self.body()


class DiscardDocument(PutDocument, frozen=True):
    """A document away; 404 if there is none."""

    method: ClassVar[str] = "DELETE"
    status: ClassVar[int] = 204

    def body(self) -> None:  # type: ignore[override]
        return None

    def expected(self, state: State) -> int:
        return 204 if self.key in state.documents else 404

    def apply(self, state: State, answer: Any) -> None:
        state.documents.pop(self.key, None)


class Delete(Call, frozen=True):
    """The session away, with all it has."""

    method: ClassVar[str] = "DELETE"
    status: ClassVar[int] = 204

    @property
    def path(self) -> str:
        return ""

    def apply(self, state: State, answer: Any) -> None:
        state.end()
