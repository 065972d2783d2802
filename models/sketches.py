"""Log-bucket histograms: quantiles that merge by adding, with a relative error of 1 %.

DDSketch (Masson, Rim, Lee: "DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees",
PVLDB 12(12), 2019): with gamma = (1 + a) / (1 - a) and a = 0.01, bucket i holds the values in
(LOW gamma^(i-1), LOW gamma^i], and 2 LOW gamma^i / (gamma + 1) is within a of every one of them. The range is
bounded: exact zeros, values up to LOW and values beyond HIGH have a bucket of their own each.

The bounds are a table made by repeated multiplication and values are placed by comparing with it: IEEE 754 gives the
same table and so the same bucket on every machine, which a logarithm does not.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

RELATIVE_ERROR = 0.01
GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
LOW = 1e-4
"""Lowest value that is told apart, in the unit of the values (s: 0.1 ms)."""
HIGH = 1e5
"""Greatest value that is told apart, in the unit of the values (s: a little over a day)."""
ZERO = 0
"""Bucket of exact zeros."""
UNDER = 1
"""Bucket of values in (0, LOW]."""


def _bounds() -> np.ndarray:
    bounds = [LOW]
    while bounds[-1] < HIGH:
        bounds.append(bounds[-1] * GAMMA)
    return np.array(bounds)


_UPPER = _bounds()
OVER = UNDER + len(_UPPER)
"""Bucket of values beyond the range."""
BUCKETS = OVER + 1
"""Number of buckets; every bucket is below it."""


def bucket_of(values: np.ndarray) -> np.ndarray:
    """Bucket (int64) of each value; values are finite and not negative."""
    found = np.searchsorted(_UPPER, values, side="left") + UNDER
    return np.where(values > 0, found, ZERO)


def bucket_bounds(bucket: int) -> tuple[float, float]:
    """(low, high]: what the values in a bucket lie between; (0, 0) for zeros, high is infinite beyond the range."""
    if bucket == ZERO:
        return 0.0, 0.0
    low = 0.0 if bucket == UNDER else float(_UPPER[bucket - UNDER - 1])
    return low, float("inf") if bucket == OVER else float(_UPPER[bucket - UNDER])


def bucket_value(bucket: int) -> float:
    """The value that stands for a bucket: within 1 % of all in it; LOW and HIGH at the ends of the range."""
    if bucket in (ZERO, UNDER):
        return LOW * bucket
    if bucket == OVER:
        return float(_UPPER[-1])
    return 2 * float(_UPPER[bucket - UNDER]) / (GAMMA + 1)


class Histogram:
    """Counts by bucket, sparse. Immutable: adding and merging give a new one.

    Parameters: `buckets` ascending and distinct, `counts` of each, both int64.

    >>> h = Histogram.of(np.array([1.0, 2.0, 3.0, 4.0]))
    >>> round(h.quantile(0.5), 1)
    2.0
    """

    __slots__ = ("buckets", "counts")

    def __init__(self, buckets: np.ndarray, counts: np.ndarray) -> None:
        self.buckets = buckets
        self.counts = counts

    @classmethod
    def empty(cls) -> Histogram:
        """No values."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))

    @classmethod
    def of(cls, values: np.ndarray) -> Histogram:
        """Of finite values, not negative; NaN (unknown) is left out."""
        buckets, counts = np.unique(bucket_of(values[~np.isnan(values)]), return_counts=True)
        return cls(buckets, counts.astype(np.int64))

    @classmethod
    def from_pairs(cls, pairs: np.ndarray | Iterable[int]) -> Histogram:
        """From bucket, count, bucket, count, ... in any order; equal buckets add up. Raises ValueError for a bucket
        that does not exist or an odd length."""
        flat = np.asarray(pairs if isinstance(pairs, np.ndarray) else list(pairs)).astype(np.int64)
        if len(flat) % 2 or (len(flat) and not 0 <= flat[::2].min() <= flat[::2].max() < BUCKETS):
            raise ValueError(f"not pairs of a bucket below {BUCKETS} and a count")
        return cls(*_grouped(flat[::2], flat[1::2]))

    def to_pairs(self) -> np.ndarray:
        """Flat uint32: bucket, count, bucket, count, ... by ascending bucket."""
        flat = np.empty(2 * len(self.buckets), np.uint32)
        flat[::2] = self.buckets
        flat[1::2] = self.counts
        return flat

    def add(self, values: np.ndarray) -> Histogram:
        """With these values too; NaN is left out."""
        return self.merge(Histogram.of(values))

    def merge(self, *others: Histogram) -> Histogram:
        """With the counts of others added."""
        parts = (self, *others)
        buckets = np.concatenate([part.buckets for part in parts])
        return Histogram(*_grouped(buckets, np.concatenate([part.counts for part in parts])))

    @property
    def count(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    def quantile(self, q: float) -> float | None:
        """Within 1 % of the value of rank floor(q (n - 1)), counted from 0; None where there are no values."""
        bucket = self._bucket_at(q)
        return None if bucket is None else bucket_value(bucket)

    def quantile_bounds(self, q: float) -> tuple[float, float] | None:
        """What the value of that rank lies between for certain: (low, high]."""
        bucket = self._bucket_at(q)
        return None if bucket is None else bucket_bounds(bucket)

    def count_above(self, limit: float) -> float:
        """How many values are greater than `limit`.

        Exact where the limit is a bucket's bound; otherwise the values of the bucket in which it falls are taken to lie
        evenly in it, so the error is below that bucket's count.
        """
        if not len(self.buckets):
            return 0.0
        bucket = int(bucket_of(np.array([limit]))[0])
        above = float(self.counts[self.buckets > bucket].sum())
        inside = float(self.counts[self.buckets == bucket].sum())
        low, high = bucket_bounds(bucket)
        if not inside or high == low:
            return above
        return above if high == float("inf") else above + inside * (high - limit) / (high - low)

    def _bucket_at(self, q: float) -> int | None:
        if not len(self.counts):
            return None
        ends = np.cumsum(self.counts)
        rank = int(q * (int(ends[-1]) - 1))
        return int(self.buckets[np.searchsorted(ends, rank, side="right")])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Histogram)
            and np.array_equal(self.buckets, other.buckets)
            and np.array_equal(self.counts, other.counts)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Histogram(count={self.count}, p50={self.quantile(0.5)}, p99={self.quantile(0.99)})"


def _grouped(buckets: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distinct, inverse = np.unique(buckets, return_inverse=True)
    total = np.zeros(len(distinct), np.int64)
    np.add.at(total, inverse, counts)
    keep = total > 0
    return distinct[keep], total[keep]
