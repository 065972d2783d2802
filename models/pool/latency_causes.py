"""From signals to causes: how much of the time above the usual each cause explains, in one window.

Three steps. (1) What has changed, in logarithms, each beyond its ordinary deviation (`factors`): arrivals per replica,
work per request, KV cache per request while the cache binds, slowdowns, replicas that still load, a replica's share of
the load. (2) Waiting time above the usual is split in proportion to these: in a queue, load and slowness multiply.
(3) Time in prefill and time per token above the usual are split over what slows a step: slowdowns as reported or as the
clock says, never more than the step-time model leaves unexplained; longer prompts; and the step's own load, which is
split again by what has changed. What is left is unexplained. All parts are >= 0 and add up to the time above the usual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from models.pool.cost import OUTPUT_WEIGHT
from models.pool.latency_norms import Norm, ln
from models.pool.latency_signals import Seen, Whole
from models.pool.latency_steps import Steps

CAUSES = (
    "queueing", "prefill", "batch", "kv", "interference", "throttling", "cold_start", "skew", "unexplained",
)  # fmt: skip
FLOOR = 0.02
"""Where nothing has changed, waiting is called queueing and a slower step its batch: of this weight, ln."""
CHANCE = 1.5
"""Standard deviations of a Poisson count by which a replica's load may differ from an equal share."""
PREEMPTED_MIN = 0.01
"""Preemptions per request from which stalls between tokens are theirs."""
NORMS = (
    "queue_s", "prefill", "token", "expected", "stall", "held", "clock", "pressure", "prompt", "output",
)  # fmt: skip
"""What is learned as usual of a pool; all but queue_s as logarithms."""
Parts = dict[str, float]


class Usual:
    """What is usual in a pool, with what its policy says where that is not known yet."""

    __slots__ = ("norms", "prior")

    def __init__(self) -> None:
        self.norms = {name: Norm() for name in NORMS}
        self.prior: dict[str, float] = {}
        """From the policy; set anew with every look."""

    def of(self, name: str) -> float | None:
        """What is usual; None: unknown."""
        return self.norms[name].usual(self.prior.get(name))

    def above(self, name: str, value: float | None) -> float:
        """How far beyond the usual and its deviation."""
        return self.norms[name].above(value, self.prior.get(name))


class Slow(NamedTuple):
    """What slows a replica's steps beyond its load, ln."""

    interference: float
    throttling: float
    cold_start: float
    kv: float
    unexplained: float

    @property
    def known(self) -> float:
        """Of known cause: what the step-time model must not learn as load."""
        return self.interference + self.throttling


def slowness(one: Seen, usual: Usual, steps: Steps, fresh: bool) -> Slow:
    """Splits what the load does not explain of a replica's step time."""
    clock = usual.of("clock")
    cap = 0.0 if clock is None or one.clock is None else usual.above("clock", 2 * clock - one.clock)
    if one.clock is None and one.throttled_s:
        cap = math.log(2) * min(1.0, one.throttled_s / 10)  # by how much is not told: at most to half the clock
    residual = steps.residual(one.load, one.step_s)
    if residual is None:
        return Slow(one.slowdown, cap, 0.0, 0.0, one.apart)
    # level 1 has seen what this pool's model has not: half of what it says stands in any case
    by_others = min(one.slowdown, max(residual, one.slowdown / 2))
    left = max(0.0, residual - by_others)
    throttled = min(cap, left)
    left = max(0.0, left - throttled - steps.dev)
    stalled = one.stall is None and one.preempted > PREEMPTED_MIN
    if fresh or stalled:
        return Slow(by_others, throttled, left if fresh else 0.0, 0.0 if fresh else left, 0.0)
    return Slow(by_others, throttled, 0.0, 0.0, max(0.0, left - steps.dev))


def pool_factors(whole: Whole, usual: Usual) -> Parts:
    """What has changed for all replicas alike, ln."""
    prompt0, output0 = usual.of("prompt"), usual.of("output")
    longer, more = usual.above("prompt", ln(whole.prompt)), usual.above("output", ln(whole.output))
    parts = {
        "queueing": usual.above("pressure", whole.pressure),
        "prefill": longer,
        "batch": more,
        "cold_start": math.log((whole.ready + whole.loading) / max(1, whole.ready)) if whole.loading else 0.0,
    }
    if prompt0 is not None and output0 is not None:
        reading, writing = math.exp(prompt0), OUTPUT_WEIGHT * math.exp(output0)
        parts["prefill"] = math.log((reading * math.exp(longer) + writing) / (reading + writing))
        parts["batch"] = math.log((reading + writing * math.exp(more)) / (reading + writing))
    return parts


