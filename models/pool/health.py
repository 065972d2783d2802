"""Which replicas are slow, compared with their siblings.

A replica's time per engine step is set against what the pool's own step-time model expects for its batch and prefill
load, T = D0 + D1 B + P1 p (B: mean running requests, p: prompt tokens per step), learned by least squares from all
replicas (half-life 30 min) and divided by the siblings' median, so that a shift of all names nobody. Where an engine
does not count its steps, time per output token and time to first token are set against the siblings' medians instead,
the latter by its square root, since queueing amplifies a slowdown. Where it does, they decide nothing: a replica whose
steps are as fast as they should be has long requests, not a fault (of 26 replicas several looked slow by TTFT in five
minutes), and one with little traffic, because it was rerouted around, would look well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from models.pool import nonnegative
from models.pool.windows import STATE, R, Row

SLOW = 1.5
"""A replica so much slower than its siblings in 2 of 3 looks is slow."""
WELL = 1.2
WELL_LOOKS = 6
"""... and well again when it was below 1.2 in 6 closed windows on end."""
SIBLINGS_MIN = 3
LOOKS = 3
STEPS_MIN = 20
TPOT_MIN, TTFT_MIN = 3, 5
"""Observations that a mean needs to be compared."""
COVERED_MIN_S = 4.0
MODEL_MIN = 60.0
"""Replica-windows that the step-time model needs."""
HALF_LIFE_TICKS = 180
IDLE_LOOKS = 6


class Step(NamedTuple):
    """What one replica did in one window."""

    step_s: float | None
    batch: float
    prefill: float
    """Prompt tokens per step."""
    tpot_s: float | None
    ttft_s: float | None


class Health:
    """Slowdown of every replica of one pool."""

    __slots__ = ("gram", "idle", "looks", "mass", "moment", "peak", "slow", "well")

    def __init__(self) -> None:
        self.gram = [0.0] * 9
        """X'X of [1, B, p], rows one after the other."""
        self.moment = [0.0] * 3
        """X'y; y = step time, s."""
        self.mass = 0.0
        self.looks: dict[str, list[list[float]]] = {}
        """replica -> last looks, oldest first: [start of the window, slowdown]."""
        self.slow: dict[str, float] = {}
        """Slow replicas with their slowdown."""
        self.well: dict[str, int] = {}
        """slow replica -> closed windows on end in which it was well."""
        self.idle: dict[str, int] = {}
        """replica -> closed windows on end without any request."""
        self.peak = 0.0
        """Largest mean batch that a replica ran, slowly forgotten."""

    def look(self, start_s: int, rows: Mapping[str, Row], weights: Mapping[str, float], closed: bool) -> None:
        """One window, open or just ended. `weights`: those other than 1."""
        steps = {name: _step(row) for name, row in rows.items() if _judged(row)}
        full = {name: step for name, step in steps.items() if name not in weights}
        scores = self._scores(steps, full)
        for name, score in scores.items():
            looks = [look for look in self.looks.get(name, []) if look[0] != start_s]
            self.looks[name] = [*looks, [start_s, score]][-LOOKS:]
            if score > SLOW and sum(look[1] > SLOW for look in self.looks[name]) >= 2:
                self.slow[name] = score
                self.well[name] = 0
            elif name in self.slow and closed:
                self.slow[name] = score
                self.well[name] = self.well.get(name, 0) + 1 if score < WELL else 0
                if self.well[name] >= WELL_LOOKS:
                    del self.slow[name], self.well[name]
        if closed:
            self._learn({name: step for name, step in full.items() if scores.get(name, 1.0) < 1.3})
            self._idle(rows)

    def forget(self, rows: Mapping[str, Row], weights: Mapping[str, float]) -> None:
        """Drops the replicas that are not in `rows`, every one that is heard of now; but those with a weight in force
        stay: an exporter that is silent for a while says nothing of their health."""
        for kept in (self.looks, self.slow, self.well, self.idle):
            for gone in [name for name in kept if name not in rows and name not in weights]:
                del kept[gone]

    def _scores(self, steps: Mapping[str, Step], full: Mapping[str, Step]) -> dict[str, float]:
        expected = self._expected(steps)
        ratios = {
            name: step.step_s / expected[name]
            for name, step in steps.items()
            if step.step_s is not None and name in expected
        }
        whole = _median([ratio for name, ratio in ratios.items() if name in full])
        tpot = _median([step.tpot_s for step in full.values() if step.tpot_s is not None])
        ttft = _median([step.ttft_s for step in full.values() if step.ttft_s is not None])
        scores: dict[str, float] = {}
        for name, step in steps.items():
            known = []
            if whole and name in ratios:
                known.append(ratios[name] / whole)
            else:
                if tpot and step.tpot_s is not None:
                    known.append(step.tpot_s / tpot)
                if ttft and step.ttft_s is not None and name in full:
                    known.append((step.ttft_s / ttft) ** 0.5)
            if known:
                scores[name] = max(known)
        return scores

    def _expected(self, steps: Mapping[str, Step]) -> dict[str, float]:
        """Step time by the model, s; before it is learned the siblings' median."""
        if self.mass < MODEL_MIN:
            median = _median([step.step_s for step in steps.values() if step.step_s is not None])
            return dict.fromkeys(steps, median) if median else {}
        d0, d1, p1 = self.coefficients()
        return {name: max(d0 + d1 * step.batch + p1 * step.prefill, 1e-6) for name, step in steps.items()}

    def coefficients(self) -> tuple[float, float, float]:
        """(D0 s, D1 s per running request, P1 s per prompt token); none below 0."""
        d0, d1, p1 = nonnegative.solve(self.gram, self.moment)
        return d0, d1, p1

    def _learn(self, steps: Mapping[str, Step]) -> None:
        keep = 2.0 ** (-1 / HALF_LIFE_TICKS)
        self.gram = [keep * value for value in self.gram]
        self.moment = [keep * value for value in self.moment]
        self.mass *= keep
        for step in steps.values():
            if step.step_s is None:
                continue
            x = (1.0, step.batch, step.prefill)
            for i in range(3):
                self.moment[i] += x[i] * step.step_s
                for j in range(3):
                    self.gram[3 * i + j] += x[i] * x[j]
            self.mass += 1

    def _idle(self, rows: Mapping[str, Row]) -> None:
        self.peak *= 2.0 ** (-1 / (6 * HALF_LIFE_TICKS))
        for name, row in rows.items():
            running, waiting = row[R["running_mean"]], row[R["waiting_mean"]]
            nothing = row[STATE] == "ready" and running == 0 and not waiting
            self.idle[name] = self.idle.get(name, 0) + 1 if nothing else 0
            self.peak = max(self.peak, running or 0.0)

    def idle_replicas(self) -> list[str]:
        """Ready replicas without a request for a minute."""
        return [name for name, windows in self.idle.items() if windows >= IDLE_LOOKS]

    def state(self) -> dict[str, Any]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}

    def restore(self, state: dict[str, Any]) -> None:
        """From `state`."""
        for name in self.__slots__:
            setattr(self, name, state[name])


