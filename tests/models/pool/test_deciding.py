"""What a pool asks for and when: the fast path, holding back, what outcomes change, the clock from step to action."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from models.pool.asking import Asking
from models.pool.orders import Orders, proposal_id
from schemas.decisions import Expected, Outcome, RerouteAction, ScaleAction
from schemas.log import LogRecord, Result
from tests.models.law import tick
from tests.models.pool.signals import (
    T0,
    engine_window,
    json_record,
    pool_config,
    pool_fold,
    request_window,
    world,
)


def numbered(records: Sequence[LogRecord]) -> list[LogRecord]:
    """With offsets in order."""
    return [record._replace(offset=i) for i, record in enumerate(records)]


def kinds(out: Sequence[Result], kind: str) -> list[dict[str, Any]]:
    """The records of one kind, as plain values."""
    return [json.loads(result.value) for result in out if result.type == f"fleetloop.{kind}.v1"]


def proposals(records: Sequence[LogRecord]) -> list[dict[str, Any]]:
    """What a log makes the pool propose."""
    return kinds(pool_fold().apply(numbered(records)), "decision.proposed")


def outcome(second: float, version: int, state: str, replicas: int, id: str = "0123456789abcdef") -> LogRecord:
    """What became of a decision."""
    record = Outcome(
        decision_id=id,
        pool="chat",
        version=version,
        state=state,  # type: ignore[arg-type]
        at_s=second,
        decision_kind="scale",
        action=ScaleAction(replicas=replicas),
        expected=Expected(slo_attainment_low=0.9, horizon_s=60.0),
    )
    return json_record(second, record)


def test_a_load_step_is_asked_for_within_three_seconds() -> None:
    """The step at 120 s needs more than is ordered once the 60 s mean says so: asked at once, not at the next tick."""
    made = proposals(world([3.0] * 12 + [20.0] * 2, replicas=5))
    first = made[0]
    assert first["action"]["replicas"] > 5
    arrived = 60 * (5 - 1) / 1.15 / 1.0  # requests in 60 s above which 5 replicas are too few
    excess_s = T0 + 120 + (arrived - 60 * 3.0) / (20.0 - 3.0)
    assert first["trigger_s"] <= excess_s + 1.0
    assert first["at_s"] - first["trigger_s"] <= 2.5
    assert "needs" in first["reason"]
    assert "take" in first["reason"]
    assert first["undo"] == {"type": "scale", "replicas": 5}


def test_no_scale_down_before_the_hold_window_has_been_seen() -> None:
    """What was before the first window is unknown, not zero: a fleet at its static peak keeps it for 600 s."""
    made = proposals(world([2.0] * 66, replicas=12))
    assert made
    assert all(one["action"]["replicas"] < 12 for one in made)
    assert made[0]["at_s"] >= T0 + 600


@pytest.mark.parametrize(
    ("spec", "asks"),
    [
        ({"mode": "observe"}, False),
        ({"mode": "shadow"}, True),
        ({"mode": "approve"}, True),
        ({"replicas_max": 5}, False),
    ],
)
def test_modes_and_bounds(spec: dict[str, Any], asks: bool) -> None:
    """In observe mode nothing is proposed, in the others it is; nothing is asked that the pool's bounds forbid."""
    assert bool(proposals(world([3.0] * 12 + [20.0] * 3, replicas=5, **spec))) is asks


def test_without_policy_nothing_is_proposed_and_that_is_said() -> None:
    """A pool without a pool object: a finding, costs, no proposal."""
    out = pool_fold().apply(numbered(world([3.0] * 12 + [20.0] * 3, replicas=5)[1:]))
    assert not kinds(out, "decision.proposed")
    assert [one["finding"] for one in kinds(out, "finding")] == ["policy_missing"]


