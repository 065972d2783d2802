"""What is kept of replicas for interference: a row of every array each, those with equally many neighbours together.

Knows what is kept and how a neighbour enters and leaves it; what it means is in `models.node.interference_fit`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from models.node.interference_terms import OWN, RIDGE_NEIGHBOUR

VARIANCE_START = 0.01
QUIET = 30
"""Residuals of quiet windows that a change of level is judged by."""
NUMBERS = (
    "shift",  # level that restarts and changes of level have moved ln TPOT by
    "silent",  # ... of this, by changes without a restart: since the last restart
    "s2",  # variance of residuals
    "c0",
    "c1",  # their variance and lag-1 covariance, clipped: autocorrelation
    "last",  # residual before
    "drift",  # residual, smoothed over about fifty windows
    "drift2",  # ... its variance: how far residuals are from independent over longer times
    "r",  # observed slowdown: ln TPOT beyond own load, smoothed over about three windows
    "level",  # residual, smoothed over about twenty windows: what nothing explains
    "gap",  # ... and against what the pool's replicas need when alone
    "alone",  # windows without any pressure
    "quiet_u",  # smoothed sum of pressures: below it a window is quiet
    "updates",  # windows learned from
    "hits",  # the last six windows' hits, a bit each
    "slow",  # ... and whether it was slower than anything explains
    "wait",  # windows still to settle after a restart
    "held",  # residuals in `ring`
    "seen_s",  # start of the latest window, Unix s
)
_AT = {name: i for i, name in enumerate(NUMBERS)}
SLOTS = ("seen_s", "on", "flips", "mean", "blame", "graded")
"""By neighbour: latest window with it, whether it pressed then, how often that changed, mean pressure when known, its
smoothed share in the slowdown, whether its pressure is measured."""
_SLOT = {name: i for i, name in enumerate(SLOTS)}


def shapes(j: int) -> dict[str, tuple[int, ...]]:
    """Array by name of a replica with j neighbours -> its shape."""
    d = OWN + j
    return {
        "a": (d, d),
        "b": (d,),
        "theta": (d,),
        "se": (j,),
        "means": (OWN,),
        "ring": (QUIET,),
        "numbers": (len(NUMBERS),),
        "slots": (len(SLOTS), j),
    }


def fresh() -> dict[str, np.ndarray]:
    """A replica that nothing is known of, without neighbours."""
    row = {name: np.zeros(shape) for name, shape in shapes(0).items()}
    row["means"][:] = np.nan
    for name, value in (("s2", VARIANCE_START), ("c0", VARIANCE_START), ("c1", VARIANCE_START / 2)):
        row["numbers"][_AT[name]] = value
    return row


def with_slot(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same replica with one neighbour more, of which nothing is known."""
    j = len(row["se"])
    wider = {name: np.zeros(shape) for name, shape in shapes(j + 1).items()}
    for name, values in row.items():
        wider[name][tuple(slice(size) for size in values.shape)] = values
    wider["slots"][_SLOT["mean"], j] = np.nan
    return wider


def without_slot(row: dict[str, np.ndarray], slot: int) -> dict[str, np.ndarray]:
    """The same replica with a neighbour less: what was learned with it stays true of the others (Schur complement)."""
    at = OWN + slot
    kept = [i for i in range(len(row["b"])) if i != at]
    pivot = row["a"][at, at] + RIDGE_NEIGHBOUR
    across = row["a"][kept, at]
    narrower = {name: values.copy() for name, values in row.items()}
    narrower["a"] = row["a"][np.ix_(kept, kept)] - np.outer(across, across) / pivot
    narrower["b"] = row["b"][kept] - across * row["b"][at] / pivot
    narrower["theta"] = row["theta"][kept]
    narrower["se"] = np.delete(row["se"], slot)
    narrower["slots"] = np.delete(row["slots"], slot, axis=1)
    return narrower


class Rows:
    """Replicas with j neighbours each."""

    def __init__(self, j: int) -> None:
        self.j = j
        self.rows: dict[int | str, int] = {}
        """Key of the replica -> its row."""
        self.arrays = {name: np.zeros((0, *shape)) for name, shape in shapes(j).items()}

    def take(self, gone: Iterable[int | str]) -> dict[int | str, dict[str, np.ndarray]]:
        """Removes replicas and hands out their rows."""
        at = {key: self.rows[key] for key in gone}
        taken = {key: {name: array[i].copy() for name, array in self.arrays.items()} for key, i in at.items()}
        keep = np.ones(len(self.rows), bool)
        keep[list(at.values())] = False
        self.arrays = {name: array[keep] for name, array in self.arrays.items()}
        self.rows = {key: i for i, key in enumerate(key for key in self.rows if key not in at)}
        return taken

    def put(self, rows: dict[int | str, dict[str, np.ndarray]]) -> None:
        """Adds replicas."""
        self.rows |= {key: len(self.rows) + i for i, key in enumerate(rows)}
        for name, array in self.arrays.items():
            self.arrays[name] = np.concatenate([array, np.stack([row[name] for row in rows.values()])])

    def number(self, name: str) -> np.ndarray:
        """float64 [n]: a view of one of NUMBERS."""
        view: np.ndarray = self.arrays["numbers"][:, _AT[name]]
        return view

    def slot(self, name: str) -> np.ndarray:
        """float64 [n, j]: a view of one of SLOTS."""
        view: np.ndarray = self.arrays["slots"][:, _SLOT[name]]
        return view

    def state(self) -> dict[str, Any]:
        """Plain values and arrays; the symmetric matrices as their lower half."""
        low = np.tril_indices(OWN + self.j)
        return {"keys": list(self.rows), **self.arrays, "a": self.arrays["a"][:, low[0], low[1]]}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave."""
        self.rows = {key: i for i, key in enumerate(state["keys"])}
        low = np.tril_indices(OWN + self.j)
        a = np.zeros((len(self.rows), OWN + self.j, OWN + self.j))
        a[:, low[0], low[1]] = state["a"]
        a[:, low[1], low[0]] = state["a"]
        self.arrays = {name: state[name] for name in self.arrays} | {"a": a}
