"""What a storage could not keep is refused at the door, with the name of the field; what passes comes back equal."""

from __future__ import annotations

import decimal
import hashlib
import math
import unicodedata
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from enum import IntEnum, StrEnum
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agent_runtime.errors import InvalidInput
from agent_runtime.records import ROLES, Message, NewMessage, Role
from agent_runtime.validation import (
    body_hash,
    check_id,
    check_json,
    check_limit,
    check_message,
    check_name,
    check_seq,
    check_text,
    check_time,
    json_object,
    parse_message,
)

NOW = datetime(2025, 1, 1, tzinfo=UTC)
SECRET = "hunter2"


class Color(StrEnum):
    RED = "red"


class Size(IntEnum):
    BIG = 1


class Key(StrEnum):
    ROLE = "role"


def refused(check: Callable[..., object], *arguments: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        check(*arguments)
    error = caught.value
    assert str(error) == f"{error.path}: {error.problem}"
    assert "\n" not in str(error)
    assert str(error).encode()
    assert error.__context__ is None  # which would hold the value
    return error


# --- strategies: text that passes, JSON that passes, and single values that do not ------------------------------------

good_characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
good_text = st.text(good_characters, max_size=20)
good_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), good_text
)
good_json = st.recursive(
    good_scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(good_text, inner, max_size=4)),
    max_leaves=12,
)
good_objects = st.dictionaries(good_text, good_json, max_size=4)

BAD_TEXTS = ["\0", "a\0b", "é\0", "\ud800", "a\udfffb", "é\udc80", "\ud83d\ude00"]
BAD_SCALARS: list[tuple[Any, str]] = [
    *((value, "NUL") for value in BAD_TEXTS[:3]),
    *((value, "surrogate") for value in BAD_TEXTS[3:]),
    (math.nan, "finite"),
    (math.inf, "finite"),
    (-math.inf, "finite"),
    (10**4000, "4000 decimal digits"),
    (-(10**4000), "4000 decimal digits"),
    ((1, 2), "use a list"),
    ({1}, "use a list"),
    (frozenset(), "use a list"),
    (b"x", "as text"),
    (bytearray(b"x"), "as text"),
    (NOW, "isoformat"),
    (NOW.date(), "isoformat"),
    (Color.RED, "plain str"),
    (Size.BIG, "int()"),
    (decimal.Decimal(1), "Decimal"),
    (UserDict(), "UserDict"),
    (object(), "object"),
    (NewMessage(role="user"), "NewMessage"),
]


# --- ids, names, texts ------------------------------------------------------------------------------------------------


def passes(check: Callable[..., object], *arguments: Any) -> bool:
    try:
        check(*arguments)
    except InvalidInput:
        return False
    return True


def test_ids_and_names_take_every_character_but_controls_and_surrogates() -> None:
    for code_point in (*range(0x300), *range(0x2000, 0x2100), *range(0xD7F0, 0xE010), 0xFFFF, 0x1F600, 0x10FFFF):
        text = f"a{chr(code_point)}b"
        storable = unicodedata.category(chr(code_point)) not in {"Cc", "Cs"}
        assert passes(check_name, "agent", text) == storable
        assert passes(check_id, "id", text) == (storable and chr(code_point) != "/")


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=255))
def test_ids_and_names_come_back_as_they_are(text: str) -> None:
    assert check_name("agent", text) == text
    assume("/" not in text)
    assume(text not in {".", ".."})
    assert check_id("id", text) == text


