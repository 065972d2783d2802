"""Money spent for nothing, at the level of replicas: idle, batching collapse, spread collapse, interference.

What each costs is the price of the GPUs that would not be missed; where a price is unknown, so is that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from models.pool import health, scale
from models.pool.context import Context, capacity_rps
from models.pool.findings import Found
from models.pool.pool import Pool
from models.pool.windows import ANTAGONIST, ANTAGONIST_POOL, GPU_TYPE, SIZE_S, STATE, R, Row, S

COLLAPSED = 0.5
"""Requests wait although batches are below this share of the largest seen."""
WAITING_MIN = 1.0
KV_FULL = 0.85
"""A KV cache so full admits nobody."""
PREFILL_MAIN = 0.5
"""Prefill takes more than this share of the steps."""
AT_LIMIT = 0.9
"""A batch is at the engine's limit from this share of it."""
KV_ROOM = 0.7
"""... which is a waste while the KV cache is less full than this."""
SPREAD_LOAD = 0.4
"""Replicas that carry less than this share of what they could are too many."""
FILLED = 0.8
"""What a replica is meant to carry of what it can."""
SUSPECTS_S = 40
"""What level 1 said so long ago is still the present."""
NAMES_MAX = 10


def replica_usd(row: Row, context: Context) -> float | None:
    """What a replica costs an hour by the GPUs that are billed to it, USD; None: unknown."""
    if not row[R["billed"]]:
        return 0.0
    price = context.prices.get(row[GPU_TYPE] or (context.spec.gpu_type if context.spec else ""))
    return None if price is None else float(row[R["gpus"]] * price)


def lost_usd(usd: float | None, factor: float) -> float | None:
    """What is lost an hour of a replica that costs `usd` by being `factor` times as slow, USD; None: unknown."""
    return None if usd is None else usd * max(0.0, 1 - 1 / max(factor, 1e-9))


def idle(pool: Pool, context: Context) -> dict[str, Found]:
    """Replicas that are paid for and have had nothing to do for a minute."""
    rows, found = context.rows(pool), {}
    for name in pool.health.idle_replicas():
        row = rows.get(name)
        if row is None or not row[R["billed"]]:
            continue
        minutes = pool.health.idle[name] * SIZE_S / 60
        text = f"{name} is paid for and had nothing to do for {minutes:.0f} min ({row[R['gpus']]:g} GPUs)"
        found[name] = Found(text, 1.0, replica_usd(row, context), {"gpus": row[R["gpus"]]})
    return found


# -- batching collapse -----------------------------------------------------------------------------------------


def collapse(pool: Pool, context: Context) -> dict[str, Found]:
    """Requests wait while batches are small: below half of what they were, or at a limit with the KV cache empty."""
    rows = [row for row in context.rows(pool).values() if row[STATE] == "ready"]
    rows = [row for row in rows if row[R["running_mean"]] is not None and row[R["waiting_mean"]] is not None]
    if not rows or pool.health.peak <= 0:
        return {}
    running, waiting = _mean(rows, "running_mean") or 0.0, _mean(rows, "waiting_mean") or 0.0
    limit, kv = _mean(rows, "running_max"), _mean(rows, "kv_usage_ratio_mean")
    below = running < COLLAPSED * pool.health.peak
    capped = limit is not None and running >= AT_LIMIT * limit and kv is not None and kv < KV_ROOM
    if waiting < WAITING_MIN or not (below or capped):
        return {}
    cause, figures = _cause(pool, rows, running)
    text = f"{waiting:.1f} requests wait per replica while {running:.1f} run"
    text += f" (it has run {pool.health.peak:.0f} together): {cause}" if below else f": {cause}"
    share = 1 - running / pool.health.peak if below else 0.0
    usd = _total([replica_usd(row, context) for row in rows]) if below else None
    evidence = {"running": running, "waiting": waiting, "peak": pool.health.peak, **figures}
    return {pool.name: Found(text, share, None if usd is None else usd * share, evidence)}


