"""The regression behind interference: its features, its solution, and what smoothing does to noise. Pure arithmetic."""

from __future__ import annotations

import numpy as np

OWN = 11
"""Features of a replica's own load, the constant included."""
RIDGE_CONSTANT, RIDGE_OWN, RIDGE_NEIGHBOUR = 1e-4, 0.02, 0.05
MEMORY = 0.9998
"""Forgetting a window: the weight of what is 14 h of windows old is 1/e."""


def features(load: dict[str, np.ndarray]) -> np.ndarray:
    """float64 [n, 11] from running, kv_tokens, prefill_step (computed prompt tokens an engine step), clock_ratio,
    preemptions_per_s and accepted (tokens a sequence and step), each [n]; NaN where a column rests on an unknown."""
    batch, kv, q = np.log1p(load["running"]), load["kv_tokens"], load["prefill_step"]
    prefill = np.log1p(q / 50)
    columns = [
        np.ones(len(batch)),
        batch,
        load["running"] / 30,
        np.log1p(kv / 1e4),
        kv / 1e5,
        prefill,
        q / 300,
        batch * prefill,
        -np.log(np.maximum(load["clock_ratio"], 0.05)),
        np.log1p(load["preemptions_per_s"]),
        np.log(np.maximum(load["accepted"], 0.05)),
    ]
    found: np.ndarray = np.stack(columns, axis=1)
    return found


def smoothed(pace: float, rho: np.ndarray) -> np.ndarray:
    """Variance of an exponential mean of a first-order autoregression, as a multiple of the latter's."""
    kept = (1 - pace) * rho
    found: np.ndarray = pace / (2 - pace) * (1 + kept) / (1 - kept)
    return found


def solve(a: np.ndarray, b: np.ndarray, j: int) -> tuple[np.ndarray, np.ndarray]:
    """(theta [n, d], covariance but for the variance [n, d, d]) of ridge regressions whose last j are not negative.

    A negative one is set to 0 and the rest solved again, until none is left: at most j times. Its covariance stays
    that of the free solution: a coefficient at its bound is no more certain for it."""
    d = a.shape[1]
    ridge = np.array([RIDGE_CONSTANT, *[RIDGE_OWN] * (OWN - 1), *[RIDGE_NEIGHBOUR] * j])
    full = a + np.diag(ridge)
    cov: np.ndarray = np.linalg.inv(full)
    theta = (cov * b[:, None, :]).sum(axis=2)
    dropped = np.zeros(b.shape, bool)
    for _ in range(j):
        bad = np.zeros(b.shape, bool)
        bad[:, OWN:] = theta[:, OWN:] < 0
        rows = np.flatnonzero(bad.any(axis=1))
        if not len(rows):
            break
        dropped[rows] |= bad[rows]
        out = dropped[rows]
        part = np.where(out[:, :, None] | out[:, None, :], 0.0, full[rows])
        part[:, np.arange(d), np.arange(d)] += out
        theta[rows] = np.linalg.solve(part, np.where(out, 0.0, b[rows])[:, :, None])[:, :, 0]
        theta[rows] = np.where(out, 0.0, theta[rows])
    return theta, cov
