"""The journal on real files: who may have it, what failing disks may do to it, and what is left after each of that."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Final

import anyio
import pytest

from agent_runtime.errors import JournalError, JournalFull
from agent_runtime.journal import Damage, Frame, Gap, Journal, JournalFiles, LocalFiles, read_directory
from agent_runtime.journal.headers import segment_name
from agent_runtime.testing import DiskCallName, SimulatedDisk
from journal_rig import Faulty

pytestmark = pytest.mark.anyio

JOURNAL = "0192f0c1-2345-7abc-8def-0123456789ab"
HEADERS = 1024


def document(sequence: int) -> bytes:
    return b'{"n":%d,"x":"%s"}' % (sequence, b"x" * 50)


FRAME = 36 + len(document(5))


def changes(*sequences: int) -> list[tuple[int, bytes]]:
    return [(sequence, document(sequence)) for sequence in sequences]


def nothing() -> Iterable[tuple[int, bytes]]:
    return iter(())


async def begin(
    files: JournalFiles,
    *,
    segment_bytes: int = 1 << 20,
    retain_s: float = 0.0,
    pending_bytes: Callable[[], int] = lambda: 0,
    clock: Callable[[], float] = lambda: 0.0,
) -> Journal:
    """Open the journal as a start does: take it, cut it, go on behind its end."""
    assert files.lock()
    directory = read_directory(files, JOURNAL)
    await directory.cut_torn_tails()
    return await Journal.begin(
        files,
        directory,
        journal_id=JOURNAL,
        database_id="d1",
        generation=directory.generation + 1,
        after=directory.end,
        segment_bytes=segment_bytes,
        retain_s=retain_s,
        pending_bytes=pending_bytes,
        clock=clock,
    )


def read(path: Path, after: int = 0) -> list[int | Gap]:
    """What a start would find: sequences, and gaps."""
    files = LocalFiles(path)
    try:
        found: list[int | Gap] = []
        for item in read_directory(files, JOURNAL).frames(after):
            if isinstance(item, Frame):
                assert item.payload == document(item.sequence)
            found.append(item.sequence if isinstance(item, Frame) else item)
        return found
    finally:
        files.close()


def damage(path: Path) -> list[Damage]:
    files = LocalFiles(path)
    try:
        directory = read_directory(files, JOURNAL)
        assert list(directory.frames(0)) is not None
        return list(directory.damage.values())
    finally:
        files.close()


def segments(path: Path) -> list[int]:
    return sorted(int(file.name[:10]) for file in path.glob("*.segment"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "down" / "journal"


@pytest.fixture
def files(path: Path) -> Iterator[Faulty]:
    files = Faulty(LocalFiles(path))
    yield files
    files.close()


# Whose it is


def test_only_the_owner_may_read(path: Path, files: Faulty) -> None:
    assert files.lock()
    files.create("a").close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}


OTHER = """
import sys
from agent_runtime.journal import LocalFiles
print(LocalFiles(sys.argv[1]).lock())
"""


def test_another_process_is_refused_until_the_first_gives_it_back(path: Path) -> None:
    def other() -> str:
        return subprocess.run([sys.executable, "-c", OTHER, path], capture_output=True, text=True, check=True).stdout

    files = LocalFiles(path)
    assert files.lock()
    assert other() == "False\n"
    files.close()
    assert other() == "True\n"


def test_a_lock_whose_file_was_removed_keeps_nobody_out_and_is_not_taken_for_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening and the locking of the file somebody removes it: then another one is made and locked."""
    files = LocalFiles(path)
    flock, removals = fcntl.flock, [path / "lock"]

    def remove_and_lock(number: int, operation: int) -> None:
        if removals:
            removals.pop().unlink()
        flock(number, operation)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    assert files.lock()
    assert not LocalFiles(path).lock()
    files.close()


