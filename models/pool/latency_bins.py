"""Latencies of a pool that no gateway reports: the engines' own buckets, as histograms of ours.

What an engine counted in a bucket is taken to lie evenly in it, by the logarithm, so a quantile is interpolated in its
bucket: it is as uncertain as the bucket is wide, which for vLLM's is a factor of 1.3 to 2.5.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from models.pool.windows import DETAIL
from models.sketches import Histogram, bucket_of
from schemas.columns import Batch
from schemas.signals import WindowName

COLUMNS = ("ttft_s_bins", "tpot_s_bins")
PARTS = 8
"""Places in a bucket among which its count is spread."""
BEYOND = 1.5
"""What is beyond the last bound is taken to be at this multiple of it."""


class Bins:
    """Of the newest windows: start -> source -> [version, TTFT pairs, TPOT pairs]."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held: dict[int, dict[str, list[Any]]] = {}

    def take(self, name: WindowName, batch: Batch) -> None:
        """A closed engine window of one source; the greatest version stays."""
        if len(self.held) >= DETAIL and name.start_s < min(self.held):
            return
        sources = self.held.setdefault(name.start_s, {})
        known = sources.get(name.source)
        if known is None or known[0] < name.version:
            sources[name.source] = [name.version, *(_pairs(batch.pairs[column]) for column in COLUMNS)]
        for start in sorted(self.held)[:-DETAIL]:
            del self.held[start]


def _pairs(rows: list[Any]) -> list[int]:
    """Bucket, count, bucket, count, ... over all replicas that gave buckets."""
    values: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for row in rows:
        if row is not None and len(row) > 1:
            spread = _spread(np.asarray(row, float))
            values.append(spread[0])
            counts.append(spread[1])
    if not values:
        return []
    flat = np.empty(2 * sum(map(len, values)), np.int64)
    flat[::2] = bucket_of(np.concatenate(values))
    flat[1::2] = np.concatenate(counts)
    return [int(value) for value in Histogram.from_pairs(flat).to_pairs()]


def _spread(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, counts) of one row: upper bound, cumulative count, ..., count of all."""
    bounds, cumulative = flat[:-1:2], np.append(flat[1::2], flat[-1])
    # counts are deltas of scrapes and may be fractions: rounded as sums, so that none is lost
    whole = np.floor(np.maximum(cumulative, 0.0) + 0.5)
    inside = np.diff(whole, prepend=0.0)
    low = np.maximum(np.concatenate(([bounds[0] / 2], bounds)), 1e-9)
    high = np.maximum(np.append(bounds, BEYOND**2 * bounds[-1]), 1e-9)
    at = (np.arange(PARTS) + 0.5) / PARTS
    values = low[:, None] * (high / low)[:, None] ** at
    edges = np.floor(inside[:, None] * np.arange(PARTS + 1) / PARTS)
    return values.ravel(), np.diff(edges, axis=1).astype(np.int64).ravel()
