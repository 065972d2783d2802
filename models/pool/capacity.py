"""What one replica carries within its targets, for the present token mix: a prior, scaled.

Work per request, relative to the mix that the prior was measured with:
    w = (in + 4 out) / (in0 + 4 out0),  C = C0 exp(-f),  f = sign(ln w) max(0, |ln w| - 0.08)
The dead band keeps the plan from following noise: every dip of C would be kept by the hold window. Means are EWMAs
(half-life 300 s). Without the prior's means the prior holds as it is.
"""

from __future__ import annotations

import math

from models.pool.cost import OUTPUT_WEIGHT
from schemas.config import PoolSpec

DEAD_BAND = 0.08
HALF_LIFE_S = 300.0
ENDS_AFTER_S = 120.0
"""At first only short answers have ended: what ends is not what was asked for until the long ones end too."""
FACTOR_MAX = 1.5
"""|f| at most: beyond a factor of 4.5 the prior says nothing."""


class Mix:
    """Mean tokens per request of one pool."""

    __slots__ = ("arrivals", "ends", "input_tokens", "output_tokens", "span_s")

    def __init__(self) -> None:
        self.input_tokens = self.arrivals = self.output_tokens = self.ends = 0.0
        self.span_s = 0.0
        """How long it has been learned."""

    def learn(self, inputs: float, arrivals: float, outputs: float, ends: float, span_s: float) -> None:
        """Prompt tokens of the arrivals and generated tokens of the ends of the last `span_s`."""
        self.span_s += span_s
        keep = 2.0 ** (-span_s / HALF_LIFE_S)
        if arrivals > 0:
            self.input_tokens = keep * self.input_tokens + inputs
            self.arrivals = keep * self.arrivals + arrivals
        if ends > 0 and self.span_s > ENDS_AFTER_S:
            self.output_tokens = keep * self.output_tokens + outputs
            self.ends = keep * self.ends + ends

    def factor_ln(self, spec: PoolSpec) -> float:
        """ln of the capacity's factor for this mix (0: as the prior says)."""
        if spec.input_tokens_mean is None or spec.output_tokens_mean is None:
            return 0.0
        if self.arrivals <= 0 or self.ends <= 0 or self.span_s < HALF_LIFE_S:
            return 0.0
        prior = spec.input_tokens_mean + OUTPUT_WEIGHT * spec.output_tokens_mean
        now = self.input_tokens / self.arrivals + OUTPUT_WEIGHT * self.output_tokens / self.ends
        if now <= 0:
            return 0.0
        x = math.log(now / prior)
        return -math.copysign(min(max(0.0, abs(x) - DEAD_BAND), FACTOR_MAX), x)

    def state(self) -> list[float]:
        """As plain values."""
        return [self.input_tokens, self.arrivals, self.output_tokens, self.ends, self.span_s]

    def restore(self, state: list[float]) -> None:
        """From `state`."""
        self.input_tokens, self.arrivals, self.output_tokens, self.ends, self.span_s = state
