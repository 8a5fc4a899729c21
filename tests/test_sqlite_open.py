"""Opening a SQLite file: the URL, the place, the state it is found in; each refusal is one line with a way out."""

from __future__ import annotations

import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

import agent_runtime_sql.schema
from agent_runtime.bridge import AsyncioBridge
from agent_runtime.errors import AgentRuntimeError, InvalidInput, StorageFatal, StorageUnavailable
from agent_runtime.filesystems import network_filesystem
from agent_runtime.storage import StorageConfig
from agent_runtime.testing.kit.writer import claim, writing
from agent_runtime_sql.tables import metadata
from agent_runtime_sqlite import agent_runtime_storages, engine, open_sqlite
from agent_runtime_sqlite.settings import Settings, parse_settings
from agent_runtime_sqlite.storage import open_storage

pytestmark = pytest.mark.anyio


def config(path: Path, **options: Any) -> StorageConfig:
    return StorageConfig(url=f"sqlite:///{path}", options=options)


async def refusal(storage_config: StorageConfig, **wired: Any) -> AgentRuntimeError:
    """The error of opening: one line."""
    with pytest.raises(AgentRuntimeError) as caught:
        async with open_storage(storage_config, **wired):
            pass
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "agent_runtime.db"


# The URL and the options


@pytest.mark.parametrize("scheme", agent_runtime_storages())
def test_urls(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_settings(StorageConfig(url=f"{scheme}:///a/b.db")) == Settings(path=tmp_path / "a" / "b.db")
    assert parse_settings(StorageConfig(url=f"{scheme}:////a/b?readers=2&busy_timeout_s=0.5")) == Settings(
        path=Path("/a/b"), readers=2, busy_timeout_s=0.5
    )
    given = StorageConfig(url=f"{scheme}:////a/b?readers=2", options={"readers": 4, "busy_timeout_s": 1})
    assert parse_settings(given) == Settings(path=Path("/a/b"), readers=4, busy_timeout_s=1.0)


@pytest.mark.parametrize(
    ("url", "options", "path", "hint"),
    [
        ("sqlite://", {}, "storage.url", "memory:"),
        ("sqlite:///", {}, "storage.url", "memory:"),
        ("sqlite:///:memory:", {}, "storage.url", "memory:"),
        ("sqlite:///file::memory:?uri=true", {}, "storage.url", "memory:"),
        ("sqlite:///file:x.db", {}, "storage.url", "sqlite:///relative.db"),
        ("sqlite:///a\0b", {}, "storage.url", "sqlite:///relative.db"),
        ("sqlite://x.db", {}, "storage.url", "sqlite:///relative.db"),
        ("sqlite://me:secret@there/x.db", {}, "storage.url", "no host"),
        ("sqlite://there:port/x.db", {}, "storage.url", "sqlite:///relative.db"),
        ("sqlite:///x.db?mode=ro", {}, "storage.url.mode", "nearest is readers"),
        ("sqlite:///x.db?reader=1", {}, "storage.url.reader", "nearest is readers"),
        ("sqlite:///x.db?readers=many", {}, "storage.url.readers", "int"),
        ("sqlite:///x.db", {"busy_timeout": 1}, "storage.options.busy_timeout", "nearest is busy_timeout_s"),
        ("sqlite:///x.db", {"busy_timeout_s": 0}, "storage.options.busy_timeout_s", "> 0"),
        ("sqlite:///x.db", {"readers": 0}, "storage.options.readers", ">= 1"),
        ("sqlite:///x.db", {"readers": "3"}, "storage.options.readers", "int"),
        ("sqlite:///x.db", {"path": "/elsewhere"}, "storage.options.path", "nearest is"),
    ],
)
async def test_urls_and_options_that_are_refused(url: str, options: dict[str, Any], path: str, hint: str) -> None:
    error = await refusal(StorageConfig(url=url, options=options))
    assert isinstance(error, InvalidInput)
    assert (error.path, hint in error.problem) == (path, True)
    assert "secret" not in str(error)


# The place


async def test_a_new_file_is_for_its_owner_and_its_directory_is_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "directory" / "agent_runtime.db"
    async with open_sqlite(config(file)) as storage:
        await storage.leases.acquire(claim())
        made = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()}
    assert made == dict.fromkeys(("agent_runtime.db", "agent_runtime.db-wal", "agent_runtime.db-shm"), 0o600)
    assert [path.name for path in file.parent.iterdir()] == ["agent_runtime.db"]