@pytest.mark.parametrize("check", [check_id, check_name])
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "empty"),
        ("x" * 256, "256 characters"),
        ("é" * 256, "256 characters"),
        ("a\0", "NUL"),
        ("a\n", "U+000A at position 1"),
        ("a\x7f", "U+007F at position 1"),
        ("é\x85", "U+0085 at position 1"),
        ("a\ud800", "U+D800 at position 1"),
        (None, "null"),
        (7, "int"),
        (b"x", "bytes"),
        (Color.RED, "Color"),
    ],
)
def test_ids_and_names_that_are_refused(check: Callable[..., str], value: object, problem: str) -> None:
    error = refused(check, "user_id", value)
    assert error.path == "user_id"
    assert problem in error.problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (".", '"." or ".."'),
        ("..", '"." or ".."'),
        ("/", 'contain "/"'),
        ("a/b", 'contain "/"'),
        ("../x", 'contain "/"'),
    ],
)
def test_ids_fit_into_urls_and_names_need_not(text: str, problem: str) -> None:
    assert problem in refused(check_id, "key", text).problem
    assert check_name("agent", text) == text


@pytest.mark.parametrize("text", ["x" * 255, "é" * 255, "...", ".x", " "])
def test_ids_at_the_edge(text: str) -> None:
    assert check_id("key", text) == text


@given(good_text)
def test_texts_come_back_as_they_are(text: str) -> None:
    assert check_text("title", text, 20) == text
    assert text == "" or "at most" in refused(check_text, "title", text, len(text) - 1).problem


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_texts_that_are_refused(text: str) -> None:
    assert refused(check_text, "title", text, 100).path == "title"


# --- times and numbers ------------------------------------------------------------------------------------------------


@given(st.datetimes(datetime(1970, 1, 2), datetime(9999, 12, 30), timezones=st.timezones()))  # noqa: DTZ001
def test_times_come_back_the_same_moment_in_utc(time: datetime) -> None:
    utc = check_time("created_at", time)
    assert utc.tzinfo is UTC
    assert utc.replace(tzinfo=None) + (time.utcoffset() or timedelta()) == time.replace(tzinfo=None)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (NOW.replace(tzinfo=None), "time zone"),
        (datetime(1969, 12, 31, 23, 59, tzinfo=UTC), "1970 to 9999"),
        (datetime(1970, 1, 1, tzinfo=timezone(timedelta(hours=1))), "1970 to 9999"),
        (datetime(9999, 12, 31, 23, 59, tzinfo=timezone(timedelta(hours=-1))), "1970 to 9999"),
        (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))), "1970 to 9999"),
        ("2025-01-01T00:00:00Z", "datetime"),
        (1735689600, "datetime"),
        (NOW.date(), "date"),
        (None, "null"),
    ],
)
def test_times_that_are_refused(value: object, problem: str) -> None:
    assert problem in refused(check_time, "created_at", value).problem


def test_a_time_of_a_subclass_becomes_a_plain_one() -> None:
    class Moment(datetime):
        pass

    utc = check_time("created_at", Moment(2025, 1, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2))))
    assert type(utc) is datetime
    assert utc == datetime(2025, 1, 1, 0, 3, 4, 5, tzinfo=UTC)


def test_limits_and_seqs() -> None:
    assert [check_limit("limit", value, 100) for value in (1, 100)] == [1, 100]
    assert [check_seq("after", value) for value in (0, 2**53)] == [0, 2**53]
    for value in (0, -1, 101, True, 1.0, "1", None, Size.BIG):
        assert refused(check_limit, "limit", value, 100).path == "limit"
    for value in (-1, 2**53 + 1, False, 1.0, "1", None):
        assert refused(check_seq, "after", value).path == "after"


# --- JSON -------------------------------------------------------------------------------------------------------------


@given(good_json)
def test_json_that_passes_comes_back_equal(value: Any) -> None:
    check_json("value", value)
    back = msgspec.json.decode(msgspec.json.encode(value))
    assert back == value
    assert repr(back) == repr(value)  # 1 and 1.0 and True, 0.0 and -0.0, the order of keys


@pytest.mark.parametrize(("value", "problem"), BAD_SCALARS)
def test_json_that_is_refused(value: Any, problem: str) -> None:
    for wrapped, path in [
        (value, "metadata"),
        ([value], "metadata[0]"),
        ({"key": value}, "metadata.key"),
        ({"tags": [1, {"name": value}]}, "metadata.tags[1].name"),
    ]:
        error = refused(check_json, "metadata", wrapped)
        assert error.path == path
        assert problem in error.problem


