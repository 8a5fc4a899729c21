"""What the levels of durability promise is kept, whatever happens: thousands of histories, each from a seed.

To play one again: `pytest "tests/test_simulation.py::test_every_promise_is_kept[17]" -m ""`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest

from agent_runtime.journal import Directory, Journal, JournalFiles
from agent_runtime.keeper import JournalKeeper
from agent_runtime.log import Log
from agent_runtime.testing.disk import _OpenFile
from simulated_database import SimulatedDatabase
from simulation import Broken, simulate

SEEDS = 30
SEEDS_LONG = 2000
SEEDS_MUTANT = 100


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.long] if seed >= SEEDS else []) for seed in range(SEEDS_LONG)]
)
def test_every_promise_is_kept(seed: int) -> None:
    _played(seed)


_played = cache(simulate)


def test_a_seed_is_one_history() -> None:
    assert simulate(1) == simulate(1) != simulate(2)


def test_the_histories_are_rich() -> None:
    """Or they would prove little."""
    results = [_played(seed) for seed in range(SEEDS)]
    assert {loss for result in results for loss in result.losses} == {"process", "power", "journal"}
    assert sum(result.changes for result in results) > 100 * SEEDS
    assert sum(result.lost for result in results) > SEEDS  # what may be lost is lost
    told = "\n".join(line for result in results for line in result.trace)
    for what in ("perhaps", "refused", "was held", "JournalFull", "DurabilityNotReached", "StorageUnavailable"):
        assert what in told, what


# --- mutants ----------------------------------------------------------------------------------------------------------


def acknowledged_before_it_is_written() -> Any:
    """As a file does that keeps in its own buffer what it was given last."""
    write, sync = _OpenFile.write, _OpenFile.sync

    def write_before(file: _OpenFile, data: bytes) -> int:
        buffered, file.__dict__["buffered"] = file.__dict__.get("buffered", b""), data
        write(file, buffered)
        return len(data)

    async def write_and_sync(file: _OpenFile) -> None:
        write_before(file, b"")
        await sync(file)

    return patch.multiple(_OpenFile, write=write_before, sync=write_and_sync)


def cut_before_it_is_stored() -> Any:
    async def cut(keeper: JournalKeeper) -> None:
        await keeper.journal.cut(keeper._log.accepted)

    return patch.object(JournalKeeper, "_cut", cut)


def cut_before_the_commit_is_power_safe() -> Any:
    async def sync(_database: SimulatedDatabase, _server: object) -> None:
        """As a database does that is not told to sync each commit."""

    return patch.object(SimulatedDatabase, "sync", sync)


@contextmanager
def a_sequence_is_used_again_after_a_lost_tail() -> Iterator[None]:
    """The log goes on where the journal ends, even if the database has more."""
    begin, make = Journal.begin, Log.__init__

    async def begin_there(files: JournalFiles, directory: Directory, **options: Any) -> Journal:
        return await begin(files, directory, **options | {"after": directory.end or options["after"]})

    def make_there(log: Log, sequence: int, journal: Journal | None = None, **options: Any) -> None:
        make(log, sequence if journal is None else journal.end, journal, **options)

    with patch.object(Journal, "begin", begin_there), patch.object(Log, "__init__", make_there):
        yield


def a_sequence_is_used_again_after_a_failed_write() -> Any:
    undo = Journal._undo

    def forgetful(journal: Journal, segment: Any, last: int) -> None:
        end = journal.end
        undo(journal, segment, last)
        journal.end = end
        journal._segments.voids.clear()

    return patch.object(Journal, "_undo", forgetful)


def synced_moves_after_a_failed_sync() -> Any:
    def trusting(_journal: Journal, _segments: object, _error: OSError) -> None:
        """As if the next sync of the same file would bring what this one did not."""

    return patch.object(Journal, "_distrust", trusting)


MUTANTS: dict[Callable[[], Any], int] = {
    acknowledged_before_it_is_written: 3,
    cut_before_it_is_stored: 3,
    cut_before_the_commit_is_power_safe: 1,
    a_sequence_is_used_again_after_a_lost_tail: 11,
    a_sequence_is_used_again_after_a_failed_write: 3,
    synced_moves_after_a_failed_sync: 6,
}
"""Ways to break it, each with a seed that tells. A change of the code may make it another one: then all are tried."""


@pytest.mark.parametrize(("mutant", "known"), MUTANTS.items())
def test_a_broken_journal_is_caught(
    mutant: Callable[[], Any], known: int, record_property: Callable[[str, object], None]
) -> None:
    for seed in (known, *range(SEEDS_MUTANT)):
        try:
            with mutant():
                simulate(seed)
        except Broken as broken:
            record_property("caught", f"seed {seed}: {broken}")
            return
    pytest.fail(f"not caught by {SEEDS_MUTANT} seeds")
