"""Sessions go out and come back in as they were, whatever happens on the way."""

from __future__ import annotations

import gzip
import json
import os
import re
import sqlite3
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager, closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_runtime import (
    AgentRuntimeError,
    AgentSwitch,
    InvalidInput,
    NewMessage,
    Quarantined,
    Runtime,
    SessionExists,
    SessionNotFound,
    StorageUnavailable,
    hookimpl,
)
from agent_runtime.archive import Archive, archive_line, parse_line
from agent_runtime.formats import Entry
from agent_runtime.testing import Faults, creates_session, faulty_plugin
from agent_runtime.transfer import (
    Imported,
    chat_entries,
    export_sessions,
    import_sessions,
    new_file,
    read_archive,
    read_lines,
    restore_session,
)
from agent_runtime_memory import MemoryDatabase
from places import Place, everything, forget, in_file, in_memory
from shell import Shell

pytestmark = pytest.mark.anyio

NOW = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
SAMPLE = Path(__file__).parent / "data" / "airline-sample.jsonl.gz"


async def each(lines: Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    for line in lines:
        yield line


async def imported(runtime: Runtime, *lines: bytes | dict[str, Any], refused: list[str] | None = None) -> Imported:
    """Import these lines; every refusal must be expected."""
    refusals: list[str] = []
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    async with aclosing(each(encoded)) as read, aclosing(chat_entries("f.jsonl", read)) as entries:
        result = await import_sessions(runtime, entries, refused=refusals.append)
    assert refusals == (refused or [])
    assert runtime.watermarks.stored == runtime.watermarks.accepted
    return result


async def exported(runtime: Runtime, *session_ids: str, plain: bool = False) -> bytes:
    parts: list[bytes] = []

    async def write(line: bytes) -> None:
        parts.append(line)

    count = await export_sessions(runtime, write, session_ids=session_ids or None, plain=plain)
    assert count == len(parts)
    return b"".join(parts)


def counts(created: int = 0, resumed: int = 0, unchanged: int = 0, refused: int = 0) -> Imported:
    return Imported(created, resumed, unchanged, refused)


# --- to the letter ----------------------------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
numbers = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, values, max_size=3)
times = st.datetimes(datetime(1970, 1, 2), datetime(9998, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 — bounds are naive
names = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="/."), min_size=1, max_size=9
)
calls = st.lists(
    st.fixed_dictionaries(
        {"id": st.sampled_from(["call_1", "call_2"]), "type": st.just("function")}, optional={"function": objects}
    ),
    max_size=2,
)
MESSAGE_KEYS = (
    "role", "content", "name", "tool_calls", "tool_call_id", "token_count", "metadata", "refusal", "annotations",
)  # fmt: skip
message_dicts = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
        "content": st.none() | texts | st.lists(objects, max_size=2),
    },
    optional={
        "name": names,
        "tool_calls": calls,
        "tool_call_id": names,
        "token_count": st.integers(0, 2**31 - 1),
        "metadata": objects,
        "refusal": values,
        "annotations": values,
    },
)


switch_records = st.builds(
    AgentSwitch,
    from_agent=names,
    to_agent=names,
    reason=st.none() | texts,
    switched_at=times,
    metadata=st.none() | objects,
)


@st.composite
def lines(draw: st.DrawFn, session_id: str = "s") -> bytes:
    """The line of any session, as an export writes it: with gaps in its seqs, and documents of both kinds."""
    messages = draw(st.lists(message_dicts, max_size=6))
    steps = draw(st.lists(st.integers(1, 3), min_size=len(messages) + 1, max_size=len(messages) + 1))
    seqs = [sum(steps[: index + 1]) for index in range(len(steps))]
    switches = draw(st.lists(switch_records, max_size=3))
    places = draw(st.sets(st.tuples(names, names), max_size=4))
    documents: list[dict[str, Any]] = [
        {"collection": collection, "key": key, "updated_at": draw(times)}
        | draw(
            st.fixed_dictionaries({"value": values})
            | st.builds(
                lambda data, kind: {"data": data, "media_type": kind}, st.binary(max_size=20), texts.filter(bool)
            )
        )
        for collection, key in sorted(places)
    ]
    line = {
        "session_id": session_id,
        "user_id": draw(st.none() | names),
        "title": draw(st.none() | texts),
        "description": draw(st.none() | texts),
        "metadata": draw(objects),
        "created_at": draw(times),
        "last_activity": draw(times),
        "context": {
            "current_agent": draw(names),
            "switch_count": len(switches),
            "last_switch_at": draw(st.none() | times),
            "metadata": draw(objects),
            "created_at": draw(times),
            "updated_at": draw(times),
        },
        "switches": switches,
        "documents": documents,
        "next_seq": seqs[-1],
        "messages": [{key: each[key] for key in MESSAGE_KEYS if key in each} for each in messages],
        "message_details": [
            {"seq": seq, "id": draw(names), "created_at": draw(times)} for seq in seqs[: len(messages)]
        ],
    }
    return msgspec.json.encode(line) + b"\n"


@given(lines())
@settings(max_examples=50)
def test_a_line_is_read_and_written_to_the_letter(line: bytes) -> None:
    assert archive_line(parse_line(line, NOW)) == line


