"""What one window says that bears on latency: of each replica, and of the pool as a whole. Unknown stays None."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from models.pool.latency_norms import ln, ratio
from models.pool.latency_steps import Load
from models.pool.windows import ANTAGONIST, SIZE_S, STATE, R, Row, S

COVERED_MIN_S = 4.0
"""A replica heard for less of a window says nothing of it."""
COUNT_MIN = 3.0
"""Observations that a mean needs."""
STEPS_MIN = 20.0
DEMAND_WINDOWS = 3
"""Windows over which the load of replicas is compared: of one alone chance has too large a part."""
SLOWED = 1.02
"""Level 1 says that a replica is slowed: it is a victim by its rule, or the lower bound is above this."""
KV_FULL = (0.90, 0.98)
"""Largest KV use of a window: from where the cache binds a little to where it binds wholly."""


class Seen(NamedTuple):
    """One serving replica in one window. Times in s, logarithms natural."""

    name: str
    firsts: float
    """Requests that got their first token."""
    ttft_s: float | None
    queue_s: float | None
    """Of the TTFT, waiting."""
    token_s: float | None
    """Time between tokens as requests see it."""
    step_s: float | None
    """Time of an engine step, or the best that is known in its place."""
    stepped: bool
    """Whether it counts its steps."""
    stall: float | None
    """ln(token_s / step_s) where both are measured: what requests wait between steps."""
    load: Load
    held: float | None
    """ln of the KV use of one running request."""
    arrived: float
    """Requests that came to it in the window."""
    demand: float
    """Requests that came to it in the last `DEMAND_WINDOWS`: first tokens and the growth of its queue."""
    waiting: float
    kv_full: float
    """0: room in the KV cache, 1: it binds."""
    preempted: float
    """Preemptions per request."""
    redone: float
    """ln of how much more it computes because of preemptions."""
    clock: float | None
    """ln of the SM clock as a share of the highest."""
    throttled_s: float | None
    slowdown: float
    """ln of what level 1 says that others slow it by; 0: nothing."""
    antagonist: str | None
    apart: float
    """ln of slowness of unknown cause, as level 1 says; 0: none."""

    @property
    def prefill_s(self) -> float | None:
        """Of the TTFT, after the queue."""
        return None if self.ttft_s is None else self.ttft_s - (self.queue_s or 0.0)


class Whole(NamedTuple):
    """The pool in one window."""

    arrivals_rps: float
    carried_rps: float
    """Requests that got their first token, per s."""
    ready: int
    loading: int
    waiting: float
    pressure: float | None
    """ln(arrivals per s and replica that is ready or loading)."""
    prompt: float | None
    """Prompt tokens computed per request."""
    output: float | None
    """Tokens generated per request."""


def mean(total: float | None, count: float | None) -> float | None:
    """Sum over count; None with too few observations."""
    return total / count if total is not None and count is not None and count >= COUNT_MIN else None


def seen(name: str, row: Row, before: list[Row], suspect: list[Any] | None) -> Seen | None:
    """A replica by its row, its rows of the windows before, oldest first, and what level 1 suspects. None: nothing to
    say."""
    covered_s = row[R["covered_s"]] or 0.0
    if row[STATE] not in ("ready", "draining") or covered_s < COVERED_MIN_S:
        return None
    running, steps = row[R["running_mean"]] or 0.0, row[R["iterations"]]
    counted = steps is not None and steps >= STEPS_MIN and running > 0
    stepped_s = covered_s * min(1.0, running) / steps if counted else None
    firsts = row[R["ttft_count"]] or 0.0
    itl_s = mean(row[R["itl_s_sum"]], row[R["itl_count"]])
    token_s = itl_s or mean(row[R["tpot_s_sum"]], row[R["tpot_count"]]) or stepped_s
    prompts = max(0.0, (row[R["prompt_tokens"]] or 0.0) - (row[R["cached_tokens"]] or 0.0))
    if counted:
        prefill = prompts / steps
    else:
        prefill = prompts / covered_s * (token_s or 0.0)
    usage, capacity = row[R["kv_usage_ratio_mean"]], row[R["kv_capacity_tokens"]]
    oldest = before[0] if before else row
    growth = (row[R["waiting_last"]] or 0.0) - (oldest[R["waiting_last"]] or 0.0)
    latest = before[-1] if before else row
    arrived = firsts + (row[R["waiting_last"]] or 0.0) - (latest[R["waiting_last"]] or 0.0)
    came = growth + sum(one[R["ttft_count"]] or 0.0 for one in [*before[1:], row])
    preempted = row[R["preemptions"]] or 0.0
    slowdown, apart, antagonist = _suspected(suspect)
    held = ratio(usage, running)
    return Seen(
        name=name,
        firsts=firsts,
        ttft_s=mean(row[R["ttft_s_sum"]], firsts),
        queue_s=_queue_s(row, firsts),
        token_s=token_s,
        step_s=stepped_s or token_s,
        stepped=stepped_s is not None,
        stall=ln(ratio(token_s, stepped_s)) if itl_s is not None or row[R["tpot_count"]] else None,
        load=Load(running, (usage or 0.0) * (1.0 if capacity is None else capacity), prefill),
        held=ln(held) if running >= 1 else None,
        arrived=max(0.0, arrived),
        demand=max(0.0, came),
        waiting=row[R["waiting_mean"]] or 0.0,
        kv_full=1.0 if preempted > 0 else _ramp(row[R["kv_usage_ratio_max"]] or usage),
        preempted=preempted / max(firsts, 1.0),
        redone=_redone(preempted, held, capacity, prompts + (row[R["generation_tokens"]] or 0.0)),
        clock=ln(row[R["sm_clock_ratio_mean"]]),
        throttled_s=row[R["throttled_s"]],
        slowdown=slowdown,
        antagonist=antagonist,
        apart=apart,
    )


def _queue_s(row: Row, firsts: float) -> float | None:
    """How much of the TTFT was waiting, mean. The lesser of two readings that err upwards in different cases: the TTFT
    less the prefill of the requests that engines report (at their end, so late when prompts become longer), and
    Little's law on the queue (too much while it grows)."""
    ttft_s = mean(row[R["ttft_s_sum"]], firsts)
    if ttft_s is None:
        return None
    known = []
    prefill_s = mean(row[R["prefill_s_sum"]], row[R["prefill_count"]])
    if prefill_s is not None:
        known.append(max(0.0, ttft_s - prefill_s))
    if row[R["waiting_mean"]] is not None:
        known.append(row[R["waiting_mean"]] * (row[R["covered_s"]] or 0.0) / firsts)
    if not known:
        reported = mean(row[R["queue_s_sum"]], row[R["queue_count"]])
        known = [] if reported is None else [reported]
    return min(ttft_s, *known) if known else None


