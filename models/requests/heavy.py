"""Which tenants keep their names where a pool has more than it may have rows: the heavy ones of the last windows.

Space-saving (Metwally, Agrawal, El Abbadi: "Efficient computation of frequent and top-k elements in data streams", ICDT
2005), pruned in bulk so that a row costs O(1): of more than 2 K counters the K largest stay, and a tenant that comes
anew starts at the largest count that was dropped, its error. A tenant with more than 1 / K of the recent rows for
certain is heavy; there are fewer than K of them, whatever the order of the rows.
"""

from __future__ import annotations

from typing import Any


class Heavy:
    """Tenants of one pool by rows, the older ones counting 7/8 as much every 10 s."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}
        """Tenant -> [rows at most, of these an error]."""
        self.total = 0
        self.floor = 0
        """The largest count that was dropped."""
        self.kept: dict[str, None] = {}
        """Who was heavy at the last `step`."""
        self.until_s = 0
        """Forgotten then, Unix s."""

    def add(self, tenant: str, rows: int, tenants_max: int) -> None:
        """Counts rows of a tenant."""
        self.total += rows
        known = self.counts.get(tenant)
        if known is not None:
            known[0] += rows
            return
        self.counts[tenant] = [self.floor + rows, self.floor]
        if len(self.counts) > 2 * tenants_max:
            ranked = sorted(self.counts.items(), key=lambda item: (-item[1][0], item[0]))
            self.floor = max(self.floor, ranked[tenants_max][1][0])
            self.counts = dict(ranked[:tenants_max])

    def step(self, tenants_max: int) -> None:
        """A window has passed."""
        self.kept = {
            tenant: None for tenant, (count, error) in self.counts.items() if (count - error) * tenants_max > self.total
        }
        aged = {tenant: [7 * count // 8, 7 * error // 8] for tenant, (count, error) in self.counts.items()}
        self.counts = {tenant: pair for tenant, pair in aged.items() if pair[0] > 0}
        self.total, self.floor = 7 * self.total // 8, 7 * self.floor // 8

    def state(self) -> list[Any]:
        """Plain values for a dump."""
        return [self.counts, self.total, self.floor, list(self.kept), self.until_s]

    @classmethod
    def of(cls, state: list[Any]) -> Heavy:
        """From what `state` gave."""
        heavy = cls()
        heavy.counts, heavy.total, heavy.floor, kept, heavy.until_s = state
        heavy.kept = dict.fromkeys(kept)
        return heavy
