"""A decision's way: who may do what, in which state, and what is told to whom."""

from __future__ import annotations

import pytest

from models.fleet.audit import broken_at
from models.fleet.commands import revert_id
from schemas.decisions import ScaleAction
from tests.models.fleet.making import (
    T0,
    answer,
    command,
    config,
    proposal,
    reroute,
    started,
    status,
    verdict,
)


@pytest.mark.parametrize(
    ("mode", "path"),
    [
        ("observe", ["proposed", "blocked"]),
        ("shadow", ["proposed", "shadowed"]),
        ("approve", ["proposed", "pending"]),
        ("automatic", ["proposed", "approved", "dispatched"]),
    ],
)
@pytest.mark.parametrize("strict", ["pool", "fleet"])
def test_the_stricter_mode_of_pool_and_fleet_decides(mode: str, path: list[str], strict: str) -> None:
    """Whichever of the pool's and the fleet's mode is stricter says how far a proposal comes."""
    pool, fleet = (mode, "automatic") if strict == "pool" else ("automatic", mode)
    run = started(config("fleet", "fleet", mode=fleet), mode=pool)
    run.at(T0 + 1, proposal("a", T0 + 1))
    assert run.path("a") == path
    assert run.decision("a").mode == mode


def test_a_dispatch_is_executed_and_verified() -> None:
    """Dispatched at its epoch, executed by its executor's answer, verified by its pool: each step once, told to all."""
    run = started()
    run.at(T0 + 1, proposal("a", T0 + 1))
    dispatched = run.decision("a")
    assert dispatched.epoch == dispatched.version == len(run.log) - 1
    run.at(T0 + 2, answer(dispatched))
    run.at(T0 + 70, verdict("a", T0 + 70))
    assert run.path("a") == ["proposed", "approved", "dispatched", "executed", "verified"]
    assert [o.state for _, o in run.outcomes()] == ["dispatched", "executed", "verified"]
    assert {r.key for r, _ in run.outcomes()} == {"p"}
    assert [e.event for e in run.audit()] == run.path("a")
    assert broken_at(run.audit()) is None


@pytest.mark.parametrize(
    ("outcome", "at_s", "state"),
    [("failed", 2, "failed"), ("skipped", 2, "superseded"), ("skipped", 61.5, "expired")],
)
def test_an_executor_that_did_not_act_says_how_it_ended(outcome: str, at_s: float, state: str) -> None:
    """Failed is failed; skipped is expired when its time was over, else superseded; what held before holds."""
    run = started()
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + at_s, answer(run.decision("a"), outcome, detail="no room"))
    assert run.state("a") == state
    assert "no room" in run.decision("a").history[-1].cause
    assert run.fold.fleet.views["p"].base() == 4


@pytest.mark.parametrize("wrong", [{"epoch": 1}, {"executor": "other"}, {"decision_id": "unknown."}])
def test_an_answer_that_is_not_this_dispatchs_changes_nothing(wrong: dict[str, object]) -> None:
    """An older epoch, another executor or an unknown decision changes nothing."""
    run = started()
    run.at(T0 + 1, proposal("a", T0 + 1))
    assert run.at(T0 + 1, answer(run.decision("a"), **wrong)) == []
    assert run.state("a") == "dispatched"


def test_a_dry_run_ends_a_decision_and_what_held_before_holds() -> None:
    """Nothing was changed, so the decision is shadowed and the next one is not held up by it."""
    run = started()
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + 2, answer(run.decision("a"), dry_run=True))
    assert run.state("a") == "shadowed"
    assert "dry run" in run.decision("a").history[-1].cause
    assert run.fold.fleet.views["p"].base() == 4


def test_a_dispatch_without_an_answer_fails_at_its_expiry() -> None:
    """10 s past its expiry it has failed, and until newer evidence both counts are held for it."""
    run = started()
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + 71)
    assert run.state("a") == "dispatched"
    run.at(T0 + 72)
    assert run.state("a") == "failed"
    assert "no answer" in run.decision("a").history[-1].cause
    view = run.fold.fleet.views["p"]
    assert (view.base(), view.gpus(2.0)) == (4, 12.0)
    run.at(T0 + 73, status("p", T0 + 73))
    assert (view.base(), view.gpus(2.0)) == (4, 8.0)


