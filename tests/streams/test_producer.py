"""The edge producer holds what it takes, within a bound, until the broker has it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given
from hypothesis import strategies as st

from schemas.topics import NODE_SAMPLES, TOPICS
from streams.broker import LocalBroker
from streams.clients import partition_of
from streams.deployment import ensure_deployment
from streams.producer import EdgeProducer, rfc3339
from streams.reader import header, read_to_end
from streams.settings import load_settings

NOWHERE = "127.0.0.1:1"


async def test_full_buffer_drops_the_oldest_and_counts(
    own_broker: Callable[[], LocalBroker], topic_prefix: str
) -> None:
    """Through an outage the newest records are kept within the bound, the dropped ones counted, order kept."""
    broker = own_broker()
    settings = load_settings(
        bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix, edge_buffer_bytes=65536
    )
    await ensure_deployment(settings, local=True)
    broker.kill()
    async with EdgeProducer(settings, "test") as producer:
        for i in range(1000):
            producer.send(NODE_SAMPLES, "k", json.dumps({"i": i}).ljust(300).encode(), type="x", id=str(i))
        assert producer.buffered_bytes <= 65536
        assert not await producer.flush(0.3)
        dropped = producer.dropped[NODE_SAMPLES]
        assert 0 < dropped < 1000
        broker.restart()
        assert await producer.flush(60)
        assert producer.acked[NODE_SAMPLES] == 1000 - dropped
        assert producer.dropped[NODE_SAMPLES] == dropped
    ids = [header(r, "ce_id") async for r in read_to_end(settings, NODE_SAMPLES)]
    assert list(dict.fromkeys(ids)) == [str(i) for i in range(dropped, 1000)]


async def test_a_sender_learns_how_each_record_ended(own_broker: Callable[[], LocalBroker], topic_prefix: str) -> None:
    """An acknowledgement is True when the broker has the record, False when it was dropped or the producer stopped."""
    broker = own_broker()
    settings = load_settings(
        bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix, edge_buffer_bytes=65536
    )
    await ensure_deployment(settings, local=True)
    loop = asyncio.get_running_loop()
    acks: list[asyncio.Future[bool]] = []

    def send(count: int) -> None:
        for _ in range(count):
            acks.append(loop.create_future())
            producer.send(NODE_SAMPLES, "k", b"x" * 300, type="x", id=str(len(acks) - 1), ack=acks[-1])

    async with EdgeProducer(settings, "test") as producer:
        send(10)
        assert await asyncio.gather(*acks) == [True] * 10
        broker.kill()
        send(1000)
        dropped = producer.dropped[NODE_SAMPLES]
        assert 0 < dropped == sum(a.done() and not a.result() for a in acks)
        broker.restart()
        assert await producer.flush(60)
        assert producer.acked[NODE_SAMPLES] == sum(a.result() for a in acks) == 1010 - dropped
    ids = {int(header(r, "ce_id")) async for r in read_to_end(settings, NODE_SAMPLES)}
    assert ids == {i for i, ack in enumerate(acks) if ack.result()}


async def test_what_a_stop_leaves_was_not_acknowledged() -> None:
    """Who waits for an acknowledgement is told when the producer stops without the broker."""
    producer = EdgeProducer(load_settings(bootstrap_servers=NOWHERE), "test")
    ack: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    await producer.start()
    producer.send(NODE_SAMPLES, "k", b"x", type="x", id="1", ack=ack)
    assert not await producer.stop(0.1)
    assert ack.result() is False


async def test_too_large_is_refused() -> None:
    """A record that its topic would never take is the caller's error, not an endless retry."""
    producer = EdgeProducer(load_settings(bootstrap_servers=NOWHERE), "test")
    with pytest.raises(ValueError, match=NODE_SAMPLES):
        producer.send(NODE_SAMPLES, "k", b"x" * TOPICS[NODE_SAMPLES].max_message_bytes, type="x", id="1")
    assert producer.refused[NODE_SAMPLES] == 1
    assert producer.buffered_bytes == 0


@given(st.binary(min_size=1, max_size=40), st.integers(1, 64))
def test_partition_is_kafkas(key: bytes, partitions: int) -> None:
    """A key has the partition that the default partitioner gives it."""
    everyone = list(range(partitions))
    assert partition_of(key, partitions) == DefaultPartitioner()(key, everyone, everyone)


def test_time_format() -> None:
    """ce_time is RFC 3339 in UTC with milliseconds."""
    assert rfc3339(0) == "1970-01-01T00:00:00.000Z"
    assert rfc3339(1_700_000_000_123) == "2023-11-14T22:13:20.123Z"
