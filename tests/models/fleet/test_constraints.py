"""Constraints: what each lets through, makes smaller or blocks, and that its words have figure and remedy."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from models.fleet.budgets import period
from schemas.decisions import ScaleAction, Target
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
    started,
    status,
)


def outcome(run: Run, id: str = "a") -> tuple[str, Any, str]:
    """(state, replicas or weights as they will be done, first constraint's name)."""
    found = run.decision(id)
    action = found.proposal.action
    named = found.constraints[0].partition(":")[0] if found.constraints else ""
    return found.state, action.replicas if isinstance(action, ScaleAction) else action.weights, named


@pytest.mark.parametrize(
    ("spec", "asked", "expected"),
    [
        ({"replicas_max": 5}, 9, ("dispatched", 5, "max")),
        ({"replicas_max": 4}, 9, ("blocked", 4, "max")),
        ({"replicas_min": 3}, 1, ("dispatched", 3, "min")),
        ({"replicas_min": 9, "replicas_max": 8}, 5, ("dispatched", 8, "min")),
        ({"step_up_max": 2}, 9, ("dispatched", 6, "step")),
        ({"step_down_max": 1}, 1, ("dispatched", 3, "step")),
        ({}, 4, ("blocked", 4, "no change")),
        ({}, 6, ("dispatched", 6, "")),
    ],
)
def test_bounds_and_steps_make_an_action_smaller(
    spec: dict[str, Any], asked: int, expected: tuple[str, int, str]
) -> None:
    """Of 4 replicas: the action becomes what is admitted and says so; what is left of nothing is blocked."""
    run = started(**spec)
    run.at(T0 + 1, proposal("a", T0 + 1, replicas=asked))
    assert outcome(run) == expected


def test_the_same_order_again_is_done_only_where_the_pool_has_drifted() -> None:
    """An order repeated is no change, unless fewer or more replicas are allocated than ordered."""
    run = started()
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + 1, answer(run.decision("a")))
    run.at(T0 + 2, status("p", T0 + 2, 6))
    run.at(T0 + 2, proposal("b", T0 + 2))
    assert run.state("b") == "blocked"
    run.at(T0 + 3, status("p", T0 + 3, 5))
    run.at(T0 + 3, proposal("c", T0 + 3))
    assert run.state("c") == "dispatched"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"pool": "unknown"}, "policy"),
        ({"target": Target(pool="p", cluster="elsewhere")}, "policy"),
        ({"policy_revision": 0}, "policy"),
        ({"decision_kind": "place"}, "kind"),
        ({"evidence_s": T0 - 30}, "freshness"),
        ({"evidence_s": T0 + 1000}, "freshness"),
    ],
)
def test_a_proposal_without_policy_or_fresh_evidence_is_blocked(fields: dict[str, Any], name: str) -> None:
    """No policy, another cluster, an older revision, another kind, old or future evidence: blocked in words."""
    run = started()
    run.at(T0 + 1, proposal("a", T0 + 1, **fields))
    state, _, named = outcome(run)
    assert (state, named) == ("blocked", name)
    assert "lifts" in run.decision("a").constraints[0]


@pytest.mark.parametrize("said", [None, {"evidence_s": None}, {"evidence_s": T0 - 31}])
def test_a_pool_that_says_nothing_fresh_is_left_as_it_is(said: dict[str, Any] | None) -> None:
    """No status, none with evidence, or an old one: unknown is not zero, and holds."""
    run = Run(pool_config("p"))
    if said is not None:
        run.at(T0, status("p", T0, **said))
    run.at(T0 + 1, proposal("a", T0 + 1))
    assert outcome(run)[::2] == ("blocked", "freshness")


def test_cooldowns_count_from_what_was_executed() -> None:
    """Up waits after an up, down after any change; what is dispatched and not answered counts as one of now."""
    run = started(cooldown_up_s=20, cooldown_down_s=40, freshness_s=300)
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + 2, proposal("b", T0 + 2, replicas=8))
    assert outcome(run, "b")[::2] == ("blocked", "cooldown")
    assert run.state("a") == "dispatched"
    run.at(T0 + 10, answer(run.decision("a")))
    for id, at_s, replicas, state in (
        ("c", 29.9, 8, "blocked"),
        ("d", 49.9, 5, "blocked"),
        ("e", 50.0, 5, "dispatched"),
    ):
        run.at(T0 + at_s, proposal(id, T0 + at_s, replicas=replicas))
        assert run.state(id) == state
    run.at(T0 + 51, answer(run.decision("e")))
    run.at(T0 + 52, proposal("f", T0 + 52, replicas=8))
    assert run.state("f") == "dispatched"