@given(line=lines())
@settings(max_examples=25, deadline=None)
async def test_what_is_imported_is_exported_to_the_letter(line: bytes) -> None:
    await goes_in_and_out(in_memory(), line)


@given(line=lines())
@settings(max_examples=5, deadline=None)
async def test_what_is_imported_is_exported_to_the_letter_by_sqlite(line: bytes) -> None:
    with TemporaryDirectory() as directory:
        await goes_in_and_out(in_file(Path(directory)), line)


async def goes_in_and_out(place: Place, line: bytes) -> None:
    """From memory, from the database, and after a reopen; with a short tail, so that both have a part."""
    async with place.open(residents={"tail_messages": 2}) as runtime:
        assert await restore_session(runtime, parse_line(line, NOW)) == "created"
        assert archive_line(await read_archive(runtime, "s")) == line
        assert await imported(runtime, line) == counts(unchanged=1)
        assert await exported(runtime) == line
        forget(runtime)
        assert await exported(runtime) == line
    async with place.open() as runtime:
        assert await exported(runtime) == line
        assert await imported(runtime, line) == counts(unchanged=1)
        plain = json.loads(await exported(runtime, plain=True))
        assert list(plain) == ["session_id", "messages"]
        assert plain == {key: json.loads(line)[key] for key in plain}


async def lived(runtime: Runtime) -> None:
    """Sessions with a past of every kind."""
    await runtime.create_session("empty", user_id="ada", title="", metadata={"z": 1, "a": [1.0, None, "ü"]})
    chat = await runtime.create_session("chat", system_prompt="Be brief.", description="d", agent="first")
    await chat.append("user", "hi ☃", metadata={"b": 1e22, "a": -0.0}, token_count=3)
    await chat.append("assistant", None, tool_calls=[{"id": "t", "function": {"name": "f", "arguments": "{}"}}])
    await chat.append_tool_result("t", "f", {"deep": [{}]})
    await chat.append_many([{"role": "assistant", "content": [{"type": "text", "text": "x"}], "refusal": None}])
    await chat.append("user", "taken back")
    await chat.pop()
    await chat.append("user", "again")
    await chat.append("user", "taken back at the end")
    await chat.pop()
    await chat.switch_agent("second", reason="why not", metadata={"n": 1})
    await chat.switch_agent("first")
    await chat.update_context(metadata={"k": {"z": 0, "a": 0}})
    await chat.put_document("notes", "b", {"z": [1, 2.5], "a": None})
    await chat.put_document("notes", "a", None)
    await chat.put_document("blobs", "raw", bytes(range(256)), media_type="image/png")
    await chat.put_document("gone", "x", 1)
    await chat.delete_document("gone", "x")
    cleared = await runtime.create_session("cleared")
    await cleared.append_many([{"role": "user", "content": str(number)} for number in range(4)])
    await cleared.clear()
    one = await runtime.create_session("one left, a gap behind it")
    await one.append_many([{"role": "user", "content": str(number)} for number in range(5)])
    for _ in range(4):
        await one.pop()
    await one.update(title=None)
    deleted = await runtime.create_session("deleted")
    await deleted.append("user", "x")
    await deleted.delete()
    await (await runtime.create_session("deleted")).append("user", "anew")
    long = await runtime.create_session("long")
    await long.append_many([{"role": "user", "content": f"message {number}"} for number in range(1300)])


async def test_a_lived_database_moves_to_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    source, target = in_file(tmp_path / "from"), in_file(tmp_path / "to")
    async with source.open() as runtime:
        await lived(runtime)
        unstored = await exported(runtime)
        await runtime.flush()
        forget(runtime)
        file = await exported(runtime)
        assert file == unstored
        shown = {
            record.session_id: await everything(await runtime.get_session(record.session_id), "notes", "blobs", "gone")
            async for record in runtime.scan_sessions()
        }
    assert [json.loads(line)["session_id"] for line in file.splitlines()] == [
        "empty", "chat", "cleared", "one left, a gap behind it", "deleted", "long",
    ]  # fmt: skip
    for _ in range(2):
        async with target.open() as runtime:
            first = runtime.watermarks.accepted == 0
            result = await imported(runtime, *file.splitlines(keepends=True))
            assert result == (counts(created=6) if first else counts(unchanged=6))
            assert await exported(runtime) == file
            for session_id, before in shown.items():
                after = await everything(await runtime.get_session(session_id), "notes", "blobs", "gone")
                assert after[1:] == before[1:]
                assert after[0] == msgspec.structs.replace(before[0], incarnation=after[0].incarnation)
    async with target.open() as runtime:
        one = await runtime.get_session("one left, a gap behind it")
        assert (await one.append("user", "next")).seq == 6
        assert (await (await runtime.get_session("cleared")).append("user", "next")).seq == 5
        context = await (await runtime.get_session("chat")).switch_agent("third")
        assert context.switch_count == 3
    with closing(sqlite3.connect(target.path)) as connection:
        assert connection.execute("SELECT number FROM switches ORDER BY number").fetchall() == [(1,), (2,), (3,)]


