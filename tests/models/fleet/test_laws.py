"""What holds for every log: the law of folds, and that nothing gets past table, constraints, gate and budget."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from models.fleet.audit import broken_at
from models.fleet.states import TABLE
from schemas.base import Record, decode
from schemas.decisions import Command, Decision, ScaleAction
from schemas.log import LogRecord
from schemas.topics import ce_type
from tests.models import law
from tests.models.fleet.making import (
    T0,
    Run,
    answer,
    command,
    config,
    make_fold,
    pool_config,
    proposal,
    reroute,
    signers,
    status,
    verdict,
)

BUDGET = 24  # GPUs; 12 replicas of 2
POOLS = {"p": {"mode": "automatic", "replicas_max": 8}, "q": {"mode": "approve", "replicas_max": 9}}
POOL = st.sampled_from(sorted(POOLS))
STEP_S = st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0, 5.0, 31.0, 80.0])


class Fleet:
    """A run of two pools, and drawn records that fit what it has come to."""

    def __init__(self) -> None:
        objects = [pool_config(name, **spec) for name, spec in POOLS.items()]
        bounds = config("fleet", "fleet", gpus_max={"A": BUDGET})
        few = config(
            "limits", "limits", actions_per_minute_max=4, decisions_max=6, open_decisions_max=3, commands_max=9
        )
        self.run = Run(*objects, config("price", "A", usd_per_gpu_hour=2.0), bounds, few, *signers())
        self.now = T0
        self.made = 0
        self.has = {"p": 4, "q": 4}
        self.say("p", 4)
        self.say("q", 4)

    def at(self, value: Record | None) -> None:
        for result in self.run.at(self.now, value):
            if result.topic != "decisions":
                continue
            found = decode(Decision, result.value)
            if found.state == "executed" and isinstance(found.proposal.action, ScaleAction):
                self.has[found.proposal.target.pool] = found.proposal.action.replicas

    def say(self, pool: str, replicas: int, **fields: Any) -> None:
        self.made += 1
        self.at(status(pool, self.now, replicas, version=self.made, **fields))

    def id(self, again: int | None) -> str:
        self.made += 1
        return f"d{self.made if again is None else again:07}"

    def of_state(self, *states: str) -> list[Decision]:
        return [d for d in self.run.decisions().values() if d.state in states]

    def step(self, draw: Any) -> None:
        """One drawn record."""
        self.now += draw(STEP_S)
        kind = draw(st.sampled_from(["tick", "say", "scale", "scale", "route", "answer", "verdict", "order", "pause"]))
        pool = draw(POOL)
        if kind == "tick":
            self.at(None)
        elif kind == "say":
            self.say(pool, self.has[pool], replicas_wanted=draw(st.none() | st.integers(0, 9)))
        elif kind == "scale":
            life = draw(st.sampled_from([-1.0, 20.0, 200.0]))
            again = draw(st.none() | st.none() | st.integers(1, 9))
            self.at(
                proposal(
                    self.id(again),
                    self.now,
                    pool,
                    draw(st.integers(0, 14)),
                    expires_s=self.now + life,
                    reverts=draw(st.none() | st.none() | st.sampled_from(["d0000004", "d0000007"])),
                )
            )
        elif kind == "route":
            weights = {"r1": draw(st.sampled_from([0.0, 0.5, 1.0]))}
            self.at(reroute(self.id(None), self.now, weights, pool))
        elif kind == "answer":
            self._answer(draw)
        elif kind == "verdict":
            ids = [d.id for d in self.of_state("executed", "dispatched")] or ["unknown0"]
            self.at(
                verdict(draw(st.sampled_from(ids)), self.now, draw(st.sampled_from(["verified", "regressed"])), pool)
            )
        else:
            self._command(draw, kind, pool)

    def _answer(self, draw: Any) -> None:
        known = [d for d in self.run.decisions().values() if any(h.state == "dispatched" for h in d.history)]
        if known:
            found = draw(st.sampled_from(known))
            word = draw(st.sampled_from(["executed", "executed", "failed", "skipped"]))
            self.at(answer(found, word, epoch=draw(st.sampled_from([found.epoch, found.epoch, 3]))))

    def _command(self, draw: Any, kind: str, pool: str) -> None:
        self.made += 1
        role = draw(st.sampled_from(["approver", "approver", "admin", "viewer", "stranger"]))
        fields: dict[str, Any] = {}
        if kind == "pause":
            name = draw(st.sampled_from(["pause", "resume", "resume"]))
            fields["pool"] = draw(st.sampled_from([pool, None]))
        else:
            name = draw(st.sampled_from(["approve", "approve", "reject", "revert"]))
            fields["decision_id"] = draw(st.sampled_from([*self.run.decisions(), "unknown0"]))
        self.at(command(f"c{self.made}", name, self.now, role, **fields))


@settings(max_examples=60)
@given(data=st.data())
def test_the_law_of_folds(data: Any) -> None:
    """Any split of the records, with load(dump()) between any two, gives the same results and dump."""
    fleet = Fleet()
    for _ in range(data.draw(st.integers(0, 40), label="steps")):
        fleet.step(data.draw)
    law.check_law(make_fold, fleet.run.log, data)


def test_every_container_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fold keeps is bounded by a setting with a counter; copies of the configuration are as large as that."""
    for name in ("fleet.specs", "fleet.revisions", "fleet.prices", "fleet.paused", "signers"):
        monkeypatch.setitem(law.BASE_CONTAINERS, name, "as large as fleet.config, which operators write")
    law.check_bounds(Fleet().run.fold)


