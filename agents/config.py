"""The config agent: copies every object of `fleet.config` into every partition of the four logs.

No fold: nothing is computed and nothing kept. The topic is small and compacted, so whoever owns its one partition
reads it from the beginning; the group only sees to it that one process does. Copies are upserts by revision: sending
them again at every start, and every 10 minutes, does no harm and reaches folds that began without a checkpoint.
"""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from schemas.base import decode
from schemas.config import ConfigObject, Deployment
from schemas.deadletters import DeadLetter, dead_data
from schemas.errors import InvalidRecord
from schemas.topics import DEAD_LETTERS, FLEET_CONFIG, LEVEL_TOPIC, ce_type
from streams.clients import client_options
from streams.health import HealthServer
from streams.producer import EdgeProducer
from streams.reader import log_record
from streams.settings import Settings
from streams.watchdog import Watchdog

log = structlog.get_logger(__name__)

RESEND_S = 600.0
POLL_MS = 200
ROOM_WAIT_S = 1.0
OBJECTS_MAX = 100_000
STALL_S = 60.0
CONFIG = ce_type(ConfigObject.kind)


class ConfigAgent:
    """Owns `fleet.config` for the deployment, as one of a group."""

    def __init__(self, settings: Settings, deployment: Deployment) -> None:
        self.settings, self.deployment = settings, deployment
        self.targets = [
            (topic, partition)
            for level, topic in LEVEL_TOPIC.items()
            if level != "config"
            for partition in range(deployment.partitions[topic])
        ]
        self.objects: dict[str, ConfigObject] = {}
        self.overflows = 0
        self.producer = EdgeProducer(settings, FLEET_CONFIG)
        self.alive_at = time.monotonic()
        self.joined = self.assigned = False
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Begins to stop."""
        self._stopping.set()

    def take(self, record: Any) -> None:
        """One record of `fleet.config`: copied if it is newer than what is known, dead-lettered if it is none."""
        if not record.value:
            return  # a tombstone: objects are removed by `deleted`, which carries a revision
        try:
            item = decode(ConfigObject, record.value)
        except InvalidRecord as error:
            self._refuse(record, error)
            return
        known = self.objects.get(item.key)
        if known is not None and known.revision >= item.revision:
            return
        if known is None and len(self.objects) >= OBJECTS_MAX:
            self.overflows += 1
            log.error("too many objects of configuration", key=item.key, limit=OBJECTS_MAX)
            return
        self.objects[item.key] = item
        self.copy(item)

    def copy(self, item: ConfigObject) -> None:
        """Sends one object to every partition of the four logs."""
        for topic, partition in self.targets:
            self.producer.send(
                topic, item.key, item.encode(), type=CONFIG, id=f"{item.key}@{item.revision}", partition=partition
            )

    def _refuse(self, record: Any, error: InvalidRecord) -> None:
        at_ms = self.deployment.log_ms(record.timestamp)
        seen = log_record(record, at_ms)
        letter = DeadLetter(
            topic=FLEET_CONFIG,
            partition=record.partition,
            offset=record.offset,
            at_s=max(0.0, at_ms / 1000),
            type=seen.type,
            reason=error.reason,  # type: ignore[arg-type]
            field=error.field,
            value=error.value,
            remedy=error.remedy,
            **dead_data(record.value),  # type: ignore[arg-type]
        )
        name = f"{FLEET_CONFIG}/{record.partition}/{record.offset}"
        self.producer.send(DEAD_LETTERS, name, letter.encode(), type=ce_type(letter.kind), id=name, at_ms=at_ms)
        log.warning("object of configuration refused", offset=record.offset, error=str(error))

    async def _own(self, consumer: AIOKafkaConsumer) -> None:
        owned: frozenset[Any] = frozenset()
        sent_at = time.monotonic()
        while not self._stopping.is_set():
            got = await consumer.getmany(timeout_ms=POLL_MS)
            self.joined = True
            self.alive_at = time.monotonic()
            now_owned = frozenset(consumer.assignment())
            self.assigned = bool(now_owned)
            if now_owned != owned:
                owned, self.objects, sent_at = now_owned, {}, time.monotonic()
                if owned:
                    await consumer.seek_to_beginning(*owned)
                continue
            for records in got.values():
                for record in records:
                    await self._room()
                    self.take(record)
            if time.monotonic() - sent_at >= RESEND_S:
                sent_at = time.monotonic()
                for item in list(self.objects.values()):
                    await self._room()
                    self.copy(item)

    async def _room(self) -> None:
        """Waits for room for one object's copies: a full buffer would drop the oldest, and a fold go without it."""
        while not self._stopping.is_set():
            self.alive_at = time.monotonic()
            try:
                async with asyncio.timeout(ROOM_WAIT_S):
                    return await self.producer.room()
            except TimeoutError:  # an outage: the process is alive
                continue

    def _unhealthy(self) -> str:
        silent = time.monotonic() - self.alive_at
        return f"loop silent for {silent:.0f} s" if silent > STALL_S else ""

    def _ready(self) -> list[str]:
        return [] if self.producer.connected else ["not connected"]

    async def run(self) -> int:
        """Until SIGTERM or SIGINT; 1 when it ended by an error."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        health = HealthServer(
            self.settings.web_host, self.settings.health_port_of("config"), self._unhealthy, self._ready
        )
        watchdog = Watchdog(self._unhealthy)
        consumer = AIOKafkaConsumer(
            self.settings.topic(FLEET_CONFIG),
            **client_options(self.settings),
            group_id=self.settings.group("config"),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=int(self.settings.session_timeout_s * 1000),
            heartbeat_interval_ms=int(self.settings.session_timeout_s * 200),
        )
        health.start()
        watchdog.start()
        status = 0
        try:
            await self.producer.start()
            await consumer.start()
            log.info("starting", health_port=health.port, targets=len(self.targets))
            await self._own(consumer)
        except KafkaError:
            log.exception("crashed")
            status = 1
        watchdog.expect_end(self.settings.stop_timeout_s)
        await consumer.stop()
        await self.producer.stop()
        health.stop()
        watchdog.done()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        log.info("ended")
        return status
