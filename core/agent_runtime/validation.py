"""The door: what a storage could not keep, or could not give back as it was, is refused here, naming the field.

Everything that passes can be encoded as JSON, written to any of our databases and read back equal: no NUL (PostgreSQL
takes none), no lone surrogates (not encodable), no NaN, no keys but strings, no types that JSON would change on the way
(tuples come back as lists), bounded depth and length. One message that slipped through would poison a whole batch.

The checks are pure. Each takes the `path` of its value for the error and raises `errors.InvalidInput`; problems name
types, counts and code points, never the value. The common case of each is decided first, and cheaply.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from hashlib import sha256
from typing import Any, Final, NoReturn, TypeAlias, TypeGuard

import msgspec

from .durations import LENGTH_MAX
from .errors import InvalidInput, path_keys
from .records import ROLES, NewMessage

__all__ = [
    "ID_CHARS_MAX",
    "JSON_DEPTH_MAX",
    "JSON_INT_DIGITS_MAX",
    "SEQ_MAX",
    "TOKEN_COUNT_MAX",
    "body_hash",
    "check_id",
    "check_ids",
    "check_json",
    "check_label",
    "check_length",
    "check_limit",
    "check_message",
    "check_name",
    "check_seq",
    "check_text",
    "check_time",
    "json_object",
    "parse_message",
]

ID_CHARS_MAX: Final = 255
JSON_DEPTH_MAX: Final = 64
JSON_INT_DIGITS_MAX: Final = 4000
SEQ_MAX: Final = 2**53
TOKEN_COUNT_MAX: Final = 2**31 - 1

_CONTROLS: Final = r"\x00-\x1f\x7f-\x9f"  # the Unicode category Cc
_SURROGATES: Final = r"\ud800-\udfff"  # in a Python string always lone: pairs are one character
_is_id: Final = re.compile(f"[^/{_CONTROLS}{_SURROGATES}]{{1,{ID_CHARS_MAX}}}").fullmatch
_DOTS: Final = frozenset({".", ".."})
_find_control: Final = re.compile(f"[{_CONTROLS}]").search

_ROLES: Final = frozenset(ROLES)
_FIELDS: Final = frozenset(NewMessage.__struct_fields__)
_RESERVED: Final = _FIELDS | {"seq"}
_CHAT_FIELDS: Final = _FIELDS - {"extra"}
_KEY_TYPES: Final = frozenset({str})
_INT_END: Final = 10**JSON_INT_DIGITS_MAX
_MISSING: Final = object()
_KEY_SHOWN_CHARS_MAX: Final = 40
_JSON_HINTS: Final[tuple[tuple[type | tuple[type, ...], str], ...]] = (
    (str, "convert it to a plain str"),
    (int, "convert it with int()"),
    (float, "convert it with float()"),
    ((tuple, set, frozenset), "use a list"),
    ((bytes, bytearray, memoryview), "encode it as text, or keep it as a document"),
    ((date, time), "use a string, as from .isoformat()"),
)
_encode_sorted: Final = msgspec.json.Encoder(order="sorted").encode

_Trail: TypeAlias = "str | tuple[_Trail, str | int]"
"""A path that is put into words only when it is needed: a text, or a container's trail and a key in it."""


def _steps(trail: _Trail) -> tuple[str, list[str | int]]:
    """A trail as the path it begins with, and the keys from there on."""
    keys: list[str | int] = []
    while not isinstance(trail, str):
        trail, key = trail
        keys.append(key)
    return trail, keys[::-1]


def _render(path: str, keys: Iterable[str | int]) -> str:
    for key in keys:
        if isinstance(key, int):
            path += f"[{key}]"
        elif key.isidentifier() and len(key) <= _KEY_SHOWN_CHARS_MAX:
            path = _field(path, key)
        else:
            shown = key if len(key) <= _KEY_SHOWN_CHARS_MAX else key[:_KEY_SHOWN_CHARS_MAX] + "…"
            path += f"[{json.dumps(shown, ensure_ascii=not shown.isprintable())}]"
    return path


