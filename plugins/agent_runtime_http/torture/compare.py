"""What a session is like, read through HTTP, and in what it differs from what it must be like.

| finding | what was found |
|---|---|
| lost | an acknowledged change is not there (an acknowledged removal counts as well: what it removed is there again) |
| doubled | a change is there twice |
| out of order | changes are there in another order than they were made in |
| torn | a part of a change is there |
| invented | something that no request can have brought about |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from .calls import COLLECTION
from .state import Item, State, covers, tag_of
from .wire import Reply, Wire

__all__ = ["KINDS", "Difference", "Miscounted", "Surprise", "differences", "read"]

KINDS: Final = ("lost", "doubled", "out of order", "torn", "invented")
_PAGE: Final = 1000
_SHOWN: Final = 3
_numbered: Final = re.compile(r"(?:#|agent-)(\d+)").fullmatch


class Difference(NamedTuple):
    """One way in which a session differs; `changes` of it do."""

    kind: str
    text: str
    changes: int = 1


class Surprise(Exception):
    """The server gave an answer that it never should give."""

    def __init__(self, method: str, path: str, reply: Reply) -> None:
        what = f" ({reply.slug})" if reply.slug else ""
        super().__init__(f"{method} {path} was answered with {reply.status}{what}")


class Miscounted(Exception):
    """A session does not have what it says it has."""

    def __init__(self, text: str, state: State) -> None:
        super().__init__(text)
        self.state = state


async def read(wire: Wire, path: str) -> State:
    """A session as the server shows it.

    Raises:
        Unanswered: the server has gone.
        Surprise: it does not show it.
        Miscounted: what it shows does not fit together.
    """

    async def get(below: str, missing: int = 200) -> Any:
        reply = await wire.ask("GET", path + below)
        if reply.status not in (200, missing):
            raise Surprise("GET", path + below, reply)
        return reply.value if reply.status == 200 else None

    record = await get("", 404)
    if record is None:
        return State()
    messages: list[Item] = []
    after: int | None = 0
    while after is not None:
        page = await get(f"/messages?limit={_PAGE}&after={after}")
        messages += page["items"]
        after = page["next"]
    context = await get("/context")
    documents = (await get(f"/documents/{COLLECTION}?limit={_PAGE}"))["items"]
    state = State(
        alive=True,
        born={name: record[name] for name in ("incarnation", "created_at")},
        title=record["title"],
        metadata=record["metadata"],
        agent=context["current_agent"],
        context=context["metadata"],
        switches=context["agent_history"],
        messages=messages,
        next_seq=messages[-1]["seq"] + 1 if messages else 0,
        documents={document["key"]: document["value"] for document in documents},
    )
    if (record["message_count"], context["switch_count"]) != (len(messages), len(state.switches)):
        counted = f"{record['message_count']} message(s) and {context['switch_count']} hand-over(s) are counted"
        raise Miscounted(f"{counted}, {len(messages)} and {len(state.switches)} are there", state)
    return state


def differences(expected: State, found: State) -> list[Difference]:
    """In what a session differs from what is expected; nothing if it is as it must be."""
    if not expected.alive and not found.alive:
        return []
    if not found.alive:
        return [Difference("lost", f"it is not there, with its {len(expected.messages)} message(s)")]
    if not expected.alive:
        return [
            Difference("lost", f"it is there, with {len(found.messages)} message(s): it was deleted, or never made")
        ]
    if not covers(expected.born, found.born) or found.born["incarnation"] in expected.former:
        return [Difference("lost", "it is an earlier one of this name, which was deleted")]
    return [
        *_differing_items("message", expected.messages, found.messages, expected.removed),
        *_differing_items("hand-over", expected.switches, found.switches, set()),
        *_differing_values("the title", expected.title, found.title),
        *_differing_values("the metadata", expected.metadata, found.metadata),
        *_differing_values("the agent", expected.agent, found.agent),
        *_differing_values("the context's metadata", expected.context, found.context),
        *_differing_documents(expected.documents, found.documents),
    ]


def _differing_items(
    what: str, expected: Sequence[Item], found: Sequence[Item], removed: set[str]
) -> Iterator[Difference]:
    if len(expected) == len(found) and all(map(covers, expected, found)):
        return
    must = {tag_of(item): item for item in expected}
    there = Counter(map(tag_of, found))
    missing = [tag for tag in must if tag not in there]
    partly = {_call(tag) for tag in must if tag in there} & {_call(tag) for tag in missing}
    doubled = [tag for tag, count in there.items() if count > 1]
    extra = [tag for tag in there if tag not in must]
    yield from _told("torn", f"{what}(s) of a change that is there in part are not there", missing, partly)
    yield from _told("lost", f"{what}(s) are not there", missing, {_call(tag) for tag in missing} - partly)
    yield from _told("doubled", f"{what}(s) are there more than once", doubled)
    yield from _told("lost", f"{what}(s) are there that were removed", [tag for tag in extra if tag in removed])
    yield from _told(
        "invented", f"{what}(s) are there that nobody can have written", [tag for tag in extra if tag not in removed]
    )
    order = [tag_of(item) for item in found if tag_of(item) in must]
    if list(dict.fromkeys(order)) != [tag for tag in must if tag in there]:
        yield Difference("out of order", f"the {what}s are not in the order they were acknowledged in")
        return
    moved: list[str] = []
    changed: list[str] = []
    for item in found:
        wanted = must.get(tag_of(item), {})
        if not covers(wanted, item) and there[tag_of(item)] == 1:
            same_but_for_seq = covers({**wanted, "seq": None}, {**item, "seq": None})
            (moved if same_but_for_seq else changed).append(tag_of(item))
    yield from _told("out of order", f"{what}(s) have another seq than was acknowledged", moved)
    yield from _told("invented", f"{what}(s) are not as they were acknowledged", changed)


def _call(tag: str) -> str:
    """The call that wrote what has this tag."""
    return tag.partition(".")[0]


def _told(kind: str, text: str, tags: Sequence[str], calls: Iterable[str] | None = None) -> Iterator[Difference]:
    """One difference for all these items, counted in changes."""
    concerned = {_call(tag) for tag in tags} if calls is None else set(calls)
    told = [tag for tag in tags if _call(tag) in concerned]
    if told:
        more = ", …" if len(told) > _SHOWN else ""
        yield Difference(kind, f"{len(told)} {text}: {', '.join(told[:_SHOWN])}{more}", len(concerned))


def _differing_values(what: str, expected: Any, found: Any) -> Iterator[Difference]:
    if expected != found:
        mine, theirs = _age(expected), _age(found)
        kind = "lost" if theirs < mine else "invented"
        yield Difference(kind, f"{what} is that of call {theirs}, not of call {mine}")


def _differing_documents(expected: dict[str, Any], found: dict[str, Any]) -> Iterator[Difference]:
    for key in sorted(expected.keys() | found.keys()):
        if key not in found:
            yield Difference("lost", f"the document {key} of call {_age(expected[key])} is not there")
        elif key not in expected:
            yield Difference("lost", f"the document {key} of call {_age(found[key])} is there, which was removed")
        else:
            yield from _differing_values(f"the document {key}", expected[key], found[key])


def _age(value: Any) -> int:
    """The number of the call that wrote a value; 0 if it is what a new session has."""
    match value:
        case {"n": int(number)}:
            return number
        case str(text) if written := _numbered(text):
            return int(written[1])
        case _:
            return 0