async def test_real_conversations_come_out_as_they_went_in(tmp_path: Path) -> None:
    given_lines = gzip.decompress(SAMPLE.read_bytes()).splitlines(keepends=True)
    place = in_file(tmp_path)
    async with place.open() as runtime:
        assert await imported(runtime, *given_lines) == counts(created=30)
    async with place.open() as runtime:
        plain = await exported(runtime, plain=True)
        assert list(map(json.loads, plain.splitlines())) == list(map(json.loads, given_lines))
        stored = runtime.watermarks.stored
        assert await imported(runtime, *given_lines) == counts(unchanged=30)
        assert await imported(runtime, *plain.splitlines(keepends=True)) == counts(unchanged=30)
        assert runtime.watermarks.stored == stored
        chosen = [json.loads(given_lines[number])["session_id"] for number in (7, 2)]
        assert (await exported(runtime, *chosen, plain=True)).splitlines() == [
            plain.splitlines()[number] for number in (7, 2)
        ]


# --- what a line may leave out ----------------------------------------------------------------------------------------


async def test_a_plain_line_makes_what_creating_and_appending_make() -> None:
    line = chat({"role": "system", "content": "s"}, {"role": "user", "content": "Find a train"})
    async with in_memory().open() as runtime:
        before = datetime.now(UTC)
        assert await imported(runtime, line, b" \n", b"\n") == counts(created=1)
        archive = await read_archive(runtime, "s")
        assert archive.title == "Find a train"
        assert archive.context.current_agent == "orchestrator"
        assert archive.seqs == [1, 2]
        assert archive.next_seq == 3
        stamps = [archive.created_at, archive.last_activity, archive.context.created_at, archive.context.updated_at]
        stamps += [message.created_at or before for message in archive.messages]
        assert all(before <= stamp <= datetime.now(UTC) for stamp in stamps)
        assert len({message.id for message in archive.messages} - {None}) == 2


async def test_null_is_absent_but_for_the_title_and_the_value_of_a_document() -> None:
    message = {"role": "user", "content": "a title", "name": None, "tool_calls": None, "metadata": None}
    nothing = dict.fromkeys(["user_id", "title", "context", "switches", "documents", "next_seq", "message_details"])
    documents = [{"collection": "c", "key": "k", "value": None, "updated_at": None}]
    line = chat(message, **nothing | {"documents": documents})
    async with in_memory().open() as runtime:
        assert await imported(runtime, line) == counts(created=1)
        archive = await read_archive(runtime, "s")
        assert archive.title is None
        assert [document.value for document in archive.documents] == [None]
        assert json.loads(await exported(runtime, plain=True))["messages"] == [{"role": "user", "content": "a title"}]


async def test_ids_and_times_may_stand_in_the_messages() -> None:
    message = {"role": "user", "content": "x", "id": "m-1", "created_at": "2026-01-01T02:00:00+02:00"}
    line = {"session_id": "s", "messages": [message], "created_at": "2025-12-31T19:00:00-05:00"}
    async with in_memory().open() as runtime:
        assert await imported(runtime, line) == counts(created=1)
        archive = await read_archive(runtime, "s")
        assert archive.created_at == archive.messages[0].created_at == datetime(2026, 1, 1, tzinfo=UTC)
        assert archive.messages[0].id == "m-1"
        assert await imported(runtime, line) == counts(unchanged=1)


async def test_sessions_of_one_time_keep_the_order_of_their_lines(tmp_path: Path) -> None:
    """Although several are in flight, and some are looked up faster than others."""
    at = NOW.isoformat()
    given_lines = [
        {
            "session_id": f"s{number * 7 % 40}",
            "created_at": at,
            "messages": [{"role": "user", "content": "x" * (number % 3) * 9999}],
        }
        for number in range(40)
    ]
    async with in_file(tmp_path).open() as runtime:
        assert await imported(runtime, *given_lines) == counts(created=40)
        ids = [record.session_id async for record in runtime.scan_sessions()]
        assert ids == [line["session_id"] for line in given_lines]


# --- what is refused --------------------------------------------------------------------------------------------------


SWITCH = {"from_agent": "a", "to_agent": "b", "switched_at": "2026-01-01T00:00:00Z"}
DOCUMENT = {"collection": "c", "key": "k", "value": 1}
ROLES = "one of system, developer, user, assistant, tool"
NO_KEY = "is not a key that can stand here; what it holds would be lost, so take it out"
NOT_FINITE = "metadata.a[0]: must be a finite number: JSON has no NaN and no infinity"
TOO_DEEP = f"metadata.a{'[0]' * 63}: is nested deeper than 64 levels, or contains itself"
SURROGATE = "must not contain lone surrogates (U+D800 at position 0); decode the text with errors='replace'"
NUL = "must not contain NUL characters (one is at position 0)"
CONTROL = "must not contain control characters (U+000A at position 0)"
EITHER = "documents[0]: must have either a value (JSON) or data (bytes in base64)"


def chat(*messages: object, **fields: Any) -> dict[str, Any]:
    return {"session_id": "s", "messages": messages} | fields


def line_of(session_id: str, *contents: str, **fields: Any) -> dict[str, Any]:
    return chat(*({"role": "user", "content": content} for content in contents), session_id=session_id) | fields


