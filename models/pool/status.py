"""A pool's present state in one record, absolute: what the fleet level and people decide on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.pool.orders import Orders
from models.pool.windows import GOOD, GPU_TYPE, JUDGED, SIZE_S, STATE, R, Row, Windows
from models.sketches import Histogram
from schemas.config import PoolSpec

SLO_SPAN_S = 300
LATENCY_SPAN_S = 60


def allocation(rows: Mapping[str, Row], prices: Mapping[str, float], spec: PoolSpec | None) -> dict[str, Any]:
    """Replicas and GPUs that are paid for, and what they cost an hour. Null where nothing is known."""
    if not rows:
        return {}
    billed = [row for row in rows.values() if row[R["billed"]]]
    usd: float | None = 0.0
    for row in billed:
        gpu_type = row[GPU_TYPE] or (spec.gpu_type if spec else "")
        price = prices.get(gpu_type)
        usd = None if usd is None or price is None else usd + row[R["gpus"]] * price
    return {
        "replicas_allocated": len(billed),
        "replicas_ready": sum(row[STATE] == "ready" for row in rows.values()),
        "gpus_allocated": sum(row[R["gpus"]] for row in billed),
        "usd_per_hour": usd,
    }


def held(rows: Mapping[str, Row]) -> int:
    """Replicas that are paid for and not on their way out: what an order for so many would leave alone."""
    return sum(1 for row in rows.values() if row[R["billed"]] and row[STATE] not in ("draining", "failed"))


def ready(rows: Mapping[str, Row]) -> int:
    """Replicas that serve."""
    return sum(1 for row in rows.values() if row[STATE] == "ready")


def engine_load(rows: Mapping[str, Row]) -> dict[str, float | None]:
    """Running and waiting requests and mean KV use, by the newest scrapes."""
    serving = [row for row in rows.values() if row[STATE] in ("ready", "draining")]
    running = [row[R["running_last"]] for row in serving if row[R["running_last"]] is not None]
    waiting = [row[R["waiting_last"]] for row in serving if row[R["waiting_last"]] is not None]
    kv = [row[R["kv_usage_ratio_mean"]] for row in serving if row[R["kv_usage_ratio_mean"]] is not None]
    return {
        "running": sum(running) if running else None,
        "waiting": sum(waiting) if waiting else None,
        "kv_usage_ratio": sum(kv) / len(kv) if kv else None,
    }


def gpu_util_pct(windows: Windows) -> float | None:
    """Mean NVML utilisation over the pool's GPUs in the newest window in which any was heard of, %."""
    if not windows.gpus:
        return None
    entries = windows.gpus[max(windows.gpus)].values()
    covered = sum(entry[2] for entry in entries)
    return sum(entry[1] for entry in entries) / covered if covered > 0 else None


def attainment(windows: Windows, end_s: int, span_s: int = SLO_SPAN_S) -> tuple[float | None, float]:
    """(share of the requests that ended in the last `span_s` within both targets, requests judged)."""
    totals = windows.totals(end_s - span_s, end_s)
    judged = totals[JUDGED]
    return (totals[GOOD] / judged if judged > 0 else None), judged


def latency(windows: Windows, end_s: int) -> dict[str, float | None]:
    """Quantiles of TTFT and TPOT over the closed windows of the last 60 s, s."""
    pairs: tuple[list[int], list[int]] = ([], [])
    for start in range(end_s - LATENCY_SPAN_S, end_s, SIZE_S):
        for entry in windows.hists.get(start, {}).values():
            pairs[0].extend(entry[1])
            pairs[1].extend(entry[2])
    ttft, tpot = Histogram.from_pairs(pairs[0]), Histogram.from_pairs(pairs[1])
    return {
        "ttft_s_p50": ttft.quantile(0.5),
        "ttft_s_p99": ttft.quantile(0.99),
        "tpot_s_p50": tpot.quantile(0.5),
        "tpot_s_p99": tpot.quantile(0.99),
    }


def weights(orders: Orders, rows: Mapping[str, Row]) -> dict[str, float]:
    """Weights in force of the replicas that there are."""
    return {name: weight for name, weight in orders.weights.items() if not rows or name in rows}


def candidates(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shadow policies with figures short enough to read."""
    return [{name: round(value, 4) for name, value in score.items()} for score in scores]
