"""Samples of a partition's GPUs or engines, as long as something may still be computed from them.

Windows are computed anew from the samples and never updated, so that any order of arrival gives the same window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

SUBJECT, AT = 0, 1
"""Rows of `SampleStore.data` in front of the columns."""
SHAPED = 60
"""Columns, from the first, in which a change between known and unknown is noticed; later ones are all known or none."""


class Added(NamedTuple):
    """What one call of `add` did. Times are Unix s."""

    duplicates: int
    """Rows whose subject and time were there before: ignored."""
    from_s: float
    """Earliest time for which something may have changed: the sample before the first new one; -infinity where that is
    not known; infinity where nothing has changed."""
    to_s: float
    """Latest such time: as long as the last new one speaks, or infinity."""
    new: np.ndarray
    """Rows (numbers in the call) that are the first of their subject."""


class Series:
    """Samples by subject, then time. R samples, G subjects, C columns. Columns are gathered when they are asked for:
    a window needs few of the samples."""

    __slots__ = ("_columns", "_rows", "_values", "at", "first", "group", "next_at", "subjects")

    def __init__(
        self, subject: np.ndarray, at: np.ndarray, next_at: np.ndarray | None, columns: np.ndarray, rows: np.ndarray
    ) -> None:
        """`subject`, `at` and `rows` [R] by subject, then time; `rows` are places in `columns` [C, any]. `next_at` is
        made from `at` where it is None."""
        n = len(at)
        begins = np.ones(n, bool)
        begins[1:] = subject[1:] != subject[:-1]
        starts = np.flatnonzero(begins)
        self.subjects: np.ndarray = subject[starts].astype(np.int64)
        """int64 [G], ascending."""
        self.group: np.ndarray = np.cumsum(begins) - 1
        """int64 [R]: index into subjects."""
        self.first: np.ndarray = starts[self.group] if n else self.group
        """int64 [R]: where the sample's subject begins."""
        self.at = at
        """float64 [R], Unix s."""
        if next_at is None:
            next_at = np.full(n, np.inf)
            next_at[:-1] = np.where(begins[1:], np.inf, at[1:])
        self.next_at: np.ndarray = next_at
        """float64 [R]: time of the subject's next sample; infinite for its last."""
        self._columns, self._rows = columns, rows
        self._values: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        """float64 [C, R]; NaN = unknown."""
        if self._values is None:
            self._values = self._columns[:, self._rows]
        return self._values

    def column(self, index: int) -> np.ndarray:
        """float64 [R]: one row of `values`."""
        found: np.ndarray = self._columns[index, self._rows] if self._values is None else self._values[index]
        return found

    def chosen(self, mask: np.ndarray) -> Series:
        """The samples where `mask`. What comes next to each stays what it was: that bounds how long it speaks, also
        where the next one is left out."""
        subject = self.subjects[self.group][mask]
        return Series(subject, self.at[mask], self.next_at[mask], self._columns, self._rows[mask])