PARENT = """
import os, sys, time
from functools import partial
import anyio
from agent_runtime import JournalError
from agent_runtime.journal import Journal, LocalFiles, read_directory

async def main():
    files = LocalFiles(sys.argv[1])
    assert files.lock()
    journal = await Journal.begin(
        files, read_directory(files), journal_id="j", database_id="d", generation=1, after=0, segment_bytes=1 << 20,
        pending_bytes=lambda: 0,
    )
    journal.append([(1, b"1")])
    if os.fork():
        time.sleep(60)
    outcomes = []
    for attempt in (partial(journal.append, [(2, b"2")]), partial(files.create, "x"), files.names, files.identity):
        try:
            outcomes.append(repr(attempt()))
        except Exception as error:
            outcomes.append(type(error).__name__)
    print(os.getpid(), *outcomes, flush=True)
    time.sleep(60)

anyio.run(main)
"""


def test_a_child_that_outlives_the_killed_owner_has_nothing_of_it(path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, path], stdout=subprocess.PIPE, text=True)
    child = 0
    try:
        assert parent.stdout is not None
        number, *outcomes = parent.stdout.readline().split()
        child = int(number)
        assert outcomes == ["JournalError", "OSError", "OSError", "OSError"]
        files = LocalFiles(path)
        assert not files.lock()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        os.kill(child, 0)  # it is alive
        assert files.lock()
        directory = read_directory(files)
        assert [item.payload for item in directory.frames(0) if isinstance(item, Frame)] == [b"1"]
        assert not directory.damage
        assert sorted(files.names()) == [segment_name(1), "lock"]
        files.close()
    finally:
        parent.kill()
        parent.wait()
        if parent.stdout is not None:
            parent.stdout.close()
        if child:
            os.kill(child, signal.SIGKILL)


def test_a_copy_is_another_directory(path: Path, tmp_path: Path) -> None:
    files = LocalFiles(path)
    assert files.lock()
    identity = files.identity()
    files.close()
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", path, copy], check=True)
    moved = path.rename(tmp_path / "moved")
    assert LocalFiles(copy).identity() != identity
    assert LocalFiles(moved).identity() == identity


def test_closed_files_do_nothing(path: Path) -> None:
    files = LocalFiles(path)
    assert files.lock()
    segment = files.create("a")
    files.close()
    segment.close()
    for call in (files.names, files.lock, files.identity, files.free_bytes, lambda: segment.write(b"x")):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()


