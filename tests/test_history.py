"""Histories are valid for a model whatever was recorded, and a window of the newest messages is enough to make one."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_runtime.history import INTERRUPTED, chat_history, enough, groups, leading_message, limited_history
from agent_runtime.records import Message
from agent_runtime.validation import check_message, parse_message

SAMPLE = Path(__file__).parent / "data" / "airline-sample.jsonl.gz"
NOW = datetime(2025, 1, 1, tzinfo=UTC)
Chat = list[dict[str, Any]]


def recorded(chat: Chat) -> list[Message]:
    """The messages as a session holds them, after the door."""
    messages = []
    for index, value in enumerate(chat):
        new = parse_message(f"messages[{index}]", value)
        check_message(f"messages[{index}]", new)
        fields = msgspec.structs.asdict(new) | {"seq": index + 1, "id": f"m{index}", "created_at": NOW}
        messages.append(Message(**fields))
    return messages


def call(call_id: str, name: str | None = None) -> dict[str, Any]:
    return {"id": call_id, "type": "function"} | ({"function": {"name": name, "arguments": "{}"}} if name else {})


def calls(*call_ids: str) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [call(call_id, f"f_{call_id}") for call_id in call_ids]}


def result(call_id: str, content: str = "done") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def interrupted(call_id: str, name: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": INTERRUPTED} | ({"name": name} if name else {})


def text(role: str, content: str = "text") -> dict[str, Any]:
    return {"role": role, "content": content}


# --- any session at all: few ids, so that they repeat; results early, late, twice and never ---------------------------

call_ids = st.sampled_from("abc")
any_calls = st.lists(st.builds(call, call_ids, st.sampled_from([None, "f", "g"])), max_size=4)
any_message = st.one_of(
    st.builds(text, st.sampled_from(["system", "developer", "user", "assistant"])),
    st.builds(lambda found: {"role": "assistant", "content": None, "tool_calls": found}, any_calls),
    st.builds(result, call_ids),
    st.just({"role": "tool", "content": "for no call"}),
)


@st.composite
def sessions(draw: st.DrawFn) -> list[Message]:
    """Any messages, told apart by their content, with gaps in their seqs as removed messages leave them."""
    messages = recorded(draw(st.lists(any_message, max_size=24)))
    gaps = draw(st.lists(st.integers(1, 3), min_size=len(messages), max_size=len(messages)))
    return [
        msgspec.structs.replace(message, seq=sum(gaps[: index + 1]), content=f"text {index}")
        for index, message in enumerate(messages)
    ]


limits = st.integers(1, 30)


# --- oracles, written from the rules and not from the code ------------------------------------------------------------


def assert_valid(chat: Chat) -> None:
    """Every assistant's tool calls are followed at once by exactly their results, and no result stands elsewhere."""
    waiting: Counter[str] = Counter()
    for message in chat:
        if message["role"] == "tool":
            assert waiting[message["tool_call_id"]] > 0
            waiting[message["tool_call_id"]] -= 1
        else:
            assert waiting.total() == 0
            waiting = Counter()
            if message["role"] == "assistant":
                waiting.update(one["id"] for one in message.get("tool_calls", []))
        assert message.get("tool_calls") != []
    assert waiting.total() == 0


def expected_groups(messages: Sequence[Message]) -> list[Chat]:
    """The rules, the slow way: for each result look backwards, call by call."""
    result_of: dict[tuple[int, int], int] = {}

    def find(position: int) -> tuple[int, int] | None:
        for index in range(position - 1, -1, -1):
            if messages[index].role == "assistant":
                for number, one in enumerate(messages[index].tool_calls or []):
                    if one["id"] == messages[position].tool_call_id and (index, number) not in result_of:
                        return index, number
        return None

    for position, message in enumerate(messages):
        if message.role == "tool":
            place = find(position)
            if place is not None:
                result_of[place] = position
    found = []
    for index, message in enumerate(messages):
        if message.role == "tool":
            continue
        chat = message.to_chat()
        if not message.tool_calls:
            chat.pop("tool_calls", None)
        group = [chat]
        if message.role == "assistant":
            places = [(index, number) for number in range(len(message.tool_calls or []))]
            group += [
                messages[at].to_chat() for at in sorted(result_of[place] for place in places if place in result_of)
            ]
            for place, one in zip(places, message.tool_calls or [], strict=True):
                if place not in result_of:
                    group.append(interrupted(one["id"], one.get("function", {}).get("name")))
        found.append(group)
    return found