keys = st.one_of(st.from_regex(r"[a-z_][a-z0-9_]{0,9}", fullmatch=True), st.integers(0, 3))


@given(st.lists(keys, max_size=10), st.sampled_from(["\0", math.nan, (1,), b"x"]), good_json)
def test_the_path_leads_to_what_is_refused(path: list[str | int], bad: Any, beside: Any) -> None:
    value = bad
    for key in reversed(path):
        value = [*[beside] * key, value, bad] if isinstance(key, int) else {"beside": beside, key: value, "Z": bad}
    rendered = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    assert refused(check_json, "value", value).path == f"value{rendered}"


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("größe", ".größe"),
        ("odd key", '["odd key"]'),
        ('quo"te', r'["quo\"te"]'),
        ("", '[""]'),
        ("0", '["0"]'),
        ("line\nfeed", r'["line\nfeed"]'),
        ("x" * 40, "." + "x" * 40),
        ("x" * 41, '["' + "x" * 40 + '…"]'),
        ("k\0", r'["k\u0000"]'),
        ("k\ud800", r'["k\ud800"]'),
    ],
)
def test_how_keys_are_shown(key: str, shown: str) -> None:
    assert refused(check_json, "m", {key: math.nan}).path == f"m{shown}"
    bare = shown.removeprefix(".")
    assert refused(check_json, "", {key: math.nan}).path == bare


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_bad_characters_in_keys(text: str) -> None:
    assert refused(check_json, "m", {"a": [{text: 1}]}).path.startswith("m.a[0][")


@pytest.mark.parametrize("key", [1, None, True, 1.5, (1,), b"k", Color.RED])
def test_keys_must_be_strings(key: Any) -> None:
    error = refused(check_json, "m", {"a": {"ok": 1, key: 2}})
    assert error.path == "m.a"
    assert "key" in error.problem


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: {"k": inner}])
def test_nesting_is_bounded(wrap: Callable[[Any], Any]) -> None:
    check_json("m", nested(64, wrap))
    for depth in (65, 66, 100_000):
        assert "deeper than 64" in refused(check_json, "m", nested(depth, wrap)).problem


def test_cycles_are_refused() -> None:
    ring: list[Any] = []
    ring += [ring, ring]
    loop: dict[str, Any] = {"a": 1}
    loop["self"] = loop
    assert "contains itself" in refused(check_json, "m", ring).problem
    assert "contains itself" in refused(check_json, "m", loop).problem


def test_integers_up_to_4000_digits() -> None:
    for value in (10**4000 - 1, 1 - 10**4000):
        check_json("m", [value])
        assert msgspec.json.decode(msgspec.json.encode(value)) == value


def test_subclasses_of_dict_and_list_are_seen_as_the_encoder_sees_them() -> None:
    class Sly(dict[str, Any]):
        def items(self) -> Any:
            return [("shown", 1)]

        def keys(self) -> Any:
            return ["shown"]

        def __iter__(self) -> Any:
            return iter(["shown"])

    class SlyList(list[Any]):
        def __iter__(self) -> Any:
            return iter([1])

    check_json("m", OrderedDict(a=1))
    check_json("m", defaultdict(list, a=[1]))
    assert refused(check_json, "m", Sly(hidden=math.nan)).path == "m.hidden"
    assert refused(check_json, "m", Sly({"\0": 1})).path == r'm["\u0000"]'
    assert refused(check_json, "m", SlyList([math.nan])).path == "m[0]"


def test_json_objects() -> None:
    given = {"a": 1}
    assert json_object("metadata", None) == {}
    assert json_object("metadata", given) is given
    others: list[Any] = [[], "{}", 0, False]
    for value in others:
        assert refused(json_object, "metadata", value).path == "metadata"
    assert refused(json_object, "metadata", {"a": math.nan}).path == "metadata.a"


