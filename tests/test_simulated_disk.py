"""The simulated disk keeps what a disk must keep, and may lose the rest: else the simulation would prove nothing."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from agent_runtime.journal.files import JournalFiles, SegmentFile
from agent_runtime.testing import DISK_CALL_NAMES, DiskCallName, SimulatedDisk
from rig import virtual_time as anyio_backend

__all__ = ["anyio_backend"]

pytestmark = pytest.mark.anyio

SEEDS = range(60)
RECORD = b"a record of a journal\n" * 60  # more than two pages


def disk_of(seed: int = 0, **options: Any) -> tuple[SimulatedDisk, JournalFiles]:
    disk = SimulatedDisk(random.Random(seed), **options)
    files = disk.files()
    assert files.lock()
    return disk, files


def read(files: JournalFiles, name: str = "1") -> bytes:
    with files.read(name) as file:
        return file.read()


async def losses(prepare: Callable[[SimulatedDisk, JournalFiles], Any], name: str = "1") -> set[bytes | None]:
    """What is in a file after a power loss, as chance has it; None when it is not there."""
    found: set[bytes | None] = set()
    for seed in SEEDS:
        disk, files = disk_of(seed)
        await prepare(disk, files)
        disk.lose_power()
        found.add(disk.contents().get(name))
    return found


async def synced(files: JournalFiles, data: bytes = b"") -> SegmentFile:
    """A file with these bytes, nothing of which can be lost."""
    file = files.create("1")
    assert file.write(data) == len(data)
    await file.sync()
    await files.sync_directory()
    return file


# --- what stays -------------------------------------------------------------------------------------------------------


async def test_a_directory_of_files() -> None:
    disk, files = disk_of()
    file = files.create("1")
    assert (file.write(b"one"), file.write(b"two")) == (3, 3)
    assert read(files) == b"onetwo"
    file.truncate(4)
    file.write(b"!")
    assert read(files) == b"onet!"
    files.create("2").close()
    assert sorted(files.names()) == ["1", "2", "lock"]
    with pytest.raises(FileExistsError):
        files.create("2")
    files.unlink("2")
    for missing in (files.read, files.unlink):
        with pytest.raises(FileNotFoundError):
            missing("2")
    assert disk.contents() == {"lock": b"", "1": b"onet!"}
    file.close()
    with pytest.raises(OSError, match="closed"):
        file.write(b"x")


async def test_one_process_has_the_lock_until_it_ends() -> None:
    disk, files = disk_of()
    other = disk.files()
    assert not other.lock()
    assert files.lock()
    files.close()
    assert other.lock()
    disk.crash()
    assert disk.files().lock()


async def test_the_identity_is_that_of_this_directory() -> None:
    disk, files = disk_of()
    identity = files.identity()
    await files.sync_directory()
    disk.lose_power()
    files = disk.files()
    assert files.lock()
    assert files.identity() == identity
    disk.lose_directory()
    files = disk.files()
    assert files.lock()
    assert files.identity() != identity


async def test_a_crash_loses_nothing_that_was_written_and_ends_the_process() -> None:
    disk, files = disk_of()
    file = files.create("1")
    file.write(RECORD)
    files.create("2")
    files.unlink("2")
    disk.crash()
    assert disk.contents() == {"lock": b"", "1": RECORD}
    calls: list[Callable[[], Any]] = [
        files.lock, files.names, files.free_bytes, files.identity, lambda: files.create("3"), lambda: files.read("1"),
        lambda: files.unlink("1"), lambda: file.write(b"x"), lambda: file.truncate(0),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(OSError, match="dead"):
            call()
    for sync in (file.sync, files.sync_directory):
        with pytest.raises(OSError, match="dead"):
            await sync()
    assert disk.contents() == {"lock": b"", "1": RECORD}


async def test_what_was_synced_survives_a_power_loss() -> None:
    async def prepare(_: SimulatedDisk, files: JournalFiles) -> None:
        file = await synced(files, RECORD)
        file.write(RECORD)
        await file.sync()

    assert await losses(prepare) == {RECORD * 2}


async def test_what_was_not_synced_may_be_there_lost_torn_or_garbled_behind_what_was() -> None:
    async def prepare(_: SimulatedDisk, files: JournalFiles) -> None:
        file = await synced(files, RECORD)
        file.write(RECORD)

    found = await losses(prepare)
    assert all(each is not None and each.startswith(RECORD) and len(each) <= len(RECORD) * 2 for each in found)
    assert {RECORD, RECORD * 2} <= found
    prefixes = {each for each in found if each is not None and (RECORD * 2).startswith(each)}
    assert len(prefixes) > 5
    assert len(found - prefixes) > 5  # holes, and worse


async def test_names_that_were_not_synced_may_be_there_or_not() -> None:
    async def create(_: SimulatedDisk, files: JournalFiles) -> None:
        file = files.create("1")
        file.write(RECORD)
        await file.sync()

    async def unlink(_: SimulatedDisk, files: JournalFiles) -> None:
        await synced(files, RECORD)
        files.unlink("1")

    async def both(_: SimulatedDisk, files: JournalFiles) -> None:
        await unlink(_, files)
        await files.sync_directory()

    assert await losses(create) == {RECORD, None}
    assert await losses(unlink) == {RECORD, None}
    assert await losses(both) == {None}


async def test_a_cut_that_was_not_synced_may_be_undone() -> None:
    async def cut(_: SimulatedDisk, files: JournalFiles) -> None:
        (await synced(files, RECORD)).truncate(100)

    async def cut_and_synced(_: SimulatedDisk, files: JournalFiles) -> None:
        file = await synced(files, RECORD)
        file.truncate(100)
        await file.sync()

    assert await losses(cut) == {RECORD, RECORD[:100]}
    assert await losses(cut_and_synced) == {RECORD[:100]}


async def test_a_sync_covers_what_was_written_before_it() -> None:
    async def prepare(disk: SimulatedDisk, files: JournalFiles) -> None:
        file = await synced(files)
        disk.delay(5.0)
        file.write(RECORD)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(file.sync)
            await anyio.sleep(1.0)
            file.write(RECORD)

    found = await losses(prepare)
    assert all(each is not None and each.startswith(RECORD) for each in found)
    assert RECORD in found
    assert len(found) > 5


async def test_a_sync_has_ended_when_its_cancelled_caller_goes_on() -> None:
    disk, files = disk_of()
    file = files.create("1")
    for sync in (file.sync, files.sync_directory):
        disk.delay(5.0, "sync" if sync == file.sync else "sync_directory")
        file.write(RECORD)
        start = anyio.current_time()
        with anyio.move_on_after(1.0) as scope:
            await sync()
            await checkpoint()
        assert scope.cancelled_caught
        assert anyio.current_time() == pytest.approx(start + 5.0)
    disk.lose_power()
    assert disk.contents()["1"].startswith(RECORD)


async def test_the_same_seed_means_the_same_disk() -> None:
    def contents(seed: int) -> dict[str, bytes]:
        disk, files = disk_of(seed)
        for number in range(10):
            files.create(str(number)).write(RECORD)
        disk.lose_power()
        return disk.contents()

    assert contents(1) == contents(1) != contents(2)


# --- faults -----------------------------------------------------------------------------------------------------------


async def test_a_call_fails_before_or_after_its_effect() -> None:
    disk, files = disk_of()
    file = files.create("1")
    disk.fail("write", nth=1, number=errno.EIO)
    disk.fail("write", nth=2, done=1.0)
    disk.fail("write", nth=3, done=0.5)
    for written in (b"", b"abcd", b"abcdab"):
        with pytest.raises(OSError, match="planned") as caught:
            file.write(b"abcd")
        assert caught.value.errno == errno.EIO
        assert read(files) == written
    assert file.write(b"abcd") == 4
    calls: dict[DiskCallName, Callable[[], Any]] = {
        "create": lambda: files.create("2"),
        "unlink": lambda: files.unlink("1"),
        "truncate": lambda: file.truncate(0),
    }
    for name, call in calls.items():
        fault = disk.fail(name)
        with pytest.raises(OSError, match=name):
            call()
        fault.stop()
        assert fault.hits == 1
    assert disk.contents() == {"lock": b"", "1": b"abcdababcd"}
    disk.fail("read")
    disk.clear()
    assert read(files) == b"abcdababcd"


async def test_a_short_write_tells_how_short_it_was() -> None:
    disk, files = disk_of()
    file = files.create("1")
    disk.write_short(nth=2, done=0.75)
    assert [file.write(b"abcd") for _ in range(3)] == [4, 3, 4]
    assert read(files) == b"abcdabcabcd"


async def test_a_disk_that_is_full() -> None:
    disk, files = disk_of(capacity_bytes=10)
    file = files.create("1")
    assert file.write(b"12345678") == 8
    assert files.free_bytes() == 2
    assert file.write(b"abcd") == 2
    with pytest.raises(OSError, match="full") as caught:
        file.write(b"abcd")
    assert caught.value.errno == errno.ENOSPC
    file.truncate(8)
    disk.capacity_bytes = None
    assert file.write(b"abcd") == 4
    assert files.free_bytes() > 1_000_000


async def test_after_a_sync_that_failed_a_later_one_does_not_bring_the_lost_pages() -> None:
    """On Linux the pages of a failed sync are clean."""

    async def prepare(disk: SimulatedDisk, files: JournalFiles) -> None:
        file = await synced(files, RECORD[:512])
        fault = disk.fail("sync")
        file.write(RECORD[512:1024])
        with pytest.raises(OSError, match="planned"):
            await file.sync()
        fault.stop()
        file.write(RECORD[1024:])
        await file.sync()
        assert read(files) == RECORD

    found = await losses(prepare)
    assert RECORD in found
    assert len(found) > 5
    for each in found:
        assert each is not None
        assert (each[:512], each[1024:]) == (RECORD[:512], RECORD[1024:])


async def test_a_sync_of_the_directory_that_failed_brought_no_names() -> None:
    async def prepare(disk: SimulatedDisk, files: JournalFiles) -> None:
        files.create("1")
        disk.fail("sync_directory")
        with pytest.raises(OSError, match="planned"):
            await files.sync_directory()

    assert await losses(prepare) == {b"", None}


@pytest.mark.parametrize("done", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lose", [SimulatedDisk.crash, SimulatedDisk.lose_power])
@pytest.mark.parametrize("name", DISK_CALL_NAMES)
async def test_the_machine_may_die_in_any_call(
    name: DiskCallName, lose: Callable[[SimulatedDisk], None], done: float
) -> None:
    disk, files = disk_of()
    file = await synced(files, RECORD)
    calls: dict[str, Callable[[], Any]] = {
        "lock": files.lock, "names": files.names, "create": lambda: files.create("2"),
        "read": lambda: files.read("1"), "unlink": lambda: files.unlink("1"), "sync_directory": files.sync_directory,
        "write": lambda: file.write(b"x" * 100), "truncate": lambda: file.truncate(10), "sync": file.sync,
    }  # fmt: skip
    fault = disk.at(name, lambda: lose(disk), nth=1, done=done)
    with pytest.raises(OSError, match="dead"):
        result = calls[name]()
        if name in ("sync", "sync_directory"):
            await result
    assert fault.hits == 1
    assert disk.files().lock()
    if lose is SimulatedDisk.crash:
        changed = {
            "create": "2" in disk.contents(),
            "unlink": "1" not in disk.contents(),
            "truncate": disk.contents().get("1") == RECORD[:10],
            "write": disk.contents().get("1") == RECORD + b"x" * int(100 * done),
        }
        assert changed.get(name, True) == (done == 1.0 or name not in ("create", "unlink", "truncate"))


async def test_a_fault_that_can_not_be_is_refused() -> None:
    disk, _ = disk_of()
    with pytest.raises(ValueError, match="'append' is not a call of a disk"):
        disk.fail("append")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share"):
        disk.fail("write", done=1.5)
    with pytest.raises(ValueError, match="share"):
        disk.write_short(done=-0.5)