async def test_a_failed_sync_of_a_file_fails_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of it once; a second fdatasync would say that all is well."""
    files = LocalFiles(path)
    assert files.lock()
    segment = files.create("a")
    real, fail = os.fdatasync, [errno.EIO]

    def fdatasync(number: int) -> None:
        if fail:
            raise OSError(fail.pop(), "once")
        real(number)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    for reason in ("once", "earlier sync", "earlier sync"):
        with pytest.raises(OSError, match=reason):
            await segment.sync()
    segment.close()
    files.close()


# Writing, rotating, reading again


async def test_what_is_appended_is_found_by_the_next_opening(path: Path, files: Faulty) -> None:
    journal = await begin(files)
    journal.append(changes(1))
    journal.append(changes(2, 3, 4))
    assert (journal.end, journal.synced) == (4, 0)
    assert await journal.sync(nothing) == journal.synced == 4
    journal.close()
    assert read(path) == [1, 2, 3, 4]
    again = await begin(files)
    assert again.end == again.synced == 4
    again.append(changes(5))
    again.close()
    assert read(path) == [1, 2, 3, 4, 5]
    assert read_directory(files).generation == 2
    assert segments(path) == [1, 2]


async def test_sequences_that_do_not_follow_are_refused(path: Path, files: Faulty) -> None:
    journal = await begin(files)
    journal.append(changes(1))
    for wrong in ((1,), (3,), (2, 4), (2, 2)):
        with pytest.raises(ValueError, match="can't follow"):
            journal.append(changes(*wrong))
    journal.close()
    assert read(path) == [1]
    with pytest.raises(ValueError, match="up to 1"):
        await Journal.begin(
            files,
            read_directory(files),
            journal_id=JOURNAL,
            database_id="d1",
            generation=2,
            after=0,
            segment_bytes=1,
            pending_bytes=lambda: 0,
        )


async def test_rotation(path: Path, files: Faulty) -> None:
    journal = await begin(files, segment_bytes=HEADERS + 3 * FRAME)
    for sequence in range(1, 8):
        journal.append(changes(sequence))
    assert segments(path) == [1, 2, 3]
    assert max(file.stat().st_size for file in path.glob("*.segment")) <= HEADERS + 3 * FRAME
    journal.append([(8, b'"' + b"long" * 1000 + b'"')])  # longer than a segment, and alone in one
    journal.append([(9, b'"' + b"long" * 1000 + b'"')])
    assert segments(path) == [1, 2, 3, 4, 5]
    assert await journal.sync(nothing) == 9
    assert all(files.count("sync", segment_name(number)) for number in segments(path))
    directory_synced = files.count("sync_directory", "")
    await journal.sync(nothing)
    assert files.count("sync_directory", "") == directory_synced  # nothing is new
    journal.close()
    found = read_directory(files)
    assert [segment.first for segment in found.segments] == [1, 4, 7, 8, 9]
    assert [item.sequence for item in found.frames(0) if isinstance(item, Frame)] == [*range(1, 10)]


async def test_a_torn_tail_is_cut_and_kept(path: Path, files: Faulty, caplog: pytest.LogCaptureFixture) -> None:
    journal = await begin(files)
    journal.append(changes(1, 2, 3))
    journal.close()
    newest = path / segment_name(1)
    os.truncate(newest, HEADERS + 3 * FRAME - 5)
    (path / segment_name(2)).write_bytes(b"000001dc")  # its creation was cut short
    torn = newest.read_bytes()[HEADERS + 2 * FRAME :]
    again = await begin(files)
    assert again.end == 2
    again.append(changes(3))
    again.close()
    assert newest.stat().st_size == HEADERS + 2 * FRAME
    assert (path / f"{newest.name}.torn-{HEADERS + 2 * FRAME}").read_bytes() == torn
    assert (path / f"{segment_name(2)}.torn-0").read_bytes() == b"000001dc"
    assert read(path) == [1, 2, 3]
    assert not damage(path)
    assert "x" * 10 not in caplog.text  # no content


async def test_a_crash_while_a_torn_tail_is_cut(path: Path, files: Faulty) -> None:
    journal = await begin(files)
    journal.append(changes(1, 2))
    journal.close()
    os.truncate(path / segment_name(1), HEADERS + FRAME + 9)
    for call in ("create", "sync", "sync_directory", "truncate"):
        files.fail(call)
        with pytest.raises(JournalError, match="torn tails"):
            await read_directory(files).cut_torn_tails()
    (kept,) = await read_directory(files).cut_torn_tails()
    assert (path / kept).stat().st_size == 9
    assert read(path) == [1]


async def test_damage_in_the_middle_costs_only_what_it_hit(path: Path, files: Faulty) -> None:
    journal = await begin(files)
    journal.append(changes(1, 2, 3, 4))
    journal.close()
    with (path / segment_name(1)).open("r+b") as file:
        file.seek(HEADERS + FRAME + 3)
        file.write(b"\n\n\n")
    again = await begin(files)
    assert again.end == 4
    again.close()
    assert read(path) == [1, Gap(2, 2), 3, 4]
    assert damage(path) == [Damage(HEADERS + FRAME, HEADERS + 2 * FRAME, torn=False)]


async def test_a_file_that_can_not_be_read_is_no_damage(files: Faulty) -> None:
    journal = await begin(files)
    journal.append(changes(1))
    journal.close()
    files.fail("read", errno.EIO)
    with pytest.raises(JournalError, match="can't be read"):
        read_directory(files)
    directory = read_directory(files)
    assert directory.end == 1
    files.fail("read", errno.EIO)
    with pytest.raises(JournalError, match="can't be read"):
        list(directory.frames(0))


# Cutting


async def test_segments_are_cut_when_all_of_them_is_stored(path: Path, files: Faulty) -> None:
    journal = await begin(files, segment_bytes=HEADERS + 2 * FRAME)
    for sequence in range(1, 8):
        journal.append(changes(sequence))
    for stored, left in ((1, [1, 2, 3, 4]), (2, [1, 2, 3, 4]), (5, [1, 3, 4]), (7, [1, 4])):
        await journal.cut(stored)  # synced here or not: the database has it
        assert segments(path) == left  # the first one is, so that a power loss leaves a header
    await journal.sync(nothing)
    await journal.cut(7)
    assert segments(path) == [4]
    assert journal.figures.segments == 1
    assert journal.figures.bytes == HEADERS + FRAME
    assert await journal.sync(nothing) == 7
    journal.close()
    assert read(path, 6) == [7]
    again = await begin(files)
    await again.cut(6)
    assert segments(path) == [4, 5]
    await again.cut(7)
    assert segments(path) == [5]
    again.close()
    assert read_directory(files).end == 7  # which the header remembers


async def test_what_is_stored_is_retained_for_a_while(path: Path, files: Faulty) -> None:
    time_s = [100.0]
    journal = await begin(files, segment_bytes=1, retain_s=60, clock=lambda: time_s[0])
    for sequence in (1, 2, 3):
        journal.append(changes(sequence))
    await journal.sync(nothing)
    await journal.cut(1)
    time_s[0] += 30
    await journal.cut(2)
    time_s[0] += 30
    await journal.cut(2)
    assert segments(path) == [2, 3]
    time_s[0] += 30
    await journal.cut(2)
    assert segments(path) == [3]
    journal.close()


async def test_what_can_not_be_removed_is_removed_later(path: Path, files: Faulty) -> None:
    journal = await begin(files, segment_bytes=1)
    for sequence in (1, 2, 3):
        journal.append(changes(sequence))
    await journal.sync(nothing)
    files.fail("unlink")
    await journal.cut(2)
    assert 1 in segments(path)
    await journal.cut(2)
    assert segments(path) == [3]
    journal.close()


async def test_finishing_leaves_a_header(path: Path, files: Faulty) -> None:
    journal = await begin(files)
    journal.append(changes(1, 2))
    await journal.sync(nothing)
    await journal.finish(2)
    journal.close()
    (left,) = path.glob("*.segment")
    assert left.stat().st_size == HEADERS
    found = read_directory(files)
    assert (found.end, found.journal_id, found.generation, found.first_retained) == (2, JOURNAL, 1, 3)


async def test_finishing_keeps_what_is_not_stored(path: Path, files: Faulty) -> None:
    journal = await begin(files)
    journal.append(changes(1, 2))
    await journal.finish(1)
    journal.close()
    assert read(path) == [1, 2]


# Writes that fail


@pytest.mark.parametrize(
    ("error", "taken", "raised"),
    [
        (errno.EIO, 0, JournalError),
        (errno.EIO, 20, JournalError),
        (errno.EIO, 10_000, JournalError),  # it says that it failed, and has written everything
        (errno.ENOSPC, 0, JournalFull),
        (errno.EDQUOT, 7, JournalFull),
        (None, 20, JournalFull),
    ],
)
async def test_a_failed_write_leaves_nothing(
    path: Path, files: Faulty, error: int | None, taken: int, raised: type[JournalError]
) -> None:
    journal = await begin(files)
    journal.append(changes(1))
    files.fail("write", error, taken=taken)
    with pytest.raises(JournalError, match="could not be written") as caught:
        journal.append(changes(2, 3))
    assert type(caught.value) is raised
    assert journal.end == 1
    assert journal.figures.full == (raised is JournalFull)
    assert read(path) == [1]
    journal.append(changes(2))
    assert not journal.figures.full
    journal.close()
    assert read(path) == [1, 2]
    assert segments(path) == [1]
    assert not damage(path)


@pytest.mark.parametrize("taken", [20, 10_000])
async def test_what_can_not_be_undone_is_void(path: Path, files: Faulty, taken: int) -> None:
    journal = await begin(files)
    journal.append(changes(1))
    files.fail("write", taken=taken)
    files.fail("truncate")
    with pytest.raises(JournalError, match="could not be written"):
        journal.append(changes(2, 3))
    assert journal.end == 3  # used up: the caller goes on behind it
    with pytest.raises(ValueError, match="can't follow"):
        journal.append(changes(2))
    journal.append(changes(4))
    assert await journal.sync(nothing) == 4
    await journal.cut(0)
    journal.close()
    assert (path / segment_name(1)).stat().st_size > HEADERS + FRAME  # it is there
    assert read(path) == [1, 4]
    again = await begin(files, segment_bytes=1)
    again.append(changes(5))
    again.append(changes(6))
    await again.sync(nothing)
    again.close()
    (path / segment_name(2)).unlink()  # the header that came first is not the only one to know
    assert read(path) == [1, Gap(4, 4), 5, 6]


async def test_no_segment_to_go_on_with(path: Path, files: Faulty) -> None:
    """The segment is sealed, and a new one can't be made: appends are refused until it can."""
    journal = await begin(files)
    journal.append(changes(1))
    files.fail("write", taken=10_000)
    files.fail("truncate")
    files.fail("create", errno.ENOSPC, times=2)
    with pytest.raises(JournalError):
        journal.append(changes(2))
    for _ in range(2):
        assert journal.end == 2
        with suppress(JournalFull):
            journal.append(changes(3))
            break
    assert journal.end == 3
    assert await journal.sync(nothing) == 3
    journal.close()
    assert read(path) == [1, 3]


