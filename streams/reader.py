"""Reading a topic without a group: from its beginning or given offsets to its present end, or on and on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaConnectionError

from schemas.errors import SettingsError
from schemas.log import CONTENT_JSON, LogRecord
from streams.clients import plain_consumer, unreachable
from streams.settings import PREFIX, Settings


class LogReader:
    """Reads partitions of one topic; an async context manager.

    Parameters
    ----------
    topic: name in the registry, without prefix.
    partitions: which; all of them by default.
    start: partition -> first offset wanted; missing ones begin at the beginning.
    """

    def __init__(
        self,
        settings: Settings,
        topic: str,
        *,
        partitions: list[int] | None = None,
        start: Mapping[int, int] | None = None,
    ) -> None:
        self.settings, self.topic, self.start = settings, settings.topic(topic), dict(start or {})
        self.partitions = partitions
        self._consumer = plain_consumer(settings)

    async def __aenter__(self) -> LogReader:
        consumer = self._consumer
        try:
            await consumer.start()
        except KafkaConnectionError as error:
            await consumer.stop()
            raise await unreachable(self.settings, error) from error
        except BaseException:  # also cancelled: a client that was begun must be ended
            await consumer.stop()
            raise
        try:
            known = await self._known_partitions()
            self._tps = [
                TopicPartition(self.topic, p) for p in (self.partitions if self.partitions is not None else known)
            ]
            consumer.assign(self._tps)
            self.beginnings: dict[int, int] = {
                tp.partition: offset for tp, offset in (await consumer.beginning_offsets(self._tps)).items()
            }
            self.positions = {p: max(first, self.start.get(p, first)) for p, first in self.beginnings.items()}
            for tp in self._tps:
                consumer.seek(tp, self.positions[tp.partition])
        except BaseException:
            await consumer.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.stop()

    async def _known_partitions(self) -> list[int]:
        deadline = asyncio.get_running_loop().time() + 5.0
        while True:
            # Not `consumer.topics()`: it asks for all metadata as well, but keeps the partitions to itself.
            found = (await self._consumer._client.fetch_all_metadata()).partitions_for_topic(self.topic)
            if found:
                return sorted(found)
            if asyncio.get_running_loop().time() > deadline:
                raise SettingsError(
                    f"{self.topic}: no such topic: create the topics (`fleetloop init`), mend {PREFIX}TOPIC_PREFIX, "
                    "or allow this user to read it"
                )
            await asyncio.sleep(0.1)

    async def ends(self) -> dict[int, int]:
        """Partition -> offset after its last record."""
        return {tp.partition: o for tp, o in (await self._consumer.end_offsets(self._tps)).items()}

    async def to_end(self, ends: Mapping[int, int] | None = None) -> AsyncIterator[ConsumerRecord[Any, Any]]:
        """Records up to `ends` (exclusive; by default the present ends). Order holds within a partition."""
        bounds = dict(ends) if ends is not None else await self.ends()
        waiting = {p for p, end in bounds.items() if self.positions[p] < end}
        while waiting:
            got = await self._consumer.getmany(timeout_ms=200)
            for tp, records in got.items():
                for record in records:
                    if record.offset < bounds.get(tp.partition, 0):
                        yield record
            for tp in self._tps:
                # Also without records: compaction and markers leave offsets that hold none.
                self.positions[tp.partition] = await self._consumer.position(tp)
                if self.positions[tp.partition] >= bounds.get(tp.partition, 0):
                    waiting.discard(tp.partition)

    async def follow(self, timeout_s: float = 0.2) -> AsyncIterator[list[ConsumerRecord[Any, Any]]]:
        """Batches as they come, for ever; an empty one each `timeout_s` without records, so that timers can run."""
        while True:
            got = await self._consumer.getmany(timeout_ms=int(timeout_s * 1000))
            batch = [r for records in got.values() for r in records]
            for record in batch:
                self.positions[record.partition] = record.offset + 1
            yield batch


async def read_to_end(
    settings: Settings,
    topic: str,
    *,
    partitions: list[int] | None = None,
    start: Mapping[int, int] | None = None,
) -> AsyncIterator[ConsumerRecord[Any, Any]]:
    """Every record of a topic from its beginning (or `start`) to its present end."""
    async with LogReader(settings, topic, partitions=partitions, start=start) as reader:
        async for record in reader.to_end():
            yield record


def header(record: Any, name: str) -> str:
    """The last header of a name as text; empty when missing."""
    for key, value in reversed(record.headers or ()):
        if key == name:
            return value.decode("utf-8", "replace") if value else ""
    return ""


def log_record(record: Any, at_ms: int) -> LogRecord:
    """A Kafka record as a fold sees it; `at_ms` is its log time."""
    kind = content = id = ""
    for name, value in record.headers or ():
        if name == "ce_id":
            id = value.decode("utf-8", "replace") if value else ""
        elif name == "ce_type":
            kind = value.decode("utf-8", "replace") if value else ""
        elif name == "content-type":
            content = value.decode("utf-8", "replace") if value else ""
    key = record.key.decode("utf-8", "replace") if record.key else ""
    return LogRecord(record.offset, at_ms, kind, key, record.value or b"", content or CONTENT_JSON, id)
