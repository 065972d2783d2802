"""Load forecasts: a fixed-share Hedge over simple experts and one river linear model, per horizon.

Target: mean rate over the 60 s that end at the horizon. Labels come when the horizon is there; every forecast is then
scored, and the scores are published. Intervals by the better of two methods (online quantile tracking, rolling
residuals), by their running pinball loss. Rates are normalised by a slow EWMA, forecasts clipped to 2 x the recent
maximum; where one is not finite the 60 s mean stands in.
"""

from __future__ import annotations

import math
from typing import Any

from models.pool.linear import Linear
from schemas.forecasts import LoadForecast

TICK_S = 10
MEANS_S = (60, 120, 300, 600)
EWMAS_S = (60, 180, 600)
HOLT = (0.1, 0.02, 0.95)
ETA = 2.0 / 6
"""Learning rate per label, in mean losses: 2 per independent one, and six 60 s labels at 10 s steps overlap.
With 2 each, the weights follow one error six times: .87 x the error of `last` instead of .78 (conv x16, 60 s)."""
SHARE = 0.01
EXPERTS = ("last", "mean_60", "mean_120", "mean_300", "mean_600", "ewma_60", "ewma_180", "ewma_600", "holt", "linear")
FEATURES = ("lag_1", "lag_2", "lag_3", "lag_4", "lag_5", "lag_6", "mean_60", "mean_300", "ewma_180", "ewma_600")
RECENT = 180
"""Ticks over which the recent maximum is taken."""
HALF_LIFE_TICKS = 180
QUANTILE_STEP = 0.02
RESIDUALS = 360
HORIZON_TICKS_MAX = 360
LOSS_KEEP = 0.98


class Track:
    """One horizon: weights of the experts, the linear model, forecasts not yet matured, scores."""

    __slots__ = (
        "covered",
        "error",
        "error_last",
        "last_forecast",
        "linear",
        "loss",
        "mass",
        "matured",
        "offsets",
        "pending",
        "pinball",
        "residuals",
        "ticks",
        "weights",
    )

    def __init__(self, ticks: int) -> None:
        self.ticks = ticks
        self.weights = [1 / len(EXPERTS)] * len(EXPERTS)
        self.linear = Linear(FEATURES)
        self.pending: list[list[Any]] = []
        """Oldest first: experts, forecast, (p10, p90) by tracking and by residuals, features, scale, mean_60."""
        self.offsets = [-0.1, 0.1]
        """Tracked distance of p10 and p90 from the forecast, in scales."""
        self.residuals: list[float] = []
        self.pinball = [0.0, 0.0]
        """Running pinball loss of tracking and of residuals."""
        self.loss = 0.0
        """Running mean loss of the experts: what a loss is measured in."""
        self.matured = 0
        self.mass = self.error = self.error_last = self.covered = 0.0
        self.last_forecast: float | None = None

    def mature(self, actual: float, actual_known: bool) -> None:
        """The oldest forecast's time has come."""
        experts, forecast, tracked, rolled, features, scale, mean_60 = self.pending.pop(0)
        self.last_forecast = forecast
        if not actual_known:
            return
        self._score(actual, forecast, experts[0], (tracked, rolled))
        losses = [abs(value - actual) / scale for value in experts]
        mean = sum(losses) / len(losses)
        self.loss = mean if self.loss == 0 else LOSS_KEEP * self.loss + (1 - LOSS_KEEP) * mean
        if self.loss > 0:
            best = min(losses)  # only differences count; this keeps exp() away from 0
            grown = [w * math.exp(-ETA * (x - best) / self.loss) for w, x in zip(self.weights, losses, strict=True)]
            total = sum(grown)
            self.weights = [(1 - SHARE) * w / total + SHARE / len(grown) for w in grown]
        residual = (actual - forecast) / scale
        self.residuals = [*self.residuals, residual][-RESIDUALS:]
        for i, quantile in enumerate((0.1, 0.9)):
            self.offsets[i] += QUANTILE_STEP * (quantile - (residual <= self.offsets[i]))
        self.linear.learn(features, (actual - mean_60) / scale)

    def _score(self, actual: float, forecast: float, last: float, intervals: tuple[list[float], list[float]]) -> None:
        keep = 2.0 ** (-1 / HALF_LIFE_TICKS)
        chosen = self.method()
        self.matured += 1
        self.mass = keep * self.mass + 1
        self.error = keep * self.error + abs(actual - forecast)
        self.error_last = keep * self.error_last + abs(actual - last)
        self.covered = keep * self.covered + (actual <= intervals[chosen][1])
        for i, (low, high) in enumerate(intervals):
            loss = _pinball(actual, low, 0.1) + _pinball(actual, high, 0.9)
            self.pinball[i] = keep * self.pinball[i] + (1 - keep) * loss

    def method(self) -> int:
        """0: quantile tracking, 1: rolling residuals (once there are enough)."""
        return int(len(self.residuals) >= 30 and self.pinball[1] < self.pinball[0])

    def predict(self, experts: list[float], features: list[float], scale: float, limit: float, mean_60: float) -> None:
        """Makes a forecast and keeps it until it matures."""
        linear = mean_60 + self.linear.predict(features) * scale
        values = [min(max(v, 0.0), limit) if math.isfinite(v) else mean_60 for v in (*experts, linear)]
        forecast = sum(w * v for w, v in zip(self.weights, values, strict=True))
        tracked = [_clip(forecast + offset * scale, limit) for offset in sorted(self.offsets)]
        rolled = tracked
        if self.residuals:
            ordered = sorted(self.residuals)
            last = len(ordered) - 1
            rolled = [_clip(forecast + ordered[round(q * last)] * scale, limit) for q in (0.1, 0.9)]
        self.pending.append([values, forecast, tracked, rolled, features, scale, mean_60])

    def newest(self) -> tuple[float, list[float]]:
        """(forecast, [p10, p90]) that was made last."""
        made = self.pending[-1]
        low, high = made[2 + self.method()]
        return made[1], [min(low, made[1]), max(high, made[1])]

    def leader(self) -> str:
        """The expert with the greatest weight."""
        return EXPERTS[max(range(len(EXPERTS)), key=self.weights.__getitem__)]

    def state(self) -> dict[str, Any]:
        """As plain values."""
        return {name: self.linear.state() if name == "linear" else getattr(self, name) for name in self.__slots__}

    def restore(self, state: dict[str, Any]) -> None:
        """From `state`."""
        for name in self.__slots__:
            if name == "linear":
                self.linear.restore(state[name])
            else:
                setattr(self, name, state[name])


