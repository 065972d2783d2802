"""A river linear model (scaler, then SGD) whose whole state is plain values: a checkpoint is input, never a pickle."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from river import linear_model, preprocessing, utils

DIVERGED = 1e6
"""A prediction beyond this (in units of the normalised target) says that the weights ran away: start again."""


class Linear:
    """StandardScaler | LinearRegression over named features."""

    __slots__ = ("model", "names", "restarts", "scaler")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.restarts = 0
        self._fresh()

    def _fresh(self) -> None:
        self.scaler = preprocessing.StandardScaler()
        self.model = linear_model.LinearRegression()

    def learn(self, x: list[float], y: float) -> None:
        """One example; `x` in the order of the names."""
        features = dict(zip(self.names, x, strict=True))
        self.scaler.learn_one(features)
        self.model.learn_one(self.scaler.transform_one(features), y)

    def predict(self, x: list[float]) -> float:
        """The expected target. Never NaN: a model that ran away starts again at 0."""
        scaled = self.scaler.transform_one(dict(zip(self.names, x, strict=True)))
        value = float(self.model.predict_one(scaled))
        if not abs(value) < DIVERGED:
            self.restarts += 1
            self._fresh()
            return 0.0
        return value

    def state(self) -> list[Any]:
        """As plain values: counts, means and variances of the scaler; weights, intercept and steps of the model."""
        weights = self.model.weights
        return [
            [self.scaler.counts.get(name, 0) for name in self.names],
            [self.scaler.means.get(name, 0.0) for name in self.names],
            [self.scaler.vars.get(name, 0.0) for name in self.names],
            [weights.get(name) for name in self.names],
            self.model.intercept,
            self.model.optimizer.n_iterations,
            self.restarts,
        ]

    def restore(self, state: list[Any]) -> None:
        """From `state`."""
        self._fresh()
        counts, means, variances, weights, intercept, steps, self.restarts = state
        if counts[0]:
            self.scaler.counts = Counter(dict(zip(self.names, counts, strict=True)))
            self.scaler.means = defaultdict(float, zip(self.names, means, strict=True))
            self.scaler.vars = defaultdict(float, zip(self.names, variances, strict=True))
        known = {name: w for name, w in zip(self.names, weights, strict=True) if w is not None}
        if known:
            self.model._weights = utils.VectorDict(known)
        self.model.intercept, self.model.optimizer.n_iterations = intercept, steps
