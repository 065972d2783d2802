"""How many replicas the pool should have, and the proposal that says so.

Ups are asked for at once (each record of request windows is looked at), downs only at the 10 s tick.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from models.pool.orders import proposal_id
from models.pool.shadow_hold import OVERLOAD_SPAN, Want
from schemas.config import PoolSpec
from schemas.decisions import Alternative, Expected, Kind, Proposal, RerouteAction, ScaleAction, Target

BACKLOG_S = 3.0
"""A queue longer than so many seconds of arrivals is a backlog."""
BACKLOG_CLEAR_S = 120.0
"""... to be cleared within this time."""
WORSE = 0.02
"""An action may cost so much SLO attainment before it counts as a regression."""


class Look(NamedTuple):
    """What a pool's plan sees at one moment."""

    at_s: float
    second: int
    rate_rps: float
    capacity_rps: float
    waiting: float
    evidence_s: float
    attainment: float | None
    """Share of the requests within the targets, the worse of the last 300 s and 60 s."""
    usd_per_replica_hour: float | None
    windows: list[str]
    """Names and versions of the windows that the newest figures rest on."""
    candidates: list[dict[str, Any]]
    confidence: float


def backlog(waiting: float, rate_rps: float, capacity_rps: float) -> int:
    """Replicas that a queue asks for beyond the plan."""
    if waiting <= BACKLOG_S * rate_rps or waiting <= 0:
        return 0
    return math.ceil(waiting / (BACKLOG_CLEAR_S * capacity_rps))


def bounded(want: Want, extra: int, spec: PoolSpec) -> int:
    """Replicas wanted, within the pool's own bounds."""
    return min(max(want.replicas + extra, spec.replicas_min), spec.replicas_max)


def rule(want: Want) -> str:
    """The present setting in words."""
    return f"hold {want.hold_s} s x {want.margin:.2f} + {want.reserve:g}"


def propose(
    pool: str,
    spec: PoolSpec,
    revision: int,
    want: Want,
    extra: int,
    replicas: int,
    target: int,
    trigger_s: float,
    look: Look,
    kept: str = "",
) -> Proposal:
    """The proposal to go from `target` to `replicas`. `kept`: why no fewer, where that is more than is wanted."""
    action = ScaleAction(replicas=replicas)
    where = Target(cluster=spec.cluster, pool=pool)
    change = replicas - target
    price = look.usd_per_replica_hour
    return Proposal(
        id=proposal_id(where.key, "scale", look.second, revision, action),
        decision_kind="scale",
        target=where,
        action=action,
        undo=ScaleAction(replicas=target),
        reason=_reason(spec, want, extra, replicas, target, look, kept),
        alternatives=_alternatives(want, spec, look),
        evidence={
            "windows": look.windows,
            "requests_per_s": look.rate_rps,
            "capacity_rps": look.capacity_rps,
            "load_replicas": want.load,
            "waiting": look.waiting,
            "slo_attainment": look.attainment,
            "rule": rule(want),
        },
        expected=_expected(spec, want, change, look),
        confidence=look.confidence,
        at_s=look.at_s,
        trigger_s=min(trigger_s, look.at_s),
        evidence_s=look.evidence_s,
        expires_s=look.at_s + spec.approval_expiry_s,
        policy_revision=revision,
        replicas_from=target,
        value_usd_per_hour=_value(spec, want, replicas, target, price),
    )


def revert(
    pool: str,
    spec: PoolSpec,
    revision: int,
    id: str,
    undo: ScaleAction | RerouteAction,
    current: ScaleAction | RerouteAction,
    text: str,
    look: Look,
) -> Proposal:
    """The proposal to undo decision `id`, which regressed."""
    kind: Kind = "scale" if isinstance(undo, ScaleAction) else "reroute"
    where = Target(cluster=spec.cluster, pool=pool)
    price, usd = look.usd_per_replica_hour, None
    missed = 0.0 if look.attainment is None else 1.0 - look.attainment
    if isinstance(undo, ScaleAction) and isinstance(current, ScaleAction) and price is not None:
        usd = (undo.replicas - current.replicas) * price
    return Proposal(
        id=proposal_id(where.key, kind, look.second, revision, undo),
        decision_kind=kind,
        target=where,
        action=undo,
        undo=current,
        reason=f"decision {id} made things worse, so what was before is restored: {text}",
        alternatives=[
            Alternative(action="wait", why_not="the effect horizon has passed, and the damage goes on meanwhile")
        ],
        evidence={"windows": look.windows, "slo_attainment": look.attainment, "requests_per_s": look.rate_rps},
        expected=Expected(slo_attainment=spec.slo_target, usd_per_hour=usd, horizon_s=60.0),
        confidence=look.confidence,
        at_s=look.at_s,
        trigger_s=look.at_s,
        evidence_s=look.evidence_s,
        expires_s=look.at_s + spec.approval_expiry_s,
        policy_revision=revision,
        replicas_from=current.replicas if isinstance(current, ScaleAction) else None,
        value_usd_per_hour=None if price is None else spec.miss_price * missed * price,
        reverts=id,
    )