def test_a_newer_decision_replaces_one_that_is_not_answered() -> None:
    """At most one is in force per target and kind: the newer one, with the greater epoch."""
    run = started()
    run.at(T0 + 1, proposal("a", T0 + 1))
    first = run.decision("a")
    run.at(T0 + 2, proposal("b", T0 + 2, replicas=7))
    assert (run.state("a"), run.state("b")) == ("superseded", "dispatched")
    assert run.decision("b").epoch > first.epoch
    run.at(T0 + 3, answer(first))
    assert run.state("a") == "superseded"


def test_an_executed_decision_without_a_verdict_gives_way_to_the_next_executed_one() -> None:
    """Without a verdict it is superseded; one that was verified stays as it ended."""
    run = started()
    for i, id in enumerate("abc"):
        run.at(T0 + 1 + i, proposal(id, T0 + 1 + i, replicas=5 + i))
        run.at(T0 + 1 + i, answer(run.decision(id)))
        if id == "b":
            run.at(T0 + 2, verdict("b", T0 + 2))
    assert [run.state(id) for id in "abc"] == ["superseded", "verified", "executed"]


def test_a_proposal_that_comes_late_is_expired_at_once() -> None:
    """Appended after its expiry it is expired and nothing else."""
    run = started()
    run.at(T0 + 70, proposal("a", T0 + 1))
    assert run.path("a") == ["proposed", "expired"]


def test_the_first_content_of_an_id_wins() -> None:
    """The same proposal again is ignored; another one under its id is refused as a conflict."""
    run = started()
    run.at(T0 + 1, proposal("a", T0 + 1))
    assert run.at(T0 + 1, proposal("a", T0 + 1)) == []
    run.at(T0 + 1, proposal("a", T0 + 1, replicas=9))
    assert run.dead() == ["conflict"]
    assert run.decision("a").proposal.action == ScaleAction(replicas=6)


def test_pending_waits_for_a_person_and_lapses() -> None:
    """Pending past approval_expiry_s or its own expiry is expired; a newer proposal takes its place before."""
    run = started(mode="approve", approval_expiry_s=20)
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + 2, proposal("b", T0 + 2, replicas=7))
    assert (run.state("a"), run.state("b")) == ("superseded", "pending")
    run.at(T0 + 22)
    assert run.state("b") == "pending"
    run.at(T0 + 23)
    assert run.state("b") == "expired"


def test_a_person_approves_or_rejects_what_is_pending() -> None:
    """Approve dispatches with the person's name in the history; reject ends it; twice is refused and audited."""
    run = started(mode="approve")
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + 2, command("c1", "approve", T0 + 2, decision_id="a", comment="go"))
    assert run.path("a") == ["proposed", "pending", "approved", "dispatched"]
    assert (run.decision("a").history[2].actor, run.decision("a").history[2].cause) == ("ann", "go")
    assert run.decision("a").epoch == len(run.log) - 1
    run.at(T0 + 3, command("c2", "approve", T0 + 3, decision_id="a"))
    assert run.audit()[-1].event == "refused: approve"
    run.at(T0 + 4, proposal("b", T0 + 4, replicas=8))
    run.at(T0 + 5, command("c3", "reject", T0 + 5, decision_id="b"))
    assert run.state("b") == "rejected"


def test_an_approval_is_checked_against_the_constraints_of_its_moment() -> None:
    """What became impossible while it was pending is blocked, although a person approved it."""
    run = started(mode="approve")
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + 2, config("fleet", "fleet", gpus_max={"A": 8}))
    run.at(T0 + 3, command("c1", "approve", T0 + 3, decision_id="a"))
    assert run.path("a") == ["proposed", "pending", "blocked"]
    assert "gpu budget" in run.decision("a").constraints[-1]


