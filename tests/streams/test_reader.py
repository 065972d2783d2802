"""Reading a topic to its end, and records as folds see them."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.admin import RecordsToDelete

from schemas.errors import SettingsError
from schemas.log import CONTENT_JSON, LogRecord
from schemas.topics import FINDINGS
from streams.broker import LocalBroker
from streams.clients import admin_client
from streams.deployment import ensure_deployment
from streams.producer import EdgeProducer
from streams.reader import LogReader, header, log_record, read_to_end
from streams.settings import Settings, load_settings


@pytest.fixture
async def settings(broker: LocalBroker, topic_prefix: str) -> Settings:
    made = load_settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix)
    await ensure_deployment(made, local=True)
    return made


async def fill(settings: Settings, numbers: range) -> None:
    async with EdgeProducer(settings, "test") as producer:
        for i in numbers:
            producer.send(FINDINGS, "k", str(i).encode(), type="x", id=str(i), partition=i % 2)
        assert await producer.flush(60)


async def test_reads_from_anywhere_to_the_end(settings: Settings) -> None:
    """From the beginning, from an offset, of some partitions, after retention: each record once, order kept."""
    assert [r async for r in read_to_end(settings, FINDINGS)] == []
    await fill(settings, range(20))
    every = [r async for r in read_to_end(settings, FINDINGS)]
    assert sorted(int(r.value) for r in every) == list(range(20))
    assert [int(r.value) for r in every if r.partition == 1] == list(range(1, 20, 2))
    some = [int(r.value) async for r in read_to_end(settings, FINDINGS, partitions=[1], start={1: 7})]
    assert some == [15, 17, 19]
    admin = admin_client(settings)
    await admin.start()
    try:
        tp = TopicPartition(settings.topic(FINDINGS), 0)
        await admin.delete_records({tp: RecordsToDelete(before_offset=8)})
    finally:
        await admin.close()
    late = [int(r.value) async for r in read_to_end(settings, FINDINGS, partitions=[0], start={0: 2})]
    assert late == [16, 18]


async def test_follows(settings: Settings) -> None:
    """What comes later is given as it comes, and silence as empty batches."""
    got: list[int] = []
    silences = 0
    async with LogReader(settings, FINDINGS) as reader, asyncio.timeout(60):
        async for batch in reader.follow(0.05):
            got += [int(r.value) for r in batch]
            silences += not batch
            if silences == 2 and not got:
                await fill(settings, range(5))
            if len(got) == 5:
                break
        assert sum(reader.positions.values()) == 5
    assert sorted(got) == list(range(5))


async def test_unknown_topic(settings: Settings) -> None:
    """A topic that is not there is an error that tells what to do, not an endless wait."""
    with pytest.raises(SettingsError, match="no such topic"):
        async with LogReader(settings, "nothing"):
            pass


def test_record_as_folds_see_it() -> None:
    """Missing headers, keys and values are empty, wrong bytes are replaced, the last header of a name counts."""
    bare = ConsumerRecord("t", 0, 5, 9, 1, None, None, None, 0, 0, ())
    assert log_record(bare, 77) == LogRecord(5, 77, "", "", b"", CONTENT_JSON)
    headers = (("ce_type", b"a"), ("ce_type", b"b\xff"), ("content-type", b"x/y"), ("other", None))
    full = ConsumerRecord("t", 0, 5, 9, 1, b"k\xff", b"v", None, 0, 0, headers)
    assert log_record(full, 77) == LogRecord(5, 77, "b\ufffd", "k\ufffd", b"v", "x/y")
    assert header(full, "ce_type") == "b\ufffd"
    assert header(full, "other") == header(full, "none") == ""
