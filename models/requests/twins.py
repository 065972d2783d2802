"""Ends that wait for their twin: the same request as another reporter saw it.

Where gateway and engine both report a pool's requests, policy names whose rows count; the other's only add what is
missing. They are the same request where pool, request id and attempt agree. A row is kept until its twin has come or
the grace has passed; the oldest go first where there are too many.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from models.requests.ids import IdTable
from models.requests.judging import FIELDS, MEASURED, F
from models.requests.window import Label
from schemas.columns import Batch

STORED = (*FIELDS, "cell", "joined")
"""cell: where it is counted in the window of its `at_s`. joined: 1: its twin has come."""
CELL, JOINED = STORED.index("cell"), STORED.index("joined")
TEXTS = ("pool", "tenant", "class", "model")
_FILLED = [F[name] for name in ("priority", "status", *MEASURED)]
"""What a twin adds where it is unknown."""


def merged(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Rows [STORED, n] with what `other` knows and they do not; `enriched` says where that is anything."""
    found = own.copy()
    found[_FILLED] = np.where(np.isnan(own[_FILLED]), other[_FILLED], own[_FILLED])
    found[F["enriched"]] = (np.isnan(own[_FILLED]) & ~np.isnan(other[_FILLED])).any(axis=0)
    found[F["foreign"]] = 0.0
    return found


class Twins:
    """Rows by their name, in order of insertion."""

    def __init__(self) -> None:
        self.names = _table(np.zeros(0, np.uint64))
        self.rows = np.zeros((len(STORED), 0))
        """float64 [STORED, capacity]."""
        self.texts = np.zeros((len(TEXTS), 0), np.int32)
        """int32 [TEXTS, capacity]: numbers in `vocabulary`; -1 = unknown."""
        self.vocabulary: dict[str, int] = {}

    def __len__(self) -> int:
        return self.names.size

    def find(self, names: np.ndarray, oldest_s: float) -> np.ndarray:
        """int64 [n]: place of each name, -1 where it is not here, has its twin, or is older than `oldest_s`."""
        places = self.names.find(names)
        at = np.maximum(places, 0)
        if len(self):
            usable = (self.rows[JOINED, at] == 0) & (self.rows[F["at_s"], at] >= oldest_s)
            places = np.where(usable, places, -1)
        return places

    def counted(self, places: np.ndarray) -> np.ndarray:
        """bool [n]: whether the row at a place counts, and does not only enrich; no place (-1), no row."""
        known: np.ndarray = places >= 0
        if known.any():
            known = known & (self.rows[F["foreign"], np.maximum(places, 0)] == 0)
        return known

    def take(self, places: np.ndarray) -> np.ndarray:
        """Rows [STORED, n] whose twins have come."""
        found = self.rows[:, places]
        self.rows[JOINED, places] = 1.0
        return found

    def room(self, more: int, most: int) -> int:
        """Forgets the oldest rows until `more` have room; gives how many. Those that have their twins go first."""
        if len(self) + more <= most:
            return 0
        self._keep(self.rows[JOINED, : len(self)] == 0)
        over = len(self) + more - most
        if over <= 0:
            return 0
        over = min(len(self), over + most // 4)  # more than is needed: not every batch shall rebuild the index
        self._keep(np.arange(len(self)) >= over)
        return over

    def add(self, names: np.ndarray, rows: np.ndarray, texts: np.ndarray, most: int) -> int:
        """Keeps rows under their own names; gives how many found no room. A name comes once: beyond the bound on ids
        a row may come again, and is then not kept again."""
        _, first = np.unique(names, return_index=True)
        new = np.sort(first[self.names.find(names[first]) < 0])
        chosen = new[: most - len(self)]
        start, end = len(self), len(self) + len(chosen)
        if end > self.rows.shape[1]:
            room = max(end, 2 * self.rows.shape[1], 256) - start
            self.rows = np.concatenate((self.rows[:, :start], np.zeros((len(STORED), room))), axis=1)
            self.texts = np.concatenate((self.texts[:, :start], np.zeros((len(TEXTS), room), np.int32)), axis=1)
        self.rows[:, start:end], self.texts[:, start:end] = rows[:, chosen], texts[:, chosen]
        self.names.add(names[chosen], np.zeros(len(chosen), np.uint32))
        return len(new) - len(chosen)

    def intern(self, batch: Batch, chosen: np.ndarray) -> np.ndarray:
        """int32 [TEXTS, n]: the texts of the chosen rows of a batch as numbers in the vocabulary."""
        found = np.empty((len(TEXTS), len(chosen)), np.int32)
        for number, name in enumerate(TEXTS):
            used, inverse = np.unique(batch.codes[name][chosen], return_inverse=True)
            words = [batch.values[name][code] if code >= 0 else None for code in used.tolist()]
            codes = [-1 if w is None else self.vocabulary.setdefault(w, len(self.vocabulary)) for w in words]
            found[number] = np.array(codes, np.int32)[inverse]
        return found

    def words(self, texts: np.ndarray) -> list[tuple[str | None, ...]]:
        """(pool, tenant, class, model) of each row of `texts` [TEXTS, n]."""
        words = [*self.vocabulary, None]  # -1 is the last
        return [tuple(words[code] for code in codes) for codes in texts.T.tolist()]

    def prune(self, oldest_s: float) -> int:
        """Forgets what has its twin and what is older; gives how many foreign ones had none."""
        size = len(self)
        waiting = self.rows[JOINED, :size] == 0
        old = self.rows[F["at_s"], :size] < oldest_s
        unjoined = int((waiting & old & (self.rows[F["foreign"], :size] > 0)).sum())
        keep = waiting & ~old
        if not keep.all():
            self._keep(keep)
        return unjoined

    def _keep(self, mask: np.ndarray) -> None:
        size = len(self)
        self.names = _table(self.names.names[:size][mask])
        self.rows, texts = self.rows[:, :size][:, mask], self.texts[:, :size][:, mask]
        used = np.zeros(len(self.vocabulary) + 1, bool)
        used[texts] = True
        used[-1] = False
        renumbered = np.where(used, np.cumsum(used) - 1, -1).astype(np.int32)
        words = [word for word, is_used in zip(self.vocabulary, used[:-1].tolist(), strict=True) if is_used]
        self.vocabulary = {word: number for number, word in enumerate(words)}
        self.texts = renumbered[texts]

    def state(self) -> list[Any]:
        """Plain values for a dump."""
        size = len(self)
        return [self.names.names[:size], self.rows[:, :size], self.texts[:, :size], list(self.vocabulary)]

    def restore(self, state: list[Any]) -> None:
        """Replaces everything by what `state` gave."""
        names, self.rows, self.texts, words = state
        self.names = _table(names)
        self.vocabulary = {word: number for number, word in enumerate(words)}


def _table(names: np.ndarray) -> IdTable:
    return IdTable(names, np.zeros(len(names), np.uint32))


def label_of(words: tuple[str | None, ...], priority: float, unknown: Label) -> Label:
    """What (pool, tenant, class, model) and a priority say, unknown parts as in `unknown`."""
    _, tenant, kind, model = words
    return Label(tenant or unknown.tenant, kind or unknown.kind, model, None if priority != priority else int(priority))
