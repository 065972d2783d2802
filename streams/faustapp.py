"""The Faust app of a level, and the few places where we touch what Faust does not offer. Nothing else may.

Why each setting is as it is: measured, see the design's notes on Faust. In short: no tables, no acks, no leader, no web
server, eager small fetches, and a commit of our own that carries metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import aiokafka
import faust
from aiokafka.errors import IllegalStateError
from aiokafka.structs import OffsetAndMetadata, TopicPartition
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from streams.clients import faust_brokers, faust_credentials
from streams.coalesce import coalescing
from streams.settings import Settings

HEARTBEATS_PER_SESSION = 5
FETCH_BYTES_MAX = 4 * 1024 * 1024
BATCH_BYTES_MAX = 256 * 1024
REQUEST_BYTES_MAX = 9 * 1024 * 1024
SEND_TIMEOUT_S = 60.0


def build_app(settings: Settings, level: str, *sources: str, **overrides: Any) -> faust.App:
    """A Faust app whose only sources are these topics (full names), coalesced; `overrides` are Faust settings."""
    make = partial(
        _App,
        broker=faust_brokers(settings),
        broker_credentials=faust_credentials(settings),
        broker_client_id=f"fleetloop-{level}",
        broker_session_timeout=settings.session_timeout_s,
        broker_heartbeat_interval=settings.session_timeout_s / HEARTBEATS_PER_SESSION,
        broker_rebalance_timeout=settings.rebalance_timeout_s,
        ConsumerScheduler=coalescing(set(sources), settings.coalesce_records, settings.coalesce_bytes),
        consumer_auto_offset_reset="earliest",
        consumer_max_fetch_size=FETCH_BYTES_MAX,
        key_serializer="raw",
        value_serializer="raw",
        producer_acks=-1,
        producer_compression_type="lz4",
        producer_linger=settings.producer_linger_ms / 1000,
        producer_max_batch_size=BATCH_BYTES_MAX,
        producer_max_request_size=REQUEST_BYTES_MAX,
        producer_request_timeout=SEND_TIMEOUT_S,
        store="memory://",
        stream_buffer_maxsize=settings.channel_size,
        stream_wait_empty=False,
        stream_publish_on_commit=False,
        table_standby_replicas=0,
        topic_allow_declare=False,
        topic_disable_leader=True,
        web_enabled=False,
    )
    app = make(settings.group(level), **overrides)
    app.finalize()
    app.transport = _Transport(app.conf.broker_consumer, app)
    app.transport.fetch_max_wait_ms = settings.fetch_max_wait_ms
    app.producer.buffer.max_messages = 10_000  # beyond, deliveries wait: bounds results not yet handed over
    return app


class _App(faust.App):
    def _create_directories(self) -> None:
        """We keep no files."""


class _Thread(driver.AIOKafkaConsumerThread):
    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        # Faust fixes 1500 ms. aiokafka asks a broker only for the partitions whose records were taken, so with that
        # a slowly read partition would wait for as long as the others are silent.
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = transport.fetch_max_wait_ms
        consumer._fetch_min_bytes = transport.fetch_min_bytes
        return consumer


class _Consumer(driver.Consumer):
    def _new_consumer_thread(self) -> driver.AIOKafkaConsumerThread:
        return _Thread(self, loop=self.loop, beacon=self.beacon)

    async def seek_to_committed(self) -> Mapping[TP, int]:
        places: Mapping[TP, int] | None = self.transport.places
        if places is None:
            return await super().seek_to_committed()
        mine = {TopicPartition(*tp): places[tp] for tp in self.assignment() if tp in places}
        await self.seek_wait(mine)
        return {TP(*tp): offset for tp, offset in mine.items()}


class _Transport(driver.Transport):
    Consumer = _Consumer
    fetch_max_wait_ms = 50
    fetch_min_bytes = 1
    places: Mapping[TP, int] | None = None


def fetch_at_leisure(app: faust.App, wait_ms: int, min_bytes: int) -> None:
    """Lets the broker gather records for so long, or until there are so many bytes: fewer and larger batches."""
    app.transport.fetch_max_wait_ms, app.transport.fetch_min_bytes = wait_ms, min_bytes


def begin_at(app: faust.App, places: Mapping[TP, int]) -> None:
    """Begins here at every assignment, whatever is committed: for a group that commits nothing.

    Of such a group nothing stays with the brokers: one without members and offsets is removed by them.
    """
    app.transport.places = places


async def commit(app: faust.App, tp: TP, offset: int, metadata: str) -> None:
    """Commits (offset, metadata) for one partition as the group's member that this process is.

    Raises CommitFailedError for a member of an older generation, IllegalStateError for a partition not assigned.
    """
    thread = app.consumer._thread
    await thread.call_thread(
        thread._consumer.commit, {TopicPartition(tp.topic, tp.partition): OffsetAndMetadata(offset, metadata)}
    )


async def commit_and_seek(app: faust.App, tp: TP, offset: int, metadata: str) -> None:
    """Makes an offset the committed one and reads on from there, before Faust itself seeks to what is committed.

    Both, because Faust passes over a committed offset of 0 and then stays where the former commit was.
    """
    await commit(app, tp, offset, metadata)
    await app.consumer.seek(TopicPartition(tp.topic, tp.partition), offset)


def highwater(app: faust.App, tp: TP) -> int | None:
    """Offset after the last record of a partition as of the last fetch; None where not known."""
    try:
        return app.consumer.highwater(tp)
    except (IllegalStateError, AssertionError, AttributeError):  # no longer assigned
        return None
