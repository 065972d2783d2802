"""Rows of a batch by what they are counted under: window, pool, tenant, class, model and priority. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from models.requests.window import Label
from models.windows import WINDOW_S, window_starts
from schemas.columns import Batch

UNKNOWN = Label("unknown", "default")
"""Tenant and class of rows that do not say; model and priority stay unknown."""
_KEY_MAX = 2**62


class Group(NamedTuple):
    """Rows that are counted together."""

    start_s: int
    pool: str
    label: Label


class Groups:
    """Groups in a fixed order, and which row is in which.

    Parameters: `batch`; `at_s` [rows]: the time that each row counts at; `foreign` [rows]: rows whose reporter only
    enriches, all counted under `UNKNOWN` whatever they say.
    """

    def __init__(self, batch: Batch, at_s: np.ndarray, foreign: np.ndarray) -> None:
        self._batch = batch
        self._starts = window_starts(at_s)
        key = (self._starts - int(self._starts.min())) // WINDOW_S
        size = int(key.max()) + 1
        labels = [batch.codes[name] for name in ("tenant", "class", "model")]
        sizes = [len(batch.values[name]) + 1 for name in ("pool", "tenant", "class", "model")]
        if foreign.any():
            labels = [np.where(foreign, -1, code) for code in labels]
        codes = self._codes = [batch.codes["pool"], *labels]
        self._priority = np.where(foreign, np.nan, batch.numbers["priority"])
        if not np.isnan(self._priority).all():
            distinct, ranks = np.unique(self._priority, return_inverse=True)
            codes, sizes = [*codes, ranks - 1], [*sizes, len(distinct)]
        for code, more in zip(codes, sizes, strict=True):
            if size * more > _KEY_MAX:
                distinct, key = np.unique(key, return_inverse=True)
                size = len(distinct)
            key, size = key * more + code + 1, size * more
        _, self._first, self.inverse = np.unique(key, return_index=True, return_inverse=True)
        """`inverse`: int64 [rows]: number of each row's group."""

    def __len__(self) -> int:
        return len(self._first)

    @property
    def starts(self) -> np.ndarray:
        """int64 [groups]: start of each group's window, Unix s."""
        found: np.ndarray = self._starts[self._first]
        return found

    def __iter__(self) -> Iterator[Group]:
        first, values = self._first, self._batch.values
        columns = [self.starts.tolist(), *(code[first].tolist() for code in self._codes)]
        for start, pool, tenant, kind, model, priority in zip(*columns, self._priority[first].tolist(), strict=True):
            label = Label(
                values["tenant"][tenant] if tenant >= 0 else UNKNOWN.tenant,
                values["class"][kind] if kind >= 0 else UNKNOWN.kind,
                values["model"][model] if model >= 0 else None,
                None if priority != priority else int(priority),
            )
            yield Group(start, values["pool"][pool], label)
