"""Recorded runs of a real vLLM, read as the exporter reads its pages, through the fold to windows; and what the clients
of the run measured on the same clock."""

from __future__ import annotations

import csv
import gzip
import io
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exporters.adapters.base import Chosen
from exporters.exposition import lines_of
from exporters.layout import Layout, learn
from exporters.planned import Read, one_a_model
from models.windows import WINDOW_S
from schemas.log import LogRecord
from schemas.node import ENGINE_HISTOGRAMS
from schemas.signals import ENGINE_WINDOWS
from tests.models.law import log, run, tick
from tests.models.node.logs import batch, engine, final, fold, inventory, replica
from tests.recorded import scrapes

HISTOGRAM_S = 5.0
"""How often the exporter reads distributions."""
DEAD_AFTER_S = 2.0
"""Without an answer for so long a target is said to be dead."""
Row = dict[str, Any]


class Scraper:
    """Rows of engine.samples and engine.histograms from pages, as the exporter makes them."""

    def __init__(self, name: str = "r1") -> None:
        self.name = name
        self.samples: list[Row] = []
        self.histograms: list[Row] = []
        self._layout: Layout | None = None
        self._chosen = Chosen()
        self._scrapes = 0
        self._since: float | None = None
        self._start: float | None = None
        self._histogram_at = 0.0

    def take(self, at_s: float, text: str | None) -> None:
        """One scrape; None: it failed."""
        self._scrapes += 1
        identity = {"replica": self.name, "at_s": at_s, "engine": "vllm", "scrape": self._scrapes}
        if text is None:
            if self._since is not None and at_s - self._since >= DEAD_AFTER_S:
                self.samples.append({**identity, "status": "dead"})
            return
        wide = at_s - self._histogram_at >= HISTOGRAM_S
        (read,) = one_a_model(self._reads(text, wide))
        start_s = read.values.get("start_s")
        if start_s != self._start:
            self._start = start_s
            self._chosen.forget()
            self._layout = None
            (read,) = one_a_model(self._reads(text, wide))
        self.samples.append({**identity, "status": "ok", "since_s": self._since, **read.plan.texts, **read.values})
        row = {"replica": self.name, "at_s": at_s, "start_s": start_s}
        self.histograms += [{**row, "metric": metric, "bins": bins} for metric, bins in read.bins.items()]
        self._histogram_at = at_s if wide else self._histogram_at
        self._since = at_s

    def _reads(self, text: str, wide: bool) -> list[Read]:
        lines = lines_of(text.encode())
        values = None if self._layout is None else self._layout.values(lines, wide)
        if self._layout is None or values is None:
            self._layout = learn(lines, chosen=self._chosen)
            values = self._layout.values(lines, wide)
        assert values is not None
        bad: list[str] = []
        found = self._layout.rows(values, wide, bad)
        assert bad == []
        return found


class Request(NamedTuple):
    """What a client measured of one request. Times are Unix s; NaN where it never came so far."""

    arrival: float
    first: float
    end: float
    prompt: int
    cached: int
    output: int
    outcome: str
    told_ttft_s: float
    """What vLLM itself returned for this request: its queue and its prefill."""

    @property
    def ttft_s(self) -> float:
        return self.first - self.arrival

    @property
    def tpot_s(self) -> float:
        return (self.end - self.first) / (self.output - 1)


def scraped(folder: Path) -> Scraper:
    """All pages of a run."""
    found = Scraper()
    for at_s, text in scrapes(folder):
        found.take(at_s, text)
    return found


def requests_of(folder: Path) -> list[Request]:
    """What the clients of a run measured."""
    path = folder / "requests.csv"
    text = path.read_text() if path.exists() else gzip.decompress((folder / "requests.csv.gz").read_bytes()).decode()
    return [_request(row) for row in csv.DictReader(io.StringIO(text))]


def _request(row: dict[str, str]) -> Request:
    arrival = float(row["t_arrival"])
    first, end = (arrival + float(row[name] or "nan") for name in ("ttft_s", "e2e_s"))
    numbers = (int(float(row[name] or 0)) for name in ("prompt_tokens", "cached_tokens", "output_tokens"))
    told = sum(float(row[name] or "nan") for name in ("srv_queue_ms", "srv_ttft_ms")) / 1000
    return Request(arrival, first, end, *numbers, row["outcome"], told)


