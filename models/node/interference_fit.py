"""What a replica's time per output token follows from: its own load, and what its neighbours take.

One robust regression a replica, learned on every window, alone or not:

    ln TPOT = shift + own . phi + sum_j theta_j u_j,   theta_j >= 0

phi are eleven features of its own load, u_j in 0..1 is the pressure of neighbour j (the largest of its shares of SM,
memory and host CPU). Forgetting recursive least squares with Huber weights and a ridge; what theta_j stands for is
believed only beyond twice its standard error, widened by the autocorrelation of the residuals. Replicas with equally
many neighbours are solved together, as stacked matrices: each is solved alone, so no replica depends on another.

Pure arithmetic on arrays: names, pools and rows are in `models.node.interference`.
"""

from __future__ import annotations

import numpy as np

from models.node.interference_rows import QUIET, Rows
from models.node.interference_terms import MEMORY, OWN, smoothed, solve

SETTLE = 12
"""Windows after a restart that only measure the new level."""
CHANGE_MIN = 0.08
"""Smallest change of level that is taken for one, in ln TPOT."""
LEARNED = 60
"""Windows learned before anything is judged."""
HIT = float(np.log(1.03))
"""Explained and observed slowdown must both be beyond this, in ln TPOT."""
HIT_NOISE = 0.5
"""... the observed one by so many standard deviations of a window more."""
FREE = 0.02
"""Sum of pressures that counts as none."""
R_PACE = 0.4
LEVEL_PACE = 0.1
DRIFT_PACE = 0.02
DOUBT = 3.0
"""Standard errors by which what a neighbour costs must differ from nothing to be believed."""
LEAST = 2.0
"""... and by which it is then taken to be less."""


class Judged:
    """What one window of n replicas says. Arrays [n]; NaN where it says nothing."""

    def __init__(self, n: int) -> None:
        nan = np.nan
        self.agreed = np.full(n, nan)
        """Slowdown that both the neighbours explain and the residual shows, each at its lower bound, in ln TPOT."""
        self.severity, self.sd = np.full(n, nan), np.full(n, nan)
        """Slowdown and its standard deviation, in ln TPOT."""
        self.own = np.full(n, nan)
        """ln TPOT that own load explains."""
        self.phi = np.full((n, OWN), nan)
        self.spread = np.full(n, nan)
        """Standard deviation of `level` and of what its prediction is uncertain by, in ln TPOT."""
        self.full = np.zeros(n)
        """Slowdown by neighbours as fitted, in ln TPOT."""
        self.free = np.zeros(n, bool)
        """Nobody pressed on it."""
        self.learned = np.zeros(n, bool)