def test_a_scale_down_must_have_been_wanted_all_the_time() -> None:
    """Only after stabilisation_s of statuses that want fewer; one that does not, or silence, begins anew."""
    run = started(stabilisation_s=20, freshness_s=15)

    def say(at_s: float, wanted: int | None) -> None:
        run.at(T0 + at_s, status("p", T0 + at_s, replicas_wanted=wanted))

    def ask(id: str, at_s: float) -> str:
        run.at(T0 + at_s, proposal(id, T0 + at_s, replicas=3))
        return outcome(run, id)[2] or run.state(id)

    say(1, 3)
    say(11, 3)
    assert ask("a", 20.9) == "stabilisation"
    say(21, 4)
    say(22, 3)
    say(32, 3)
    assert ask("b", 41.9) == "stabilisation"
    say(60, 3)  # after a silence longer than freshness_s
    assert ask("c", 61) == "stabilisation"
    say(70, None)
    say(71, 3)
    say(81, 3)
    assert ask("d", 90.9) == "stabilisation"
    assert ask("e", 91) == "dispatched"


def test_the_gpu_budget_counts_what_others_hold_or_are_due() -> None:
    """Of 20 GPUs q is due 12: p, which has 8, may not grow; once q's order has failed and it holds 8, p may have 12."""
    run = started(config("fleet", "fleet", gpus_max={"A": 20}), pools=("p", "q"))
    run.at(T0 + 1, proposal("a", T0 + 1, "q", 6))
    run.at(T0 + 2, proposal("b", T0 + 2, "p", 6))
    assert outcome(run, "a") == ("dispatched", 6, "")
    assert outcome(run, "b") == ("blocked", 6, "gpu budget")
    assert "12 of 20 A" in run.decision("b").constraints[0]
    run.at(T0 + 3, answer(run.decision("a"), "failed"))
    run.at(T0 + 4, proposal("c", T0 + 4, "p", 9))
    assert outcome(run, "c") == ("dispatched", 6, "gpu budget")
    run.at(T0 + 5, proposal("d", T0 + 5, "q", 3))
    assert outcome(run, "d") == ("dispatched", 3, "")


def test_a_pool_whose_gpus_nobody_knows_blocks_the_others_scale_up() -> None:
    """Configured and silent is not zero: the budget cannot be kept, so nothing grows; shrinking goes on."""
    run = started(config("fleet", "fleet", gpus_max={"A": 100}), pool_config("silent"))
    run.at(T0 + 1, proposal("a", T0 + 1))
    assert outcome(run)[::2] == ("blocked", "budget")
    run.at(T0 + 2, proposal("b", T0 + 2, replicas=3))
    assert run.state("b") == "dispatched"


def test_what_a_pool_of_higher_priority_wants_is_kept_for_it() -> None:
    """A pool of lower priority cannot take what one of higher priority wants now; one of the same can."""
    for priority, replicas in ((5, 4), (0, 6)):
        run = Run(
            pool_config("p"),
            pool_config("q", priority=priority),
            config("fleet", "fleet", gpus_max={"A": 20}),
        )
        run.at(T0, status("p", T0, 2))
        run.at(T0, status("q", T0, 4, replicas_wanted=6))
        run.at(T0 + 1, proposal("a", T0 + 1, "p", 9))
        assert outcome(run) == ("dispatched", replicas, "gpu budget")


def test_money_per_hour_clamps_what_grows_and_lets_shrink() -> None:
    """A replica costs 4 USD/h; of 50 the other pool has 16, so p may have 8 replicas."""
    run = started(config("fleet", "fleet", usd_per_hour_max=50), pools=("p", "q"))
    run.at(T0 + 1, proposal("a", T0 + 1, replicas=20))
    assert outcome(run) == ("dispatched", 8, "money")
    run.at(T0 + 2, config("fleet", "fleet", 2, usd_per_hour_max=1))
    run.at(T0 + 3, proposal("b", T0 + 3, replicas=3))
    assert outcome(run, "b") == ("dispatched", 3, "")


@pytest.mark.parametrize("limit", ["usd_per_hour_max", "usd_per_day_max", "usd_per_month_max"])
def test_without_a_price_nothing_grows(limit: str) -> None:
    """An unknown price blocks every budget of money."""
    run = Run(pool_config("p"), config("fleet", "fleet", **{limit: 1e6}))
    run.at(T0, status("p", T0))
    run.at(T0 + 1, proposal("a", T0 + 1))
    assert outcome(run)[::2] == ("blocked", "money")


def test_the_day_is_planned_to_its_end() -> None:
    """Spent to date plus what is planned until midnight UTC must fit; what nobody has said blocks."""
    hours = (period(T0, False)[1] - T0) / 3600
    budget = 1.0 + 4.0 * 5.5 * hours  # spent 1 USD; room for 5.5 replicas of 4 USD/h until midnight
    run = started(config("fleet", "fleet", usd_per_day_max=budget))
    run.at(T0 + 1, proposal("a", T0 + 1, replicas=9))
    assert outcome(run) == ("dispatched", 5, "money")
    run = started(config("fleet", "fleet", usd_per_month_max=1e9))
    run.at(T0, status("p", T0, version=1, usd_month_to_date=None))
    run.at(T0 + 1, proposal("a", T0 + 1))
    assert outcome(run)[::2] == ("blocked", "money")


