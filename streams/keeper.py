"""The keeper: folds the records of a level's partitions and moves (offset, state) forward as one.

Folding is one synchronous step: fold, hand over the results, set `applied`. So whenever anything else runs, state,
offset and results on their way belong together. What cannot go that way is repaired beside it (`streams.repairs`);
what is written and taken over is the vault's (`streams.vault`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import faust
import structlog
from faust.types import TP

from schemas.config import Deployment
from schemas.log import Fold, LogRecord, Result
from schemas.topics import DEAD_LETTERS, TOPICS
from streams.letters import too_large
from streams.partition import Outcome, PartitionState, newer
from streams.producer import ce_headers
from streams.reader import log_record
from streams.repairs import Repairs
from streams.settings import Settings
from streams.vault import Vault

log = structlog.get_logger(__name__)

MakeFold = Callable[[str, int, dict[str, int]], Fold]
HEADROOM_BYTES = 1024
"""Left for headers and framing of a result within its topic's limit."""


class Keeper:
    """All partitions of one level in this process.

    Parameters
    ----------
    make_fold: (topic, partition, partitions of every topic) -> a fresh fold.
    """

    def __init__(
        self,
        level: str,
        topic: str,
        app: faust.App,
        settings: Settings,
        deployment: Deployment,
        make_fold: MakeFold,
    ) -> None:
        self.level, self.topic, self.app = level, topic, app
        self.settings, self.deployment = settings, deployment
        self.source = settings.topic(topic)
        self.states: dict[TP, PartitionState] = {}
        self.repairs, self.vault = Repairs(self), Vault(self)
        self._make_fold = make_fold
        self._channels: dict[str, Any] = {}

    def fresh(self, partition: int) -> Fold:
        """A fold that has seen nothing."""
        return self._make_fold(self.topic, partition, dict(self.deployment.partitions))

    async def take(self, records: list[Any]) -> None:
        """One coalesced batch of one partition. Returns without a wait unless the partition is being repaired."""
        state = self.states.get(TP(records[0].topic, records[0].partition))
        if state is None or state.stopped:
            return
        state.arrived_at = time.monotonic()
        if state.repair is not None:
            await state.queue.put(records)
            ended = state.repair is None and not state.queue.empty()
            if ended and self.states.get(state.tp) is state:  # the repair ended while this waited, by itself
                self.repairs.start(state)
            return
        outcome = self.step(state, records)
        if outcome is not Outcome.DONE:
            self.repairs.start(state, self.repairs.handle(state, records, outcome))

    def step(self, state: PartitionState, records: list[Any]) -> Outcome:
        """The synchronous step. After HOLE nothing has changed; after RAISED the fold is in no known state."""
        records = newer(records, state.applied)
        if not records:
            return Outcome.DONE
        if records[0].offset > state.applied + 1:
            return Outcome.HOLE
        began = time.perf_counter()
        try:
            results = state.fold.apply([self.log_record(r) for r in records])
        except Exception as error:
            log.error("fold raised", app=self.level, partition=state.partition, error=repr(error))
            return Outcome.RAISED
        state.fold_s += time.perf_counter() - began
        self.publish(state, results)
        state.advance(records)
        return Outcome.DONE

    def log_record(self, record: Any) -> LogRecord:
        """A Kafka record as folds see it."""
        return log_record(record, self.deployment.log_ms(record.timestamp))

    def publish(self, state: PartitionState, results: list[Result]) -> None:
        """Hands results over to the producer, which keeps their order, and keeps their futures."""
        source = f"{state.topic}/{state.partition}"
        for r in results:
            if len(r.value) + len(r.key) + HEADROOM_BYTES > TOPICS[r.topic].max_message_bytes:
                state.counts["results_too_large"] += 1
                log.error("result too large", app=self.level, topic=r.topic, id=r.id, bytes=len(r.value))
                r = too_large(state, r)
            headers = ce_headers(r.type, r.id, source, r.at_ms, r.content_type)
            state.track(self.send(r.topic, r.key.encode(), r.value, r.partition, headers))
            state.counts["results"] += 1
            if r.topic == DEAD_LETTERS:
                state.counts["dead_letters"] += 1

    def send(
        self, topic: str, key: bytes | None, value: bytes, partition: int | None, headers: Any
    ) -> asyncio.Future[Any]:
        """Queues one record for a topic (without prefix); the future gives its metadata."""
        channel = self._channels.get(topic)
        if channel is None:
            channel = self._channels[topic] = self.app.topic(
                self.settings.topic(topic), key_serializer="raw", value_serializer="raw"
            )
        future: asyncio.Future[Any] = channel.send_soon(key=key, value=value, partition=partition, headers=headers)
        return future

    def tick(self, state: PartitionState) -> None:
        """Appends an empty record, by which a silent partition's log time goes on."""
        headers = [("ce_type", b"tick"), ("ce_source", f"keeper/{self.level}".encode())]
        future = self.send(self.topic, None, b"", state.partition, headers)
        state.counts["ticks"] += 1

        def seen(done: asyncio.Future[Any]) -> None:
            if not done.cancelled() and done.exception() is None:
                state.end_known = max(state.end_known, done.result().offset + 1)

        future.add_done_callback(seen)

    def stop(self, state: PartitionState, why: str) -> None:
        """Ends the folding of one partition, loudly; the others go on."""
        state.stopped = why
        log.critical("PARTITION STOPPED", app=self.level, topic=state.topic, partition=state.partition, why=why)

    def drop_all(self) -> None:
        """Lets go of every partition; what is on its way may still arrive, and does no harm."""
        for state in self.states.values():
            if state.repair is not None:
                state.repair.cancel()
            state.clear_queue()
        self.states = {}