def test_stale_evidence_holds_every_action() -> None:
    """The load source falls silent: a finding, and no scale-down however long; it closes when the source is back."""
    records = world([6.0] * 62, replicas=20, stabilisation_s=0.0)
    end = T0 + 620
    engines = [
        engine_window(end + 10.0 * i + 2, end + 10 * i - 10, 10_000 + i, [{"replica": f"r{n}"} for n in range(20)])
        for i in range(1, 30)
    ]
    fold = pool_fold()
    out = fold.apply(numbered([*records, *engines]))
    late = [one for one in kinds(out, "decision.proposed") if one["at_s"] > end + 40]
    assert not late
    said = [(one["finding"], one["open"], one["at_s"]) for one in kinds(out, "finding")]
    assert {one[:2] for one in said} == {("stale_data", True)}
    assert all(b[2] - a[2] >= 60 for a, b in pairwise(said))
    back = request_window(end + 300.0, end + 290, 20_000, [{"tenant": "acme", "arrivals": 9}])
    out = fold.apply([back._replace(offset=90_000), tick(end + 312)._replace(offset=90_001)])
    assert [(one["finding"], one["open"]) for one in kinds(out, "finding")] == [("stale_data", False)]


def test_one_silent_source_of_two_holds_too() -> None:
    """Half of the load is hidden: that is not half the load."""
    both = []
    for i in range(75):
        for number in (0, 1):
            if number == 1 and i >= 65:
                continue
            row = {"tenant": "acme", "arrivals": 50, "ends": 50}
            both.append(
                request_window(T0 + 10.0 * i + 12, T0 + 10 * i, i + 1, [row], source=f"request.traces/{number}")
            )
        both.append(engine_window(T0 + 10.0 * i + 12, T0 + 10 * i, i + 1, [{"replica": f"r{n}"} for n in range(14)]))
    made = proposals([pool_config(T0), *both])
    assert all(one["action"]["replicas"] >= 12 for one in made)


def test_an_idle_engine_is_evidence_of_no_load() -> None:
    """Engines that say that nothing runs and nothing waits are newer evidence than the last request."""
    rows = [{"replica": "r0", "running_last": 0.0, "running_mean": 0.0}]
    engines = [engine_window(T0 + 10.0 * i + 12, T0 + 10 * i, i + 1, rows) for i in range(20)]
    out = pool_fold().apply(numbered([*world([1.0])[:2], *engines]))
    assert "stale_data" not in [one["finding"] for one in kinds(out, "finding")]
    assert kinds(out, "pool.status")[-1]["evidence_s"] >= T0 + 190


def test_the_target_is_what_was_found_then_what_was_ordered() -> None:
    """First target: allocated replicas once engines were heard for 15 s; then the last dispatched or executed order."""
    records = world([3.0] * 6, replicas=5)
    records.insert(-8, outcome(records[-9].at_ms / 1000, 7, "dispatched", 6))
    targets = [one["replicas_target"] for one in kinds(pool_fold().apply(numbered(records)), "pool.status")]
    assert targets[0] == 5
    assert targets[-1] == 6


def test_outcomes_are_upserts() -> None:
    """An older version of an outcome changes nothing, whatever the order of arrival."""
    orders = Orders()
    orders.target = 3
    new = Outcome.model_validate_json(outcome(T0, 9, "executed", 8).value)
    old = Outcome.model_validate_json(outcome(T0, 4, "dispatched", 5).value)
    assert orders.hear(new, T0)
    assert not orders.hear(old, T0 + 1)
    assert orders.target == 8


def test_never_two_open_proposals_of_a_kind() -> None:
    """While one waits nothing else is asked; approval pending gives way only to something materially different."""
    orders = Orders()
    orders.target = 10
    orders.ask("a" * 16, "scale", ScaleAction(replicas=20), T0, T0, T0 + 300)
    assert not orders.may_ask("scale", ScaleAction(replicas=25), T0 + 5)
    orders.open["scale"]["state"] = "pending"
    assert not orders.may_ask("scale", ScaleAction(replicas=21), T0 + 5)
    assert orders.may_ask("scale", ScaleAction(replicas=25), T0 + 5)
    assert orders.may_ask("scale", ScaleAction(replicas=8), T0 + 5)
    orders.open["scale"]["state"] = "dispatched"
    assert orders.may_ask("scale", ScaleAction(replicas=21), T0 + 5)


