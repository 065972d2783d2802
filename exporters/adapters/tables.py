"""What the tables of the engines share: a column or distribution has names, best first, and is made of their series."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from exporters.adapters.base import Buckets, Chosen, Page, Reduce

Names = tuple[str, ...]
Where = Callable[[Mapping[str, str]], bool]


def counter(*names: str) -> Names:
    """Names of a counter, best first, each with the suffix that some versions add and without."""
    return tuple(full for name in names for full in (f"{name}_total", name))


class Table(NamedTuple):
    """An engine's names for our columns."""

    sums: Mapping[str, Names] = {}
    """Column -> names: summed over the series of an engine."""
    means: Mapping[str, Names] = {}
    """The same for ratios: the mean over series."""
    times: Mapping[str, Names] = {}
    """Distribution of times, as in schemas.node.HISTOGRAMS -> families; its sum and count are columns."""
    sizes: Mapping[str, Names] = {}
    """Distribution of token counts -> families: only its buckets are kept."""

    def fill(
        self, page: Page, chosen: Chosen, where: Where | None = None, key: str = ""
    ) -> tuple[dict[str, Reduce], dict[str, Buckets]]:
        """Columns and distributions from the series whose labels are as wanted.

        `key` tells engines apart in what was `chosen`. A name counts as present where the page has it at all: else
        two engines of one page could be read by different names.
        """
        columns: dict[str, Reduce] = {}
        histograms: dict[str, Buckets] = {}
        for op, names in (("sum", self.sums), ("mean", self.means)):
            for column, options in names.items():
                name = chosen.pick(f"{key}/{column}", options, page.by_name)
                columns[column] = Reduce(page.find(name, where), "sum" if op == "sum" else "mean")
        for what, options in (*self.times.items(), *self.sizes.items()):
            family = chosen.pick(f"{key}/{what}", options, page.by_name, "_count")
            if family is None:
                continue
            if what in self.times:
                columns[f"{what}_sum"] = Reduce(page.find(f"{family}_sum", where))
                columns[f"{what.removesuffix('_s')}_count"] = Reduce(page.find(f"{family}_count", where))
            buckets = page.buckets(family, where)
            if buckets is not None:
                histograms[what] = buckets
        return columns, histograms


def text(value: str | None) -> dict[str, str]:
    """The column `model`, where a label says one that the log takes."""
    plain = "".join(c for c in value or "" if c.isprintable())[:200]
    return {"model": plain} if plain else {}


def slug(value: str) -> str:
    """A label's value as a part of a replica's name: no slash, no space."""
    return re.sub(r"[^\w.:+-]+", "-", value).strip("-")[:100]


def label(page: Page, names: Sequence[str], series: Sequence[int]) -> str | None:
    """The value of the first of these labels that one of the series has."""
    for index in series:
        for name in names:
            found = page.series[index].labels.get(name)
            if found:
                return found
    return None
