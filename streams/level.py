"""A level as a process: a Faust app with one source, its keeper, timers, watchdog and health.

Must not know what a fold computes, nor what its log is about.
"""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import structlog
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from faust.types import TP

from schemas.config import Deployment
from schemas.errors import UnavailableError
from schemas.topics import LEVEL_TOPIC
from streams.faustapp import build_app, highwater
from streams.health import HealthServer
from streams.keeper import Keeper, MakeFold
from streams.metrics import LevelCollector
from streams.partition import PartitionState
from streams.settings import Settings
from streams.watchdog import Watchdog

log = structlog.get_logger(__name__)

TICK_WALL_S_MIN = 0.1
SNAPSHOT_S = 1.0
REVOKE_CHECKPOINT_S = 3.0
RESTORE_RETRY_S = 1.0
BEAT_S = 0.05
NUDGE_S = 5.0


class LevelApp:
    """Runs the folds of one level over the partitions that the group gives this process.

    Parameters
    ----------
    level: name of the level; its log is `LEVEL_TOPIC[level]`.
    make_fold: (topic, partition, partitions of every topic) -> a fresh fold.
    """

    def __init__(self, level: str, make_fold: MakeFold, settings: Settings, deployment: Deployment) -> None:
        self.level, self.settings, self.deployment = level, settings, deployment
        self.topic = LEVEL_TOPIC[level]
        self.source = settings.topic(self.topic)
        self.app = build_app(settings, level, self.source)
        self.keeper = Keeper(level, self.topic, self.app, settings, deployment, make_fold)
        self.tick_s = max(TICK_WALL_S_MIN, settings.tick_silence_s / deployment.speed)
        self.assigned_at: float | None = None
        self.restored = False
        self.last_states: list[PartitionState] = []
        self.beat_at = time.monotonic()
        self._stopping = asyncio.Event()
        self._wire()

    def _wire(self) -> None:
        app, keeper = self.app, self.keeper
        topic = app.topic(self.source, key_type=None, value_type=None, acks=False)

        async def fold(stream: Any) -> None:
            async for records in stream:
                await keeper.take(records)

        app.agent(topic, name=f"fleetloop.{self.level}", concurrency=1)(fold)

        # Faust holds signal receivers weakly: keep them.
        self._receivers = (self._on_assigned, self._on_revoked, self._on_rebalanced, self._on_shutdown)
        app.on_partitions_assigned.connect(self._on_assigned)
        app.on_partitions_revoked.connect(self._on_revoked)
        app.on_rebalance_complete.connect(self._on_rebalanced)
        app.on_before_shutdown.connect(self._on_shutdown)

    # ---- what Faust tells

    async def _on_assigned(self, app: Any, assigned: set[TP], **_: Any) -> None:
        self.assigned_at, self.restored = time.monotonic(), False

    async def _on_revoked(self, app: Any, revoked: set[TP], **_: Any) -> None:
        self.restored, self.assigned_at = False, None
        await self.keeper.vault.checkpoint_all(min(REVOKE_CHECKPOINT_S, self.settings.session_timeout_s / 3))
        self.keeper.drop_all()

    async def _on_rebalanced(self, app: Any, **_: Any) -> None:
        """Restores, before Faust seeks; tries until it succeeds or another rebalance makes it pointless."""
        generation = self.app.consumer_generation_id
        tps = sorted(tp for tp in self.app.consumer.assignment() if tp.topic == self.source)
        while not self._stopping.is_set() and generation == self.app.consumer_generation_id:
            try:
                await self.keeper.vault.restore(tps, generation)
            except (CommitFailedError, IllegalStateError) as error:
                log.warning("restore overtaken by a rebalance", app=self.level, error=str(error))
                return
            except (KafkaError, OSError, UnavailableError) as error:
                log.warning("restore waits", app=self.level, error=repr(error))
                await asyncio.sleep(RESTORE_RETRY_S)
            else:
                if self.assigned_at is None:  # revoked meanwhile: what was restored is another's by now
                    self.keeper.drop_all()
                else:
                    self.restored = True
                return

    async def _on_shutdown(self, app: Any, **_: Any) -> None:
        await self.keeper.vault.checkpoint_all(self.settings.stop_timeout_s / 2)
        self.last_states = list(self.keeper.states.values())
        self.keeper.drop_all()

    # ---- timers

    async def _timers(self) -> None:
        """Ticks, repairs and the beat that the watchdog listens to."""
        snapshot_at = 0.0
        while True:
            await asyncio.sleep(BEAT_S)
            self.beat_at = now = time.monotonic()
            if not self.restored:
                continue
            self.keeper.repairs.mend_sends()
            for state in list(self.keeper.states.values()):
                silent_s = now - state.arrived_at
                if state.repair is not None or state.stopped or silent_s < self.tick_s:
                    continue
                # What is there and does not come (a delivery or a seek was lost) comes with the record after it:
                # that shows the hole, which is read once more.
                if silent_s >= max(NUDGE_S, self.tick_s) or state.lag(highwater(self.app, state.tp)) == 0:
                    state.arrived_at = now
                    self.keeper.tick(state)
            if now - snapshot_at >= SNAPSHOT_S:
                snapshot_at = now
                self._snapshot()

    def _snapshot(self) -> None:
        """Takes what other threads may read of folds, which they must not touch."""
        for state in self.keeper.states.values():
            state.lag_seen = state.lag(highwater(self.app, state.tp))
            if state.repair is None and not state.stopped:
                try:
                    state.fold_metrics = dict(state.fold.metrics())
                except Exception as error:  # our bug, but no reason to stop folding
                    state.counts["metrics_errors"] += 1
                    log.error("metrics raised", app=self.level, error=repr(error))

    async def _checkpoints(self) -> None:
        interval = self.settings.checkpoint_interval_s
        while True:
            await asyncio.sleep(interval)
            if self.restored:
                await asyncio.gather(*(self.keeper.vault.checkpoint(s) for s in list(self.keeper.states.values())))

    # ---- health

    def ready(self) -> list[str]:
        """Why this process is not ready; empty when it is."""
        if not self.restored:
            return ["not assigned" if self.assigned_at is None else "assigned, not restored yet"]
        why = []
        for s in list(self.keeper.states.values()):
            if s.stopped:
                why.append(f"{s.topic}/{s.partition} stopped: {s.stopped}")
            elif s.lag_seen > self.settings.lag_ready_max:
                why.append(f"{s.topic}/{s.partition} is {s.lag_seen} records behind")
        return why

    def unhealthy(self) -> str:
        """Why the watchdog should end this process; empty while it should not."""
        now = time.monotonic()
        if now - self.beat_at > self.settings.stall_timeout_s:
            return f"event loop stalled for {now - self.beat_at:.0f} s"
        waiting = 0.0 if self.assigned_at is None or self.restored else now - self.assigned_at
        if waiting > self.settings.restore_timeout_s:
            return f"assigned but not restored for {waiting:.0f} s"
        for s in list(self.keeper.states.values()):
            if s.repair is None and not s.stopped and s.lag_seen and now - s.moved_at > self.settings.stall_timeout_s:
                return f"{s.topic}/{s.partition}: {s.lag_seen} behind, nothing applied for {now - s.moved_at:.0f} s"
        return ""

    # ---- life

    def stop(self) -> None:
        """Begins to stop: a last checkpoint, then the end of `run`."""
        self._stopping.set()

    async def run(self) -> int:
        """Runs until SIGTERM or SIGINT, or until the app crashes; gives the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        watchdog = Watchdog(self.unhealthy)
        port = self.settings.health_port_of(self.level)
        health = HealthServer(self.settings.web_host, port, self.unhealthy, self.ready, LevelCollector(self))
        tasks: list[asyncio.Task[Any]] = []
        health.start()
        watchdog.start()
        status = 0
        try:
            log.info("starting", app=self.level, health_port=health.port)
            tasks += [loop.create_task(self._timers()), loop.create_task(self._checkpoints())]
            await self.app.start()
            waits = [loop.create_task(self._stopping.wait()), loop.create_task(self.app.wait_until_stopped())]
            tasks += waits
            await asyncio.wait([*waits, *tasks], return_when=asyncio.FIRST_COMPLETED)
        except Exception:
            log.exception("crashed", app=self.level)
            status = 1
        reason = self.app.crash_reason or next((t.exception() for t in tasks if t.done() and not t.cancelled()), None)
        if not self._stopping.is_set():
            status = 1
            log.error("ends", app=self.level, reason=repr(reason))
        self._stopping.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        watchdog.expect_end(self.settings.stop_timeout_s)
        await self.app.stop()
        health.stop()
        watchdog.done()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        log.info("ended", app=self.level)
        return status