# --- messages: from chat format ---------------------------------------------------------------------------------------

FIELDS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "token_count",
    "metadata",
    "extra",
    "id",
    "created_at",
)
good_labels = good_text.filter(bool)
good_calls = st.lists(st.builds(lambda call, call_id: call | {"id": call_id}, good_objects, good_labels), max_size=3)
good_extras = good_objects.filter(lambda extra: not {*FIELDS, "seq"} & extra.keys())
good_chat = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES), "content": st.one_of(st.none(), good_text, st.lists(good_objects, max_size=3))},
    optional={"name": good_labels, "tool_calls": good_calls, "tool_call_id": good_labels},
)


def appended(new: NewMessage) -> Message:
    return Message(**msgspec.structs.asdict(new) | {"seq": 1, "id": new.id or "m", "created_at": new.created_at or NOW})


@given(good_chat, good_extras)
def test_a_chat_message_comes_back_with_all_its_keys(chat: dict[str, Any], others: dict[str, Any]) -> None:
    new = parse_message("message", chat | others)
    check_message("message", new)
    assert appended(new).to_chat() == chat | others
    assert (new.extra or {}) == others
    assert parse_message("message", chat | {"extra": others}) == new
    assert parse_message("message", UserDict(chat | others)) == new
    assert parse_message("message", new) == new
    stored = msgspec.json.decode(msgspec.json.encode(appended(new)), type=Message)
    assert stored.to_chat() == chat | others


def test_fields_of_ours_in_a_chat_message() -> None:
    chat = {"role": "user", "content": "hi", "token_count": 3, "metadata": {"a": 1}, "id": "m1", "refusal": None}
    assert parse_message("m", chat | {"created_at": "2025-01-01T02:00:00+02:00", "extra": {"audio": 1}}) == NewMessage(
        role="user",
        content="hi",
        token_count=3,
        metadata={"a": 1},
        id="m1",
        created_at=NOW,
        extra={"audio": 1, "refusal": None},
    )
    empties: list[dict[str, Any]] = [{"role": "user", "extra": None}, {"role": "user", "extra": {}}]
    for empty in empties:
        assert parse_message("m", empty) == NewMessage(role="user")


@pytest.mark.parametrize(
    ("value", "path", "problem"),
    [
        ({"content": "hi"}, "role", "missing"),
        ({"role": None}, "role", "missing"),
        ({"role": "user", "seq": 1}, "seq", "given by the runtime"),
        ({"role": "user", 7: 1}, "", "key"),
        ({Key.ROLE: "user"}, "", "not a plain str but Key"),
        ({"role": "user", "extra": [1]}, "extra", "dict"),
        ({"role": "user", "extra": "x"}, "extra", "dict"),
        ({"role": "user", "extra": {"audio": 1}, "audio": 1}, "extra.audio", "twice"),
        *(({"role": "user", "extra": {name: 1}}, f"extra.{name}", "field of the message") for name in (*FIELDS, "seq")),
        ({"role": "user", "id": "a/b"}, "id", "/"),
        ({"role": "user", "id": 7}, "id", "str"),
        ({"role": "user", "created_at": "2025-01-01T00:00:00"}, "created_at", "offset"),
        ({"role": "user", "created_at": "2025-01-01"}, "created_at", "offset"),
        ({"role": "user", "created_at": "yesterday"}, "created_at", "ISO 8601"),
        ({"role": "user", "created_at": "1960-01-01T00:00:00Z"}, "created_at", "1970"),
        ({"role": "user", "created_at": 1735689600}, "created_at", "datetime"),
        ({"role": "user", "created_at": NOW.replace(tzinfo=None)}, "created_at", "time zone"),
        (NewMessage(role="user", id="a/b"), "id", "/"),
        (NewMessage(role="user", created_at=NOW.replace(tzinfo=None)), "created_at", "time zone"),
        ("hi", "", "NewMessage"),
        (None, "", "NewMessage"),
        ([("role", "user")], "", "NewMessage"),
    ],
)
def test_chat_messages_that_are_refused(value: Any, path: str, problem: str) -> None:
    error = refused(parse_message, "", value)
    assert error.path == (path or "message")
    assert problem in error.problem
    assert refused(parse_message, "messages[3]", value).path == ("messages[3]." + path).removesuffix(".")