@pytest.mark.parametrize("told", [True, False])
async def test_a_crash_before_a_void_is_told(path: Path, files: Faulty, told: bool) -> None:
    """What was refused and could not be undone comes back whole if the process dies before a header could name it."""
    journal = await begin(files)
    journal.append(changes(1))
    files.fail("write", taken=10_000)
    files.fail("truncate")
    if not told:
        files.fail("create", errno.ENOSPC)
    with pytest.raises(JournalError):
        journal.append(changes(2))
    files.close()  # as the death of the process does: nothing more is written
    assert read(path) == ([1] if told else [1, 2])
    again = await begin(Faulty(LocalFiles(path)))
    assert again.end == 2  # never used for another change
    again.append(changes(3))
    again.close()
    assert read(path) == ([1, 3] if told else [1, 2, 3])


@pytest.mark.parametrize(("call", "taken"), [("create", 0), ("write", 0), ("write", 700)])
async def test_a_failed_rotation_is_a_failed_append(path: Path, files: Faulty, call: str, taken: int) -> None:
    journal = await begin(files, segment_bytes=1)
    journal.append(changes(1))
    files.fail(call, errno.ENOSPC, taken=taken)
    with pytest.raises(JournalFull):
        journal.append(changes(2))
    assert journal.end == 1
    assert len(segments(path)) == 1  # what was begun is removed
    journal.append(changes(2))
    assert await journal.sync(nothing) == 2
    journal.close()
    assert read(path) == [1, 2]


