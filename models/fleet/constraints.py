"""Constraints on every decision, in their order: policy, evidence, bounds, pace, and then what it may use (budgets).

Each is a function that passes, makes the action smaller with a note, or raises Blocked. They fail closed: what is
unknown blocks. Every refusal has its figures and what would lift it.
"""

from __future__ import annotations

from collections.abc import Callable

from models.fleet.budgets import gpu_budget, money_per_hour, money_per_period
from models.fleet.case import Blocked, Case, concerned
from schemas.decisions import RerouteAction, ScaleAction

Constraint = Callable[[Case], None]


def policy(case: Case) -> None:
    """There is a policy for every pool concerned, in the cluster named, and it is the one the proposal rests on."""
    proposal = case.proposal
    if proposal.decision_kind != case.action.type:
        raise Blocked(
            f"kind: a {proposal.decision_kind} decision cannot carry a {case.action.type} action; "
            "lifts with an action of its kind"
        )
    pools = concerned(proposal, case.fleet.specs)
    for pool in pools:
        spec = case.fleet.specs.get(pool)
        if spec is None:
            raise Blocked(f"policy: pool {pool} is not configured; lifts with `fleetloop apply` of its object")
        if spec.cluster != proposal.target.cluster:
            raise Blocked(
                f"policy: pool {pool} is in cluster {spec.cluster}, not {proposal.target.cluster}; "
                "lifts with a proposal for the right cluster"
            )
    known = case.fleet.revisions.get(case.pool, 0)
    if case.phase == "proposed" and proposal.policy_revision < known:
        raise Blocked(
            f"policy: rests on revision {proposal.policy_revision}, in force is {known}; "
            "lifts with a proposal that rests on the present policy"
        )


def freshness(case: Case) -> None:
    """Both the proposal's evidence and what the pools say now are fresh; a person's revert needs neither."""
    if case.phase == "revert":
        return
    for pool in concerned(case.proposal, case.fleet.specs):
        limit = case.fleet.specs[pool].freshness_s
        view = case.fleet.views.get(pool)
        evidence_s = None if view is None or view.status is None else view.status["evidence_s"]
        lift = f"lifts when telemetry of pool {pool} comes again"
        if evidence_s is None:
            raise Blocked(f"freshness: nothing has been measured of pool {pool}; {lift}")
        # A person who approves judges the proposal's own evidence: it may be as old as approval_expiry_s allows.
        ages = {f"what pool {pool} says": evidence_s}
        if case.phase == "proposed":
            ages["the proposal's evidence"] = case.proposal.evidence_s
        for what, at_s in ages.items():
            age = case.now_s - at_s
            if age > limit:
                raise Blocked(f"freshness: {what} is {age:.1f} s old, at most {limit:g} s (freshness_s); {lift}")
            if age < -case.future_s:
                raise Blocked(
                    f"freshness: {what} is {-age:.1f} s ahead of log time, at most {case.future_s:g} s; "
                    "lifts when the clock of its sender is set"
                )


def bounds(case: Case) -> None:
    """Never fewer than replicas_min, never more than replicas_max (where they contradict, the maximum holds)."""
    assert isinstance(case.action, ScaleAction)
    spec, asked = case.fleet.specs[case.pool], case.action.replicas
    if asked > spec.replicas_max:
        case.clamp(spec.replicas_max, f"max: at most {spec.replicas_max} (replicas_max)")
    elif asked < min(spec.replicas_min, spec.replicas_max):
        case.clamp(min(spec.replicas_min, spec.replicas_max), f"min: at least {spec.replicas_min} (replicas_min)")


def steps(case: Case) -> None:
    """No more replicas added or removed at once than the policy says."""
    assert isinstance(case.action, ScaleAction)
    if case.phase == "revert":
        return
    spec, asked, base = case.fleet.specs[case.pool], case.action.replicas, case.base
    if asked > base + spec.step_up_max:
        case.clamp(base + spec.step_up_max, f"step: at most {spec.step_up_max} more at once (step_up_max)")
    elif asked < base - spec.step_down_max:
        case.clamp(base - spec.step_down_max, f"step: at most {spec.step_down_max} fewer at once (step_down_max)")