@given(st.integers(-1439, 1439))
def test_a_time_in_another_zone_is_put_into_utc(offset_min: int) -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(minutes=offset_min)))
    for value in (
        NewMessage(role="user", created_at=elsewhere),
        {"role": "user", "created_at": elsewhere},
        {"role": "user", "created_at": elsewhere.isoformat()},
    ):
        message = parse_message("m", value)
        check_message("m", message)
        created_at = message.created_at
        assert created_at == NOW
        assert created_at is not None
        assert created_at.tzinfo is UTC


# --- messages: their fields -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "path", "problem"),
    [
        ({"role": "robot"}, "role", "system, developer, user, assistant, tool"),
        ({"role": None}, "role", "system, developer"),
        ({"role": ["user"]}, "role", "system, developer"),
        ({"content": 7}, "content", "int"),
        ({"content": {"text": "hi"}}, "content", "dict"),
        ({"content": ("a",)}, "content", "tuple"),
        ({"content": b"hi"}, "content", "bytes"),
        ({"content": Color.RED}, "content", "Color"),
        *(({"content": text}, "content", "must not contain") for text in BAD_TEXTS),
        ({"content": ["hi"]}, "content[0]", "content part"),
        ({"content": [{}, None]}, "content[1]", "content part"),
        ({"content": [{"type": "text", "text": "\0"}]}, "content[0].text", "NUL"),
        ({"name": ""}, "name", "empty"),
        ({"name": "x" * 256}, "name", "256"),
        ({"name": 1}, "name", "int"),
        ({"name": "\0"}, "name", "NUL"),
        ({"tool_calls": {"id": "a"}}, "tool_calls", "list"),
        ({"tool_calls": "a"}, "tool_calls", "list"),
        ({"tool_calls": [{"id": "a"}, "b"]}, "tool_calls[1]", "dict"),
        ({"tool_calls": [{"function": {}}]}, "tool_calls[0].id", "missing"),
        ({"tool_calls": [{"id": None}]}, "tool_calls[0].id", "null"),
        ({"tool_calls": [{"id": ""}]}, "tool_calls[0].id", "empty"),
        ({"tool_calls": [{"id": "x" * 256}]}, "tool_calls[0].id", "256"),
        ({"tool_calls": [{"id": "\ud800"}]}, "tool_calls[0].id", "surrogate"),
        ({"tool_calls": [{"id": "a", "function": {"name": (1,)}}]}, "tool_calls[0].function.name", "tuple"),
        ({"tool_call_id": ""}, "tool_call_id", "empty"),
        ({"tool_call_id": "x" * 256}, "tool_call_id", "256"),
        ({"tool_call_id": 7}, "tool_call_id", "int"),
        ({"token_count": -1}, "token_count", "0 to 2147483647"),
        ({"token_count": 2**31}, "token_count", "0 to 2147483647"),
        ({"token_count": True}, "token_count", "bool"),
        ({"token_count": 1.0}, "token_count", "float"),
        ({"metadata": [1]}, "metadata", "dict"),
        ({"metadata": {"tags": [{"name": math.nan}]}}, "metadata.tags[0].name", "finite"),
        ({"extra": [1]}, "extra", "dict"),
        ({"extra": {"audio": b""}}, "extra.audio", "bytes"),
        *(({"extra": {name: 1}}, f"extra.{name}", "field of the message") for name in (*FIELDS, "seq")),
        ({"id": "a/b"}, "id", "/"),
        ({"id": ""}, "id", "empty"),
        ({"created_at": NOW.replace(tzinfo=None)}, "created_at", "time zone"),
        ({"created_at": "2025-01-01T00:00:00Z"}, "created_at", "str"),
        ({"created_at": NOW.astimezone(timezone(timedelta(hours=5)))}, "created_at", "in UTC"),
    ],
)
def test_messages_that_are_refused(fields: dict[str, Any], path: str, problem: str) -> None:
    message = NewMessage(**{"role": "user", "content": "hi"} | fields)
    error = refused(check_message, "", message)
    assert error.path == path
    assert problem in error.problem
    assert refused(check_message, "messages[3]", message).path == f"messages[3].{path}"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("content", [None, "", "x" * 100_000, "é", [], [{}], [{"type": "text", "text": "é"}]])