async def with_an_unfinished_segment(files: Faulty) -> Journal:
    """Three changes, a segment each; between the first and the second one that was begun in vain, and could not go."""
    journal = await begin(files, segment_bytes=1)
    journal.append(changes(1))
    files.fail("write", taken=700)
    files.fail("unlink")
    with pytest.raises(JournalError):
        journal.append(changes(2))
    journal.append(changes(2))
    journal.append(changes(3))
    return journal


async def test_an_unfinished_segment_that_stays_harms_nobody(path: Path, files: Faulty) -> None:
    journal = await with_an_unfinished_segment(files)
    await journal.sync(nothing)
    journal.close()
    assert len(segments(path)) == 4
    assert read(path) == [1, 2, 3]
    again = await begin(files)
    await again.cut(3)
    assert len(segments(path)) == 1
    again.close()


async def test_an_unfinished_segment_that_stays_is_cut_and_the_one_appended_to_is_not(
    path: Path, files: Faulty
) -> None:
    journal = await with_an_unfinished_segment(files)
    await journal.cut(2)
    assert segments(path) == [1, 4]
    await journal.sync(nothing)
    journal.close()
    assert read(path, 2) == [3]


# Syncs that fail


def power_loss(path: Path, lost: Iterable[int]) -> None:
    """Of these segments nothing but the name is left."""
    for number in lost:
        os.truncate(path / segment_name(number), 0)


