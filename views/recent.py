"""Sums over the last 300 s of log time from upserted 10 s windows: cost per pool and tenant, requests within SLO.

Each cell keeps its greatest version, so a revised window replaces what it had said before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from schemas.costs import CostWindow

SPAN_S = 300
KEYS_MAX = 50_000


class Served(NamedTuple):
    """Requests that ended: whole numbers, so that what is added can be taken away exactly."""

    ends: int = 0
    judged: int = 0
    good: int = 0
    errors: int = 0
    rejected: int = 0

    def plus(self, other: Served) -> Served:
        return Served(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Served) -> Served:
        return Served(*(a - b for a, b in zip(self, other, strict=True)))

    @property
    def slo_attainment(self) -> float | None:
        """Share within the targets; None where nothing was judged."""
        return self.good / self.judged if self.judged else None


class RecentRequests:
    """Per (pool, tenant): what ended in the windows that began within the last 300 s before the pool's newest."""

    def __init__(self) -> None:
        self._newest: dict[str, int] = {}
        self._cells: dict[tuple[str, str], dict[int, dict[str, tuple[int, Served]]]] = {}
        self._sums: dict[tuple[str, str], Served] = {}
        self.overflow = 0

    def put(self, pool: str, tenant: str, source: str, start_s: int, version: int, value: Served) -> None:
        """Takes what one source says of a window, over all classes, models and priorities."""
        newest = self._newest[pool] = max(self._newest.get(pool, 0), start_s)
        if start_s <= newest - SPAN_S:
            return
        key = (pool, tenant)
        if key not in self._cells:
            if len(self._cells) >= KEYS_MAX:
                self.overflow += 1
                return
            self._cells[key], self._sums[key] = {}, Served()
        self._prune(key, newest)
        window = self._cells[key].setdefault(start_s, {})
        known = window.get(source)
        if known is not None:
            if known[0] >= version:
                return
            self._sums[key] = self._sums[key].minus(known[1])
        window[source] = (version, value)
        self._sums[key] = self._sums[key].plus(value)

    def _prune(self, key: tuple[str, str], newest: int) -> None:
        windows = self._cells[key]
        for start in [s for s in windows if s <= newest - SPAN_S]:
            for _, value in windows.pop(start).values():
                self._sums[key] = self._sums[key].minus(value)

    def of(self, pool: str, tenant: str) -> Served:
        """Sum for one tenant in one pool."""
        key = (pool, tenant)
        if key not in self._cells:
            return Served()
        self._prune(key, self._newest[pool])
        return self._sums[key]

    def pools(self) -> dict[str, Served]:
        """Sum per pool."""
        found: dict[str, Served] = {}
        for key in self._cells:
            found[key[0]] = found.get(key[0], Served()).plus(self.of(*key))
        return found

    def forget(self, pool: str, tenant: str | None = None) -> None:
        """Drops a tenant's cells, or a whole pool's."""
        for key in [k for k in self._cells if k[0] == pool and tenant in (None, k[1])]:
            del self._cells[key], self._sums[key]
        if tenant is None:
            self._newest.pop(pool, None)


class RecentCosts:
    """Per (pool, tenant or None for the pool as a whole): cost windows of the last 300 s."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, str | None], dict[int, CostWindow]] = {}
        self.overflow = 0

    def put(self, window: CostWindow) -> bool:
        """Takes a window; False where it changes nothing."""
        key = (window.pool, window.tenant)
        if key not in self._windows:
            if len(self._windows) >= KEYS_MAX:
                self.overflow += 1
                return False
            self._windows[key] = {}
        windows = self._windows[key]
        start = int(window.start_s)
        known = windows.get(start)
        newest = max(windows, default=start)
        if start <= newest - SPAN_S or (known is not None and known.version >= window.version):
            return False
        windows[start] = window
        for old in [s for s in windows if s <= start - SPAN_S]:
            del windows[old]
        return True

    def of(self, pool: str, tenant: str | None) -> dict[str, Any] | None:
        """Sums over the span, and cost per 1M tokens (in + out): a cost is None where any window's is unknown."""
        windows = list(self._windows.get((pool, tenant), {}).values())
        if not windows:
            return None
        tokens = sum(w.input_tokens + w.output_tokens for w in windows)
        direct = _sum([w.usd_direct for w in windows])
        total = _sum([w.usd_total for w in windows])
        return {
            "start_s": min(w.start_s for w in windows),
            "until_s": max(w.start_s + w.size_s for w in windows),
            "requests": sum(w.requests for w in windows),
            "input_tokens": sum(w.input_tokens for w in windows),
            "output_tokens": sum(w.output_tokens for w in windows),
            "usd_direct": direct,
            "usd_idle": _sum([w.usd_idle for w in windows]),
            "usd_total": total,
            "usd_per_million_tokens_direct": _per_million(direct, tokens),
            "usd_per_million_tokens": _per_million(total, tokens),
        }

    def forget(self, pool: str, tenant: str | None) -> None:
        """Drops what is known of one tenant, or of the pool as a whole."""
        self._windows.pop((pool, tenant), None)


def _sum(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None


def _per_million(usd: float | None, tokens: float) -> float | None:
    return usd / tokens * 1e6 if usd is not None and tokens > 0 else None
