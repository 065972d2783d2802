"""The last hour of a pool for charts: what came and what was there, beside what had been forecast for that moment."""

from __future__ import annotations

from typing import Any

from schemas.decisions import PoolStatus
from schemas.forecasts import LoadForecast

STEP_S = 10
HORIZONS_MAX = 8
AHEAD_S_MAX = 3600
FIELDS = (
    "requests_per_s",
    "capacity_rps",
    "replicas_ready",
    "replicas_allocated",
    "replicas_target",
    "replicas_wanted",
    "usd_per_hour",
    "slo_attainment",
    "ttft_s_p99",
    "tpot_s_p99",
    "waiting",
)


class History:
    """One point per 10 s of log time over `span_s`; the same per horizon for forecasts, and what lies ahead."""

    def __init__(self, span_s: int = 3600) -> None:
        self.span_s = span_s
        self._newest = 0
        self._points: dict[int, dict[str, Any]] = {}
        self._forecasts: dict[float, dict[int, tuple[float, list[float | None]]]] = {}

    def status(self, status: PoolStatus) -> None:
        """Takes a pool's status; the last one of a step stays."""
        t = int(status.at_s // STEP_S * STEP_S)
        if t <= self._newest - self.span_s:
            return
        known = self._points.get(t)
        if known is not None and known["at_s"] > status.at_s:
            return
        self._points[t] = {"t": t, "at_s": status.at_s} | {name: getattr(status, name) for name in FIELDS}
        if t > self._newest:
            self._newest = t
            self._prune()

    def forecast(self, forecast: LoadForecast) -> None:
        """Takes a forecast; of several for one moment and horizon the latest made stays."""
        t = int(forecast.target_s // STEP_S * STEP_S)
        if self._newest and not self._newest - self.span_s < t <= self._newest + AHEAD_S_MAX:
            return
        if forecast.horizon_s not in self._forecasts and len(self._forecasts) >= HORIZONS_MAX:
            return
        line = self._forecasts.setdefault(forecast.horizon_s, {})
        if t not in line or line[t][0] <= forecast.at_s:
            line[t] = (
                forecast.at_s,
                [forecast.requests_per_s_p10, forecast.requests_per_s, forecast.requests_per_s_p90],
            )
        if len(line) > (self.span_s + AHEAD_S_MAX) // STEP_S + 1:
            del line[min(line)]

    def _prune(self) -> None:
        oldest = self._newest - self.span_s
        for t in [t for t in self._points if t <= oldest]:
            del self._points[t]
        for horizon, line in list(self._forecasts.items()):
            for t in [t for t in line if t <= oldest]:
                del line[t]
            if not line:
                del self._forecasts[horizon]

    def values(self, since_s: float = 0.0) -> dict[str, Any]:
        """`points` in order of time, `forecasts`: horizon -> rows (t, p10, mean, p90), both from `since_s` on."""
        return {
            "step_s": STEP_S,
            "points": [self._points[t] for t in sorted(self._points) if t >= since_s],
            "forecasts": {
                f"{horizon:g}": [[t, *line[t][1]] for t in sorted(line) if t >= since_s]
                for horizon, line in sorted(self._forecasts.items())
            },
        }