def detailed(*details: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return line_of("s", *["x"] * len(details), message_details=details) | fields


def raw(fields: bytes) -> bytes:
    return b'{"session_id":"s","messages":[],%b}' % fields


REFUSED: list[tuple[bytes | dict[str, Any], str]] = [
    (b'{"session_id": "s", "messages": []', "line: is not JSON: Expecting ',' delimiter (character 35)"),
    (b"SQLite format 3\0", "line: is not JSON: Expecting value (character 1)"),
    (b'{"session_id": "\xff"}', "line: is not UTF-8 text (byte 17)"),
    (b"[" * 100_000, "line: is nested too deeply"),
    (raw(b'"metadata":{"a":%b}' % (b"[" * 100_000)), "line: is nested too deeply"),
    (raw(b'"metadata":{"a":%b1%b}' % (b"[" * 64, b"]" * 64)), TOO_DEEP),
    (b'{"session_id": %s}' % (b"9" * 5000), "line: holds a number with too many digits"),
    (b"[]", "line: Expected `object`, got `array`"),
    ({"messages": []}, "session_id: is missing"),
    ({"session_id": "s"}, "messages: is missing"),
    (line_of("a/b"), 'session_id: must not contain "/"'),
    (chat(session_id=1), "session_id: Expected `str`, got `int`"),
    (chat(conversation=[]), f"conversation: {NO_KEY}"),
    (chat(user_id=""), "user_id: must not be empty"),
    (chat(title="x" * 501), "title: has 501 characters, at most 500 are allowed"),
    (chat(metadata=[]), "metadata: Expected `object | null`, got `array`"),
    (raw(b'"metadata":{"a":[NaN]}'), NOT_FINITE),
    (raw(b'"metadata":{"a":[1e999]}'), NOT_FINITE),
    (raw(b'"description":"\\ud800"'), f"description: {SURROGATE}"),
    (chat(created_at="2026-01-01T00:00:00"), "created_at: Expected `datetime` with a timezone component"),
    (chat(created_at="1969-01-01T00:00:00Z"), "created_at: must lie in the years 1970 to 9999, in UTC"),
    (chat({"role": "user"}, {"role": "robot"}), f"messages[1].role: is unknown; it is {ROLES}"),
    (chat({"content": "x"}), f"messages[0].role: is missing; it is {ROLES}"),
    (chat({"role": "user", "content": "\0"}), f"messages[0].content: {NUL}"),
    (chat({"role": "user", "seq": 3}), "messages[0].seq: is given by the runtime; leave it out"),
    (chat("x"), "messages[0]: Expected `object`, got `str`"),
    (line_of("s", "x", message_details=[]), "message_details: has 0 entries for 1 messages"),
    (detailed({"id": "a"}), "message_details[0].seq: is missing"),
    (detailed({"seq": 0}), "message_details[0].seq: Expected `int` >= 1"),
    (detailed({"seq": 2}, {"seq": 2}), "message_details[1].seq: must be above 2, the one before it"),
    (detailed({"seq": 2**53 + 1}), "message_details[0].seq: Expected `int` <= 9007199254740992"),
    (detailed({"seq": 1, "no": 1}), f"message_details[0].no: {NO_KEY}"),
    (detailed({"seq": 1, "id": "a/b"}), 'messages[0].id: must not contain "/"'),
    (
        chat({"role": "user", "id": "a"}, message_details=[{"seq": 1, "id": "a"}]),
        "message_details[0].id: is given twice: here and in the message",
    ),
    (detailed({"seq": 5}, next_seq=5), "next_seq: must be above 5, the seq of the last message"),
    (chat(context={"switch_count": -1}), "context.switch_count: Expected `int` >= 0"),
    (chat(context={"current_agent": "\n"}), f"context.current_agent: {CONTROL}"),
    (chat(context={"switch_count": 2}), "context.switch_count: must be the number of switches, which is 0"),
    (chat(switches=[{"from_agent": "a", "to_agent": "b"}]), "switches[0].switched_at: is missing"),
    (chat(switches=[SWITCH | {"reason": "\0"}], context={"switch_count": 1}), f"switches[0].reason: {NUL}"),
    (chat(documents=[{"collection": "c", "key": "k"}]), EITHER),
    (chat(documents=[DOCUMENT | {"data": "eA=="}]), EITHER),
    (
        chat(documents=[DOCUMENT | {"media_type": "text/plain"}]),
        "documents[0].media_type: goes with data only; a JSON value has none",
    ),
    (
        chat(documents=[{"collection": "c", "key": "k", "data": "!"}]),
        "documents[0].data: Invalid base64 encoded string",
    ),
    (chat(documents=[DOCUMENT, DOCUMENT]), "documents[1].key: stands in its collection already"),
    (chat(documents=[DOCUMENT | {"key": "."}]), 'documents[0].key: must not be "." or ".."'),
]


async def test_a_bad_session_is_refused_with_its_place_and_the_others_go_in() -> None:
    given_lines: list[bytes | dict[str, Any]] = [line_of("first")]
    refused = []
    for bad, problem in REFUSED:
        refused.append(f"f.jsonl:{len(given_lines) + 1}: {problem}")
        given_lines.append(bad)
    given_lines.append(line_of("last"))
    async with in_memory().open() as runtime:
        result = await imported(runtime, *given_lines, refused=refused)
        assert result == counts(created=2, refused=len(REFUSED))
        assert [record.session_id async for record in runtime.scan_sessions()] == ["first", "last"]


async def test_what_is_too_large_is_refused_before_anything_is_stored() -> None:
    document = DOCUMENT | {"value": "x" * 65_000}
    given_lines = line_of("s", *["x"] * 9, "x" * 65_000), chat(documents=[document]), line_of("s", "x" * 17_000_000)
    refusals: list[str] = []
    async with in_memory().open(write_behind={"pending_bytes_max": 65_536}) as runtime:
        lines_in = each(json.dumps(line).encode() for line in given_lines)
        await import_sessions(
            runtime, chat_entries("f", lines_in), refused=lambda text: refusals.append(re.sub(r"\d{4,}", "N", text))
        )
        assert runtime.watermarks.accepted == 0
    too_small = "go in at once or not at all; for that, write_behind.pending_bytes_max (N) is too small"
    assert refusals == [
        f"f:1: messages[9]: takes N bytes that {too_small}",
        f"f:2: documents: takes N bytes that {too_small}",
        "f:3: messages[0]: takes N bytes as JSON, the most is N",
    ]


async def test_a_line_that_is_too_long_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.transfer.LINE_BYTES_MAX", 100)
    monkeypatch.setattr("agent_runtime.transfer._BLOCK_BYTES", 30)
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"%b\n%b\n\n%b\n%b" % (b"1" * 99, b"2" * 1000, b"3" * 100, b"4" * 7))
    with path.open("rb") as file:
        read = [line async for line in read_lines(file)]
    assert read == [b"1" * 99 + b"\n", b"2" * 101 + b"\n", b"\n", b"3" * 100 + b"\n", b"4" * 7]
    async with in_memory().open() as runtime:
        result = await imported(runtime, read[1], refused=["f.jsonl:1: line: has more than 100 bytes"])
        assert result == counts(refused=1)