@pytest.mark.parametrize(
    ("at", "month", "start", "end"),
    [
        ("2024-02-29T23:59:59", False, "2024-02-29", "2024-03-01"),
        ("2024-02-29T23:59:59", True, "2024-02-01", "2024-03-01"),
        ("2023-12-31T00:00:00", True, "2023-12-01", "2024-01-01"),
        ("2023-12-31T12:00:00", False, "2023-12-31", "2024-01-01"),
        ("2024-01-01T00:00:00", True, "2024-01-01", "2024-02-01"),
    ],
)
def test_days_and_months_are_those_of_utc(at: str, month: bool, start: str, end: str) -> None:
    """Leap days, year ends and the first second of a period."""

    def unix(text: str) -> float:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()

    assert period(unix(at), month) == (unix(start), unix(end))


@pytest.mark.parametrize(
    ("weights", "state"),
    [
        ({}, "blocked"),
        ({"r1": 0.0}, "dispatched"),
        ({f"r{i}": 0.0 for i in range(4)}, "blocked"),
        ({f"r{i}": 0.1 for i in range(4)}, "dispatched"),
    ],
)
def test_a_reroute_leaves_somebody_to_take_the_traffic(weights: dict[str, float], state: str) -> None:
    """Of 4 ready replicas not all may get nothing."""
    run = started()
    run.at(T0 + 1, reroute("a", T0 + 1, weights))
    assert run.state("a") == state


@pytest.mark.parametrize(
    ("weights", "state"),
    [
        ({"p": 0.0}, "dispatched"),
        ({"p": 0.0, "q": 0.0}, "blocked"),
        ({"p": 0.5, "other": 1.0}, "blocked"),
        ({"p": 0.5, "unknown": 1.0}, "blocked"),
    ],
)
def test_weights_between_pools_are_of_the_routes_pools(weights: dict[str, float], state: str) -> None:
    """Only pools of the route, and not all zero."""
    run = started(pools=("p", "q"), route="chat")
    run.at(T0, pool_config("other"))
    run.at(T0, status("other", T0))
    run.at(T0 + 1, reroute("a", T0 + 1, weights, "chat", scope="pools"))
    assert run.state("a") == state


def test_small_steps_are_automatic_and_larger_ones_wait() -> None:
    """Beyond automatic_step_max a person has to agree."""
    run = started(automatic_step_max=2)
    run.at(T0 + 1, proposal("a", T0 + 1, replicas=7))
    assert run.state("a") == "pending"
    run.at(T0 + 2, proposal("b", T0 + 2, replicas=6))
    assert run.state("b") == "dispatched"


def test_a_persons_revert_needs_no_fresh_evidence_but_the_budget() -> None:
    """A revert passes without telemetry; where the GPUs are gone it is blocked all the same."""
    run = started(pools=("p", "q"), freshness_s=5)
    run.at(T0 + 1, proposal("a", T0 + 1, replicas=2))
    run.at(T0 + 2, answer(run.decision("a")))
    run.at(T0 + 3, status("p", T0 + 3, 2))
    run.at(T0 + 4, config("fleet", "fleet", gpus_max={"A": 12}))
    run.at(T0 + 200, command("c1", "revert", T0 + 200, decision_id="a"))
    reverts = [d for d in run.decisions().values() if d.proposal.reverts]
    assert [d.state for d in reverts] == ["blocked"]
    run.at(T0 + 201, config("fleet", "fleet", 2, gpus_max={"A": 16}))
    run.at(T0 + 202, command("c2", "revert", T0 + 202, decision_id="a"))
    assert sorted(d.state for d in run.decisions().values() if d.proposal.reverts) == ["blocked", "dispatched"]


def test_garbage_changes_nothing_but_dead_letters() -> None:
    """Huge numbers, too large proposals and unknown kinds are refused and counted; the state can be dumped."""
    run = started()
    run.at(T0 + 1, status("p", T0 + 1, replicas_target=10**30))
    run.at(T0 + 1, status("p", T0 + 1, usd_day_to_date=1e300))
    run.at(T0 + 1, proposal("a", T0 + 1, evidence={"x": "y" * 300_000}))
    assert run.dead() == ["out_of_bounds", "out_of_bounds", "too_large"]
    run.at(T0 + 2, proposal("b", T0 + 2, evidence={"big": 10**40}))
    fold = make_fold()
    fold.load(run.fold.dump())
    assert fold.dump() == run.fold.dump()
