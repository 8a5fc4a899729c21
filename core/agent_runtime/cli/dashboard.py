"""A server's figures as an operator reads them: a few rows of text, and what they have come to since the last looks.

Knows nothing of terminals: a row is text with a style, and status.py puts it where it belongs. Rates and quantiles are
those of the last seconds; after a single look there are no rates, and quantiles are those since the start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from ..histograms import Histogram
from ..records import Durability
from ..status import Status

__all__ = ["ASCII", "UNICODE", "Board", "Glyphs", "Row", "Tone"]

Tone: TypeAlias = Literal["", "good", "warning", "bad"]
_Figure: TypeAlias = Callable[[Status], int]

_WINDOW_S: Final = 10.0
_RATES_MAX: Final = 200
_BAR_CELLS: Final = 16


class Glyphs(NamedTuple):
    """What bars and curves are drawn with, and the signs that not every terminal has."""

    full: str
    empty: str
    curve: str
    micro: str
    lamp: str
    missing: str


UNICODE: Final = Glyphs("■", "·", "▁▂▃▄▅▆▇█", "µs", "●", "–")
ASCII: Final = Glyphs("#", ".", "_.-=+*%#", "us", "*", "-")


class Row(NamedTuple):
    """A line: its label, a short value, and what there is to say besides. `gap`: it begins a new group."""

    label: str
    value: str
    text: str = ""
    tone: Tone = ""
    gap: bool = False


class _Look(NamedTuple):
    at_s: float
    status: Status


class Board:
    """The figures of one server, look by look. Times are of a clock that only runs forward."""

    def __init__(self, glyphs: Glyphs = UNICODE) -> None:
        self.glyphs = glyphs
        self._looks: deque[_Look] = deque()
        self._rates: deque[float] = deque(maxlen=_RATES_MAX)

    def add(self, at_s: float, status: Status) -> None:
        """What was found at this time. What another runtime counted before is forgotten: it began anew."""
        looks = self._looks
        if looks and looks[-1].status.lease.epoch != status.lease.epoch:
            looks.clear()
        if looks:
            accepted = status.watermarks.accepted - looks[-1].status.watermarks.accepted
            self._rates.append(max(0, accepted) / max(at_s - looks[-1].at_s, 1e-3))
        looks.append(_Look(at_s, status))
        while len(looks) > 2 and looks[1].at_s <= at_s - _WINDOW_S:
            looks.popleft()

    @property
    def state(self) -> tuple[str, Tone]:
        """What the server says of itself, and whether that is good."""
        state = self._looks[-1].status.state
        told = {"degraded": "degraded: batches fail", "fenced": "fenced: another runtime has taken over"}
        tones: dict[str, Tone] = {"running": "good", "degraded": "warning", "fenced": "bad"}
        return told.get(state, state), tones[state]

    @property
    def period(self) -> str:
        """What rates and quantiles are of."""
        seconds = self._seconds
        return "since the start" if seconds is None else f"last {seconds:.0f} s"

    def troubles(self) -> Iterator[Row]:
        """What somebody has to look after; nothing when all is well."""
        status = self._looks[-1].status
        flush = status.flush
        if flush.failing_s is not None:
            yield Row("failing", f"for {self._time(flush.failing_s)}", flush.last_error or "", "bad")
        if status.quarantine.changes:
            held = _plural(status.quarantine.sessions, "held session")
            text = f"changes of {held}: agent-runtime quarantine list"
            yield Row("quarantine", _count(status.quarantine.changes), text, "bad")
        if status.journal is not None and status.journal.full:
            yield Row("disk full", "", f"changes are refused: make room in {status.journal.place}", "bad")
        for journal in status.unfinished:
            whose = f" of {journal.holder}" if journal.holder else ""
            text = f"{journal.place or journal.journal_id}{whose}: what it has comes in once it is opened again"
            yield Row("journal", "left", text, "warning")
        if status.lease.unreachable:
            yield Row("lease", *self._lease(status), "warning")
        if status.pending.waiting or self._per_second(self._grown(lambda it: it.pending.refused)):
            text = (
                f"{_count(status.pending.waiting)} wait for room, {_count(status.pending.refused)} were refused so far"
            )
            yield Row("overload", "", text, "warning")

    def _lease(self, status: Status) -> tuple[str, str]:
        lease = status.lease
        value = f"{lease.expires_in_s:.1f} s" if lease.expires_in_s > 0 else "expired"
        since = f"{self._time(-lease.expires_in_s)} ago; " if lease.expires_in_s <= 0 else "left; "
        away = "can't be renewed while the database is away; " if lease.unreachable else ""
        return value, f"{since}{away}epoch {lease.epoch}"

    def rows(self, columns: int = 80) -> Iterator[Row]:
        """The figures, the weightiest first. `columns`: how many the terminal has."""
        status = self._looks[-1].status
        marks, pending, residents = status.watermarks, status.pending, status.residents
        yield from self._writes(columns)
        yield from self._appends(status)
        yield Row("accepted", _count(marks.accepted), gap=True)
        if marks.synced is not None:
            yield Row("synced", _count(marks.synced), self._behind(marks.accepted - marks.synced))
        oldest = f", the oldest for {self._time(pending.oldest_age_s)}" if pending.changes else ""
        yield Row("stored", _count(marks.stored), self._behind(marks.accepted - marks.stored) + oldest)

        share = pending.bytes / max(pending.bytes_max, 1)
        tone: Tone = "bad" if share > 0.9 else "warning" if share > 0.5 else ""
        text = f"{_of_bytes(pending.bytes, pending.bytes_max)}, {_plural(pending.changes, 'change')}"
        yield Row("pending", f"{share:.0%}", self._bar(share, columns) + text, tone, gap=True)
        share = residents.bytes / max(residents.bytes_max, 1)
        text = f"{_of_bytes(residents.bytes, residents.bytes_max)}, {_plural(residents.count, 'session')}"
        yield Row("residents", f"{share:.0%}", self._bar(share, columns) + text)
        share = status.pool.in_use / max(status.pool.size, 1)
        text = f"{status.pool.in_use} of {_plural(status.pool.size, 'connection')} in use"
        yield Row("pool", f"{share:.0%}", self._bar(share, columns) + text)

        yield from self._work(status)
        if not status.lease.unreachable:
            yield Row("lease", *self._lease(status))
        if not status.quarantine.changes:
            yield Row("quarantine", "empty")

    def _writes(self, columns: int) -> Iterator[Row]:
        rate = self._per_second(self._grown(lambda it: it.watermarks.accepted))
        if rate is not None:
            cells = min(_RATES_MAX, max(1, columns - 26))
            yield Row("writes", f"{_rate(rate)} /s", self._curve(list(self._rates)[-cells:]))

    def _appends(self, status: Status) -> Iterator[Row]:
        label = "appends"
        for level, appends in status.appends.items():
            recent = self._recent(appends, level)
            if recent.count:
                yield Row(label, level, f"{self._spread(recent)}{self._frequency(recent)}")
                label = ""

    def _work(self, status: Status) -> Iterator[Row]:
        flush, journal = status.flush, status.journal
        hits = self._grown(lambda it: it.residents.hits)
        misses = self._grown(lambda it: it.residents.misses)
        evictions = self._grown(lambda it: it.residents.evictions)
        looks = hits + misses
        found = f"{hits / looks:.1%}" if looks else self.glyphs.missing
        text = f"of {_count(looks)} looks, {_plural(evictions, 'eviction')}"
        yield Row("hits", found, text, gap=True)
        durations, sizes = self._recent_flushes(status)
        if durations.count:
            size = sizes.sum / sizes.count
            text = f"of {_count(size)} changes on average, {self._spread(durations)}"
        else:
            text = f"none, {_count(flush.changes)} changes in {_plural(flush.batches, 'batch', 'batches')} so far"
        failures = self._grown(lambda it: it.flush.failures)
        rate = self._per_second(durations.count)
        value = _count(durations.count) if rate is None else f"{_rate(rate)} /s"
        yield Row("flushes", value, (f"{failures} failed; " if failures else "") + text, "warning" if failures else "")
        if journal is not None:
            syncs = journal.syncs
            before = self._looks[0].status.journal
            if len(self._looks) > 1 and before is not None:
                syncs = syncs.since(before.syncs)
            told = f"{_plural(syncs.count, 'sync', 'syncs')}, {self._spread(syncs)}" if syncs.count else "no sync"
            failed = f", {journal.sync_failures} failed so far" if journal.sync_failures else ""
            text = f"in {_plural(journal.segments, 'segment')}; {told}{failed}"
            yield Row("journal", _bytes(journal.bytes), text, "warning" if failed else "")

    # What has come since the first of the last looks

    @property
    def _seconds(self) -> float | None:
        return self._looks[-1].at_s - self._looks[0].at_s if len(self._looks) > 1 else None

    def _grown(self, figure: _Figure) -> int:
        now = figure(self._looks[-1].status)
        return now - figure(self._looks[0].status) if len(self._looks) > 1 else now

    def _per_second(self, count: int) -> float | None:
        return None if self._seconds is None else count / max(self._seconds, 1e-3)

    def _recent(self, appends: Histogram, level: Durability) -> Histogram:
        if len(self._looks) == 1:
            return appends
        return appends.since(self._looks[0].status.appends[level])

    def _recent_flushes(self, status: Status) -> tuple[Histogram, Histogram]:
        flush, before = status.flush, self._looks[0].status.flush
        if len(self._looks) == 1:
            return flush.durations, flush.sizes
        return flush.durations.since(before.durations), flush.sizes.since(before.sizes)

    # In words

    def _spread(self, histogram: Histogram) -> str:
        half, most = histogram.quantile(0.5), histogram.quantile(0.99)
        if half is None or most is None:
            return self.glyphs.missing
        return f"p50 {self._time(half)}, p99 {self._time(most)}"

    def _frequency(self, histogram: Histogram) -> str:
        rate = self._per_second(histogram.count)
        return f", {_rate(rate)} /s" if rate is not None else f", {_count(histogram.count)} so far"

    def _behind(self, changes: int) -> str:
        return f"{_count(changes)} behind" if changes else "up to date"

    def _bar(self, share: float, columns: int) -> str:
        if columns < 72:
            return ""
        cells = round(min(share, 1.0) * _BAR_CELLS)
        return self.glyphs.full * cells + self.glyphs.empty * (_BAR_CELLS - cells) + "  "

    def _curve(self, values: Sequence[float]) -> str:
        signs = self.glyphs.curve
        highest = max(values, default=0.0)
        if not highest:
            return signs[0] * len(values)
        return "".join(signs[min(int(value / highest * len(signs)), len(signs) - 1)] for value in values)

    def _time(self, seconds: float) -> str:
        if seconds < 1e-3:
            return f"{seconds * 1e6:.0f} {self.glyphs.micro}"
        if seconds < 1:
            return f"{seconds * 1e3:.3g} ms"
        if seconds < 120:
            return f"{seconds:.3g} s"
        return f"{seconds // 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 or number == 0 else f"{number:.1f}"


def _plural(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _of_bytes(number: int, most: int) -> str:
    return f"{_bytes(number)} of {_bytes(most)}"
