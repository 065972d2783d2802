"""One window of one partition: sums and histograms per (pool, tenant, class, model, priority)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from models.requests.judging import LATENCIES, STATS, UNITS, S
from models.sketches import BUCKETS

OTHER = "(other)"
"""Tenant and class of what comes beyond the bound on rows."""
_STRIDE = 2048
assert BUCKETS <= _STRIDE
_HIDDEN = ("arrivals_sized", *(f"{name}_known" for name in UNITS))
"""Sums that only say whether another one is known."""
_COMPACT_MIN = 4096


class Label(NamedTuple):
    """What a row of request.windows is about."""

    tenant: str
    kind: str
    """Class of request."""
    model: str | None = None
    priority: int | None = None


class RequestWindow:
    """State; cells are numbered in order of appearance."""

    def __init__(self) -> None:
        self.closed = False
        """Whether it has been published as closed."""
        self.dirty: dict[str, bool] = {}
        """Pools that have changed since they were last published."""
        self.pools: dict[str, dict[Label, int]] = {}
        """Pool -> label -> cell."""
        self.cells = 0
        self.sums = np.zeros((len(STATS), 8))
        """float64 [STATS, capacity] by cell."""
        self.keys = np.zeros(0, np.int64)
        """Histograms: (cell x 4 + latency) x 2048 + bucket, ascending, distinct."""
        self.counts = np.zeros(0, np.int64)
        """By key."""
        self.pending = np.zeros(0, np.int64)
        """Observations not yet counted: key x 2, and 1 more for one that is taken off again."""

    def cell(self, pool: str, label: Label, kept: bool, pools_max: int, tenants_max: int) -> tuple[int, str]:
        """(cell, overflow metric or empty). Cell -1 where the pool is one too many.

        Beyond `tenants_max` cells of a pool a tenant that is `kept` loses its classes, any other its name: so a pool
        has at most `tenants_max` cells, one for each tenant that is kept, and one more.
        """
        cells = self.pools.get(pool)
        if cells is None:
            if len(self.pools) >= pools_max:
                return -1, "overflow_pools_total"
            cells = self.pools[pool] = {}
        metric = ""
        found = cells.get(label)
        if found is None and len(cells) >= tenants_max:
            label, metric = Label(label.tenant if kept else OTHER, OTHER), "overflow_tenants_total"
            found = cells.get(label)
        if found is None:
            found = cells[label] = self.cells
            self.cells += 1
            if self.cells > self.sums.shape[1]:
                self.sums = np.concatenate((self.sums, np.zeros_like(self.sums)), axis=1)
        self.dirty[pool] = True
        return found, metric

    def add(self, cells: np.ndarray, sums: np.ndarray) -> None:
        """Adds sums [STATS, n] to cells [n]; a cell may come more than once."""
        if len(np.unique(cells)) == len(cells):
            self.sums[:, cells] += sums
        else:  # the bound has put several tenants into one
            np.add.at(self.sums.T, cells, sums.T)

    def observe(self, cells: np.ndarray, latency: int, buckets: np.ndarray, taken_off: bool = False) -> None:
        """Counts observations [n] of LATENCIES[latency] in their cells [n] and buckets [n], or takes them off."""
        keys = (cells * len(LATENCIES) + latency) * _STRIDE + buckets
        self.pending = np.concatenate((self.pending, 2 * keys + taken_off))
        if len(self.pending) > max(_COMPACT_MIN, len(self.keys)):
            self._compact()

    def _compact(self) -> None:
        keys = np.concatenate((self.keys, self.pending >> 1))
        weights = np.concatenate((self.counts, 1 - 2 * (self.pending & 1)))
        distinct, inverse = np.unique(keys, return_inverse=True)
        counts = np.zeros(len(distinct), np.int64)
        np.add.at(counts, inverse, weights)
        left = counts != 0
        self.keys, self.counts = distinct[left], counts[left]
        self.pending = np.zeros(0, np.int64)

    def columns(self, pool: str, with_histograms: bool) -> dict[str, Any]:
        """Columns of request.windows for a pool."""
        cells = self.pools[pool]
        chosen = list(cells.values())
        sums = self.sums[:, chosen]
        data: dict[str, Any] = {
            "tenant": [label.tenant for label in cells],
            "class": [label.kind for label in cells],
            "model": [label.model for label in cells],
            "priority": [label.priority for label in cells],
        }
        # what is taken off is what was added; beyond what is exact (judging) it may miss by a rounding
        data |= {name: values for name, values in zip(STATS, np.maximum(sums, 0.0), strict=True) if name not in _HIDDEN}
        for name, known in (("arrival_input_tokens", "arrivals_sized"), *((u, f"{u}_known") for u in UNITS)):
            data[name] = np.where(sums[S[known]] > 0, data[name], np.nan)
        if with_histograms:
            if len(self.pending):
                self._compact()
            for latency, name in enumerate(LATENCIES):
                data[f"{name}_hist"] = [self._pairs(cell * len(LATENCIES) + latency) for cell in chosen]
        return data

    def _pairs(self, number: int) -> np.ndarray:
        start, end = np.searchsorted(self.keys, [number * _STRIDE, (number + 1) * _STRIDE])
        flat = np.empty(2 * (end - start), np.uint32)
        flat[::2] = self.keys[start:end] - number * _STRIDE
        flat[1::2] = self.counts[start:end]
        return flat

    def state(self) -> dict[str, Any]:
        """Plain values for a dump."""
        return {
            "closed": self.closed,
            "dirty": self.dirty,
            "pools": {p: [[*label, c] for label, c in cells.items()] for p, cells in self.pools.items()},
            "sums": self.sums[:, : self.cells],
            "keys": self.keys,
            "counts": self.counts,
            "pending": self.pending,
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> RequestWindow:
        """From what `state` gave."""
        window = cls()
        window.closed, window.dirty = state["closed"], state["dirty"]
        window.pools = {p: {Label(*label): c for *label, c in cells} for p, cells in state["pools"].items()}
        window.cells = state["sums"].shape[1]
        window.sums = np.zeros((len(STATS), max(8, window.cells)))
        window.sums[:, : window.cells] = state["sums"]
        window.keys, window.counts, window.pending = state["keys"], state["counts"], state["pending"]
        return window