class SampleStore:
    """Samples in order of arrival, unique by (subject, time): the first one wins.

    Parameters: number of `columns` beside subject and time.
    """

    def __init__(self, columns: int) -> None:
        self.data = np.empty((2 + columns, 0))
        """float64 [2 + columns, capacity]; the first `size` samples are there."""
        self.size = 0
        self.last: dict[int, tuple[float, int]] = {}
        """Subject -> time and shape (see `_shapes`) of its latest sample; follows from `data`."""
        self._sorted: Series | None = None

    def add(self, subjects: np.ndarray, at: np.ndarray, values: np.ndarray, gap_s: float) -> Added:
        """Takes samples: subjects [n], at [n] and values [columns, n]; a sample speaks for at most `gap_s`."""
        order = np.lexsort((at, subjects))
        s, t = subjects[order], at[order]
        if len(order) > 1:
            other = np.concatenate(([True], (s[1:] != s[:-1]) | (t[1:] != t[:-1])))
            order, s, t = order[other], s[other], t[other]
        heads = np.flatnonzero(np.concatenate(([True], s[1:] != s[:-1])))
        names: list[int] = s[heads].tolist()
        known = [self.last.get(name) for name in names]
        starts: list[float] = t[heads].tolist()
        values = values[:, order]
        shapes = _shapes(values)
        if all(last is None or last[0] < start for last, start in zip(known, starts, strict=True)):
            before = np.concatenate((shapes[:1], shapes[:-1]))
            first: list[int] = shapes[heads].tolist()
            before[heads] = [new if last is None else last[1] for last, new in zip(known, first, strict=True)]
            # A counter that was unknown before grew since a sample further back than the one before.
            even = bool((before == shapes).all())
            times = (start if last is None else last[0] for last, start in zip(known, starts, strict=True))
            from_s, to_s = min(times) if even else -np.inf, float(t.max()) + gap_s
        else:
            fresh = self._fresh(s, t)
            order, s, t, values, shapes = order[fresh], s[fresh], t[fresh], values[:, fresh], shapes[fresh]
            from_s, to_s = (-np.inf, np.inf) if len(order) else (np.inf, -np.inf)
        self._append(s, t, values)
        self._note(s, t, shapes)
        unseen = [name for name, last in zip(names, known, strict=True) if last is None]
        new = order[np.isin(s, unseen)] if unseen else np.zeros(0, np.int64)
        return Added(len(subjects) - len(order), from_s, to_s, new)

    def _fresh(self, s: np.ndarray, t: np.ndarray) -> np.ndarray:
        """bool: which of these samples, distinct and maybe late, are not held yet."""
        held = self.data[:2, : self.size]
        held = held[:, np.isin(held[SUBJECT], s)]
        subjects, at = np.concatenate((held[SUBJECT], s)), np.concatenate((held[AT], t))
        order = np.lexsort((np.arange(len(at)) >= held.shape[1], at, subjects))  # held ones come first
        subjects, at = subjects[order], at[order]
        twice = np.zeros(len(order), bool)
        twice[order[1:]] = (subjects[1:] == subjects[:-1]) & (at[1:] == at[:-1])
        return ~twice[held.shape[1] :]

    def _note(self, s: np.ndarray, t: np.ndarray, shapes: np.ndarray) -> None:
        for name, at, shape in zip(s.tolist(), t.tolist(), shapes.tolist(), strict=True):
            last = self.last.get(name)
            if last is None or at > last[0]:
                self.last[name] = (at, shape)

    def _append(self, s: np.ndarray, t: np.ndarray, values: np.ndarray) -> None:
        end = self.size + len(s)
        if end > self.data.shape[1]:
            grown = np.empty((self.data.shape[0], max(end, 2 * self.size, 64)))
            grown[:, : self.size] = self.data[:, : self.size]
            self.data = grown
        block = self.data[:, self.size : end]
        block[SUBJECT], block[AT], block[2:] = s, t, values
        self.size = end
        self._sorted = None

    def series(self) -> Series:
        """All samples by subject and time; to be used before the store changes, and until then sorted once."""
        if self._sorted is None:
            subject, at = self.data[SUBJECT, : self.size], self.data[AT, : self.size]
            order = np.lexsort((at, subject))
            self._sorted = Series(subject[order], at[order], None, self.data[2:], order)
        return self._sorted

    def distinct(self, column: int) -> np.ndarray:
        """The known values of a column, ascending."""
        values = np.unique(self.data[2 + column, : self.size])
        return values[~np.isnan(values)]

    def prune(self, horizon_s: float, oldest_s: float, answered: int, held: np.ndarray) -> None:
        """Forgets samples before `horizon_s`, except each subject's last that answered (0 or NaN in column
        `answered`), from which the next delta counts; that one too if it is before `oldest_s` and the subject is
        not in `held`."""
        data = self.data[:, : self.size]
        order = np.lexsort((data[AT], data[SUBJECT]))
        carried = order[(data[AT, order] < horizon_s) & ~(data[2 + answered, order] > 0)]
        last = np.ones(len(carried), bool)
        last[:-1] = data[SUBJECT, carried[1:]] != data[SUBJECT, carried[:-1]]
        keep = data[AT] >= horizon_s
        kept = carried[last]
        keep[kept] = (data[AT, kept] >= oldest_s) | np.isin(data[SUBJECT, kept], held)
        self.data = data[:, keep]
        self.size = self.data.shape[1]
        self._index()

    def _index(self) -> None:
        self.last = {}
        self._sorted = None
        series = self.series()
        latest = np.isinf(series.next_at)
        self._note(series.subjects, series.at[latest], _shapes(series.chosen(latest).values))

    def state(self) -> dict[str, Any]:
        """Plain values for a dump."""
        return {"data": self.data[:, : self.size]}

    def restore(self, state: dict[str, Any]) -> None:
        """Replaces everything by what `state` gave."""
        self.data = state["data"]
        self.size = self.data.shape[1]
        self._index()


def _shapes(values: np.ndarray) -> np.ndarray:
    """int64 by sample: which columns are unknown, and whether the first, the status, is not ok, as bits."""
    bits = np.concatenate((values[:1] > 0, np.isnan(values[:SHAPED])))
    shapes: np.ndarray = (1 << np.arange(len(bits), dtype=np.int64)) @ bits
    return shapes


def around(series: Series, start_s: float, end_s: float, gap_s: float, answered: int) -> Series:
    """The samples that a window [start, end) can depend on: those within `gap_s` before it and in it, and of each
    subject the last before these and the first after it that answered."""
    near = (series.at >= start_s - gap_s) & (series.at < end_s)
    ok = ~(series.column(answered) > 0)
    before = np.flatnonzero(ok & (series.at < start_s - gap_s))
    last = np.ones(len(before), bool)
    last[:-1] = series.group[before[1:]] != series.group[before[:-1]]
    near[before[last]] = True
    after = np.flatnonzero(ok & (series.at >= end_s))
    first = np.ones(len(after), bool)
    first[1:] = series.group[after[1:]] != series.group[after[:-1]]
    near[after[first]] = True
    return series.chosen(near)
