"""Which replica of a pool gets a request. Loads are those of the last step plus what was sent since."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Protocol

import numpy as np

from schemas.errors import InvalidInput


class Target(Protocol):
    """What a router sees of a replica."""

    load: int
    weight: float


class Draws:
    """Uniform numbers in [0, 1), drawn in blocks: a scalar call of numpy costs more than a route."""

    def __init__(self, seed: list[int]) -> None:
        self._rng = np.random.default_rng(seed)
        self._block: list[float] = []

    def __call__(self) -> float:
        if not self._block:
            self._block = self._rng.random(4096).tolist()
        return self._block.pop()


class Router:
    """Chooses among the ready replicas by weight and, as far as its kind does, by load.

    Weight 0 gets nothing. Where all are 0 they count as equal: a router does not drop what it could serve.
    """

    def __init__(self, kind: str, draws: Draws) -> None:
        self._draws = draws
        self._choose: Callable[[], Target] = getattr(self, f"_{kind}")
        self.targets: list[Target] = []
        self._cumulative: list[float] = []
        self._credit: list[float] = []

    def set_targets(self, ready: list[Target]) -> None:
        """The ready replicas, anew after every change of them or of a weight."""
        positive = [t for t in ready if t.weight > 0]
        self.targets = positive or ready
        self._cumulative = list(accumulate(_weight(t) for t in self.targets))
        self._credit = [0.0] * len(self.targets)

    def pick(self) -> Target | None:
        """The replica for one request; None when none is ready."""
        if not self.targets:
            return None
        return self.targets[0] if len(self.targets) == 1 else self._choose()

    def _random(self) -> Target:
        total = self._cumulative[-1]
        index = bisect_right(self._cumulative, self._draws() * total)
        return self.targets[min(index, len(self.targets) - 1)]

    def _two_choices(self) -> Target:
        a, b = self._random(), self._random()
        return a if (a.load + 1) * _weight(b) <= (b.load + 1) * _weight(a) else b

    def _least(self) -> Target:
        return min(self.targets, key=lambda t: (t.load + 1) / _weight(t))

    def _round_robin(self) -> Target:
        """Smooth weighted round-robin: each turn all gain their weight, the richest serves and pays the total."""
        credit, total = self._credit, self._cumulative[-1]
        for i, target in enumerate(self.targets):
            credit[i] += _weight(target)
        best = max(range(len(credit)), key=credit.__getitem__)
        credit[best] -= total
        return self.targets[best]


def _weight(target: Target) -> float:
    return target.weight if target.weight > 0 else 1.0


def picker(weights: Mapping[str, float]) -> tuple[list[str], list[float]]:
    """Names with a weight above 0 (all of them where none has one), and their cumulative weights."""
    names = [name for name, weight in weights.items() if weight > 0] or list(weights)
    return names, list(accumulate(weights[name] or 1.0 for name in names))


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises InvalidInput for a weight that is none."""
    for name, weight in weights.items():
        if not 0 <= weight <= 1e6:  # NaN fails this too
            raise InvalidInput(f"weights.{name}", weight, "give a number from 0 to 1000000")
