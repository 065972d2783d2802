"""What is wrong in a pool now, by kind of finding: texts with the figures that matter, and dollars where known."""

from __future__ import annotations

from models.pool import gpus, health, status, waste
from models.pool.context import Context
from models.pool.findings import Found
from models.pool.pool import Pool
from models.pool.windows import NODE, STATE, R, Row, S
from schemas.findings import FindingKind

JUDGED_MIN = 50.0
"""Requests that an attainment must rest on."""
NOT_SERVING = ("starting", "asleep", "failed")
"""States in which an engine need not answer."""
NO_NODE = "-"
"""Node of a target of which nobody has said where it runs."""
APART_OF = 3
"""Slowness of unknown cause is told when so many of the newest windows have it."""


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
        "engine_dead": dead(pool, context),
        "node_unknown": _unknown(pool, context),
        "interference": waste.interference(pool, context),
        "idle_allocated": waste.idle(pool, context),
        "batching_collapse": waste.collapse(pool, context),
        "spread_collapse": waste.spread(pool, context),
        **_gpus(pool, context),
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


def _gpus(pool: Pool, context: Context) -> dict[FindingKind, dict[str, Found]]:
    windows = pool.windows.gpus
    # by source: one that lags takes nothing back
    newest = {source: entry for start in sorted(windows) for source, entry in windows[start].items()}
    fallback = "" if context.spec is None else context.spec.gpu_type
    return gpus.found([entry[3] for entry in newest.values()], context.prices, fallback, served=True)


def _stale(pool: Pool, context: Context) -> dict[str, Found]:
    stale = context.stale(pool)
    unheard = sum(
        ends for until_s, ends in pool.windows.unjoined.values() if context.now_s - until_s <= context.fresh_s
    )
    if stale is not None and unheard and context.spec is not None:
        reporter = context.spec.reporter
        other = "engine" if reporter == "gateway" else "gateway"
        text = f"{stale[0]}; only the {other} reports its requests, while the policy takes the word of the {reporter}"
        return {pool.name: Found(f"{text}: apply `reporter: {other}`, or send what the {reporter} sees", stale[1])}
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
        held[name] = Found(text, factor, waste.lost_usd(usd, factor), {"weight": weight})
    return {**_apart(pool, rows, usd), **held}


def _apart(pool: Pool, rows: dict[str, Row], usd: float | None) -> dict[str, Found]:
    """Replicas that share a GPU and are slower than their load and their neighbours explain."""
    seen: dict[str, list[float]] = {}
    for start in sorted(pool.windows.suspects)[-2 * APART_OF :]:
        for name, suspect in pool.windows.suspects_of(start).items():
            if suspect[S["unexplained"]] is not None and not suspect[S["victim"]]:
                seen.setdefault(name, []).append(suspect[S["unexplained"]])
    found = {}
    for name, factors in seen.items():
        if len(factors) < APART_OF or name not in rows:
            continue
        factor = factors[-1]
        text = f"{name} takes {factor:.2f} x the time per token that its load explains; no neighbour explains it"
        found[name] = Found(text, factor, waste.lost_usd(usd, factor))
    return found


def _failed(pool: Pool, context: Context) -> dict[str, Found]:
    rows = context.rows(pool)
    usd = context.usd_per_replica_hour()
    return {
        name: Found(f"{name} has failed", 1.0, usd if rows[name][R["billed"]] else 0.0) for name in health.failed(rows)
    }


def dead(pool: Pool, context: Context) -> dict[str, Found]:
    """Replicas whose engine does not answer although it should."""
    rows, found = context.rows(pool), {}
    for name in [name for names in pool.windows.dead.values() for name in names]:
        row = rows.get(name)
        if row is None or row[STATE] in NOT_SERVING or row[R["answers"]] != 0:
            continue
        last_s = row[R["last_at_s"]]
        since = "since it was first asked" if last_s is None else f"for {max(0.0, context.now_s - last_s):.0f} s"
        text = f"the engine of {name} on {row[NODE]} has not answered {since}: it takes no requests that we know of"
        found[name] = Found(text, 1.0, waste.replica_usd(row, context), {"last_answer_s": last_s})
    return found


def _unknown(pool: Pool, context: Context) -> dict[str, Found]:
    found = {}
    for name, row in context.rows(pool).items():
        if row[NODE] == NO_NODE:
            text = (
                f"{name} answers, but on which node it runs nobody has said: its GPUs and their cost are not known; "
                "run `fleetloop export nvml` on its node, or name the node where it is scraped"
            )
        elif row[STATE] == "unknown":
            text = f"of {row[NODE]}, where {name} runs, no inventory comes: is `fleetloop export nvml` running there?"
        else:
            continue
        found[name] = Found(text, 1.0)
    return found


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
