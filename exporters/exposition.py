"""Text exposition, line by line: where a line's value begins, and what prometheus_client's parser makes of it.

Text format 0.0.4 and OpenMetrics. Lines that are no valid exposition are left out, as some exporters write such and a
strict parser would drop the whole page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as text_families

from exporters.adapters.base import Series

SERIES_KNOWN = 65_536
"""Beginnings of lines whose series is remembered, over all targets: replicas of one pool share most of theirs."""
BEGINNING_KEPT = 1024
"""A longer beginning is parsed anew at each learning."""
_COMMENT = ord("#")
_SPACE = re.compile(rb"[ \t]")


class PageError(ValueError):
    """A page that cannot be taken. `what` is one of few words."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(why)
        self.what = what


def lines_of(body: bytes) -> list[bytes]:
    """The lines of a page; the last one may be empty."""
    return body.split(b"\n")


def samples(lines: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number, line) of those that are neither empty nor a comment."""
    for number, line in enumerate(lines):
        begin = line.lstrip()
        if begin and begin[0] != _COMMENT:
            yield number, line


def cut(line: bytes, openmetrics: bool) -> int:
    """How long the part before the value is. A line that this cuts in the wrong place is no valid beginning."""
    end = line.find(b" # ") if openmetrics else -1
    close = line.rfind(b"}", 0, end if end >= 0 else len(line))
    if close >= 0:
        return close + 1
    space = _SPACE.search(line, len(line) - len(line.lstrip()))
    return space.end() if space else len(line)


def series_of(beginning: bytes) -> Series | None:
    """The series that a line with this beginning is of; None where the parser refuses it."""
    return _known(beginning) if len(beginning) <= BEGINNING_KEPT else _of(beginning)


def _of(beginning: bytes) -> Series | None:
    found = _parsed(beginning + b" 0")
    return None if found is None else found[0]


_known = lru_cache(SERIES_KNOWN)(_of)


def _parsed(line: bytes) -> tuple[Series, float] | None:
    try:
        for family in text_families(line.decode("utf-8", "replace")):
            for sample in family.samples:
                return Series(sample.name, sample.labels), sample.value
    except (ValueError, IndexError):  # what the parser raises for what it does not understand
        return None
    return None


def value_of(text: bytes) -> float | None:
    """What stands behind the beginning of a line: a value, perhaps a timestamp, perhaps an exemplar. None: no value."""
    parts = text.partition(b" # ")[0].split()
    try:
        numbers = [float(part) for part in parts if b"_" not in part]
    except ValueError:
        return None
    return numbers[0] if numbers and len(numbers) == len(parts) else None


def parsed_page(lines: Sequence[bytes], openmetrics: bool) -> list[tuple[Series, float]]:
    """Every sample by the parser alone. Raises ValueError for OpenMetrics that is not valid."""
    if not openmetrics:
        return [found for _, line in samples(lines) if (found := _parsed(line)) is not None]
    text = b"\n".join(lines).decode("utf-8", "replace")
    families = openmetrics_families(text)
    return [(Series(s.name, s.labels), s.value) for family in families for s in family.samples]
