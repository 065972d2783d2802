"""Shadow-hold v2: how many replicas, from the observed demand alone.

Every candidate (hold window W, margin m) is replayed on the observed past, cold start included: what it would have
paid, and what share of requests would have met too few live replicas. Each minute the candidate with the least
paid + price x missed leads; a cheaper setting must win 5 times in a row, a dearer one acts at once.
Everything is recomputed from the series of arrivals, so a revised window or a better capacity rewrites the past.
For a minute after a choice, a scale-down leaves what the setting before asks for: a cheaper setting that loses the next
choice again would otherwise cost a cold start (40, 28, 40 replicas within a minute on conv x16). Planner alone, against
none: conv x16 +1.0 % cost and 1.55 instead of 1.79 % missed, code x16 +.5 %; holding every want for 60 s costs 3.3 %.
The hold window is what matters: a bursty pool learns to keep its peak for 10-15 min, a smooth one lets go after one; a
fixed window and margin meets the targets of one kind of traffic only. Demand is in replicas: arrivals per s / capacity.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

TICK_S = 10
HOLDS_S = (60, 120, 300, 600, 900)
MARGINS = (1.0, 1.05, 1.1, 1.15, 1.2)
HALF_LIFE_S = 1800.0
CONFIRM = 5
"""Times that a cheaper setting must win before it acts."""
EVIDENCE_TICKS = 60.0
FIRST_CHOICE_S = 600.0
START = (600, 1.15)
MEAN_TICKS = 6
SETTLE_TICKS = 6
"""Ticks after a choice in which scale-downs leave what the setting before asks for: up to the next choice."""
STAY_TICKS = 180
EVIDENCE_SPAN = 1080
HISTORY = 1200
"""Ticks of the series that are kept: 1080 of evidence and the longest hold before them."""
OVERLOAD_SPAN = 0.4
"""Demand / capacity 1.0 misses nothing, 1.4 misses everything, linear between."""


class Want(NamedTuple):
    """What the present setting asks for, and from what."""

    replicas: int
    load: float
    """Demand that it must carry: the largest 60 s mean of the hold window, replicas."""
    hold_s: int
    margin: float
    reserve: float
    thin: bool
    """True: little evidence at the present load, so the start setting holds as well."""


class ShadowHold:
    """Series by tick and the present setting of one pool."""

    __slots__ = (
        "before",
        "candidates",
        "changed",
        "count",
        "first_tick",
        "mix",
        "rates",
        "setting",
        "stay",
        "width",
        "winners",
    )

    def __init__(self) -> None:
        self.first_tick = 0
        """Number of the first tick in the series: its window's start / 10 s."""
        self.count = 0
        """Ticks seen since the beginning."""
        self.rates = np.zeros(0)
        """Arrivals per s by tick; NaN = unknown."""
        self.mix = np.zeros(0)
        """ln of the capacity's factor for the token mix, by tick: a mix change does not rewrite the past."""
        self.stay = np.zeros(0)
        """Requests in the pool by tick; NaN = unknown."""
        self.width = np.zeros(0)
        """Ticks over which the shadow demand is averaged, by tick."""
        self.setting: tuple[int, float] = START
        self.before: tuple[int, float] = START
        """The setting before this one."""
        self.changed = 0
        """Ticks seen when the setting changed last; 0: not since the beginning."""
        self.winners: list[tuple[int, float]] = []
        self.candidates: list[dict[str, Any]] = []

    # -- series ----------------------------------------------------------------------------------------------

    def push(self, tick: int, rate: float, mix: float, in_flight: float) -> None:
        """The tick after the last one. Unknown values are NaN."""
        if not len(self.rates):
            self.first_tick = tick
        assert tick == self.first_tick + len(self.rates), (tick, self.first_tick, len(self.rates))
        width = self._width() if self.count % MEAN_TICKS == 0 else float(self.width[-1])
        self.rates = np.append(self.rates, rate)[-HISTORY:]
        self.mix = np.append(self.mix, mix)[-HISTORY:]
        self.stay = np.append(self.stay, in_flight)[-HISTORY:]
        self.width = np.append(self.width, width)[-HISTORY:]
        self.count += 1
        self.first_tick = tick + 1 - len(self.rates)

    def revise(self, tick: int, rate: float) -> None:
        """Another value for a tick that is still in the series."""
        index = tick - self.first_tick
        if 0 <= index < len(self.rates):
            self.rates[index] = rate

    def restart(self) -> None:
        """Forgets the series (a gap longer than all of it); the setting stays."""
        self.rates = self.mix = self.stay = self.width = np.zeros(0)
        self.count = self.changed = 0

    @property
    def span_s(self) -> float:
        """Length of the observed past, s."""
        return len(self.rates) * TICK_S

    def _width(self) -> float:
        """Little's law: a burst shorter than a request's stay does no harm. Ticks, 2 to 4, fractional."""
        stay, rates = self.stay[-STAY_TICKS:], self.rates[-STAY_TICKS:]
        known = ~np.isnan(stay) & ~np.isnan(rates)
        total = float(rates[known].sum())
        if total <= 0:
            return 2.0
        return min(max(float(stay[known].sum()) / total / TICK_S + 1.5, 2.0), 4.0)

    def demand(self, capacity_rps: float) -> tuple[np.ndarray, np.ndarray]:
        """(60 s means, means over the requests' stay) by tick, in replicas. Unknown ticks hold the value before."""
        rates = self.rates
        unknown = np.isnan(rates)
        if unknown.any():
            known = np.where(unknown, 0, np.arange(len(rates)))
            rates = rates[np.maximum.accumulate(known)]
            rates = np.where(np.isnan(rates), 0.0, rates)  # unknown from the start on: no demand seen yet
        y = rates / (capacity_rps * np.exp(self.mix))
        sums = np.concatenate([np.zeros(1), np.cumsum(y)])
        whole = np.floor(self.width)
        part = self.width - whole
        low = _trailing_mean(sums, whole.astype(np.int64))
        high = _trailing_mean(sums, whole.astype(np.int64) + 1)
        means = _trailing_mean(sums, np.full(len(y), MEAN_TICKS, np.int64))
        return means, (1 - part) * low + part * high

    # -- the choice ------------------------------------------------------------------------------------------

    def choose(self, capacity_rps: float, reserve: float, price: float, cold_start_s: float) -> bool:
        """Replays all candidates and moves the setting; once a minute. True: the setting changed.

        `price`: what a missed request is worth in requests' worth of capacity (7: a 1 % miss = 7 % of capacity).
        """
        scores = self.replay(capacity_rps, reserve, price, cold_start_s)
        if scores is None:
            return False
        self.candidates = scores
        best = min(scores, key=lambda c: float(c["score"]))
        self.winners = [*self.winners, (int(best["hold_s"]), float(best["margin"]))][-CONFIRM:]
        voters = list(self.winners)
        if len(voters) < CONFIRM:
            voters.append(self.setting)
        paid = {(c["hold_s"], c["margin"]): c["paid"] for c in scores}
        chosen = max(voters, key=lambda setting: float(paid[setting]))
        if chosen == self.setting:
            return False
        self.before, self.setting, self.changed = self.setting, chosen, self.count
        return True

    def replay(
        self, capacity_rps: float, reserve: float, price: float, cold_start_s: float
    ) -> list[dict[str, Any]] | None:
        """What each candidate would have paid and missed, relative to the demand; None before there is any.

        paid(W, m) = sum w (m base_W + r) / S; missed(W, m) = sum w dem g(dem / (m live_W[i-1] + r)) / S; S = sum w dem.
        """
        delay = math.ceil(cold_start_s / TICK_S)
        first = delay + MEAN_TICKS + 1
        if self.count > len(self.rates):  # the oldest ticks are gone: the hold windows need their past
            first += max(HOLDS_S) // TICK_S
        n = len(self.rates)
        if n <= first:
            return None
        means, demand = self.demand(capacity_rps)
        weights = 2.0 ** (-(n - 1 - np.arange(first, n)) * TICK_S / HALF_LIFE_S)
        late = demand[first:]
        total = float(np.dot(weights, late))
        if total <= 0:
            return None
        scores = []
        for hold_s in HOLDS_S:
            base = _trailing(means, hold_s // TICK_S, np.max, -np.inf)
            live = _trailing(base, delay + 1, np.min, np.inf)[first - 1 : -1]
            for margin in MARGINS:
                paid = float(np.dot(weights, margin * base[first:] + reserve)) / total
                room = margin * live + reserve
                load = np.divide(late, room, out=np.where(late > 0, np.inf, 0.0), where=room > 0)
                share = np.clip((load - 1.0) / OVERLOAD_SPAN, 0.0, 1.0)
                missed = float(np.dot(weights, late * share)) / total
                scores.append(
                    {
                        "hold_s": hold_s,
                        "margin": margin,
                        "paid": paid,
                        "missed": missed,
                        "score": paid + price * missed,
                    }
                )
        return scores

    # -- the plan --------------------------------------------------------------------------------------------

    def plan(self, capacity_rps: float, reserve: float) -> Plan:
        """The present setting on the present series. Needs at least one tick."""
        means, demand = self.demand(capacity_rps)
        now = float(demand[-1])
        span = demand[-EVIDENCE_SPAN:]
        ages = np.arange(len(span) - 1, -1, -1)
        seen = float(np.dot(2.0 ** (-ages * TICK_S / HALF_LIFE_S), span))
        thin = now > 0 and seen / now < EVIDENCE_TICKS
        base_start = _peak(means, START[0])

        def of(setting: tuple[int, float], left: int) -> Plan:
            return Plan(*setting, reserve, _peak(means, setting[0]), base_start, thin, left)

        settling = self.changed > 0 and self.count - self.changed < SETTLE_TICKS
        return of(self.setting, of(self.before, 0).want().replicas if settling else 0)


class Plan(NamedTuple):
    """A setting on a series: asks for replicas given the demand of this second."""

    hold_s: int
    margin: float
    reserve: float
    base: float
    """Largest 60 s mean of the hold window, replicas."""
    base_start: float
    """The same over the start setting's 600 s."""
    thin: bool
    left: int
    """Replicas that a scale-down leaves: what the setting before asks for, in the minute after a choice; else 0."""

    def want(self, load: float = 0.0) -> Want:
        """`load`: demand of the last 60 s as of now, replicas, where it is newer than the last tick."""
        base = max(self.base, load)
        replicas = _ceil(self.margin * base + self.reserve)
        if self.thin:
            floor = _ceil(max(self.margin, START[1]) * max(self.base_start, base) + self.reserve)
            replicas = max(replicas, floor)
        return Want(replicas, base, self.hold_s, self.margin, self.reserve, self.thin)


def _peak(means: np.ndarray, hold_s: int) -> float:
    return float(means[-(hold_s // TICK_S) :].max())


def _ceil(value: float) -> int:
    return math.ceil(value - 1e-9)  # rounding must not cost a replica


def _trailing(values: np.ndarray, width: int, what: Any, start: float) -> np.ndarray:
    """`what` over the last `width` values up to each (fewer at the start)."""
    padded = np.concatenate([np.full(width - 1, start), values])
    held: np.ndarray = what(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)
    return held


def _trailing_mean(sums: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Mean over the last `width[i]` values up to i (fewer at the start), from their cumulative sums."""
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - width, 0)
    held: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return held