async def test_lines_of_a_pipe_are_given_as_they_come() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as file, os.fdopen(writer, "wb", buffering=0) as pipe:
        lines_in = read_lines(file)
        pipe.write(b"one\ntw")
        assert await anext(lines_in) == b"one\n"
        with anyio.move_on_after(0.02) as scope:
            await anext(lines_in)
        assert scope.cancelled_caught
        await lines_in.aclose()


# --- what is there already --------------------------------------------------------------------------------------------


async def test_the_messages_decide_what_becomes_of_a_session_that_is_there() -> None:
    taken = (
        "session_id: the session 's' exists already, with other messages; delete it first, or give this one another id"
    )
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s", title="mine")
        await session.append("user", "1")
        await session.append("user", "2")
        before = await everything(session)
        assert await imported(runtime, line_of("s"), line_of("s", "1", title="other")) == counts(unchanged=2)
        assert await imported(runtime, line_of("s", "1", "2", documents=[DOCUMENT])) == counts(unchanged=1)
        assert await imported(runtime, line_of("s", "1", "x", "3"), refused=[f"f.jsonl:1: {taken}"]) == counts(
            refused=1
        )
        assert await everything(session) == before
        assert await imported(runtime, line_of("s", "1", "2", "3", "4")) == counts(resumed=1)
        assert [message.content for message in (await session.messages()).items] == ["1", "2", "3", "4"]
        assert (await session.record()).title == "mine"
        assert (await session.append("user", "5")).seq == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("role", "system"),
        ("content", "1 "),
        ("name", "n"),
        ("metadata", {"a": 1.0}),
        ("refusal", None),
        ("id", "other"),
    ],
)
async def test_messages_are_the_same_only_if_all_of_them_is(name: str, value: object) -> None:
    message = {"role": "user", "content": "1", "metadata": {"a": 1}, "id": "m"}
    async with in_memory().open() as runtime:
        assert await imported(runtime, {"session_id": "s", "messages": [message]}) == counts(created=1)
        with pytest.raises(SessionExists):
            await restore_session(
                runtime,
                parse_line(json.dumps({"session_id": "s", "messages": [message | {name: value}]}).encode(), NOW),
            )


async def test_seqs_that_the_session_has_used_can_not_come_again() -> None:
    async with in_memory().open() as runtime:
        session = await runtime.create_session("s")
        await session.append_many([{"role": "user", "content": "1"}, {"role": "user", "content": "2"}])
        await session.pop()
        seqs = [detail.seq for detail in (await session.messages()).items]
        with pytest.raises(SessionExists):
            await restore_session(
                runtime,
                parse_line(json.dumps(line_of("s", "1", "2", message_details=[{"seq": 1}, {"seq": 2}])).encode(), NOW),
            )
        assert [detail.seq for detail in (await session.messages()).items] == seqs
        assert await imported(
            runtime, line_of("s", "1", "2", message_details=[{"seq": 1}, {"seq": 7}], next_seq=9)
        ) == counts(resumed=1)
        assert (await session.append("user", "3")).seq == 9


