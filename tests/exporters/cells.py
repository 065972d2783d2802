"""Batches of request rows as rows of plain cells, for tests to compare."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from schemas.columns import Batch
from schemas.requests import REQUEST_ROWS


def as_rows(batch: Batch) -> Iterator[tuple[Any, ...]]:
    """The rows of a decoded batch: cells in the order of REQUEST_ROWS; None = unknown."""
    columns: list[list[Any]] = []
    for name, column in REQUEST_ROWS.columns.items():
        if column.type == "text":
            columns.append(list(batch.text(name)))
        else:
            columns.append([None if math.isnan(v) else v for v in batch.numbers[name].tolist()])
    return zip(*columns, strict=True)
