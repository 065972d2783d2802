"""What each row adds to its window: counts, tokens, latencies, and whether a request met its targets. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from schemas.columns import Batch

STATS = (
    "arrivals",
    "ends",
    "ok",
    "errors",
    "rejected",
    "slo_judged",
    "slo_good",
    "arrivals_sized",
    "arrival_input_tokens",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "ttft_s_sum",
    "ttft_count",
    "tpot_s_sum",
    "tpot_count",
    "e2e_s_sum",
    "e2e_count",
)
"""Sums of a window; all but `arrivals_sized` (arrivals that gave their tokens) are columns of request.windows."""
LATENCIES = ("ttft_s", "tpot_s", "e2e_s")
_ERRORS = ("error", "timeout", "cancelled")


class Rows:
    """Rows of one batch, ready to be summed.

    Parameters: `batch`; `late` [rows]: ends that are billed in a later window than their own (a correction: counts
    and tokens, no latency and no judgement); `targets`: pool -> (TTFT, TPOT) targets in s.
    """

    def __init__(self, batch: Batch, late: np.ndarray, targets: Mapping[str, tuple[float, float]]) -> None:
        numbers = batch.numbers
        is_end = _is(batch, "event", ("end",))
        timed = is_end & ~late
        ttft, e2e = (np.where(timed, numbers[name], np.nan) for name in ("ttft_s", "e2e_s"))
        output = numbers["output_tokens"]
        with np.errstate(invalid="ignore", divide="ignore"):
            # By definition; a gateway that gives the other two need not give it.
            derived = np.where(output >= 2, np.maximum(e2e - ttft, 0.0) / (output - 1), np.nan)
        tpot = np.where(timed, np.where(np.isnan(numbers["tpot_s"]), derived, numbers["tpot_s"]), np.nan)
        self.latencies = {"ttft_s": ttft, "tpot_s": tpot, "e2e_s": e2e}
        """float64 [rows] by name; NaN = unknown."""
        ok = is_end & _is(batch, "status", ("ok",))
        judged, good = _judge(batch, timed, ok, ttft, tpot, targets)
        arrival_tokens = np.where(is_end, np.nan, numbers["input_tokens"])
        stats = {
            "arrivals": ~is_end,
            "ends": is_end,
            "ok": ok,
            "errors": is_end & _is(batch, "status", _ERRORS),
            "rejected": is_end & _is(batch, "status", ("rejected",)),
            "slo_judged": judged,
            "slo_good": good,
            "arrivals_sized": ~np.isnan(arrival_tokens),
            "arrival_input_tokens": np.nan_to_num(arrival_tokens),
        }
        for name in ("input_tokens", "cached_tokens", "output_tokens"):
            stats[name] = np.where(is_end, np.nan_to_num(numbers[name]), 0.0)
        for name, values in self.latencies.items():
            stats[f"{name}_sum"] = np.nan_to_num(values)
            stats[f"{name[:-2]}_count"] = ~np.isnan(values)
        self.stats = np.array([stats[name] for name in STATS], np.float64)
        """float64 [STATS, rows]."""


def _is(batch: Batch, column: str, wanted: tuple[str, ...]) -> np.ndarray:
    """bool [rows]: whether a text is one of these; unknown is not."""
    flags: np.ndarray = np.array([*(value in wanted for value in batch.values[column]), False])
    chosen: np.ndarray = flags[batch.codes[column]]
    return chosen


def _judge(
    batch: Batch,
    timed: np.ndarray,
    ok: np.ndarray,
    ttft: np.ndarray,
    tpot: np.ndarray,
    targets: Mapping[str, tuple[float, float]],
) -> tuple[np.ndarray, np.ndarray]:
    """(judged, good). A request that failed, timed out or was rejected is judged and not good; a cancelled one, one
    of unknown status, pool or TTFT is not judged, nor one of two tokens or more whose TPOT is unknown. With fewer
    than two output tokens there is no time between tokens: TTFT alone counts."""
    unknown = (np.nan, np.nan)
    by_pool = np.array([targets.get(pool, unknown) for pool in batch.values["pool"]], np.float64)
    target_ttft, target_tpot = by_pool[batch.codes["pool"]].T
    has_target = timed & ~np.isnan(target_ttft)
    several = ~(batch.numbers["output_tokens"] < 2)
    measured = ok & ~np.isnan(ttft) & (~several | ~np.isnan(tpot) | np.isnan(batch.numbers["output_tokens"]))
    failed = _is(batch, "status", ("error", "timeout", "rejected"))
    judged = has_target & (measured | failed)
    slow_tokens = several & (tpot > target_tpot)
    return judged, judged & measured & (ttft <= target_ttft) & ~slow_tokens