@pytest.mark.parametrize(("state", "wait_s"), [("blocked", 10), ("rejected", 300), ("superseded", 0)])
def test_the_same_is_asked_again_only_after_a_while(state: str, wait_s: float) -> None:
    """After an end without effect the same action waits; another one does not."""
    orders = Orders()
    orders.target = 10
    orders.ask("0123456789abcdef", "scale", ScaleAction(replicas=20), T0, T0, T0 + 300)
    orders.hear(Outcome.model_validate_json(outcome(T0 + 1, 3, state, 20).value), T0 + 1.0)
    assert orders.may_ask("scale", ScaleAction(replicas=20), T0 + 1 + int(wait_s))
    if wait_s:
        assert not orders.may_ask("scale", ScaleAction(replicas=20), T0 + int(wait_s))
        assert orders.may_ask("scale", ScaleAction(replicas=22), T0 + 2)


def test_a_failed_order_gives_the_old_target_back() -> None:
    """What could not be done is not in force."""
    orders = Orders()
    orders.target = 10
    for version, state in ((1, "dispatched"), (2, "failed")):
        orders.hear(Outcome.model_validate_json(outcome(T0, version, state, 20).value), T0 + version)
    assert orders.target == 10


def _end(orders: Orders, now_s: float, replicas: int, note: str, state: str = "blocked") -> None:
    """A scale is asked for and ends so a second later."""
    id = proposal_id("local/chat", "scale", int(now_s), 1, ScaleAction(replicas=replicas))
    orders.ask(id, "scale", ScaleAction(replicas=replicas), now_s, int(now_s), now_s + 300)
    said = Outcome.model_validate_json(outcome(now_s, int(now_s), state, replicas, id).value)
    orders.hear(said.model_copy(update={"note": note}), now_s)


def _waits_s(orders: Orders, now_s: float, replicas: int) -> int:
    """After how many seconds an action may be asked for again."""
    action = ScaleAction(replicas=replicas)
    return next(s for s in range(1, 1000) if orders.may_ask("scale", action, int(now_s) + s))


def test_blocked_again_for_the_same_cause_waits_longer() -> None:
    """10, 20, 40, then 60 s while the same is wanted and the words differ in figures only; another want asks at once,
    and one that goes to and fro waits for each of the two."""
    orders, now = Orders(), float(T0)
    orders.target = 10
    waits = []
    for i in range(6):
        _end(orders, now, 20, f"gpu budget: {48 - i} of 48 H100")
        waits.append(_waits_s(orders, now, 20))
        now += waits[-1]
    assert waits == [10, 20, 40, 60, 60, 60]
    _end(orders, now, 20, "gpu budget: 3 of 48 H100")
    assert _waits_s(orders, now, 21) == 1
    _end(orders, now + 1, 21, "gpu budget: 3 of 48 H100")
    assert _waits_s(orders, now + 1, 20) == 59
    assert _waits_s(orders, now + 1, 21) == 10


def test_a_block_for_another_cause_or_after_a_while_begins_anew() -> None:
    """What is blocked for a new reason, or was not wanted for a time, waits as after its first block; an order that
    got through lifts every block but no rejection."""
    orders, now = Orders(), float(T0)
    orders.target = 10
    for cause, wait_s in (("money: 3", 10), ("money: 4", 20), ("cooldown: 4 s", 10), ("cooldown: 5 s", 20)):
        _end(orders, now, 20, cause)
        assert _waits_s(orders, now, 20) == wait_s
        now += wait_s
    now += 100
    _end(orders, now, 20, "cooldown: 6 s")
    assert _waits_s(orders, now, 20) == 10
    _end(orders, now + 1, 30, "not today", "rejected")
    _end(orders, now + 2, 15, "to the executor", "dispatched")
    assert _waits_s(orders, now + 3, 20) == 1
    assert _waits_s(orders, now + 3, 30) == 298


