"""Checkpoints on the wire: (offset, dump), compressed, cut into chunks, and found again.

A checkpoint is one or more records of `checkpoints.<level>` with key `topic/partition`; the group's commit metadata
holds the offset of the first. Chunks of several partitions may interleave; an id in their headers tells them apart,
and a digest proves that the whole is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from aiokafka import AIOKafkaConsumer, TopicPartition

from schemas.errors import CheckpointMismatch
from schemas.topics import ce_type
from streams.reader import header

TYPE = ce_type("checkpoint")
CODEC = "zstd"
CONTENT = "application/octet-stream"
POINTER_VERSION = 1
READ_TIMEOUT_S = 20.0
CHUNKS_MAX = 4096
DUMP_BYTES_MAX = 4 * 1024 * 1024 * 1024


class Checkpoint(NamedTuple):
    """State of a partition after `offset`."""

    topic: str
    """Without prefix."""
    partition: int
    offset: int
    dump: bytes
    position: int
    """Offset of its first record in the checkpoints topic; -1 when not written yet."""


class Chunk(NamedTuple):
    """One record of a checkpoint."""

    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]


def encode(topic: str, partition: int, offset: int, dump: bytes, chunk_bytes: int) -> list[Chunk]:
    """A checkpoint as records, each with at most `chunk_bytes` of compressed state."""
    packed = bytes(pa.compress(dump, codec=CODEC, asbytes=True)) if dump else b""
    digest = hashlib.sha256(dump).hexdigest()
    pieces = [packed[i : i + chunk_bytes] for i in range(0, len(packed), chunk_bytes)] or [b""]
    chunks = []
    for number, piece in enumerate(pieces):
        meta = {
            "ce_specversion": "1.0",
            "ce_type": TYPE,
            "ce_id": f"{topic}/{partition}@{offset}#{number}/{len(pieces)}",
            "ce_source": f"{topic}/{partition}",
            "content-type": CONTENT,
            "offset": str(offset),
            "chunk": f"{number}/{len(pieces)}",
            "codec": CODEC,
            "dump_bytes": str(len(dump)),
            "dump_sha256": digest,
        }
        headers = [(name, value.encode()) for name, value in meta.items()]
        chunks.append(Chunk(f"{topic}/{partition}".encode(), piece, headers))
    return chunks


def decode(records: Sequence[Any]) -> Checkpoint:
    """A checkpoint from all of its records, in order. Raises CheckpointMismatch where something is amiss."""
    first = records[0]
    topic, _, partition = (first.key or b"").decode("utf-8", "replace").rpartition("/")
    packed = b"".join(r.value or b"" for r in records)
    try:
        size, offset = int(header(first, "dump_bytes")), int(header(first, "offset"))
        codec = header(first, "codec")
        if not 0 <= size <= DUMP_BYTES_MAX:
            raise ValueError(f"claims {size} bytes, at most {DUMP_BYTES_MAX} are taken")
        dump = bytes(pa.decompress(packed, size, codec=codec, asbytes=True)) if size else b""
        number = int(partition)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise CheckpointMismatch(f"checkpoint at {first.offset}: not readable: {error}") from error
    if hashlib.sha256(dump).hexdigest() != header(first, "dump_sha256"):
        raise CheckpointMismatch(f"checkpoint at {first.offset}: digest differs")
    return Checkpoint(topic, number, offset, dump, first.offset)


def chunk_of(record: Any) -> tuple[int, int] | None:
    """(number, count) of a checkpoint record, None for what is none."""
    number, _, count = header(record, "chunk").partition("/")
    if header(record, "ce_type") != TYPE or not (number.isdigit() and count.isdigit()):
        return None
    return (int(number), int(count)) if int(number) < int(count) <= CHUNKS_MAX else None


def pointer(position: int) -> str:
    """Commit metadata that points at a checkpoint."""
    return json.dumps({"v": POINTER_VERSION, "at": position}, separators=(",", ":"))


def parse_pointer(metadata: str | None) -> int | None:
    """Position of the checkpoint that commit metadata points at; None when it does not."""
    try:
        data = json.loads(metadata or "")
        return int(data["at"]) if data["v"] == POINTER_VERSION else None
    except (ValueError, KeyError, TypeError):
        return None


class Collector:
    """Puts checkpoints together from the records of the topic, chunks of several partitions interleaved.

    Holds one unfinished checkpoint per key: a later first chunk replaces it (its writer died or was overtaken).
    """

    def __init__(self) -> None:
        self._open: dict[tuple[bytes, str], list[Any]] = {}

    def add(self, record: Any) -> Checkpoint | None:
        """Takes a record; gives the checkpoint that it completes."""
        place = chunk_of(record)
        if place is None or not record.key:
            return None
        number, count = place
        name = (record.key, header(record, "ce_id").rpartition("#")[0])
        if number == 0:
            for stale in [k for k in self._open if k[0] == record.key]:
                del self._open[stale]
            self._open[name] = []
        parts = self._open.get(name)
        if parts is None or len(parts) != number:
            return None
        parts.append(record)
        if len(parts) < count:
            return None
        del self._open[name]
        return decode(parts)


async def read_at(consumer: AIOKafkaConsumer, tp: TopicPartition, position: int) -> Checkpoint | None:
    """The checkpoint whose first record is at `position`; None when it is gone or incomplete.

    `consumer` must have `tp` assigned. Raises CheckpointMismatch where its bytes are not what they say.
    """
    ends = await consumer.end_offsets([tp])
    begin = await consumer.beginning_offsets([tp])
    if not begin[tp] <= position < ends[tp]:
        return None
    consumer.seek(tp, position)
    wanted: list[Any] = []
    while await consumer.position(tp) < ends[tp]:
        for records in (await consumer.getmany(tp, timeout_ms=500, max_records=64)).values():
            for record in records:
                place = chunk_of(record)
                if not wanted and (record.offset != position or place is None or place[0] != 0):
                    return None
                if wanted and not _follows(wanted, record):
                    continue
                wanted.append(record)
                if place is not None and len(wanted) == place[1]:
                    return decode(wanted)
    return None


def _follows(wanted: list[Any], record: Any) -> bool:
    place = chunk_of(record)
    return (
        record.key == wanted[0].key
        and place is not None
        and place[0] == len(wanted)
        and header(record, "ce_id").rpartition("#")[0] == header(wanted[0], "ce_id").rpartition("#")[0]
    )


async def newest(
    consumer: AIOKafkaConsumer,
    tp: TopicPartition,
    keys: set[tuple[str, int]],
    until: dict[tuple[str, int], int] | None = None,
) -> dict[tuple[str, int], Checkpoint]:
    """(topic, partition) -> its newest whole checkpoint in the topic, at or before `until` where given.

    Reads the topic from its beginning: for the rare case that the group's offsets are gone, and for replay.
    """
    found: dict[tuple[str, int], Checkpoint] = {}
    collector = Collector()
    end = (await consumer.end_offsets([tp]))[tp]
    await consumer.seek_to_beginning(tp)
    while await consumer.position(tp) < end:
        for records in (await consumer.getmany(tp, timeout_ms=500, max_records=64)).values():
            for record in records:
                checkpoint = collector.add(record)
                if checkpoint is None:
                    continue
                name = (checkpoint.topic, checkpoint.partition)
                bound = (until or {}).get(name)
                if name in keys and (bound is None or checkpoint.offset <= bound):
                    found[name] = checkpoint
    return found