class Forecaster:
    """All horizons of one pool. Rates in requests per s, one call of `observe` a tick of 10 s."""

    __slots__ = ("bins", "ewmas", "holt", "scale", "tracks")

    def __init__(self) -> None:
        self.bins: list[float] = []
        """Rates of the last 30 min, oldest first."""
        self.ewmas: list[float] = []
        self.holt: list[float] = []
        self.scale = 0.0
        """Slow EWMA of the rate: what features and residuals are measured in."""
        self.tracks: list[Track] = []

    def horizons(self, cold_start_s: float) -> None:
        """Sets the horizons: 60 s, the cold start, 60 s more. A new one begins without scores."""
        wanted = [6, math.ceil(cold_start_s / TICK_S), math.ceil(cold_start_s / TICK_S) + 6]
        ticks = [min(t, HORIZON_TICKS_MAX) for t in dict.fromkeys(wanted) if t > 0]
        if [track.ticks for track in self.tracks] != ticks:
            known = {track.ticks: track for track in self.tracks}
            self.tracks = [known.get(t) or Track(t) for t in dict.fromkeys(ticks)]

    def observe(self, rate: float) -> None:
        """The rate of the tick that ended; NaN = unknown, which holds the value before and scores nothing."""
        known = rate == rate
        if not self.bins and not known:
            return
        rate = rate if known else self.bins[-1]
        self.bins = [*self.bins, rate][-RECENT:]
        self._smooth(rate)
        mean_60 = self.actual()
        limit = 2 * max(self.bins)
        scale = max(self.scale, 1e-3)
        lags = [self.bins[-i] if len(self.bins) >= i else self.bins[0] for i in range(1, 7)]
        means = [_mean(self.bins[-(s // TICK_S) :]) for s in MEANS_S]
        features = [v / scale for v in (*lags, means[0], means[2], self.ewmas[1], self.ewmas[2])]
        level, trend = self.holt
        damped = HOLT[2]
        for track in self.tracks:
            if len(track.pending) >= track.ticks:
                track.mature(mean_60, known)
            ahead = max(track.ticks - 2, 1)  # the middle of the 60 s that end at the horizon
            slope = trend * damped * (1 - damped**ahead) / (1 - damped)
            track.predict([rate, *means, *self.ewmas, level + slope], features, scale, limit, mean_60)

    def _smooth(self, rate: float) -> None:
        if not self.ewmas:
            self.ewmas, self.holt, self.scale = [rate] * len(EWMAS_S), [rate, 0.0], rate
            return
        for i, span in enumerate(EWMAS_S):
            gain = 1 - math.exp(-TICK_S / span)
            self.ewmas[i] += gain * (rate - self.ewmas[i])
        self.scale += (1 - math.exp(-TICK_S / 1800)) * (rate - self.scale)
        alpha, beta, damped = HOLT
        level, trend = self.holt
        new = alpha * rate + (1 - alpha) * (level + damped * trend)
        self.holt = [new, beta * (new - level) + (1 - beta) * damped * trend]

    def actual(self) -> float:
        """Mean rate of the last 60 s."""
        return _mean(self.bins[-6:])

    def state(self) -> dict[str, Any]:
        """As plain values."""
        state = {name: getattr(self, name) for name in self.__slots__}
        return {**state, "tracks": [track.state() for track in self.tracks]}

    def restore(self, state: dict[str, Any]) -> None:
        """From `state`."""
        for name in self.__slots__:
            setattr(self, name, state[name])
        self.tracks = []
        for plain in state["tracks"]:
            track = Track(plain["ticks"])
            track.restore(plain)
            self.tracks.append(track)


def forecast_rows(pool: str, forecaster: Forecaster, at_s: float, version: int) -> list[LoadForecast]:
    """What is published: one row a horizon, with the errors of what had been said before."""
    made = []
    for track in forecaster.tracks:
        if not track.pending:
            continue
        expected, (low, high) = track.newest()
        scored = track.mass > 0
        made.append(
            LoadForecast(
                pool=pool,
                horizon_s=float(track.ticks * TICK_S),
                at_s=at_s,
                target_s=at_s + track.ticks * TICK_S,
                version=version,
                requests_per_s=expected,
                requests_per_s_p10=low,
                requests_per_s_p90=high,
                model=track.leader(),
                matured=track.matured,
                mae=track.error / track.mass if scored else None,
                mae_last=track.error_last / track.mass if scored else None,
                coverage_p90=min(1.0, track.covered / track.mass) if scored else None,
                actual_requests_per_s=forecaster.actual(),
                was_forecast=track.last_forecast,
            )
        )
    return made


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _clip(value: float, limit: float) -> float:
    return min(max(value, 0.0), limit)


def _pinball(actual: float, quantile: float, level: float) -> float:
    return max(level * (actual - quantile), (level - 1) * (actual - quantile))
