"""A planned row, made of the values of one scrape: sums, bounds, buckets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from exporters.adapters.base import Reduce, RowPlan, Values
from schemas.base import MS_LIMIT_S

BOUNDS_MAX = 256
"""Buckets of one histogram; of more, every second is taken."""
FLOAT_MAX = math.nextafter(math.inf, 0)


class Read(NamedTuple):
    """One row of a scrape."""

    plan: RowPlan
    values: Values
    bins: dict[str, list[float]]
    """Distribution -> upper bound, cumulative count, ..., count of all. Empty unless histograms were read."""


class Planned:
    """A plan with the bounds of its columns and the places of its values."""

    def __init__(self, plan: RowPlan, slot: Mapping[int, int]) -> None:
        self.plan = plan
        self._one: list[tuple[str, int, float, float, float]] = []
        self._many: list[tuple[str, list[int], Reduce, float, float]] = []
        for name, reduce in plan.columns.items():
            low, high = self._bounds(name)
            slots = [slot[i] for i in reduce.indices]
            if len(slots) == 1:
                below = math.nextafter(reduce.limit * abs(reduce.scale), 0)
                self._one.append((name, slots[0], reduce.scale, low, min(high, below)))
            elif slots:
                self._many.append((name, slots, reduce, low, high))
        self._bins = {metric: _buckets(buckets.bounds, slot) for metric, buckets in plan.histograms.items()}
        self._counts = {metric: [slot[i] for i in buckets.count] for metric, buckets in plan.histograms.items()}

    def _bounds(self, name: str) -> tuple[float, float]:
        column = self.plan.kind.columns.get(name)
        if column is None:
            assert name.startswith("_"), name
            return -FLOAT_MAX, FLOAT_MAX
        latest = math.nextafter(MS_LIMIT_S, 0)
        return column.low, min(column.high, latest if column.is_time else FLOAT_MAX)

    def read(self, values: Sequence[float], histograms: bool, bad: list[str]) -> Read:
        """See Layout.rows."""
        out: Values = dict(self.plan.fixed)
        for name, slot, scale, low, high in self._one:
            value = values[slot] * scale
            if low <= value <= high:
                out[name] = value
            else:
                out[name] = None
                bad.append(name)
        for name, slots, reduce, low, high in self._many:
            out[name] = self._within(name, _reduced([values[i] for i in slots], reduce), low, high, bad)
        if self.plan.finish is not None:
            for name, derived in self.plan.finish(out).items():
                out[name] = None if derived is None else self._within(name, derived, *self._bounds(name), bad)
        kept = {name: value for name, value in out.items() if name[0] != "_"}
        return Read(self.plan, kept, self._histograms(values, bad) if histograms else {})

    def _within(self, name: str, value: float, low: float, high: float, bad: list[str]) -> float | None:
        if low <= value <= high:
            return value
        bad.append(name)
        return None

    def _histograms(self, values: Sequence[float], bad: list[str]) -> dict[str, list[float]]:
        found = {}
        for metric, bounds in self._bins.items():
            flat: list[float] = []
            before = 0.0
            for bound, slots in bounds:
                count = sum([values[i] for i in slots])
                if not before <= count <= FLOAT_MAX:
                    break
                flat += (bound, count)
                before = count
            total = sum([values[i] for i in self._counts[metric]])
            if len(flat) == 2 * len(bounds) and before <= total <= FLOAT_MAX:
                found[metric] = [*flat, total]
            else:
                bad.append(metric)
        return found


def _buckets(bounds: Sequence[tuple[float, tuple[int, ...]]], slot: Mapping[int, int]) -> list[tuple[float, list[int]]]:
    while len(bounds) > BOUNDS_MAX:
        bounds = bounds[1::2]
    return [(bound, [slot[i] for i in indices]) for bound, indices in bounds]


def _reduced(values: list[float], reduce: Reduce) -> float:
    """NaN: unknown."""
    known = [value for value in values if abs(value) < reduce.limit]
    if not known or (len(known) < len(values) and reduce.op in ("sum", "mean")):
        return math.nan
    match reduce.op:
        case "sum":
            found = sum(known)
        case "mean":
            found = sum(known) / len(known)
        case "max":
            found = max(known)
        case "min":
            found = min(known)
        case _:
            found = known[0]
    return found * reduce.scale


def one_a_model(reads: Sequence[Read]) -> list[Read]:
    """The rows of several engines behind one port, those of one model together.

    Models are different loads, and an ensemble's requests are its members' too: they stay apart, by their keys.
    """
    models: dict[str, list[Read]] = {}
    for read in reads:
        models.setdefault(read.plan.texts.get("model", ""), []).append(read)
    if len(models) == 1:
        return [together(reads)]
    return [together(group)._replace(plan=group[0].plan) for group in models.values()]


MEANS = frozenset({"kv_usage_ratio"})
"""Columns that are a mean over engines; all others are sums."""


def together(reads: Sequence[Read]) -> Read:
    """The rows of several engines behind one port as one replica. A column that one of them does not know is unknown.

    Distributions are added where their bounds agree, and are not given where they differ.
    """
    first = reads[0]
    if len(reads) == 1:
        return Read(replace(first.plan, key=""), first.values, first.bins)
    values: Values = {}
    for column in dict.fromkeys(name for read in reads for name in read.values):
        known = [value for read in reads if (value := read.values.get(column)) is not None]
        if column == "start_s":
            values[column] = min(known, default=None)
        else:
            whole = sum(known) if len(known) == len(reads) else None
            values[column] = whole / len(reads) if whole is not None and column in MEANS else whole
    bins = {
        metric: added
        for metric in first.bins
        if (added := _added([read.bins.get(metric) for read in reads])) is not None
    }
    texts = {
        name: text
        for name, text in first.plan.texts.items()
        if all(read.plan.texts.get(name) == text for read in reads)
    }
    return Read(replace(first.plan, key="", texts=texts), values, bins)


def _added(flats: Sequence[list[float] | None]) -> list[float] | None:
    known = [flat for flat in flats if flat is not None]
    first = known[0]
    if len(known) < len(flats) or any(flat[:-1:2] != first[:-1:2] for flat in known):
        return None
    summed = [sum(column) for column in zip(*known, strict=True)]
    summed[:-1:2] = first[:-1:2]
    return summed