class Governed(RuleBasedStateMachine):
    """Two pools under one budget, and anybody who says anything."""

    @initialize()
    def begin(self) -> None:
        self.fleet = Fleet()

    @rule(data=st.data())
    def anything(self, data: Any) -> None:
        self.fleet.step(data.draw)

    @rule(data=st.data())
    def again(self, data: Any) -> None:
        """What was said is said again: a command that counted, or was refused, changes nothing more."""
        run = self.fleet.run
        old: LogRecord = data.draw(st.sampled_from(run.log))
        entry = old._replace(offset=len(run.log), at_ms=run.log[-1].at_ms)
        run.log.append(entry)
        got = run.fold.apply([entry])
        run.results += got
        if old.type == ce_type(Command.kind):
            assert [r for r in got if r.topic != "dead.letters"] == []

    @invariant()
    def at_most_one_is_in_force(self) -> None:
        slots = [(d.proposal.target.key, d.proposal.decision_kind) for d in self.fleet.of_state("dispatched")]
        assert len(slots) == len(set(slots))

    @invariant()
    def every_way_is_one_of_the_table(self) -> None:
        for d in self.fleet.run.decisions().values():
            path = [h.state for h in d.history]
            assert path[0] == "proposed"
            for before, after in pairwise(path):
                assert after in TABLE[before].values()
            if "dispatched" in path:
                assert d.mode in ("approve", "automatic")
                assert d.epoch == next(h.offset for h in d.history if h.state == "dispatched")
                if d.proposal.target.pool == "q":
                    assert next(h.actor for h in d.history if h.state == "approved") == "ann"
                if isinstance(d.proposal.action, ScaleAction):
                    most = POOLS[d.proposal.target.pool]["replicas_max"]
                    assert 1 <= d.proposal.action.replicas <= most  # type: ignore[operator]

    @invariant()
    def the_budget_holds(self) -> None:
        ordered = dict(self.fleet.has)
        for d in self.fleet.of_state("dispatched"):
            if isinstance(d.proposal.action, ScaleAction):
                ordered[d.proposal.target.pool] = d.proposal.action.replicas
        assert 2 * sum(ordered.values()) <= BUDGET

    @invariant()
    def the_audit_has_every_step(self) -> None:
        entries = self.fleet.run.audit()
        assert broken_at(entries) is None
        steps = sum(len(d.history) for d in self.fleet.run.decisions().values())
        told = [e for e in entries if e.decision_id and not e.event.startswith("refused")]
        assert len(told) >= steps

    @invariant()
    def one_version_of_a_decision_a_record(self) -> None:
        ids = [r.id for r in self.fleet.run.results if r.topic == "decisions"]
        assert len(ids) == len(set(ids))

    @invariant()
    def what_is_remembered_is_bounded(self) -> None:
        fold = self.fleet.run.fold
        assert len(fold.book.ended) <= 6
        assert len(fold.book.open()) <= 3
        assert len(fold.seen.ids) <= 9
        assert len(fold.life.dispatches) <= 4

    def teardown(self) -> None:
        """In the end everything has ended."""
        if hasattr(self, "fleet"):
            self.fleet.now += 1000
            self.fleet.at(None)
            assert self.fleet.of_state("proposed", "pending", "approved", "dispatched") == []


TestGoverned = Governed.TestCase
TestGoverned.settings = settings(max_examples=40, stateful_step_count=50)


def test_a_changed_entry_breaks_the_chain() -> None:
    """Any field of any entry that was changed afterwards, a hole or a swap is found at its place."""
    fleet = Fleet()
    fleet.at(proposal("a", T0))
    entries = fleet.run.audit()
    assert len(entries) == 3
    for change in ({"actor": "eve"}, {"cause": "x"}, {"at_s": 1.0}, {"action": None}, {"previous": "0" * 63 + "1"}):
        assert broken_at([entries[0], entries[1].model_copy(update=change), entries[2]]) == 1
    assert broken_at([entries[0], entries[2]]) == 1
    assert broken_at([entries[1], entries[0], entries[2]]) == 0
    assert broken_at(entries[1:], entries[0].hash, 1) is None