async def test_a_session_that_has_no_title_gets_one_with_the_messages() -> None:
    async with in_memory().open() as runtime:
        await runtime.create_session("s")
        assert await imported(runtime, line_of("s", " ", "Find a train")) == counts(resumed=1)
        assert (await (await runtime.get_session("s")).record()).title == "Find a train"


async def test_many_may_restore_a_session_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.archives._PART_MESSAGES", 3)
    contents = [str(number) for number in range(40)]
    archive = parse_line(json.dumps(line_of("s", *contents)).encode(), NOW)
    async with in_memory().open(residents={"tail_messages": 1}) as runtime:
        restored: list[str] = []

        async def restore() -> None:
            restored.append(await restore_session(runtime, archive))

        async def flush() -> None:
            while len(restored) < 5:
                await runtime.flush()
                await anyio.sleep(0)

        async with anyio.create_task_group() as tasks:
            for task in (*[restore] * 5, flush):
                tasks.start_soon(task)
        session = await runtime.get_session("s")
        assert [message.content for message in (await session.messages()).items] == contents
        assert restored.count("created") <= 1


async def test_who_writes_to_a_session_that_is_restored_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_runtime.archives._PART_MESSAGES", 1)
    contents = [str(number) for number in range(200)]
    archive = parse_line(json.dumps(line_of("s", *contents)).encode(), NOW)
    async with in_memory().open() as runtime:
        refused: list[str] = []

        async def restore() -> None:
            try:
                await restore_session(runtime, archive)
            except SessionExists as error:
                refused.append(error.session_id)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(restore)
            while not runtime.watermarks.accepted:
                await anyio.sleep(0)
            session = await runtime.get_session("s")
            theirs = await session.append("user", "theirs")
        await runtime.flush()
        messages = [message async for message in session.scan_messages()]
        assert refused == ["s"]
        assert messages[-1] == theirs
        assert [message.content for message in messages[:-1]] == contents[: len(messages) - 1]


async def test_one_file_may_name_a_session_twice() -> None:
    lines_of_one = [line_of("s", *map(str, range(count))) for count in (2, 1, 5, 3, 5)]
    async with in_memory().open() as runtime:
        assert await imported(runtime, *lines_of_one) == counts(created=1, resumed=1, unchanged=3)
        assert (await (await runtime.get_session("s")).record()).message_count == 5


async def test_a_deleted_session_may_come_back() -> None:
    async with in_memory().open() as runtime:
        await imported(runtime, line_of("s", "1", "2"))
        await (await runtime.get_session("s")).delete()
        assert await imported(runtime, line_of("s", "1")) == counts(created=1)
        assert (await (await runtime.get_session("s")).append("user", "2")).seq == 2


@asynccontextmanager
async def faulty(faults: Faults, database: MemoryDatabase | None = None, **sections: Any) -> AsyncIterator[Runtime]:
    place = Place("faulty:memory:", faulty_plugin((database or MemoryDatabase()).open, faults))
    async with place.open(**sections) as runtime:
        yield runtime


async def test_a_held_session_is_refused() -> None:
    faults = Faults()
    faults.reject(creates_session("s"))
    async with faulty(faults) as runtime:
        await (await runtime.create_session("s")).append("user", "1")
        with pytest.raises(Quarantined):
            await runtime.flush()
        held = "the session 's' is held: one of its changes is in quarantine; replay or drop it first"
        lines_of_one = [line_of("s", "1", "2"), line_of("s", "1")]
        result = await imported(runtime, *lines_of_one, refused=[f"f.jsonl:1: session_id: {held}"])
        assert result == counts(refused=1, unchanged=1)


async def test_an_import_tells_of_what_went_to_quarantine_on_the_way() -> None:
    faults = Faults()
    faults.reject(creates_session("bad"))
    async with faulty(faults, write_behind={"interval_s": 0.001}) as runtime:
        await (await runtime.create_session("before")).append("user", "1")
        stored = runtime.watermarks.accepted

        async def source() -> AsyncIterator[bytes]:
            for session_id in ("good", "bad", "other"):
                yield json.dumps(line_of(session_id)).encode()
                while runtime.watermarks.stored < runtime.watermarks.accepted:
                    await anyio.sleep(0.001)

        with pytest.raises(Quarantined) as caught:
            await import_sessions(runtime, chat_entries("f", source()), refused=pytest.fail)
        assert len(caught.value.sequences) == 1
        assert caught.value.sequences[0] > stored
        assert len([record async for record in runtime.scan_sessions()]) == 4


# --- plugins ----------------------------------------------------------------------------------------------------------


class Redaction:
    """Takes numbers out of what is said, and lets nobody shout."""

    @hookimpl
    def agent_runtime_before_append(self, message: NewMessage) -> NewMessage:
        content = str(message.content)
        if content.isupper():
            raise InvalidInput("content", "is too loud")
        return msgspec.structs.replace(message, content=re.sub(r"\d", "#", content))


async def test_plugins_see_messages_that_are_imported() -> None:
    async with in_memory().open(plugins=[Redaction()]) as runtime:
        given_lines = line_of("s", "my card is 123"), line_of("t", "hi", "HI")
        refused = ["f.jsonl:2: messages[1].content: is too loud"]
        assert await imported(runtime, *given_lines, refused=refused) == counts(created=1, refused=1)
        assert await imported(runtime, *given_lines, refused=refused) == counts(unchanged=1, refused=1)
        history = await (await runtime.get_session("s")).history()
        assert history == [{"role": "user", "content": "my card is ###"}]


