"""`python -m tests.integration.once LEVEL PARTITION=END ...`: a level's fold run once over its log, from offset 0.

Writes every result's [topic, type, id, sha256 of its bytes], one JSON line each. In a process of its own, so that the
tests beside it go on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys

from agents import make_fold
from schemas.topics import LEVEL_TOPIC
from streams.deployment import read_deployment
from streams.reader import LogReader, log_record
from streams.settings import Settings, load_settings


async def fold(settings: Settings, level: str, partition: int, end: int) -> None:
    deployment = await read_deployment(settings)
    topic = LEVEL_TOPIC[level]
    state = make_fold(level, topic, partition, dict(deployment.partitions))
    async with LogReader(settings, topic, partitions=[partition]) as reader:
        assert reader.positions == {partition: 0}, "the log has lost its beginning"
        async for record in reader.to_end({partition: end}):
            for result in state.apply([log_record(record, deployment.log_ms(record.timestamp))]):
                content = hashlib.sha256(result.value).hexdigest()
                print(json.dumps([f"{topic}/{partition}", result.topic, result.type, result.id, content]))


async def main(level: str, *ends: str) -> None:
    settings = load_settings()
    for item in ends:
        partition, _, end = item.partition("=")
        await fold(settings, level, int(partition), int(end))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
