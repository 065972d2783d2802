"""Recorded runs of real engines: what they answered, scrape by scrape."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def scrapes(folder: Path) -> Iterator[tuple[float, str | None]]:
    """(Unix s, page) of a recorded run, once a second; None where the scrape failed."""
    lines: list[str] = []
    with gzip.open(folder / "scrapes.jsonl.gz", "rt", encoding="utf-8") as file:
        for record in map(json.loads, file):
            yield record["t"], _page(record, lines)


def _page(record: dict[str, Any], lines: list[str]) -> str | None:
    """The page of one record; `lines` are those of the last one that answered, and are changed."""
    if "error" in record:
        return None
    if "text" in record:
        lines[:] = record["text"].split("\n")
    for number, value in record.get("v", []):
        lines[number] = f"{lines[number].rpartition(' ')[0]} {value}"
    return "\n".join(lines)
