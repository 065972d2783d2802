"""Coalescing: one Faust event per many records of a partition, so that Faust's cost per message is one per batch.

`App(ConsumerScheduler=...)` is a documented setting. What is yielded looks like an aiokafka record; its value is the
list of records, its offset the last one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from faust.transport.utils import DefaultSchedulingStrategy
from faust.types import TP


class Batch:
    """Up to N records of one partition in offset order, in the shape of one record."""

    __slots__ = (
        "checksum",
        "headers",
        "key",
        "offset",
        "partition",
        "serialized_key_size",
        "serialized_value_size",
        "timestamp",
        "timestamp_type",
        "topic",
        "value",
    )

    def __init__(self, records: list[Any]) -> None:
        last = records[-1]
        self.topic, self.partition, self.offset = last.topic, last.partition, last.offset
        self.timestamp, self.timestamp_type = last.timestamp, last.timestamp_type
        self.headers: tuple[Any, ...] = ()
        self.key, self.checksum = None, None
        self.serialized_key_size = 0
        self.serialized_value_size = len(records)
        self.value = records


def batches(records: list[Any], records_max: int, bytes_max: int) -> Iterator[Batch]:
    """Cuts a list of records: each batch within both bounds, or of one record that is larger by itself."""
    batch: list[Any] = []
    size = 0
    for record in records:
        length = max(record.serialized_key_size, 0) + max(record.serialized_value_size, 0)
        if batch and (len(batch) >= records_max or size + length > bytes_max):
            yield Batch(batch)
            batch, size = [], 0
        batch.append(record)
        size += length
    if batch:
        yield Batch(batch)


def coalescing(topics: set[str], records_max: int, bytes_max: int) -> type[DefaultSchedulingStrategy]:
    """A scheduler that coalesces the named topics' records and passes others through."""

    class CoalescingScheduler(DefaultSchedulingStrategy):
        def iterate(self, records: Mapping[TP, list[Any]]) -> Iterator[tuple[TP, Any]]:
            cut = {
                tp: list(batches(items, records_max, bytes_max)) if tp.topic in topics else items
                for tp, items in records.items()
            }
            return super().iterate(cut)

    return CoalescingScheduler
