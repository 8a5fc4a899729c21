"""Two runtimes on one database take over from one another, whatever becomes of the holder, and nothing is lost."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from agent_runtime import Config, open_runtime
from places import in_file, in_schema
from takeover_rig import Takeovers

logger = logging.getLogger(__name__)
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """Of this process; the runtimes are others."""
    return "asyncio"


ROUNDS = [2, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(3000)])]


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_rounds_of_takeovers_lose_nothing(kind: str, rounds: int, tmp_path: Path) -> None:
    place = in_file(tmp_path) if kind == "sqlite" else in_schema(tmp_path)
    journals = ("", "") if kind == "sqlite" else (str(tmp_path / "first"), str(tmp_path / "second"))
    takeovers = Takeovers(place.url, journals, tmp_path, seed=rounds)
    async with takeovers.running():
        await takeovers.run(rounds)
    assert takeovers.check_batches() == []
    for journal in dict.fromkeys((*journals, *journals)):  # what either still has comes in now
        async with open_runtime(Config.of(place.url, journal={"directory": journal or None}, lease={"wait": True})):
            pass
    async with open_runtime(Config.of(place.url, journal={"directory": journals[0] or None})) as runtime:
        assert await takeovers.book.broken(runtime) == []
        assert runtime.status().unfinished == ()
    figures = takeovers.figures
    logger.info("%s: %s", kind, vars(figures))
    assert figures.acknowledged > 20 * rounds
