"""Columnar records: one Kafka record is one batch of rows, as an Arrow IPC stream or as JSON rows.

A kind is a table of columns with unit, bounds and meaning. In memory a measured column is a float64 array in
which NaN is *unknown* (an Arrow null); on the wire NaN and infinity are refused, so the two never mix.
Text columns are dictionary codes (-1 = unknown) into a list of values. Rows that break a bound are refused one
by one and named; the other rows of the batch are taken.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from schemas import arrow
from schemas.base import MS_LIMIT_S
from schemas.errors import InvalidRecord
from schemas.log import CONTENT_ARROW, CONTENT_JSON
from schemas.topics import ce_type

ROWS_MAX = 100_000
TEXT_MAX = 200
_META_NAME = (re.compile(r"[^/]{1,200}"), "a name of 1 to 200 printable characters, no slash")
_META_TEXT = (re.compile(r".{1,200}"), "1 to 200 printable characters")
_META_WHOLE = (re.compile(r"[0-9]{1,15}"), "a whole number")
_META_NUMBER = (re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?"), "a number in plain decimals")
_META = {
    **dict.fromkeys(("node", "pool"), _META_NAME),
    **dict.fromkeys(("seq", "dropped", "version", "size_s"), _META_WHOLE),
    **dict.fromkeys(("start_s", "until_s"), _META_NUMBER),
    "closed": (re.compile("[01]"), "0 or 1"),
}
"""What entries of a schema's metadata look like, by name."""
_TYPES = {"f64": pa.float64(), "i64": pa.int64(), "text": pa.utf8(), "pairs": pa.list_(pa.uint32())}


class Column(NamedTuple):
    """One column. `type`: f64, i64, text, or pairs (a sparse histogram: bucket, count, bucket, count, ...)."""

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


Refuse = Callable[[Column, np.ndarray, str, str], None]
T = TypeVar("T")


class RowRefusal(NamedTuple):
    """Rows of one batch that cannot be taken, and why."""

    reason: str
    field: str
    value: str
    remedy: str
    rows: tuple[int, ...]


