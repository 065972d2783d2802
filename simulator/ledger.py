"""What really happened: requests, SLO, peaks, money. The truth that telemetry is held against."""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Any

from simulator.events import Events
from simulator.fleet import Fleet
from simulator.request import Request
from simulator.scenario import Slo

PEAK_WINDOW_S = 60.0


def slo_met(request: Request, slo: Slo) -> bool:
    """Served, first token in time, and, with two output tokens or more, at the pace."""
    if request.status != "ok" or request.ttft_s is None or request.ttft_s > slo.ttft_s:
        return False
    return request.tpot_s is None or request.tpot_s <= slo.tpot_s


class PoolLedger:
    """Counts of one pool since fleet time 0."""

    def __init__(self, slo: Slo) -> None:
        self.slo = slo
        self.arrivals = 0
        self.slo_ok = 0
        self.status: Counter[str] = Counter()
        self.input_tokens = self.output_tokens = 0
        self.peak_rps = 0.0
        """Highest mean rate over 60 s."""
        self._recent: deque[float] = deque()

    def arrival(self, at_s: float) -> None:
        """One request sent to the pool."""
        self.arrivals += 1
        recent = self._recent
        recent.append(at_s)
        while recent[0] <= at_s - PEAK_WINDOW_S:
            recent.popleft()
        self.peak_rps = max(self.peak_rps, len(recent) / PEAK_WINDOW_S)

    def end(self, request: Request) -> None:
        """One request ended."""
        self.status[request.status] += 1
        self.slo_ok += slo_met(request, self.slo)
        if request.status == "ok":
            self.input_tokens += request.prompt_tokens
            self.output_tokens += request.output_tokens


class Ledger:
    """Adds up the events of a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.pools = {name: PoolLedger(pool.spec.slo) for name, pool in fleet.pools.items()}
        self.tenants: Counter[str] = Counter()

    def add(self, events: Events) -> None:
        """The events of one `Fleet.advance`."""
        for request in events.arrivals:
            self.pools[request.pool].arrival(request.arrival_s)
        for request in events.ends:
            self.pools[request.pool].end(request)
            self.tenants[request.tenant] += 1

    def static_peak_usd(self, pool: str) -> float:
        """Cost of the replicas for the highest 60 s rate, all along: what a fleet without a loop pays."""
        p = self._fleet.pools[pool]
        replicas = math.ceil(self.pools[pool].peak_rps / p.spec.capacity_rps)
        return replicas * p.usd_per_s * self._fleet.now_s

    def report(self) -> dict[str, Any]:
        """Plain values: totals and per pool. `slo_attainment` is a share of what ended, null before."""
        pools: dict[str, Any] = {}
        for name, led in self.pools.items():
            ended = sum(led.status.values())
            pools[name] = {
                "arrivals": led.arrivals,
                "ended": ended,
                "status": dict(led.status),
                "slo_ok": led.slo_ok,
                "slo_attainment": led.slo_ok / ended if ended else None,
                "input_tokens": led.input_tokens,
                "output_tokens": led.output_tokens,
                "peak_60s_rps": led.peak_rps,
                "cost_usd": self._fleet.cost_usd(name),
                "cost_usd_static_peak": self.static_peak_usd(name),
            }
        total = {key: sum(p[key] for p in pools.values()) for key in ("arrivals", "ended", "slo_ok")}
        return {
            "fleet_s": self._fleet.now_s,
            "done": self._fleet.idle,
            **total,
            "slo_attainment": total["slo_ok"] / total["ended"] if total["ended"] else None,
            "cost_usd": self._fleet.cost_usd(),
            "cost_usd_static_peak": sum(p["cost_usd_static_peak"] for p in pools.values()),
            "tenants": dict(self.tenants),
            "pools": pools,
        }
