"""Columnar records: one Kafka record is one batch of rows, as an Arrow IPC stream or as JSON rows.

A kind is a table of columns with unit, bounds and meaning. In memory a measured column is a float64 array in
which NaN is *unknown* (an Arrow null); on the wire NaN and infinity are refused, so the two never mix.
Text columns are dictionary codes (-1 = unknown) into a list of values. Rows that break a bound are refused one
by one and named; the other rows of the batch are taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from schemas.base import MS_LIMIT_S
from schemas.errors import InvalidRecord
from schemas.log import CONTENT_ARROW, CONTENT_JSON
from schemas.rows import ROWS_MAX, TYPES, ArrowRows, Column, JsonRows, Rows, json_rows
from schemas.topics import ce_type

__all__ = ["COLUMNAR", "ROWS_MAX", "TEXT_MAX", "Batch", "Column", "Columns", "RowRefusal"]

TEXT_MAX = 200
BINS_MAX = 2 * 256 + 1
"""Numbers in one cell of bins."""
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


Refuse = Callable[[Column, np.ndarray, str, str], None]


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
    """Per row a histogram, or None = unknown: for `pairs` the flat uint32 (bucket, count, ...), for `bins` the flat
    float64 (upper bound, cumulative count, ..., count of all)."""
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
        self._fields = [pa.field(c.name, TYPES[c.type], nullable=not c.required) for c in columns]
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
        return _stream(pa.record_batch(arrays, schema=self.arrow_schema(meta)))

    def encode_rows(self, rows: Sequence[Mapping[str, Any]], meta: Mapping[str, str] | None = None) -> bytes:
        """As `encode`, from rows: for a few rows less than half the work. None and what is missing become null.

        NaN is refused by who decodes it, and a column that is not of the kind is left out: neither may be given.
        """
        batch = pa.RecordBatch.from_struct_array(pa.array(rows, type=pa.struct(self._fields)))
        return _stream(batch.replace_schema_metadata({"kind": self.kind, **(meta or {})}))

    def decode(self, value: bytes, content_type: str = CONTENT_ARROW) -> Batch:
        """Bytes to the rows that can be taken. Raises InvalidRecord where the record as a whole cannot be."""
        rows: Rows
        if content_type.startswith(CONTENT_JSON):
            if not self.json_too:
                raise InvalidRecord("undecodable", "content-type", content_type, f"send {CONTENT_ARROW}")
            rows, meta = JsonRows(json_rows(value), self.columns), {}
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

    def _check(self, source: Rows, meta: dict[str, str]) -> Batch:
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
            elif column.type == "bins":
                lists = batch.pairs[column.name] = source.lists(column)
                if column.required:
                    absent = np.array([v is None for v in lists], bool)
                    refuse(column, absent, "invalid", "this column is required")
                odd = np.array([v is not None and not _is_cumulative(v) for v in lists], bool)
                refuse(column, odd, "invalid", "send rising upper bounds with cumulative counts, then the count of all")
            elif column.name in measured:
                _judge_numbers(column, batch.numbers[column.name], source.nulls(column), refuse)
        return batch.keep(good)

    def _numbers(self, source: Rows, batch: Batch) -> set[str]:
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


def _stream(batch: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


COLUMNAR: dict[str, Columns] = {}
"""`ce_type` -> columnar kind."""


def _is_cumulative(flat: np.ndarray) -> bool:
    if len(flat) % 2 == 0 or len(flat) > BINS_MAX or not np.isfinite(flat).all():
        return False
    bounds, counts = flat[:-1:2], np.append(flat[1::2], flat[-1])
    rising = bool((np.diff(bounds) > 0).all() and (np.diff(counts) >= 0).all())
    return rising and bool(counts[0] >= 0)


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


def _take_text(batch: Batch, column: Column, source: Rows, refuse: Refuse) -> None:
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