@dataclass(slots=True)
class Batch:
    """The rows of one record that can be taken, by column."""

    rows: int
    numbers: dict[str, np.ndarray]
    """float64 by column; NaN = unknown. Every number column of the kind is there."""
    codes: dict[str, np.ndarray]
    """int32 by text column: index into `values[column]`; -1 = unknown."""
    values: dict[str, list[str]]
    pairs: dict[str, list[np.ndarray | None]]
    """Per row the flat uint32 (bucket, count, ...) array of a histogram, or None = unknown."""
    meta: dict[str, str]
    refused: list[RowRefusal] = field(default_factory=list)
    index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Row number within the record of each row kept."""

    def text(self, column: str) -> list[str | None]:
        """A text column as a list, None = unknown."""
        values = self.values[column]
        return [values[c] if c >= 0 else None for c in self.codes[column].tolist()]

    def keep(self, mask: np.ndarray) -> Batch:
        """The rows where `mask` is true."""
        if bool(mask.all()):
            return self
        chosen = np.flatnonzero(mask)
        return Batch(
            len(chosen),
            {k: v[chosen] for k, v in self.numbers.items()},
            {k: v[chosen] for k, v in self.codes.items()},
            self.values,
            {k: [v[i] for i in chosen.tolist()] for k, v in self.pairs.items()},
            self.meta,
            self.refused,
            self.index[chosen],
        )


class Columns:
    """A columnar kind: its columns, and the codec. `meta`: name -> meaning of entries in the Arrow schema metadata."""

    def __init__(
        self,
        kind: str,
        doc: str,
        columns: Sequence[Column],
        meta: Mapping[str, str] = {},
        json_too: bool = False,
    ) -> None:
        self.kind = kind
        self.type = ce_type(kind)
        self.doc = doc
        self.columns = {c.name: c for c in columns}
        self.meta = dict(meta)
        self.json_too = json_too
        self._fields = [pa.field(c.name, _TYPES[c.type], nullable=not c.required) for c in columns]
        numbers = [c for c in columns if c.type in ("f64", "i64")]
        latest = np.nextafter(MS_LIMIT_S, 0)
        self._bounds = (
            np.array([[c.low] for c in numbers]),
            np.array([[min(c.high, latest) if c.is_time else c.high] for c in numbers]),
            np.array([c.required for c in numbers], bool),
            np.array([i for i, c in enumerate(numbers) if c.type == "i64"], np.int64),
        )
        COLUMNAR[self.type] = self

    def arrow_schema(self, meta: Mapping[str, str] | None = None) -> Any:
        """The Arrow schema; what is in `meta` goes into its metadata beside the kind."""
        return pa.schema(self._fields, metadata={"kind": self.kind, **(meta or {})})

    def encode(self, data: Mapping[str, Any], meta: Mapping[str, str] | None = None) -> bytes:
        """Arrow IPC stream bytes. `data`: column -> array or list; NaN and None become null, missing columns null.

        Lengths must agree. Unknown columns raise KeyError (our bug).
        """
        unknown = set(data) - set(self.columns)
        if unknown:
            raise KeyError(f"{self.kind} has no column {sorted(unknown)}")
        n = len(next(iter(data.values())))
        arrays = []
        for f in self._fields:
            values = data.get(f.name)
            if values is None:
                arrays.append(pa.nulls(n, f.type))
            elif f.type == pa.int64() and isinstance(values, np.ndarray) and values.dtype.kind == "f":
                mask = np.isnan(values)
                arrays.append(pa.array(np.where(mask, 0, values).astype(np.int64), f.type, mask=mask))
            elif isinstance(values, np.ndarray) and values.dtype.kind == "f":
                arrays.append(pa.array(values, f.type, from_pandas=True))
            else:
                arrays.append(pa.array(values, f.type))
        batch = pa.record_batch(arrays, schema=self.arrow_schema(meta))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return bytes(sink.getvalue())

    def decode(self, value: bytes, content_type: str = CONTENT_ARROW) -> Batch:
        """Bytes to the rows that can be taken. Raises InvalidRecord where the record as a whole cannot be."""
        rows: _Rows
        if content_type.startswith(CONTENT_JSON):
            if not self.json_too:
                raise InvalidRecord("undecodable", "content-type", content_type, f"send {CONTENT_ARROW}")
            rows, meta = JsonRows(_json_rows(value), self.columns), {}
        else:
            rows = ArrowRows(value, self.columns)
            meta = self._checked_meta(rows.meta)
        return self._check(rows, meta)

    def decode_rows(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Rows that are plain values already (as JSON has them) to those that can be taken. At most ROWS_MAX."""
        assert len(rows) <= ROWS_MAX
        return self._check(JsonRows(rows, self.columns), {})

    def _checked_meta(self, raw: Mapping[str, str]) -> dict[str, str]:
        """The entries that the kind knows. Raises InvalidRecord for one that cannot be what it says."""
        if raw.get("kind", self.kind) != self.kind:
            raise InvalidRecord(
                "invalid", "kind", raw["kind"], f"ce_type and schema metadata must both say {self.kind}"
            )
        meta = {name: raw[name] for name in self.meta if name in raw}
        for name, value in meta.items():
            pattern, remedy = _META.get(name, _META_TEXT)
            if not pattern.fullmatch(value) or not value.isprintable():
                raise InvalidRecord("invalid", name, value, f"in the schema metadata, send {remedy}")
        return meta

    def _check(self, source: _Rows, meta: dict[str, str]) -> Batch:
        n = source.rows
        batch = Batch(n, {}, {}, {}, {}, meta, index=np.arange(n))
        good = np.ones(n, bool)

        def refuse(column: Column, bad: np.ndarray, reason: str, remedy: str) -> None:
            rows = np.flatnonzero(bad & good)
            if len(rows):
                value = repr(source.shown(column, int(rows[0])))[:120]
                batch.refused.append(RowRefusal(reason, column.name, value, remedy, tuple(rows.tolist())))
                good[rows] = False

        measured = self._numbers(source, batch)
        for column in self.columns.values():
            wrong = source.wrong(column)
            if wrong is not None:
                refuse(column, wrong, "invalid", f"send {column.type} {column.unit}".strip())
            if column.type == "text":
                _take_text(batch, column, source, refuse)
            elif column.type == "pairs":
                lists = batch.pairs[column.name] = source.lists(column)
                odd = np.array([v is not None and len(v) % 2 == 1 for v in lists], bool)
                refuse(column, odd, "invalid", "send bucket, count, bucket, count, ...")
            elif column.name in measured:
                _judge_numbers(column, batch.numbers[column.name], source.nulls(column), refuse)
        return batch.keep(good)

    def _numbers(self, source: _Rows, batch: Batch) -> set[str]:
        """Takes every number column; gives those that may hold something wrong (all are judged at once)."""
        columns = [c for c in self.columns.values() if c.type in ("f64", "i64")]
        values = np.empty((len(columns), source.rows))
        nulls = np.zeros(len(columns), np.int64)
        for i, column in enumerate(columns):
            nulls[i] = source.numbers(column, values[i])
            batch.numbers[column.name] = values[i]
        low, high, required, whole = self._bounds
        odd = np.isfinite(values).sum(axis=1) != source.rows - nulls
        odd |= ((values < low) | (values > high)).any(axis=1)
        odd |= required & (nulls > 0)
        odd[whole] |= (np.abs(values[whole] - np.round(values[whole])) > 0).any(axis=1)
        return {columns[i].name for i in np.flatnonzero(odd).tolist()}


