"""What is usual: a robust running mean and deviation of one figure, in four numbers."""

from __future__ import annotations

import math

HALF_LIFE = 180.0
"""Windows (30 min) after which half of what was usual is forgotten."""
KNOWN_MIN = 12.0
"""Windows that a norm must have learned from."""
CLIP = 3.0
"""Deviations beyond which a value counts no more than this: a burst does not become usual."""
STEP_MIN = 0.02
"""... but a norm always moves by so much of what it learned, or a figure that never varied could not change."""


class Norm:
    """Mean and mean absolute deviation of a figure (of its logarithm, where that is what is learned)."""

    __slots__ = ("dev", "mean", "n")

    def __init__(self) -> None:
        self.n = self.mean = self.dev = 0.0

    def learn(self, value: float | None, weight: float = 1.0) -> None:
        """One window's figure; None (unknown) teaches nothing. `weight` in (0, 1]."""
        if value is None:
            return
        self.n += weight
        rate = weight * max(1.0 / max(self.n, 1.0), 1 - 2 ** (-1 / HALF_LIFE))
        off = value - self.mean
        if self.known:
            bound = max(CLIP * self.dev, STEP_MIN)
            off = min(max(off, -bound), bound)
        self.mean += rate * off
        if self.n > 1:
            self.dev += rate * (abs(off) - self.dev)

    @property
    def known(self) -> bool:
        """Whether it has learned from enough windows to say what is usual."""
        return self.n >= KNOWN_MIN

    def usual(self, other: float | None = None) -> float | None:
        """The mean, or `other` where it is not known yet."""
        return self.mean if self.known else other

    def above(self, value: float | None, other: float | None = None) -> float:
        """How far a value is above what is usual and its ordinary deviation; 0.0 where either is unknown."""
        usual = self.usual(other)
        if value is None or usual is None:
            return 0.0
        return max(0.0, value - usual - (self.dev if self.known else 0.0))

    def state(self) -> list[float]:
        """As plain values."""
        return [self.n, self.mean, self.dev]

    def restore(self, state: list[float]) -> None:
        """From `state`."""
        self.n, self.mean, self.dev = state


def ln(value: float | None) -> float | None:
    """Natural logarithm; None of what is unknown or not positive."""
    return math.log(value) if value is not None and value > 0 else None


def ratio(above: float | None, below: float | None) -> float | None:
    """Quotient; None where either is unknown or the divisor is not positive."""
    return above / below if above is not None and below is not None and below > 0 else None
