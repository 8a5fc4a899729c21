"""The HTTP surface: what it adds to a bare route, and what writing behind is worth, over the wire."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from statistics import median

import httpx
import msgspec
import psutil
import pytest

from http_rig import Server, free_port, serving, started

from .load import Load, drive, request
from .measure import Side, compare, figure
from .sample import median_message, messages

pytestmark = [pytest.mark.anyio, pytest.mark.benchmark, pytest.mark.timeout(900)]

CONNECTIONS = 32
REQUESTS = 10_000
ROUNDS = 7
AT_LEAST = 0.5
HISTORY = 100


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    """The loop of the load; each server has its own process."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`agent-runtime serve` with its defaults on SQLite: it flushes all the time at this load."""
    with serving("--storage", f"sqlite:///{tmp_path_factory.mktemp('ours') / 'sessions.db'}") as server:
        prepare(server)
        yield server


def prepare(server: Server) -> None:
    """A session for each connection, and one with more than 100 messages."""
    with httpx.Client(base_url=server.url) as client:
        for number in range(CONNECTIONS):
            client.put(f"/v1/sessions/s{number}").raise_for_status()
        client.put("/v1/sessions/long").raise_for_status()
        batch = {"messages": messages(HISTORY + 50)}
        client.post("/v1/sessions/long/messages/batch", json=batch).raise_for_status()


@pytest.fixture(scope="module", params=["uvicorn", "ours"])
def bare(request: pytest.FixtureRequest, ours: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bare routes on uvicorn as it comes, or on our engine; the history is the same bytes."""
    history = tmp_path_factory.mktemp("bare") / "history.json"
    history.write_bytes(httpx.get(f"{ours.url}/v1/sessions/long/history?limit={HISTORY}").content)
    script = Path(__file__).parent / "bare_server.py"
    with started([sys.executable, str(script), str(free_port()), str(history), request.param], 1) as server:
        yield server


def appends() -> list[Iterator[bytes]]:
    """For each connection appends to a session of its own, of the median message."""
    body = msgspec.json.encode(median_message())
    return [repeat(request("POST", f"/v1/sessions/s{number}/messages", body)) for number in range(CONNECTIONS)]


def histories() -> list[Iterator[bytes]]:
    return [repeat(request("GET", f"/v1/sessions/long/history?limit={HISTORY}"))] * CONNECTIONS


def side(server: Server, requests: Callable[[], list[Iterator[bytes]]], status: bytes, loads: list[Load]) -> Side:
    """Requests a second."""

    async def run() -> float:
        loads.append(await drive(server.port, requests(), REQUESTS, status))
        return loads[-1].rate

    return run


@pytest.mark.parametrize(("what", "requests", "status"), [("append", appends, b"201"), ("history", histories, b"200")])
async def test_against_a_bare_route(
    ours: Server,
    bare: Server,
    what: str,
    requests: Callable[[], list[Iterator[bytes]]],
    status: bytes,
    request: pytest.FixtureRequest,
) -> None:
    """Judged against what somebody has without us; on our engine a bare route is quicker than that too."""
    engine = request.node.callspec.params["bare"]
    loads: tuple[list[Load], list[Load]] = [], []
    sides = [side(server, requests, status, each) for server, each in zip((ours, bare), loads, strict=True)]
    name = f"{what} over HTTP, {CONNECTIONS} connections, requests; bare on {engine}"
    await compare(name, *sides, rounds=ROUNDS, unit="/s", at_least=AT_LEAST if engine == "uvicorn" else None)
    slow, quick = (median(load.p95 for load in each) for each in loads)
    figure(f"{what}: p95, ours / bare on {engine}", slow / quick)


async def test_writing_behind_against_writing_through(tmp_path: Path) -> None:
    """The same surface, once with its defaults, once with each change waited for in a transaction of its own."""
    through = {"AGENT_RUNTIME__WRITE_BEHIND__DURABILITY": "stored", "AGENT_RUNTIME__WRITE_BEHIND__BATCH_CHANGES": "1"}
    found = []
    for name, environ in (("behind", {}), ("through", through)):
        with serving("--storage", f"sqlite:///{tmp_path / name}.db", environ=environ) as server:
            prepare(server)
            before = httpx.get(f"{server.url}/v1/status").json()["flush"]["batches"]
            load = await drive(server.port, appends(), REQUESTS, b"201")
            memory = psutil.Process(server.process.pid).memory_info().rss
            httpx.post(f"{server.url}/v1/flush").raise_for_status()
            writes = httpx.get(f"{server.url}/v1/status").json()["flush"]["batches"] - before
            found.append((writes, load.p95, load.rate, memory))
    (writes, p95, rate, memory), (writes_through, p95_through, rate_through, memory_through) = found
    figure(f"writing behind: fewer transactions ({writes_through} / {writes})", writes_through / writes)
    figure(f"writing behind: p95 through / behind ({p95_through * 1e3:.1f} / {p95 * 1e3:.1f} ms)", p95_through / p95)
    figure(f"writing behind: requests/s behind / through ({rate:.0f} / {rate_through:.0f})", rate / rate_through)
    figure(
        f"writing behind: memory behind / through ({memory >> 20} / {memory_through >> 20} MiB)",
        memory / memory_through,
    )