async def test_after_a_failed_sync_everything_unstored_is_written_again(path: Path, files: Faulty) -> None:
    journal = await begin(files)
    journal.append(changes(1, 2))
    await journal.sync(nothing)
    journal.append(changes(3, 4))
    files.fail("sync")
    asked: list[int] = []

    def unstored() -> Iterator[tuple[int, bytes]]:
        for sequence in (2, 3, 4):  # 1 is stored by now
            if sequence == 4:
                journal.append(changes(5))  # an append amid the copying
            asked.append(sequence)
            yield sequence, document(sequence)
        yield 5, document(5)

    assert await journal.sync(unstored) == 4
    assert asked == [2, 3, 4]
    assert journal.figures.failures == 1
    assert files.count("sync", segment_name(1)) == 2  # the good ones; the failed one is not tried again
    synced = [name for call, name in files.calls if call == "sync"]
    assert await journal.sync(unstored) == 5
    assert files.count("sync", segment_name(1)) == 2
    assert {segment_name(2), segment_name(3)} <= set(synced)
    journal.close()
    assert read(path) == [1, 2, 3, 4, 5]
    power_loss(path, [1])
    assert read(path, 1) == [2, 3, 4, 5]


async def test_nothing_unstored_needs_no_copy(path: Path, files: Faulty) -> None:
    journal = await begin(files)
    journal.append(changes(1))
    files.fail("sync")
    assert await journal.sync(nothing) == 1
    journal.append(changes(2))
    await journal.cut(1)
    assert segments(path) == [2]
    journal.close()
    assert read(path, 1) == [2]


@pytest.mark.parametrize("kind", ["sync", "sync_directory", "write", "create", "copy"])
async def test_writing_again_may_fail_again_and_again(path: Path, files: Faulty, kind: str) -> None:
    journal = await begin(files)
    journal.append(changes(1, 2, 3))
    for attempt in range(6):
        if kind == "copy":
            files.fail("sync", times=1 if not attempt else 0)
            files.fail("write", skip=2 if not attempt else 1, taken=30)
        else:
            files.fail("sync")
            files.fail(kind, times=9)
        with pytest.raises(JournalError):
            await journal.sync(lambda: iter(changes(1, 2, 3)))
        assert journal.synced == 0
        files.heal()
        assert read(path) == [1, 2, 3]
    assert len(segments(path)) <= 4  # copies do not pile up
    assert await journal.sync(lambda: iter(changes(1, 2, 3))) == 3
    synced = {name for call, name in files.calls if call == "sync"}
    journal.append(changes(4))
    assert await journal.sync(lambda: iter(changes(1, 2, 3, 4))) == 4
    await journal.cut(2)
    power_loss(path, [number for number in segments(path) if segment_name(number) not in synced])
    assert read(path) == [1, 2, 3, 4]
    await journal.cut(3)
    await journal.cut(4)
    assert len(segments(path)) == 1
    journal.close()


async def test_a_new_name_that_is_not_on_the_disk_is_a_failed_sync(path: Path, files: Faulty) -> None:
    journal = await begin(files, segment_bytes=HEADERS + FRAME)
    journal.append(changes(1))
    await journal.sync(nothing)
    journal.append(changes(2))
    files.fail("sync_directory")
    assert await journal.sync(lambda: iter(changes(1, 2))) == 2
    journal.close()
    (path / segment_name(2)).unlink()
    assert read(path) == [1, 2]


async def test_only_an_older_segment_can_not_be_synced(path: Path, files: Faulty) -> None:
    journal = await begin(files, segment_bytes=HEADERS + 2 * FRAME)
    for sequence in range(1, 6):
        journal.append(changes(sequence))
    files.fail("sync", skip=1)
    assert await journal.sync(lambda: iter(changes(1, 2, 3, 4, 5))) == 5
    journal.append(changes(6))
    assert await journal.sync(nothing) == 6
    journal.close()
    power_loss(path, [2])
    assert read(path) == [1, 2, 3, 4, 5, 6]


