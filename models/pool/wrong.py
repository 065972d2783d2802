"""What is wrong in a pool now, by kind of finding: texts with the figures that matter, and dollars where known."""

from __future__ import annotations

from models.pool import health, status
from models.pool.context import Context
from models.pool.findings import Found
from models.pool.pool import Pool
from models.pool.windows import STATE, R
from schemas.findings import FindingKind

JUDGED_MIN = 50.0
"""Requests that an attainment must rest on."""
COLLAPSED = 0.5
"""Requests wait although batches are below this share of the largest seen."""


def found(pool: Pool, context: Context) -> dict[FindingKind, dict[str, Found]]:
    """Every kind with its subjects; an empty one closes what was open."""
    return {
        "policy_missing": _policy(pool, context),
        "price_unknown": _prices(pool),
        "stale_data": _stale(pool, context),
        "slo_at_risk": _slo(pool, context),
        "latency": pool.latency.current(pool.name),
        "slow_replica": _slow(pool, context),
        "replica_failed": _failed(pool, context),
        "idle_allocated": _idle(pool, context),
        "batching_collapse": _collapse(pool, context),
        "gpu_lost": _lost(pool),
        "frozen": _frozen(pool, context),
    }


def _policy(pool: Pool, context: Context) -> dict[str, Found]:
    if context.spec is not None:
        return {}
    return {pool.name: Found("no pool object in fleet.config: nothing is planned for it; apply one", 1.0)}


def _prices(pool: Pool) -> dict[str, Found]:
    return {
        gpu_type or "-": Found(f"GPU type {gpu_type or '(unnamed)'} has no price: cost is unknown; apply one", 1.0)
        for gpu_type in pool.unpriced
    }


def _stale(pool: Pool, context: Context) -> dict[str, Found]:
    stale = context.stale(pool)
    if not pool.windows.request_until and context.now_s - pool.first_s <= context.fresh_s:
        return {}  # it has only just appeared
    return {} if stale is None else {pool.name: Found(stale[0], stale[1])}


def _slo(pool: Pool, context: Context) -> dict[str, Found]:
    spec = context.spec
    share, judged = status.attainment(pool.windows, context.window_end_s)
    if spec is None or share is None or judged < JUDGED_MIN or share >= spec.slo_target:
        return {}
    text = (
        f"{100 * share:.2f} % of {judged:.0f} requests in the last {status.SLO_SPAN_S} s were within "
        f"{spec.slo_ttft_s:g} s TTFT and {1000 * spec.slo_tpot_s:g} ms a token; target {100 * spec.slo_target:g} %"
    )
    return {pool.name: Found(text, 1.0 - share)}


def _slow(pool: Pool, context: Context) -> dict[str, Found]:
    usd, rows = context.usd_per_replica_hour(), context.rows(pool)
    held: dict[str, Found] = {}
    for name, factor in pool.health.slow.items():
        if name not in rows:
            continue
        weight = pool.orders.weights.get(name, 1.0)
        text = f"{name} was {factor:.2f} x as slow as its siblings in the last window; its weight is {weight:g}"
        if name in pool.left_out:
            text += "; not rerouted around: no more than a third of a pool is"
        lost = None if usd is None else usd * max(0.0, 1 - 1 / max(factor, 1e-9))
        held[name] = Found(text, factor, lost, {"weight": weight})
    return held


def _failed(pool: Pool, context: Context) -> dict[str, Found]:
    rows = context.rows(pool)
    usd = context.usd_per_replica_hour()
    return {
        name: Found(f"{name} has failed", 1.0, usd if rows[name][R["billed"]] else 0.0) for name in health.failed(rows)
    }


def _idle(pool: Pool, context: Context) -> dict[str, Found]:
    names = pool.health.idle_replicas()
    if not names:
        return {}
    usd = context.usd_per_replica_hour()
    text = f"{len(names)} of {len(pool.health.idle)} replicas had nothing to do for a minute: {', '.join(names[:10])}"
    return {pool.name: Found(text, float(len(names)), None if usd is None else usd * len(names))}


def _collapse(pool: Pool, context: Context) -> dict[str, Found]:
    rows = [row for row in context.rows(pool).values() if row[STATE] == "ready"]
    known = [row for row in rows if row[R["running_mean"]] is not None and row[R["waiting_mean"]] is not None]
    if not known or pool.health.peak <= 0:
        return {}
    running = sum(row[R["running_mean"]] for row in known) / len(known)
    waiting = sum(row[R["waiting_mean"]] for row in known) / len(known)
    if waiting < 1.0 or running >= COLLAPSED * pool.health.peak:
        return {}
    kv = [row[R["kv_usage_ratio_mean"]] for row in known if row[R["kv_usage_ratio_mean"]] is not None]
    mean_kv = sum(kv) / len(kv) if kv else None
    cause = "KV usage is not known"
    if mean_kv is not None:
        bound = "KV-bound" if mean_kv > 0.85 else "bound by prefill or admission"
        cause = f"KV cache {100 * mean_kv:.0f} % full, so {bound}"
    text = (
        f"{waiting:.1f} requests wait per replica while {running:.1f} run; "
        f"it has run {pool.health.peak:.0f} together ({cause})"
    )
    usd = context.usd_per_replica_hour()
    share = 1 - running / pool.health.peak
    return {pool.name: Found(text, share, None if usd is None else usd * len(known) * share)}


def _lost(pool: Pool) -> dict[str, Found]:
    windows = pool.windows.gpus
    if not windows:
        return {}
    lost = [gpu for entry in windows[max(windows)].values() for gpu in entry[3]]
    return {gpu: Found(f"GPU {gpu} no longer answers", 1.0) for gpu in lost}


def _frozen(pool: Pool, context: Context) -> dict[str, Found]:
    return {
        kind: Found(
            f"decisions of kind {kind} made things worse twice within an hour: "
            f"{'no scale-down' if kind == 'scale' else 'none'} is proposed until {until_s:.0f} (Unix s), "
            "or until the pool's policy is applied anew",
            1.0,
        )
        for kind, until_s in pool.watch.frozen.items()
        if until_s > context.now_s
    }