def cooldowns(case: Case) -> None:
    """Least time between changes; a change that is under way counts as one of now."""
    assert isinstance(case.action, ScaleAction)
    if case.phase == "revert":
        return
    spec, asked, base = case.fleet.specs[case.pool], case.action.replicas, case.base
    if asked == base:
        return
    up = asked > base
    name = "cooldown_up_s" if up else "cooldown_down_s"
    least = spec.cooldown_up_s if up else spec.cooldown_down_s
    if least and case.unanswered is not None:
        raise Blocked(
            f"cooldown: {case.unanswered} is dispatched and not answered; lifts {least:g} s after it is ({name})"
        )
    last = case.view.up_s if up else case.view.change_s
    if last is not None and case.now_s - last < least:
        what = "scale-up" if up else "change"
        raise Blocked(
            f"cooldown: the last {what} was {case.now_s - last:.1f} s ago, at least {least:g} s ({name}); "
            f"lifts in {least - case.now_s + last:.1f} s"
        )


def stabilisation(case: Case) -> None:
    """A scale-down must have been wanted all the time for stabilisation_s; a person's approval needs no more."""
    assert isinstance(case.action, ScaleAction)
    spec, view = case.fleet.specs[case.pool], case.view
    if case.phase != "proposed" or case.action.replicas >= case.base or not spec.stabilisation_s:
        return
    if view.down_since_s is None:
        view.down_since_s = case.now_s  # this proposal is the first to want it
    wanted_s = case.now_s - view.down_since_s
    if wanted_s < spec.stabilisation_s:
        raise Blocked(
            f"stabilisation: fewer than {case.base} replicas have been wanted for {wanted_s:.1f} s, "
            f"at least {spec.stabilisation_s:g} s (stabilisation_s); lifts in "
            f"{spec.stabilisation_s - wanted_s:.1f} s if that holds"
        )


def no_change(case: Case) -> None:
    """What would change nothing is not done. The order repeated as it was is, where the pool has drifted from it."""
    assert isinstance(case.action, ScaleAction)
    replicas = case.action.replicas
    if replicas != case.base:
        return
    status = case.view.status
    if case.notes or status is None or status["replicas_allocated"] == replicas:
        raise Blocked(f"no change: pool {case.pool} is meant to have {replicas} replicas already")


def reroutes(case: Case) -> None:
    """Only known pools, and something must be left to take the traffic."""
    action = case.action
    assert isinstance(action, RerouteAction)
    target = case.pool
    zeros = sum(weight == 0.0 for weight in action.weights.values())
    if not action.weights:
        raise Blocked("weights: none are given; lifts with at least one")
    if action.scope == "replicas":
        ready = case.view.status["replicas_ready"] if case.view.status else None
        if ready is None:
            raise Blocked(f"weights: nobody knows how many replicas of {target} are ready; lifts with its status")
        if zeros >= max(ready, 1):
            raise Blocked(
                f"weights: {zeros} replicas would get nothing and {ready} are ready in pool {target}: nothing "
                "would be left; lifts when more are ready"
            )
        return
    others = [p for p in action.weights if case.fleet.specs[p].route != target]
    if others:
        raise Blocked(f"weights: pool {others[0]} takes no traffic of route {target}; lifts with its `route`")
    if zeros == len(concerned(case.proposal, case.fleet.specs)):
        raise Blocked(f"weights: no pool of route {target} would be left; lifts with one weight above 0")


SCALE: tuple[Constraint, ...] = (
    policy,
    freshness,
    bounds,
    steps,
    cooldowns,
    stabilisation,
    gpu_budget,
    money_per_hour,
    money_per_period,
    no_change,
)
REROUTE: tuple[Constraint, ...] = (policy, freshness, reroutes)


def examine(case: Case) -> str | None:
    """Applies every constraint; the words of the one that blocks, or None. Clamps are left in the case."""
    pools = concerned(case.proposal, case.fleet.specs)
    paused = None if case.phase == "revert" else case.fleet.pause_of(pools)
    if paused is not None:
        return f"paused: {paused}; lifts with `fleetloop resume`"
    if case.phase == "released" and case.fleet.mode(pools) in ("observe", "shadow"):
        return f"mode {case.fleet.mode(pools)}: it changed while this waited; lifts when the mode is another"
    try:
        for constraint in SCALE if isinstance(case.action, ScaleAction) else REROUTE:
            constraint(case)
    except Blocked as blocked:
        return str(blocked)
    return None
