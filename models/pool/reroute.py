"""Sends traffic around replicas that are slow or failed, and back when they are well. Fails closed: never away from
more than a third of a pool."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from models.pool.health import SLOW, WELL, WELL_LOOKS
from models.pool.orders import proposal_id
from models.pool.scale import WORSE, Look
from schemas.config import PoolSpec
from schemas.decisions import Alternative, Expected, Proposal, RerouteAction, Target

SLOW_WEIGHT = 0.1
"""A slow replica keeps a tenth of its share: enough to see when it is well again."""
SHARE = 3
"""No more than one replica in so many is rerouted around."""
HORIZON_S = 60.0


class Routing(NamedTuple):
    """What the weights should be."""

    weights: dict[str, float]
    """Replica -> weight other than 1."""
    left_out: list[str]
    """Slow or failed, but beyond the third that may be rerouted around."""


def routing(names: list[str], slow: Mapping[str, float], failed: list[str], in_force: Mapping[str, float]) -> Routing:
    """Weights for the replicas that there are; failed ones first, then the slowest.

    Weights that somebody else set (neither 1 nor ours) stay.
    """
    limit = len(names) // SHARE
    slowest = sorted((name for name in slow if name not in failed), key=lambda name: (-slow[name], name))
    bad = [(name, 0.0) for name in failed] + [(name, SLOW_WEIGHT) for name in slowest]
    foreign = {
        name: weight
        for name, weight in in_force.items()
        if name in names and weight not in (0.0, SLOW_WEIGHT, 1.0) and name not in failed and name not in slow
    }
    room = max(0, limit - len(foreign))
    chosen = dict(bad[:room])
    weights = {name: {**foreign, **chosen}[name] for name in names if name in foreign or name in chosen}
    return Routing(weights, [name for name, _ in bad[room:]])


def change(to: Mapping[str, float], since: Mapping[str, float], names: Iterable[str]) -> RerouteAction:
    """The action that puts weights in force: all that are not 1, and those named that become 1 again."""
    return RerouteAction(weights={name: to.get(name, 1.0) for name in names if name in to or name in since})


def propose(
    pool: str,
    spec: PoolSpec,
    revision: int,
    wanted: Routing,
    in_force: Mapping[str, float],
    slow: Mapping[str, float],
    failed: list[str],
    names: list[str],
    trigger_s: float,
    look: Look,
) -> Proposal:
    """The proposal to put these weights in force."""
    action = change(wanted.weights, in_force, names)
    where = Target(cluster=spec.cluster, pool=pool)
    floor = spec.slo_target if look.attainment is None else min(spec.slo_target, look.attainment)
    return Proposal(
        id=proposal_id(where.key, "reroute", look.second, revision, action),
        decision_kind="reroute",
        target=where,
        action=action,
        undo=change(in_force, wanted.weights, names),
        reason=_reason(wanted, in_force, slow, failed, names),
        alternatives=[
            Alternative(
                action="leave the traffic as it is",
                why_not="requests on a slow replica take so much longer and miss the targets first",
            ),
            Alternative(
                action="take the replica out (weight 0)",
                why_not="without any request nobody would see when it is well again",
            ),
        ],
        evidence={
            "windows": look.windows,
            "slowdown": {name: slow[name] for name in slow},
            "failed": failed,
            "replicas": len(names),
            "slo_attainment": look.attainment,
        },
        expected=Expected(
            slo_attainment=spec.slo_target,
            slo_attainment_low=max(0.0, floor - WORSE),
            usd_per_hour=0.0,
            horizon_s=HORIZON_S,
        ),
        confidence=look.confidence,
        at_s=look.at_s,
        trigger_s=min(trigger_s, look.at_s),
        evidence_s=look.evidence_s,
        expires_s=look.at_s + spec.approval_expiry_s,
        policy_revision=revision,
        value_usd_per_hour=None
        if look.usd_per_replica_hour is None
        else sum(1 - weight for weight in wanted.weights.values()) * look.usd_per_replica_hour,
    )


def _reason(
    wanted: Routing, in_force: Mapping[str, float], slow: Mapping[str, float], failed: list[str], names: list[str]
) -> str:
    parts = []
    for name, weight in wanted.weights.items():
        if name in failed:
            parts.append(f"{name} has failed: weight 0")
        elif name in slow:
            parts.append(
                f"{name} is {slow[name]:.2f} x as slow as its {len(names) - 1} siblings "
                f"(limit {SLOW:g} in 2 of 3 windows): weight {weight:g}, enough to see its recovery"
            )
    for name in in_force:
        if name not in wanted.weights and name in names and name not in wanted.left_out:
            well = f"has been below {WELL:g} x its siblings for {WELL_LOOKS} windows"
            parts.append(f"{name} {'serves again' if in_force[name] == 0.0 else well}: weight 1 again")
    if wanted.left_out:
        parts.append(
            f"{', '.join(wanted.left_out)} stay as they are: no more than a third of {len(names)} is rerouted around"
        )
    return "; ".join(parts) or "weights of replicas that are gone are dropped"
