"""What a window holds of gauges and of counters. Pure functions of samples; times are Unix s.

A gauge is a step function: a sample speaks until the subject's next one, at most `gap_s`; a window takes the
time-weighted mean of what lies in it. A counter's growth between two samples is spread evenly over the time
between them, so a window gets the share of it that lies in it, and adjoining windows add up to the whole.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from models.node.samples import Series
from models.windows import overlap

_SAME_START_S = 0.5  # start times that differ by less are the same start, read with another rounding


class Growth(NamedTuple):
    """What counters grew by in a window. K counters, G subjects."""

    total: np.ndarray
    """float64 [K, G]; NaN where no two samples speak for the window."""
    covered_s: np.ndarray
    """float64 [G]: time in the window for which the growth of some counter is known."""
    resets: np.ndarray
    """int64 [G]: samples in the window that found a counter restarted."""


def weights(series: Series, start_s: float, end_s: float, now_s: float, gap_s: float) -> np.ndarray:
    """float64 [R]: how long each sample speaks in the window, s; none beyond log time `now_s`."""
    until = np.minimum(series.next_at, series.at + gap_s)
    return overlap(series.at, until, start_s, min(end_s, now_s))


def within(series: Series, start_s: float, end_s: float) -> np.ndarray:
    """bool [R]: which samples were taken in the window."""
    inside: np.ndarray = (series.at >= start_s) & (series.at < end_s)
    return inside


def mean(series: Series, column: int, weight: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """float64 [G]: time-weighted mean of what is known; NaN where nothing is.

    Where only samples of this very moment are known (weight 0 so far), their plain mean.
    """
    values = series.values[column]
    known = ~np.isnan(values)
    size = len(series.subjects)
    plain = np.where(known & inside, 1.0, 0.0)
    weighed = np.where(known, weight, 0.0)
    has = np.bincount(series.group, weighed, size) > 0
    used = np.where(has[series.group], weighed, plain)
    filled = np.where(known, values, 0.0)
    with np.errstate(invalid="ignore"):
        return np.bincount(series.group, used * filled, size) / np.bincount(series.group, used, size)


def held_s(series: Series, weight: np.ndarray, known: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """float64 [G]: time that the samples where `chosen` speak for, s; NaN where no sample that is `known` speaks."""
    size = len(series.subjects)
    speaks = np.bincount(series.group, weight * known, size) > 0
    return np.where(speaks, np.bincount(series.group, weight * (known & chosen), size), np.nan)


def largest(series: Series, column: int, speaks: np.ndarray) -> np.ndarray:
    """float64 [G]: greatest value of the samples where `speaks`; NaN where none is known."""
    found = np.full(len(series.subjects), np.nan)
    np.fmax.at(found, series.group[speaks], series.values[column][speaks])
    return found


def latest(series: Series, column: int, chosen: np.ndarray) -> np.ndarray:
    """float64 [G]: value of the last of the samples where `chosen`; NaN where there is none."""
    return latest_of(series, series.values[column], chosen)


def latest_of(series: Series, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """As `latest`, of any values [R] of the samples."""
    found = np.full(len(series.subjects), np.nan)
    found[series.group[chosen]] = values[chosen]  # by time: the last one stays
    return found


def count(series: Series, chosen: np.ndarray) -> np.ndarray:
    """int64 [G]: number of samples where `chosen`."""
    return np.bincount(series.group[chosen], minlength=len(series.subjects))


def growth(
    series: Series,
    columns: slice,
    start_s: float,
    end_s: float,
    begun: np.ndarray | None = None,
    origin_s: float = 0.0,
    together: bool = False,
) -> Growth:
    """Growth of the counters in `columns` in the window [start, end).

    A counter that fell, or whose process has another start (`begun` [R], NaN = unknown), has begun anew at 0: all
    that it shows has grown since, in the second case since the start. The first sample of a process that was not
    older than `origin_s` then counts from its start. `together`: the counters are parts of one, known in the same
    samples, so where one fell all have begun anew.
    """
    values = series.values[columns]
    valid = ~np.isnan(values)
    starts = np.full(len(series.at), np.nan) if begun is None else begun
    inside = within(series, start_s, end_s)
    size = len(series.subjects)
    total = np.full((len(values), size), np.nan)
    nearest = np.full(len(series.at), np.inf)
    anew = np.zeros(len(series.at), bool)
    # Counters that are known in the same samples, as most are, share everything but their values.
    alike: dict[bytes, list[int]] = {}
    for k in np.flatnonzero(valid.any(axis=1)).tolist():
        alike.setdefault(valid[k].tobytes(), []).append(k)
    for chosen in alike.values():
        pairs = _pairs(series, valid[chosen[0]], starts, origin_s)
        share, held = _share(series, pairs, inside, start_s, end_s)
        now = values[chosen]
        last = now[:, pairs.before]
        fell = pairs.has & (now < last)
        if together:
            fell[:] = fell.any(axis=0)
        used = (pairs.has | pairs.origin) & (share > 0)
        group, weight = series.group[used], share[used]
        delta = np.where(pairs.origin | pairs.restarted | fell, now, now - last)[:, used] * weight
        some = np.bincount(group, minlength=size) > 0
        for k, grown in zip(chosen, delta, strict=True):
            total[k] = np.where(some, np.bincount(group, grown, size), np.nan)
        nearest = np.minimum(nearest, np.where(pairs.has | pairs.origin, held, np.inf))
        anew |= pairs.restarted | fell.any(axis=0)
    covered_s = np.bincount(series.group, np.where(np.isinf(nearest), 0.0, nearest), size)
    return Growth(total, covered_s, count(series, inside & anew))


class _Pairs(NamedTuple):
    """Each sample that is known with the one that it is compared with. [R]."""

    before: np.ndarray
    """int64: the one before; 0 where there is none."""
    has: np.ndarray
    """bool: whether there is one."""
    restarted: np.ndarray
    """bool: whether the process has another start than then."""
    origin: np.ndarray
    """bool: the first sample of a young process, which counts from its start."""
    from_s: np.ndarray
    """float64: from when on the growth counts, Unix s."""


def _pairs(series: Series, valid: np.ndarray, starts: np.ndarray, origin_s: float) -> _Pairs:
    index = np.where(valid, np.arange(len(valid)), -1)
    before = np.full(len(valid), -1)
    before[1:] = np.maximum.accumulate(index)[:-1]
    has = valid & (before >= series.first)
    before = np.where(has, before, 0)
    from_s = series.at[before]
    restarted = has & (np.abs(starts - starts[before]) > _SAME_START_S)
    from_s = np.where(restarted, np.clip(starts, from_s, series.at), from_s)
    origin = valid & ~has & (series.at - starts <= origin_s)
    return _Pairs(before, has, restarted, origin, np.where(origin, np.minimum(starts, series.at), from_s))


def _share(
    series: Series, pairs: _Pairs, inside: np.ndarray, start_s: float, end_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """What share of each pair's growth lies in the window, and how much of the window lies in the pair's time, s."""
    spread = series.at - pairs.from_s
    held = overlap(pairs.from_s, series.at, start_s, end_s)
    return np.where(spread > 0, held / np.where(spread > 0, spread, 1.0), inside), held


def missed(series: Series, number: np.ndarray, dead: np.ndarray, start_s: float, end_s: float) -> np.ndarray:
    """float64 [G], whole: readings that failed in the window; NaN where none lies in it or around it.

    `number` [R]: of the reading, NaN = unknown: what lies between two that differ by more than one has failed, evenly
    in between and rounded so that adjoining windows add up. `dead` [R]: readings that say themselves that they failed;
    they count where no numbers do.
    """
    size = len(series.subjects)
    valid = ~np.isnan(number) & ~dead
    pairs = _pairs(series, valid, np.full(len(number), np.nan), 0.0)
    gap = number - number[pairs.before]
    counted = pairs.has & (gap > 0)
    spread = np.where(counted, series.at - pairs.from_s, 1.0)
    until = [np.clip(t, pairs.from_s, series.at) - pairs.from_s for t in (start_s, end_s)]
    first, last = (np.floor(np.where(counted, gap - 1, 0.0) * t / spread) for t in until)
    found = np.bincount(series.group, last - first, size)
    index = np.where(valid, np.arange(len(valid)), len(valid))
    following = np.minimum.accumulate(index[::-1])[::-1]
    after = np.minimum(following, max(len(valid) - 1, 0))
    told = (following < len(valid)) & counted[after] & (series.group[after] == series.group)
    inside = within(series, start_s, end_s)
    alone = dead & ~told & inside
    found += np.bincount(series.group[alone], minlength=size)
    tells = ((valid | dead) & inside) | (counted & (pairs.from_s < end_s) & (series.at > start_s))
    return np.where(np.bincount(series.group[tells], minlength=size) > 0, found, np.nan)
