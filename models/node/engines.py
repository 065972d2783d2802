"""Windows per engine replica: what it holds by the inventory and what it did by its counters. Pure."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from models.node.holdings import STATES, Held, Holdings
from models.node.samples import Series, around
from models.node.weighing import count, growth, largest, latest, latest_of, mean, weights, within
from models.windows import WINDOW_S

COUNTERS = (
    "prompt_tokens",
    "cached_tokens",
    "generation_tokens",
    "requests",
    "preemptions",
    "iterations",
    "ttft_s_sum",
    "ttft_count",
    "tpot_s_sum",
    "tpot_count",
    "e2e_s_sum",
    "e2e_count",
)
COLUMNS = ("status", "start_s", "running", "waiting", "kv_usage_ratio", *COUNTERS)
"""What is kept of a sample; status: 0 ok, 1 dead (the endpoint did not answer)."""
STATUS = COLUMNS.index("status")
START = COLUMNS.index("start_s")
_COUNTERS = slice(len(COLUMNS) - len(COUNTERS), len(COLUMNS))


def engine_windows(
    series: Series, holdings: Holdings, start_s: int, now_s: float, gap_s: float, stale_s: float, grace_s: float
) -> dict[str, dict[str, Any]]:
    """Pool -> columns of engine.windows for the window at `start_s`, a row per replica, samples or not."""
    end_s = start_s + WINDOW_S
    held = holdings.held(start_s, end_s, now_s, stale_s)
    if not len(held.pool):
        return {}
    near = around(series, start_s, end_s, gap_s, STATUS)
    table = _table(near, start_s, end_s, now_s, gap_s, grace_s)
    if len(near.subjects):
        place = np.minimum(np.searchsorted(near.subjects, held.replica), len(near.subjects) - 1)
        absent = (near.subjects[place] != held.replica) | ~held.last
    else:
        place, absent = np.zeros(len(held.pool), np.int64), np.ones(len(held.pool), bool)
    borders = np.flatnonzero(np.concatenate(([True], held.pool[1:] != held.pool[:-1], [True]))).tolist()
    found = {}
    for begin, end in pairwise(borders):
        chosen = slice(begin, end)
        data = _identity(Held(*(values[chosen] for values in held)), holdings)
        for name, values in table.items():
            # A replica without any sample near: no samples, no time covered, all else unknown.
            default = 0.0 if name in ("samples", "covered_s", "resets") else np.nan
            data[name] = np.where(absent[chosen], default, values[place[chosen]] if len(values) else default)
        found[holdings.pool_names[int(held.pool[begin])]] = data
    return found


def _identity(held: Held, holdings: Holdings) -> dict[str, Any]:
    names = [holdings.replica_names[code] for code in held.replica.tolist()]
    return {
        "replica": [name[0] for name in names],
        "node": [name[1] for name in names],
        "state": [STATES[s] for s in held.state.tolist()],
        "billed": held.billed,
        "gpus": held.gpus,
        "gpu_type": [name[2] for name in names],
        "allocated_s": held.allocated_s,
    }


def _table(
    near: Series, start_s: float, end_s: float, now_s: float, gap_s: float, grace_s: float
) -> dict[str, np.ndarray]:
    """Column -> float64 by subject of `near`."""
    inside = within(near, start_s, end_s)
    weight = weights(near, start_s, end_s, now_s, gap_s)
    dead = near.values[STATUS] > 0
    speaks = (inside | (weight > 0)) & ~dead
    current = (near.at < end_s) & (np.minimum(near.next_at, near.at + gap_s) > start_s) & ~dead
    past = (near.at < end_s) & ~dead
    grown = growth(near, _COUNTERS, start_s, end_s, near.values[START], grace_s)
    at = {name: index for index, name in enumerate(COLUMNS)}
    return {
        "samples": count(near, inside & ~dead).astype(np.float64),
        "last_at_s": latest_of(near, near.at, past),
        "covered_s": grown.covered_s,
        "resets": grown.resets.astype(np.float64),
        "running_mean": mean(near, at["running"], weight, inside),
        "waiting_mean": mean(near, at["waiting"], weight, inside),
        "waiting_last": latest(near, at["waiting"], current),
        "running_last": latest(near, at["running"], current),
        "kv_usage_ratio_mean": mean(near, at["kv_usage_ratio"], weight, inside),
        "kv_usage_ratio_max": largest(near, at["kv_usage_ratio"], speaks),
        **dict(zip(COUNTERS, grown.total, strict=True)),
    }