def _field(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _refuse(trail: _Trail, problem: str) -> NoReturn:
    path, keys = _steps(trail)
    raise InvalidInput(_render(path, keys), problem, (*path_keys(path), *keys))


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


# --- text -------------------------------------------------------------------------------------------------------------


def _is_clean(value: object) -> TypeGuard[str]:
    """Whether this is text that needs no closer look: the quick answer for nearly all of it."""
    return type(value) is str and value.isascii() and "\0" not in value


def _check_characters(trail: _Trail, value: str) -> None:
    position = value.find("\0")
    if position >= 0:
        _refuse(trail, f"must not contain NUL characters (one is at position {position})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        position = error.start  # raised outside, so that the text does not travel along as the error's context
    else:
        return
    _refuse(
        trail,
        f"must not contain lone surrogates (U+{ord(value[position]):04X} at position {position}); "
        "decode the text with errors='replace'",
    )


def check_text(path: str, value: object, chars_max: int) -> str:
    """Text of at most `chars_max` characters, without NUL and lone surrogates. It may be empty."""
    if type(value) is not str:
        _refuse(path, f"must be a plain str, not {_kind(value)}")
    if len(value) > chars_max:
        _refuse(path, f"has {len(value)} characters, at most {chars_max} are allowed")
    if not _is_clean(value):
        _check_characters(path, value)
    return value


def check_label(path: str, value: object) -> str:
    """What others named: 1 to 255 characters, without NUL and lone surrogates."""
    text = check_text(path, value, ID_CHARS_MAX)
    if not text:
        _refuse(path, "must not be empty")
    return text


def check_name(path: str, value: object) -> str:
    """The name of an agent or a tool: 1 to 255 characters, none of them a control character or a lone surrogate."""
    text = check_label(path, value)
    control = _find_control(text)
    if control is not None:
        _refuse(path, f"must not contain control characters (U+{ord(control[0]):04X} at position {control.start()})")
    return text


def check_id(path: str, value: object) -> str:
    """An id, a collection or a key: as `check_name`, and fit for a segment of a URL: no "/", and not "." or ".."."""
    if type(value) is str and _is_id(value) and value not in _DOTS:
        return value
    text = check_name(path, value)
    if text in _DOTS:
        _refuse(path, 'must not be "." or ".."')
    _refuse(path, 'must not contain "/"')


def check_ids(path: str, value: object, maximum: int) -> None:
    """A list or tuple of 1 to `maximum` ids. (A text is a sequence of ids of one character: not what anybody means.)"""
    if not isinstance(value, list | tuple):
        _refuse(path, f"must be a list of ids, not {_kind(value)}")
    if not 1 <= len(value) <= maximum:
        _refuse(path, f"must have 1 to {maximum} ids, not {len(value)}")
    for index, each in enumerate(value):
        check_id(f"{path}[{index}]", each)


# --- times and numbers ------------------------------------------------------------------------------------------------


def check_time(path: str, value: object) -> datetime:
    """A time with a time zone, in the years 1970 to 9999: as a plain datetime in UTC."""
    if not isinstance(value, datetime):
        _refuse(path, f"must be a datetime, not {_kind(value)}")
    if value.utcoffset() is None:
        _refuse(path, "has no time zone; use datetime.now(UTC), or value.replace(tzinfo=UTC) for a time in UTC")
    try:
        utc = value.astimezone(UTC)
    except OverflowError:
        utc = None
    if utc is None or utc.year < 1970:
        _refuse(path, "must lie in the years 1970 to 9999, in UTC")
    return utc if type(utc) is datetime else datetime.combine(utc.date(), utc.time(), UTC)


def _parse_time(path: str, value: object) -> datetime:
    if not isinstance(value, str):
        return check_time(path, value)
    try:
        parsed = datetime.fromisoformat(value)
    except (ValueError, OverflowError):
        parsed = None
    if parsed is None or parsed.utcoffset() is None:
        _refuse(path, "must be an ISO 8601 time with an offset, such as 2025-01-31T12:00:00Z")
    return check_time(path, parsed)


def check_length(path: str, value: object) -> timedelta:
    """A length of time: more than nothing, at most a hundred years."""
    if not isinstance(value, timedelta):
        _refuse(path, f"must be a timedelta, not {_kind(value)}")
    if not timedelta(0) < value <= LENGTH_MAX:
        _refuse(path, f"must be more than nothing, and at most {LENGTH_MAX.days} days")
    return value


def _check_int(path: str, value: object, minimum: int, maximum: int) -> int:
    if type(value) is not int:
        _refuse(path, f"must be an int, not {_kind(value)}")
    if not minimum <= value <= maximum:
        _refuse(path, f"must be from {minimum} to {maximum}")
    return value


def check_limit(path: str, value: object, maximum: int) -> int:
    """How many to return at most: an int from 1 to `maximum`."""
    return _check_int(path, value, 1, maximum)


def check_seq(path: str, value: object) -> int:
    """A place in a session: an int from 0 to 2**53, which every JSON reader keeps exact."""
    return _check_int(path, value, 0, SEQ_MAX)


# --- JSON -------------------------------------------------------------------------------------------------------------


def check_json(path: str, value: object) -> None:
    """Plain JSON: dict with str keys, list, str, int, float, bool, None; up to 64 levels deep, ints up to 4,000 digits.

    Subclasses of dict and list pass, and are seen as the encoder sees them: by what they store, whatever their methods
    say. A cycle is refused as too deep.
    """
    if isinstance(value, (dict, list)):
        _check_container(path, value)
    else:
        _check_scalar(path, value)


def _is_plain(container: Any, depth: int) -> bool:
    """Whether a dict or list is plain JSON, the quick answer for nearly all of it: where it is False, `_walk` tells."""
    if depth > JSON_DEPTH_MAX:
        return False
    values = container
    if type(container) is dict:
        for key in container:
            if type(key) is not str or not key.isascii() or "\0" in key:
                return False
        values = container.values()
    elif type(container) is not list:
        return False
    for value in values:
        kind = type(value)
        if kind is str:
            if "\0" in value or not (value.isascii() or _can_be_encoded(value)):
                return False
        elif kind is dict or kind is list:
            if not _is_plain(value, depth + 1):
                return False
        elif kind is int:
            if not -_INT_END < value < _INT_END:
                return False
        elif kind is float:
            if not math.isfinite(value):
                return False
        elif kind is not bool and value is not None:
            return False
    return True


def _can_be_encoded(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_container(trail: _Trail, container: dict[Any, Any] | list[Any]) -> None:
    if not _is_plain(container, 1):
        _walk(trail, container, 1)


def _walk(trail: _Trail, container: dict[Any, Any] | list[Any], depth: int) -> None:
    if depth > JSON_DEPTH_MAX:
        _refuse(trail, f"is nested deeper than {JSON_DEPTH_MAX} levels, or contains itself")
    items: Iterable[tuple[Any, Any]]
    if isinstance(container, dict):
        for key in dict.keys(container):
            if type(key) is str and key.isascii() and "\0" not in key:
                continue
            _check_key(trail, key)
        items = dict.items(container)
    else:
        items = enumerate(list.__iter__(container))
    for key, value in items:
        kind = type(value)
        if kind is str and value.isascii() and "\0" not in value:  # _is_clean, without the call: most values end here
            continue
        if kind is bool or value is None:
            continue
        if isinstance(value, (dict, list)):
            _walk((trail, key), value, depth + 1)
        else:
            _check_scalar((trail, key), value)


def _check_key(trail: _Trail, key: object) -> None:
    if type(key) is not str:
        _refuse(trail, f"has a key that is not a plain str but {_kind(key)}")
    _check_characters((trail, key), key)


def _check_scalar(trail: _Trail, value: object) -> None:
    if type(value) is str:
        if not _is_clean(value):
            _check_characters(trail, value)
    elif type(value) is int:
        if not -_INT_END < value < _INT_END:
            _refuse(trail, f"has more than {JSON_INT_DIGITS_MAX} decimal digits")
    elif type(value) is float:
        if not math.isfinite(value):
            _refuse(trail, "must be a finite number: JSON has no NaN and no infinity")
    elif value is not None and type(value) is not bool:
        hint = next(
            (hint for types, hint in _JSON_HINTS if isinstance(value, types)),
            "use dict, list, str, int, float, bool and None",
        )
        _refuse(trail, f"is not plain JSON but {_kind(value)}; {hint}")


def json_object(path: str, value: object) -> dict[str, Any]:
    """A JSON object: the dict itself, one made of any other mapping, or a new empty one for None."""
    if value is None:
        return {}
    return _check_object(path, dict(value) if isinstance(value, Mapping) and not isinstance(value, dict) else value)


def _check_object(path: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(path, f"must be a dict, not {_kind(value)}")
    _check_container(path, value)
    return value


# --- messages ---------------------------------------------------------------------------------------------------------


def parse_message(path: str, value: Mapping[str, Any] | NewMessage) -> NewMessage:
    """The message that a dict in chat format describes; a `NewMessage` is itself. Its time is put into UTC.

    Keys that are not fields of a message go into `extra`, next to what is given as `extra`; `seq` is refused. Only the
    shape, `id` and `created_at` (here also ISO 8601 text) are checked: the rest is `check_message`'s, after the hooks.
    """
    if isinstance(value, NewMessage):
        message = value
    elif isinstance(value, (dict, Mapping)):  # dict first: an abstract class takes longer to ask
        message = _from_chat(path, value)
    else:
        _refuse(path or "message", f"must be a dict in chat format or a NewMessage, not {_kind(value)}")
    if message.id is not None:
        check_id(_field(path, "id"), message.id)
    if message.created_at is not None:
        created_at = _parse_time(_field(path, "created_at"), message.created_at)
        message = msgspec.structs.replace(message, created_at=created_at)
    return message


def _from_chat(path: str, chat: Mapping[Any, Any]) -> NewMessage:
    if (
        type(chat) is dict
        and _CHAT_FIELDS.issuperset(chat)
        and _KEY_TYPES.issuperset(map(type, chat))
        and chat.get("role") is not None
    ):
        return NewMessage(**chat)
    fields: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in chat.items():
        if type(key) is not str:
            _refuse(path or "message", f"has a key that is not a plain str but {_kind(key)}")
        if key in _FIELDS:
            fields[key] = value
        elif key == "seq":
            _refuse(_field(path, key), "is given by the runtime; leave it out")
        else:
            extra[key] = value
    if fields.get("role") is None:
        _refuse(_field(path, "role"), f"is missing; it is one of {', '.join(ROLES)}")
    given = fields.pop("extra", None)
    if given is not None:
        extra_path = _field(path, "extra")
        if not isinstance(given, dict):
            _refuse(extra_path, f"must be a dict, not {_kind(given)}")
        _check_extra(extra_path, given)
        for key in given:
            if key in extra:
                _refuse((extra_path, key), "is given twice: here and as a key of the message")
        extra = given | extra
    return NewMessage(**fields, extra=extra or None)


def _check_extra(path: str, extra: dict[Any, Any]) -> None:
    for key in extra:
        if key in _RESERVED:
            _refuse((path, key), "is a field of the message itself and can't be an extra key")


def _is_role(value: object) -> bool:
    return type(value) is str and value in _ROLES


def check_message(path: str, message: NewMessage) -> None:
    """A message that can be stored. Errors name the field behind `path`, as `messages[3].content`; `content` for "".

    `created_at` must be a plain datetime in UTC, as `parse_message` makes it: what passes is stored as it is.
    """
    if (
        _is_clean(message.content)
        and _is_role(message.role)
        and message.name is None
        and message.tool_calls is None
        and message.tool_call_id is None
        and message.token_count is None
        and message.metadata is None
        and message.extra is None
        and message.id is None
        and message.created_at is None
    ):
        return
    _check_fields(path, message)


def _check_fields(path: str, message: NewMessage) -> None:
    if not _is_role(message.role):
        _refuse(_field(path, "role"), f"is unknown; it is one of {', '.join(ROLES)}")
    if message.content is not None:
        _check_content(_field(path, "content"), message.content)
    if message.name is not None:
        check_label(_field(path, "name"), message.name)
    if message.tool_calls is not None:
        _check_tool_calls(_field(path, "tool_calls"), message.tool_calls)
    if message.tool_call_id is not None:
        check_label(_field(path, "tool_call_id"), message.tool_call_id)
    if message.token_count is not None:
        _check_int(_field(path, "token_count"), message.token_count, 0, TOKEN_COUNT_MAX)
    if message.metadata is not None:
        _check_object(_field(path, "metadata"), message.metadata)
    if message.extra is not None:
        extra_path = _field(path, "extra")
        _check_extra(extra_path, _check_object(extra_path, message.extra))
    if message.id is not None:
        check_id(_field(path, "id"), message.id)
    if message.created_at is not None:
        time_path = _field(path, "created_at")
        if check_time(time_path, message.created_at) is not message.created_at:
            _refuse(time_path, "must be a plain datetime in UTC; parse_message makes it one")


def _check_content(path: str, content: object) -> None:
    if isinstance(content, list):
        _check_container(path, content)
        for index, part in enumerate(content):
            if not isinstance(part, dict):
                _refuse((path, index), f"must be a content part, which is a dict, not {_kind(part)}")
    elif type(content) is str:
        _check_characters(path, content)
    else:
        _refuse(path, f"must be a str, a list of content parts or None, not {_kind(content)}")


def _check_tool_calls(path: str, tool_calls: object) -> None:
    if not isinstance(tool_calls, list):
        _refuse(path, f"must be a list of tool calls or None, not {_kind(tool_calls)}")
    for index, call in enumerate(tool_calls):
        if not isinstance(call, dict):
            _refuse((path, index), f"must be a tool call, which is a dict, not {_kind(call)}")
        call_id = dict.get(call, "id", _MISSING)
        if call_id is _MISSING:
            _refuse(((path, index), "id"), "is missing; results are matched to calls by it")
        if not (_is_clean(call_id) and 0 < len(call_id) <= ID_CHARS_MAX):
            check_label(f"{path}[{index}].id", call_id)
    _check_container(path, tool_calls)


# --- idempotency ------------------------------------------------------------------------------------------------------


def body_hash(route: str, arguments: object) -> str:
    """What tells whether two calls with one idempotency key are the same call: the SHA-256, in hex, of both as JSON.

    The JSON is canonical for values that passed the checks: sorted keys, no spaces, shortest number forms. So the order
    of keys makes no difference, whereas 1 and 1.0 are different. Hashes are stored: the encoding may not change.
    """
    return sha256(_encode_sorted([route, arguments])).hexdigest()