def windows_of(samples: Sequence[Row], histograms: Sequence[Row] = ()) -> list[Row]:
    """Closed windows of the replica, with `start`, by time."""
    records = [engine(sample["at_s"] + 0.1, [sample]) for sample in samples]
    records += [batch(ENGINE_HISTOGRAMS, at + 0.1, "n1", rows, {}) for at, rows in _by_time(histograms)]
    return folded(records, samples[0]["at_s"], samples[-1]["at_s"])


def folded(records: list[LogRecord], first: float, last: float) -> list[Row]:
    """Closed windows of the only replica that these records of node n1 are about, from `first` to `last`."""
    held = [replica(since_s=first - 1000.0)]
    records = [inventory(first - 20.0, held), *records]
    records += [inventory(t, held) for t in (first + 60.0 * n for n in range(int((last - first) // 60)))]
    records.sort(key=lambda record: record.at_ms)
    out = run(fold(), log(*records, tick(last + 13), tick(last + 14)))
    return [{**rows[0], "start": start} for (_, start), rows in sorted(final(out, ENGINE_WINDOWS).items())]


def _by_time(rows: Sequence[Row]) -> Iterable[tuple[float, list[Row]]]:
    found: dict[float, list[Row]] = {}
    for row in rows:
        found.setdefault(row["at_s"], []).append(row)
    return found.items()


def between(
    window: Row, scrapes: Sequence[float], events: Sequence[tuple[float, float]], lag_s: float
) -> tuple[float, float]:
    """What a window can hold of events (time at the client, amount), sorted: at least those between the scrapes inside
    it, at most those between the scrapes around it."""
    start, end = window["start"], window["start"] + WINDOW_S
    inside = scrapes[bisect_left(scrapes, start) : bisect_right(scrapes, end)]
    before = scrapes[max(bisect_right(scrapes, start) - 1, 0)]
    after = scrapes[min(bisect_left(scrapes, end), len(scrapes) - 1)]
    sure = sum(amount for at, amount in events if inside and inside[0] + lag_s < at <= inside[-1])
    possible = sum(amount for at, amount in events if before < at <= after + lag_s)
    return sure, possible


def in_system(requests: Sequence[Request], at: float, slack: float) -> tuple[int, int]:
    """At least and at most how many requests were in the engine at a time, by the clients."""
    surely = sum(r.arrival + slack <= at <= r.end - slack for r in requests)
    perhaps = sum(r.arrival - slack <= at <= r.end + slack for r in requests)
    return surely, perhaps


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value at or below which a share q lies."""
    ordered = sorted(values)
    return ordered[max(math.ceil(q * len(ordered) - 1e-9) - 1, 0)]


def quantiles(sure: Sequence[float], possible: Sequence[float], q: float) -> tuple[float, float]:
    """The least and the greatest quantile that the sure observations can have with any of the possible ones."""
    edges = sorted({*possible, -math.inf, math.inf})
    lower = [[*sure, *(v for v in possible if v <= edge)] for edge in edges]
    upper = [[*sure, *(v for v in possible if v >= edge)] for edge in edges]
    return min(quantile(v, q) for v in lower if v), max(quantile(v, q) for v in upper if v)


def bucket(flat: Sequence[float], q: float) -> tuple[float, float]:
    """The bounds of the bucket of a quantile, from upper bounds with cumulative counts."""
    rank = q * flat[-1] - 1e-6
    before = 0.0
    for bound, count in zip(flat[:-1:2], flat[1:-1:2], strict=True):
        if count >= rank:
            return before, bound
        before = bound
    return before, math.inf


def summed(windows: Sequence[Row], column: str) -> list[float]:
    flats = [window[column] for window in windows if window.get(column) is not None]
    total = np.sum([[*flat[1:-1:2], flat[-1]] for flat in flats], axis=0)
    return [number for pair in zip(flats[0][:-1:2], total[:-1], strict=True) for number in pair] + [total[-1]]