# --- interruptions and limits -----------------------------------------------------------------------------------------


async def large_line() -> bytes:
    """A session that is restored in five changes of at most 50 messages; one message is larger than a part may be."""
    line = line_of(
        "large",
        *(f"message {number}" for number in range(169)),
        "x" * 300_000,
        documents=[DOCUMENT, DOCUMENT | {"key": "other"}],
        message_details=[{"seq": 2 * number + 1} for number in range(170)],
        next_seq=9999,
    )
    async with in_memory().open() as runtime:
        await imported(runtime, line)
        return await exported(runtime)


@pytest.mark.parametrize("stored", range(6))
async def test_an_import_that_is_cut_off_goes_on_where_it_stopped(stored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage takes some batches of one change, and no more; the runtime ends; the import is repeated."""
    monkeypatch.setattr("agent_runtime.archives._PART_MESSAGES", 50)
    line, database, faults = await large_line(), MemoryDatabase(), Faults()
    gate = faults.hold("apply", nth=stored + 1)
    limits = {"batch_changes": 1, "drain_timeout_s": 0.01, "pending_bytes_max": 1_000_000}
    with suppress(StorageUnavailable):
        async with faulty(faults, database, write_behind=limits) as runtime, anyio.create_task_group() as tasks:
            tasks.start_soon(imported, runtime, line)
            with anyio.move_on_after(5 if stored < 5 else 0.1):
                await gate.reached.wait()
            tasks.cancel_scope.cancel()
    async with faulty(Faults(), database) as runtime:
        assert runtime.watermarks.stored == stored
        expected = counts(created=1) if stored == 0 else counts(resumed=1) if stored < 5 else counts(unchanged=1)
        assert await imported(runtime, line) == expected
        assert await exported(runtime) == line


async def test_more_goes_in_than_the_budget_for_unstored_changes_holds() -> None:
    limits = {"pending_bytes_max": 65_536, "append_timeout_s": 0.001}
    faults = Faults()
    faults.delay(0.01, "apply")
    async with faulty(faults, write_behind=limits) as runtime:
        await imported(runtime, *(line_of(f"s{number}", *["x" * 5000] * 10) for number in range(10)))
        assert runtime.watermarks.stored >= 40


async def test_a_failing_storage_ends_an_import_with_its_error() -> None:
    faults = Faults()
    faults.fail("head", nth=3)
    async with faulty(faults) as runtime:
        with pytest.raises(StorageUnavailable, match="a planned fault of head"):
            await imported(runtime, *(line_of(f"s{number}") for number in range(9)))
        faults.clear()
        result = await imported(runtime, *(line_of(f"s{number}") for number in range(9)))
        assert result.created + result.unchanged == 9


async def test_no_more_lines_are_read_than_are_worked_on() -> None:
    read = 0
    done = 0

    async def source() -> AsyncIterator[bytes]:
        nonlocal read
        for number in range(50):
            read += 1
            assert read - done <= 6
            yield json.dumps(line_of(f"s{number}")).encode()

    def progress(so_far: Imported, size: int) -> None:
        nonlocal done
        done = so_far.sessions
        assert size == sum(len(json.dumps(line_of(f"s{number}"))) for number in range(done))

    async with in_memory().open() as runtime:
        await import_sessions(runtime, chat_entries("f", source()), refused=pytest.fail, progress=progress)
    assert done == 50


async def test_an_archive_shows_one_moment(tmp_path: Path) -> None:
    """While another task appends, pops, and documents how far it is."""
    async with in_file(tmp_path).open(residents={"tail_messages": 1}) as runtime:
        session = await runtime.create_session("s")
        ended = False

        async def write() -> None:
            nonlocal ended
            for number in range(60):
                await session.append("user", f"{number}", durability="stored" if number % 3 else "buffered")
                await anyio.sleep(0.002)
            ended = True

        moments = 0
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            while not ended:
                archive = await read_archive(runtime, "s")
                assert archive.next_seq == len(archive.messages) + 1
                assert archive.seqs == list(range(1, archive.next_seq))
                if archive.messages:
                    assert archive.last_activity == archive.messages[-1].created_at
                moments += 1
                await anyio.sleep(0)
        assert moments > 1


async def test_an_archive_is_of_the_session_that_is_there_at_its_end() -> None:
    faults = Faults()
    async with faulty(faults, residents={"tail_messages": 1}) as runtime:
        await imported(runtime, line_of("s", "old", "old"))
        gate = faults.hold("messages", nth=1)
        archives: list[Archive] = []

        async def read() -> None:
            archives.append(await read_archive(runtime, "s"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await gate.reached.wait()
            await (await runtime.get_session("s")).delete()
            await (await runtime.create_session("s")).append("user", "new")
            gate.open()
        assert [message.content for message in archives[0].messages] == ["new"]


async def test_an_archive_lacks_what_a_change_in_quarantine_removed() -> None:
    database, faults = MemoryDatabase(), Faults()
    async with faulty(faults, database) as runtime:
        await imported(runtime, line_of("s", "1", "2"))
        faults.reject(lambda batch: bool(batch.removed))
        await (await runtime.get_session("s")).pop()
        with pytest.raises(Quarantined):
            await runtime.flush()
        assert [message.content for message in (await read_archive(runtime, "s")).messages] == ["1"]
    async with faulty(faults, database) as runtime:
        assert [message.content for message in (await read_archive(runtime, "s")).messages] == ["1"]


async def test_a_session_that_goes_while_all_are_exported_is_left_out() -> None:
    async with in_memory().open() as runtime:
        await imported(runtime, *(line_of(session_id) for session_id in "abc"))
        lines_out: list[bytes] = []

        async def write(line: bytes) -> None:
            lines_out.append(line)
            if len(lines_out) == 1:
                await (await runtime.get_session("b")).delete()

        assert await export_sessions(runtime, write) == 2
        assert [json.loads(line)["session_id"] for line in lines_out] == ["a", "c"]
        with pytest.raises(SessionNotFound):
            await exported(runtime, "a", "b")


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_new_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(ZeroDivisionError), new_file(path) as file:
        file.write(b"half")
        assert not path.exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with new_file(path) as file:
        file.write(b"one")
    assert path.read_bytes() == b"one"
    path.chmod(0o640)
    with pytest.raises(ZeroDivisionError), new_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"one"
    with new_file(path) as file:
        file.write(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    path, link, pipe = tmp_path / "out.jsonl", tmp_path / "link", tmp_path / "pipe"
    path.write_bytes(b"old")
    link.symlink_to(path)
    with new_file(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with new_file(pipe) as file:
            file.write(b"through")
        assert os.read(reader, 99) == b"through"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_an_error_names_the_file_that_was_wanted(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "out.jsonl", tmp_path):
        with pytest.raises(OSError, match=re.escape(str(path))) as caught, new_file(path):
            pass
        assert caught.value.filename == str(path)


# --- formats that plugins bring ---------------------------------------------------------------------------------------


async def entries_of(*entries: Entry | AgentRuntimeError) -> AsyncGenerator[Entry, None]:
    for entry in entries:
        if isinstance(entry, AgentRuntimeError):
            raise entry
        yield entry


def entry_of(session_id: str, *messages: dict[str, Any], **fields: Any) -> Entry:
    line = json.dumps({"session_id": session_id, "messages": messages}).encode()
    return Entry(place=f"source: session {session_id}", line=line, **fields)


async def test_what_is_wrong_is_told_of_the_place_in_the_source() -> None:
    bad = {"role": "nobody", "content": "x"}
    good = {"role": "user", "content": "x"}
    places = {"messages[1]": "row one", "messages[1].tool_calls": "calls of one", "messages[10]": "row ten"}
    calls = {"role": "assistant", "tool_calls": [{}]}
    told: list[str] = []
    async with in_memory().open() as runtime:
        sources = entries_of(
            entry_of("a", good, bad, places=places),
            entry_of("b", *[good] * 10, bad, places=places),
            entry_of("c", good, calls, places=places),
            entry_of("d", bad, places={"messages[0].ro": "no such place"}),
        )
        async with aclosing(sources) as entries:
            result = await import_sessions(runtime, entries, refused=told.append)
    assert result == counts(refused=4)
    assert [text.partition(": is ")[0] for text in told] == [
        "source: session a: row one.role",
        "source: session b: row ten.role",
        "source: session c: calls of one[0].id",
        "source: session d: messages[0].role",
    ]


async def test_problems_are_told_in_their_turn_and_counted() -> None:
    told: list[str] = []
    sizes: list[int] = []
    async with in_memory().open() as runtime:
        sources = entries_of(
            entry_of("a", problems=["one", "two"], size=3),
            Entry(place="source", problems=["three"]),
            entry_of("b", size=4),
        )
        async with aclosing(sources) as entries:
            result = await import_sessions(
                runtime, entries, refused=told.append, progress=lambda _, size: sizes.append(size)
            )
    assert told == ["source: session a: one", "source: session a: two", "source: three"]
    assert (result.created, result.problems, result.sessions, result.complete) == (2, 3, 2, False)
    assert sizes == [3, 3, 7]


async def test_a_source_that_can_not_be_read_on_ends_the_import_with_its_error() -> None:
    async with in_memory().open() as runtime:
        async with aclosing(entries_of(entry_of("a"), StorageUnavailable("the source is away"))) as entries:
            with pytest.raises(StorageUnavailable, match="the source is away"):
                await import_sessions(runtime, entries, refused=pytest.fail)
        await runtime.get_session("a")


def test_formats_are_named(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    file = shell.file("f.jsonl", line_of("s1", "hi"))
    _, errors = shell.here("import", "--format", "chatt", file, code=2)
    assert "there is no format 'chatt'; did you mean chat?" in " ".join(" ".join(errors).replace("│", "").split())
    _, errors = shell.here("import", "--deleted", file, code=2)
    assert "mark no session as deleted" in " ".join(" ".join(errors).replace("│", "").split())
    assert shell.here("import", "--format", "chat", file)[0].startswith("f.jsonl: 1 created")
