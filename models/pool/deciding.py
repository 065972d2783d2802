"""What a pool asks for: more or fewer replicas, other weights, the undoing of what made things worse."""

from __future__ import annotations

from typing import Literal

from models.pool import evidence, reroute, scale, status, verify
from models.pool.context import Context, capacity_rps
from models.pool.health import failed
from models.pool.pool import Pool
from models.pool.shadow_hold import TICK_S, Want
from models.pool.windows import STATE, R, Row
from schemas.config import PoolSpec
from schemas.decisions import Outcome, Proposal, RerouteAction, ScaleAction, Verdict
from schemas.signals import WindowName

SETTLE_S = 15.0
"""What is allocated counts as the first target when engines have been heard for so long."""
DRIFT_S = 60.0
"""When what is allocated differs from the target for so long and nothing is under way, it becomes the target."""
AFTER_REVERT_S = 600.0
"""After a revert its kind is not planned against for so long."""
VERDICTS_MAX = 20


def settle(pool: Pool, context: Context) -> None:
    """The first target, and the new one where reality has left the old."""
    windows, orders, now = pool.windows, pool.orders, context.now_s
    if not windows.first_engine_s or now - windows.first_engine_s < SETTLE_S:
        return
    rows = context.rows(pool)
    if not rows:
        return
    found = status.held(rows)
    under_way = orders.open.get("scale", {}).get("state", "executed") != "executed"
    if orders.target is None:
        orders.target, orders.target_s, pool.status_due, pool.drift_s = found, now, True, now
    elif found == orders.target or under_way:
        pool.drift_s = now
    elif now - max(pool.drift_s, orders.target_s) > DRIFT_S:
        context.tally("targets_resynced_total")
        orders.target, orders.target_s, pool.status_due, pool.drift_s = found, now, True, now


def held_back(pool: Pool, context: Context) -> bool:
    """Whether nothing may be proposed."""
    spec = context.spec
    if spec is None or spec.mode == "observe" or pool.orders.target is None or pool.plan is None:
        return True
    return context.stale(pool) is not None


def look_now(pool: Pool, context: Context, name: WindowName, before_s: float) -> Proposal | None:
    """The fast path: does the demand of the last 60 s, as of these rows, ask for more than is ordered?

    `before_s`: until when this source had been heard before. What it brings now came after that.
    """
    spec, plan, orders = context.spec, pool.plan, pool.orders
    if spec is None or plan is None or orders.target is None or spec.mode == "observe":
        return None
    rate = pool.rate_rps(max(pool.windows.request_until.values()))
    capacity = capacity_rps(pool, spec)
    want = plan.want(rate / capacity)
    extra = scale.backlog(pool.waiting, rate, capacity)
    wanted = scale.bounded(want, extra, spec)
    trigger_s = pool.asking.look(wanted, orders.target, max(before_s, name.until_s - 2.0))
    if wanted <= orders.level() or held_back(pool, context):
        return None
    return _scale(pool, context, spec, want, extra, wanted, trigger_s, rate)


def plan(pool: Pool, context: Context) -> Proposal | None:
    """The tick's look: ups by the hold window, the backlog or a new setting; downs, as far as nothing holds them."""
    spec, setting, orders = context.spec, pool.plan, pool.orders
    for _ in orders.forget_lost(context.now_s):
        context.tally("proposals_lost_total")
    if spec is None or setting is None or orders.target is None:
        return None
    ended_s = pool.tick_end_s - TICK_S
    rate = pool.rate_rps(float(ended_s))
    want = setting.want()
    extra = scale.backlog(pool.waiting, rate, capacity_rps(pool, spec))
    wanted = scale.bounded(want, extra, spec)
    trigger_s = pool.asking.look(wanted, orders.target, float(ended_s))
    floor, why = _floor(pool, context, spec, wanted)
    wanted = max(wanted, min(floor, orders.target))
    if wanted == orders.level() or held_back(pool, context):
        return None
    if wanted < orders.target:
        unknown = not pool.series.rates[-1] >= 0
        if pool.series.span_s < setting.hold_s or unknown or pool.watch.is_frozen("scale", context.now_s):
            return None  # what was before the first window, or is missing now, is unknown, not zero
    return _scale(pool, context, spec, want, extra, wanted, trigger_s, rate, why)