@pytest.mark.parametrize("role", ["viewer", "stranger"])
def test_who_may_not_changes_nothing(role: str) -> None:
    """A viewer's approval is refused and audited; an unknown key's is dead-lettered as unsigned."""
    run = started(mode="approve")
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + 2, command("c1", "approve", T0 + 2, role, decision_id="a"))
    assert run.state("a") == "pending"
    if role == "viewer":
        assert run.audit()[-1].event == "refused: approve"
    else:
        assert run.dead() == ["unsigned"]


@pytest.mark.parametrize(
    "change", [{"signature_base64": ""}, {"decision_id": "b......."}, {"comment": "x"}, {"key_id": "admin"}]
)
def test_a_command_that_is_not_what_was_signed_is_unsigned(change: dict[str, str]) -> None:
    """Any field that differs from what was signed makes the command unsigned: it changes nothing."""
    run = started(mode="approve")
    run.at(T0 + 1, proposal("a", T0 + 1))
    forged = command("c1", "approve", T0 + 2, decision_id="a").model_copy(update=change)
    run.at(T0 + 2, forged)
    assert run.dead() == ["unsigned"]
    assert run.state("a") == "pending"


def test_a_command_counts_once_and_only_in_its_time() -> None:
    """Replayed it is ignored; expired or valid for ever it is a dead letter; from the future it is refused."""
    run = started()
    pause = command("c1", "pause", T0 + 1, "admin")
    run.at(T0 + 1, pause)
    run.at(T0 + 2, command("c2", "resume", T0 + 2, "admin"))
    assert run.at(T0 + 3, pause) == []
    run.at(T0 + 70, pause)
    assert run.fold.fleet.paused == {}
    run.at(T0 + 71, command("c3", "pause", T0, "admin"))
    run.at(T0 + 71, command("c4", "pause", T0 + 70, "admin", expires_s=T0 + 1e6))
    assert run.dead() == ["too_late", "too_late", "out_of_bounds"]
    run.at(T0 + 71, command("c5", "pause", T0 + 1000, "admin"))
    assert run.audit()[-1].event == "refused: pause"
    assert run.fold.fleet.paused == {}
    run.at(T0 + 72, command("c5", "pause", T0 + 72, "admin"))
    assert run.dead()[-1] == "conflict"


@pytest.mark.parametrize("pool", ["p", None])
def test_what_is_paused_holds_still_until_it_is_resumed(pool: str | None) -> None:
    """Proposals are blocked and approvals refused while the pool or the fleet is paused."""
    run = started(mode="approve")
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + 2, command("c1", "pause", T0 + 2, "admin", pool=pool))
    run.at(T0 + 2, command("c2", "approve", T0 + 2, decision_id="a"))
    assert run.state("a") == "pending"
    run.at(T0 + 3, proposal("b", T0 + 3))
    assert run.state("b") == "blocked"
    assert run.decision("b").constraints[0].startswith("paused")
    run.at(T0 + 4, command("c3", "resume", T0 + 4, "admin", pool=pool))
    run.at(T0 + 5, proposal("c", T0 + 5))
    assert run.state("c") == "pending"
    assert [e.event for e in run.audit() if e.event in ("pause", "resume")] == ["pause", "resume"]
    run.at(T0 + 6, command("c4", "pause", T0 + 6, "approver", pool=pool))
    assert run.audit()[-1].event == "refused: pause"


def test_a_person_reverts_what_was_executed() -> None:
    """The undo becomes a decision of its own that the command approves; both name each other; once."""
    run = started(mode="approve", cooldown_down_s=1000)
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + 1, command("c1", "revert", T0 + 1, decision_id="a"))
    assert run.audit()[-1].event == "refused: revert"
    run.at(T0 + 2, command("c2", "approve", T0 + 2, decision_id="a"))
    run.at(T0 + 3, answer(run.decision("a")))
    run.at(T0 + 200, command("c3", "revert", T0 + 200, decision_id="a"))
    id = revert_id("a.......")
    assert run.path(id) == ["proposed", "approved", "dispatched"]
    assert run.decision(id).proposal.action == ScaleAction(replicas=4)
    assert run.decision(id).proposal.reverts == "a......."
    assert run.decision("a").reverted_by == id
    run.at(T0 + 201, command("c4", "revert", T0 + 201, decision_id="a"))
    assert run.audit()[-1].event == "refused: revert"
    run.at(T0 + 202, answer(run.decision(id), "failed"))
    run.at(T0 + 203, command("c5", "revert", T0 + 203, decision_id="a"))
    assert run.decision("a").reverted_by == revert_id("a.......", "c5......")
    run.at(T0 + 204, answer(run.decision(revert_id("a.......", "c5......"))))
    assert run.state("a") == "superseded"