async def test_closing_leaves_the_whole_database_in_its_file(file: Path) -> None:
    """Also while another program has it open, which keeps SQLite from doing so by itself."""
    with closing(sqlite3.connect(file)) as other:
        async with writing(lambda: open_sqlite(config(file))) as writer:
            other.execute("SELECT * FROM sessions").fetchall()
            await writer.create("a")
            assert file.with_name(f"{file.name}-wal").stat().st_size > 0
        assert file.with_name(f"{file.name}-wal").stat().st_size == 0


async def test_a_name_that_means_something_in_a_uri(tmp_path: Path) -> None:
    file = tmp_path / "50% off & co #1 ü.db"
    async with open_sqlite(config(file)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


async def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    for path in (tmp_path / "directory", tmp_path / "file" / "x.db", Path("/proc/x.db"), Path("/proc/x/y.db")):
        error = await refusal(config(path))
        assert isinstance(error, StorageFatal)
        assert str(path) in str(error)
        assert ": name a file" in str(error) or ": choose a path" in str(error)


async def test_a_file_that_may_not_be_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen by a user other than root, whom modes don't bind."""
    async with open_sqlite(config(file)):
        pass
    for refused in (file, file.parent):
        monkeypatch.setattr("os.access", lambda path, mode, refused=refused: path != refused)
        error = await refusal(config(file))
        assert isinstance(error, StorageFatal)
        assert f"may not write to {refused}" in str(error)


async def test_a_full_disk_may_pass(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr("os.open", full)
    error = await refusal(config(file))
    assert isinstance(error, StorageUnavailable)
    assert "No space left on device" in str(error)


MOUNTS = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 27 0:50 / /home rw shared:1 master:2 - nfs4 server:/home rw
41 40 0:51 / /home/me/local rw - tmpfs none rw
42 27 0:52 / /mnt/my\040disk rw - fuse.sshfs me@there:/ rw
43 27 0:53 / /hidden rw - cifs //there/share rw
44 27 0:54 / /hidden rw - ext4 /dev/vdb rw
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/x.db", None),
        ("/home/me/x.db", "nfs4"),
        ("/home/me/local/x.db", None),
        ("/home/me/locale/x.db", "nfs4"),
        ("/homes/x.db", None),
        ("/mnt/my disk/x.db", "fuse.sshfs"),
        ("/hidden/x.db", None),
    ],
)
def test_mounts(tmp_path: Path, path: str, expected: str | None) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.strip())
    assert network_filesystem(Path(path), mounts) == expected
    assert network_filesystem(Path(path), tmp_path / "no such table") is None


async def test_network_filesystems_are_refused_untouched(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"27 1 254:0 / / rw - ext4 /dev/vda rw\n40 27 0:50 / {tmp_path.resolve()}/net rw - nfs4 x:/ rw\n")
    (tmp_path / "link").symlink_to(tmp_path / "net")
    for name in ("net", "link"):
        error = await refusal(config(tmp_path / name / "x.db"), mounts=mounts)
        assert isinstance(error, StorageFatal)
        assert "network filesystem (nfs4)" in str(error)
        assert "local disk" in str(error)
    assert not (tmp_path / "net").exists()
    async with open_storage(config(tmp_path / "x.db"), mounts=mounts):
        pass


# The state it is found in


async def test_a_file_that_is_no_database(file: Path) -> None:
    file.write_bytes(b"what a person wrote " * 1000)
    error = await refusal(config(file))
    assert isinstance(error, StorageFatal)
    assert f"{file} is not a SQLite database" in str(error)