def _reason(spec: PoolSpec, want: Want, extra: int, replicas: int, target: int, look: Look, kept: str) -> str:
    load_rps = want.load * look.capacity_rps
    parts = [
        f"load {load_rps:.1f} req/s over 60 s needs {want.load:.1f} replicas at {look.capacity_rps:.2f} req/s each, "
        f"hold {want.hold_s} s x {want.margin:.2f} + {want.reserve:g} in reserve = {want.replicas}"
    ]
    if load_rps > look.rate_rps * 1.02:
        parts.append(f"that load was the peak of the hold window, now it is {look.rate_rps:.1f} req/s")
    if want.thin:
        parts.append("little has been seen at this load, so 600 s x 1.15 holds as well")
    if extra:
        parts.append(f"{look.waiting:.0f} requests wait: {extra} more to clear them in {BACKLOG_CLEAR_S:.0f} s")
    within = bounded(want, extra, spec)
    if within != want.replicas + extra:
        parts.append(f"bounds {spec.replicas_min} to {spec.replicas_max} make it {within}")
    if replicas != within:
        parts.append(f"not below {replicas} for now: {kept}")
    parts.append(f"{target} are ordered")
    if replicas > target:
        parts.append(f"a replica takes {spec.cold_start_s:.0f} s to start")
    return "; ".join(parts)


def _alternatives(want: Want, spec: PoolSpec, look: Look) -> list[Alternative]:
    """The three best other rules, each with what it would have paid and missed."""
    own = next((c for c in look.candidates if c["hold_s"] == want.hold_s and c["margin"] == want.margin), None)
    if own is None:
        return [
            Alternative(
                action="any other hold window or margin",
                why_not="not enough of this pool's past has been seen to replay them; 600 s x 1.15 is the safe start",
            )
        ]
    others = sorted((c for c in look.candidates if c is not own), key=lambda c: float(c["score"]))[:3]
    made = []
    for other in others:
        verdict = "dearer" if other["score"] > own["score"] else "better by now, but not 5 times in a row"
        made.append(
            Alternative(
                action=f"hold {other['hold_s']} s x {other['margin']:.2f} + {want.reserve:g}",
                why_not=f"replayed on the past: paid {other['paid']:.3f} and missed {100 * other['missed']:.2f} % "
                f"(this one {own['paid']:.3f} and {100 * own['missed']:.2f} %, a 1 % miss counts as "
                f"{spec.miss_price:g} % of capacity): {verdict}",
            )
        )
    return made


def _expected(spec: PoolSpec, want: Want, change: int, look: Look) -> Expected:
    own = next((c for c in look.candidates if c["hold_s"] == want.hold_s and c["margin"] == want.margin), None)
    attainment = spec.slo_target if own is None else max(spec.slo_target, 1.0 - own["missed"])
    floor = spec.slo_target if look.attainment is None else min(spec.slo_target, look.attainment)
    return Expected(
        slo_attainment=attainment,
        slo_attainment_low=max(0.0, floor - WORSE),
        usd_per_hour=None if look.usd_per_replica_hour is None else change * look.usd_per_replica_hour,
        horizon_s=spec.cold_start_s + 30.0 if change > 0 else 60.0,
    )


def _value(spec: PoolSpec, want: Want, replicas: int, target: int, price: float | None) -> float | None:
    """Share of requests that would miss with the target, times the price of a miss, times the plan's cost."""
    if price is None or replicas <= target:
        return None if price is None else 0.0
    share = min(max((want.load / max(target, 1) - 1.0) / OVERLOAD_SPAN, 0.0), 1.0)
    return spec.miss_price * share * replicas * price