def test_a_pool_reverts_by_itself_once() -> None:
    """A proposal that reverts goes through the constraints; a second one, or one of what no longer is, is blocked."""
    run = started()
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + 2, answer(run.decision("a")))
    run.at(T0 + 3, verdict("a", T0 + 3, "regressed"))
    run.at(T0 + 3, status("p", T0 + 3, 6))
    run.at(T0 + 3, proposal("b", T0 + 3, replicas=4, reverts="a......."))
    assert run.state("b") == "dispatched"
    run.at(T0 + 4, proposal("c", T0 + 4, replicas=3, reverts="a......."))
    assert run.state("c") == "blocked"
    assert "b......." in run.decision("c").constraints[0]


def test_more_actions_than_a_minute_admits_wait_for_their_turn() -> None:
    """Beyond actions_per_minute_max a decision stays approved and is dispatched when there is room."""
    run = started(config("limits", "limits", actions_per_minute_max=1), pools=("p", "q"), freshness_s=100)
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + 2, proposal("b", T0 + 2, "q", expires_s=T0 + 100))
    assert (run.state("a"), run.state("b")) == ("dispatched", "approved")
    run.at(T0 + 60)
    assert run.state("b") == "approved"
    run.at(T0 + 62)
    assert run.state("b") == "dispatched"
    assert run.decision("b").epoch == len(run.log) - 1


def test_open_decisions_are_bounded_and_ended_ones_forgotten() -> None:
    """One too many open is blocked; of the ended ones only decisions_max are remembered."""
    run = started(config("limits", "limits", open_decisions_max=1, decisions_max=2), mode="approve", pools=("p", "q"))
    run.at(T0 + 1, proposal("a", T0 + 1))
    run.at(T0 + 1, proposal("b", T0 + 1, "q"))
    assert run.decision("b").constraints[0].startswith("open")
    for id in "cdef":
        run.at(T0 + 2, proposal(id, T0 + 2, "q"))
    assert len(run.fold.book.ended) == 2
    assert run.fold.counters["decisions_forgotten_total"] == 3
    assert run.fold.counters["open_decisions_overflow_total"] == 5


def test_verdicts_come_only_upon_what_was_executed() -> None:
    """A verdict for a decision that is not executed, or of another pool, changes nothing."""
    run = started(pools=("p", "q"))
    run.at(T0 + 1, proposal("a", T0 + 1))
    assert run.at(T0 + 2, verdict("a", T0 + 2)) == []
    run.at(T0 + 3, answer(run.decision("a")))
    assert run.at(T0 + 3, verdict("a", T0 + 3, pool="q")) == []
    run.at(T0 + 3, verdict("a", T0 + 3, "regressed"))
    assert run.at(T0 + 3, verdict("a", T0 + 3, "verified")) == []
    assert run.state("a") == "regressed"


def test_weights_between_pools_are_told_to_every_pool_of_the_route() -> None:
    """The strictest mode of the route's pools decides, and each pool hears of it under its own key."""
    run = started(pools=("p", "q"), route="chat")
    run.at(T0 + 1, reroute("a", T0 + 1, {"p": 0.3}, "chat", scope="pools"))
    assert run.state("a") == "dispatched"
    assert sorted((r.key, o.pool) for r, o in run.outcomes()) == [("p", "p"), ("q", "q")]
    assert len({r.id for r, _ in run.outcomes()}) == 2
