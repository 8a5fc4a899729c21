"""The history as a model is given it: always valid, whatever was recorded.

Models refuse a tool call that is not followed at once by its result, and a result without its call. Sessions hold both:
runs are interrupted, results come late, and tool call ids are repeated within a session. So a history is not a list of
messages but of groups, and it is cut between groups only. A group is an assistant message with tool calls and their
results, or any other message alone.

- A result belongs to the nearest preceding call with its id that has no result yet. (Of two such calls in one message,
  to the first.) It is shown in the group of its call, however late it came; results stay in the order of arrival.
- A call without a result gets one that says "interrupted", behind those that came.
- A tool message that belongs to no call is left out, and so is an empty list of tool calls.
- A message that came in late (`Message.late`) stands behind what it did not know of: its calls and results belong to
  late ones only, so that it never answers for another call with the same id.

Because a result looks backwards to the *nearest* call, the groups that begin at or after some message are the same
whether earlier messages are known or not. So a limited history needs a window of the newest messages only, to be
extended backwards page by page until `limited_history` has enough. Everything here is a pure function; messages are
never altered, and the dicts returned share values with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from .records import Message

__all__ = ["INTERRUPTED", "Group", "chat_history", "enough", "groups", "leading_message", "limited_history"]

INTERRUPTED: Final = "interrupted: no result was recorded for this call"


class Group(msgspec.Struct, frozen=True):
    """Messages that are only valid together: `message`, the `results` of its tool calls, and the calls without one.

    Its length is the number of messages that it has in chat format.
    """

    message: Message
    results: list[Message] = []
    unanswered: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return 1 + len(self.results) + len(self.unanswered)

    def to_chat(self) -> list[dict[str, Any]]:
        """The messages in chat format, with an "interrupted" result for each unanswered call, in the order of calls."""
        chat = [
            self.message.to_chat(),
            *(result.to_chat() for result in self.results),
            *map(_interrupted, self.unanswered),
        ]
        for message in chat:
            if message.get("tool_calls") == []:
                del message["tool_calls"]
        return chat


def _interrupted(call: dict[str, Any]) -> dict[str, Any]:
    result = {"role": "tool", "tool_call_id": call["id"]}
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        result["name"] = function["name"]
    result["content"] = INTERRUPTED
    return result


def groups(messages: Iterable[Message]) -> list[Group]:
    """The groups of consecutive messages of a session, in their order.

    Of the messages from some point on, these are exactly the groups of the whole session that begin at that point or
    after it.
    """
    found: list[Group] = []
    # By lateness and id; the one to be answered next stands last.
    open_calls: dict[tuple[bool, str], list[tuple[Group, dict[str, Any]]]] = {}
    for message in messages:
        if message.role == "tool":
            waiting = open_calls.get((message.late, message.tool_call_id or ""))
            if waiting:
                group, call = waiting.pop()
                group.results.append(message)
                group.unanswered.remove(call)
            continue
        calls = message.tool_calls if message.role == "assistant" and message.tool_calls else []
        group = Group(message, [], list(calls))
        found.append(group)
        for call in reversed(calls):
            open_calls.setdefault((message.late, call["id"]), []).append((group, call))
    return found


def enough(groups: Sequence[Group], limit: int) -> bool:
    """Whether the last groups of a session that are known decide which whole groups the last `limit` messages hold."""
    return bool(groups) and sum(map(len, groups)) >= limit


def _last_groups(groups: Sequence[Group], limit: int) -> Sequence[Group]:
    """As many groups from the end as have at most `limit` messages together, but at least one."""
    start = len(groups)
    count = 0
    while start and (count == 0 or count + len(groups[start - 1]) <= limit):
        start -= 1
        count += len(groups[start])
    return groups[start:]


def leading_message(first: Message | None) -> Message | None:
    """The leading message of a session, given its first message: that one, if it instructs the model, else None."""
    return first if first is not None and first.role in {"system", "developer"} else None


def _compose(leading: Message | None, known: Sequence[Group], limit: int | None) -> list[dict[str, Any]]:
    chosen = known if limit is None else _last_groups(known, _room(limit, leading))
    if leading is not None:
        chosen = [Group(leading), *chosen]
    return [message for group in chosen for message in group.to_chat()]


def _room(limit: int, leading: Message | None) -> int:
    """What the leading message leaves of the limit."""
    return limit if leading is None else limit - 1


def limited_history(
    window: Sequence[Message], limit: int | None, *, at_start: bool, leading: Message | None
) -> list[dict[str, Any]] | None:
    """The history in chat format, from the newest messages of a session; None if more of them are needed.

        window = []
        while (history := limited_history(window, limit, at_start=at_start, leading=leading)) is None:
            window = older_page + window

    `window` is every message of the session from some point on. `at_start` says that nothing lies before it; then there
    always is a history. Otherwise `leading` must be the session's leading message (see `leading_message`), or None if
    it is known to have none: a leading message that is not handed in would be missing from the history.

    The history is the leading message and whole groups from the end, together at most `limit` messages (None: all); but
    the leading message and the last group are there whatever the limit. Every window that gives one gives the same.
    """
    if at_start or (leading is not None and window and window[0].seq == leading.seq):
        return chat_history(window, limit)
    if limit is None:
        return None
    known = groups(window)
    return _compose(leading, known, limit) if enough(known, _room(limit, leading)) else None


def chat_history(messages: Iterable[Message], limit: int | None = None) -> list[dict[str, Any]]:
    """The history in chat format, from all messages of a session; `limit` as in `limited_history`."""
    window = list(messages)
    leading = leading_message(window[0]) if window else None
    return _compose(leading, groups(window if leading is None else window[1:]), limit)
