"""Columnar records: one Kafka record is one batch of rows, as an Arrow IPC stream or as JSON rows.

A kind is a table of columns with unit, bounds and meaning. In memory a measured column is a float64 array in
which NaN is *unknown* (an Arrow null); on the wire NaN and infinity are refused, so the two never mix.
Text columns are dictionary codes (-1 = unknown) into a list of values. Rows that break a bound are refused one
by one and named; the other rows of the batch are taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from schemas.base import MS_LIMIT_S
from schemas.errors import InvalidRecord
from schemas.log import CONTENT_ARROW, CONTENT_JSON
from schemas.topics import ce_type

ROWS_MAX = 100_000
TEXT_MAX = 200
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
        if content_type.startswith(CONTENT_JSON):
            if not self.json_too:
                raise InvalidRecord("undecodable", "content-type", content_type, f"send {CONTENT_ARROW}")
            meta: dict[str, str] = {}
            table: Any = self._from_json(value)
        else:
            table, meta = self._from_arrow(value)
        if table.num_rows > ROWS_MAX:
            raise InvalidRecord("invalid", "rows", table.num_rows, f"send at most {ROWS_MAX} rows in a record")
        return self._check(table, meta)

    def _from_arrow(self, value: bytes) -> tuple[Any, dict[str, str]]:
        try:
            with pa.ipc.open_stream(value) as reader:
                table = reader.read_all()
            table.validate(full=True)
            raw = table.schema.metadata or {}
            meta = {k.decode(): v.decode() for k, v in raw.items()}
        except (pa.ArrowException, OSError, ValueError, UnicodeDecodeError, MemoryError) as error:
            raise InvalidRecord("undecodable", "value", value[:40], f"send an Arrow IPC stream ({error})") from None
        if meta.get("kind", self.kind) != self.kind:
            raise InvalidRecord(
                "invalid", "kind", meta["kind"], f"ce_type and schema metadata must both say {self.kind}"
            )
        return table, meta

    def _from_json(self, value: bytes) -> Any:
        try:
            rows = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRecord(
                "undecodable", "value", value[:80], f"send JSON: one row or an array of rows ({error})"
            ) from None
        rows = rows if isinstance(rows, list) else [rows]
        if not all(isinstance(row, dict) for row in rows):
            raise InvalidRecord("invalid", "value", value[:80], "every row must be a JSON object")
        # Each cell is typed on its own, so that one bad row does not take the others with it.
        cells: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in self.columns}
        return _Cells(len(rows), cells)

    def _check(self, table: Any, meta: dict[str, str]) -> Batch:
        n = table.num_rows
        batch = Batch(n, {}, {}, {}, {}, meta, index=np.arange(n))
        good = np.ones(n, bool)

        def refuse(column: Column, bad: np.ndarray, reason: str, remedy: str, shown: Any) -> None:
            rows = np.flatnonzero(bad & good)
            if len(rows):
                value = repr(shown(int(rows[0])))[:120]
                batch.refused.append(RowRefusal(reason, column.name, value, remedy, tuple(rows.tolist())))
                good[rows] = False

        for column in self.columns.values():
            if isinstance(table, _Cells):
                wrong = table.convert(column)
                refuse(
                    column,
                    wrong,
                    "invalid",
                    f"send {column.type} {column.unit}".strip(),
                    table.shown(column.name),
                )
                source = table.arrays[column.name]
            else:
                source = _column(table, column)
            if column.type == "text":
                _take_text(batch, column, source, refuse)
            elif column.type == "pairs":
                _take_pairs(batch, column, source, refuse)
            else:
                _take_numbers(batch, column, source, refuse)
        return batch.keep(good)


COLUMNAR: dict[str, Columns] = {}
"""`ce_type` -> columnar kind."""


class _Cells:
    """JSON rows as columns; cells of a wrong type become null and are reported."""

    def __init__(self, num_rows: int, cells: dict[str, list[Any]]) -> None:
        self.num_rows = num_rows
        self.cells = cells
        self.arrays: dict[str, Any] = {}

    def convert(self, column: Column) -> np.ndarray:
        cells = self.cells[column.name]
        ok = [c is None or _fits(column.type, c) for c in cells]
        if column.type in ("f64", "i64"):
            # through float: whole numbers sent as 12.0 are whole numbers, and Arrow refuses ints beyond 2^53 as f64
            self.arrays[column.name] = pa.array(
                [float(c) if c is not None and o else None for c, o in zip(cells, ok, strict=True)],
                pa.float64(),
            )
        else:
            self.arrays[column.name] = pa.array(
                [c if o else None for c, o in zip(cells, ok, strict=True)], _TYPES[column.type]
            )
        return ~np.array(ok, bool)

    def shown(self, name: str) -> Any:
        return lambda row: self.cells[name][row]


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
    if isinstance(cell, bool) or not isinstance(cell, int | float) or abs(cell) > 2**63:
        return False
    return kind == "f64" or not math.isfinite(cell) or float(cell).is_integer()


def _column(table: Any, column: Column) -> Any:
    """A column of an Arrow table in our type; a missing one is all null. Raises InvalidRecord for another type."""
    found = table.schema.get_all_field_indices(column.name)
    if not found:
        return pa.nulls(table.num_rows, _TYPES[column.type])
    array = table.column(found[0])
    want = _TYPES[column.type]
    try:
        if pa.types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        numeric = pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_null(array.type)
        if column.type in ("f64", "i64") and not numeric:
            raise pa.ArrowInvalid("not a number")
        # Whole numbers may come as any number type; they are checked to be whole as float64 below.
        array = array.cast(pa.float64() if column.type == "i64" and pa.types.is_floating(array.type) else want)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise InvalidRecord("invalid", column.name, str(array.type), f"send the column as {want} ({error})") from None
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _flat(array: Any, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values (float64) and null mask."""
    nulls = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else np.zeros(len(array), bool)
    filled = array.fill_null(0) if array.null_count else array
    return np.asarray(filled.to_numpy(zero_copy_only=False), dtype), nulls


