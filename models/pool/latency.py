"""Why a pool's latency is what it is: p99 of TTFT and TPOT against target and norm, the excess split over causes.

One look a closed 10 s window. A metric breaks when its p99 is above the pool's target, or above its own norm by half
and by four of its ordinary deviations. The finding opens when two of the last three windows broke the target or three
on end the norm, and closes after `CLOSE_WINDOWS` in which nothing was broken. The split rests on means per replica (see
latency_causes), in request seconds above the usual, of the last windows (half-life 30 s): what requests report when
they end happened to them before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from models.pool.findings import Found
from models.pool.latency_bins import Bins
from models.pool.latency_causes import (
    CAUSES,
    Parts,
    Slow,
    Usual,
    pool_factors,
    prefill_parts,
    replica_factors,
    slowness,
    spread,
    token_parts,
    waiting_weights,
)
from models.pool.latency_limits import COUNT_MIN, METRICS, SPAN, limit_s, p99_of, prior, target_s, window_names
from models.pool.latency_norms import Norm, ln
from models.pool.latency_signals import DEMAND_WINDOWS, Seen, Whole, seen, whole
from models.pool.latency_steps import Steps
from models.pool.latency_text import SAID_MIN, clauses, ranked, sentence, untold
from models.pool.windows import SIZE_S, STATE, TTFT_N, TTFT_S, R, Row, Windows
from schemas.config import PoolSpec

OPEN_OF, OPEN_TARGET = 3, 2
"""A finding opens when so many of the last windows broke something, or so many of them the target."""
CLOSE_WINDOWS = 4
BROKEN_WEIGHT = 0.03
"""What a window that breaks teaches of what is usual: a lasting change becomes the norm in hours, not in minutes."""
KEEP = 2.0 ** (-1 / 3)
"""Per window: half-life 30 s."""
WAITED_MIN = 1.0
"""Request seconds of waiting from which its causes are worth remembering."""
GATEWAY_FACTOR = 1.2
"""A gateway's TTFT above the engines' by more than this was waited for before them."""
STEP_LN = 0.02
"""Slowness below this is forgotten."""
FRESH_S = 60
"""A replica has just started for so long after it was last seen loading, or restarted."""


_PARTS = ("usual", "steps", "norms", "bins")
"""Attributes that are no plain values."""


class Sight(NamedTuple):
    """What one window says, put together."""

    whole: Whole
    replicas: list[Seen]
    slow: dict[str, Slow]
    load_shares: dict[str, float]
    """Replica -> its load as a multiple of an equal share."""
    excess: dict[str, Parts]
    """Metric -> cause -> request seconds above the usual."""


class Latency:
    """One pool's latency: what is usual, what is above it now, and the finding that is open."""

    __slots__ = (
        "above",
        "apart",
        "bins",
        "broken",
        "found",
        "fresh",
        "norms",
        "quiet",
        "said",
        "steps",
        "told",
        "usual",
        "weights",
    )

    def __init__(self) -> None:
        self.usual = Usual()
        self.steps = Steps()
        self.norms = {metric: Norm() for metric in METRICS}
        """ln of the p99 of each metric."""
        self.above: dict[str, Parts] = {metric: {} for metric in METRICS}
        """Metric -> cause -> request seconds above the usual, of the last windows."""
        self.weights: Parts = {}
        """Cause -> ln of what has changed, weighted by the waiting time at that moment, of the last windows."""
        self.apart: dict[str, float] = {}
        """Replica -> ln of slowness without a known cause, summed over the last windows."""
        self.said: dict[str, list[Any]] = {}
        """Cause -> [request seconds when it was greatest of late, its figures then]."""
        self.fresh: dict[str, int] = {}
        """Replica -> start of the window in which it last loaded or restarted, within `FRESH_S`."""
        self.bins = Bins()
        """What engines say of latencies where no gateway does."""
        self.broken: list[int] = []
        """Of the last windows, oldest first: 0 nothing broke, 1 a norm did, 2 a target."""
        self.quiet = 0
        """Windows on end in which none did."""
        self.found: list[Any] | None = None
        """[text, severity, evidence] of what is open."""
        self.told = 0
        """Start of the last window looked at."""

    def look(
        self, start_s: int, windows: Windows, spec: PoolSpec | None, rate_rps: float | None,
        weights: Mapping[str, float],
    ) -> None:  # fmt: skip
        """One closed window. `rate_rps`: what a replica carries, by the policy; `weights`: those other than 1."""
        if start_s <= self.told:
            return
        self.told = start_s
        self.usual.prior = prior(spec, rate_rps)
        self._refresh(start_s, windows)
        sight = self._see(start_s, windows, weights)
        hists = windows.hists if windows.request_until else self.bins.held
        p99_s = {metric: p99_of(hists, start_s, i + 1) for i, metric in enumerate(METRICS)}
        limits = {metric: limit_s(self.norms[metric], target_s(metric, spec)) for metric in METRICS}
        over = {
            metric: value / limits[metric]
            for metric, value in p99_s.items()
            if value is not None and value > limits[metric]
        }
        self._remember(sight)
        self._name_later(sight.slow)
        self._learn(sight, p99_s, BROKEN_WEIGHT if over else 1.0)
        self._judge(start_s, windows, spec, p99_s, over, untold(sight.replicas))

    def current(self, pool: str) -> dict[str, Found]:
        """What is wrong now, as a kind of finding."""
        if self.found is None:
            return {}
        text, severity, evidence = self.found
        return {pool: Found(text, severity, None, evidence)}

    # -- one window ------------------------------------------------------------------------------------------

    def _refresh(self, start_s: int, windows: Windows) -> None:
        rows, before = windows.rows_of(start_s), windows.rows_of(start_s - SIZE_S)
        for name, row in rows.items():
            # what was ready when the pool was first heard of is not fresh
            if name in before and (row[R["loading_s"]] or before[name][STATE] == "starting" or row[R["resets"]]):
                self.fresh[name] = start_s
        self.fresh = {name: at for name, at in self.fresh.items() if start_s - at < FRESH_S and name in rows}

    def _see(self, start_s: int, windows: Windows, weights: Mapping[str, float]) -> Sight:
        rows, suspects = windows.rows_of(start_s), windows.suspects_of(start_s)
        earlier = [windows.rows_of(start_s - k * SIZE_S) for k in range(DEMAND_WINDOWS - 1, 0, -1)]
        replicas: list[Seen] = []
        for name, row in rows.items():
            before: list[Row] = [held[name] for held in earlier if name in held]
            one = seen(name, row, before, suspects.get(name))
            if one is not None:
                replicas.append(one)
        window = windows.by_start.get(start_s)
        pool = whole(rows, replicas, 0.0 if window is None else window.arrivals())
        slow = {one.name: slowness(one, self.usual, self.steps, one.name in self.fresh) for one in replicas}
        compared = [one for one in replicas if one.name not in weights and one.name not in self.fresh]
        equal = sum(one.demand for one in compared) / len(compared) if len(compared) > 1 else 0.0
        load_shares = {one.name: one.demand / equal for one in compared} if equal > 0 else {}
        common = pool_factors(pool, self.usual)
        factors = {
            one.name: replica_factors(one, slow[one.name], common, load_shares.get(one.name, 1.0), pool, self.usual)
            for one in replicas
        }
        waited = 0.0
        for one in replicas:
            wait_s = one.firsts * self.usual.above("queue_s", one.queue_s)
            waited += wait_s
            self._weigh(factors[one.name], wait_s + one.waiting)
        beyond_s = self._at_the_gateway_s(start_s, windows)
        self._weigh(common, beyond_s)
        excess: dict[str, Parts] = {metric: {} for metric in METRICS}
        total = self.weights.get("all", 0.0)
        behind = {c: self.weights.get(c, 0.0) / total for c in CAUSES} if total > WAITED_MIN else {}
        if waited + beyond_s > 0:
            _add(excess["ttft"], spread(waited + beyond_s, waiting_weights(behind or dict.fromkeys(CAUSES, 0.0))))
        for one in replicas:
            # what made a queue still fills the batches when it has passed
            changed = {c: max(factors[one.name].get(c, 0.0), behind.get(c, 0.0)) for c in CAUSES}
            own = self.usual.above("expected", ln(self.steps.expected_s(one.load)))
            _add(excess["ttft"], prefill_parts(one, slow[one.name], changed, pool, self.usual, own))
            _add(excess["tpot"], token_parts(one, slow[one.name], changed, self.usual, own))
        return Sight(pool, replicas, slow, load_shares, excess)

    def _weigh(self, factors: Parts, weight: float) -> None:
        """What has changed counts by the waiting that there was when it had changed."""
        for cause, value in factors.items():
            self.weights[cause] = self.weights.get(cause, 0.0) + weight * value
        self.weights["all"] = self.weights.get("all", 0.0) + weight

    def _at_the_gateway_s(self, start_s: int, windows: Windows) -> float:
        """Request seconds waited before any engine: TTFT that gateways saw beyond what engines saw of late."""
        window = windows.by_start.get(start_s)
        sums = None if window is None else window.sums()
        if sums is None or sums[TTFT_N] < COUNT_MIN:
            return 0.0
        engines = 0.0
        for k in range(SPAN):
            rows = windows.rows_of(start_s - k * SIZE_S).values()
            firsts = sum(row[R["ttft_count"]] or 0.0 for row in rows)
            if firsts > 0:
                engines = max(engines, sum(row[R["ttft_s_sum"]] or 0.0 for row in rows) / firsts)
        beyond_s = sums[TTFT_S] / sums[TTFT_N] - GATEWAY_FACTOR * engines
        return max(0.0, beyond_s) * sums[TTFT_N] if engines > 0 else 0.0

    def _remember(self, sight: Sight) -> None:
        """Adds a window to what is above the usual of late, with the figures of each cause at its worst."""
        for metric in METRICS:
            kept = {cause: KEEP * value for cause, value in self.above[metric].items() if value > 1e-9}
            _add(kept, sight.excess[metric])
            self.above[metric] = kept
        self.weights = {cause: KEEP * value for cause, value in self.weights.items()}
        figures = clauses(sight.whole, sight.replicas, sight.slow, sight.load_shares, self.usual)
        for cause in CAUSES:
            now = max(sight.excess[metric].get(cause, 0.0) for metric in METRICS)
            held = self.said.get(cause)
            if held is not None and KEEP * held[0] > now:
                held[0] *= KEEP
            else:
                self.said[cause] = [now, figures[cause]]

    def _name_later(self, slow: Mapping[str, Slow]) -> None:
        """Level 1 names a neighbour by its rule, late: what was unexplained of that replica becomes its."""
        kept = {name: KEEP * value for name, value in self.apart.items() if name in slow and value > STEP_LN}
        for name, one in slow.items():
            if one.unexplained > 0 and one.interference == 0:
                kept[name] = kept.get(name, 0.0) + one.unexplained
        total = sum(kept.values())
        named = [name for name in kept if slow[name].interference > 0]
        share = sum(kept.pop(name) for name in named) / total if named else 0.0
        for parts in (*self.above.values(), self.weights):
            moved = share * parts.get("unexplained", 0.0)
            if moved > 0:
                parts["unexplained"] -= moved
                parts["interference"] = parts.get("interference", 0.0) + moved
        self.apart = kept

    def _learn(self, sight: Sight, p99_s: Mapping[str, float | None], weight: float) -> None:
        """What is usual, by windows in which nothing broke; the step-time model by all."""
        norms, pool = self.usual.norms, sight.whole
        for metric in METRICS:
            self.norms[metric].learn(ln(p99_s[metric]), weight)
        norms["pressure"].learn(pool.pressure, weight)
        norms["prompt"].learn(ln(pool.prompt), weight)
        norms["output"].learn(ln(pool.output), weight)
        for name, values in _by_replica(sight, self.steps).items():
            total = sum(n for n, _ in values)
            norms[name].learn(sum(n * value for n, value in values) / total if total > 0 else None, weight)
        self.steps.forget()
        for one in sight.replicas:
            if one.step_s is not None and one.load.batch > 0 and one.name not in self.fresh:
                self.steps.learn(one.load, one.step_s, sight.slow[one.name].known)

    # -- the finding -----------------------------------------------------------------------------------------

    def _judge(
        self, start_s: int, windows: Windows, spec: PoolSpec | None, p99_s: Mapping[str, float | None],
        over: Mapping[str, float], unknown: list[str],
    ) -> None:  # fmt: skip
        """Opens, updates or closes."""
        missed = any(value is not None and value > (target_s(m, spec) or math.inf) for m, value in p99_s.items())
        self.broken = [*self.broken, 2 if missed else int(bool(over))][-OPEN_OF:]
        self.quiet = 0 if over else self.quiet + 1
        if self.found is not None and self.quiet >= CLOSE_WINDOWS:
            self.found = None
        opens = self.broken.count(2) >= OPEN_TARGET or sum(level > 0 for level in self.broken) >= OPEN_OF
        if not over or (self.found is None and not opens):
            return
        ordered = sorted(over, key=lambda metric: -over[metric])
        shares = {metric: _shares(self.above[metric]) for metric in ordered}
        said = {cause: held[1] for cause, held in self.said.items()}
        sentences, figures = [], {}
        for metric in ordered:
            value_s, aim_s = p99_s[metric], target_s(metric, spec)
            assert value_s is not None, "what is over has a value"
            norm_s = math.exp(self.norms[metric].mean) if self.norms[metric].known else None
            sentences.append(sentence(metric.upper(), value_s, aim_s, norm_s, start_s + SIZE_S, shares[metric], said))
            said = {cause: text for cause, text in said.items() if shares[metric][cause] < SAID_MIN}  # once is enough
            figures[metric] = {"p99_s": value_s, "target_s": aim_s, "norm_s": norm_s, "shares": shares[metric]}
        if unknown:
            sentences.append(f"No replica tells {', '.join(unknown)}: the shares know less.")
        first = ordered[0]
        evidence = {
            "metric": first,
            "shares": shares[first],
            "causes": [cause for cause, _ in ranked(shares[first])],
            **figures,
            "unknown": unknown,
            "windows": window_names(windows, start_s),
        }
        self.found = [" ".join(sentences), over[first], evidence]

    # -- state -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As plain values."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name not in _PARTS}
        return {
            **plain,
            "usual": {name: norm.state() for name, norm in self.usual.norms.items()},
            "steps": self.steps.state(),
            "bins": self.bins.held,
            "norms": {name: norm.state() for name, norm in self.norms.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """From `state`."""
        for name in self.__slots__:
            if name not in _PARTS:
                setattr(self, name, state[name])
        for name, norm in self.usual.norms.items():
            norm.restore(state["usual"][name])
        self.steps.restore(state["steps"])
        self.bins.held = state["bins"]
        for name, norm in self.norms.items():
            norm.restore(state["norms"][name])


def _by_replica(sight: Sight, steps: Steps) -> dict[str, list[tuple[float, float]]]:
    """Name of a norm -> (requests, value) of every replica that gave it."""
    found: dict[str, list[tuple[float, float]]] = {}
    for one in sight.replicas:
        values = {
            "queue_s": one.queue_s,
            "prefill": ln(one.prefill_s),
            "token": ln(one.token_s),
            "expected": ln(steps.expected_s(one.load)),
            "stall": one.stall,
            "held": one.held,
            "clock": one.clock,
        }
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, []).append((max(one.firsts, 1.0), value))
    return found


def _add(total: Parts, more: Mapping[str, float]) -> None:
    for cause, value in more.items():
        total[cause] = total.get(cause, 0.0) + value


def _shares(above: Mapping[str, float]) -> Parts:
    """Every cause's share, to three digits; they add up to 1. Nothing above the usual by the means: unexplained."""
    total = sum(above.values())
    if total <= 0:
        return {**dict.fromkeys(CAUSES, 0.0), "unexplained": 1.0}
    shares = {cause: round(above.get(cause, 0.0) / total, 3) for cause in CAUSES}
    largest = max(CAUSES, key=lambda cause: shares[cause])
    shares[largest] = round(shares[largest] + 1.0 - sum(shares.values()), 3)
    return shares
