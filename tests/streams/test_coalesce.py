"""Coalescing changes how records come, never which or in what order."""

from __future__ import annotations

from typing import Any

from aiokafka import ConsumerRecord
from faust.types import TP
from hypothesis import given
from hypothesis import strategies as st

from streams.coalesce import batches, coalescing


def record(topic: str, partition: int, offset: int, size: int) -> ConsumerRecord[Any, Any]:
    return ConsumerRecord(topic, partition, offset, 5, 1, None, b"x" * size, None, 0, size, ())


sizes = st.lists(st.integers(0, 50), max_size=40)


@given(sizes, st.integers(1, 9), st.integers(1, 60))
def test_batches_keep_records_and_bounds(lengths: list[int], records_max: int, bytes_max: int) -> None:
    """Every record once and in order; each batch within both bounds or of a single larger record."""
    records = [record("t", 0, i, n) for i, n in enumerate(lengths)]
    cut = list(batches(records, records_max, bytes_max))
    assert [r for b in cut for r in b.value] == records
    for batch in cut:
        assert 1 <= len(batch.value) <= records_max
        assert len(batch.value) == 1 or sum(r.serialized_value_size for r in batch.value) <= bytes_max
        assert (batch.topic, batch.partition, batch.offset) == ("t", 0, batch.value[-1].offset)


@given(st.dictionaries(st.tuples(st.sampled_from(["source", "other"]), st.integers(0, 3)), sizes, max_size=6))
def test_scheduler_passes_other_topics_through(lengths: dict[tuple[str, int], list[int]]) -> None:
    """Only the named topics are coalesced; order holds within each partition."""
    records = {TP(t, p): [record(t, p, i, n) for i, n in enumerate(ns)] for (t, p), ns in lengths.items()}
    seen: dict[TP, list[Any]] = {tp: [] for tp in records}
    for tp, item in coalescing({"source"}, 5, 100)().iterate(records):
        seen[tp] += item.value if tp.topic == "source" else [item]
    assert seen == records