def _suspected(suspect: list[Any] | None) -> tuple[float, float, str | None]:
    """(ln slowdown by others, ln slowness of unknown cause, by whom)."""
    if suspect is None:
        return 0.0, 0.0, None
    factor, low, apart = suspect[S["slowdown"]], suspect[S["slowdown_low"]], suspect[S["unexplained"]]
    slowed = bool(suspect[S["victim"]]) or (low is not None and low > SLOWED)
    return (
        max(0.0, ln(factor) or 0.0) if slowed else 0.0,
        max(0.0, ln(apart) or 0.0),
        suspect[ANTAGONIST] if slowed else None,
    )


def _ramp(usage: float | None) -> float:
    low, high = KV_FULL
    return 0.0 if usage is None else min(1.0, max(0.0, (usage - low) / (high - low)))


def _redone(preempted: float, held: float | None, capacity: float | None, computed: float) -> float:
    """A preempted request's tokens are computed again: ln(1 + redone / computed tokens)."""
    if preempted <= 0 or held is None or capacity is None or computed <= 0:
        return 0.0
    return math.log1p(preempted * held * capacity / computed)


def whole(rows: Mapping[str, Row], replicas: list[Seen], arrivals: float) -> Whole:
    """The pool by all its rows, those replicas that serve, and the arrivals of the window (0.0: none were told)."""
    states = [row[STATE] for row in rows.values()]
    ready, loading = states.count("ready"), states.count("starting")
    firsts = sum(one.firsts for one in replicas)
    arrived = arrivals if arrivals > 0 else sum(one.arrived for one in replicas)
    serving = [rows[one.name] for one in replicas]
    prompts = sum(max(0.0, (row[R["prompt_tokens"]] or 0.0) - (row[R["cached_tokens"]] or 0.0)) for row in serving)
    outputs = sum(row[R["generation_tokens"]] or 0.0 for row in serving)
    enough = firsts >= COUNT_MIN
    return Whole(
        arrivals_rps=arrived / SIZE_S,
        carried_rps=firsts / SIZE_S,
        ready=ready,
        loading=loading,
        waiting=sum(row[R["waiting_mean"]] or 0.0 for row in serving),
        pressure=ln(ratio(arrived / SIZE_S, float(ready + loading))),
        prompt=prompts / firsts if enough and prompts > 0 else None,
        output=outputs / firsts if enough and outputs > 0 else None,
    )