async def test_a_void_in_a_suspect_segment_stays_void(path: Path, files: Faulty) -> None:
    journal = await begin(files)
    journal.append(changes(1))
    files.fail("write", taken=10_000)
    files.fail("truncate")
    with pytest.raises(JournalError):
        journal.append(changes(2))
    journal.append(changes(3))
    files.fail("sync", times=2)
    assert await journal.sync(lambda: iter(changes(1, 3))) == 3
    journal.close()
    assert read(path) == [1, 3]


async def test_a_sync_that_is_cancelled_is_done_by_the_next(path: Path, files: Faulty) -> None:
    journal = await begin(files)
    journal.append(changes(1))
    files.gate = anyio.Event()
    with anyio.move_on_after(0.01):
        await journal.sync(nothing)
    assert journal.synced == 0
    files.gate = None
    assert await journal.sync(nothing) == 1
    journal.append(changes(2))
    files.fail("sync")

    def cancelling() -> Iterator[tuple[int, bytes]]:
        yield from changes(1)
        scope.cancel()
        yield 2, b'"' + b"x" * (1 << 17) + b'"'

    with anyio.CancelScope() as scope:
        await journal.sync(cancelling)
    assert journal.synced == 1
    assert await journal.sync(lambda: iter(changes(1, 2))) == 2
    journal.close()
    power_loss(path, [1])
    assert read(path) == [1, 2]


async def test_appends_while_a_sync_runs_belong_to_the_next(files: Faulty) -> None:
    journal = await begin(files)
    journal.append(changes(1))
    files.during_sync = lambda: journal.append(changes(journal.end + 1))
    assert await journal.sync(nothing) == 1
    assert journal.end == 2
    assert await journal.sync(nothing) == 2
    journal.close()


@pytest.mark.parametrize("call", ["create", "write", "sync", "sync_directory"])
async def test_a_journal_that_can_not_be_begun(path: Path, files: Faulty, call: str) -> None:
    assert files.lock()
    files.fail(call)
    with pytest.raises(JournalError):
        await begin(files)
    again = await begin(files)
    again.append(changes(1))
    again.close()
    assert read(path) == [1]


async def test_a_closed_journal_takes_nothing(path: Path, files: Faulty) -> None:
    journal = await begin(files)
    journal.close()
    with pytest.raises(JournalError, match="closed"):
        journal.append(changes(1))
    with pytest.raises(JournalError, match="closed"):
        await journal.sync(nothing)
    assert segments(path) == [1]


async def test_voids_outlive_what_they_were_about(path: Path, files: Faulty) -> None:
    """The database ends below two voids, and all segments before them are cut: nothing is missing in between."""
    journal = await begin(files)
    journal.append(changes(1))
    for sequence in (2, 3):
        files.fail("write", taken=10_000)
        files.fail("truncate")
        with pytest.raises(JournalError):
            journal.append(changes(sequence))
    await journal.sync(nothing)
    await journal.finish(1)
    journal.close()
    assert 1 not in segments(path)
    again = await begin(files)
    await again.cut(1)
    again.close()
    found = read_directory(files)
    assert (found.first_retained, found.end, list(found.frames(1))) == (2, 3, [])


# Room


def is_full(journal: Journal) -> bool:
    return journal.figures.full


async def test_appends_stop_while_less_is_free_than_twice_what_is_unstored(path: Path, files: Faulty) -> None:
    pending = [1000]
    journal = await begin(files, pending_bytes=lambda: pending[0])
    journal.append(changes(1))
    files.free = 1999
    journal.append(changes(2))  # not looked at again yet
    assert await journal.sync(nothing) == 2
    with pytest.raises(JournalFull, match=r"has 1999 bytes free and needs 2000"):
        journal.append(changes(3))
    assert is_full(journal)
    assert await journal.sync(nothing) == 2  # all else goes on
    pending[0] = 999
    journal.append(changes(3))
    assert not is_full(journal)
    pending[0] = 1000
    large = [(journal.end + 1, b'"' + b"x" * (256 * 1024) + b'"')]
    with pytest.raises(JournalFull):
        journal.append(large)
    files.free = 2000
    journal.append(large)
    assert journal.end == 4
    journal.close()


