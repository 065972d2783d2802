"""What a step takes in this pool: D0 + D1 B + D2 K + P1 p, learned online, slowdowns of known cause taken out.

B: running requests, K: tokens in the KV cache (or its usage, where the capacity is not told), p: prompt tokens a step.
Least squares with no coefficient below 0, half-life 30 min, over all replicas of a pool. Monotone, so that what it is
asked for (what would this step have taken with the usual batch?) has the right sign beyond what it has seen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from models.pool import nonnegative
from models.pool.latency_norms import HALF_LIFE

OBSERVATIONS_MIN = 60.0
"""Replica-windows that it needs."""
SCALE = (1.0, 10.0, 1e4, 100.0)
"""Of the features, so that their squares are of a size."""
OUTLIER_LN = 0.3
"""An observation further off than this (35 %) is no matter of load and is not learned once the model is known."""
BOUNDS = (1e5, 1e9, 1e6)
"""Of B, K and p: beyond, an observation is not one of an engine."""
STEP_BOUNDS_S = (1e-5, 1e3)


class Load(NamedTuple):
    """What a replica works on in a step."""

    batch: float
    kv: float
    prefill: float


class Steps:
    """The step-time model of one pool."""

    __slots__ = ("dev", "gram", "kept", "mass", "moment")

    def __init__(self) -> None:
        self.gram = [0.0] * 16
        self.moment = [0.0] * 4
        self.mass = 0.0
        self.dev = 0.1
        """Mean absolute residual, ln: 0.1 until it is learned."""
        self.kept: list[float] = []
        """The coefficients as of the last `forget`; empty: not known."""

    @property
    def known(self) -> bool:
        """Whether it has seen enough."""
        return bool(self.kept)

    def expected_s(self, load: Load) -> float | None:
        """Step time that a load explains, s; None while that is not known."""
        if not self.kept:
            return None
        total = sum(c * x for c, x in zip(self.kept, _features(load), strict=True))
        return total if total > 0 else None

    def residual(self, load: Load, step_s: float | None) -> float | None:
        """ln(step time / what the load explains); None: unknown."""
        expected = self.expected_s(load)
        return None if expected is None or step_s is None or step_s <= 0 else math.log(step_s / expected)

    def forget(self) -> None:
        """One window has passed: older ones count less. Solves, so that the window is judged by what was before it."""
        keep = 2.0 ** (-1 / HALF_LIFE)
        self.gram = [keep * value for value in self.gram]
        self.moment = [keep * value for value in self.moment]
        self.mass *= keep
        if self.mass >= OBSERVATIONS_MIN:
            self.kept = nonnegative.solve(self.gram, self.moment)

    def learn(self, load: Load, step_s: float, slow_ln: float) -> None:
        """One replica and window; `slow_ln`: what is known to have slowed it, ln."""
        usable = all(0 <= x <= bound for x, bound in zip(load, BOUNDS, strict=True))
        if not usable or not STEP_BOUNDS_S[0] <= step_s <= STEP_BOUNDS_S[1]:
            return
        own_s = step_s * math.exp(-slow_ln)
        off = self.residual(load, own_s)
        if off is not None:
            self.dev += (min(abs(off), OUTLIER_LN) - self.dev) / OBSERVATIONS_MIN
            if abs(off) > OUTLIER_LN:
                return
        x = _features(load)
        for i in range(4):
            self.moment[i] += x[i] * own_s
            for j in range(4):
                self.gram[4 * i + j] += x[i] * x[j]
        self.mass += 1

    def state(self) -> list[list[float]]:
        """As plain values."""
        return [self.gram, self.moment, self.kept, [self.mass, self.dev]]

    def restore(self, state: list[list[float]]) -> None:
        """From `state`."""
        self.gram, self.moment, self.kept, (self.mass, self.dev) = state


def _features(load: Load) -> tuple[float, float, float, float]:
    return (1.0, load.batch / SCALE[1], load.kv / SCALE[2], load.prefill / SCALE[3])
