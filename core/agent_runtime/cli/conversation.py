"""A session as lines that a person reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from ..records import AgentContext, AgentSwitch, Message, Session
from .text import compact, moment, visible, visible_lines

__all__ = ["Line", "head_lines", "message_lines", "switch_lines"]

_STYLES: Final = {"system": "magenta", "developer": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}
_LABEL_CHARS: Final = 14


class Line(NamedTuple):
    """A line of text, safe for any terminal; `style` is one of rich's."""

    text: str
    style: str = ""
    indent: int = 0


def head_lines(record: Session, context: AgentContext) -> Iterator[Line]:
    """What is known of a session."""
    agent = visible(context.current_agent)
    if context.last_switch_at is not None:
        agent += f", since {moment(context.last_switch_at)}"
    facts = {
        "session": visible(record.session_id),
        "user": visible(record.user_id or ""),
        "title": visible(record.title or ""),
        "description": visible(record.description or ""),
        "metadata": compact(record.metadata) if record.metadata else "",
        "created": moment(record.created_at),
        "last activity": moment(record.last_activity),
        "messages": str(record.message_count),
        "agent": agent,
        "agent data": compact(context.metadata) if context.metadata else "",
    }
    for label, text in facts.items():
        if text:
            yield Line(f"{label:<{_LABEL_CHARS}}{text}")


def switch_lines(switches: Iterable[AgentSwitch]) -> Iterator[Line]:
    """How a session went from agent to agent."""
    for number, switch in enumerate(switches, 1):
        reason = f": {visible(switch.reason)}" if switch.reason else ""
        agents = f"{visible(switch.from_agent)} → {visible(switch.to_agent)}"
        yield Line(f"{f'switch {number}':<{_LABEL_CHARS}}{moment(switch.switched_at)}  {agents}{reason}")


def message_lines(message: Message) -> Iterator[Line]:
    """One message: a heading, its content, its tool calls."""
    style = _STYLES[message.role]
    heading = f"#{message.seq} {message.role}"
    if message.name:
        heading += f" {visible(message.name)}"
    if message.tool_call_id:
        heading += f" [{visible(message.tool_call_id)}]"
    yield Line("")
    yield Line(f"{heading}  {moment(message.created_at)}", f"bold {style}")
    for text in _texts(message.content):
        for line in visible_lines(text).split("\n"):
            yield Line(line, indent=2)
    for call in message.tool_calls or ():
        yield Line(f"→ {_call(call)}", style, 2)
    for key, value in (message.extra or {}).items():
        if value:
            yield Line(f"{visible(key)}: {compact(value)}", "dim", 2)


def _texts(content: str | list[Any] | None) -> Iterator[str]:
    if isinstance(content, str):
        yield content
        return
    for part in content or ():
        text = part.get("text")
        yield text if isinstance(text, str) else compact(part)


def _call(call: dict[str, Any]) -> str:
    function = call.get("function")
    if not isinstance(function, dict):
        return compact(call)
    arguments = function.get("arguments")
    shown = visible(arguments) if isinstance(arguments, str) else compact(arguments)
    return f"{visible(str(function.get('name')))}({shown}) [{visible(str(call['id']))}]"
