"""One window of one partition: sums and histograms per (pool, tenant, class)."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.requests.judging import LATENCIES, STATS
from models.sketches import BUCKETS

OTHER = "(other)"
"""Tenant and class of what comes beyond the bound on (tenant, class) pairs."""
_STRIDE = 2048
assert BUCKETS <= _STRIDE
_SIZED = STATS.index("arrivals_sized")
_COMPACT_MIN = 4096


class RequestWindow:
    """State; cells are numbered in order of appearance."""

    def __init__(self) -> None:
        self.closed = False
        """Whether it has been published as closed."""
        self.dirty: dict[str, bool] = {}
        """Pools that have changed since they were last published."""
        self.pools: dict[str, dict[tuple[str, str], int]] = {}
        """Pool -> (tenant, class) -> cell."""
        self.cells = 0
        self.sums = np.zeros((len(STATS), 8))
        """float64 [STATS, capacity] by cell."""
        self.keys = np.zeros(0, np.uint32)
        """Histograms: (cell x 3 + latency) x 2048 + bucket, ascending, distinct."""
        self.counts = np.zeros(0, np.int64)
        """By key."""
        self.pending = np.zeros(0, np.uint32)
        """Keys not yet counted, one an observation."""

    def cell(self, pool: str, tenant: str, kind: str, pools_max: int, tenants_max: int) -> tuple[int, str]:
        """(cell, overflow metric or empty). Cell -1 where the pool is one too many; a tenant too many is `(other)`."""
        cells = self.pools.get(pool)
        if cells is None:
            if len(self.pools) >= pools_max:
                return -1, "overflow_pools_total"
            cells = self.pools[pool] = {}
        metric = ""
        key = (tenant, kind)
        found = cells.get(key)
        if found is None and len(cells) >= tenants_max:
            key, metric = (OTHER, OTHER), "overflow_tenants_total"
            found = cells.get(key)
        if found is None:
            found = cells[key] = self.cells
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

    def observe(self, cells: np.ndarray, latency: int, buckets: np.ndarray) -> None:
        """Counts observations [n] of LATENCIES[latency] in their cells [n] and buckets [n]."""
        keys = (cells * len(LATENCIES) + latency) * _STRIDE + buckets
        self.pending = np.concatenate((self.pending, keys.astype(np.uint32)))
        if len(self.pending) > max(_COMPACT_MIN, len(self.keys)):
            self._compact()

    def _compact(self) -> None:
        keys = np.concatenate((self.keys, self.pending))
        weights = np.concatenate((self.counts, np.ones(len(self.pending), np.int64)))
        self.keys, inverse = np.unique(keys, return_inverse=True)
        self.counts = np.zeros(len(self.keys), np.int64)
        np.add.at(self.counts, inverse, weights)
        self.pending = np.zeros(0, np.uint32)

    def columns(self, pool: str, with_histograms: bool) -> dict[str, Any]:
        """Columns of request.windows for a pool."""
        cells = self.pools[pool]
        chosen = list(cells.values())
        sums = self.sums[:, chosen]
        data: dict[str, Any] = {"tenant": [tenant for tenant, _ in cells], "class": [kind for _, kind in cells]}
        for name, values in zip(STATS, sums, strict=True):
            if name != "arrivals_sized":
                data[name] = values
        data["arrival_input_tokens"] = np.where(sums[_SIZED] > 0, data["arrival_input_tokens"], np.nan)
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
            "pools": {p: [[t, k, c] for (t, k), c in cells.items()] for p, cells in self.pools.items()},
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
        window.pools = {p: {(t, k): c for t, k, c in cells} for p, cells in state["pools"].items()}
        window.cells = state["sums"].shape[1]
        window.sums = np.zeros((len(STATS), max(8, window.cells)))
        window.sums[:, : window.cells] = state["sums"]
        window.keys, window.counts, window.pending = state["keys"], state["counts"], state["pending"]
        return window
