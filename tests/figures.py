"""What /metrics says, read as Prometheus reads it, to be compared with what was counted otherwise."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from agent_runtime.histograms import SECONDS


class Figures:
    """The figures of one look, by name, without `agent_runtime_`."""

    def __init__(self, text: str) -> None:
        self.families: dict[str, Metric] = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self._samples[f"agent_runtime_{name}", frozenset(labels.items())]

    def of_process(self, name: str) -> float:
        """A figure of the process."""
        return self._samples[f"process_{name}", frozenset()]

    def buckets(self, name: str, bounds: Sequence[float] = SECONDS, **labels: str) -> list[float]:
        """The buckets of a histogram, each without those below it."""
        totals = [self(f"{name}_bucket", le=le, **labels) for le in (*map(str, bounds), "+Inf")]
        return [now - before for before, now in zip([0.0, *totals], totals, strict=False)]


def counted(values: Iterable[float], bounds: Sequence[float] = SECONDS) -> list[float]:
    """The buckets that these values fall into."""
    buckets = [0.0] * (len(bounds) + 1)
    for value in values:
        buckets[bisect_left(bounds, value)] += 1
    return buckets