def _floor(pool: Pool, context: Context, spec: PoolSpec, wanted: int) -> tuple[int, str]:
    """Replicas that a scale-down leaves at this tick, and why."""
    assert pool.plan is not None
    oldest_s = context.now_s - spec.stabilisation_s - (TICK_S - 1)  # the tick that began the time counts whole
    pool.wants = [*(one for one in pool.wants if one[0] > oldest_s), [context.now_s, wanted]]
    floors = [
        (pool.plan.left, "the setting before asks for so many, and the new one is less than a minute old"),
        (int(max(one[1] for one in pool.wants)), f"so many were wanted in the last {spec.stabilisation_s:g} s"),
    ]
    if context.now_s < pool.floor_until_s:
        floors.append((pool.floor_replicas, "a scale-down was reverted lately"))
    return max(floors, key=lambda floor: floor[0])


def _scale(
    pool: Pool,
    context: Context,
    spec: PoolSpec,
    want: Want,
    extra: int,
    replicas: int,
    trigger_s: float,
    rate: float,
    kept: str = "",
) -> Proposal | None:
    assert pool.orders.target is not None
    if not pool.orders.may_ask("scale", ScaleAction(replicas=replicas), context.second):
        return None
    look = _look(pool, context, spec, "scale", rate)
    proposal = scale.propose(
        pool.name, spec, context.revision, want, extra, replicas, pool.orders.target, trigger_s, look, kept
    )
    pool.watch.plan(proposal.id, replicas * look.capacity_rps, {})
    return _asked(pool, context, proposal)


def heal(pool: Pool, context: Context) -> Proposal | None:
    """Around slow and failed replicas, and back."""
    spec = context.spec
    if spec is None:
        return None
    rows = context.rows(pool)
    names = [name for name, row in rows.items() if row[STATE] in ("ready", "failed") and row[R["billed"]]]
    bad = [name for name in failed(rows) if name in names]
    in_force = {name: weight for name, weight in pool.orders.weights.items() if name in names}
    slow = {name: factor for name, factor in pool.health.slow.items() if name in names}
    wanted = reroute.routing(names, slow, bad, in_force)
    pool.left_out = wanted.left_out
    if wanted.weights == in_force:
        pool.routed_s = context.now_s
        return None
    if context.now_s < pool.heal_after_s or pool.watch.is_frozen("reroute", context.now_s) or held_back(pool, context):
        return None
    if not pool.orders.may_ask("reroute", reroute.change(wanted.weights, in_force, names), context.second):
        return None
    look = _look(pool, context, spec, "reroute", pool.rate_rps(context.now_s))
    trigger_s = pool.routed_s or context.now_s
    proposal = reroute.propose(pool.name, spec, context.revision, wanted, in_force, slow, bad, names, trigger_s, look)
    changed = [name for name in names if wanted.weights.get(name, 1.0) != in_force.get(name, 1.0)]
    held = verify.shares(pool.windows.rows_of(context.window_end_s - TICK_S))
    carried = status.ready(rows) * look.capacity_rps
    pool.watch.plan(proposal.id, carried, {name: held[name] for name in changed if name in held})
    return _asked(pool, context, proposal)


def _look(pool: Pool, context: Context, spec: PoolSpec, kind: str, rate: float) -> scale.Look:
    newest = evidence.evidence_s(pool.windows, context.rows(pool).values())
    # what has just begun to go wrong must not count against what is done about it
    spans = (status.SLO_SPAN_S, status.LATENCY_SPAN_S)
    shares = [status.attainment(pool.windows, context.window_end_s, span_s)[0] for span_s in spans]
    return scale.Look(
        at_s=context.now_s,
        second=context.second,
        rate_rps=rate,
        capacity_rps=capacity_rps(pool, spec),
        waiting=pool.waiting,
        evidence_s=min(context.now_s, newest or 0.0),
        attainment=min((share for share in shares if share is not None), default=None),
        usd_per_replica_hour=context.usd_per_replica_hour(),
        windows=pool.newest_windows(),
        candidates=pool.series.candidates,
        confidence=pool.confidence(kind),
    )


def _asked(pool: Pool, context: Context, proposal: Proposal) -> Proposal:
    kind = proposal.decision_kind
    pool.orders.ask(proposal.id, kind, proposal.action, proposal.at_s, context.second, proposal.expires_s)
    context.tally(f"proposals_{kind}_total")
    return proposal


# -- verdicts ------------------------------------------------------------------------------------------------


