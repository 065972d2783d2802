"""Distributions as engines count them: cumulative buckets since the engine's start, to growth per bucket in a window.

Buckets are counters: what they grew by between two readings is spread evenly over the time between them, as for every
counter (models.node.weighing), and a restart is one of all buckets. Replicas whose buckets have the same bounds are
held together; other bounds are another series, which begins anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from models.node.samples import Added, SampleStore, around
from models.node.weighing import growth
from models.windows import WINDOW_S

METRICS = ("ttft_s", "tpot_s", "itl_s")
"""Distributions that windows carry; an engine's others are not kept."""
FALLBACK = {"tpot_s": "itl_s"}
"""What stands for a distribution that an engine does not give."""
SHOWN = ("ttft_s", "tpot_s")
QUANTILES = {"p50": 0.5, "p99": 0.99}
STATUS, START, BUCKETS = 0, 1, 2
"""Columns of a store: status (always 0), start of the engine, then the count of each bucket, beyond the last bound at
the end. Counts by bucket tell of a restart what cumulative ones may hide."""
_ALIKE = 1e-9  # counts that were spread over time may miss a rank by rounding


class Grown(NamedTuple):
    """One distribution of one replica in a window."""

    bounds: np.ndarray
    """float64 [B]: upper bounds."""
    counts: np.ndarray
    """float64 [B + 1]: cumulative, the count of all last."""


class Histograms:
    """State; see the module."""

    def __init__(self) -> None:
        self.stores: dict[str, SampleStore] = {}
        """Bounds, as hexadecimal of their bytes -> readings; a subject is replica code x 3 + number of the metric."""

    @property
    def size(self) -> int:
        """Readings held."""
        return sum(store.size for store in self.stores.values())

    def add(
        self, subjects: np.ndarray, at: np.ndarray, start: np.ndarray, flats: list[np.ndarray], layouts_max: int
    ) -> tuple[list[tuple[list[int], Added]], list[int]]:
        """Takes rows: their numbers by layout with what was done, and those left out as of a layout too many."""
        groups: dict[str, list[int]] = {}
        for row, flat in enumerate(flats):
            groups.setdefault(flat[:-1:2].tobytes().hex(), []).append(row)
        done, left_out = [], []
        for key, rows in groups.items():
            store = self.stores.get(key)
            if store is None:
                if len(self.stores) >= layouts_max:
                    left_out += rows
                    continue
                store = self.stores[key] = SampleStore(BUCKETS + len(flats[rows[0]]) // 2 + 1)
            counts = np.diff([np.append(flats[row][1::2], flats[row][-1]) for row in rows], axis=1, prepend=0.0).T
            values = np.concatenate((np.zeros((1, len(rows))), start[rows][None], counts))
            done.append((rows, store.add(subjects[rows], at[rows], values, np.inf)))
        return done, left_out

    def grown(self, start_s: int, gap_s: float, grace_s: float) -> dict[tuple[int, str], Grown]:
        """(Replica code, metric) -> what it grew by in the window at `start_s`; of several layouts the one with most
        observations, which is the one that the engine had for longest."""
        found: dict[tuple[int, str], Grown] = {}
        end_s = start_s + WINDOW_S
        for key in sorted(self.stores):
            near = around(self.stores[key].series(), start_s, end_s, gap_s, STATUS)
            columns = slice(BUCKETS, None)
            total = growth(near, columns, start_s, end_s, near.values[START], grace_s, together=True).total
            bounds = np.frombuffer(bytes.fromhex(key), np.float64)
            total = np.cumsum(total, axis=0)
            for subject, counts in zip(near.subjects.tolist(), total.T, strict=True):
                if np.isnan(counts[-1]):
                    continue
                name = (subject // len(METRICS), METRICS[subject % len(METRICS)])
                if name not in found or counts[-1] > found[name].counts[-1]:
                    found[name] = Grown(bounds, counts)
        return found

    def columns(self, replicas: np.ndarray, start_s: int, gap_s: float, grace_s: float) -> dict[str, Any]:
        """Columns of engine.windows for replicas (codes [N]; -1: one that has none): bins, quantiles, their bounds."""
        if not self.stores:
            return {}
        grown = self.grown(start_s, gap_s, grace_s)
        out: dict[str, Any] = {}
        for metric in SHOWN:
            names = (metric, FALLBACK.get(metric, metric))
            rows = [next((grown[c, n] for n in names if (c, n) in grown), None) for c in replicas.tolist()]
            if not any(row is not None for row in rows):
                continue
            out[f"{metric}_bins"] = [None if row is None else flat(row) for row in rows]
            for label, q in QUANTILES.items():
                found = np.array([(np.nan,) * 3 if row is None else quantile(row, q) for row in rows])
                for suffix, values in zip(("", "_low", "_high"), found.T, strict=True):
                    out[f"{metric}_{label}{suffix}"] = values
        return out

    def replicas(self) -> set[int]:
        """Codes of the replicas that have readings."""
        return {int(subject) // len(METRICS) for store in self.stores.values() for subject in store.last}

    def prune(self, horizon_s: float, oldest_s: float, replicas: np.ndarray) -> None:
        """Forgets readings before `horizon_s`, except each series' last, and that too if it is before `oldest_s` and
        its replica (code) is not in `replicas`."""
        held = (replicas[:, None] * len(METRICS) + np.arange(len(METRICS))).ravel()
        for store in self.stores.values():
            store.prune(horizon_s, oldest_s, STATUS, held)
        self.stores = {key: store for key, store in self.stores.items() if store.size}

    def state(self) -> dict[str, Any]:
        """Plain values for a dump."""
        return {key: store.state() for key, store in self.stores.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Replaces everything by what `state` gave."""
        self.stores = {}
        for key, kept in state.items():
            self.stores[key] = SampleStore(BUCKETS)
            self.stores[key].restore(kept)


def flat(row: Grown) -> np.ndarray:
    """As on the wire: upper bound, cumulative count, ..., count of all."""
    found = np.empty(2 * len(row.bounds) + 1)
    found[:-1:2], found[1::2], found[-1] = row.bounds, row.counts[:-1], row.counts[-1]
    return found


def quantile(row: Grown, q: float) -> tuple[float, float, float]:
    """(value, low, high): the value of rank q n, interpolated in the bucket that holds it, and that bucket's bounds.

    The smallest observation at or below which a share q of all lies is in (low, high]. Beyond the last bound: that
    bound, itself the lowest it can be, and no upper one. NaN where nothing was observed.
    """
    rank = q * float(row.counts[-1])
    if not rank > 0:
        return np.nan, np.nan, np.nan
    at = int(np.searchsorted(row.counts[:-1], rank * (1 - _ALIKE), side="left"))
    bounds = row.bounds
    if at == len(bounds):
        last = float(bounds[-1]) if at else np.nan
        return last, last, np.nan
    high = float(bounds[at])
    low = float(bounds[at - 1]) if at else min(0.0, high)
    below = float(row.counts[at - 1]) if at else 0.0
    inside = float(row.counts[at]) - below
    return min(high, low + (high - low) * max(0.0, rank - below) / inside), low, high
