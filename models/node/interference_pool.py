"""What the replicas of one pool on one kind of GPU need for a token when nobody presses on them.

The same features as a replica's own fit, one regression for all, learned only on windows without pressure. A replica
whose neighbour never pauses has no such window: its own fit takes the slowdown for its nature, its siblings do not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from models.node.interference_fit import LEARNED
from models.node.interference_rows import VARIANCE_START
from models.node.interference_terms import MEMORY, OWN, solve


class Alone:
    """One pool on one kind of GPU."""

    def __init__(self) -> None:
        self.a, self.b = np.zeros((OWN, OWN)), np.zeros(OWN)
        self.theta = np.zeros(OWN)
        self.s2 = VARIANCE_START
        self.updates = 0.0
        self.seen_s = 0.0

    def step(
        self,
        start_s: float,
        y: np.ndarray,
        phi: np.ndarray,
        explained: np.ndarray,
        free: np.ndarray,
        learned: np.ndarray,
    ) -> np.ndarray:
        """How much slower each of n replicas is than its siblings need alone, in ln TPOT; NaN: nothing to compare with.

        `y` [n] ln TPOT, `phi` [n, 11], `explained` [n] ln slowdown by its neighbours, `free` [n] whether nobody
        pressed, `learned` [n] windows so far without pressure."""
        self.seen_s = start_s
        good = ~np.isnan(y)
        residual = y - (phi * self.theta).sum(axis=1)
        siblings = float((learned >= LEARNED).sum()) - (learned >= LEARNED)
        gap = np.where((siblings > 0) & (self.updates >= LEARNED), residual - explained, np.nan)
        use = good & free
        if use.any():
            e, z, target = residual[use], phi[use], y[use]
            w = np.minimum(1.0, 3 * np.sqrt(self.s2) / np.maximum(np.abs(e), 1e-12))
            self.a = MEMORY * self.a + (w[:, None, None] * (z[:, :, None] * z[:, None, :])).sum(axis=0)
            self.b = MEMORY * self.b + ((w * target)[:, None] * z).sum(axis=0)
            seen = float(np.minimum(e**2, 9 * self.s2).mean())
            self.s2 = 0.995 * self.s2 + 0.005 * seen
            self.updates += 1
            self.theta = solve(self.a[None], self.b[None], 0)[0][0]
        return gap

    def state(self) -> dict[str, Any]:
        """Plain values and arrays."""
        return dict(vars(self))

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Alone:
        """What `state` said."""
        alone = cls()
        vars(alone).update(state)
        return alone