def _cause(pool: Pool, rows: list[Row], running: float) -> tuple[str, dict[str, Any]]:
    """What keeps batches small, in words, and the figures that say so."""
    kv, limit = _mean(rows, "kv_usage_ratio_mean"), _mean(rows, "running_max")
    preempted = sum(row[R["preemptions"]] or 0.0 for row in rows)
    prefill = _prefill_share(pool, rows)
    figures = {"kv_usage_ratio": kv, "prefill_share": prefill, "preemptions": preempted, "running_max": limit}
    room = "" if kv is None else f", its KV cache {100 * kv:.0f} % full"
    if preempted or (kv is not None and kv >= KV_FULL):
        full = "" if kv is None else f", it is {100 * kv:.0f} % full"
        return f"KV-bound: requests hold more of the KV cache each{full}, {preempted:.0f} were preempted", figures
    if prefill is not None and prefill >= PREFILL_MAIN:
        return f"prefill-bound: {100 * prefill:.0f} % of the steps goes into prompts{room}", figures
    if limit is not None and running >= AT_LIMIT * limit:
        return f"admission-bound: the engine admits {limit:.0f} together (its largest batch){room}", figures
    if kv is None or prefill is None:
        return "the engine does not say enough to tell why (KV usage and steps)", figures
    return f"admission-bound: neither KV cache nor prefill explains it{room}, prefill {100 * prefill:.0f} %", figures


def _prefill_share(pool: Pool, rows: list[Row]) -> float | None:
    """Share of the step time that prompts take: by the pool's step-time model, else the share of the running requests
    that are in prefill (Little: time from schedule to first token, summed, per s)."""
    if pool.health.mass >= health.MODEL_MIN:
        d0, d1, p1 = pool.health.coefficients()
        steps = sum(row[R["iterations"]] or 0.0 for row in rows)
        if steps > 0:
            prompts_s = p1 * sum(row[R["prompt_tokens"]] or 0.0 for row in rows)
            others_s = sum((row[R["iterations"]] or 0.0) * (d0 + d1 * row[R["running_mean"]]) for row in rows)
            return prompts_s / (prompts_s + others_s) if prompts_s + others_s > 0 else None
    known = [row for row in rows if row[R["prefill_s_sum"]] is not None and row[R["covered_s"]]]
    busy = sum(row[R["running_mean"]] * row[R["covered_s"]] for row in known)
    return min(1.0, sum(row[R["prefill_s_sum"]] for row in known) / busy) if busy > 0 else None


# -- spread collapse -------------------------------------------------------------------------------------------


def spread(pool: Pool, context: Context) -> dict[str, Found]:
    """Few requests over many replicas: fewer would carry them within the targets, in better batches."""
    spec = context.spec
    if spec is None or context.stale(pool) is not None or not pool.windows.request_until:
        return {}
    idle_names = dict.fromkeys(pool.health.idle_replicas())
    rows = {name: row for name, row in context.rows(pool).items() if row[STATE] == "ready" and row[R["billed"]]}
    busy = [row for name, row in rows.items() if name not in idle_names]
    running = _mean(busy, "running_mean")
    if len(rows) < 2 or running is None or running >= COLLAPSED * pool.health.peak:
        return {}
    rate = pool.rate_rps(min(context.now_s, max(pool.windows.request_until.values())))
    capacity = capacity_rps(pool, spec)
    if rate >= SPREAD_LOAD * capacity * len(rows) or (_mean(busy, "waiting_mean") or 0.0) >= WAITING_MIN:
        return {}
    needed = max(1, spec.replicas_min, math.ceil(rate / (FILLED * capacity) + spec.reserve))
    if pool.plan is not None:  # what is held for the peak that comes is no waste
        needed = max(needed, scale.bounded(pool.plan.want(rate / capacity), 0, spec))
    spare = len(busy) - needed  # idle ones are told of by themselves
    if spare < 1:
        return {}
    text = (
        f"{len(rows)} replicas run {running:.1f} requests each (one has run {pool.health.peak:.0f}): {needed} would "
        f"carry the {rate:.2g} requests/s within the targets, at {capacity:.2g} each; {spare} could go"
    )
    usd = _total([replica_usd(row, context) for row in busy])
    evidence = {"running": running, "requests_per_s": rate, "capacity_rps": capacity, "replicas_needed": needed}
    return {pool.name: Found(text, spare / len(rows), None if usd is None else usd * spare / len(busy), evidence)}


