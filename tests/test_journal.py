"""The journal in its place: what was acknowledged comes back, and what does not belong together is refused."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from agent_runtime import (
    Config,
    ConfigError,
    DurabilityNotReached,
    InvalidInput,
    JournalCorrupt,
    JournalFull,
    JournalMismatch,
    LeaseHeld,
    Quarantined,
    Runtime,
    SessionHeld,
    StorageUnavailable,
    open_runtime,
)
from agent_runtime.changes import Batch
from agent_runtime.errors import DrainIncomplete
from agent_runtime.filesystems import network_filesystem
from agent_runtime.journal import Journal, LocalFiles
from agent_runtime.storage import Abilities
from agent_runtime.testing import Fault, Faults, FaultyStorage, faulty_plugin, writes_message
from agent_runtime_memory import MemoryDatabase
from agent_runtime_sqlite import open_sqlite
from crash import Left
from places import NEVER_S, in_file

pytestmark = pytest.mark.anyio


class JournaledPlace:
    """A SQLite file with its journal, whose storage fails as planned."""

    def __init__(self, directory: Path) -> None:
        self.path = in_file(directory).path
        self.journal = directory / "sessions.db.journal"
        self.faults = Faults()

    def config(self, **sections: dict[str, Any]) -> Config:
        defaults: dict[str, dict[str, Any]] = {
            "write_behind": {"interval_s": NEVER_S, "drain_timeout_s": 20.0, "durability_timeout_s": 20.0},
            "lease": {"duration_s": 60.0},
        }
        names = defaults | sections
        return Config.of(
            f"faulty:sqlite:///{self.path}", **{name: defaults.get(name, {}) | sections.get(name, {}) for name in names}
        )

    @asynccontextmanager
    async def open(self, **sections: dict[str, Any]) -> AsyncIterator[Runtime]:
        async with open_runtime(self.config(**sections), plugins=[faulty_plugin(open_sqlite, self.faults)]) as runtime:
            yield runtime

    @asynccontextmanager
    async def open_without_storing(self, **sections: dict[str, Any]) -> AsyncIterator[Runtime]:
        """A runtime of which the database gets nothing more: all that is written there stays in the journal."""
        sections["write_behind"] = {"drain_timeout_s": 0.05} | sections.get("write_behind", {})
        try:
            async with self.open(**sections) as runtime:
                outage = self.faults.fail("apply")
                yield runtime
        except DrainIncomplete as error:
            assert error.journal == str(self.journal)
            assert f"are kept in the journal {self.journal}" in str(error)
        finally:
            outage.stop()

    def segments(self) -> list[Path]:
        return sorted(self.journal.glob("*.segment"))


@pytest.fixture
def place(tmp_path: Path) -> JournaledPlace:
    return JournaledPlace(tmp_path)


async def texts(runtime: Runtime, session_id: str) -> list[object]:
    session = await runtime.get_session(session_id)
    return [message.content async for message in session.scan_messages()]


async def write(runtime: Runtime, *session_ids: str, count: int = 3) -> None:
    """Sessions, and messages of each in turns."""
    handles = [await runtime.get_or_create_session(session_id) for session_id in session_ids]
    for number in range(count):
        for handle in handles:
            await handle.append("user", f"{handle.session_id} {number}")


# --- levels ----------------------------------------------------------------------------------------------------------


async def test_journaled_is_the_default(place: JournaledPlace) -> None:
    async with place.open() as runtime:
        await write(runtime, "a")
        marks = runtime.watermarks
        assert (marks.accepted, marks.journaled, marks.stored) == (4, 4, 0)
        status = runtime.status()
        assert status.durability == "journaled"
        assert status.journal is not None
        assert (status.journal.place, status.journal.segments) == (str(place.journal), 1)
        assert status.journal.bytes == sum(path.stat().st_size for path in place.segments())


@pytest.mark.parametrize("by_default", [False, True])
async def test_synced_waits_for_a_sync_that_many_share(
    place: JournaledPlace, monkeypatch: pytest.MonkeyPatch, by_default: bool
) -> None:
    syncs: list[int] = []
    fdatasync = os.fdatasync

    def counted(number: int) -> None:
        syncs.append(number)
        fdatasync(number)

    monkeypatch.setattr(os, "fdatasync", counted)
    level: Any = None if by_default else "synced"
    sections: dict[str, Any] = {"write_behind": {"durability": "synced"}} if by_default else {}
    async with place.open(journal={"sync_interval_s": NEVER_S}, **sections) as runtime:
        session = await runtime.create_session("a", durability="journaled")
        assert runtime.watermarks.synced == 0
        before = len(syncs)
        async with anyio.create_task_group() as tasks:
            for _ in range(64):

                async def one() -> None:
                    message = await session.append("user", "x", durability=level)
                    assert (runtime.watermarks.synced or 0) > message.seq

                tasks.start_soon(one)
        assert runtime.watermarks.stored == 0
        assert 1 <= len(syncs) - before <= 2


async def test_synced_waits_for_a_disk_that_syncs_again(place: JournaledPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    """While no sync succeeds, in new files either, nothing is said to survive a power loss."""
    fdatasync = os.fdatasync

    def failing(_number: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with place.open(journal={"sync_interval_s": NEVER_S}, write_behind={"durability_timeout_s": 0.3}) as runtime:
        session = await runtime.create_session("a")
        before = runtime.watermarks.synced
        monkeypatch.setattr(os, "fdatasync", failing)
        with pytest.raises(DurabilityNotReached) as caught:
            await session.append("user", "x", durability="synced")
        assert caught.value.reached == "journaled"
        assert runtime.watermarks.synced == before
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        await session.append("user", "y", durability="stored")
        assert runtime.watermarks.synced == runtime.watermarks.accepted


async def test_the_journal_is_synced_behind_the_callers_backs(place: JournaledPlace) -> None:
    async with place.open(journal={"sync_interval_s": 0.01}) as runtime:
        await write(runtime, "a")
        with anyio.fail_after(20):
            while runtime.watermarks.synced != 4:
                await anyio.sleep(0.01)
        assert runtime.watermarks.stored == 0


async def test_what_is_stored_is_synced(place: JournaledPlace) -> None:
    async with place.open(journal={"sync_interval_s": NEVER_S}) as runtime:
        await write(runtime, "a")
        await runtime.flush()
        assert runtime.watermarks.synced == runtime.watermarks.stored == 4
        await (await runtime.get_session("a")).switch_agent("orchestrator", durability="synced")


async def test_a_sync_that_takes_too_long_leaves_the_change(
    place: JournaledPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: object) -> int:
        await anyio.sleep_forever()
        raise AssertionError

    async with place.open_without_storing(write_behind={"durability_timeout_s": 0.01}) as runtime:
        session = await runtime.create_session("a")
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "sync", hang)
            with pytest.raises(DurabilityNotReached) as caught:
                await session.append("user", "stands", durability="synced")
        assert (caught.value.wanted, caught.value.reached, caught.value.sequence) == ("synced", "journaled", 2)
        assert caught.value.outcome.content == "stands"
    async with place.open() as runtime:
        assert await texts(runtime, "a") == ["stands"]


async def test_without_a_journal_buffered_is_the_default(place: JournaledPlace) -> None:
    async with place.open(journal={"enabled": False}) as runtime:
        assert runtime.status().durability == "buffered"
        assert runtime.status().journal is None
        assert not place.journal.exists()
        for level in ("journaled", "synced"):
            with pytest.raises(InvalidInput, match=f"{level!r} can't be had here, it needs the journal"):
                await runtime.create_session("a", durability=level)
    for level in ("journaled", "synced"):
        with pytest.raises(ConfigError, match=rf"write_behind.durability: {level} needs the journal, which is off"):
            async with place.open(journal={"enabled": False}, write_behind={"durability": level}):
                pass


# --- recovery --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment_bytes", [4096, 67_108_864])
async def test_what_was_not_stored_comes_back(place: JournaledPlace, segment_bytes: int) -> None:
    journal = {"segment_bytes": segment_bytes}
    async with place.open_without_storing(journal=journal) as runtime:
        await write(runtime, "a", "b", count=40)
        await (await runtime.get_session("b")).pop()
        await (await runtime.get_session("a")).put_document("c", "k", {"v": 1})
    async with place.open(journal=journal) as runtime:
        assert runtime.watermarks.stored == runtime.watermarks.accepted == 84
        assert await texts(runtime, "a") == [f"a {number}" for number in range(40)]
        assert await texts(runtime, "b") == [f"b {number}" for number in range(39)]
        document = await (await runtime.get_session("a")).get_document("c", "k")
        assert document is not None
        assert document.value == {"v": 1}
        message = await (await runtime.get_session("b")).append("user", "next")
        assert message.seq == 41
        assert runtime.watermarks.accepted == 85


async def test_recovery_gives_up_on_a_database_that_is_away_and_loses_nothing(place: JournaledPlace) -> None:
    async with place.open_without_storing() as runtime:
        await write(runtime, "a")
    outage = place.faults.fail("apply")
    with pytest.raises(StorageUnavailable, match="the journal keeps it: start again when the database is back"):
        async with place.open(write_behind={"durability_timeout_s": 0.3}):
            pass
    outage.stop()
    place.faults.fail("apply", nth=1)
    place.faults.fail("apply", nth=2, after_effect=True)
    async with place.open() as runtime:
        assert await texts(runtime, "a") == ["a 0", "a 1", "a 2"]


async def test_a_journal_is_cut_at_stored(place: JournaledPlace) -> None:
    async with place.open(journal={"segment_bytes": 4096, "sync_interval_s": 0.01}) as runtime:
        await write(runtime, "a", count=50)
        assert len(place.segments()) > 3
        await runtime.flush()
        with anyio.fail_after(20):
            while len(place.segments()) > 1:
                await anyio.sleep(0.01)
    [left] = place.segments()
    assert left.stat().st_size < 2048
    async with place.open() as runtime:
        assert runtime.watermarks.accepted == 51


async def test_segments_are_retained(place: JournaledPlace) -> None:
    async with place.open(journal={"segment_bytes": 4096, "retain_s": NEVER_S}) as runtime:
        await write(runtime, "a", count=50)
    assert len(place.segments()) > 3
    async with place.open(journal={"retain_s": NEVER_S}) as runtime:
        assert len(await texts(runtime, "a")) == 50


async def test_a_journal_is_switched_off_and_on_again(place: JournaledPlace) -> None:
    async with place.open_without_storing() as runtime:
        await write(runtime, "a", count=1)
    async with place.open(journal={"enabled": False}) as runtime:
        assert await texts(runtime, "a") == ["a 0"]
        await write(runtime, "b", count=2)
    async with place.open_without_storing() as runtime:
        await write(runtime, "c", count=1)
    async with place.open() as runtime:
        for session_id, count in {"a": 1, "b": 2, "c": 1}.items():
            assert await texts(runtime, session_id) == [f"{session_id} {number}" for number in range(count)]


def damage(segment: Path, text: str) -> None:
    """Overwrite a part of the one frame that holds this text."""
    data = segment.read_bytes()
    assert data.count(text.encode()) == 1
    segment.write_bytes(data.replace(text.encode(), b"#" * len(text)))


async def test_a_damaged_change_holds_its_session_only(place: JournaledPlace, caplog: pytest.LogCaptureFixture) -> None:
    async with place.open_without_storing() as runtime:
        await write(runtime, "a", "b", count=4)
    damage(place.segments()[0], '"a 1"')
    for _ in range(2):
        async with place.open() as runtime:
            assert await texts(runtime, "b") == ["b 0", "b 1", "b 2", "b 3"]
            assert await texts(runtime, "a") == ["a 0", "a 2", "a 3"]
            with pytest.raises(SessionHeld):
                await (await runtime.get_session("a")).append("user", "no")
            entries = await runtime.quarantine.entries()
            assert [entry.state for entry in entries] == ["rejected", "queued"]
            assert "was lost by damage to the journal" in entries[0].error
            await (await runtime.get_session("b")).append("user", "on")
            await (await runtime.get_session("b")).pop()
    assert "1 change(s) of the journal" in caplog.text
    assert "a 1" not in caplog.text
    async with place.open() as runtime:
        session = await runtime.get_session("a")
        assert (await session.record()).message_count == 3
        assert await runtime.quarantine.replay("a") == 2
        assert await texts(runtime, "a") == ["a 0", "a 2", "a 3"]
        await session.append("user", "yes")
        assert (await session.record()).message_count == 4
    async with place.open() as runtime:
        assert (await (await runtime.get_session("a")).record()).message_count == 4


async def test_a_session_whose_creation_is_damaged_is_shown_and_dropped(place: JournaledPlace) -> None:
    async with place.open_without_storing() as runtime:
        await runtime.create_session("a", title="the title of a")
        await write(runtime, "a", "b", count=2)
    damage(place.segments()[0], "the title of a")
    async with place.open() as runtime:
        assert await texts(runtime, "b") == ["b 0", "b 1"]
        assert await texts(runtime, "a") == ["a 0", "a 1"]
        assert await (await runtime.get_session("a")).history()
        with pytest.raises(SessionHeld):
            await (await runtime.get_session("a")).append("user", "no")
        assert await runtime.quarantine.drop("a") == 0
        assert [record.session_id async for record in runtime.scan_sessions()] == ["b"]
        await runtime.create_session("a")
    async with place.open() as runtime:
        assert await texts(runtime, "a") == []


@pytest.mark.parametrize("kind", ["another's", "unknown"])
async def test_a_frame_without_the_change_that_it_names_is_refused(place: JournaledPlace, kind: str) -> None:
    """The bytes are whole, so it is no damage to be passed over: nobody knows what was there, and all is kept."""
    async with place.open_without_storing() as runtime:
        await write(runtime, "a")
    left = Left(place.path.parent)
    change = left.change(3)
    if kind == "unknown":
        left.rewrite(3, b'{"sequence":3}')
        told = "change 3 of the journal .* is whole, but can't be read: it was written by another version"
    else:
        left.rewrite(3, left.change(2))
        told = "the frame 3 of the journal .* holds change 2"
    for _ in range(2):
        with pytest.raises(JournalCorrupt, match=told):
            async with place.open():
                raise AssertionError
    left.rewrite(3, change)
    async with place.open() as runtime:
        assert await texts(runtime, "a") == ["a 0", "a 1", "a 2"]


async def test_a_torn_tail_is_kept_aside(place: JournaledPlace) -> None:
    async with place.open_without_storing() as runtime:
        await write(runtime, "a")
    segment = place.segments()[-1]
    with segment.open("ab") as file:
        file.write(b"000000ff 01234567 0000")
    async with place.open() as runtime:
        assert await texts(runtime, "a") == ["a 0", "a 1", "a 2"]
    [kept] = place.journal.glob("*.torn-*")
    assert kept.read_bytes() == b"000000ff 01234567 0000"


KILLED = """
import os, sys
import anyio
from agent_runtime import Config, open_runtime

