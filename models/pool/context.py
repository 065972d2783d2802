"""What a pool's steps need beside the pool itself, and the view of its newest state that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from models.pool import evidence
from models.pool.pool import Pool
from models.pool.windows import SIZE_S, Row
from schemas.config import PoolSpec

FRESH_DEFAULT_S = 30.0
"""Freshness of a pool without a policy."""


class Context(NamedTuple):
    """One moment of log time, for one pool."""

    now_s: float
    second: int
    version: int
    """Offset that everything said now rests on."""
    spec: PoolSpec | None
    revision: int
    prices: Mapping[str, float]
    """GPU type -> USD per GPU hour."""
    tally: Callable[[str], None]
    """Adds one to a counter."""

    @property
    def fresh_s(self) -> float:
        """Evidence older than this holds every action, s."""
        return FRESH_DEFAULT_S if self.spec is None else self.spec.freshness_s

    @property
    def window_end_s(self) -> int:
        """End of the newest 10 s window that is over."""
        return int(self.now_s) // SIZE_S * SIZE_S

    def rows(self, pool: Pool) -> dict[str, Row]:
        """Every replica by its newest row."""
        return pool.windows.replicas(self.now_s, self.fresh_s)

    def usd_per_replica_hour(self) -> float | None:
        """Null: unknown."""
        if self.spec is None:
            return None
        price = self.prices.get(self.spec.gpu_type)
        return None if price is None else price * self.spec.gpus_per_replica

    def stale(self, pool: Pool) -> tuple[str, float] | None:
        """Why nothing may be planned on this evidence, and its age in s; None: it is fresh."""
        rows = self.rows(pool).values()
        newest = evidence.evidence_s(pool.windows, rows)
        if newest is None:
            return "no request window has come for this pool: nothing is planned", self.now_s - pool.first_s
        age = self.now_s - newest
        if age > self.fresh_s:
            text = f"the newest evidence on load is {age:.0f} s old (limit {self.fresh_s:g} s): every action is held"
            return text, age
        for source, silence_s in evidence.silent(pool.windows, rows, self.now_s).items():
            if silence_s > self.fresh_s:
                text = f"{source} has been silent for {silence_s:.0f} s with requests overdue: every action is held"
                return text, silence_s
        return None


def capacity_rps(pool: Pool, spec: PoolSpec) -> float:
    """Requests per s that a replica carries within its targets at the present token mix."""
    mix = float(pool.series.mix[-1]) if len(pool.series.mix) else 0.0
    return spec.capacity_rps * math.exp(mix)