def expected_history(messages: Sequence[Message], limit: int | None) -> Chat:
    """The longest run of whole groups from the end that fits, of all such runs."""
    found = expected_groups(messages)
    leading: Chat = []
    if messages and messages[0].role in ("system", "developer"):
        leading = found.pop(0)
    runs = [[message for group in found[start:] for message in group] for start in range(len(found))] or [[]]
    fitting = [run for run in runs if limit is None or len(leading) + len(run) <= limit]
    return leading + (fitting[0] if fitting else runs[-1])


# --- validity ---------------------------------------------------------------------------------------------------------


@given(sessions(), st.one_of(st.none(), limits))
def test_a_history_is_what_the_rules_say_and_valid(messages: list[Message], limit: int | None) -> None:
    history = chat_history(messages, limit)
    assert_valid(history)
    assert history == expected_history(messages, limit)


@given(sessions(), st.one_of(st.none(), limits))
def test_a_valid_history_is_left_as_it_is(messages: list[Message], limit: int | None) -> None:
    history = chat_history(messages, limit)
    assert chat_history(recorded(history)) == history


@given(sessions(), limits)
def test_messages_are_not_altered(messages: list[Message], limit: int) -> None:
    before = msgspec.json.encode(messages)
    chat_history(messages)
    chat_history(messages, limit)
    assert msgspec.json.encode(messages) == before


@pytest.mark.parametrize(
    ("session", "expected"),
    [
        pytest.param([], [], id="empty"),
        pytest.param([calls("a"), result("a")], [calls("a"), result("a")], id="valid"),
        pytest.param([calls("a")], [calls("a"), interrupted("a", "f_a")], id="trailing call"),
        pytest.param(
            [calls("a"), text("user"), result("a")],
            [calls("a"), result("a"), text("user")],
            id="late result",
        ),
        pytest.param(
            [calls("a", "b", "c"), result("c"), text("user"), result("a")],
            [calls("a", "b", "c"), result("c"), result("a"), interrupted("b", "f_b"), text("user")],
            id="results in the order of arrival, then the interrupted",
        ),
        pytest.param(
            [calls("a"), calls("a"), result("a", "1")],
            [calls("a"), interrupted("a", "f_a"), calls("a"), result("a", "1")],
            id="nearest of two calls",
        ),
        pytest.param(
            [calls("a"), result("a", "1"), calls("a"), result("a", "2"), result("a", "3")],
            [calls("a"), result("a", "1"), calls("a"), result("a", "2")],
            id="repeated id, and a result too many",
        ),
        pytest.param(
            [{"role": "assistant", "content": None, "tool_calls": [call("a", "f"), call("a", "g")]}, result("a")],
            [
                {"role": "assistant", "content": None, "tool_calls": [call("a", "f"), call("a", "g")]},
                result("a"),
                interrupted("a", "g"),
            ],
            id="one id twice in a message",
        ),
        pytest.param(
            [text("user"), result("a"), calls("a")], [text("user"), calls("a"), interrupted("a", "f_a")], id="early"
        ),
        pytest.param(
            [{"role": "assistant", "content": "hi", "tool_calls": []}],
            [text("assistant", "hi")],
            id="no calls in the list",
        ),
        pytest.param(
            [{"role": "user", "content": "hi", "tool_calls": [call("a")]}, result("a")],
            [{"role": "user", "content": "hi", "tool_calls": [call("a")]}],
            id="only assistants call",
        ),
        pytest.param(
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": "odd"}]}],
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": "odd"}]}, interrupted("a")],
            id="a call of another form",
        ),
    ],
)
def test_each_rule(session: Chat, expected: Chat) -> None:
    assert chat_history(recorded(session)) == expected


