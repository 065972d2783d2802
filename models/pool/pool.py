"""All that is known of one pool. Only data and how it becomes plain values; what is done with it is in the fold."""

from __future__ import annotations

from typing import Any

from models.pool.asking import Asking
from models.pool.capacity import Mix
from models.pool.cost import Totals
from models.pool.findings import Findings
from models.pool.forecast import Forecaster
from models.pool.health import Health
from models.pool.latency import Latency
from models.pool.orders import Orders
from models.pool.shadow_hold import Plan, ShadowHold
from models.pool.verify import Watch
from models.pool.windows import Windows

_PLAIN = (
    "first_s", "tick_end_s", "unrated", "billable", "status_due", "unpriced", "waiting", "drift_s", "verdicts",
    "left_out", "routed_s", "heal_after_s", "floor_replicas", "floor_until_s", "wants",
)  # fmt: skip
"""Attributes that are plain values already."""


class Pool:
    """One pool. Times are Unix s of log time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.windows = Windows()
        self.orders = Orders()
        self.series = ShadowHold()
        self.mix = Mix()
        self.totals = Totals()
        self.findings = Findings()
        self.asking = Asking()
        self.forecast = Forecaster()
        self.health = Health()
        self.latency = Latency()
        self.watch = Watch()
        self.plan: Plan | None = None
        """Setting and base as of the last tick."""
        self.wants: list[list[float]] = []
        """[Unix s, replicas wanted] at the ticks of the last `stabilisation_s`, oldest first."""
        self.first_s = 0.0
        """When its first window came."""
        self.tick_end_s = 0
        """End of the next tick's window."""
        self.unrated: list[int] = []
        """Starts of windows whose arrivals the series does not hold yet, or not as they are now."""
        self.billable: list[int] = []
        """Starts of windows that are to be billed, or billed again."""
        self.status_due = False
        self.unpriced: dict[str, None] = {}
        """GPU types without a price."""
        self.waiting = 0.0
        """Requests that wait, at the newest scrapes."""
        self.drift_s = 0.0
        """When what is allocated last agreed with the target."""
        self.verdicts: dict[str, list[bool]] = {}
        """kind -> whether the last decisions did what was expected."""

        self.left_out: list[str] = []
        """Slow or failed replicas that are not rerouted around, because too many are."""
        self.routed_s = 0.0
        """When the weights were last as they should be."""
        self.heal_after_s = 0.0
        """No reroute before this: the last one was reverted."""
        self.floor_replicas = 0
        self.floor_until_s = 0.0
        """Until then not below `floor_replicas`: a scale-down was reverted."""

    def rate_rps(self, until_s: float) -> float:
        """Mean arrivals per s over the 60 s up to `until_s`, or over the time since the first window if shorter."""
        return self.windows.rate_rps(until_s, int(min(60.0, max(10.0, until_s - self.first_s))))

    def newest_windows(self) -> list[str]:
        """Names of the newest request windows with their versions."""
        starts = [start for start, window in self.windows.by_start.items() if window.requests]
        if not starts:
            return []
        start = max(starts)
        entries = self.windows.by_start[start].requests.items()
        return [f"request/{self.name}/{start}/{source}@{entry[0]}" for source, entry in entries]

    def confidence(self, kind: str) -> float:
        """Share of the recent decisions of a kind that did what was expected; (k + 1) / (n + 2), so 1/2 at first."""
        known = self.verdicts.get(kind, [])
        return (sum(known) + 1) / (len(known) + 2)

    def state(self) -> dict[str, Any]:
        """As plain values."""
        series = {name: getattr(self.series, name) for name in ShadowHold.__slots__}
        return {
            "name": self.name,
            "windows": self.windows.state(),
            "orders": self.orders.state(),
            "series": series,
            "mix": self.mix.state(),
            "totals": self.totals.buckets,
            "findings": self.findings.state(),
            "asking": self.asking.levels,
            "forecast": self.forecast.state(),
            "health": self.health.state(),
            "latency": self.latency.state(),
            "watch": self.watch.state(),
            "plan": None if self.plan is None else list(self.plan),
            **{name: getattr(self, name) for name in _PLAIN},
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Pool:
        """From `state`."""
        pool = cls(state["name"])
        pool.windows.restore(state["windows"])
        pool.orders.restore(state["orders"])
        for name, value in state["series"].items():
            setattr(pool.series, name, value)
        pool.series.setting, pool.series.before = _setting(pool.series.setting), _setting(pool.series.before)
        pool.series.winners = [_setting(winner) for winner in pool.series.winners]
        pool.mix.restore(state["mix"])
        pool.totals.buckets = state["totals"]
        pool.findings.restore(state["findings"])
        pool.asking.levels = state["asking"]
        pool.forecast.restore(state["forecast"])
        pool.health.restore(state["health"])
        pool.latency.restore(state["latency"])
        pool.watch.restore(state["watch"])
        pool.plan = None if state["plan"] is None else Plan(*state["plan"])
        for name in _PLAIN:
            setattr(pool, name, state[name])
        return pool


def _setting(value: Any) -> tuple[int, float]:
    return int(value[0]), float(value[1])
