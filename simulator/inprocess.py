"""The whole loop in one process without Kafka: a list is a log too. For evaluation and tests, as fast as it computes.

The same folds read the same records as in a deployment; a record's log time is the fleet time at which it was
appended, an action is carried out the moment it is dispatched. What is left out is what a network adds.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from schemas.base import decode
from schemas.config import ConfigObject
from schemas.decisions import Decision, ExecutorResult, RerouteAction, ScaleAction
from schemas.errors import InvalidInput
from schemas.log import CONTENT_JSON, TICK, Fold, LogRecord, Result
from schemas.topics import DECISION_EVENTS, DECISIONS, LEVEL_TOPIC, TOPICS, ce_type
from simulator.fleet import Fleet
from simulator.ledger import Ledger
from simulator.publish import Publisher, scenario_config
from simulator.scenario import Scenario
from streams.clients import partition_of

LEVELS = ("node", "requests", "pool", "fleet")
EXECUTOR = "simulator"
PUBLISH_EVERY_S = 0.25
TICK_AFTER_S = 1.0
ROUNDS_MAX = 100
"""Passes over the logs in one instant: more would be a loop in which folds feed each other for ever."""
BASE_S = 1.75e9
"""Log time of fleet time 0: any fixed moment, so that runs are equal."""

MakeFold = Callable[[str, str, int, dict[str, int]], Fold]


def default_fold(level: str, topic: str, partition: int, partitions: dict[str, int]) -> Fold:
    """The fold of a level as agents bind it."""
    module = importlib.import_module(f"models.{level}.fold")
    fold: Fold = getattr(module, f"{level.capitalize()}Fold")(topic, partition, partitions)
    return fold


class _Partition:
    """One partition of a log with its fold: what was appended and not yet folded."""

    def __init__(self, fold: Fold) -> None:
        self.fold = fold
        self.pending: list[LogRecord] = []
        self.offset = 0
        self.appended_s = -1e9

    def append(self, now_s: float, type: str, key: str, value: bytes, content_type: str, id: str) -> None:
        self.pending.append(LogRecord(self.offset, round(now_s * 1000), type, key, value, content_type, id))
        self.offset += 1
        self.appended_s = now_s


class InProcessLoop:
    """A scenario's fleet under the loop's own control.

    Attributes
    ----------
    results: records published so far by topic. decisions: the newest version of each decision.
    """

    def __init__(
        self,
        scenario: Scenario,
        make_fold: MakeFold = default_fold,
        objects: list[ConfigObject] | None = None,
        on_result: Callable[[Result], None] | None = None,
    ) -> None:
        """`objects`: configuration in place of the scenario's own. `on_result`: sees every result of every fold."""
        self.fleet = Fleet(scenario)
        self.ledger = Ledger(self.fleet)
        self.results: Counter[str] = Counter()
        self.decisions: dict[str, Decision] = {}
        self.dropped: Counter[str] = Counter()  # nothing is: for the publisher
        self._on_result = on_result
        partitions = {name: topic.partitions_local for name, topic in TOPICS.items()}
        self._logs: dict[str, list[_Partition]] = {
            topic: [_Partition(make_fold(level, topic, i, partitions)) for i in range(partitions[topic])]
            for level, topic in LEVEL_TOPIC.items()
            if level in LEVELS
        }
        self._publisher = Publisher(self.fleet, self, BASE_S, partitions[LEVEL_TOPIC["requests"]])
        for item in scenario_config(scenario) if objects is None else objects:
            for log in self._logs.values():
                for partition in log:
                    kind = ce_type(ConfigObject.kind)
                    partition.append(self.log_s, kind, item.key, item.encode(), CONTENT_JSON, item.key)

    @property
    def log_s(self) -> float:
        """Log time now, Unix s."""
        return BASE_S + self.fleet.now_s

    def run(self, until_s: float) -> None:
        """Up to fleet time `until_s`, or until a trace and all its requests have ended."""
        while self.fleet.now_s < until_s and not self.fleet.idle:
            self.step()

    def step(self) -> None:
        """A quarter of a second of fleet time: events, telemetry, folds, actions."""
        step = round(self.fleet.now_s / PUBLISH_EVERY_S) + 1
        events = self.fleet.advance(step * PUBLISH_EVERY_S)
        self.ledger.add(events)
        self._publisher.take(events)
        self._publisher.flush_requests()
        self._publisher.publish_nodes()
        self._settle()
        now_s = self.log_s
        for log in self._logs.values():
            for partition in log:
                if now_s - partition.appended_s >= TICK_AFTER_S:
                    partition.append(now_s, TICK, "", b"", CONTENT_JSON, "")
        self._settle()

    def report(self) -> dict[str, Any]:
        """The ledger's report with `records` by topic and `decisions` by kind, then state."""
        kinds: dict[str, Counter[str]] = {}
        for decision in self.decisions.values():
            kinds.setdefault(decision.proposal.decision_kind, Counter())[decision.state] += 1
        return {
            **self.ledger.report(),
            "records": dict(self.results),
            "decisions": {k: dict(v) for k, v in kinds.items()},
        }

    def send(
        self,
        topic: str,
        key: str,
        value: bytes,
        *,
        type: str,
        id: str,
        content_type: str = CONTENT_JSON,
        partition: int | None = None,
    ) -> None:
        """Appends a record to a level's log (what a producer does)."""
        log = self._logs[topic]
        chosen = partition_of(key.encode(), len(log)) if partition is None else partition
        log[chosen].append(self.log_s, type, key, value, content_type, id)

    def _settle(self) -> None:
        """Folds until nothing is pending: results that are another level's input are appended to its log."""
        for _ in range(ROUNDS_MAX):
            results: list[Result] = []
            for log in self._logs.values():
                for partition in log:
                    if partition.pending:
                        taken, partition.pending = partition.pending, []
                        results += partition.fold.apply(taken)
            if not results:
                return
            for result in results:
                self._route(result)
        raise AssertionError(f"folds feed each other after {ROUNDS_MAX} rounds at {self.log_s}")

    def _route(self, r: Result) -> None:
        self.results[r.topic] += 1
        if self._on_result is not None:
            self._on_result(r)
        if r.topic in self._logs:
            self.send(r.topic, r.key, r.value, type=r.type, id=r.id, content_type=r.content_type, partition=r.partition)
        elif r.topic == DECISIONS:
            decision = decode(Decision, r.value)
            known = self.decisions.get(decision.id)
            if known is None or known.version <= decision.version:
                self.decisions[decision.id] = decision
                if decision.state == "dispatched" and decision.executor == EXECUTOR:
                    self._execute(decision)

    def _execute(self, decision: Decision) -> None:
        proposal = decision.proposal
        if proposal.expires_s < self.log_s:
            self._answer(decision, "skipped", "expired")
            return
        try:
            outcome = self._act(proposal.target.pool, proposal.action, decision.epoch)
        except InvalidInput as error:
            self._answer(decision, "failed", str(error))
        else:
            self._answer(decision, "executed" if outcome.accepted else "skipped", outcome.reason)

    def _act(self, pool: str, action: ScaleAction | RerouteAction, epoch: int) -> Any:
        if isinstance(action, ScaleAction):
            return self.fleet.scale(pool, action.replicas, epoch)
        if action.scope == "replicas":
            return self.fleet.set_replica_weights(pool, action.weights, epoch)
        return self.fleet.set_pool_weights(pool, action.weights, epoch)

    def _answer(self, decision: Decision, outcome: Any, detail: str) -> None:
        result = ExecutorResult(
            id=f"{decision.id}/{decision.epoch}/{outcome}",
            decision_id=decision.id,
            epoch=decision.epoch,
            executor=EXECUTOR,
            outcome=outcome,
            detail=detail,
        )
        self.send(DECISION_EVENTS, "fleet", result.encode(), type=ce_type(ExecutorResult.kind), id=result.id)