class Bank(Rows):
    """Replicas with j neighbours each, and what a window teaches and says of them."""

    def meet(self, start_s: float, at: np.ndarray, graded: np.ndarray) -> None:
        """Which neighbours are there in a window, [n, j]: 1 with measured pressure, 0 without, NaN: not there."""
        here = ~np.isnan(graded)
        self.slot("seen_s")[at] = np.where(here, start_s, self.slot("seen_s")[at])
        self.slot("graded")[at] = np.where(here, graded, self.slot("graded")[at])

    def restart(self, at: np.ndarray) -> None:
        """The engines in rows `at` [n] began anew: their level is measured again, unless nothing was learned yet."""
        at = at[self.number("updates")[at] > 0]
        self.number("wait")[at] = SETTLE
        for name in ("held", "hits", "slow"):
            self.number(name)[at] = 0.0
        self.slot("blame")[at] = 0.0

    def slow(self, at: np.ndarray, judged: Judged, gap: np.ndarray, beyond: float) -> None:
        """Notes which of the replicas in rows `at` [n] were slower than anything explains. `gap` [n]: against their
        siblings, in ln TPOT, NaN = unknown; `beyond`: what is told, in ln TPOT."""
        kept = self.number("gap")
        kept[at] += np.where(np.isnan(gap), -kept[at], LEVEL_PACE * (gap - kept[at]))
        worst = np.maximum(self.number("level")[at] + self.number("silent")[at], kept[at])
        self.number("slow")[at] += judged.learned & (worst - judged.spread > beyond)

    def step(self, start_s: float, at: np.ndarray, y: np.ndarray, phi: np.ndarray, u: np.ndarray) -> Judged:
        """One window of the replicas in rows `at` [n]. `y` [n]: ln TPOT, NaN where the window says too little;
        `phi` [n, 11] and `u` [n, j], NaN = unknown: the mean of what was known before stands for it."""
        judged = Judged(len(at))
        self.number("seen_s")[at] = start_s
        if not len(at):
            return judged
        u = self._pressures(at, u)
        good = ~np.isnan(y)
        phi = self._known(at, phi, good)
        judged.phi = phi
        self._shift_bits(at)
        judged.free = u.sum(axis=1) <= FREE
        self.number("alone")[at] += judged.free & good
        if good.any():
            self._learn(at[good], y[good], phi[good], u[good], judged, good)
        return judged

    def _pressures(self, at: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Pressures with the unknown filled, within 0..1; keeps what is known of each neighbour."""
        mean = self.slot("mean")[at]
        known = ~np.isnan(u)
        u = np.clip(np.where(known, u, np.where(np.isnan(mean), 0.0, mean)), 0.0, 1.0)
        moved = np.where(np.isnan(mean), u, mean + 0.01 * (u - mean))
        self.slot("mean")[at] = np.where(known, moved, mean)
        on = (u > 0).astype(float)
        self.slot("flips")[at] += on != self.slot("on")[at]
        self.slot("on")[at] = on
        return u

    def _known(self, at: np.ndarray, phi: np.ndarray, good: np.ndarray) -> np.ndarray:
        means = self.arrays["means"][at]
        known = ~np.isnan(phi)
        filled: np.ndarray = np.where(known, phi, np.where(np.isnan(means), 0.0, means))
        moved = np.where(np.isnan(means), phi, means + 0.01 * (phi - means))
        self.arrays["means"][at] = np.where(known & good[:, None], moved, means)
        return filled

    def _shift_bits(self, at: np.ndarray) -> None:
        for name in ("hits", "slow"):
            self.number(name)[at] = (self.number(name)[at] * 2) % 64

    def _learn(
        self, at: np.ndarray, y: np.ndarray, phi: np.ndarray, u: np.ndarray, judged: Judged, good: np.ndarray
    ) -> None:
        z = np.concatenate([phi, u], axis=1)
        e = y - self.number("shift")[at] - (self.arrays["theta"][at] * z).sum(axis=1)
        waiting = self.number("wait")[at] > 0
        self._settle(at[waiting], e[waiting])
        moved = np.zeros(len(at))
        moved[~waiting] = self._changes(at[~waiting], e[~waiting], u[~waiting].sum(axis=1))
        e = e - moved
        go = ~waiting
        cov = np.zeros((len(at), z.shape[1], z.shape[1]))
        if go.any():
            cov[go] = self._update(at[go], y[go], z[go], e[go])
        self._judge(at, y, z, e, go, cov, judged, good)

    def _settle(self, at: np.ndarray, e: np.ndarray) -> None:
        """After a restart: collects residuals, then takes their median for the new level."""
        if not len(at):
            return
        held, wait = self.number("held"), self.number("wait")
        self.arrays["ring"][at, held[at].astype(np.int64)] = e
        held[at] += 1
        wait[at] -= 1
        done = at[wait[at] == 0]
        if len(done):
            self.number("shift")[done] += np.median(self.arrays["ring"][done, :SETTLE], axis=1)
            for name in ("held", "r", "level", "silent"):
                self.number(name)[done] = 0.0

    def _changes(self, at: np.ndarray, e: np.ndarray, pressure: np.ndarray) -> np.ndarray:
        """What the level moves by, [n]: the median of the last quiet residuals, where that is too far from 0.

        Quiet: less pressure than usual. What comes with pressure is not for the level to absorb."""
        moved = np.zeros(len(at))
        usual = self.number("quiet_u")
        quiet = pressure <= usual[at]
        usual[at] += 0.01 * (pressure - usual[at])
        rows = at[quiet]
        if not len(rows):
            return moved
        ring, held = self.arrays["ring"], self.number("held")
        full = held[rows] == QUIET
        ring[rows[full]] = np.roll(ring[rows[full]], -1, axis=1)
        ring[rows, np.minimum(held[rows], QUIET - 1).astype(np.int64)] = e[quiet]
        held[rows] = np.minimum(held[rows] + 1, QUIET)
        ready = held[rows] == QUIET
        rows = rows[ready]
        if len(rows):
            median = np.median(ring[rows], axis=1)
            sd = 3 * np.sqrt(self.number("s2")[rows] * self._widened(rows) / QUIET)
            change = np.where(np.abs(median) > np.maximum(CHANGE_MIN, sd), median, 0.0)
            self.number("shift")[rows] += change
            self.number("silent")[rows] = np.where(
                change != 0, np.maximum(self.number("silent")[rows] + change, 0.0), self.number("silent")[rows]
            )
            held[rows] = np.where(change != 0, 0, QUIET)
            self.number("r")[rows] -= change
            self.number("level")[rows] -= change
            moved[np.flatnonzero(quiet)[ready]] = change
        return moved

    def _widened(self, at: np.ndarray) -> np.ndarray:
        """By how much the variance of a mean of residuals exceeds that of independent ones: by their lag-1
        autocorrelation, or by what is left of them after fifty windows, where that is more (own load of another form
        than fitted errs for as long as the load stays)."""
        rho = self._rho(at)
        slow = self.number("drift2")[at] / self.number("s2")[at] * (2 - DRIFT_PACE) / DRIFT_PACE
        widened: np.ndarray = np.maximum((1 + rho) / (1 - rho), slow)
        return widened

    def _rho(self, at: np.ndarray) -> np.ndarray:
        rho: np.ndarray = np.clip(self.number("c1")[at] / self.number("c0")[at], 0.0, 0.95)
        return rho

    def _update(self, at: np.ndarray, y: np.ndarray, z: np.ndarray, e: np.ndarray) -> np.ndarray:
        """One step of the regression; gives the covariance of theta but for the variance, [n, d, d]."""
        s2, c0, c1, last = (self.number(name) for name in ("s2", "c0", "c1", "last"))
        sd = np.sqrt(s2[at])
        w = np.minimum(1.0, 3 * sd / np.maximum(np.abs(e), 1e-12))
        target = y - self.number("shift")[at]
        # z z' first: symmetric to the last bit, as the state keeps only a half
        a = MEMORY * self.arrays["a"][at] + w[:, None, None] * (z[:, :, None] * z[:, None, :])
        b = MEMORY * self.arrays["b"][at] + (w * target)[:, None] * z
        self.arrays["a"][at], self.arrays["b"][at] = a, b
        s2[at] = 0.995 * s2[at] + 0.005 * np.minimum(e**2, 9 * s2[at])
        clipped = np.clip(e, -4 * sd, 4 * sd)
        c0[at] += 0.01 * (clipped**2 - c0[at])
        c1[at] += 0.01 * (clipped * last[at] - c1[at])
        last[at] = clipped
        drift, drift2 = self.number("drift"), self.number("drift2")
        drift[at] += DRIFT_PACE * (clipped - drift[at])
        drift2[at] += 0.005 * (drift[at] ** 2 - drift2[at])
        self.number("updates")[at] += 1
        theta, cov = solve(a, b, self.j)
        self.arrays["theta"][at] = theta
        own = np.arange(OWN, OWN + self.j)
        self.arrays["se"][at] = np.sqrt(cov[:, own, own] * (s2[at] * self._widened(at))[:, None])
        return cov

    def _judge(
        self,
        at: np.ndarray,
        y: np.ndarray,
        z: np.ndarray,
        e: np.ndarray,
        go: np.ndarray,
        cov: np.ndarray,
        judged: Judged,
        good: np.ndarray,
    ) -> None:
        theta, u = self.arrays["theta"][at], z[:, OWN:]
        own = self.number("shift")[at] + (theta[:, :OWN] * z[:, :OWN]).sum(axis=1)
        r, level = self.number("r"), self.number("level")
        r[at] += R_PACE * (y - own - r[at])
        level[at] += LEVEL_PACE * (e - level[at])
        se = self.arrays["se"][at]
        believed = np.where(theta[:, OWN:] > DOUBT * se, theta[:, OWN:] - LEAST * se, 0.0) * u
        believed[~self._may_be_blamed(at)] = 0.0
        explained = believed.sum(axis=1)
        blame = self.slot("blame")
        blame[at] += R_PACE * (believed - blame[at])
        s2, rho, wide = self.number("s2")[at], self._rho(at), self._widened(at)
        ready = go & (self.number("updates")[at] > LEARNED)
        agreed = np.minimum(explained, r[at] - HIT_NOISE * np.sqrt(s2))
        self.number("hits")[at] += ready & (agreed > HIT)
        full = (theta[:, OWN:] * u).sum(axis=1)
        mixed = (cov[:, OWN:, OWN:] * u[:, None, :]).sum(axis=2)
        var_s = (mixed * u).sum(axis=1) * s2 * wide
        var_r = s2 * smoothed(R_PACE, rho)
        leverage = ((cov * z[:, None, :]).sum(axis=2) * z).sum(axis=1) * s2 * wide
        judged.agreed[good] = agreed
        judged.severity[good] = np.maximum(0.0, (full + np.maximum(0.0, r[at])) / 2)
        # two estimates that ought to say the same: what they differ by says how little either may be trusted
        judged.sd[good] = np.sqrt(var_s + var_r + (full - r[at]) ** 2) / 2
        judged.own[good], judged.full[good] = own, full
        judged.spread[good] = np.sqrt(leverage + s2 * smoothed(LEVEL_PACE, rho))
        judged.learned[good] = ready

    def _may_be_blamed(self, at: np.ndarray) -> np.ndarray:
        """bool [n, j]: a neighbour of which only presence is known must have come and gone."""
        may: np.ndarray = (self.slot("graded")[at] > 0) | (self.slot("flips")[at] >= 3)
        return may