# -- interference ----------------------------------------------------------------------------------------------


def interference(pool: Pool, context: Context) -> dict[str, Found]:
    """Replicas that a neighbour slows: by whom, how much, what that costs, and the windows that show it."""
    rows, found = context.rows(pool), {}
    starts = sorted(start for start in pool.windows.suspects if start >= context.now_s - SUSPECTS_S)
    newest = {name: row for start in starts for name, row in pool.windows.suspects_of(start).items()}
    tenants = _tenants(pool, context) if any(row[S["victim"]] for row in newest.values()) else []
    for name, suspect in newest.items():
        if not suspect[S["victim"]]:
            continue
        factor, by = suspect[S["slowdown"]], suspect[ANTAGONIST] or "a neighbour that is not known"
        if suspect[ANTAGONIST_POOL] and suspect[ANTAGONIST_POOL] != pool.name:
            by += f" of pool {suspect[ANTAGONIST_POOL]}"
        usd = replica_usd(rows[name], context) if name in rows else context.usd_per_replica_hour()
        lost = lost_usd(usd, factor) if factor else None
        found[name] = Found(
            f"{name} is slowed by {by}: {_times(suspect)} the time per token that its own load explains{_how(suspect)}",
            factor or 1.0,
            lost,
            {
                "antagonist": suspect[ANTAGONIST],
                "antagonist_pool": suspect[ANTAGONIST_POOL],
                "slowdown": [suspect[S[key]] for key in ("slowdown_low", "slowdown", "slowdown_high")],
                "pressure": suspect[S["pressure"]],
                "tenants": tenants,
                "windows": _windows_of(pool, name),
            },
        )
    return found


def _times(suspect: list[Any]) -> str:
    factor, low, high = (suspect[S[key]] for key in ("slowdown", "slowdown_low", "slowdown_high"))
    if factor is None:
        return "more than once"
    return f"{factor:.2f} x" + ("" if low is None or high is None else f" ({low:.2f} to {high:.2f})")


def _how(suspect: list[Any]) -> str:
    if not suspect[S["graded"]]:
        return "; only that it is there is known, not what it takes of the GPU"
    pressure = suspect[S["pressure"]]
    return "" if pressure is None else f", while it takes {100 * pressure:.0f} % of what they share"


def _windows_of(pool: Pool, replica: str) -> list[str]:
    """Names of the newest windows in which it was a victim."""
    held = pool.windows.suspects
    names = [
        f"interference/{pool.name}/{start}/{source}@{entry[0]}"
        for start in sorted(held)
        for source, entry in held[start].items()
        if replica in entry[1] and entry[1][replica][S["victim"]]
    ]
    return names[-NAMES_MAX:]


def _tenants(pool: Pool, context: Context) -> list[str]:
    """Who has requests in the pool: its tenants of the last minute, by requests."""
    ends: dict[str, float] = {}
    for start in range(context.window_end_s - 60, context.window_end_s, SIZE_S):
        window = pool.windows.by_start.get(start)
        for _, _, usage in window.requests.values() if window is not None else ():
            for tenant, row in usage.items():
                ends[tenant] = ends.get(tenant, 0.0) + row[0]
    return sorted(ends, key=lambda tenant: (-ends[tenant], tenant))[:NAMES_MAX]


def _mean(rows: Iterable[Row], name: str) -> float | None:
    known = [row[R[name]] for row in rows if row[R[name]] is not None]
    return sum(known) / len(known) if known else None


def _total(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
