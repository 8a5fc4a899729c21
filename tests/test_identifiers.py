"""Identifiers are UUIDv7, and only grow, whatever the clock does."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from random import Random
from uuid import RFC_4122, UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_runtime.identifiers import Identifiers, utc_now

milliseconds = st.integers(0, 2**48 - 2)


def ticking(times_ms: list[int]) -> Identifiers:
    """An object whose clock shows `times_ms`, one a call; the first also when it is made."""
    clock: Iterator[int] = iter([times_ms[0], *times_ms])
    return Identifiers(lambda: next(clock), Random(7).getrandbits)


def time_ms(identifier: str) -> int:
    return UUID(identifier).int >> 80


@given(st.lists(milliseconds, min_size=1), st.randoms(use_true_random=False))
def test_every_identifier_is_a_uuid_of_version_7(times_ms: list[int], random: Random) -> None:
    clock = iter([0, *times_ms])
    identifiers = Identifiers(lambda: next(clock), random.getrandbits)
    for _ in times_ms:
        identifier = identifiers.new()
        assert str(UUID(identifier)) == identifier
        assert UUID(identifier).version == 7
        assert UUID(identifier).variant == RFC_4122


@given(st.lists(st.one_of(milliseconds, st.integers(1000, 1003)), min_size=1))
def test_identifiers_grow_while_the_clock_stands_still_or_steps_back(times_ms: list[int]) -> None:
    identifiers = ticking(times_ms)
    made = [identifiers.new() for _ in times_ms]
    assert made == sorted(set(made))
    latest_ms = [max(times_ms[: count + 1]) for count in range(len(times_ms))]
    assert [time_ms(identifier) for identifier in made] == latest_ms


@pytest.mark.parametrize("bit", range(1, 42))
def test_the_counter_carries_through_every_bit(bit: int) -> None:
    identifiers = ticking([5000] * 4)
    identifiers._count(2**bit - 2)
    made = [identifiers.new() for _ in range(4)]
    assert made == sorted(set(made))


def test_a_used_up_counter_moves_on_to_the_next_millisecond() -> None:
    identifiers = ticking([5000] * 4)
    identifiers._count(2**42 - 3)
    made = [identifiers.new() for _ in range(4)]
    assert made == sorted(set(made))
    assert [time_ms(identifier) for identifier in made] == [5000, 5000, 5001, 5001]


def test_a_clock_before_1970_is_taken_for_1970() -> None:
    identifiers = ticking([-5, -4])
    assert [time_ms(identifiers.new()) for _ in range(2)] == [0, 0]


def test_two_objects_of_one_moment_make_different_identifiers() -> None:
    made = [Identifiers(lambda: 5000, Random(seed).getrandbits).new() for seed in range(100)]
    assert len(set(made)) == 100


def test_the_time_is_aware_and_in_utc() -> None:
    assert utc_now().utcoffset() == timedelta(0)
