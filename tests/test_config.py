"""The configuration: what is accepted, what is refused, and that every refusal says where and what to do."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import pickle
import re
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from agent_runtime.config import Config, config_schema, known_keys, redact_url
from agent_runtime.errors import ConfigError
from agent_runtime.sources import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
API_DEFAULTS: dict[str, dict[str, Any]] = {
    "storage": {"url": "sqlite:///data/agent_runtime.db", "options": {}, "read_timeout_s": 30.0},
    "journal": {
        "enabled": True,
        "directory": None,
        "sync_interval_s": 1.0,
        "segment_bytes": 67108864,
        "retain_s": 0,
    },
    "write_behind": {
        "durability": "journaled",
        "interval_s": 5.0,
        "batch_changes": 1000,
        "pending_bytes_max": 67108864,
        "append_timeout_s": 5.0,
        "durability_timeout_s": 30.0,
        "drain_timeout_s": 30.0,
        "quarantine_max": 10,
        "quarantine_window_s": 60.0,
    },
    "residents": {"bytes_max": 268435456, "tail_messages": 200},
    "lease": {"duration_s": 10.0, "unreachable": "continue", "wait": False},
    "retention": {"max_idle": None, "sweep_interval_s": 3600},
    "http": {
        "host": "127.0.0.1",
        "port": 8001,
        "body_bytes_max": 1048576,
        "tokens": [],
        "tokens_file": None,
        "origins": [],
        "insecure": False,
    },
    "logging": {"level": "INFO", "format": "text"},
    "plugins": {"disabled": [], "config": {}},
}


def variable(key: str) -> str:
    return "AGENT_RUNTIME__" + key.replace(".", "__").upper()


def value_at(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return config.shown()[section][name] if key != "http.tokens" else [*config.http.tokens]


def write(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "file.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def problems(file: Path | None = None, environ: dict[str, str] | None = None, **overrides: object) -> list[str]:
    """The lines of the ConfigError, with the directory of the file taken off."""
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    with pytest.raises(ConfigError) as caught:
        load_config(file, environ=environ or {}, overrides=keys)
    assert all("\n" not in line for line in caught.value.problems)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [line.replace(f"{file.parent}/", "") if file else line for line in caught.value.problems]


# -- defaults and precedence ------------------------------------------------------------------------------------------


def test_defaults() -> None:
    config = load_config(environ={})
    assert config.shown() == API_DEFAULTS
    assert config == Config() == Config.of()
    assert {config.origin(key) for key in known_keys()} == {"default"}


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "storage:\nwrite_behind:\n  # interval_s: 1\n"])
def test_an_empty_file_means_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path, text), environ={}) == Config()


def test_every_default_may_be_written_down(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, yaml.safe_dump(API_DEFAULTS)), environ={}) == Config()
    assert load_config(environ={variable(key): _as_text(value_at(Config(), key)) for key in known_keys()}) == Config()


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


SETTABLE: dict[str, tuple[object, object, object]] = {
    "storage.url": ("memory:", "sqlite:///a.db", "sqlite:///b.db"),
    "storage.options": ({"a": 1}, {"b": [True]}, {}),
    "storage.read_timeout_s": (1, 2.5, 60),
    "journal.enabled": (False, True, False),
    "journal.directory": ("a", "b", "c"),
    "journal.sync_interval_s": (0.5, 2, 3.5),
    "journal.segment_bytes": (4096, 4097, 10**12),
    "journal.retain_s": (1, 2.5, 0),
    "write_behind.durability": ("stored", "buffered", "stored"),
    "write_behind.interval_s": (0.5, 2, 3.5),
    "write_behind.batch_changes": (1, 2, 3),
    "write_behind.pending_bytes_max": (65536, 65537, 10**12),
    "write_behind.append_timeout_s": (1, 2, 3),
    "write_behind.durability_timeout_s": (1, 2, 3),
    "write_behind.drain_timeout_s": (1, 2, 3),
    "write_behind.quarantine_max": (1, 2, 3),
    "write_behind.quarantine_window_s": (1, 2, 3),
    "residents.bytes_max": (65536, 65537, 65538),
    "residents.tail_messages": (1, 2, 3),
    "lease.duration_s": (1, 2.5, 60),
    "lease.unreachable": ("continue", "refuse", "continue"),
    "lease.wait": (True, False, True),
    "retention.max_idle": ("30d", "1d12h", "90s"),
    "retention.sweep_interval_s": (1, 2.5, 60),
    "http.host": ("::1", "localhost", "10.0.0.1"),
    "http.port": (0, 1, 65535),
    "http.body_bytes_max": (1024, 2048, 10**9),
    "http.tokens": ([f"sha256:{'a' * 64}"], [f"sha256:{'b' * 64}"], [f"sha256:{'c' * 64}"] * 2),
    "http.tokens_file": ("a", "b", "c"),
    "http.origins": (["https://a"], ["http://b:1", "https://c.d"], []),
    "http.insecure": (True, False, True),
    "logging.level": ("DEBUG", "WARNING", "ERROR"),
    "logging.format": ("json", "text", "json"),
    "plugins.disabled": (["a"], ["b", "c"], []),
    "plugins.config": ({"a": {"x": 1}}, {"b": {}}, {"c": 1}),
}


def test_every_key_can_be_set() -> None:
    assert sorted(SETTABLE) == sorted(known_keys())


@pytest.mark.parametrize("key", SETTABLE)
def test_options_win_over_the_environment_over_the_file(tmp_path: Path, key: str) -> None:
    in_file, in_environment, in_option = SETTABLE[key]
    section, name = key.split(".")
    file = write(tmp_path, f"# a comment\n{section}:\n  {name}: {json.dumps(in_file)}\n")
    environ = {variable(key): _as_text(in_environment)}

    config = load_config(file, environ={})
    assert (value_at(config, key), config.origin(key)) == (in_file, f"{file}:3")
    config = load_config(file, environ=environ)
    assert (value_at(config, key), config.origin(key)) == (in_environment, variable(key))
    config = load_config(file, environ=environ, overrides={key: in_option})
    assert (value_at(config, key), config.origin(key)) == (in_option, "option")
    assert [other for other in known_keys() if config.origin(other) != "default"] == [key]


def test_what_is_not_named_keeps_its_default_beside_what_is(tmp_path: Path) -> None:
    file = write(tmp_path, "write_behind: {interval_s: 1}\n")
    config = load_config(file, environ={variable("write_behind.batch_changes"): "7"})
    assert (config.write_behind.interval_s, config.write_behind.batch_changes) == (1.0, 7)
    assert config.write_behind.append_timeout_s == 5.0


def test_the_environment_is_os_environ_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_RUNTIME__RESIDENTS__TAIL_MESSAGES", "17")
    assert load_config().residents.tail_messages == 17


# -- the object -------------------------------------------------------------------------------------------------------


def test_it_is_frozen() -> None:
    config = Config.of("memory:", plugins={"disabled": ["a"]}, storage={"options": (given_options := {"a": 1})})
    with pytest.raises(ValidationError):
        config.storage = Config().storage
    with pytest.raises(ValidationError):
        config.storage.url = "other:"
    assert config.plugins.disabled == ("a",)
    given_options["a"] = 2
    assert config.storage.options == {"a": 1}


def test_equality_is_of_values_and_copies_keep_origins(tmp_path: Path) -> None:
    file = write(tmp_path, "storage: {url: 'memory:'}")
    config = load_config(file, environ={})
    assert config == Config.of("memory:") == load_config(environ={"AGENT_RUNTIME__DB_URL": "memory:"})
    assert config != Config()
    assert config != "memory:"
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert twin.origin("storage.url") == f"{file}:1"
    assert "_origins" not in config.model_dump_json()


def test_from_python() -> None:
    direct = Config.model_validate({"storage": {"url": "memory:"}})
    assert direct == Config.of("memory:")
    assert direct.origin("storage.url") == Config.of("memory:").origin("storage.url") == "option"
    assert direct.origin("storage.options") == "default"
    assert Config.of(write_behind={"interval_s": 1}).write_behind.interval_s == 1.0
    with pytest.raises(ConfigError) as caught:
        Config.of("", write_behind={"intervall_s": 1, "interval_s": "1"})
    assert caught.value.problems == (
        "write_behind.intervall_s: unknown key; did you mean interval_s?",
        "storage.url: must not be empty",
        "write_behind.interval_s: must be a number, not text",
    )
    with pytest.raises(ConfigError, match=r"storage\.urll: unknown key; did you mean url\?"):
        direct.origin("storage.urll")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write_behind:\n  intervall_s: 1", "2: write_behind.intervall_s: unknown key; did you mean interval_s?"),
        ("\nwritebehind: {}", "2: writebehind: unknown key; did you mean write_behind?"),
        ("interval_s: 3", "1: interval_s: unknown key; did you mean write_behind.interval_s?"),
        ("lease: {tail_messages: 3}", "1: lease.tail_messages: unknown key; did you mean residents.tail_messages?"),
        ("lease: {xyzzy: 3}", "1: lease.xyzzy: unknown key; there are: duration_s, unreachable, wait"),
        ("lease: 5", "1: lease: must be a mapping of keys (duration_s, unreachable, wait)"),
        ("lease: [a]", "1: lease: must be a mapping of keys (duration_s, unreachable, wait)"),
        ('write_behind: {interval_s: "5"}', "1: write_behind.interval_s: must be a number, not text"),
        ("write_behind: {interval_s: true}", "1: write_behind.interval_s: must be a number, not true or false"),
        ("write_behind: {interval_s: 0}", "1: write_behind.interval_s: must be greater than 0"),
        ("write_behind: {interval_s: .inf}", "1: write_behind.interval_s: must be a finite number"),
        ("write_behind: {interval_s: .nan}", "1: write_behind.interval_s: must be a finite number"),
        ("write_behind: {batch_changes: 5.0}", "1: write_behind.batch_changes: must be a whole number, not a fraction"),
        ("write_behind: {batch_changes: 0}", "1: write_behind.batch_changes: must be greater than or equal to 1"),
        (
            "write_behind: {pending_bytes_max: 65535}",
            "1: write_behind.pending_bytes_max: must be greater than or equal to 65536",
        ),
        ("residents: {bytes_max: 65535}", "1: residents.bytes_max: must be greater than or equal to 65536"),
        ("residents: {tail_messages: 0}", "1: residents.tail_messages: must be greater than or equal to 1"),
        ("lease: {duration_s: 0.9}", "1: lease.duration_s: must be greater than or equal to 1"),
        ("storage: {url: null}", "1: storage.url: must be text, not null"),
        ("storage: {url: ''}", "1: storage.url: must not be empty"),
        ('storage: {url: "memory:\\n"}', "1: storage.url: must not hold control characters"),
        ("storage: {options: [1]}", "1: storage.options: must be a mapping, not a list"),
        ("journal: {enabled: 1}", "1: journal.enabled: must be true or false"),
        ("journal: {directory: ''}", "1: journal.directory: must not be empty"),
        ("journal: {segment_bytes: 4095}", "1: journal.segment_bytes: must be greater than or equal to 4096"),
        (
            "write_behind: {durability: safe}",
            "1: write_behind.durability: must be 'buffered', 'journaled', 'synced' or 'stored'",
        ),
        ("logging: {level: LOUD}", "1: logging.level: must be 'DEBUG', 'INFO', 'WARNING', 'ERROR' or 'CRITICAL'"),
        ("logging: {format: xml}", "1: logging.format: must be 'text' or 'json'"),
        ("plugins: {disabled: http}", "1: plugins.disabled: must be a list, as in [a, b], not text"),
        ("plugins:\n  disabled:\n    - a\n    - 5", "2: plugins.disabled[1]: must be text"),
    ],
)  # fmt: skip
def test_faults_in_a_file(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(write(tmp_path, text)) == [f"file.yaml:{expected}"]


@pytest.mark.parametrize("level", ["journaled", "synced"])
def test_a_level_that_needs_the_journal_is_refused_without_one(tmp_path: Path, level: str) -> None:
    file = write(tmp_path, f"journal: {{enabled: false}}\nwrite_behind: {{durability: {level}}}\n")
    refusal = f"write_behind.durability: {level} needs the journal, which is off: use buffered or stored"
    assert problems(file) == [f"file.yaml:2: {refusal}"]
    assert load_config(file, environ={"AGENT_RUNTIME__JOURNAL__ENABLED": "true"}).write_behind.durability == level
    assert problems(None, {"AGENT_RUNTIME__WRITE_BEHIND__DURABILITY": level}, journal__enabled=False) == [
        f"AGENT_RUNTIME__WRITE_BEHIND__DURABILITY: {refusal.partition(': ')[2]}"
    ]
    assert load_config(environ={"AGENT_RUNTIME__JOURNAL__ENABLED": "false"}).write_behind.durability == "journaled"


def test_all_faults_of_all_sources_come_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "storage: {urll: a}\nwrite_behind:\n  interval_s: -1\nwrite_behind:\n  interval_s: a\n")
    environ = {"AGENT_RUNTIME__FOO__BAR": "1", "AGENT_RUNTIME__LEASE__DURATION_S": "soon", "LOG_LEVEL": "LOUD"}
    sections = ", ".join(API_DEFAULTS)
    assert problems(file, environ, residents__tail_messages="5", nonsense=1) == [
        "file.yaml:4: write_behind: stands in line 2 already; remove one",
        f"AGENT_RUNTIME__FOO__BAR: unknown variable; the sections are {sections}",
        "AGENT_RUNTIME__LEASE__DURATION_S: must be a valid number, unable to parse string as a number",
        "file.yaml:1: storage.urll: unknown key; did you mean url?",
        f"option nonsense: unknown key; there are: {sections}",
        "file.yaml:5: write_behind.interval_s: must be a number, not text",
        "option residents.tail_messages: must be a whole number, not text",
        "LOG_LEVEL: must be 'DEBUG', 'INFO', 'WARNING', 'ERROR' or 'CRITICAL'",
    ]


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_or_is_a_directory(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert problems(missing) == ["missing.yaml: can't be read: No such file or directory"]
    assert problems(tmp_path) == [f"{tmp_path.name}: can't be read: Is a directory"]


LAUGHS = "storage:\n  options:\n    l0: &l0 [a, a, a, a, a, a, a, a, a, a]\n" + "".join(
    f"    l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 40)
)
MERGED_LAUGHS = "storage:\n  options:\n    l0: &l0 {a: 1}\n" + "".join(
    f"    l{n}: &l{n}\n      <<: [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 40)
)
BOUNDS = "1: holds over 10000 values, aliases followed, or over 50 levels"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a]", ["1: must be a mapping of sections, as in storage: {url: …}"]),
        ("text", ["1: must be a mapping of sections, as in storage: {url: …}"]),
        ("lease:\n  wait: [", ["2: is not YAML: expected the node content, but found '<stream end>'"]),
        ("lease:\n\twait: 1", ["2: is not YAML: found character '\\t' that cannot start any token"]),
        ("a: b: c", ["1: is not YAML: mapping values are not allowed here"]),
        ("lease: {}\n---\nlease: {}", ["2: is not YAML: but found another document"]),
        ("lease: {}\na: \x00", ["2: is not YAML: it holds the character U+0000"]),
        (b"lease: {}\n# \xff", ["2: is not UTF-8 text"]),
        ("? [a]\n: b", ["1: a key must be text"]),
        ("lease:\n  duration_s: 1\n  duration_s: 2", ["3: lease.duration_s: stands in line 2 already; remove one"]),
        (
            "plugins: {config: {a: {b: 1, b: 1}}}",
            ["1: plugins.config.a.b: stands in line 1 already; remove one"],
        ),
        (
            "plugins:\n  config: !!python/object/apply:os.system [echo]",
            [
                "2: tags are not accepted; quote a text that begins with !",
                "2: plugins.config: must be a mapping, not a list",
            ],
        ),
        ("storage: {options: {a: !!bool x}}", ["1: tags are not accepted; quote a text that begins with !"]),
        ("storage: {options: {!mine a: 1}}", ["1: tags are not accepted; quote a text that begins with !"]),
        (f"residents: {{tail_messages: {'9' * 5000}}}", ["1: can't be read as a value; quote it if it is text"]),
        ("storage: {options: {<<: 5}}", [
            "1: is not YAML: expected a mapping or list of mappings for merging, but found scalar"
        ]),
        ("storage: {options: {a: &a [*a]}}", [BOUNDS]),
        ("storage: {options: &a {a: *a}}", [BOUNDS]),
        (LAUGHS, [BOUNDS]),
        (MERGED_LAUGHS, [BOUNDS]),
        (f"storage: {{options: {{a: {'[' * 60}{']' * 60}}}}}", [BOUNDS]),
        ("[" * 5000, ["1: is nested too deeply"]),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_yaml_that_is_refused(tmp_path: Path, text: str | bytes, expected: list[str]) -> None:
    assert problems(write(tmp_path, text)) == [f"file.yaml:{line}" for line in expected]


def test_yaml_that_is_accepted(tmp_path: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            "\ufeffstorage:\n  url: 'memory:'\n  options: &o {day: 2024-99-99, '5': !!str 5}\n"
            "plugins: {config: {a: *o, b: {<<: *o, day: x}}}\nresidents: {<<: {tail_messages: 9}, bytes_max: 70000}\n",
        ),
        environ={"AGENT_RUNTIME__STORAGE__OPTIONS__MORE": "1"},
    )
    assert config.storage.options == {"day": "2024-99-99", "5": "5", "more": 1}
    assert config.plugins.config == {"a": {"day": "2024-99-99", "5": "5"}, "b": {"day": "x", "5": "5"}}
    assert (config.residents.tail_messages, config.residents.bytes_max) == (9, 70000)


@given(
    st.one_of(
        st.text(alphabet="ab:{}[]&*!<>|-'\"\n \t#?,.1", max_size=40),
        st.text(max_size=40),
        st.binary(max_size=40),
    )
)
@example("a: &a {<<: *a}")
@example("=")
@example("storage: {options: {a: 0x_}}")
@example("storage: {options: {a: 1:}}")
def test_any_file_is_read_or_refused_in_clear_lines(
    tmp_path_factory: pytest.TempPathFactory, text: str | bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    for content in (text, f"storage: {{options: {{a: {text!s}}}}}"):
        file.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
        try:
            json.dumps(load_config(file, environ={}).shown())
        except ConfigError as error:
            for line in error.problems:
                assert re.match(rf"{re.escape(str(file))}:\d+: ", line)


# -- the environment --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {"AGENT_RUNTIME__WRITE_BEHIND__INTERVALL_S": "1"},
            "unknown variable; did you mean AGENT_RUNTIME__WRITE_BEHIND__INTERVAL_S?",
        ),
        ({"AGENT_RUNTIME__DBURL": ""}, "unknown variable; did you mean AGENT_RUNTIME__DB_URL?"),
        ({"AGENT_RUNTIME__LOG_LEVEL": "INFO"}, "unknown variable; did you mean AGENT_RUNTIME__LOGGING__LEVEL?"),
        ({"AGENT_RUNTIME__LOGGING__LEVEL__X": "1"}, "unknown variable; did you mean AGENT_RUNTIME__LOGGING__LEVEL?"),
        ({"AGENT_RUNTIME__STORAGE__OPTIONS__": "1"}, "unknown variable; did you mean AGENT_RUNTIME__STORAGE__OPTIONS?"),
        (
            {"AGENT_RUNTIME__WRITE_BEHIND__BATCH_CHANGES": "1.5"},
            "must be a valid integer, unable to parse string as an integer",
        ),
        ({"AGENT_RUNTIME__WRITE_BEHIND__INTERVAL_S": "nan"}, "must be a finite number"),
        ({"AGENT_RUNTIME__WRITE_BEHIND__INTERVAL_S": "-1"}, "must be greater than 0"),
        ({"AGENT_RUNTIME__JOURNAL__ENABLED": "perhaps"}, "must be a valid boolean, unable to interpret input"),
        ({"AGENT_RUNTIME__PLUGINS__DISABLED": "http"}, "must be a list, as in [a, b], not text"),
        ({"AGENT_RUNTIME__PLUGINS__CONFIG": "[1, 2]"}, "must be a mapping, not a list"),
        (
            {"AGENT_RUNTIME__HTTP__TOKENS": "[good, hunter 2]"},
            "[1]: must be a token (letters, digits and -._~+/, then perhaps =) or sha256: and its SHA-256 in hex",
        ),
        (
            {"AGENT_RUNTIME__HTTP__TOKENS": "[sha256:hunter2]"},
            "[0]: must have 64 hexadecimal digits after sha256:",
        ),
        (
            {"AGENT_RUNTIME__HTTP__ORIGINS": "[https://a.example/]"},
            "[0]: must be an origin, such as https://console.example.com",
        ),
        (
            {"AGENT_RUNTIME__PLUGINS__CONFIG": "{a: *secret}"},
            "is not YAML: found undefined alias …",
        ),
        (
            {"AGENT_RUNTIME__PLUGINS__CONFIG": "a: !!bool x"},
            "tags are not accepted; quote a text that begins with !",
        ),
        (
            {"AGENT_RUNTIME__DB_URL": "a:", "AGENT_RUNTIME__STORAGE__URL": "b:"},
            "differs from AGENT_RUNTIME__STORAGE__URL, of which it is another name; unset one of them",
        ),
        (
            {"AGENT_RUNTIME__STORAGE__URL": "a:\udcff"},
            "must be text in UTF-8",
        ),
    ],
)
def test_faults_in_the_environment(environ: dict[str, str], expected: str) -> None:
    place = "" if expected.startswith("[") else ": "
    assert problems(environ=environ) == [f"{next(iter(environ))}{place}{expected}"]


def test_of_a_token_nothing_is_kept_but_its_hash(tmp_path: Path) -> None:
    found = hashlib.sha256(b"hunter2").hexdigest()
    digest = f"sha256:{found}"
    given: tuple[Config, ...] = (
        load_config(write(tmp_path, "http: {tokens: [hunter2]}"), environ={}),
        load_config(environ={"AGENT_RUNTIME__HTTP__TOKENS": '["hunter2"]'}),
        Config.of(http={"tokens": ["hunter2"]}),
        Config.of(http={"tokens": [f"sha256:{found.upper()}"]}),
    )
    for config in given:
        assert config.http.tokens == (digest,)
        assert b"hunter2" not in pickle.dumps(config)
        assert digest not in repr(config) + str(config.shown())


def test_names_in_any_case_but_only_once() -> None:
    name = "Agent_Runtime__Residents__tail_Messages"
    config = load_config(environ={name: "3"})
    assert (config.residents.tail_messages, config.origin("residents.tail_messages")) == (3, name)
    assert problems(environ={name: "3", name.upper(): "4"}) == [
        f"{name.upper()}: is set already, as {name}; unset one of them"
    ]


def test_db_url_is_an_alias() -> None:
    config = load_config(environ={"AGENT_RUNTIME__DB_URL": "memory:"})
    assert (config.storage.url, config.origin("storage.url")) == ("memory:", "AGENT_RUNTIME__DB_URL")
    twice = {"AGENT_RUNTIME__DB_URL": "memory:", "AGENT_RUNTIME__STORAGE__URL": "memory:"}
    assert load_config(environ=twice).storage.url == "memory:"


def test_log_level_gives_way_to_our_own_name() -> None:
    assert load_config(environ={"LOG_LEVEL": "debug"}).logging.level == "DEBUG"
    both = {"LOG_LEVEL": "debug", "AGENT_RUNTIME__LOGGING__LEVEL": "error"}
    assert load_config(environ=both).logging.level == "ERROR"


def test_an_empty_variable_is_not_set() -> None:
    assert load_config(environ={variable(key): "" for key in known_keys()} | {"LOG_LEVEL": ""}) == Config()


def test_null_means_null_only_where_null_may_be() -> None:
    assert load_config(environ={"AGENT_RUNTIME__JOURNAL__DIRECTORY": "null"}) == Config()
    assert load_config(environ={"AGENT_RUNTIME__STORAGE__URL": "null"}).storage.url == "null"


def test_members_of_free_mappings(tmp_path: Path) -> None:
    file = write(tmp_path, "storage: {options: {a: 1, b: {c: 1, d: 2}}}")
    environ = {
        "AGENT_RUNTIME__STORAGE__OPTIONS__A": "2",
        "AGENT_RUNTIME__STORAGE__OPTIONS__B__C": "*not: yaml",
        "AGENT_RUNTIME__PLUGINS__CONFIG": '{"m": {"port": 1, "face": "\\ud83d\\ude00"}}',
        "AGENT_RUNTIME__PLUGINS__CONFIG__M__PORT": "[true]",
    }
    config = load_config(file, environ=environ, overrides={"storage.options.e": None})
    assert config.storage.options == {"a": 2, "b": {"c": "*not: yaml", "d": 2}, "e": None}
    assert config.plugins.config == {"m": {"port": [True], "face": "\U0001f600"}}
    assert config.origin("storage.options") == f"{file}:1"
    assert config.origin("storage.options.b.c") == "AGENT_RUNTIME__STORAGE__OPTIONS__B__C"
    # The whole mapping from the environment replaces the file's.
    assert load_config(file, environ={"AGENT_RUNTIME__STORAGE__OPTIONS": "z: 1"}).storage.options == {"z": 1}


OLD = {"LLM_PROXY_URL": "http://u:hunter2@proxy", "GATEWAY_URL": "x", "LLM_MODEL": "x", "VERSION": "1"}


@pytest.mark.parametrize("sign", ["INTERNAL_API_KEY", "AGENT_RUNTIME__INTERNAL_API_KEY", "AGENT_RUNTIME__DB_URL"])
def test_the_old_service_still_starts_with_one_warning(caplog: pytest.LogCaptureFixture, sign: str) -> None:
    load_config(environ={**OLD, sign: "memory:"})
    [record] = caplog.records
    assert (record.name, record.levelno) == ("agent_runtime", logging.WARNING)
    assert record.getMessage().endswith("LLM_PROXY_URL, GATEWAY_URL, LLM_MODEL, VERSION")


def test_no_warning_without_a_sign_of_the_old_service(caplog: pytest.LogCaptureFixture) -> None:
    assert load_config(environ=OLD) == load_config(environ={"INTERNAL_API_KEY": "k"}) == Config()
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("AGENT_RUNTIME_STORAGE_URL", "AGENT_RUNTIME__STORAGE__URL"),
        ("AGENT_RUNTIME_WRITE_BEHIND__INTERVAL_S", "AGENT_RUNTIME__WRITE_BEHIND__INTERVAL_S"),
        ("agent_runtime_db_url", "AGENT_RUNTIME__DB_URL"),
    ],
)
def test_a_variable_with_single_underscores_is_told_of(caplog: pytest.LogCaptureFixture, name: str, meant: str) -> None:
    others = {"AGENT_RUNTIME_TOKEN": "hunter2", "AGENT_RUNTIME_SERVICE_HOST": "10.0.0.1", "AGENT_RUNTIME_HTTP_HOST": ""}
    assert load_config(environ={**others, name: "hunter2"}) == Config()
    [record] = caplog.records
    assert (record.name, record.levelno) == ("agent_runtime", logging.WARNING)
    assert record.getMessage() == f"{name} is not read: did you mean {meant}?"


# -- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///data/a.db", "sqlite:///data/a.db"),
        ("sqlite:///data/a:b@c.db", "sqlite:///data/a:b@c.db"),
        ("memory:", "memory:"),
        ("postgresql://host:5432/db", "postgresql://host:5432/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("postgresql+asyncpg://me:hunter2@host:5432/db", "postgresql+asyncpg://me:***@host:5432/db"),
        ("postgres://me:hun/te@r2?#@host/db", "postgres://me:***@host/db"),
        ("postgres:me:hunter2@host/db", "postgres:me:***@host/db"),
        ("postgres://host/db?sslpassword=hunter2&user=me", "postgres://host/db?sslpassword=***&user=me"),
        ("host=h password=hunter2 user=me", "host=h password=*** user=me"),
    ],
)
def test_redact_url(url: str, shown: str) -> None:
    assert redact_url(url) == shown


@given(st.text(min_size=12).filter(lambda text: not text.isspace()))
def test_whatever_the_password_it_is_not_shown(password: str) -> None:
    assert redact_url(f"postgresql://me:{password}@host/db") == "postgresql://me:***@host/db"


def test_nothing_shows_a_secret(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "storage:\n  url: postgresql://me:hunter2@host/db\n"
        "  options: {password: hunter2, ssl: {private_key: hunter2}, tail: {token_count: 5}}\n"
        "plugins: {config: {m: {urls: ['x://me:hunter2@h'], tokens: [hunter2]}}}",
    )
    config = load_config(file, environ={})
    assert config.storage.url == "postgresql://me:hunter2@host/db"
    for text in (repr(config), str(config), repr(config.storage), json.dumps(config.shown())):
        assert "hunter2" not in text
        assert "***" in text
    assert config.shown()["storage"] == {
        "url": "postgresql://me:***@host/db",
        "options": {"password": "***", "ssl": {"private_key": "***"}, "tail": {"token_count": 5}},
        "read_timeout_s": 30.0,
    }


HIDING = """
password PGPASSWORD passwords passwd passphrase secret client_secret secrets token bearer_tokens credential credentials
api_key api_keys apikey x-api-key access_key private_key secret_key signing_key signing-keys
"""


@pytest.mark.parametrize("name", HIDING.split())
def test_what_such_names_hold_is_not_shown(name: str) -> None:
    for value in ("hunter2", ["hunter2"], {"inner": "hunter2"}):
        config = Config.of("memory:", storage={"options": {name: value}}, plugins={"config": {"mine": {name: value}}})
        assert "hunter2" not in json.dumps(config.shown()) + repr(config)


@pytest.mark.parametrize("name", ["passwd", "password", "secret", "token", "apikey", "api_key", "TOKEN", "x_secret"])
def test_what_such_parameters_hold_is_not_shown(name: str) -> None:
    assert redact_url(f"x://h/d?a=1&{name}=hunter2&b=2") == f"x://h/d?a=1&{name}=***&b=2"


def refusal(file: Path | None, environ: dict[str, str]) -> ConfigError | None:
    try:
        load_config(file, environ=environ)
    except ConfigError as error:
        return error
    return None


SECRETS = ["hunter2", "[hunter2]", "{hunter2: hunter2}", "*hunter2", "!hunter2 x", "&hunter2 !!int a", "'hunter2'"]


@pytest.mark.parametrize("key", known_keys())
def test_no_message_repeats_a_value(tmp_path: Path, key: str) -> None:
    section, name = key.split(".")
    for value in SECRETS:
        in_file = refusal(write(tmp_path, f"{section}: {{{name}: {value}}}"), {})
        in_environment = refusal(None, {variable(key): value})
        for error in filter(None, (in_file, in_environment)):
            assert "hunter2" not in "".join(traceback.format_exception(error))
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({section: {name: {5: "hunter2"}, "unknown": "hunter2"}})
    assert "hunter2" not in str(caught.value)


# -- schema and documents ---------------------------------------------------------------------------------------------


def test_the_schema_describes_every_key() -> None:
    schema = json.loads(json.dumps(config_schema()))
    for key in known_keys():
        section, name = key.split(".")
        field = schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]["properties"][name]
        assert field["description"].endswith(".")
        assert "const" not in field
        if "default" in field:
            assert field["default"] == API_DEFAULTS[section][name]
    assert schema["additionalProperties"] is False
    assert known_keys() == [f"{section}.{name}" for section, keys in API_DEFAULTS.items() for name in keys]


def test_the_readme_documents_every_key_with_default_and_variable() -> None:
    row = re.compile(
        r"^\| `(?P<key>[a-z_]+\.[a-z_]+)` \| (?P<meaning>.+) \| `(?P<default>.+)` \| `(?P<name>[A-Z_]+)` \|$"
    )
    rows = [found for line in (CONFIGS / "README.md").read_text().splitlines() if (found := row.match(line))]
    assert [found["key"] for found in rows] == known_keys()
    for found in rows:
        section, name = found["key"].split(".")
        kind = Config.model_fields[section].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        assert found["meaning"].startswith(str(kind.model_fields[name].description))
        assert yaml.safe_load(found["default"]) == API_DEFAULTS[section][name]
        assert found["name"] == variable(found["key"])


def test_the_example_is_accepted_and_so_is_what_is_commented_out() -> None:
    file = CONFIGS / "sqlite.yaml"
    config = load_config(file, environ={})
    assert config.storage.url.startswith("sqlite:///")
    assert config.write_behind.durability == "journaled"
    shown = re.sub(r"^( *)# (?=[a-z_]+: \S+$)", r"\1", file.read_text(), flags=re.MULTILINE)
    named = {f"{section}.{key}" for section, keys in yaml.safe_load(shown).items() for key in keys}
    assert named <= set(known_keys())
