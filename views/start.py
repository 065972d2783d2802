"""Where the views begin to read: as far back as current rows and charts need, not at the beginning of all topics."""

from __future__ import annotations

import time

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from faust.types import TP

from schemas.errors import SettingsError
from schemas.topics import AUDIT, DECISIONS, FINDINGS, FLEET_CONFIG
from streams.clients import client_options, unreachable
from streams.settings import Settings

WHOLE = (FLEET_CONFIG, FINDINGS, DECISIONS, AUDIT)
"""Topics read from their beginning (within the bound): what holds now may have been said long ago."""
BACK_S_MIN = 60.0


def first_offset(beginning: int, end: int, at_time: int | None, whole: bool, most: int) -> int:
    """The first offset to read of a partition; `at_time`: of the first record young enough, None for none."""
    wanted = beginning if whole else (end if at_time is None else at_time)
    return max(beginning, wanted, end - most)


async def starts(
    consumer: AIOKafkaConsumer, settings: Settings, topics: list[str], back_s: float, most: int
) -> tuple[dict[TP, int], dict[TP, int]]:
    """(first offset, end) of every partition of the topics (full names). Raises SettingsError for a missing topic."""
    known = await consumer.topics()
    tps = []
    for topic in topics:
        found = topic in known and consumer.partitions_for_topic(topic)
        if not found:
            raise SettingsError(f"{topic}: no such topic: create the topics (`fleetloop init`)")
        tps += [TopicPartition(topic, p) for p in sorted(found)]
    beginnings, ends = await consumer.beginning_offsets(tps), await consumer.end_offsets(tps)
    since_ms = int((time.time() - max(BACK_S_MIN, back_s)) * 1000)
    at = await consumer.offsets_for_times(dict.fromkeys(tps, since_ms))
    whole = {settings.topic(name) for name in WHOLE}
    found_at = {tp: at[tp].offset if at.get(tp) is not None else None for tp in tps}
    first = {TP(*tp): first_offset(beginnings[tp], ends[tp], found_at[tp], tp.topic in whole, most) for tp in tps}
    return first, {TP(*tp): ends[tp] for tp in tps}


async def find_places(
    settings: Settings, topics: list[str], back_s: float, most: int
) -> tuple[dict[TP, int], dict[TP, int]]:
    """(first offset, end) per partition.

    Raises UnavailableError where the broker cannot be reached, SettingsError for a missing topic.
    """
    consumer = AIOKafkaConsumer(*topics, **client_options(settings), enable_auto_commit=False)
    try:
        await consumer.start()
        return await starts(consumer, settings, topics, back_s, most)
    except KafkaError as error:
        raise await unreachable(settings, error) from error
    finally:
        await consumer.stop()
