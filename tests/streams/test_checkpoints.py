"""Checkpoints on the wire: what is put together again is what was cut, or nothing."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from aiokafka import ConsumerRecord
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import CheckpointMismatch
from streams.checkpoints import Chunk, Collector, decode, encode, parse_pointer, pointer

dumps = st.binary(max_size=3000)


def as_records(chunks: list[Chunk], first: int = 0) -> list[ConsumerRecord[Any, Any]]:
    return [
        ConsumerRecord("c", 0, first + i, 0, 1, c.key, c.value, None, 0, len(c.value), tuple(c.headers))
        for i, c in enumerate(chunks)
    ]


@given(dumps, st.integers(1, 500), st.integers(0, 2**40))
def test_round_trip(dump: bytes, chunk_bytes: int, offset: int) -> None:
    """Encoded and decoded, a checkpoint is the same, however it is cut."""
    chunks = encode("node.samples", 3, offset, dump, chunk_bytes)
    assert all(len(c.value) <= chunk_bytes for c in chunks)
    got = decode(as_records(chunks, first=9))
    assert got == ("node.samples", 3, offset, dump, 9)


@given(st.lists(st.tuples(st.integers(0, 2), dumps), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_interleaved_chunks(parts: list[tuple[int, bytes]], random: Any) -> None:
    """Chunks of several partitions may interleave; a writer that died leaves no trace."""
    queues = [as_records(encode("t", partition, number, dump, 64)) for number, (partition, dump) in enumerate(parts)]
    by_partition: dict[int, list[Any]] = {}
    for (partition, _), chunks in zip(parts, queues, strict=True):
        by_partition.setdefault(partition, []).extend([*chunks[:-1], *chunks])  # began, died, began again
    collector, found = Collector(), []
    while by_partition:
        partition = random.choice(sorted(by_partition))
        whole = collector.add(by_partition[partition].pop(0))
        if whole is not None:
            found.append((whole.partition, whole.offset, whole.dump))
        if not by_partition[partition]:
            del by_partition[partition]
    # A checkpoint of one chunk has no unfinished form.
    assert sorted(set(found)) == sorted((p, number, dump) for number, (p, dump) in enumerate(parts))


@given(st.binary(min_size=1, max_size=300), st.data())
def test_damage_is_refused(dump: bytes, data: st.DataObject) -> None:
    """Bytes that are not what the digest says never become a state."""
    [chunk] = encode("t", 0, 1, dump, 10_000)
    at = data.draw(st.integers(0, len(chunk.value) - 1))
    damaged = bytearray(chunk.value)
    damaged[at] ^= data.draw(st.integers(1, 255))
    with suppress(CheckpointMismatch):
        assert decode(as_records([chunk._replace(value=bytes(damaged))])).dump == dump


def test_pointer() -> None:
    """Commit metadata names a position; anything else names none."""
    assert parse_pointer(pointer(17)) == 17
    for other in (None, "", "17", "{}", '{"v":2,"at":1}', '{"v":1}', "[1]", "null"):
        assert parse_pointer(other) is None


def test_other_records_are_no_checkpoints() -> None:
    """Records without our headers are passed over."""
    stray = ConsumerRecord("c", 0, 0, 0, 1, b"t/0", b"x", None, 0, 1, (("chunk", b"0/1"),))
    assert Collector().add(stray) is None
    with pytest.raises(CheckpointMismatch):
        decode([stray])
