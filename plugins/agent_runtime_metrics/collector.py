"""The figures of a runtime as Prometheus takes them, worked out anew each time they are collected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from itertools import accumulate
from typing import Final, get_args

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from agent_runtime import Runtime, Status
from agent_runtime.histograms import Histogram
from agent_runtime.status import JournalStatus, State

__all__ = ["make_registry"]

_STATES: Final = get_args(State)


def make_registry(runtime: Runtime) -> CollectorRegistry:
    """A registry with the figures of this runtime and of its process."""
    registry = CollectorRegistry()
    registry.register(_RuntimeCollector(runtime))
    ProcessCollector(registry=registry)
    return registry


class _RuntimeCollector(Collector):
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._info = {
            "version": version("agent-runtime"),
            "storage": runtime.config.storage.url.partition(":")[0],
            "durability": runtime.status().durability,
        }

    def collect(self) -> Iterator[Metric]:
        status = self._runtime.status()
        yield _labelled("info", "Always 1.", self._info)
        yield from _log(status)
        yield from _flushes(status)
        yield from _residents(status)
        if status.journal is not None:
            yield from _journal(status.journal)


def _log(status: Status) -> Iterator[Metric]:
    states = _family("state", "1 for the state that it is in.", "state")
    for state in _STATES:
        states.add_metric([state], state == status.state)
    yield states
    watermarks = _family("watermark", "The sequence up to which changes have reached a level.", "level")
    marks = status.watermarks
    levels = {
        "accepted": marks.accepted,
        "journaled": marks.journaled,
        "synced": marks.synced,
        "stored": marks.stored,
    }
    for level, sequence in levels.items():
        if sequence is not None:
            watermarks.add_metric([level], sequence)
    yield watermarks
    appends = HistogramMetricFamily(
        _name("append_duration_seconds"),
        "Calls that appended messages, by the level they waited for.",
        labels=["level"],
    )
    for level, histogram in status.appends.items():
        appends.add_metric([level], _buckets(histogram), histogram.sum)
    yield appends
    pending = status.pending
    yield _counter("overloaded", "Calls refused for want of room for unstored changes.", pending.refused)
    yield _gauge("pending_waiting", "Calls that wait for room for unstored changes.", pending.waiting)
    yield _gauge("pending_changes", "Changes that are not in the database yet.", pending.changes)
    yield _gauge("pending_bytes", "What unstored changes take.", pending.bytes)
    yield _gauge("pending_limit_bytes", "What unstored changes may take.", pending.bytes_max)
    yield _gauge("pending_oldest_age_seconds", "How long the oldest unstored change waits.", pending.oldest_age_s)


def _flushes(status: Status) -> Iterator[Metric]:
    flush, quarantine = status.flush, status.quarantine
    yield _histogram("flush_duration_seconds", "Transactions that stored a batch.", flush.durations)
    yield _histogram("flush_changes", "Changes in a stored batch.", flush.sizes)
    yield _counter("flush_failures", "Batches that failed.", flush.failures)
    yield _counter("flush_retries", "Batches that were tried again.", flush.retries)
    yield _gauge("flush_failing_seconds", "For how long batches have failed.", flush.failing_s or 0.0)
    yield _counter("quarantined_changes", "Changes that the database refused.", flush.quarantined)
    yield _gauge("quarantine_changes", "Changes in quarantine.", quarantine.changes)
    yield _gauge("held_sessions", "Sessions with changes in quarantine.", quarantine.sessions)


def _residents(status: Status) -> Iterator[Metric]:
    residents, pool, lease = status.residents, status.pool, status.lease
    yield _counter("resident_hits", "Looks at a session that found it in memory.", residents.hits)
    yield _counter("resident_misses", "Looks at a session that had to load it.", residents.misses)
    yield _counter("resident_evictions", "Sessions that made room for others.", residents.evictions)
    yield _gauge("resident_sessions", "Sessions in memory.", residents.count)
    yield _gauge("resident_bytes", "What the sessions in memory take.", residents.bytes)
    yield _gauge("resident_limit_bytes", "What the sessions in memory may take.", residents.bytes_max)
    yield _gauge("pool_connections", "Connections to the database that there may be.", pool.size)
    yield _gauge("pool_connections_in_use", "Connections to the database in use.", pool.in_use)
    yield _gauge("unfinished_journals", "Journals whose changes come in late.", len(status.unfinished))
    yield _gauge("lease_epoch", "The epoch of the lease.", lease.epoch)
    yield _gauge("lease_remaining_seconds", "Until another runtime may take the lease.", lease.expires_in_s)
    yield _gauge("lease_unreachable", "1 while the lease can't be renewed.", lease.unreachable)


def _journal(journal: JournalStatus) -> Iterator[Metric]:
    yield _gauge("journal_bytes", "The size of the journal.", journal.bytes)
    yield _gauge("journal_segments", "The files of the journal.", journal.segments)
    yield _histogram("journal_sync_duration_seconds", "Syncs of the journal to the disk.", journal.syncs)
    yield _counter("journal_sync_failures", "Syncs of the journal that failed.", journal.sync_failures)
    yield _gauge("journal_full", "1 while changes are refused because the disk is full.", journal.full)


def _name(name: str) -> str:
    return f"agent_runtime_{name}"


def _family(name: str, text: str, label: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(_name(name), text, labels=[label])


def _labelled(name: str, text: str, labels: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily(_name(name), text, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_name(name), text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(_name(name), text, value)  # it adds `_total`


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    return HistogramMetricFamily(_name(name), text, _buckets(histogram), histogram.sum)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """As Prometheus counts: each bucket with all that is in those below it."""
    return list(zip([*map(str, histogram.bounds), "+Inf"], accumulate(histogram.counts), strict=True))
