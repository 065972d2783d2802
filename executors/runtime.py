"""The process around a target: reads `decisions`, has them carried out, appends what came of it to `decision.events`.

Position is not kept: at start the topic is read again, epochs in force are rebuilt, and what `decision.events` answers
already is left alone. Acting twice on an absolute action does no harm; acting on an older one is refused by epoch.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from aiokafka.errors import KafkaError

from executors.acting import Acting, Answer
from executors.metrics import ExecutorMetrics
from executors.settings import ExecutorOptions, load_options
from executors.target import ActionTarget
from schemas.base import decode
from schemas.config import Deployment
from schemas.decisions import Decision, ExecutorResult
from schemas.errors import InvalidRecord, UnavailableError
from schemas.topics import DECISION_EVENTS, DECISIONS, ce_type
from streams.deployment import fleet_now_ms
from streams.health import HealthServer
from streams.producer import EdgeProducer
from streams.reader import LogReader, header, read_to_end
from streams.settings import Settings

log = structlog.get_logger(__name__)

RESULT_KEY = "fleet"
RETRY_S_MIN, RETRY_S_MAX = 0.2, 5.0
DETAIL_MAX = 2000
STATE_BYTES_MAX = 64 * 1024


async def run_executor(
    settings: Settings, deployment: Deployment, target: ActionTarget, stop: asyncio.Event, *, dry_run: bool = False
) -> None:
    """Runs an executor until `stop` is set. Raises SettingsError."""
    await Executor(settings, deployment, target, load_options(), dry_run).run(stop)


def result_of(decision: Decision, executor: str, answer: Answer, took_s: float, dry_run: bool) -> ExecutorResult:
    """The fact to append: its id is the same however often the same dispatch ends in the same way."""
    return ExecutorResult(
        id=f"{decision.id}/{decision.epoch}/{answer.outcome}" + ("/dry" if dry_run else ""),
        decision_id=decision.id,
        epoch=decision.epoch,
        executor=executor,
        outcome=answer.outcome,
        dry_run=dry_run,
        before=answer.before or {},
        after=answer.after or {},
        detail=answer.detail[:DETAIL_MAX],
        took_s=round(max(0.0, took_s), 6),
    )


class Executor:
    """One target's executor. `dry_run`: nothing is changed at the target, and the results say so."""

    def __init__(
        self,
        settings: Settings,
        deployment: Deployment,
        target: ActionTarget,
        options: ExecutorOptions,
        dry_run: bool = False,
    ) -> None:
        self.settings, self.deployment, self.target, self.options = settings, deployment, target, options
        self.dry_run = dry_run
        self.metrics = ExecutorMetrics(target.name)
        self.producer = EdgeProducer(settings, f"executor/{target.name}")
        self.acting = Acting(target, options, self.now_s, deployment.speed, self._answer, self.metrics, dry_run)
        self.caught_up = False
        self._position = 0

    def now_s(self) -> float:
        """Fleet time, Unix s."""
        return fleet_now_ms(self.deployment) / 1000

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; what is under way then has `stop_within_s` to end."""
        health = HealthServer(self.settings.web_host, self.options.health_port, lambda: "", self._unready, self.metrics)
        health.start()
        await self.target.open()
        await self.producer.start()
        reading = asyncio.create_task(self._read())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
        finally:
            reading.cancel()
            stopping.cancel()
            await asyncio.gather(reading, stopping, return_exceptions=True)
            await self.acting.stop(self.options.stop_within_s)
            await self.producer.stop()
            await self.target.close()
            health.stop()

    def _unready(self) -> list[str]:
        reasons = [] if self.caught_up else ["decisions have not been read to their end yet"]
        return reasons if self.producer.connected else [*reasons, "the broker cannot be reached"]

    async def _read(self) -> None:
        backoff = RETRY_S_MIN
        while True:
            try:
                if not self.caught_up:
                    await self._catch_up()
                    self.caught_up = True
                    log.info("executor ready", executor=self.target.name, dry_run=self.dry_run)
                async with LogReader(self.settings, DECISIONS, start={0: self._position}) as reader:
                    async for batch in reader.follow():
                        backoff = RETRY_S_MIN
                        for record in batch:
                            self._position = record.offset + 1
                            if (decision := self._decoded(record)) is not None:
                                self.acting.take(decision)
            except (KafkaError, UnavailableError, OSError) as error:
                log.warning("decisions cannot be read; trying again", error=str(error), in_s=backoff)
                await asyncio.sleep(backoff)
                backoff = min(RETRY_S_MAX, backoff * 2)

    async def _catch_up(self) -> None:
        """Rebuilds what is in force, and takes what was dispatched meanwhile and nobody has answered."""
        dispatched: dict[str, Decision] = {}
        async for record in read_to_end(self.settings, DECISIONS):
            self._position = record.offset + 1
            decision = self._decoded(record)
            if decision is None:
                continue
            self.acting.note(decision)
            dispatched.pop(decision.id, None)
            if decision.state == "dispatched":
                dispatched[decision.id] = decision
        if dispatched:
            first, wanted = min(d.epoch for d in dispatched.values()), ce_type(ExecutorResult.kind)
            async for record in read_to_end(self.settings, DECISION_EVENTS, start={0: first}):
                if header(record, "ce_type") == wanted and record.value:
                    self._note_result(record.value)
        for decision in sorted(dispatched.values(), key=lambda d: d.epoch):
            self.acting.take(decision)

    def _note_result(self, value: bytes) -> None:
        try:
            result = decode(ExecutorResult, value)
        except InvalidRecord as error:
            log.debug("not a result; the fleet level dead-letters it", error=str(error))
            return
        if not result.dry_run:
            self.acting.note_answer(result.decision_id, result.epoch)

    def _decoded(self, record: Any) -> Decision | None:
        """A decision of this executor, or None."""
        if not record.value or header(record, "ce_type") != ce_type(Decision.kind):
            return None
        try:
            decision = decode(Decision, record.value)
        except InvalidRecord as error:
            self.metrics.overflow("undecodable")
            log.error("a decision cannot be read and is left alone", offset=record.offset, error=str(error))
            return None
        return decision if decision.executor == self.target.name else None

    def _answer(self, decision: Decision, answer: Answer, took_s: float) -> None:
        result = result_of(decision, self.target.name, answer, took_s, self.dry_run)
        value = result.encode()
        if len(value) > STATE_BYTES_MAX:
            value = result.model_copy(update={"before": {}, "after": {}}).encode()
        self.producer.send(
            DECISION_EVENTS,
            RESULT_KEY,
            value,
            type=ce_type(ExecutorResult.kind),
            id=result.id,
            at_ms=fleet_now_ms(self.deployment),
        )
        log.info(
            "decision answered",
            decision=decision.id,
            epoch=decision.epoch,
            outcome=answer.outcome,
            detail=answer.detail,
            dry_run=self.dry_run,
        )
