"""Least squares with coefficients that are not below 0, from X'X and X'y: a step takes no less time for more work."""

from __future__ import annotations

import numpy as np

PRIOR = 5.0
"""Weight of the prior, in observations: an empty step takes half of a mean one. Keeps the model sane below the batch
sizes that it has seen."""
RIDGE = 1e-6
"""Of the diagonal: what makes the system solvable where a feature never varied."""


def solve(gram: list[float], moment: list[float]) -> list[float]:
    """Coefficients of n features, the first of which is the constant 1.

    `gram`: X'X, n rows of n one after the other; `moment`: X'y. The most negative coefficient is dropped until none is
    left (active set); what was never seen gets 0.
    """
    n = len(moment)
    system = np.array(gram).reshape(n, n)
    wanted = np.array(moment)
    mean = wanted[0] / system[0, 0]
    system[0, 0] += PRIOR
    wanted[0] += PRIOR * 0.5 * mean
    system += np.diag(np.diag(system)) * RIDGE
    active = [i for i in range(n) if system[i, i] > 0]
    solution = np.zeros(n)
    while active:
        part = np.linalg.solve(system[np.ix_(active, active)], wanted[active])
        if (part >= 0).all():
            solution[active] = part
            break
        active.pop(int(np.argmin(part)))
    return [float(value) for value in solution]