def replica_factors(
    one: Seen, slow: Slow, pool: Mapping[str, float], share: float, whole: Whole, usual: Usual
) -> Parts:
    """What has changed for one replica, ln. `share`: its load as a multiple of an equal share."""
    held = usual.above("held", one.held)
    longer, more = usual.above("prompt", ln(whole.prompt)), usual.above("output", ln(whole.output))
    prompt0, output0 = usual.of("prompt"), usual.of("output")
    if prompt0 is not None and output0 is not None:
        # what longer prompts hold of the cache is theirs; of what longer answers hold, half is
        reading, writing = math.exp(prompt0), math.exp(output0) / 2
        held -= math.log((reading * math.exp(longer) + writing * math.exp(more / 2)) / (reading + writing))
    count = max(one.demand, 1.0)
    chance = CHANCE * math.sqrt(share / count) if share > 0 else 0.0
    return {
        **pool,
        "batch": pool["batch"] * (1 - one.kv_full / 2),
        "kv": one.kv_full * max(0.0, held) + one.redone,
        "interference": slow.interference,
        "throttling": slow.throttling,
        "cold_start": pool["cold_start"] + slow.cold_start,
        "skew": max(0.0, (ln(share) or 0.0) - chance),
        "unexplained": slow.unexplained,
    }


def spread(amount: float, weights: Mapping[str, float]) -> Parts:
    """An amount in proportion to weights, which are >= 0 and not all 0."""
    total = sum(weights.values())
    return {cause: amount * weight / total for cause, weight in weights.items()}


def waiting_weights(factors: Mapping[str, float]) -> Parts:
    """By what waiting time is split."""
    return {**factors, "queueing": factors["queueing"] + FLOOR}


def working_weights(factors: Mapping[str, float]) -> Parts:
    """By what the effect of a step's own load is split: more requests at a time are its batch, not a queue."""
    return {**factors, "queueing": 0.0, "batch": factors["batch"] + factors["queueing"] + FLOOR}


def service(above_ln: float, direct: Parts, own: float, factors: Mapping[str, float]) -> Parts:
    """Shares of a service time that is above the usual by `above_ln` > 0: `direct` causes and the own load's effect
    `own`, all ln. They add up to 1."""
    weights = working_weights(factors)
    parts = spread(own, weights)
    for cause, value in direct.items():
        parts[cause] = parts.get(cause, 0.0) + value
    left = above_ln - sum(parts.values())
    if left > 0:
        # engines share a step's budget among prompts: more load or slower steps lengthen each beyond the model
        more = spread(left, weights) if sum(factors.values()) > 2 * FLOOR else {"unexplained": left}
        for cause, value in more.items():
            parts[cause] = parts.get(cause, 0.0) + value
    return spread(1.0, parts)


def prefill_parts(one: Seen, slow: Slow, factors: Mapping[str, float], whole: Whole, usual: Usual, own: float) -> Parts:
    """Request seconds of prefill above the usual, by cause; empty: none."""
    now, before = one.prefill_s, usual.of("prefill")
    above = usual.above("prefill", ln(now))
    if now is None or before is None or above <= 0:
        return {}
    direct = {**slow._asdict(), "prefill": usual.above("prompt", ln(whole.prompt))}
    return _scaled(service(above, direct, own, factors), one.firsts * (now - math.exp(before)))


def token_parts(one: Seen, slow: Slow, factors: Mapping[str, float], usual: Usual, own: float) -> Parts:
    """Request seconds a token above the usual, by cause; empty: none."""
    now, before = one.token_s, usual.of("token")
    above = usual.above("token", ln(now))
    if now is None or before is None or above <= 0:
        return {}
    direct = slow._asdict()
    if one.preempted > PREEMPTED_MIN:
        direct["kv"] += usual.above("stall", one.stall)
    return _scaled(service(above, direct, own, factors), max(one.load.batch, one.firsts) * (now - math.exp(before)))


def _scaled(parts: Parts, factor: float) -> Parts:
    return {cause: factor * value for cause, value in parts.items()}
