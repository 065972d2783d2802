"""What each row adds to its window: counts, tokens, latencies, and whether a request met its targets. Pure.

A row is a column of a table: `FIELDS` by rows. Rows of a batch and rows that waited for their twin are the same here.
"""

from __future__ import annotations

import numpy as np

from schemas.columns import Batch

STATUSES = ("ok", "error", "timeout", "rejected", "cancelled")
OK, ERROR, TIMEOUT, REJECTED, CANCELLED = range(len(STATUSES))
LATENCIES = ("ttft_s", "tpot_s", "e2e_s", "queue_s")
UNITS = ("image_units", "audio_s", "video_s")
"""Inputs other than text."""
MEASURED = ("input_tokens", "output_tokens", "cached_tokens", *UNITS, *LATENCIES)
FIELDS = ("at_s", "priority", "status", *MEASURED, "ttft_target_s", "tpot_target_s", "end", "foreign", "late", "retry",
          "enriched")  # fmt: skip
"""status: index in STATUSES. end, foreign (its reporter only enriches), late (a correction: counts and tokens, no
latency and no judgement), retry, enriched: 1 or 0. NaN: unknown."""
F = {name: number for number, name in enumerate(FIELDS)}

STATS = (
    "arrivals", "ends", "ok", "errors", "rejected", "timeouts", "cancelled", "retries", "enriched", "unjoined",
    "slo_judged", "slo_good", "arrivals_sized", "arrival_input_tokens", "input_tokens", "cached_tokens",
    "output_tokens", "good_output_tokens", *UNITS, *(f"{name}_known" for name in UNITS),
    *(f"{name}_sum" for name in LATENCIES), *(f"{name[:-2]}_count" for name in LATENCIES),
)  # fmt: skip
"""Sums of a window. All are columns of request.windows but `arrivals_sized` (arrivals that gave their tokens) and the
`_known` ones (ends that gave their units)."""
S = {name: number for number, name in enumerate(STATS)}

_GRAIN = 2.0**20
"""Sums are of multiples of 1 / so much (1 us): exact up to 8.6e9, so the same in any order, and what was added can be
taken off again."""


def table(batch: Batch, foreign: np.ndarray, late: np.ndarray) -> np.ndarray:
    """float64 [FIELDS, rows] of a batch, targets unknown. `foreign`, `late`: bool [rows]."""
    rows = np.empty((len(FIELDS), batch.rows))
    for name in ("at_s", "priority", *MEASURED):
        rows[F[name]] = batch.numbers[name]
    known = [*(float(STATUSES.index(value)) for value in batch.values["status"]), np.nan]
    rows[F["status"]] = np.array(known)[batch.codes["status"]]
    rows[F["end"]] = ends(batch)
    rows[F["foreign"]], rows[F["late"]] = foreign, late
    rows[F["retry"]] = batch.numbers["attempt"] > 1
    rows[F["enriched"]] = 0.0
    rows[F["tpot_s"]] = tpot_s(rows)
    return rows


def ends(batch: Batch) -> np.ndarray:
    """bool [rows]: ends, not arrivals."""
    return is_value(batch, "event", "end")


def is_value(batch: Batch, column: str, wanted: str) -> np.ndarray:
    """bool [rows]: whether a text is this one; unknown is not."""
    flags: np.ndarray = np.array([*(value == wanted for value in batch.values[column]), False])
    chosen: np.ndarray = flags[batch.codes[column]]
    return chosen


def tpot_s(rows: np.ndarray) -> np.ndarray:
    """float64 [rows]: time per output token as given, or (e2e - TTFT) / (output tokens - 1), its definition: a source
    that gives those need not give it. Unknown where fewer than two tokens came. Not asked of two sources together:
    they measure from different places."""
    given, output = rows[F["tpot_s"]], rows[F["output_tokens"]]
    with np.errstate(invalid="ignore", divide="ignore"):
        derived = np.maximum(rows[F["e2e_s"]] - rows[F["ttft_s"]], 0.0) / (output - 1)
        found: np.ndarray = np.where(np.isnan(given) & (output >= 2), derived, given)
    return found


def judge(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(judged, good), bool [rows], of ends. One that failed, timed out or was rejected is judged and not good; a
    cancelled one, one of unknown status, target or TTFT is not judged, nor one of two tokens or more whose TPOT is
    unknown. With fewer than two output tokens there is no time between tokens: TTFT alone counts."""
    status, output = rows[F["status"]], rows[F["output_tokens"]]
    ttft, tpot = rows[F["ttft_s"]], rows[F["tpot_s"]]
    several = ~(output < 2)
    measured = (status == OK) & ~np.isnan(ttft) & (~several | ~np.isnan(tpot) | np.isnan(output))
    failed = (status == ERROR) | (status == TIMEOUT) | (status == REJECTED)
    judged = ~np.isnan(rows[F["ttft_target_s"]]) & (measured | failed)
    slow_tokens = several & (tpot > rows[F["tpot_target_s"]])
    good = judged & measured & (ttft <= rows[F["ttft_target_s"]]) & ~slow_tokens
    return judged, good


def stats(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [STATS, rows] to be summed, float64 [LATENCIES, rows] to be observed, NaN = unknown).

    Of a foreign row only `unjoined` is counted: its twin has not come, or it is taken off again when it has.
    """
    end, own = rows[F["end"]] > 0, rows[F["foreign"]] == 0
    counted = end & own
    timed = counted & (rows[F["late"]] == 0)
    status = np.where(counted, rows[F["status"]], np.nan)
    found = np.zeros((len(STATS), rows.shape[1]))
    found[S["arrivals"]] = ~end & own
    found[S["retries"]] = found[S["arrivals"]] * rows[F["retry"]]
    found[S["ends"]] = counted
    found[S["enriched"]] = counted * rows[F["enriched"]]
    found[S["unjoined"]] = end & ~own
    for number, name in enumerate(("ok", "", "timeouts", "rejected", "cancelled")):
        if name:
            found[S[name]] = status == number
    found[S["errors"]] = (status == ERROR) + found[S["timeouts"]] + found[S["cancelled"]]
    judged, good = judge(rows)
    found[S["slo_judged"]], found[S["slo_good"]] = judged & timed, good & timed
    sizes = np.where(~end & own, rows[F["input_tokens"]], np.nan)
    found[S["arrivals_sized"]], found[S["arrival_input_tokens"]] = ~np.isnan(sizes), np.nan_to_num(sizes)
    for name in ("input_tokens", "cached_tokens", "output_tokens"):
        found[S[name]] = np.where(counted, np.nan_to_num(rows[F[name]]), 0.0)
    found[S["good_output_tokens"]] = found[S["output_tokens"]] * found[S["slo_good"]]
    units = rows[F["image_units"] : F["image_units"] + len(UNITS)]
    if not np.isnan(units).all():
        known = np.where(counted, units, np.nan)
        first = S["image_units"]
        found[first : first + len(UNITS)] = np.nan_to_num(known)
        found[first + len(UNITS) : first + 2 * len(UNITS)] = ~np.isnan(known)
    latencies: np.ndarray = np.where(timed, rows[F["ttft_s"] : F["ttft_s"] + len(LATENCIES)], np.nan)
    first = S["ttft_s_sum"]
    found[first : first + len(LATENCIES)] = np.nan_to_num(latencies)
    found[first + len(LATENCIES) :] = ~np.isnan(latencies)
    return np.rint(found * _GRAIN) / _GRAIN, latencies