def failed(rows: Mapping[str, Row]) -> list[str]:
    """Replicas that failed, by the inventory."""
    return [name for name, row in rows.items() if row[STATE] == "failed"]


def _judged(row: Row) -> bool:
    covered = row[R["covered_s"]] or 0.0
    return row[STATE] == "ready" and covered >= COVERED_MIN_S


def _step(row: Row) -> Step:
    running, steps = row[R["running_mean"]] or 0.0, row[R["iterations"]] or 0.0
    busy_s = row[R["covered_s"]] * min(1.0, running)
    tpot_n, ttft_n = row[R["tpot_count"]] or 0.0, row[R["ttft_count"]] or 0.0
    return Step(
        step_s=busy_s / steps if steps >= STEPS_MIN and busy_s > 0 else None,
        batch=running,
        prefill=(row[R["prompt_tokens"]] or 0.0) / steps if steps >= STEPS_MIN else 0.0,
        tpot_s=row[R["tpot_s_sum"]] / tpot_n if tpot_n >= TPOT_MIN and row[R["tpot_s_sum"]] is not None else None,
        ttft_s=row[R["ttft_s_sum"]] / ttft_n if ttft_n >= TTFT_MIN and row[R["ttft_s_sum"]] is not None else None,
    )


def _median(values: list[float]) -> float | None:
    """None where fewer than `SIBLINGS_MIN` can be compared."""
    if len(values) < SIBLINGS_MIN:
        return None
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