async def main():
    async with open_runtime(Config.of(sys.argv[1], write_behind={"interval_s": 1e6})) as runtime:
        session = await runtime.create_session("a")
        for number in range(200):
            await session.append("user", str(number))
        os.kill(os.getpid(), 9)

anyio.run(main, backend=sys.argv[2])
"""


async def test_a_killed_process_loses_nothing(place: JournaledPlace, anyio_backend_name: str) -> None:
    command = [sys.executable, "-c", KILLED, f"sqlite:///{place.path}", anyio_backend_name]
    with anyio.fail_after(60):
        killed = await anyio.run_process(command, check=False)
    assert killed.returncode == -signal.SIGKILL
    async with place.open() as runtime:
        assert await texts(runtime, "a") == [str(number) for number in range(200)]


# --- pairing ---------------------------------------------------------------------------------------------------------


async def test_a_second_runtime_is_refused_by_the_name_of_the_first(place: JournaledPlace) -> None:
    async with place.open():
        with pytest.raises(LeaseHeld, match=f"pid {os.getpid()} on "):
            async with place.open():
                pass


async def test_a_journal_of_another_database_is_refused(place: JournaledPlace, tmp_path: Path) -> None:
    async with place.open_without_storing() as runtime:
        await write(runtime, "a")
    (tmp_path / "other").mkdir()
    other = JournaledPlace(tmp_path / "other")
    other.path.unlink()  # the files of these tests are copies of one
    async with other.open(journal={"enabled": False}) as runtime:
        await write(runtime, "b")
    before = [path.read_bytes() for path in place.segments()]
    with pytest.raises(
        JournalMismatch, match=r"belongs to the database \S+, storage\.url leads to the database"
    ) as caught:
        async with other.open(journal={"directory": str(place.journal)}):
            pass
    assert "move the directory away" in str(caught.value)
    assert [path.read_bytes() for path in place.segments()] == before
    async with place.open() as runtime:
        assert await texts(runtime, "a") == ["a 0", "a 1", "a 2"]


async def test_a_database_that_is_new_is_refused(place: JournaledPlace) -> None:
    async with place.open_without_storing() as runtime:
        await write(runtime, "a")
    for path in place.path.parent.glob("sessions.db*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(JournalMismatch, match=r"storage\.url leads to a database that is new"):
        async with place.open():
            pass


async def test_an_old_backup_of_the_database_is_refused_or_healed(place: JournaledPlace, tmp_path: Path) -> None:
    async with place.open(journal={"retain_s": NEVER_S}) as runtime:
        await write(runtime, "a")
    backup = tmp_path / "backup.db"
    shutil.copy(place.path, backup)
    async with place.open(journal={"retain_s": NEVER_S}) as runtime:
        await write(runtime, "b")
    restore(backup, place.path)
    async with place.open(journal={"retain_s": NEVER_S}) as runtime:  # the journal still has what the backup lacks
        assert await texts(runtime, "b") == ["b 0", "b 1", "b 2"]
    async with place.open() as runtime:  # now all that is stored is cut
        await write(runtime, "c")
    restore(backup, place.path)
    with pytest.raises(JournalMismatch, match="begins at change 13, the database ends at 4") as caught:
        async with place.open():
            pass
    assert "restored from an old backup" in str(caught.value)


def restore(backup: Path, path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    shutil.copy(backup, path)


async def test_a_copy_of_the_directory_is_refused_once_the_original_went_on(
    place: JournaledPlace, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    async with place.open_without_storing() as runtime:
        await write(runtime, "a")
        shutil.copytree(place.journal, copy)  # while it is written
        with pytest.raises(LeaseHeld):
            async with place.open(journal={"directory": str(copy)}):
                pass
    async with place.open() as runtime:
        await write(runtime, "b")
    with pytest.raises(JournalMismatch, match="is an old copy: it is of generation 1, the database knows generation 2"):
        async with place.open(journal={"directory": str(copy)}):
            pass
    shutil.rmtree(copy)
    async with place.open() as runtime:
        assert await texts(runtime, "b") == ["b 0", "b 1", "b 2"]


class _FarAway(FaultyStorage):
    @property
    def abilities(self) -> Abilities:
        return Abilities(survives="machine")


async def test_a_database_elsewhere_needs_a_directory(
    place: JournaledPlace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("agent_runtime.testing.faulty.FaultyStorage", _FarAway)
    with pytest.raises(ConfigError, match=r"journal.directory: must be set for this database"):
        async with place.open():
            pass
    async with place.open(journal={"directory": str(tmp_path / "here")}) as runtime:
        assert runtime.status().durability == "journaled"


async def test_what_lives_in_memory_has_a_journal_if_told_so(tmp_path: Path) -> None:
    plugin = faulty_plugin(MemoryDatabase().open, Faults())
    with pytest.raises(ConfigError, match=r"journal.directory: must be set"):
        async with open_runtime(Config.of("faulty:memory:", journal={"enabled": True}), plugins=[plugin]):
            pass
    async with open_runtime("faulty:memory:", plugins=[plugin]) as runtime:
        assert runtime.status().journal is None
    for number in range(3):  # it is never cut: each time the memory is a new one
        database = faulty_plugin(MemoryDatabase().open, Faults())
        config = Config.of("faulty:memory:", journal={"directory": str(tmp_path / "journal")})
        async with open_runtime(config, plugins=[database]) as runtime:
            session = await runtime.get_or_create_session("a")
            assert await texts(runtime, "a") == [str(each) for each in range(number)]
            with pytest.raises(InvalidInput, match="'synced' can't be had here, this database can't promise it"):
                await session.append("user", "no", durability="synced")
            assert (runtime.watermarks.journaled, runtime.watermarks.synced) == (number + 1, None)
            await session.append("user", str(number), durability="stored")


def follows(batch: Batch | None, sequence: int) -> bool:
    return batch is not None and batch.after >= sequence


async def refuse(_: object) -> None:
    raise StorageUnavailable("it is away")


async def test_what_comes_back_for_a_held_session_queues_behind_what_is_in_quarantine(place: JournaledPlace) -> None:
    """The refused change went to quarantine, the ones behind it were in the journal only when the process died."""
    async with place.open() as runtime:
        await runtime.create_session("a", durability="stored")
    with pytest.raises(DrainIncomplete, match=r"2 change\(s\) could not be stored"):
        async with place.open(write_behind={"batch_changes": 1, "drain_timeout_s": 0.05}) as runtime:
            session = await runtime.get_session("a")
            gate = place.faults.hold("apply", nth=1)
            place.faults.reject(writes_message("m1"))
            await session.append_message({"role": "user", "content": "refused", "id": "m1"})
            await gate.reached.wait()
            await session.append("user", "behind")
            await session.put_document("c", "k", 1)
            place.faults._plan(Fault("apply", None, condition=lambda call: follows(call.batch, 2), before=refuse))
            gate.open()
            with pytest.raises(Quarantined):
                await runtime._log.wait_stored(2)
    place.faults.clear()
    async with place.open() as runtime:
        assert [each.state for each in await runtime.quarantine.entries()] == ["rejected", "queued", "queued"]
        assert await texts(runtime, "a") == ["refused", "behind"]
        session = await runtime.get_session("a")
        with pytest.raises(SessionHeld):
            await session.append("user", "no")
    with pytest.raises(DrainIncomplete, match=r"3 change\(s\) could not be stored"):
        async with place.open(write_behind={"durability_timeout_s": 0.05, "drain_timeout_s": 0.05}) as runtime:
            outage = place.faults.fail("apply")
            with anyio.move_on_after(0.05):
                await runtime.quarantine.replay("a")  # accepted, and in the journal, when the process dies
    outage.stop()
    async with place.open() as runtime:
        assert await runtime.quarantine.entries() == []
        assert await texts(runtime, "a") == ["refused", "behind"]
        session = await runtime.get_session("a")
        assert (await session.append("user", "goes on", durability="stored")).seq == 3


@pytest.mark.parametrize("there", [False, True])
async def test_a_network_filesystem_is_refused_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    mounts, far = tmp_path / "mountinfo", tmp_path / "far"
    mounts.write_text(f"27 1 254:0 / / rw - ext4 /dev/vda rw\n40 27 0:50 / {tmp_path.resolve()}/far rw - nfs4 x:/ rw\n")
    monkeypatch.setattr("agent_runtime.directories.network_filesystem", lambda path: network_filesystem(path, mounts))
    far.mkdir()
    if there:
        (far / "journal").mkdir()
    before = sorted(far.rglob("*"))
    for enabled in (True, False) if there else (True,):
        config = JournaledPlace(tmp_path).config(journal={"directory": str(far / "journal"), "enabled": enabled})
        with pytest.raises(
            ConfigError, match=r"journal.directory: .*/far/journal lies on a network filesystem \(nfs4\)"
        ):
            async with open_runtime(config, plugins=[faulty_plugin(open_sqlite, Faults())]):
                raise AssertionError
    assert sorted(far.rglob("*")) == before


async def test_what_lives_in_memory_is_never_said_to_survive_a_power_loss(tmp_path: Path) -> None:
    faults = Faults()
    plugin = faulty_plugin(MemoryDatabase().open, faults)
    config = Config.of(
        "faulty:memory:",
        journal={"directory": str(tmp_path / "journal"), "sync_interval_s": 0.001},
        write_behind={"durability_timeout_s": 0.1, "drain_timeout_s": 5.0},
    )
    async with open_runtime(config, plugins=[plugin]) as runtime:
        session = await runtime.create_session("a", durability="stored")
        outage = faults.fail("apply")
        with pytest.raises(DurabilityNotReached) as caught:
            await session.append("user", "hi", durability="stored")
        assert (caught.value.reached, runtime._log.synced) == ("journaled", caught.value.sequence)
        outage.stop()


# --- room ------------------------------------------------------------------------------------------------------------


async def test_a_full_disk_stops_appends_only(place: JournaledPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    async with place.open() as runtime:
        await write(runtime, "a")
        session = await runtime.get_session("a")
        marks = runtime.watermarks
        with monkeypatch.context() as patched:
            patched.setattr(LocalFiles, "free_bytes", lambda _: 10)
            runtime._journal.journal._slow_size = 0  # type: ignore[union-attr]
            for _ in range(2):
                with pytest.raises(JournalFull, match="10 bytes free"):
                    await session.append("user", "no")
            assert runtime.watermarks == marks
            assert runtime.status().journal.full  # type: ignore[union-attr]
            assert await texts(runtime, "a") == ["a 0", "a 1", "a 2"]
            pending = runtime.status().pending
            assert pending.changes == 4
            await runtime.flush()
            with pytest.raises(JournalFull):  # a change of more than five bytes
                await session.append("user", "no")
        await session.append("user", "room again")
        assert not runtime.status().journal.full  # type: ignore[union-attr]
        assert await texts(runtime, "a") == ["a 0", "a 1", "a 2", "room again"]
