"""What an adapter is: a table from an engine's metric names to our columns. It knows no HTTP, clock or broker.

A page's *layout* is the ordered list of its series, learned once through a maintained parser. An adapter is asked once
a layout: it says which series make which column, and per scrape only those values are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from schemas.columns import Columns
from schemas.node import ENGINE_SAMPLES, GpuEntry

KEYS_MAX = 256
"""Engines, models or GPUs of one page. More are refused: an adapter's work grows with their number times the series."""
Op = Literal["sum", "mean", "max", "min", "first"]
Values = dict[str, float | None]
"""Column -> value, None = unknown. Names that begin with `_` are inputs of `finish` and never published."""


class TooManyRows(ValueError):
    """A page speaks for more engines, models or GPUs than KEYS_MAX."""


class Series(NamedTuple):
    """One time series of a page."""

    name: str
    """With its suffix (`_total`, `_bucket`, `_sum`), as on the page."""
    labels: Mapping[str, str]


class Reduce(NamedTuple):
    """One number from the values of series.

    `sum` and `mean` of an unknown part are unknown; `max`, `min` and `first` are over the known values. A value is
    unknown where it is NaN, infinite, or at or beyond `limit` (an engine's sentinel for "not supported").
    """

    indices: tuple[int, ...]
    """Positions in the layout's series. Empty: the column is not given."""
    op: Op = "sum"
    scale: float = 1.0
    """Times this, after the reduction."""
    limit: float = math.inf


class Buckets(NamedTuple):
    """A distribution as cumulative buckets; each part is the sum of its series."""

    bounds: tuple[tuple[float, tuple[int, ...]], ...]
    """(upper bound in our unit, series), rising, finite bounds only."""
    count: tuple[int, ...]
    """Series of `_count`, or else of the bucket without bound."""


@dataclass(frozen=True)
class RowPlan:
    """One row a scrape: which series make which column."""

    columns: Mapping[str, Reduce]
    """Columns of `kind`, `start_s` among them (Unix s, as the engine says it); and `_inputs` of `finish`.

    A value beyond its column's bounds (a negative counter) is given as None and counted."""
    key: str = ""
    """Tells several engines behind one port apart (dp rank, else model); '' = one."""
    kind: Columns = ENGINE_SAMPLES
    node: str = ""
    """Of a row that names its own host (dcgm-exporter): a key, so printable and without slash. '' = the target's."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Text columns: model, ... (`engine` is the adapter's, if not given)."""
    fixed: Mapping[str, float] = field(default_factory=dict)
    """Columns and `_inputs` that labels say, e.g. the block size of `cache_config_info`, the index of a GPU."""
    histograms: Mapping[str, Buckets] = field(default_factory=dict)
    """Of schemas.node.HISTOGRAMS."""
    finish: Callable[[Values], Mapping[str, float | None]] | None = None
    """Columns derived from the others (given with `fixed`); what it gives is laid over them. Must not raise."""
    gpu: GpuEntry | None = None
    """Of a row of GPU_SAMPLES: who the GPU is, for the inventory."""
    pod: str = ""
    """... and the Kubernetes `namespace:pod` that holds it."""


class Chosen:
    """The names taken for the columns of one target. Once a name is taken it stays.

    Families appear on first use in some versions: without that memory a counter would jump from one meaning to
    another. The scraper forgets it when the engine's start changes.
    """

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def pick(self, what: str, names: Iterable[str], present: Collection[str], suffix: str = "") -> str | None:
        """The first of `names` (best first) whose name + suffix is `present`; the one taken before, if still there.

        `what`: the column or distribution (with the key, where engines behind a port may differ).
        """
        taken = self._names.get(what)
        if taken is not None and taken + suffix in present:
            return taken
        for name in names:
            if name + suffix in present:
                self._names[what] = name
                return name
        return None

    def forget(self) -> None:
        """The engine is another process: it may have another version."""
        self._names.clear()


class Adapter(Protocol):
    """One engine. Without state of its own: one instance serves all targets."""

    engine: str
    """As in engine.samples: vllm, sglang, tgi, triton, dynamo; `dcgm` for dcgm-exporter."""

    def recognises(self, names: Collection[str]) -> bool:
        """Whether a page with these metric names is of this engine. The first in the registry's order is taken."""

    def plan(self, series: Sequence[Series], chosen: Chosen) -> list[RowPlan]:
        """Rows of a page, once a layout. Empty: nothing there yet that says something.

        Must not raise, but for TooManyRows.
        """


class Page:
    """The series of a layout, by name: what adapters look things up in."""

    def __init__(self, series: Sequence[Series]) -> None:
        self.series = series
        self.by_name: dict[str, list[int]] = {}
        for index, one in enumerate(series):
            self.by_name.setdefault(one.name, []).append(index)

    def find(self, name: str | None, where: Callable[[Mapping[str, str]], bool] | None = None) -> tuple[int, ...]:
        """Positions of the series of a name (None: none), those whose labels are as wanted."""
        found = self.by_name.get(name, ()) if name is not None else ()
        return tuple(i for i in found if where is None or where(self.series[i].labels))

    def values_of(self, label: str, names: Iterable[str]) -> list[str]:
        """Distinct values of a label over series of these names, in order; '' where a series has none.

        Raises TooManyRows, which an adapter lets pass.
        """
        found: dict[str, None] = {}
        for name in names:
            for index in self.by_name.get(name, ()):
                found[self.series[index].labels.get(label, "")] = None
        if len(found) > KEYS_MAX:
            raise TooManyRows(f"{len(found)} values of {label}, the bound is {KEYS_MAX}")
        return list(found)

    def buckets(
        self, family: str, where: Callable[[Mapping[str, str]], bool] | None = None, scale: float = 1.0
    ) -> Buckets | None:
        """The buckets of a histogram family, bounds times `scale`; None where it has none."""
        bounds: dict[float, list[int]] = {}
        for index in self.find(f"{family}_bucket", where):
            bound = number(self.series[index].labels.get("le"))
            if bound is not None:
                bounds.setdefault(bound, []).append(index)
        last = bounds.pop(math.inf, [])
        count = self.find(f"{family}_count", where) or tuple(last)
        if not bounds or not count:
            return None
        return Buckets(tuple((bound * scale, tuple(bounds[bound])) for bound in sorted(bounds)), count)

    def start(self, created: Iterable[str] = ()) -> Reduce:
        """Start of the engine: of the process, or else of its counters (families with `_created`, best first)."""
        for name in ("process_start_time_seconds", *(f"{name}_created" for name in created)):
            if name in self.by_name:
                return Reduce(self.find(name), "min")
        return Reduce(())


def number(text: Any) -> float | None:
    """A label's value as a number; None where it is none, or NaN."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(value) else value
