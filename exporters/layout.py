"""A page's layout: its series in order, learned through prometheus_client's parser; then only wanted values are read.

Reading a page of 500 series takes the parser 9 ms. Here its lines are split, those that are wanted must begin as they
did when the layout was learned, and only what follows on them is taken as a number. `Layout.agrees` compares that with
the parser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from exporters.adapters import choose
from exporters.adapters.base import KEYS_MAX, Adapter, Chosen, Series, TooManyRows
from exporters.exposition import PageError, cut, parsed_page, samples, series_of, value_of
from exporters.planned import Planned, Read


class Limits(NamedTuple):
    """Bounds on a page."""

    series: int = 10_000
    line_bytes: int = 16_384


class _Picker:
    """Takes the values of some lines."""

    def __init__(self, places: Sequence[tuple[int, bytes]]) -> None:
        numbers = [number for number, _ in places]
        self._get = itemgetter(*numbers) if len(numbers) > 1 else lambda lines: tuple(lines[n] for n in numbers)
        self._begin = [(beginning, len(beginning)) for _, beginning in places]

    def values(self, lines: Sequence[bytes]) -> list[float] | None:
        """In the order of the places; None where a line begins otherwise."""
        found = []
        for line, (beginning, length) in zip(self._get(lines), self._begin, strict=True):
            if not line.startswith(beginning):
                return None
            try:
                found.append(float(line[length:]))
            except ValueError:
                value = value_of(line[length:])
                found.append(math.nan if value is None else value)
        return found


LIMITS = Limits()


class Layout:
    """What was learned of a page. Parameters: the series in order, and for each the line and how that begins.

    Raises TooManyRows, and what the adapter's `plan` raises.
    """

    def __init__(
        self, adapter: Adapter, chosen: Chosen, series: list[Series], places: list[tuple[int, bytes]], lines: int
    ) -> None:
        self.adapter, self._lines = adapter, lines
        self.plans = adapter.plan(series, chosen)
        if len(self.plans) > KEYS_MAX:
            raise TooManyRows(f"{len(self.plans)} rows, the bound is {KEYS_MAX}")
        each = [i for plan in self.plans for reduce in plan.columns.values() for i in reduce.indices]
        more = [
            i
            for plan in self.plans
            for buckets in plan.histograms.values()
            for part in (buckets.count, *(indices for _, indices in buckets.bounds))
            for i in part
        ]
        wanted = list(dict.fromkeys([*each, *more]))
        few = len(dict.fromkeys(each))
        slot = {index: position for position, index in enumerate(wanted)}
        self._few, self._all = _Picker([places[i] for i in wanted[:few]]), _Picker([places[i] for i in wanted])
        self._wanted = wanted
        self._rows = [Planned(plan, slot) for plan in self.plans]
        self._fingerprint = _fingerprint(series)
        self.bad_lines = 0
        """Lines that were left out, because they are not valid."""

    def values(self, lines: Sequence[bytes], histograms: bool) -> list[float] | None:
        """Values of the wanted series; None where the page no longer has this layout. NaN: no number."""
        if len(lines) != self._lines:
            return None
        return (self._all if histograms else self._few).values(lines)

    def rows(self, values: Sequence[float], histograms: bool, bad: list[str]) -> list[Read]:
        """The rows that these values make; columns whose value was not taken are added to `bad`. Raises PageError."""
        try:
            return [row.read(values, histograms, bad) for row in self._rows]
        except Exception as error:  # an adapter's `finish` is no reason to end what other targets need
            raise PageError("adapter", f"{self.adapter.engine}: {type(error).__name__}: {error}") from error

    def agrees(self, lines: Sequence[bytes], openmetrics: bool) -> bool:
        """Whether the parser finds the series that were learned, and the values that `values` gives, on a page."""
        try:
            found = parsed_page(lines, openmetrics)
        except (ValueError, IndexError):
            return False
        mine = self.values(lines, True)
        if mine is None or _fingerprint([series for series, _ in found]) != self._fingerprint:
            return False
        theirs = [found[i][1] for i in self._wanted]
        return all(a == b or (a != a and b != b) for a, b in zip(mine, theirs, strict=True))


def learn(
    lines: Sequence[bytes],
    openmetrics: bool = False,
    chosen: Chosen | None = None,
    engine: str | None = None,
    limits: Limits = LIMITS,
) -> Layout:
    """The layout of a page. `engine`: what is known to run there. Raises PageError."""
    series: list[Series] = []
    places: list[tuple[int, bytes]] = []
    bad = 0
    for number, line in samples(lines):
        if len(line) > limits.line_bytes:
            raise PageError("line", f"a line of {len(line)} bytes, the bound is {limits.line_bytes}")
        beginning = line[: cut(line, openmetrics)]
        one = series_of(beginning)
        if one is None or value_of(line[len(beginning) :]) is None:
            bad += 1
            continue
        if len(series) == limits.series:
            raise PageError("series", f"more than {limits.series} series")
        series.append(one)
        places.append((number, beginning))
    adapter = choose({one.name for one in series}, engine)
    if adapter is None:
        raise PageError("unknown", "no metrics of a known engine on that page")
    try:
        layout = Layout(adapter, chosen or Chosen(), series, places, len(lines))
    except TooManyRows as error:
        raise PageError("rows", str(error)) from None
    except Exception as error:  # what a page may bring an adapter to is its own target's harm, and no other's
        raise PageError("adapter", f"{adapter.engine}: {type(error).__name__}: {error}") from error
    layout.bad_lines = bad
    return layout


def _fingerprint(series: Sequence[Series]) -> int:
    return hash(tuple((one.name, tuple(one.labels.items())) for one in series))
