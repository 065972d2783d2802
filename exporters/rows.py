"""Request rows on their way to request.traces: split so that an id always meets its twin, and sent in batches.

Rows stay columns all the way: a row of Python objects costs more than everything that is done with it here.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from exporters.edge import Edge
from schemas.columns import Batch
from schemas.log import CONTENT_ARROW
from schemas.requests import REQUEST_ROWS
from schemas.topics import REQUEST_TRACES

BATCH_BYTES_MAX = 512 * 1024
"""No record is larger."""
SCHEMA_BYTES = 8 * 1024
"""At most what an Arrow stream of these columns takes beside their values."""
SCHEMA = REQUEST_ROWS.arrow_schema()


def as_arrow(batch: Batch) -> Any:
    """A decoded batch as an Arrow record batch of the kind's schema."""
    arrays = []
    for field in SCHEMA:
        if field.name in batch.codes:
            codes = batch.codes[field.name]
            arrays.append(pa.array(batch.values[field.name], pa.utf8()).take(pa.array(codes, mask=codes < 0)))
            continue
        values = batch.numbers[field.name]
        unknown = np.isnan(values)
        if field.type == pa.int64():
            arrays.append(pa.array(np.where(unknown, 0, values).astype(np.int64), mask=unknown))
        else:
            arrays.append(pa.array(values, mask=unknown))
    return pa.record_batch(arrays, schema=SCHEMA)


def partitions_of(ids: list[str], partitions: int) -> np.ndarray:
    """The partition of each id, int32: as `streams.clients.partition_of`, for ids of the same length all at once."""
    encoded = [id.encode() for id in ids]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    out = np.empty(len(encoded), np.int32)
    for length in np.unique(lengths).tolist():
        chosen = np.flatnonzero(lengths == length)
        data = np.frombuffer(b"".join([encoded[i] for i in chosen.tolist()]), np.uint8).reshape(len(chosen), length)
        out[chosen] = (_murmur2(data) & np.uint32(0x7FFFFFFF)) % np.uint32(partitions)
    return out


def _murmur2(data: np.ndarray) -> np.ndarray:
    """MurmurHash2 of each row of bytes, as Kafka's Java client computes it (org.apache.kafka.common.utils.Utils)."""
    mix, length = np.uint32(0x5BD1E995), data.shape[1]
    whole = length // 4 * 4
    words = np.ascontiguousarray(data[:, :whole]).view("<u4")
    hash = np.full(len(data), 0x9747B28C ^ length, np.uint32)
    for i in range(whole // 4):
        word = words[:, i] * mix
        word ^= word >> np.uint32(24)
        hash = hash * mix ^ word * mix
    if whole < length:
        for i in range(length - whole):
            hash ^= data[:, whole + i].astype(np.uint32) << np.uint32(8 * i)
        hash *= mix
    hash ^= hash >> np.uint32(13)
    hash *= mix
    return np.asarray(hash ^ hash >> np.uint32(15), np.uint32)


class Split(NamedTuple):
    """Rows by partition."""

    parts: list[tuple[int, Any]]
    """(partition, Arrow record batch)."""
    bytes: int
    """What they take."""


class RowBatcher:
    """Gathers rows by partition; `flush` sends them as batches of at most 512 KiB."""

    def __init__(self, edge: Edge, source: str) -> None:
        self.edge, self.source = edge, source
        self.partitions = edge.deployment.partitions[REQUEST_TRACES]
        self._gathered: dict[int, list[Any]] = {}
        self.bytes = 0
        """About what the gathered rows take."""
        self.sent_rows = 0

    def split(self, batch: Batch) -> Split:
        """Rows by partition: murmur2 of their ids, as for a record with the id as key. Fit for another thread."""
        if not batch.rows:
            return Split([], 0)
        places = partitions_of(batch.values["request_id"], self.partitions)[batch.codes["request_id"]]
        order = np.argsort(places, kind="stable")
        rows, places = as_arrow(batch).take(pa.array(order)), places[order]
        starts = np.flatnonzero(np.diff(places, prepend=-1)).tolist()
        ends = [*starts[1:], len(places)]
        parts = [(int(places[a]), rows.slice(a, b - a)) for a, b in zip(starts, ends, strict=True)]
        return Split(parts, rows.nbytes)

    def add(self, rows: Split) -> None:
        """Takes rows."""
        self.bytes += rows.bytes
        for partition, part in rows.parts:
            self._gathered.setdefault(partition, []).append(part)

    def flush(self) -> list[asyncio.Future[bool]]:
        """Hands everything gathered to the producer; gives the acknowledgement of each batch."""
        gathered, self._gathered, self.bytes = self._gathered, {}, 0
        acks: list[asyncio.Future[bool]] = []
        for partition in sorted(gathered):
            rows = pa.Table.from_batches(gathered[partition]).combine_chunks().to_batches()[0]
            pieces = 1 + rows.nbytes // (BATCH_BYTES_MAX - SCHEMA_BYTES)
            step = -(-rows.num_rows // pieces)
            for start in range(0, rows.num_rows, step):
                self._send(partition, rows.slice(start, step), acks)
        return acks

    def _send(self, partition: int, rows: Any, acks: list[asyncio.Future[bool]]) -> None:
        seq, id = self.edge.next_batch()
        meta = {"source": self.source, "start_s": self.edge.start_s, "seq": seq}
        sink = pa.BufferOutputStream()
        schema = REQUEST_ROWS.arrow_schema(meta)
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch(rows.columns, schema=schema))
        value = sink.getvalue().to_pybytes()
        if len(value) > BATCH_BYTES_MAX and rows.num_rows > 1:  # rows of very unlike length
            half = rows.num_rows // 2
            self._send(partition, rows.slice(0, half), acks)
            self._send(partition, rows.slice(half), acks)
            return
        self.sent_rows += rows.num_rows
        acks.append(asyncio.get_running_loop().create_future())
        self.edge.producer.send(
            REQUEST_TRACES,
            rows["request_id"][0].as_py(),
            value,
            type=REQUEST_ROWS.type,
            id=id,
            content_type=CONTENT_ARROW,
            partition=partition,
            ack=acks[-1],
        )