def heard(pool: Pool, context: Context, outcome: Outcome) -> None:
    """An outcome came: what is in force, what is to be judged."""
    before = pool.orders.target
    if not pool.orders.hear(outcome, context.now_s):
        return
    pool.status_due = pool.status_due or pool.orders.target != before
    if outcome.state != "executed":
        if outcome.state in ("verified", "regressed", "superseded"):
            pool.watch.watched.pop(outcome.decision_id, None)
        return
    orders = pool.orders
    pool.watch.executed(
        outcome,
        context.now_s,
        {"held_before": orders.target_before, "weights_before": dict(orders.weights_before)},
    )


def replaced(pool: Pool, context: Context, newer: Proposal) -> list[Verdict]:
    """Verdicts on what a new proposal will replace, as far as they can be given already.

    They go before the proposal: once the newer decision is executed, the older one is superseded.
    """
    made = []
    for id in pool.watch.replaced(newer.decision_kind):
        item = pool.watch.watched[id]
        found = verify.judge(item, pool.windows, context.rows(pool), context.now_s, early=True)
        if found is not None:
            del pool.watch.watched[id]
            made.append(_verdict(pool, context, id, item, found))
    return made


def judge(pool: Pool, context: Context) -> tuple[list[Verdict], list[Proposal]]:
    """Verdicts that are due, and the reverts that follow from them."""
    verdicts: list[Verdict] = []
    reverts: list[Proposal] = []
    for id in pool.watch.due(context.now_s):
        item = pool.watch.watched[id]
        found = verify.judge(item, pool.windows, context.rows(pool), context.now_s, early=False)
        if found is None:
            continue
        del pool.watch.watched[id]
        verdicts.append(_verdict(pool, context, id, item, found))
        if found.verified or item["reverts"] is not None:
            continue
        more = item["action"]["type"] == "scale" and item["action"]["replicas"] >= (item["held_before"] or 0)
        if more:
            continue  # fewer replicas would not help: nothing to revert, and nothing to freeze
        pool.watch.regressed(item["kind"], context.now_s)
        revert = _revert(pool, context, id, item, found)
        if revert is not None:
            reverts.append(revert)
    return verdicts, reverts


def _verdict(pool: Pool, context: Context, id: str, item: dict[str, object], found: verify.Found) -> Verdict:
    kind = str(item["kind"])
    pool.verdicts[kind] = [*pool.verdicts.get(kind, []), found.verified][-VERDICTS_MAX:]
    verdict: Literal["verified", "regressed"] = "verified" if found.verified else "regressed"
    context.tally(f"verdicts_{verdict}_total")
    return Verdict(
        decision_id=id,
        pool=pool.name,
        verdict=verdict,
        text=found.text,
        measured=found.measured,
        at_s=context.now_s,
    )


def _revert(pool: Pool, context: Context, id: str, item: dict[str, object], found: verify.Found) -> Proposal | None:
    spec, orders, kind = context.spec, pool.orders, str(item["kind"])
    if spec is None or held_back(pool, context):
        return None
    if kind == "scale":
        before = item["held_before"]
        if not isinstance(before, int) or orders.target is None or before <= orders.target:
            return None
        undo: ScaleAction | RerouteAction = ScaleAction(replicas=min(before, spec.replicas_max))
        current: ScaleAction | RerouteAction = ScaleAction(replicas=orders.target)
    else:
        rows = context.rows(pool)
        weights = item["weights_before"]
        assert isinstance(weights, dict)
        undo = reroute.change(weights, orders.weights, rows)
        current = reroute.change(orders.weights, weights, rows)
        if not undo.weights:
            return None  # all that were changed are gone
    if not orders.may_ask(kind, undo, context.second) or not pool.watch.may_revert(id):
        return None
    look = _look(pool, context, spec, kind, pool.rate_rps(context.now_s))
    proposal = scale.revert(pool.name, spec, context.revision, id, undo, current, found.text, look)
    if isinstance(undo, ScaleAction):
        pool.floor_replicas, pool.floor_until_s = undo.replicas, context.now_s + AFTER_REVERT_S
    else:
        pool.heal_after_s = context.now_s + AFTER_REVERT_S
    return _asked(pool, context, proposal)


def waiting(rows: dict[str, Row]) -> float:
    """Requests that wait, by the newest scrapes; 0 where nobody says."""
    return status.engine_load(rows)["waiting"] or 0.0
