"""Request rows on their way to request.traces: split so that an id always meets its twin, and sent in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from exporters.edge import Edge
from schemas.columns import Batch
from schemas.log import CONTENT_ARROW
from schemas.requests import REQUEST_ROWS
from schemas.topics import REQUEST_TRACES
from streams.clients import partition_of

BATCH_BYTES_MAX = 512 * 1024
"""No record is larger."""
ROW_BYTES_FIXED = 14 * 9 + 64
"""A row without its texts: 8 bytes and a validity byte a column, and what the texts' offsets take."""

_NAMES = list(REQUEST_ROWS.columns)
_TEXTS = [i for i, c in enumerate(REQUEST_ROWS.columns.values()) if c.type == "text"]
_ID = _NAMES.index("request_id")
Row = tuple[Any, ...]
"""Cells in the order of REQUEST_ROWS; None = unknown."""


def as_rows(batch: Batch) -> Iterator[Row]:
    """The rows of a decoded batch."""
    columns: list[list[Any]] = []
    for name, column in REQUEST_ROWS.columns.items():
        if column.type == "text":
            columns.append(list(batch.text(name)))
        else:
            columns.append([None if math.isnan(v) else v for v in batch.numbers[name].tolist()])
    return zip(*columns, strict=True)


class RowBatcher:
    """Gathers rows by partition; `flush` sends them as batches of at most 512 KiB."""

    def __init__(self, edge: Edge, source: str) -> None:
        self.edge, self.source = edge, source
        self.partitions = edge.deployment.partitions[REQUEST_TRACES]
        self._rows: dict[int, list[Row]] = {}
        self.bytes = 0
        """About what the gathered rows take."""
        self.sent_rows = 0

    def add(self, row: Row) -> None:
        """Takes a row. Its partition is murmur2 of its id, as for a record with the id as key."""
        partition = partition_of(row[_ID].encode(), self.partitions)
        self._rows.setdefault(partition, []).append(row)
        self.bytes += row_bytes(row)

    def flush(self) -> None:
        """Hands everything gathered to the producer."""
        gathered, self._rows, self.bytes = self._rows, {}, 0
        for partition in sorted(gathered):
            for chunk in _chunks(gathered[partition]):
                self._send(partition, chunk)

    def _send(self, partition: int, rows: list[Row]) -> None:
        seq, id = self.edge.next_batch()
        meta = {"source": self.source, "start_s": self.edge.start_s, "seq": seq}
        value = REQUEST_ROWS.encode(dict(zip(_NAMES, map(list, zip(*rows, strict=True)), strict=True)), meta)
        if len(value) > BATCH_BYTES_MAX and len(rows) > 1:  # an estimate was wrong
            self._send(partition, rows[: len(rows) // 2])
            self._send(partition, rows[len(rows) // 2 :])
            return
        self.sent_rows += len(rows)
        self.edge.producer.send(
            REQUEST_TRACES,
            rows[0][_ID],
            value,
            type=REQUEST_ROWS.type,
            id=id,
            content_type=CONTENT_ARROW,
            partition=partition,
        )


def row_bytes(row: Row) -> int:
    """At most what a row takes in a batch, bytes."""
    return ROW_BYTES_FIXED + sum(4 * len(row[i]) for i in _TEXTS if row[i])


def _chunks(rows: list[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    size = 4096
    for row in rows:
        size += row_bytes(row)
        if size > BATCH_BYTES_MAX and chunk:
            yield chunk
            chunk, size = [], 4096 + row_bytes(row)
        chunk.append(row)
    yield chunk
