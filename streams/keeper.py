"""The keeper: folds the records of a level's partitions and moves (offset, state) forward as one.

Folding is one synchronous step: fold, hand over the results, set `applied`. So whenever anything else runs, state,
offset and results on their way belong together. What cannot go that way (a fold that raises, a hole, a failed send)
is repaired beside it by a task of the partition, while its further batches queue and other partitions go on.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Coroutine
from enum import Enum, auto
from typing import Any

import faust
import structlog
from aiokafka import TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from faust.types import TP

from schemas.config import Deployment
from schemas.deadletters import DeadLetter, Reason, dead_data
from schemas.errors import CheckpointMismatch, UnavailableError
from schemas.log import Fold, LogRecord, Result
from schemas.topics import DEAD_LETTERS, TOPICS, ce_type
from streams import checkpoints
from streams.clients import admin_client, plain_consumer
from streams.faustapp import commit
from streams.partition import PartitionState
from streams.producer import ce_headers
from streams.reader import LogReader, log_record
from streams.settings import Settings

log = structlog.get_logger(__name__)

MakeFold = Callable[[str, int, dict[str, int]], Fold]
HEADROOM_BYTES = 1024  # headers and framing of a result within its topic's limit
DETAIL_CHARS_MAX = 8_000
RETRY_S = (0.5, 1.0, 2.0, 5.0, 10.0)
SLICE_S = 0.02


class _Outcome(Enum):
    DONE = auto()
    HOLE = auto()
    RAISED = auto()


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
        self.level, self.topic, self.app, self.settings = level, topic, app, settings
        self.source = settings.topic(topic)
        self.checkpoints = f"checkpoints.{level}"
        self.deployment = deployment
        self._make_fold = make_fold
        self.states: dict[TP, PartitionState] = {}
        self.restores = 0
        self.restore_s = 0.0
        self.commits_refused = 0
        self._channels: dict[str, Any] = {}

    # ---- folding

    async def take(self, records: list[Any]) -> None:
        """One coalesced batch of one partition. Returns without a wait unless the partition is being repaired."""
        state = self.states.get(TP(records[0].topic, records[0].partition))
        if state is None or state.stopped:
            return
        state.arrived_at = time.monotonic()
        if state.repair is not None:
            await state.queue.put(records)
            if state.repair is None and not state.queue.empty():  # it ended while this waited
                self._start_repair(state)
            return
        outcome = self._step(state, records)
        if outcome is not _Outcome.DONE:
            self._start_repair(state, self._handle(state, records, outcome))

    def _step(self, state: PartitionState, records: list[Any]) -> _Outcome:
        """The synchronous step. After HOLE nothing has changed; after RAISED the fold is in no known state."""
        records = _newer(records, state.applied)
        if not records:
            return _Outcome.DONE
        if records[0].offset > state.applied + 1:
            return _Outcome.HOLE
        began = time.perf_counter()
        try:
            results = state.fold.apply([self._log_record(r) for r in records])
        except Exception as error:
            log.error("fold raised", app=self.level, partition=state.partition, error=repr(error))
            return _Outcome.RAISED
        state.fold_s += time.perf_counter() - began
        self._publish(state, results)
        self._applied(state, records)
        return _Outcome.DONE

    def _log_record(self, record: Any) -> LogRecord:
        return log_record(record, self.deployment.log_ms(record.timestamp))

    def _applied(self, state: PartitionState, records: list[Any]) -> None:
        state.applied = records[-1].offset
        state.moved_at = time.monotonic()
        state.counts["records"] += len(records)
        state.counts["batches"] += 1
        state.last_append_ms = records[-1].timestamp

    def _publish(self, state: PartitionState, results: list[Result]) -> None:
        source = f"{state.topic}/{state.partition}"
        for r in results:
            if len(r.value) + len(r.key) + HEADROOM_BYTES > TOPICS[r.topic].max_message_bytes:
                self._too_large(state, r)
                continue
            headers = ce_headers(r.type, r.id, source, r.at_ms, r.content_type)
            state.track(self._send(r.topic, r.key.encode(), r.value, r.partition, headers))
            state.counts["results"] += 1
            if r.topic == DEAD_LETTERS:
                state.counts["dead_letters"] += 1

    def _send(
        self, topic: str, key: bytes | None, value: bytes, partition: int | None, headers: Any
    ) -> asyncio.Future[Any]:
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
        future = self._send(self.topic, None, b"", state.partition, headers)
        state.counts["ticks"] += 1

        def seen(done: asyncio.Future[Any]) -> None:
            if not done.cancelled() and done.exception() is None:
                state.end_known = max(state.end_known, done.result().offset + 1)

        future.add_done_callback(seen)

    # ---- dead letters of our own

    def _dead(self, state: PartitionState, record: Any, reason: Reason, remedy: str, detail: str) -> Result:
        at_ms = self.deployment.log_ms(record.timestamp)
        letter = DeadLetter(
            topic=state.topic,
            partition=state.partition,
            offset=record.offset,
            at_s=max(0.0, at_ms / 1000),
            type=self._log_record(record).type,
            reason=reason,
            remedy=remedy,
            detail=detail[-DETAIL_CHARS_MAX:],
            **dead_data(record.value or b""),  # type: ignore[arg-type]
        )
        name = f"{state.topic}/{state.partition}/{record.offset}"
        return Result(DEAD_LETTERS, name, ce_type(DeadLetter.kind), f"{name}#{reason}", at_ms, letter.encode())

    def _too_large(self, state: PartitionState, result: Result) -> None:
        """A result beyond its topic's limit would fail for ever: its head goes to dead letters instead."""
        state.counts["results_too_large"] += 1
        log.error("result too large", app=self.level, topic=result.topic, id=result.id, bytes=len(result.value))
        letter = DeadLetter(
            topic=result.topic,
            partition=state.partition,
            offset=max(0, state.applied + 1),
            at_s=max(0.0, result.at_ms / 1000),
            type=result.type,
            reason="too_large",
            value=result.id[:200],
            remedy=f"a result larger than {result.topic} takes: fewer rows per record",
            **dead_data(result.value),  # type: ignore[arg-type]
        )
        name = f"result/{result.topic}/{result.id}"
        self._publish(
            state, [Result(DEAD_LETTERS, name, ce_type(DeadLetter.kind), name, result.at_ms, letter.encode())]
        )

    # ---- repairs

    def _start_repair(self, state: PartitionState, work: Coroutine[Any, Any, None] | None = None) -> None:
        """Runs `work`, then takes the batches that came meanwhile, until there are none."""

        async def run() -> None:
            try:
                if work is not None:
                    await work
                while not state.stopped:
                    if state.queue.empty():
                        break
                    await self._handle(state, state.queue.get_nowait(), _Outcome.DONE)
            except Exception as error:  # our bug, or a dump that raises: this partition can't go on
                self._stop(state, f"repair failed: {error!r}")
                log.exception("repair failed", app=self.level, partition=state.partition)
            finally:
                state.repair = None
                state.moved_at = time.monotonic()
                if state.stopped:
                    _empty(state.queue)

        state.repair = asyncio.get_running_loop().create_task(run())

    def mend_sends(self) -> None:
        """Restores partitions of which a send failed. Called every so often."""
        now = time.monotonic()
        for state in self.states.values():
            if state.failed and state.repair is None and not state.stopped and now >= state.resend_at:
                state.resend_at = now + RETRY_S[min(state.resends, len(RETRY_S) - 1)]
                state.resends += 1
                self._start_repair(state, self._resend(state))

    async def _handle(self, state: PartitionState, records: list[Any], outcome: _Outcome) -> None:
        """A batch by the slow way: fills a hole before it, and isolates a record at which the fold raises."""
        records = _newer(records, state.applied)
        if outcome is not _Outcome.RAISED:
            if records and records[0].offset > state.applied + 1:
                await self._fill_hole(state, records[0].offset)
            if state.stopped or self._step(state, records) is _Outcome.DONE:
                return
        state.counts["fold_raised"] += 1
        await self._retry(state, lambda: self._rebuild(state, records[0].offset - 1, publish=False))
        if not state.stopped:
            await self._apply_carefully(state, records, publish=True)

    async def _fill_hole(self, state: PartitionState, until: int) -> None:
        """Reads the offsets before `until` once more; what the log does not have is accepted and counted."""
        first = state.applied + 1
        found: list[Any] = []

        async def read() -> None:
            found.clear()
            async for chunk in self._read(state, first, until - 1):
                found.extend(chunk)

        await self._retry(state, read)
        missing = until - first - len(found)
        log.info("hole in the offsets", app=self.level, partition=state.partition, first=first, missing=missing)
        state.counts["holes"] += 1
        state.counts["hole_offsets"] += missing
        for start in range(0, len(found), self.settings.coalesce_records):
            part = found[start : start + self.settings.coalesce_records]
            state.applied = part[0].offset - 1
            await self._handle(state, part, _Outcome.DONE)
            if state.stopped:
                return
        state.applied = until - 1

    async def _resend(self, state: PartitionState) -> None:
        """Restores a partition after a failed send: what was folded since the checkpoint is folded and sent again."""
        log.warning("a send failed; partition restored", app=self.level, partition=state.partition)
        state.counts["send_restores"] += 1
        target = state.applied
        state.forget_pending()
        await self._retry(state, lambda: self._rebuild(state, target, publish=True))

    async def _retry(self, state: PartitionState, work: Callable[[], Any]) -> None:
        attempt = 0
        while True:
            try:
                return await work()
            except (KafkaError, OSError, UnavailableError) as error:
                wait = RETRY_S[min(attempt, len(RETRY_S) - 1)]
                attempt += 1
                log.warning("repair waits", app=self.level, partition=state.partition, error=str(error), wait_s=wait)
                state.moved_at = time.monotonic()
                await asyncio.sleep(wait)

    async def _rebuild(self, state: PartitionState, until: int, *, publish: bool) -> None:
        """Puts the fold where it was after offset `until`: from the last checkpoint and the log."""
        checkpoint = None
        if state.checkpoint_position is not None:
            checkpoint = await self._read_checkpoint(state.checkpoint_position)
        state.fold = self._fresh(state.partition)
        first = 0
        if checkpoint is not None:
            state.fold.load(checkpoint.dump)
            first = checkpoint.offset + 1
        state.applied = first - 1
        async for chunk in self._read(state, first, until):
            await self._apply_carefully(state, chunk, publish=publish)
            if state.stopped:
                return
        state.applied = until

    async def _apply_carefully(self, state: PartitionState, records: list[Any], *, publish: bool) -> None:
        """One record at a time; one at which the fold raises is dead-lettered and the fold put back before it."""
        good, done = state.fold.dump(), []
        began = time.monotonic()
        for record in _newer(records, state.applied):
            try:
                results = [] if record.offset in state.poison else state.fold.apply([self._log_record(record)])
            except Exception as error:
                results = self._poisoned(state, record, error)
                state.fold = self._fresh(state.partition)
                state.fold.load(good)
                for earlier in done:
                    state.fold.apply([earlier])
            else:
                done.append(self._log_record(record))
                results = results if publish else []
            self._publish(state, results)
            if state.stopped:
                return
            self._applied(state, [record])
            if time.monotonic() - began > SLICE_S:
                await asyncio.sleep(0)
                began = time.monotonic()

    def _poisoned(self, state: PartitionState, record: Any, error: Exception) -> list[Result]:
        state.poison.add(record.offset)
        state.counts["fold_errors"] += 1
        lately = state.count_error(time.monotonic())
        log.error(
            "record dead-lettered: the fold raises at it",
            app=self.level,
            topic=state.topic,
            partition=state.partition,
            offset=record.offset,
            error=repr(error),
        )
        if lately > self.settings.fold_errors_per_hour_max:
            self._stop(state, f"{lately} fold errors within an hour; the last: {error!r}")
        detail = "".join(traceback.format_exception(error))
        return [self._dead(state, record, "fold_error", "our bug: report it with this traceback", detail)]

    def _stop(self, state: PartitionState, why: str) -> None:
        state.stopped = why
        log.critical("PARTITION STOPPED", app=self.level, topic=state.topic, partition=state.partition, why=why)

    async def _read(self, state: PartitionState, first: int, last: int) -> Any:
        """Chunks of the log from `first` to `last`, both included."""
        if last < first:
            return
        chunk: list[Any] = []
        async with LogReader(
            self.settings, self.topic, partitions=[state.partition], start={state.partition: first}
        ) as r:
            async for record in r.to_end({state.partition: last + 1}):
                chunk.append(record)
                if len(chunk) >= self.settings.coalesce_records:
                    yield chunk
                    chunk = []
        if chunk:
            yield chunk

    # ---- checkpoints

    def _fresh(self, partition: int) -> Fold:
        return self._make_fold(self.topic, partition, dict(self.deployment.partitions))

    async def checkpoint(self, state: PartitionState) -> bool:
        """Writes (offset, state) and moves the commit to it; True when done. Never raises an operating error."""
        async with state.lock:
            if state.repair or state.stopped or state.failed or state.applied <= state.checkpoint_offset:
                return False
            began = time.perf_counter()
            try:
                offset, dump, waiting = state.applied, state.fold.dump(), list(state.pending)
            except Exception as error:
                log.exception("dump raised", app=self.level, partition=state.partition)
                self._stop(state, f"dump raised: {error!r}")
                return False
            state.dump_s = time.perf_counter() - began
            try:
                return await self._write(state, offset, dump, waiting)
            except (CommitFailedError, IllegalStateError) as error:
                self.commits_refused += 1
                log.warning("commit refused", app=self.level, partition=state.partition, error=str(error))
            except KafkaError as error:
                state.counts["checkpoints_failed"] += 1
                log.warning("no checkpoint", app=self.level, partition=state.partition, error=repr(error))
            return False

    async def _write(self, state: PartitionState, offset: int, dump: bytes, waiting: list[asyncio.Future[Any]]) -> bool:
        if waiting:
            await asyncio.wait(waiting)  # not gather: giving up on the wait must not cancel the sends
        if state.failed:
            return False
        chunks = await asyncio.to_thread(
            checkpoints.encode,
            self.topic,
            state.partition,
            offset,
            dump,
            self.settings.checkpoint_chunk_bytes,
        )
        sent = [self._send(self.checkpoints, c.key, c.value, 0, c.headers) for c in chunks]
        await asyncio.wait(sent)
        positions = [future.result().offset for future in sent]
        position = positions[0]
        if not self._current(state):
            return False
        await commit(self.app, state.tp, offset + 1, checkpoints.pointer(position))
        state.checkpoint_offset, state.checkpoint_position = offset, position
        state.checkpoint_bytes, state.checkpoint_at = len(dump), time.monotonic()
        state.resends = 0
        state.poison = {o for o in state.poison if o > offset}
        state.counts["checkpoints"] += 1
        return True

    def _current(self, state: PartitionState) -> bool:
        return self.states.get(state.tp) is state and self.app.consumer_generation_id == state.generation

    async def checkpoint_all(self, timeout_s: float) -> None:
        """A last checkpoint of every partition, within a time."""
        if not self.states:
            return
        tasks = [asyncio.ensure_future(self.checkpoint(s)) for s in self.states.values()]
        _, late = await asyncio.wait(tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            log.warning("last checkpoint not in time", app=self.level, partitions=len(late))

    # ---- assignment

    def drop_all(self) -> None:
        """Lets go of every partition; what is on its way may still arrive, and does no harm."""
        for state in self.states.values():
            if state.repair is not None:
                state.repair.cancel()
            _empty(state.queue)
        self.states = {}

    async def restore(self, tps: list[TP], generation: int) -> None:
        """Takes partitions over from their last checkpoints. Called before Faust seeks to the committed offsets."""
        began = time.monotonic()
        self.drop_all()
        if not tps:
            return
        consumer = plain_consumer(self.settings)
        admin = admin_client(self.settings)
        try:
            await consumer.start()
            await admin.start()
            consumer.assign([self._checkpoint_tp()])
            wanted = [TopicPartition(tp.topic, tp.partition) for tp in tps]
            offsets = await admin.list_consumer_group_offsets(self.settings.group(self.level), partitions=wanted)
            beginnings = await consumer.beginning_offsets(wanted)
            found: dict[tuple[str, int], checkpoints.Checkpoint] | None = None
            states = {}
            for tp, key in zip(tps, wanted, strict=True):
                committed = offsets.get(key)
                position = checkpoints.parse_pointer(committed.metadata if committed else None)
                state = self._state(tp, beginnings[key] - 1, generation)
                if position is None or not await self._load_at(consumer, state, position):
                    if found is None:
                        found = await checkpoints.newest(
                            consumer, self._checkpoint_tp(), {(self.topic, t.partition) for t in tps}
                        )
                    await self._load_newest(state, found.get((self.topic, tp.partition)))
                    has = committed is not None and committed.offset >= 0
                    if state.checkpoint_position is not None or has:
                        # Faust seeks to what is committed: make that what we hold.
                        meta = (
                            checkpoints.pointer(state.checkpoint_position)
                            if state.checkpoint_position is not None
                            else ""
                        )
                        await commit(self.app, tp, state.applied + 1, meta)
                states[tp] = state
        finally:
            await consumer.stop()
            await admin.close()
        self.states = states
        self.restores += 1
        self.restore_s = time.monotonic() - began
        log.info(
            "restored",
            app=self.level,
            restore_s=round(self.restore_s, 3),
            applied={s.partition: s.applied for s in states.values()},
        )

    def _state(self, tp: TP, applied: int, generation: int) -> PartitionState:
        return PartitionState(
            tp, self.topic, self._fresh(tp.partition), applied, generation, self.settings.channel_size
        )

    def _checkpoint_tp(self) -> TopicPartition:
        return TopicPartition(self.settings.topic(self.checkpoints), 0)

    async def _load_at(self, consumer: Any, state: PartitionState, position: int) -> bool:
        try:
            checkpoint = await checkpoints.read_at(consumer, self._checkpoint_tp(), position)
            if checkpoint is None:
                log.warning("checkpoint gone", app=self.level, partition=state.partition, position=position)
                return False
            self._load(state, checkpoint)
        except CheckpointMismatch as error:
            log.error("checkpoint refused", app=self.level, partition=state.partition, error=str(error))
            state.fold = self._fresh(state.partition)
            return False
        return True

    async def _load_newest(self, state: PartitionState, checkpoint: checkpoints.Checkpoint | None) -> None:
        if checkpoint is not None:
            try:
                self._load(state, checkpoint)
                log.warning(
                    "no usable commit: newest checkpoint of the topic taken",
                    app=self.level,
                    partition=state.partition,
                    offset=checkpoint.offset,
                )
                return
            except CheckpointMismatch as error:
                log.error("checkpoint refused", app=self.level, partition=state.partition, error=str(error))
                state.fold = self._fresh(state.partition)
        log.info("no checkpoint: from the beginning", app=self.level, partition=state.partition)

    def _load(self, state: PartitionState, checkpoint: checkpoints.Checkpoint) -> None:
        if (checkpoint.topic, checkpoint.partition) != (self.topic, state.partition):
            raise CheckpointMismatch(
                f"position {checkpoint.position} holds {checkpoint.topic}/{checkpoint.partition}, "
                f"not {self.topic}/{state.partition}"
            )
        state.fold.load(checkpoint.dump)
        state.applied = state.checkpoint_offset = checkpoint.offset
        state.checkpoint_position, state.checkpoint_bytes = checkpoint.position, len(checkpoint.dump)

    async def _read_checkpoint(self, position: int) -> checkpoints.Checkpoint | None:
        consumer = plain_consumer(self.settings)
        try:
            await consumer.start()
            consumer.assign([self._checkpoint_tp()])
            return await checkpoints.read_at(consumer, self._checkpoint_tp(), position)
        finally:
            await consumer.stop()


def _newer(records: list[Any], applied: int) -> list[Any]:
    if not records or records[0].offset > applied:
        return records
    return [r for r in records if r.offset > applied]


def _empty(queue: asyncio.Queue[Any]) -> None:
    while not queue.empty():
        queue.get_nowait()
