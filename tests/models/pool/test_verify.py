"""Verdicts: expected against measured after the horizon, reverts once, frozen after two."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from models.pool.verify import FREEZE_S, Watch, judge
from models.pool.windows import ARRIVALS, GOOD, JUDGED, SUMS, R, Windows
from schemas.decisions import Expected, Outcome, RerouteAction, ScaleAction
from schemas.log import LogRecord
from tests.models.law import tick
from tests.models.pool.signals import (
    T0,
    config,
    engine_window,
    json_record,
    pool_config,
    pool_fold,
    request_window,
)


def executed(second: float, version: int, body: dict[str, Any]) -> LogRecord:
    """A proposal was carried out as asked."""
    action = (ScaleAction if body["action"]["type"] == "scale" else RerouteAction).model_validate(body["action"])
    record = Outcome(
        decision_id=body["id"],
        pool="chat",
        version=version,
        state="executed",
        at_s=second,
        decision_kind=body["decision_kind"],
        action=action,
        expected=Expected.model_validate(body["expected"]),
        reverts=body["reverts"],
    )
    return json_record(second, record)


class World:
    """A pool whose proposals are carried out at once, `start_s` seconds later for new replicas."""

    def __init__(self, replicas: int, obeys: bool = True, **spec: Any) -> None:
        self.fold = pool_fold()
        self.replicas = replicas
        self.obeys = obeys
        self.offset = 0
        self.second = T0
        self.good = 1.0
        self.said: list[tuple[str, dict[str, Any]]] = []
        base = {"cold_start_s": 20.0, "reserve": 1.0, **spec}
        self.apply([pool_config(T0, **base), config(T0, "price", "H100", {"usd_per_gpu_hour": 3.6})])

    def run(self, rate: float, windows: int) -> None:
        """So many windows at a rate; a share `good` of the requests meets the targets."""
        for _ in range(windows):
            start, n = self.second, int(rate * 10)
            self.second += 10
            row = {"tenant": "a", "arrivals": n, "ends": n, "slo_judged": n, "slo_good": int(n * self.good)}
            rows = [{"replica": f"r{i}"} for i in range(self.replicas)]
            records = [request_window(self.second + 0.3, start, self.offset + 1, [row])]
            if rows:
                records.insert(0, engine_window(self.second + 0.2, start, self.offset + 1, rows))
                records.append(engine_window(self.second + 1.2, start, self.offset + 2, rows))
            else:  # nothing is said of engines
                records.append(tick(self.second + 1.2))
            self.apply(records)

    def apply(self, records: list[LogRecord]) -> None:
        while records:
            out = self.fold.apply([r._replace(offset=self.offset + i) for i, r in enumerate(records)])
            self.offset += len(records)
            records = []
            for result in out:
                kind = result.type.removeprefix("fleetloop.").removesuffix(".v1")
                if kind not in ("decision.proposed", "decision.verdict", "finding"):
                    continue
                body = json.loads(result.value)
                self.said.append((kind, body))
                if kind == "decision.proposed":
                    if self.obeys:
                        self.replicas = body["action"]["replicas"]
                    records.append(executed(result.at_ms / 1000, self.offset, body))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """What was said of one kind."""
        return [body for name, body in self.said if name == kind]


def test_a_scale_up_is_verified_after_the_cold_start() -> None:
    """Replicas there, SLO kept: verified at cold start + 30 s, with expected and measured in words."""
    world = World(5)
    world.run(3.0, 4)
    world.run(9.0, 1)
    world.run(3.0, 12)
    proposal, verdict = world.of("decision.proposed")[0], world.of("decision.verdict")[0]
    assert verdict["decision_id"] == proposal["id"]
    assert verdict["verdict"] == "verified"
    assert verdict["at_s"] - proposal["at_s"] == pytest.approx(50, abs=11)
    assert "replicas ordered" in verdict["text"]
    assert "SLO attainment" in verdict["text"]


def test_an_order_without_effect_regressed_but_a_larger_pool_is_not_undone() -> None:
    """The ordered replicas never come: regressed, no revert (fewer replicas would not help), nothing frozen."""
    world = World(5, obeys=False)
    world.run(3.0, 4)
    world.run(9.0, 1)
    world.run(3.0, 12)
    assert [one["verdict"] for one in world.of("decision.verdict")][:1] == ["regressed"]
    assert all(one["reverts"] is None for one in world.of("decision.proposed"))
    assert "frozen" not in [one["finding"] for one in world.of("finding")]


def test_a_replaced_order_is_judged_before_the_newer_one() -> None:
    """During a ramp every order is verified by the time its successor is proposed, and its verdict comes first."""
    world = World(5)
    world.run(3.0, 4)
    for rate in (6.0, 9.0, 12.0, 15.0):
        world.run(rate, 3)
    names = [(kind, body.get("id", body.get("decision_id"))) for kind, body in world.said if kind != "finding"]
    proposed = [id for kind, id in names if kind == "decision.proposed"]
    assert len(proposed) > 2
    for old, new in pairwise(proposed):
        assert names.index(("decision.verdict", old)) < names.index(("decision.proposed", new))


def test_a_scale_down_that_hurts_is_reverted_once_then_frozen() -> None:
    """SLO collapses at planned load after a scale-down: regressed, reverted; the second time no more are proposed."""
    world = World(12)
    world.run(3.0, 66)
    downs = [one for one in world.of("decision.proposed") if one["action"]["replicas"] < 12]
    assert downs
    world.good = 0.5
    world.run(3.0, 10)
    reverts = [one for one in world.of("decision.proposed") if one["reverts"] is not None]
    assert reverts
    assert reverts[0]["action"]["replicas"] > reverts[0]["replicas_from"]
    assert "made things worse" in reverts[0]["reason"]
    regressed = [one["decision_id"] for one in world.of("decision.verdict") if one["verdict"] == "regressed"]
    assert reverts[0]["reverts"] in regressed
    assert len({one["reverts"] for one in reverts}) == len(reverts)
    before = len(world.of("decision.proposed"))
    world.run(3.0, 30)
    after = world.of("decision.proposed")[before:]
    assert all(one["action"]["replicas"] >= one["replicas_from"] for one in after)


@pytest.mark.parametrize(("judged", "good", "verified"), [(4, 3.8, True), (4, 3.0, False), (400, 380, False)])
def test_one_miss_of_twenty_is_no_regression(judged: float, good: float, verified: bool) -> None:
    """97 % are expected after a scale-down: 19 of 20 may be chance, 15 of 20 or 1900 of 2000 are not."""
    windows, sums = Windows(), [0.0] * len(SUMS)
    sums[ARRIVALS], sums[JUDGED], sums[GOOD] = judged, judged, good
    for start in range(T0, T0 + 60, 10):
        window = windows.window(start)
        assert window is not None
        window.requests["request.traces/0"] = [1, sums, {}]
    row: list[Any] = [1.0] * len(R) + ["ready", "H100", "n0"]
    item = {
        "action": ScaleAction(replicas=4).model_dump(),
        "held_before": 5,
        "executed_s": float(T0),
        "due_s": T0 + 60.0,
        "low": 0.97,
        "load_rps": 100.0,
    }
    found = judge(item, windows, {f"r{i}": row for i in range(4)}, T0 + 60.5, early=False)
    assert found is not None
    assert found.verified is verified


def test_where_no_replica_is_heard_of_nothing_is_judged() -> None:
    """The exporters fall silent after a scale-up: its replicas are unknown, not missing. Judged when they speak."""
    world = World(5)
    world.run(3.0, 4)
    world.run(9.0, 1)
    ordered, world.replicas = world.replicas, 0
    world.run(3.0, 12)
    assert world.of("decision.verdict") == []
    world.replicas = ordered
    world.run(3.0, 2)
    assert [one["verdict"] for one in world.of("decision.verdict")] == ["verified"]


def test_demand_above_the_plan_is_not_the_decisions_fault() -> None:
    """The SLO falls because far more came than was planned for: still verified."""
    world = World(5)
    world.run(3.0, 4)
    world.run(9.0, 1)
    world.good = 0.5
    world.run(3.0, 4)
    world.run(400.0, 2)
    first = world.of("decision.verdict")[0]
    assert first["verdict"] == "verified"


def test_two_regressions_within_an_hour_freeze_the_kind_for_an_hour() -> None:
    """Not one, not two far apart; a new policy lifts it."""
    watch = Watch()
    assert not watch.regressed("scale", T0)
    assert not watch.regressed("scale", T0 + FREEZE_S + 1)
    assert watch.regressed("scale", T0 + FREEZE_S + 2)
    assert watch.is_frozen("scale", T0 + FREEZE_S + 3)
    assert not watch.is_frozen("reroute", T0 + FREEZE_S + 3)
    assert not watch.is_frozen("scale", T0 + 2 * FREEZE_S + 2)
    watch.thaw()
    assert not watch.is_frozen("scale", T0 + FREEZE_S + 3)