def _take_numbers(batch: Batch, column: Column, array: Any, refuse: Any) -> None:
    values, nulls = _flat(array, np.float64)
    values = values.copy()

    def shown(row: int) -> Any:
        return None if nulls[row] else float(values[row])

    refuse(column, ~np.isfinite(values), "not_finite", "send null for unknown, never NaN or infinity", shown)
    if column.required:
        refuse(column, nulls, "invalid", "this column is required", shown)
    if column.unit == "s" and column.name.endswith("at_s"):
        refuse(column, values >= MS_LIMIT_S, "time_unit", "send seconds since 1970, not milliseconds", shown)
    if column.type == "i64":
        refuse(
            column,
            np.isfinite(values) & (values != np.floor(values)),
            "invalid",
            "send a whole number",
            shown,
        )
    outside = (values < column.low) | (values > column.high)
    remedy = f"send {column.low:g} or more" if column.high == math.inf else f"send {column.low:g} to {column.high:g}"
    refuse(column, outside & ~nulls, "out_of_bounds", f"{remedy} {column.unit}".strip(), shown)
    values[nulls] = np.nan
    batch.numbers[column.name] = values


def _take_text(batch: Batch, column: Column, array: Any, refuse: Any) -> None:
    encoded = array.dictionary_encode()
    codes, nulls = _flat(encoded.indices, np.int32)
    codes = codes.copy()
    codes[nulls] = -1
    values: list[str] = encoded.dictionary.to_pylist()

    def shown(row: int) -> Any:
        return None if codes[row] < 0 else values[codes[row]]

    if column.required:
        refuse(column, codes < 0, "invalid", "this column is required", shown)
    bad = np.array(
        [len(v) > TEXT_MAX or not v.isprintable() or (bool(column.choices) and v not in column.choices) for v in values]
        + [False]
    )
    choices = f"one of {', '.join(column.choices)}" if column.choices else f"at most {TEXT_MAX} printable characters"
    refuse(column, bad[codes], "invalid", f"send {choices}", shown)
    batch.codes[column.name] = codes
    batch.values[column.name] = values


def _take_pairs(batch: Batch, column: Column, array: Any, refuse: Any) -> None:
    lists: list[np.ndarray | None] = [None if v is None else np.asarray(v, np.uint32) for v in array.to_pylist()]
    odd = np.array([v is not None and len(v) % 2 == 1 for v in lists], bool)
    refuse(column, odd, "invalid", "send bucket, count, bucket, count, ...", lambda row: lists[row])
    batch.pairs[column.name] = lists
