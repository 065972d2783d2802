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


def largest(series: Series, column: int, speaks: np.ndarray) -> np.ndarray:
    """float64 [G]: greatest value of the samples where `speaks`; NaN where none is known."""
    found = np.full(len(series.subjects), np.nan)
    np.fmax.at(found, series.group[speaks], series.values[column][speaks])
    return found


def latest(series: Series, column: int, chosen: np.ndarray) -> np.ndarray:
    """float64 [G]: value of the last of the samples where `chosen`; NaN where there is none."""
    found = np.full(len(series.subjects), np.nan)
    found[series.group[chosen]] = series.values[column][chosen]  # by time: the last one stays
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
) -> Growth:
    """Growth of the counters in `columns` in the window [start, end).

    A counter that fell, or whose process has another start (`begun` [R], NaN = unknown), has begun anew at 0: all
    that it shows has grown since, in the second case since the start. The first sample of a process that was not
    older than `origin_s` then counts from its start.
    """
    values = series.values[columns]
    valid = ~np.isnan(values)
    index = np.where(valid, np.arange(values.shape[1]), -1)
    before = np.full(index.shape, -1)
    before[:, 1:] = np.maximum.accumulate(index, axis=1)[:, :-1]
    has = valid & (before >= series.first)
    before = np.where(has, before, 0)
    last, t0 = np.take_along_axis(values, before, 1), series.at[before]
    starts = np.full(len(series.at), np.nan) if begun is None else begun
    restarted = has & (np.abs(starts - starts[before]) > _SAME_START_S)
    fell = has & (values < last)
    t0 = np.where(restarted, np.clip(starts, t0, series.at), t0)
    origin = valid & ~has & (series.at - starts <= origin_s)
    t0 = np.where(origin, np.minimum(starts, series.at), t0)
    delta = np.where(origin | restarted | fell, values, values - last)
    spread = series.at - t0
    held = overlap(t0, np.broadcast_to(series.at, t0.shape), start_s, end_s)
    inside = within(series, start_s, end_s)
    share = np.where(spread > 0, held / np.where(spread > 0, spread, 1.0), inside)
    used = (has | origin) & (share > 0)
    size = len(series.subjects)
    total = np.full((len(values), size), np.nan)
    for k, chosen in enumerate(used):
        sums = np.bincount(series.group[chosen], delta[k][chosen] * share[k][chosen], size)
        total[k] = np.where(np.bincount(series.group[chosen], minlength=size) > 0, sums, np.nan)
    covered_s = np.bincount(series.group, _nearest(has | origin, held), size)
    return Growth(total, covered_s, count(series, inside & (restarted | fell).any(axis=0)))


def _nearest(known: np.ndarray, held: np.ndarray) -> np.ndarray:
    """float64 [R]: how much of the window lies between each sample and its nearest predecessor; 0 without one."""
    shortest = np.where(known, held, np.inf).min(axis=0)
    return np.where(np.isinf(shortest), 0.0, shortest)
