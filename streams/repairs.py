"""Repairs of a partition that cannot go on by the synchronous step: a hole, a fold that raises, a failed send.

Each runs as a task of its partition, while further batches of it queue and other partitions go on. Everything is
read again from the log; nothing needs to be remembered but the last checkpoint.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog
from aiokafka.errors import KafkaError

from schemas.errors import UnavailableError
from streams.letters import fold_error
from streams.partition import Outcome, PartitionState, newer
from streams.reader import LogReader

if TYPE_CHECKING:
    from streams.keeper import Keeper

log = structlog.get_logger(__name__)

RETRY_S = (0.5, 1.0, 2.0, 5.0, 10.0)
SLICE_S = 0.02


class Repairs:
    """Repairs partitions of a keeper."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper

    def start(self, state: PartitionState, work: Coroutine[Any, Any, None] | None = None) -> None:
        """Runs `work`, then takes the batches that came meanwhile, until there are none."""

        async def run() -> None:
            try:
                if work is not None:
                    await work
                while not state.stopped and not state.queue.empty():
                    await self.handle(state, state.queue.get_nowait(), Outcome.DONE)
            except Exception as error:  # our bug, or a dump that raises: this partition can't go on
                log.exception("repair failed", app=self.keeper.level, partition=state.partition)
                self.keeper.stop(state, f"repair failed: {error!r}")
            finally:
                state.repair = None
                state.moved_at = time.monotonic()
                if state.stopped:
                    state.clear_queue()

        state.repair = asyncio.get_running_loop().create_task(run())

    def mend_sends(self) -> None:
        """Restores partitions of which a send failed. Called every so often."""
        now = time.monotonic()
        for state in self.keeper.states.values():
            if state.failed and state.repair is None and not state.stopped and now >= state.resend_at:
                state.resend_at = now + RETRY_S[min(state.resends, len(RETRY_S) - 1)]
                state.resends += 1
                self.start(state, self._resend(state))

    async def handle(self, state: PartitionState, records: list[Any], outcome: Outcome) -> None:
        """A batch by the slow way: fills a hole before it, and isolates a record at which the fold raises.

        `outcome` is what the synchronous step gave for it, DONE when it was not tried yet.
        """
        records = newer(records, state.applied)
        if outcome is not Outcome.RAISED:
            if records and records[0].offset > state.applied + 1:
                await self._fill_hole(state, records[0].offset)
            if state.stopped or self.keeper.step(state, records) is Outcome.DONE:
                return
        await self._retry(state, lambda: self._rebuild(state, records[0].offset - 1, publish=False))
        if not state.stopped:
            await self._apply_carefully(state, records, publish=True)

    async def _fill_hole(self, state: PartitionState, until: int) -> None:
        """Reads the offsets before `until` once more; what the log does not have is accepted and counted."""
        first, found = state.applied + 1, 0

        async def read() -> None:
            nonlocal found
            async for chunk in self._read(state, state.applied + 1, until - 1):
                found += len(chunk)
                state.applied = chunk[0].offset - 1
                await self.handle(state, chunk, Outcome.DONE)
                if state.stopped:
                    return

        await self._retry(state, read)
        missing = until - first - found
        log.info("hole in the offsets", app=self.keeper.level, partition=state.partition, first=first, missing=missing)
        state.counts["holes"] += 1
        state.counts["hole_offsets"] += missing
        if not state.stopped:
            state.applied = until - 1

    async def _resend(self, state: PartitionState) -> None:
        """Restores a partition after a failed send: what was folded since the checkpoint is folded and sent again."""
        log.warning("a send failed; partition restored", app=self.keeper.level, partition=state.partition)
        state.counts["send_restores"] += 1
        target = state.applied
        state.forget_pending()
        await self._retry(state, lambda: self._rebuild(state, target, publish=True))

    async def _retry(self, state: PartitionState, work: Callable[[], Awaitable[None]]) -> None:
        attempt = 0
        while True:
            try:
                return await work()
            except (KafkaError, OSError, UnavailableError) as error:
                wait = RETRY_S[min(attempt, len(RETRY_S) - 1)]
                attempt += 1
                log.warning(
                    "repair waits",
                    app=self.keeper.level,
                    partition=state.partition,
                    error=str(error),
                    wait_s=wait,
                )
                await asyncio.sleep(wait)

    async def _rebuild(self, state: PartitionState, until: int, *, publish: bool, careful: bool = False) -> None:
        """Puts the fold where it was after offset `until`: from the last checkpoint and the log.

        First in chunks; where the fold raises at a record that we do not know yet, again and carefully.
        """
        checkpoint = await self.keeper.vault.read(state.checkpoint_position)
        state.fold = self.keeper.fresh(state.partition)  # together with `applied`, in one synchronous step
        if checkpoint is not None:
            state.fold.load(checkpoint.dump)
        first = checkpoint.offset + 1 if checkpoint is not None else 0
        state.applied = first - 1
        async for chunk in self._read(state, first, until):
            if careful:
                await self._apply_carefully(state, chunk, publish=publish)
                if state.stopped:
                    return
                continue
            known = [r for r in chunk if publish or r.offset not in state.poison]
            try:
                results = state.fold.apply([self.keeper.log_record(r) for r in known])
            except Exception:
                return await self._rebuild(state, until, publish=publish, careful=True)
            if publish:
                self.keeper.publish(state, results)
            state.advance(chunk)
            await asyncio.sleep(0)
        state.applied = until

    async def _apply_carefully(self, state: PartitionState, records: list[Any], *, publish: bool) -> None:
        """One record at a time; one at which the fold raises is dead-lettered and the fold put back before it."""
        good, done = state.fold.dump(), []
        began = time.monotonic()
        for record in newer(records, state.applied):
            item = self.keeper.log_record(record)
            try:
                results = state.fold.apply([item])
            except Exception as error:
                self._poisoned(state, record, error)
                state.fold = self.keeper.fresh(state.partition)
                state.fold.load(good)
                for earlier in done:
                    state.fold.apply([earlier])
                if state.stopped:
                    return
            else:
                done.append(item)
                if publish:
                    self.keeper.publish(state, results)
            state.advance([record])
            if time.monotonic() - began > SLICE_S:
                await asyncio.sleep(0)
                began = time.monotonic()

    def _poisoned(self, state: PartitionState, record: Any, error: Exception) -> None:
        detail = "".join(traceback.format_exception(error))
        at_ms = self.keeper.deployment.log_ms(record.timestamp)
        self.keeper.publish(state, [fold_error(state, record, self.keeper.log_record(record).type, at_ms, detail)])
        if record.offset in state.poison:
            return  # of before a restore: told and counted
        state.poison.add(record.offset)
        state.counts["fold_errors"] += 1
        log.error(
            "record dead-lettered: the fold raises at it",
            app=self.keeper.level,
            topic=state.topic,
            partition=state.partition,
            offset=record.offset,
            error=repr(error),
        )
        lately = state.count_error(time.monotonic())
        if lately > self.keeper.settings.fold_errors_per_hour_max:
            self.keeper.stop(state, f"{lately} fold errors within an hour; the last: {error!r}")

    async def _read(self, state: PartitionState, first: int, last: int) -> AsyncIterator[list[Any]]:
        """Chunks of the log from `first` to `last`, both included."""
        if last < first:
            return
        settings, partition = self.keeper.settings, state.partition
        chunk: list[Any] = []
        async with LogReader(settings, state.topic, partitions=[partition], start={partition: first}) as reader:
            async for record in reader.to_end({partition: last + 1}):
                chunk.append(record)
                if len(chunk) >= settings.coalesce_records:
                    yield chunk
                    chunk = []
        if chunk:
            yield chunk