async def test_a_damaged_file(file: Path) -> None:
    async with open_sqlite(config(file)):
        pass
    data = bytearray(file.read_bytes())
    data[100:3000] = b"\xff" * 2900
    file.write_bytes(data)
    error = await refusal(config(file))
    assert isinstance(error, StorageFatal)
    assert f"{file} is damaged" in str(error)


@pytest.fixture
def exclusive(file: Path) -> Iterator[sqlite3.Connection]:
    """Another program that keeps the file to itself."""
    with closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as connection:
        connection.execute("CREATE TABLE theirs (a)")
        connection.execute("BEGIN EXCLUSIVE")
        yield connection


async def test_a_locked_file_is_waited_for(file: Path, exclusive: sqlite3.Connection) -> None:
    error = await refusal(config(file, busy_timeout_s=0.1))
    assert isinstance(error, StorageUnavailable)
    assert f"{file} is locked by another program" in str(error)

    async def unlock() -> None:
        await anyio.sleep(0.2)
        exclusive.execute("ROLLBACK")

    async with anyio.create_task_group() as group:
        group.start_soon(unlock)
        async with open_sqlite(config(file, busy_timeout_s=30)):
            pass


async def test_a_lock_held_in_the_write_ahead_log(file: Path) -> None:
    """To open a database that is current needs no writing; to take the lease does."""
    async with open_sqlite(config(file)):
        pass
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        async with open_sqlite(config(file, busy_timeout_s=0.1)) as storage:
            with pytest.raises(StorageUnavailable, match="is locked by another program"):
                await storage.leases.acquire(claim())
            other.execute("ROLLBACK")
            await storage.leases.acquire(claim())


async def test_connections_are_as_they_should_be(file: Path) -> None:
    async with open_sqlite(config(file)):
        with closing(sqlite3.connect(file)) as other:
            assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    settings = Settings(path=file, busy_timeout_s=1.5)

    async def pragmas(kind: Any) -> dict[str, Any]:
        made = kind(settings)
        try:
            async with made.connect() as connection:
                names = ("journal_mode", "synchronous", "fullfsync", "foreign_keys", "busy_timeout", "query_only")
                return {name: (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar() for name in names}
        finally:
            await made.dispose()

    async with AsyncioBridge.open() as bridge:
        assert await bridge.run(pragmas, engine.writer_engine) == {
            "journal_mode": "wal",
            "synchronous": 2,
            "fullfsync": 1,
            "foreign_keys": 1,
            "busy_timeout": 1500,
            "query_only": 0,
        }
        reader = await bridge.run(pragmas, engine.readers_engine)
        assert (reader["journal_mode"], reader["busy_timeout"], reader["query_only"]) == ("wal", 1500, 1)


@pytest.mark.parametrize("kind", ["_WRITER", "_READER"])
async def test_a_connection_that_is_not_as_asked_is_refused(
    file: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, kind, {"journal_mode": "wal2"})
    error = await refusal(config(file))
    assert isinstance(error, StorageFatal)
    assert "can't have journal_mode=wal2, SQLite answers 'wal'" in str(error) or "answers 'delete'" in str(error)


# The tables


async def test_the_migrations_make_the_tables(file: Path) -> None:
    async with open_sqlite(config(file)):
        pass
    made = create_engine(f"sqlite:///{file}")
    with made.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": "agent_runtime_version"})
        assert context.get_current_revision() == agent_runtime_sql.schema.HEAD
        assert compare_metadata(context, metadata) == []
    made.dispose()
    script = ScriptDirectory(str(Path(agent_runtime_sql.schema.__file__).parent / "migrations"))
    assert script.get_heads() == [agent_runtime_sql.schema.HEAD]


async def test_many_open_a_new_file_at_once(file: Path) -> None:
    """The first makes the tables, the others find them made."""

    async def open_and_close() -> None:
        async with open_sqlite(config(file)):
            pass

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(open_and_close)
    async with writing(lambda: open_sqlite(config(file))) as writer:
        await writer.create("a")


async def test_a_newer_database_is_refused(file: Path) -> None:
    async with open_sqlite(config(file)):
        pass
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE agent_runtime_version SET version_num = '9999'")
    before = file.read_bytes()
    error = await refusal(config(file))
    assert isinstance(error, StorageFatal)
    assert f"{file} has schema 9999, newer than schema {agent_runtime_sql.schema.HEAD}" in str(error)
    assert "upgrade agent-runtime" in str(error)
    assert file.read_bytes() == before


async def test_tables_of_others_stay_and_only_a_clash_is_refused(file: Path) -> None:
    for statement in ("CREATE TABLE messages (body TEXT)", "CREATE VIEW sessions AS SELECT 1"):
        file.unlink(missing_ok=True)
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute("CREATE TABLE theirs (a)")
            connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
            connection.execute("INSERT INTO alembic_version VALUES ('of theirs')")
        async with open_sqlite(config(file)):
            pass
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("of theirs",)]
        file.unlink()
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute(statement)
        error = await refusal(config(file))
        assert isinstance(error, StorageFatal)
        assert f"holds a table {statement.split()[2]!r} that is not agent-runtime's" in str(error)
        assert tables(file) == [statement.split()[2]]
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


