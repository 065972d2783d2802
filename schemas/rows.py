"""Columns of a kind, and the rows of one record from whichever encoding, before they are checked against bounds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from schemas import arrow
from schemas.errors import InvalidRecord

ROWS_MAX = 100_000
"""Rows of one record."""
TYPES = {
    "f64": pa.float64(),
    "i64": pa.int64(),
    "text": pa.utf8(),
    "pairs": pa.list_(pa.uint32()),
    "bins": pa.list_(pa.float64()),
}
"""Type of a column -> its Arrow type."""
T = TypeVar("T")


class Column(NamedTuple):
    """One column. `type`: f64, i64, text, or a histogram: pairs (sparse: bucket, count, bucket, count, ...) or bins
    (cumulative: upper bound, count up to it, ..., and at the end the count of all)."""

    name: str
    type: str
    doc: str
    unit: str = ""
    required: bool = False
    low: float = 0.0
    high: float = math.inf
    choices: tuple[str, ...] = ()
    plain: bool = False
    """Text that becomes part of keys and of `Name`s: no slash."""

    @property
    def is_time(self) -> bool:
        """Whether it is a point in time, Unix s (where milliseconds are a mistake)."""
        return self.unit == "s" and (self.name.endswith("at_s") or self.name == "start_s")


class Rows(Protocol):
    """The rows of a record, from whichever encoding."""

    rows: int

    def numbers(self, column: Column, into: np.ndarray) -> int:
        """Fills `into` with a number column, NaN = unknown; gives how many are unknown."""

    def nulls(self, column: Column) -> np.ndarray:
        """Where a column is unknown."""

    def codes(self, column: Column) -> tuple[np.ndarray, list[str]]:
        """A text column: code per row (-1 = unknown) and distinct values."""

    def lists(self, column: Column) -> list[np.ndarray | None]:
        """A column of lists."""

    def wrong(self, column: Column) -> np.ndarray | None:
        """Where a cell is of another type (and therefore unknown); None: nowhere."""

    def shown(self, column: Column, row: int) -> Any:
        """One cell, for a message."""


class ArrowRows:
    """The rows of an Arrow stream."""

    def __init__(self, value: bytes, columns: Mapping[str, Column]) -> None:
        self.rows, self.arrays, self.meta = arrow.read_stream(value, set(columns), ROWS_MAX)

    def _read(self, column: Column, read: Callable[[Any], T]) -> T:
        array = self.arrays[column.name]
        try:
            return read(array)
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise InvalidRecord(
                "invalid", column.name, str(array.type), f"send the column as {TYPES[column.type]} ({error})"
            ) from None

    def numbers(self, column: Column, into: np.ndarray) -> int:
        array = self.arrays.get(column.name)
        if array is None or array.null_count == self.rows:
            into[:] = np.nan
            return self.rows
        into[:] = self._read(column, arrow.numbers)
        if pa.types.is_dictionary(array.type):
            return int(self.nulls(column).sum())
        return int(array.null_count)

    def nulls(self, column: Column) -> np.ndarray:
        array = self.arrays.get(column.name)
        if array is None:
            return np.ones(self.rows, bool)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        return np.asarray(array.is_null().to_numpy(zero_copy_only=False), bool)

    def codes(self, column: Column) -> tuple[np.ndarray, list[str]]:
        if column.name not in self.arrays:
            return np.full(self.rows, -1, np.int32), []
        return self._read(column, arrow.text_codes)

    def lists(self, column: Column) -> list[np.ndarray | None]:
        if column.name not in self.arrays:
            return [None] * self.rows
        return self._read(column, arrow.integer_lists if column.type == "pairs" else arrow.number_lists)

    def wrong(self, column: Column) -> np.ndarray | None:
        return None

    def shown(self, column: Column, row: int) -> Any:
        array = self.arrays.get(column.name)
        return None if array is None else array[row].as_py()


class JsonRows:
    """Rows sent as JSON: one object or an array of them. A cell of a wrong type spoils its own row alone."""

    def __init__(self, found: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> None:
        self.rows = len(found)
        self.cells: dict[str, list[Any]] = {name: [row.get(name) for row in found] for name in columns}
        self._fits = {
            name: np.array([c is None or _fits(columns[name].type, c) for c in cells], bool)
            for name, cells in self.cells.items()
        }

    def _kept(self, column: Column) -> list[Any]:
        cells, fits = self.cells[column.name], self._fits[column.name].tolist()
        return [c if ok else None for c, ok in zip(cells, fits, strict=True)]

    def numbers(self, column: Column, into: np.ndarray) -> int:
        cells = self._kept(column)
        into[:] = [np.nan if c is None else float(c) for c in cells]
        return sum(c is None for c in cells)

    def nulls(self, column: Column) -> np.ndarray:
        return np.array([c is None for c in self._kept(column)], bool)

    def codes(self, column: Column) -> tuple[np.ndarray, list[str]]:
        distinct: dict[str, int] = {}
        codes = [-1 if c is None else distinct.setdefault(c, len(distinct)) for c in self._kept(column)]
        return np.array(codes, np.int32), list(distinct)

    def lists(self, column: Column) -> list[np.ndarray | None]:
        kind = np.uint32 if column.type == "pairs" else np.float64
        return [None if c is None else np.array(c, kind) for c in self._kept(column)]

    def wrong(self, column: Column) -> np.ndarray | None:
        return ~self._fits[column.name]

    def shown(self, column: Column, row: int) -> Any:
        return self.cells[column.name][row]


def json_rows(value: bytes) -> list[dict[str, Any]]:
    """The rows of a JSON value: one object or an array of them. Raises InvalidRecord."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRecord(
            "undecodable", "value", value[:80], f"send JSON: one row or an array of rows ({error})"
        ) from None
    found = found if isinstance(found, list) else [found]
    if len(found) > ROWS_MAX:
        raise InvalidRecord("too_large", "rows", len(found), f"send at most {ROWS_MAX} rows in a record")
    if not all(isinstance(row, dict) for row in found):
        raise InvalidRecord("invalid", "value", value[:80], "every row must be a JSON object")
    return found


def _fits(kind: str, cell: Any) -> bool:
    if kind == "text":
        if not isinstance(cell, str):
            return False
        try:
            cell.encode()
        except UnicodeEncodeError:  # a lone surrogate: valid JSON, no valid text
            return False
        return True
    if kind == "pairs":
        return isinstance(cell, list) and all(type(c) is int and 0 <= c < 2**32 for c in cell)
    if kind == "bins":
        return isinstance(cell, list) and all(_fits("f64", c) for c in cell)
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return False
    # whole numbers sent as 12.0 are whole numbers; an int beyond 2^63 is no measurement (and no float, beyond 2^1023)
    return isinstance(cell, float) or abs(cell) <= 2**63