class Tank(Faulty):
    """A disk that holds `capacity` bytes."""

    capacity = 1 << 20

    def used(self) -> int:
        return sum(file.stat().st_size for file in Path(self.place).glob("*.segment"))

    def free_bytes(self) -> int:
        return self.capacity - self.used()

    def fault(self, call: str, name: str = "") -> None:
        if call == "write" and self.free_bytes() < FULL_FRAME:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL_DOCUMENT = b'"' + b"x" * 1000 + b'"'
FULL_FRAME = 36 + len(FULL_DOCUMENT)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[JournalFiles]:
    """A file system of one MiB: a real one where we may mount it."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mounted], capture_output=True, check=False
    )
    files = LocalFiles(mounted / "journal") if mount.returncode == 0 else Tank(LocalFiles(mounted / "journal"))
    yield files
    files.close()
    if mount.returncode == 0:
        subprocess.run(["umount", mounted], check=True)


async def test_a_disk_that_fills_and_is_emptied(small_disk: JournalFiles, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    journal = await begin(small_disk, segment_bytes=64 * 1024)
    stored = 0
    for _ in range(3):
        refused = 0
        while refused < 5:
            try:
                journal.append([(journal.end + 1, FULL_DOCUMENT)])
            except JournalFull:
                refused += 1
        assert is_full(journal)
        assert journal.end - stored > 500
        assert await journal.sync(nothing) == journal.end
        before = read_directory(small_disk, JOURNAL)
        assert [item.sequence for item in before.frames(stored) if isinstance(item, Frame)] == [
            *range(stored + 1, journal.end + 1)
        ]
        assert not before.damage
        stored = journal.end - 20
        await journal.cut(stored)  # the database has most of it
    journal.append([(journal.end + 1, FULL_DOCUMENT)])
    assert not is_full(journal)
    journal.close()


# Everything together


FAILING: Final[Sequence[DiskCallName]] = ("create", "write", "truncate", "sync", "sync_directory", "unlink")


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_the_disk_does(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """What was acknowledged is there after a crash, what was synced after a power loss, and nothing else ever was."""
    caplog.set_level(logging.CRITICAL)
    random = Random(seed)
    disk = SimulatedDisk(random)
    acknowledged: set[int] = set()
    refused: set[int] = set()
    stored = 0
    for _ in range(5):
        files = disk.files()
        journal = await begin(files, segment_bytes=HEADERS + 8 * FRAME)
        stored = synced = journal.end  # recovery has stored what was found

        def unstored() -> Iterator[tuple[int, bytes]]:
            return iter(changes(*(sequence for sequence in sorted(acknowledged) if sequence > stored)))  # noqa: B023

        for _ in range(random.randrange(60)):
            if random.random() < 0.3:
                disk.fail(random.choice(FAILING), nth=random.randint(1, 2), done=random.choice((0.0, 0.5, 1.0)))
            action = random.random()
            if action < 0.7:
                sequences = range(journal.end + 1, journal.end + random.randint(2, 4))
                try:
                    journal.append(changes(*sequences))
                except JournalError:
                    refused.update(sequences)
                else:
                    acknowledged.update(sequences)
                    refused.difference_update(sequences)
            elif action < 0.9:
                with suppress(JournalError):
                    synced = await journal.sync(unstored)
            else:
                stored = random.randint(stored, max([stored, *(each for each in acknowledged if each <= synced)]))
                await journal.cut(stored)
            if random.random() < 0.2:
                disk.clear()
        disk.clear()
        powerless = random.random() < 0.5
        disk.lose_power() if powerless else disk.crash()
        journal.close()
        directory = read_directory(disk.files(), JOURNAL)
        found = {item.sequence for item in directory.frames(stored) if isinstance(item, Frame)}
        safe = {sequence for sequence in acknowledged if sequence > stored and (sequence <= synced or not powerless)}
        assert safe <= found
        assert found <= acknowledged | refused
        assert directory.end >= max(safe, default=0)
        acknowledged &= found | set(range(stored + 1))
