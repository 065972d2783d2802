"""Pages of engines: as our code reads them, and as a plain reader with nothing of ours does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from exporters.adapters.base import Chosen
from exporters.exposition import lines_of
from exporters.layout import Layout, learn
from exporters.planned import Read

_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+([-+\w.]+)\s*$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Line(NamedTuple):
    """One line of a page."""

    name: str
    labels: dict[str, str]
    value: float


class Plain:
    """A page by regular expressions: what the adapters are held against."""

    def __init__(self, text: str) -> None:
        self.lines: list[Line] = []
        for text_line in text.splitlines():
            found = None if text_line.startswith("#") else _LINE.match(text_line)
            if found:
                self.lines.append(Line(found[1], dict(_LABEL.findall(found[2] or "")), float(found[3])))

    def all(self, name: str, **labels: str) -> list[float]:
        """Values of the series of a name with these labels."""
        return [one.value for one in self.lines if one.name == name and labels.items() <= one.labels.items()]

    def one(self, name: str, **labels: str) -> float:
        """The only such value."""
        (value,) = self.all(name, **labels)
        return value

    def sum(self, name: str, **labels: str) -> float:
        """Their sum; there is one at least."""
        values = self.all(name, **labels)
        assert values, (name, labels)
        return sum(values)

    def bins(self, family: str, scale: float = 1.0, **labels: str) -> list[float]:
        """Upper bound, cumulative count, ..., count of all."""
        found = [
            (float(one.labels["le"]) * scale, one.value)
            for one in self.lines
            if one.name == f"{family}_bucket" and labels.items() <= one.labels.items()
        ]
        finite = sorted((bound, count) for bound, count in found if bound < float("inf"))
        return [number for pair in finite for number in pair] + [self.one(f"{family}_count", **labels)]


def text_of(data_dir: Path, name: str) -> str:
    """A recorded page."""
    return (data_dir / "engine-metrics" / name).read_text(encoding="utf-8")


def layout_of(text: str, engine: str | None = None, chosen: Chosen | None = None) -> Layout:
    """What our code learns of a page."""
    return learn(lines_of(text.encode()), chosen=chosen, engine=engine)


def read(text: str, engine: str | None = None, chosen: Chosen | None = None) -> list[Read]:
    """The rows that our code makes of a page, and nothing was out of bounds."""
    lines = lines_of(text.encode())
    layout = learn(lines, chosen=chosen, engine=engine)
    values = layout.values(lines, True)
    assert values is not None
    bad: list[str] = []
    rows = layout.rows(values, True, bad)
    assert bad == []
    return rows


def known(row: Read) -> dict[str, float]:
    """Its columns that are known."""
    return {name: value for name, value in row.values.items() if value is not None}


def without(text: str, gone: Callable[[str], bool]) -> str:
    """A page without the samples whose name is gone."""

    def stays(line: str) -> bool:
        found = None if line.startswith("#") else re.match(r"[\w:]+", line)
        return found is None or not gone(found[0])

    return "\n".join(filter(stays, text.split("\n")))