def test_provider_keys_are_given_back_also_in_groups() -> None:
    chat = [calls("a") | {"refusal": None, "annotations": [1]}, result("a") | {"name": "f", "is_error": True}]
    assert chat_history(recorded(chat)) == chat


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (1, [0, 5]),
        (2, [0, 5]),
        (3, [0, 5]),
        (4, [0, 5]),
        (5, [0, 2, 3, 4, 5]),
        (6, [0, 1, 2, 3, 4, 5]),
        (9, [0, 1, 2, 3, 4, 5]),
    ],
)
@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_limit_keeps_whole_groups_and_the_leading_message(role: str, limit: int, kept: list[int]) -> None:
    chat = [text(role), text("user"), calls("a", "b"), result("a"), result("b"), text("assistant")]
    assert chat_history(recorded(chat), limit) == [chat[index] for index in kept]


def test_the_last_group_is_kept_whole_even_past_the_limit() -> None:
    chat = [text("user"), calls("a", "b"), result("a"), result("b")]
    assert chat_history(recorded(chat), 1) == chat[1:]


def test_only_the_first_message_of_a_session_leads() -> None:
    chat = [text("user", "first"), text("system"), text("user", "last")]
    assert chat_history(recorded(chat), 1) == chat[2:]
    assert chat_history(recorded([text("system")]), 1) == [text("system")]


# --- windows ----------------------------------------------------------------------------------------------------------


@given(sessions())
def test_groups_of_a_window_are_the_last_groups_of_the_session(messages: list[Message]) -> None:
    whole = groups(messages)
    for start, first in enumerate(messages):
        assert groups(messages[start:]) == [group for group in whole if group.message.seq >= first.seq]


@given(sessions(), limits, st.booleans())
def test_every_window_gives_the_same_history_or_none(messages: list[Message], limit: int, start_known: bool) -> None:
    leading = leading_message(messages[0] if messages else None)
    for start in range(len(messages) + 1):
        at_start = start == 0 and (start_known or leading is None)
        history = limited_history(messages[start:], limit, at_start=at_start, leading=leading)
        assert history in (None, chat_history(messages, limit))
        assert history is not None or start > 0


@given(sessions(), limits)
def test_no_more_is_asked_for_than_is_needed(window: list[Message], limit: int) -> None:
    """Where a window is not enough, one message more before it would have been shown."""
    earlier = Message(seq=0, id="earlier", role="user", content="earlier", created_at=NOW)
    needs_more = limited_history(window, limit, at_start=False, leading=None) is None
    assert needs_more == (earlier.to_chat() in chat_history([earlier, *window], limit))
    assert needs_more == (not enough(groups(window), limit))


@given(sessions(), st.one_of(st.none(), limits), st.integers(1, 6))
def test_reading_backwards_page_by_page(messages: list[Message], limit: int | None, page_size: int) -> None:
    leading = leading_message(messages[0] if messages else None)
    start = len(messages)
    window: list[Message] = []
    at_start = False
    while (history := limited_history(window, limit, at_start=at_start, leading=leading)) is None:
        page = messages[max(0, start - page_size) : start]
        start -= len(page)
        at_start = len(page) < page_size
        window = page + window
    assert history == chat_history(messages, limit)


def test_a_message_that_leads_nothing() -> None:
    roles: list[Literal["user", "assistant", "tool"]] = ["user", "assistant", "tool"]
    for role in roles:
        assert leading_message(Message(seq=1, id="m", role=role, content="text", created_at=NOW)) is None
    assert leading_message(None) is None


# --- real conversations -----------------------------------------------------------------------------------------------


def sample() -> list[Chat]:
    return [json.loads(line)["messages"] for line in gzip.decompress(SAMPLE.read_bytes()).splitlines()]


def test_real_conversations_come_back_as_they_were() -> None:
    conversations = sample()
    repeating = 0
    for chat in conversations:
        ids = Counter(one["id"] for message in chat for one in message.get("tool_calls") or [])
        repeating += any(count > 1 for count in ids.values())
        assert chat_history(recorded(chat)) == chat
    assert len(conversations) == 30
    assert repeating == 15


def test_real_conversations_cut_anywhere_and_limited_are_valid() -> None:
    for chat in sample():
        messages = recorded(chat)
        for cut in range(1, len(messages), 3):
            assert_valid(chat_history(messages[cut:]))
            assert_valid(chat_history(messages[:cut], limit=cut // 2 + 1))
