"""What the tests of the public API share: databases that outlive the runtimes on them, and what to keep there."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, closing
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from agent_runtime import (
    BlockingRuntime,
    Config,
    Message,
    Runtime,
    SessionHandle,
    open_runtime,
    open_runtime_blocking,
)
from agent_runtime_memory import MemoryDatabase, MemoryPlugin
from postgres_server import migrated_schema, server, url_of

T = TypeVar("T")
Look: TypeAlias = Callable[[Runtime], Awaitable[T]]

NEVER_S = 1_000_000.0
KINDS = ("memory", "sqlite", "postgresql")
SHORT = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
numbers = st.integers() | st.integers(-(10**400), 10**400) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(texts, values, max_size=5)


class Place:
    """A database. Unless told otherwise a runtime on it stores nothing but on demand.

    `journal` is where its journal lies, if that is not the storage's to say; `path` the file and `schema` the schema
    that it is, if it is one.
    """

    def __init__(
        self,
        url: str,
        *plugins: object,
        path: Path | None = None,
        schema: str | None = None,
        journal: Path | None = None,
    ) -> None:
        self.url = url
        self._plugins = plugins
        self._path = path
        self._schema = schema
        self._journal = journal

    @property
    def path(self) -> Path:
        """The file, where it is one."""
        if self._path is None:
            raise ValueError(f"{self.url} is no file")
        return self._path

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """What a person finds who asks the database with plain SQL."""
        if self._schema is not None:
            return server().rows(sql, schema=self._schema)
        with closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(sql).fetchall()

    def config(self, **sections: dict[str, Any]) -> Config:
        defaults: dict[str, dict[str, Any]] = {"write_behind": {"interval_s": NEVER_S}, "lease": {"duration_s": 60.0}}
        if self._journal is not None:
            defaults["journal"] = {"directory": str(self._journal)}
        return Config.of(
            self.url, **{name: defaults.get(name, {}) | sections.get(name, {}) for name in defaults | sections}
        )

    def open(
        self, *, plugins: Iterable[object] = (), **sections: dict[str, Any]
    ) -> AbstractAsyncContextManager[Runtime]:
        return open_runtime(self.config(**sections), plugins=[*self._plugins, *plugins])

    def open_blocking(
        self, *, loop: Literal["asyncio", "trio"] = "asyncio", **sections: dict[str, Any]
    ) -> AbstractContextManager[BlockingRuntime]:
        return open_runtime_blocking(self.config(**sections), plugins=self._plugins, loop=loop)


def in_memory() -> Place:
    """A new database in memory."""
    return Place("shared:", MemoryPlugin(MemoryDatabase(), scheme="shared"))


def in_file(directory: Path) -> Place:
    """A new SQLite file, its tables made already: that takes longer than most tests."""
    path = directory / "sessions.db"
    path.write_bytes(_empty_file())
    return Place(f"sqlite:///{path}", path=path)


@cache
def _empty_file() -> bytes:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "empty.db"
        with open_runtime_blocking(f"sqlite:///{path}"):
            pass
        return path.read_bytes()


def in_schema(directory: Path) -> Place:
    """A new schema on the PostgreSQL server of this run; its journal lies in the directory."""
    schema = migrated_schema()
    return Place(url_of(schema), schema=schema, journal=directory / "journal")


def place_of(kind: str, directory: Path) -> Place:
    """A new database of one of KINDS."""
    if kind == "memory":
        return in_memory()
    return in_file(directory) if kind == "sqlite" else in_schema(directory)


def forget(runtime: Runtime) -> None:
    """Let go of all that is in memory and stored."""
    residents = runtime._residents
    bytes_max, residents.bytes_max = residents.bytes_max, 0
    residents._evict()
    residents.bytes_max = bytes_max
    assert residents.count == 0


def forget_what_is_stored(runtime: Runtime) -> None:
    """Where nothing is unstored, let the next read go to the database."""
    if runtime.watermarks.stored == runtime.watermarks.accepted:
        forget(runtime)


async def fill(session: SessionHandle, count: int) -> list[Message]:
    """Append that many messages."""
    return await session.append_many([{"role": "user", "content": f"message {number}"} for number in range(count)])


async def at_every_stage(place: Place, write: Callable[[Runtime], Awaitable[object]], look: Look[T]) -> T:
    """What `look` finds after `write`: the same unstored, stored, read from the database alone, and after a reopen."""
    async with place.open() as runtime:
        await write(runtime)
        found = await look(runtime)
        assert runtime.watermarks.stored == 0
        await runtime.flush()
        assert await look(runtime) == found
        forget(runtime)
        assert await look(runtime) == found
    async with place.open() as runtime:
        assert await look(runtime) == found
    return found


async def everything(session: SessionHandle, *collections: str) -> list[Any]:
    """All that a session shows, for comparing."""
    return [
        await session.record(),
        (await session.messages(limit=1000)).items,
        (await session.messages(limit=1000, order="desc")).items,
        await session.history(),
        msgspec.json.decode(await session.history_json()),
        await session.context(),
        await session.switches(),
        *[(await session.list_documents(collection)).items for collection in collections],
    ]


def place_fixture(kinds: tuple[str, ...] | None = None) -> Any:
    """A fixture that gives a new place of each kind; unless they are named, PostgreSQL's is left to the `long` run."""
    slow = pytest.param("postgresql", marks=pytest.mark.long)

    @pytest.fixture(params=kinds or [slow if kind == "postgresql" else kind for kind in KINDS])
    def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
        return place_of(request.param, tmp_path)

    return place