async def test_a_migration_that_fails_leaves_nothing(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE theirs (a)")
        connection.execute("CREATE INDEX outcomes_by_expiry ON theirs (a)")
    error = await refusal(config(file))
    assert "outcomes_by_expiry already exists" in str(error)
    assert tables(file) == ["theirs"]


def tables(file: Path) -> list[str]:
    with closing(sqlite3.connect(file)) as connection:
        return [
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
        ]


def python(code: str, *arguments: str) -> str:
    """What the program prints; it must end, and write nothing else."""
    command = [sys.executable, "-W", "error", "-c", f"import sys; sys.path[:] = sys.argv[1].split(':'); {code}"]
    done = subprocess.run([*command, ":".join(sys.path), *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_plugin_is_cheap_to_import() -> None:
    loaded = python("import agent_runtime_sqlite; print(' '.join(sys.modules))").split()
    assert "agent_runtime_sqlite" in loaded
    assert not {"sqlalchemy", "aiosqlite", "alembic", "sqlite3"} & set(loaded)


OPEN = """
import anyio, threading
from agent_runtime.storage import StorageConfig
from agent_runtime_sqlite import open_sqlite
async def main():
    async with open_sqlite(StorageConfig(url="sqlite:///" + sys.argv[2])) as storage:
        async with storage.snapshot() as snapshot:
            await snapshot.sessions(limit=1)
        print("alembic" in sys.modules)
    threads = [t for t in threading.enumerate() if "connection" in t.name or "agent-runtime" in t.name]
    for thread in threads:
        thread.join(10)
    print([thread.name for thread in threads if thread.is_alive()])
for backend in ("asyncio", "trio"):
    anyio.run(main, backend=backend)
"""


def test_a_process_that_used_the_storage_ends_and_a_second_open_needs_no_alembic(file: Path) -> None:
    assert python(f"exec({OPEN!r})", str(file)) == 2 * "True\n[]\n"
    assert python(f"exec({OPEN!r})", str(file)) == 2 * "False\n[]\n"


async def test_a_file_that_goes_away_is_not_replaced_by_an_empty_one(file: Path, tmp_path: Path) -> None:
    async with open_sqlite(config(file, readers=2)) as storage:
        for path in tmp_path.glob("agent_runtime.db*"):
            shutil.move(path, tmp_path / f"moved {path.name}")
        async with storage.snapshot() as snapshot:
            assert snapshot.watermark == 0
            with pytest.raises(StorageUnavailable, match="can't be opened"):
                async with storage.snapshot():
                    pass
        assert not file.exists()
        assert storage.figures().in_use == 0
