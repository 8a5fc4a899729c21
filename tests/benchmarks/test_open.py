"""Opening a database, and the first page of its sessions: with very many sessions in it and with few."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import pytest

from places import Place, in_file

from .measure import Side, compare, seconds

pytestmark = [pytest.mark.anyio, pytest.mark.benchmark, pytest.mark.timeout(900)]

MANY, FEW = 100_000, 10
AT_MOST = 1.2


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Place]:
    """Databases with 100,000 sessions and with 10."""
    return _filled(tmp_path_factory.mktemp("many"), MANY), _filled(tmp_path_factory.mktemp("few"), FEW)


def _filled(directory: Path, sessions: int) -> Place:
    place = in_file(directory)
    with place.open_blocking() as runtime:
        for number in range(sessions):
            runtime.create_session(user_id=f"user {number % 7}", title=f"Session {number}")
            if number % 1000 == 999:
                runtime.flush()
    return place


async def test_open(filled: tuple[Place, Place], anyio_backend: str) -> None:
    """From the call to the runtime that serves: connections, checks, the lease."""

    def opening(place: Place) -> Side:
        async def side() -> float:
            started = perf_counter()
            async with place.open():
                return perf_counter() - started

        return side

    many, few = map(opening, filled)
    await compare(f"open with 100,000 sessions / 10, {anyio_backend}", many, few, rounds=40, at_most=AT_MOST)


@pytest.mark.parametrize("user_id", [None, "user 3"], ids=["all", "of one user"])
async def test_first_page(filled: tuple[Place, Place], user_id: str | None, anyio_backend: str) -> None:
    """The newest sessions, as many as the small database has; nothing is in memory of either."""
    async with filled[0].open() as many, filled[1].open() as few:
        size = len((await few.list_sessions(user_id=user_id, limit=FEW)).items)
        assert len((await many.list_sessions(user_id=user_id, limit=size)).items) == size
        await compare(
            f"first page of 100,000 sessions / 10, {'of one user' if user_id else 'all'}, {anyio_backend}",
            lambda: seconds(many.list_sessions(user_id=user_id, limit=size)),
            lambda: seconds(few.list_sessions(user_id=user_id, limit=size)),
            rounds=200,
            at_most=AT_MOST,
        )
