"""`GET /metrics`: every figure has its place in the README, says what happens when things go wrong, and is its runtime's."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from random import Random

import anyio
import msgspec
import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Scope

import agent_runtime_metrics
from agent_runtime import (
    Config,
    JournalError,
    JournalFull,
    Overloaded,
    Quarantined,
    Runtime,
    Status,
    hookimpl,
    open_runtime,
)
from agent_runtime.histograms import SECONDS, Histogram
from agent_runtime.testing import Faults, SimulatedDisk, creates_session, faulty_plugin
from agent_runtime_http import Unauthenticated, create_app, lifespan
from agent_runtime_memory import MemoryDatabase
from agent_runtime_metrics import registry_of
from figures import Figures, counted
from http_rig import App, opened
from places import NEVER_S, in_file
from rig import all_wait, running

ROOM = 65_536
README = Path(agent_runtime_metrics.__file__).with_name("README.md").read_text(encoding="utf-8")


def look(runtime: Runtime) -> Figures:
    return Figures(generate_latest(registry_of(runtime)).decode())


async def figures_of(app: App) -> Figures:
    reply = await app("GET", "/metrics")
    assert reply.status == 200
    return Figures(reply.body.decode())


# --- documents --------------------------------------------------------------------------------------------------------


def rows(heading: str) -> list[list[str]]:
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.anyio
async def test_every_figure_stands_in_the_readme_with_its_type_and_labels(tmp_path: Path) -> None:
    async with opened(in_file(tmp_path).url) as app:
        figures = await figures_of(app)
    found: dict[str, tuple[str, list[str]]] = {}
    for name, family in figures.families.items():
        if name.startswith("agent_runtime_"):
            labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            found[name + ("_total" if family.type == "counter" else "")] = (family.type, labels)
    described: dict[str, tuple[str, list[str]]] = {}
    for name, kind, *more in rows("Figures"):
        labels = sorted(re.findall(r"`(\w+)`", more[0])) if len(more) == 2 else []
        described[name.strip("`")] = (kind, labels)
    assert described == found


@pytest.mark.anyio
async def test_the_four_questions_are_asked_of_figures_that_are_there(tmp_path: Path) -> None:
    async with opened(in_file(tmp_path).url) as app:
        figures = await figures_of(app)
    names = {sample.name for family in figures.families.values() for sample in family.samples}
    questions = rows("Four questions")
    assert len(questions) == 4
    for _, query in questions:
        asked = re.findall(r"agent_runtime_\w+", query)
        assert asked
        assert set(asked) <= names


def test_the_program_of_the_readme_runs() -> None:
    [program] = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert Figures(done.stdout)("append_duration_seconds_count", level="buffered") == 1


# --- the route --------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_it_speaks_both_formats() -> None:
    async with opened() as app:
        plain = await app("GET", "/metrics")
        assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        wanted = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
        open_format = await app("GET", "/metrics", headers=wanted)
        assert open_format.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        families = {family.name for family in text_string_to_metric_families(open_format.body.decode())}  # type: ignore[no-untyped-call]
        assert families == set(Figures(plain.body.decode()).families)
        assert (await app("POST", "/metrics")).status == 405


@pytest.mark.anyio
async def test_who_has_to_say_who_they_are_has_to_here() -> None:
    class Gatekeeper:
        @hookimpl
        def agent_runtime_http_authenticate(self, scope: Scope) -> object:
            if (b"authorization", b"Bearer right") in scope["headers"]:
                return "prometheus"
            raise Unauthenticated

    async with opened(plugins=[Gatekeeper()]) as app:
        assert (await app("GET", "/metrics")).status == 401
        assert (await app("GET", "/metrics", headers={"authorization": "Bearer right"})).status == 200


@pytest.mark.anyio
async def test_each_of_several_runtimes_has_figures_of_its_own() -> None:
    one, two = create_app("memory:"), create_app("memory:")
    both = App(Starlette(routes=[Mount("/one", one), Mount("/two", two)]))
    for _ in range(2):  # and when they are opened again
        async with lifespan(one), lifespan(two):
            for name, count in (("one", 1), ("two", 2)):
                for _ in range(count):
                    assert (await both("POST", f"/{name}/v1/sessions", {"system_prompt": "hi"})).status == 201
            for name, count in (("one", 1), ("two", 2)):
                figures = Figures((await both("GET", f"/{name}/metrics")).body.decode())
                assert figures("watermark", level="accepted") == count
                assert figures("info", version=version("agent-runtime"), storage="memory", durability="buffered") == 1
        assert (await both("GET", "/one/metrics")).status == 503  # by which Prometheus knows that it is down


@pytest.mark.anyio
async def test_it_can_be_disabled_and_does_not_need_the_surface() -> None:
    async with opened(Config.of("memory:", plugins={"disabled": ["metrics"]})) as app:
        assert (await app("GET", "/metrics")).status == 404
    async with open_runtime(Config.of("memory:", plugins={"disabled": ["http"]})) as runtime:
        assert look(runtime)("pending_changes") == 0


# --- when things go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_batches_that_fail_and_calls_that_are_refused() -> None:
    faults = Faults()
    limits = {"interval_s": NEVER_S, "pending_bytes_max": ROOM, "append_timeout_s": 0.05, "drain_timeout_s": 2.0}
    async with running(faults, write_behind=limits) as runtime:
        session = await runtime.create_session("s")
        outage = faults.fail("apply")
        with pytest.raises(Overloaded):
            for _ in range(10):
                await session.append("user", "x" * 10_000)
        figures = look(runtime)
        assert figures("overloaded_total") == 1
        assert figures("state", state="degraded") == 1
        assert figures("flush_failures_total") == outage.hits > 0
        assert figures("flush_retries_total") in (outage.hits, outage.hits - 1)
        assert figures("flush_failing_seconds") > 0
        assert 0 < figures("pending_bytes") <= figures("pending_limit_bytes") == ROOM
        assert figures("pending_waiting") == 0
        outage.stop()
        await runtime.flush()
        figures = look(runtime)
        assert figures("state", state="running") == 1
        assert figures("flush_failing_seconds") == figures("pending_changes") == 0


@pytest.mark.anyio
async def test_a_batch_that_was_reported_as_failed_and_found_stored_counts() -> None:
    faults = Faults()
    async with running(faults) as runtime:
        session = await runtime.create_session("s")
        await session.append("user", "hi")
        faults.fail("apply", nth=1, after_effect=True)
        await runtime.flush()
        flush, figures = runtime.status().flush, look(runtime)
        assert (flush.failures, flush.batches, flush.changes, flush.last_changes) == (1, 1, 2, 2)
        assert (figures("flush_changes_count"), figures("flush_changes_sum")) == (1, 2)
        assert figures("flush_duration_seconds_count") == 0  # nobody knows how long it took
        await session.append("user", "again", durability="stored")
        flush, figures = runtime.status().flush, look(runtime)
        assert (flush.batches, flush.changes, flush.last_changes) == (2, 3, 1)
        assert (figures("flush_changes_count"), figures("flush_changes_sum")) == (2, 3)
        assert figures("flush_duration_seconds_count") == 1


@pytest.mark.anyio
async def test_who_waits_for_room_is_seen() -> None:
    faults = Faults()
    limits = {"interval_s": NEVER_S, "pending_bytes_max": ROOM, "drain_timeout_s": 2.0}
    async with running(faults, write_behind=limits) as runtime, anyio.create_task_group() as tasks:
        session = await runtime.create_session("s")
        gate = faults.hold("apply")
        for _ in range(4):
            tasks.start_soon(session.append, "user", "x" * 40_000)
        await gate.reached.wait()
        await all_wait()
        assert look(runtime)("pending_waiting") == 3
        gate.open()


@pytest.mark.anyio
async def test_what_the_database_refuses() -> None:
    faults = Faults()
    faults.reject(creates_session("poisoned"))
    async with running(faults) as runtime:
        session = await runtime.create_session("poisoned")
        await session.append("user", "behind it")
        with pytest.raises(Quarantined):
            await runtime.flush()
        figures = look(runtime)
        assert figures("quarantined_changes_total") == 1
        assert (figures("quarantine_changes"), figures("held_sessions")) == (2, 1)


@pytest.mark.anyio
async def test_a_journal_that_can_not_be_synced_or_written() -> None:
    database, disk = MemoryDatabase(), SimulatedDisk(Random(1))
    config = Config.of("faulty:memory:", journal={"enabled": True}, write_behind={"interval_s": NEVER_S})
    plugins = [faulty_plugin(database.open, Faults())]
    async with open_runtime(config, plugins=plugins, files=disk.files()) as runtime:
        session = await runtime.create_session("s")
        disk.capacity_bytes = 0
        with pytest.raises(JournalFull):
            await session.append("user", "x" * 300_000)
        assert look(runtime)("journal_full") == 1
        disk.capacity_bytes = None
        await session.append("user", "hi")
        assert look(runtime)("journal_full") == 0
        disk.fail("sync")
        journal = runtime._journal
        assert journal is not None
        with pytest.raises(JournalError):
            await journal.journal.sync(runtime._scheduler.unstored)
        assert look(runtime)("journal_sync_failures_total") >= 1


@pytest.mark.anyio
async def test_a_status_stays_as_it_was() -> None:
    async with running() as runtime:
        session = await runtime.create_session("s")
        await session.append("user", "hi")
        await runtime.flush()
        taken = runtime.status()
        before = msgspec.json.encode(taken)
        await session.append("user", "hi")
        await runtime.flush()
        assert msgspec.json.encode(taken) == before
        assert msgspec.json.decode(before, type=Status) == taken


# --- histograms -------------------------------------------------------------------------------------------------------


def test_values_are_counted_in_their_buckets() -> None:
    values = [0.0, 1e-5, 1.1e-5, 0.3, 50.0, 51.0]
    histogram = Histogram.of(SECONDS)
    for value in values:
        histogram.observe(value)
    assert histogram.counts == counted(values)
    assert (histogram.count, histogram.sum) == (6, sum(values))
    earlier = histogram.copy()
    histogram.observe(0.3)
    assert earlier.count == 6
    assert histogram.since(earlier).counts == counted([0.3])


def test_a_quantile_lies_in_its_bucket_as_prometheus_has_it() -> None:
    histogram = Histogram.of((1.0, 2.0, 4.0))
    assert histogram.quantile(0.5) is None
    for value in (0.5, 1.5, 1.5, 3.0):
        histogram.observe(value)
    assert [histogram.quantile(share) for share in (0, 0.25, 0.5, 0.75, 1)] == [0.0, 1.0, 1.5, 2.0, 4.0]
    histogram.observe(100.0)
    assert histogram.quantile(1) == 4.0
