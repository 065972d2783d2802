"""Checkpoints of a keeper's partitions: written and committed as one, and taken over at a rebalance."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import structlog
from aiokafka import TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from faust.types import TP

from schemas.errors import CheckpointMismatch
from streams import checkpoints
from streams.clients import admin_client, plain_consumer
from streams.faustapp import commit, commit_and_seek
from streams.partition import PartitionState

if TYPE_CHECKING:
    from streams.keeper import Keeper

log = structlog.get_logger(__name__)


class Vault:
    """Writes and restores the state of a keeper's partitions.

    Attributes
    ----------
    restores, restore_s: rebalances after which partitions were restored, and how long the last took.
    commits_refused: by the group, to a member of an older generation.
    """

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.topic = f"checkpoints.{keeper.level}"
        self.restores = 0
        self.restore_s = 0.0
        self.commits_refused = 0

    async def checkpoint(self, state: PartitionState) -> bool:
        """Writes (offset, state) and moves the commit to it; True when done. Never raises an operating error."""
        async with state.lock:
            if state.repair or state.stopped or state.failed or state.applied <= state.checkpoint_offset:
                return False
            began = time.perf_counter()
            try:
                offset, dump, waiting = state.applied, state.fold.dump(), list(state.pending)
            except Exception as error:
                log.exception("dump raised", app=self.keeper.level, partition=state.partition)
                self.keeper.stop(state, f"dump raised: {error!r}")
                return False
            state.dump_s = time.perf_counter() - began
            try:
                return await self._write(state, offset, dump, waiting)
            except (CommitFailedError, IllegalStateError) as error:
                self.commits_refused += 1
                log.warning("commit refused", app=self.keeper.level, partition=state.partition, error=str(error))
            except KafkaError as error:
                state.counts["checkpoints_failed"] += 1
                log.warning("no checkpoint", app=self.keeper.level, partition=state.partition, error=repr(error))
            return False

    async def _write(self, state: PartitionState, offset: int, dump: bytes, waiting: list[asyncio.Future[Any]]) -> bool:
        if waiting:
            await asyncio.wait(waiting)  # not gather: giving up on the wait must not cancel the sends
        if any(f.cancelled() or f.exception() is not None for f in waiting):
            return False  # asked of the futures, not of `failed`: a restore may have begun and cleared that
        chunks = await asyncio.to_thread(
            checkpoints.encode,
            self.keeper.topic,
            state.partition,
            offset,
            dump,
            self.keeper.settings.checkpoint_chunk_bytes,
        )
        sent = [self.keeper.send(self.topic, c.key, c.value, 0, c.headers) for c in chunks]
        await asyncio.wait(sent)
        positions = [future.result().offset for future in sent]
        position = positions[0]
        if not self._current(state):
            return False
        await commit(self.keeper.app, state.tp, offset + 1, checkpoints.pointer(position))
        state.checkpoint_offset, state.checkpoint_position = offset, position
        state.checkpoint_bytes, state.checkpoint_at = len(dump), time.monotonic()
        state.resends = 0
        state.poison = {o for o in state.poison if o > offset}
        state.counts["checkpoints"] += 1
        return True

    def _current(self, state: PartitionState) -> bool:
        return self.keeper.states.get(state.tp) is state and self.keeper.app.consumer_generation_id == state.generation

    async def checkpoint_all(self, timeout_s: float) -> None:
        """A last checkpoint of every partition, within a time."""
        if not self.keeper.states:
            return
        tasks = [asyncio.ensure_future(self.checkpoint(s)) for s in self.keeper.states.values()]
        _, late = await asyncio.wait(tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            log.warning("last checkpoint not in time", app=self.keeper.level, partitions=len(late))

    async def restore(self, tps: list[TP], generation: int) -> None:
        """Takes partitions over from their last checkpoints. Called before Faust seeks to the committed offsets."""
        began = time.monotonic()
        self.keeper.drop_all()
        if not tps:
            return
        consumer = plain_consumer(self.keeper.settings)
        admin = admin_client(self.keeper.settings)
        try:
            await consumer.start()
            await admin.start()
            consumer.assign([self._tp()])
            wanted = [TopicPartition(tp.topic, tp.partition) for tp in tps]
            offsets = await admin.list_consumer_group_offsets(
                self.keeper.settings.group(self.keeper.level), partitions=wanted
            )
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
                            consumer, self._tp(), {(self.keeper.topic, t.partition) for t in tps}
                        )
                    await self._load_newest(state, found.get((self.keeper.topic, tp.partition)))
                    has = committed is not None and committed.offset >= 0
                    if state.checkpoint_position is not None or has:
                        # Faust seeks to what is committed: make that what we hold.
                        meta = (
                            checkpoints.pointer(state.checkpoint_position)
                            if state.checkpoint_position is not None
                            else ""
                        )
                        await commit_and_seek(self.keeper.app, tp, state.applied + 1, meta)
                states[tp] = state
        finally:
            await consumer.stop()
            await admin.close()
        if self.keeper.app.consumer_generation_id != generation:
            raise CommitFailedError(f"generation {generation} is over")
        self.keeper.states = states
        self.restores += 1
        self.restore_s = time.monotonic() - began
        log.info(
            "restored",
            app=self.keeper.level,
            restore_s=round(self.restore_s, 3),
            applied={s.partition: s.applied for s in states.values()},
        )

    def _state(self, tp: TP, applied: int, generation: int) -> PartitionState:
        return PartitionState(
            tp,
            self.keeper.topic,
            self.keeper.fresh(tp.partition),
            applied,
            generation,
            self.keeper.settings.channel_size,
        )

    def _tp(self) -> TopicPartition:
        return TopicPartition(self.keeper.settings.topic(self.topic), 0)

    async def _load_at(self, consumer: Any, state: PartitionState, position: int) -> bool:
        try:
            checkpoint = await checkpoints.read_at(consumer, self._tp(), position)
            if checkpoint is None:
                log.warning("checkpoint gone", app=self.keeper.level, partition=state.partition, position=position)
                return False
            self._load(state, checkpoint)
        except CheckpointMismatch as error:
            log.error("checkpoint refused", app=self.keeper.level, partition=state.partition, error=str(error))
            state.fold = self.keeper.fresh(state.partition)
            return False
        return True

    async def _load_newest(self, state: PartitionState, checkpoint: checkpoints.Checkpoint | None) -> None:
        if checkpoint is not None:
            try:
                self._load(state, checkpoint)
                log.warning(
                    "no usable commit: newest checkpoint of the topic taken",
                    app=self.keeper.level,
                    partition=state.partition,
                    offset=checkpoint.offset,
                )
                return
            except CheckpointMismatch as error:
                log.error("checkpoint refused", app=self.keeper.level, partition=state.partition, error=str(error))
                state.fold = self.keeper.fresh(state.partition)
        log.info("no checkpoint: from the beginning", app=self.keeper.level, partition=state.partition)

    def _load(self, state: PartitionState, checkpoint: checkpoints.Checkpoint) -> None:
        if (checkpoint.topic, checkpoint.partition) != (self.keeper.topic, state.partition):
            raise CheckpointMismatch(
                f"position {checkpoint.position} holds {checkpoint.topic}/{checkpoint.partition}, "
                f"not {self.keeper.topic}/{state.partition}"
            )
        try:
            state.fold.load(checkpoint.dump)
        except CheckpointMismatch:
            raise
        except Exception as error:  # a dump of another version of the code: as good as none, and no reason to die
            raise CheckpointMismatch(f"checkpoint at {checkpoint.position}: load raised {error!r}") from error
        state.applied = state.checkpoint_offset = checkpoint.offset
        state.checkpoint_position, state.checkpoint_bytes = checkpoint.position, len(checkpoint.dump)

    async def read(self, position: int | None) -> checkpoints.Checkpoint | None:
        """The checkpoint at a position of the topic; None without a position, and when it is gone."""
        if position is None:
            return None
        consumer = plain_consumer(self.keeper.settings)
        try:
            await consumer.start()
            consumer.assign([self._tp()])
            return await checkpoints.read_at(consumer, self._tp(), position)
        finally:
            await consumer.stop()
