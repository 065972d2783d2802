"""What a window cost, split so that the parts add up to the bill.

bill   = sum over replicas of allocated GPU seconds x price / 3600 (loading, idling and draining are paid too)
direct = the same over busy time: a replica is busy in proportion to the time with anything running
idle   = bill - direct
Direct cost is split over tenants by the work of the requests that ended in the window: prompt tokens that were not
cached + `OUTPUT_WEIGHT` x generated tokens. With nobody to charge, everything is idle. Unknown price: null.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from models.pool.windows import Window
from schemas.costs import CostWindow

OUTPUT_WEIGHT = 4.0
"""Cost of a generated token in prompt tokens. Prefill of 1000 tokens takes 96 ms, decoding one token about
(28.8/B + 0.264 + 0.1) ms at batch B = 60-100 (llama2-70b, H100 TP4): 6 to 9; engines that mix both in one step
waste less of it. To be replaced by the learned step-time coefficients."""

KEPT = {"hour": 5, "day": 3, "month": 2}
"""Buckets of the running totals that late revisions may still correct."""


class Totals:
    """USD of a pool by UTC hour, day and month of the windows' start."""

    __slots__ = ("buckets",)

    def __init__(self) -> None:
        self.buckets: dict[str, dict[int, float]] = {"hour": {}, "day": {}, "month": {}}

    def add(self, start_s: float, usd: float) -> None:
        """Adds to the buckets of a window (negative: a correction)."""
        for name, bucket in _buckets(start_s).items():
            held = self.buckets[name]
            held[bucket] = held.get(bucket, 0.0) + usd
            for old in sorted(held)[: -KEPT[name]]:
                del held[old]

    def to_date(self, at_s: float) -> dict[str, float]:
        """Totals of the hour, day and month of `at_s`, USD."""
        return {name: max(0.0, self.buckets[name].get(bucket, 0.0)) for name, bucket in _buckets(at_s).items()}


def _buckets(at_s: float) -> dict[str, int]:
    day = datetime.fromtimestamp(at_s, UTC)
    return {"hour": int(at_s // 3600), "day": int(at_s // 86400), "month": day.year * 12 + day.month - 1}


def bill(window: Window, prices: Mapping[str, float], fallback: str) -> tuple[float | None, float | None, list[str]]:
    """(bill, busy part) in USD and the GPU types without a price. Unknown where no replica was heard of.

    `fallback`: GPU type of rows that do not name one. The price of a window's first billing stays.
    """
    if not window.engines:
        return None, None, []
    total = busy = 0.0
    missing: dict[str, None] = {}
    for _, usage in window.engines.values():
        for named, (gpu_s, busy_gpu_s) in usage.items():
            gpu_type = named or fallback
            price = window.prices.get(gpu_type, prices.get(gpu_type))
            if price is None:
                missing[gpu_type] = None
                continue
            window.prices[gpu_type] = price
            total += gpu_s * price / 3600
            busy += busy_gpu_s * price / 3600
    if missing:
        return None, None, list(missing)
    return total, min(busy, total), []


def work_units(usage: list[float]) -> float:
    """Work of (ends, input, cached, output tokens), in prompt tokens."""
    return max(0.0, usage[1] - usage[2]) + OUTPUT_WEIGHT * usage[3]


def tenants_of(window: Window) -> dict[str, list[float]]:
    """Usage per tenant over all sources."""
    total: dict[str, list[float]] = {}
    for _, _, usage in window.requests.values():
        for tenant, row in usage.items():
            known = total.get(tenant)
            total[tenant] = list(row) if known is None else [a + b for a, b in zip(known, row, strict=True)]
    return total


def rows(
    pool: str, start_s: int, window: Window, usd: float | None, busy_usd: float | None, head: dict[str, Any]
) -> list[CostWindow]:
    """The pool's row, then one row a tenant. `head`: size_s, version, closed. `usd`, `busy_usd`: from `bill`."""
    tenants = tenants_of(window)
    works = {tenant: work_units(usage) for tenant, usage in tenants.items()}
    work = sum(works.values())
    direct = busy_usd if work > 0 or busy_usd is None else 0.0
    idle = None if usd is None or direct is None else usd - direct
    made = [_row(pool, None, start_s, _sum(tenants), direct, idle, usd, head)]
    for tenant, usage in tenants.items():
        if direct is None or idle is None:
            made.append(_row(pool, tenant, start_s, usage, None, None, None, head))
            continue
        share = works[tenant] / work if work > 0 else 0.0
        # where nothing was busy, what stood idle is shared by requests: somebody has to carry it
        idle_share = share if work > 0 else usage[0] / max(1.0, sum(u[0] for u in tenants.values()))
        own = (direct * share, idle * idle_share)
        made.append(_row(pool, tenant, start_s, usage, own[0], own[1], own[0] + own[1], head))
    return made


def _sum(tenants: dict[str, list[float]]) -> list[float]:
    total = [0.0] * 4
    for usage in tenants.values():
        for i, value in enumerate(usage):
            total[i] += value
    return total


def _row(
    pool: str,
    tenant: str | None,
    start_s: int,
    usage: list[float],
    direct: float | None,
    idle: float | None,
    usd: float | None,
    head: dict[str, Any],
) -> CostWindow:
    tokens = usage[1] + usage[3]
    counted = tokens >= 1  # less than one token is a rounding of somebody's, and no measure of a price
    return CostWindow(
        pool=pool,
        tenant=tenant,
        start_s=start_s,
        requests=int(usage[0]),
        input_tokens=usage[1],
        output_tokens=usage[3],
        usd_direct=direct,
        usd_idle=idle,
        usd_total=usd,
        usd_per_million_tokens_direct=direct * 1e6 / tokens if direct is not None and counted else None,
        usd_per_million_tokens=usd * 1e6 / tokens if usd is not None and counted else None,
        **head,
    )