@pytest.mark.parametrize("state", ["failed", "expired", "shadowed"])
def test_what_was_not_carried_out_is_not_in_force(state: str) -> None:
    """Weights that the executor could not set, found expired or only rehearsed, are not in force: asked for again. An
    order repeated in vain leaves the target as it is."""
    orders = Orders()
    orders.target = 10
    orders.weights = {"r1": 0.1}
    base = Outcome.model_validate_json(outcome(T0, 0, "dispatched", 0).value)
    reroute = {"decision_kind": "reroute", "action": RerouteAction(weights={"r1": 0.1, "r2": 0.1})}
    for version, step in ((1, "dispatched"), (2, state)):
        orders.hear(base.model_copy(update={**reroute, "version": version, "state": step}), T0)
    assert orders.weights == {"r1": 0.1}
    for number, replicas in enumerate((12, 12)):
        steps = ("dispatched", "executed" if number == 0 else state)
        for version, step in enumerate(steps):
            orders.hear(Outcome.model_validate_json(outcome(T0, version, step, replicas, f"order-{number}").value), T0)
    assert orders.target == 12


def test_what_somebody_else_asked_for_is_not_held_against_our_own() -> None:
    """A person's order that failed is what is not asked again for a while, not what we had asked for before."""
    orders, now = Orders(), float(T0)
    orders.target = 10
    _end(orders, now, 12, "by the executor", "executed")
    for version, state in ((1, "dispatched"), (2, "failed")):
        orders.hear(Outcome.model_validate_json(outcome(now, version, state, 8, "somebody-else").value), now)
    assert orders.target == 12
    assert _waits_s(orders, now, 12) == 1
    assert _waits_s(orders, now, 8) == 30


def test_proposal_ids_name_what_is_asked() -> None:
    """The same question at the same second has the same id; any other has another."""
    one = proposal_id("local/chat", "scale", T0, 1, ScaleAction(replicas=3))
    assert one == proposal_id("local/chat", "scale", T0, 1, ScaleAction(replicas=3))
    others = [
        proposal_id("local/code", "scale", T0, 1, ScaleAction(replicas=3)),
        proposal_id("local/chat", "scale", T0 + 1, 1, ScaleAction(replicas=3)),
        proposal_id("local/chat", "scale", T0, 2, ScaleAction(replicas=3)),
        proposal_id("local/chat", "scale", T0, 1, ScaleAction(replicas=4)),
    ]
    assert len({one, *others}) == 5


def test_since_when_a_level_has_been_asked() -> None:
    """The clock starts when a level is first wanted and runs on until it is ordered or no longer wanted."""
    asking = Asking()
    assert asking.look(4, 4, 100) == 100
    assert asking.look(5, 4, 101) == 101
    assert asking.look(5, 4, 102) == 101
    assert asking.look(7, 4, 103) == 103
    assert asking.look(6, 4, 104) == 103
    assert asking.look(7, 5, 105) == 105
    assert asking.look(5, 5, 106) == 106
    assert asking.look(6, 5, 107) == 107


def test_a_queue_asks_for_more() -> None:
    """Waiting requests beyond 3 s of arrivals add replicas that clear them in two minutes."""
    records = world([3.0] * 8, replicas=6)
    rows = [{"replica": f"r{n}", "waiting_last": 100.0} for n in range(6)]
    last = records[-1].at_ms / 1000
    jam = [engine_window(last + 1, T0 + 80, 10_000, rows, closed=False), tick(last + 12), tick(last + 13)]
    made = proposals([*records, *jam])
    assert made[-1]["action"]["replicas"] > 6
    assert "600 requests wait" in made[-1]["reason"]