COLUMNAR: dict[str, Columns] = {}
"""`ce_type` -> columnar kind."""


class _Rows(Protocol):
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
                "invalid", column.name, str(array.type), f"send the column as {_TYPES[column.type]} ({error})"
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
        return self._read(column, arrow.integer_lists)

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
        return [None if c is None else np.array(c, np.uint32) for c in self._kept(column)]

    def wrong(self, column: Column) -> np.ndarray | None:
        return ~self._fits[column.name]

    def shown(self, column: Column, row: int) -> Any:
        return self.cells[column.name][row]


def _json_rows(value: bytes) -> list[dict[str, Any]]:
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
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return False
    # whole numbers sent as 12.0 are whole numbers; an int beyond 2^63 is no measurement (and no float, beyond 2^1023)
    return isinstance(cell, float) or abs(cell) <= 2**63


def _judge_numbers(column: Column, values: np.ndarray, nulls: np.ndarray, refuse: Refuse) -> None:
    bad = ~np.isfinite(values) & ~nulls
    refuse(column, bad, "not_finite", "send null for unknown, never NaN or infinity")
    if column.required:
        refuse(column, nulls, "invalid", "this column is required")
    if column.is_time:
        refuse(column, values >= MS_LIMIT_S, "time_unit", "send seconds since 1970, not milliseconds")
    if column.type == "i64":
        refuse(column, np.isfinite(values) & (values != np.floor(values)), "invalid", "send a whole number")
    outside = (values < column.low) | (values > column.high)
    upper = " or more" if column.high == math.inf else f" to {column.high:g}"
    refuse(column, outside, "out_of_bounds", f"send {column.low:g}{upper} {column.unit}".strip())


def _take_text(batch: Batch, column: Column, source: _Rows, refuse: Refuse) -> None:
    codes, values = source.codes(column)
    if column.required:
        refuse(column, codes < 0, "invalid", "this column is required")
    if column.choices:
        bad = [v not in column.choices for v in values]
        remedy = f"send one of {', '.join(column.choices)}"
    else:
        bad = [not 0 < len(v) <= TEXT_MAX or not v.isprintable() or (column.plain and "/" in v) for v in values]
        remedy = f"send 1 to {TEXT_MAX} printable characters" + (", no slash" if column.plain else "")
    if any(bad):
        refuse(column, np.array([*bad, False])[codes], "invalid", remedy)
    batch.codes[column.name] = codes
    batch.values[column.name] = values