def test_roles_and_contents_that_pass(role: Role, content: str | list[Any] | None) -> None:
    check_message("", NewMessage(role=role, content=content))


@pytest.mark.parametrize(
    "fields",
    [
        {"role": "user", "name": "x" * 255},
        {"role": "assistant", "tool_calls": []},
        {"role": "assistant", "tool_calls": [{"id": "x" * 255, "function": None}, {"id": "x" * 255}]},
        {"role": "tool", "tool_call_id": "x" * 255},
        {"role": "user", "token_count": 0},
        {"role": "user", "token_count": 2**31 - 1},
        {"role": "user", "metadata": {}, "extra": {}, "id": "m", "created_at": NOW},
    ],
)
def test_messages_that_pass(fields: dict[str, Any]) -> None:
    check_message("", NewMessage(**fields))


@given(
    st.one_of(st.sampled_from(ROLES), st.sampled_from(["", "User", None, 7, Color.RED])),
    st.one_of(good_text, st.text(), st.sampled_from([*BAD_TEXTS, None, 7, b"x"])),
)
def test_the_fast_path_decides_as_the_slow_one(role: Any, content: Any) -> None:
    def outcome(message: NewMessage) -> str:
        try:
            check_message("m", message)
        except InvalidInput as error:
            return str(error)
        return "passes"

    fast = NewMessage(role=role, content=content)
    assert outcome(fast) == outcome(msgspec.structs.replace(fast, token_count=0))


@pytest.mark.parametrize(
    "fields",
    [
        {"role": SECRET},
        {"content": SECRET + "\0"},
        {"content": [SECRET]},
        {"name": SECRET * 100},
        {"tool_call_id": SECRET + "\ud800"},
        {"metadata": {"key": (SECRET,)}},
        {"id": SECRET + "/"},
        {"created_at": SECRET},
        {"token_count": SECRET},
    ],
)
def test_errors_never_hold_what_was_given(fields: dict[str, Any]) -> None:
    message = NewMessage(**{"role": "user"} | fields)
    assert SECRET not in str(refused(check_message, "", message))


# --- idempotency ------------------------------------------------------------------------------------------------------


def test_body_hashes_are_frozen() -> None:
    arguments = {"role": "user", "content": "grüße", "metadata": {"b": [1, 1.5, None], "a": True}, "at": NOW}
    encoded = (
        '["append",{"at":"2025-01-01T00:00:00Z","content":"grüße",'
        '"metadata":{"a":true,"b":[1,1.5,null]},"role":"user"}]'
    )
    assert body_hash("append", arguments) == hashlib.sha256(encoded.encode()).hexdigest()


@given(st.dictionaries(good_text, good_json, min_size=2, max_size=5))
def test_the_order_of_keys_makes_no_difference(arguments: dict[str, Any]) -> None:
    turned = dict(reversed(arguments.items()))
    assert body_hash("append", turned) == body_hash("append", arguments)
    assert body_hash("append_many", arguments) != body_hash("append", arguments)


@given(good_json, good_json)
def test_other_arguments_have_another_hash(one: Any, other: Any) -> None:
    assume(msgspec.json.encode(one, order="sorted") != msgspec.json.encode(other, order="sorted"))
    assert body_hash("append", one) != body_hash("append", other)
    assert body_hash("append", {"a": one}) != body_hash("append", {"b": one})
