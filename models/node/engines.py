"""Windows per engine replica: what it holds by the inventory and what it did by its counters. Pure."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from models.node.holdings import STATES, Held, Holdings
from models.node.samples import Series, around
from models.node.texts import Texts
from models.node.weighing import count, growth, held_s, largest, latest, latest_of, mean, missed, weights, within
from models.windows import WINDOW_S
from schemas.config import LimitsSpec

COUNTERS = (
    "prompt_tokens", "cached_tokens", "generation_tokens", "requests", "failed", "aborted", "rejected", "preemptions",
    "iterations", "busy_s", "draft_tokens", "accepted_tokens", "ttft_s_sum", "ttft_count", "tpot_s_sum", "tpot_count",
    "itl_s_sum", "itl_count", "e2e_s_sum", "e2e_count", "queue_s_sum", "queue_count", "prefill_s_sum", "prefill_count",
)  # fmt: skip
TEXTS = ("engine", "model")
COLUMNS = (
    "status", "start_s", "scrape", "running", "waiting", "kv_usage_ratio", "kv_capacity_tokens", "running_max",
    *TEXTS, "pool", *COUNTERS,
)  # fmt: skip
"""What is kept of a sample; status: 0 ok, 1 dead (the endpoint did not answer); texts and pool are codes."""
AT = {name: index for index, name in enumerate(COLUMNS)}
STATUS, START, POOL = AT["status"], AT["start_s"], AT["pool"]
_COUNTERS = slice(len(COLUMNS) - len(COUNTERS), len(COLUMNS))
_SURE = ("samples", "covered_s", "resets")
"""Columns that are zero, not unknown, where there is no sample near."""


class EngineTable(NamedTuple):
    """What a window says of replicas. N rows, by pool and replica."""

    held: Held
    columns: dict[str, Any]
    """Column of ENGINE_WINDOWS -> array or list [N]; a column that is unknown in every row is left out."""

    def number(self, name: str) -> np.ndarray:
        """float64 [N]: a column, NaN where it is unknown."""
        found: np.ndarray | None = self.columns.get(name)
        return np.full(len(self.held.pool), np.nan) if found is None else found


def engine_table(
    series: Series, holdings: Holdings, texts: Texts, start_s: int, now_s: float, limits: LimitsSpec
) -> EngineTable:
    """The window at `start_s`: a row per replica that an inventory names, samples or not, and one per replica that only
    its samples know, where they name its pool."""
    end_s = start_s + WINDOW_S
    near = around(series, start_s, end_s, limits.sample_gap_s, STATUS)
    table = _table(near, start_s, end_s, now_s, limits)
    held = holdings.held(start_s, end_s, now_s, limits.inventory_stale_s)
    spoke = (table["samples"] > 0) | (table["covered_s"] > 0) | (table["answers"] == 0)
    spoke &= ~np.isnan(table["pool"])
    spoke &= ~np.isin(near.subjects, held.replica)
    held = holdings.with_unnamed(held, near.subjects[spoke], table["pool"][spoke].astype(np.int64))
    del table["pool"]
    if not len(held.pool):
        return EngineTable(held, {})
    columns: dict[str, Any] = _identity(held, holdings)
    place = np.minimum(np.searchsorted(near.subjects, held.replica), max(len(near.subjects) - 1, 0))
    absent = np.ones(len(place), bool)
    if len(near.subjects):
        absent = (near.subjects[place] != held.replica) | ~held.last
    for name, values in table.items():
        default = 0.0 if name in _SURE else np.nan
        found = np.where(absent, default, values[place] if len(values) else default)
        if not np.isnan(found).all():
            columns[name] = texts.listed(found) if name in TEXTS else found
    return EngineTable(held, columns)


def by_pool(table: EngineTable, holdings: Holdings) -> dict[str, dict[str, Any]]:
    """Pool -> columns of engine.windows."""
    pool = table.held.pool
    if not len(pool):
        return {}
    borders = np.flatnonzero(np.concatenate(([True], pool[1:] != pool[:-1], [True]))).tolist()
    return {
        holdings.pool_names[int(pool[begin])]: {name: values[begin:end] for name, values in table.columns.items()}
        for begin, end in pairwise(borders)
    }


def _identity(held: Held, holdings: Holdings) -> dict[str, Any]:
    names = [holdings.replica_names[code] for code in held.replica.tolist()]
    return {
        "replica": [name[0] for name in names],
        "node": [name[1] for name in names],
        "state": [STATES[s] for s in held.state.tolist()],
        "billed": held.billed,
        "gpus": held.gpus,
        "gpu_type": [name[2] if segment >= 0 else None for name, segment in zip(names, held.segment, strict=True)],
        "allocated_s": held.allocated_s,
        "loading_s": held.loading_s,
        "draining_s": held.draining_s,
    }


def _table(near: Series, start_s: float, end_s: float, now_s: float, limits: LimitsSpec) -> dict[str, np.ndarray]:
    """Column -> float64 by subject of `near`; `pool` among them."""
    gap_s = limits.sample_gap_s
    inside = within(near, start_s, end_s)
    weight = weights(near, start_s, end_s, now_s, gap_s)
    dead = near.values[STATUS] > 0
    speaks = (inside | (weight > 0)) & ~dead
    current = (near.at < end_s) & (np.minimum(near.next_at, near.at + gap_s) > start_s)
    past = (near.at < end_s) & ~dead
    said = (*TEXTS, "pool")  # a scrape that failed knows less, and takes nothing back
    running, waiting = near.values[AT["running"]], near.values[AT["waiting"]]
    grown = growth(near, _COUNTERS, start_s, end_s, near.values[START], limits.grace_node_s)
    return {
        **{name: latest(near, AT[name], (near.at < end_s) & ~np.isnan(near.column(AT[name]))) for name in said},
        "answers": latest_of(near, (~dead).astype(np.float64), current),
        "idle_s": held_s(near, weight, ~np.isnan(running + waiting), (running == 0) & (waiting == 0)),
        "samples": count(near, inside & ~dead).astype(np.float64),
        "last_at_s": latest_of(near, near.at, past),
        "covered_s": grown.covered_s,
        "resets": grown.resets.astype(np.float64),
        "missed": missed(near, near.values[AT["scrape"]], dead, start_s, end_s),
        "running_mean": mean(near, AT["running"], weight, inside),
        "waiting_mean": mean(near, AT["waiting"], weight, inside),
        "waiting_last": latest(near, AT["waiting"], current & ~dead),
        "running_last": latest(near, AT["running"], current & ~dead),
        "kv_usage_ratio_mean": mean(near, AT["kv_usage_ratio"], weight, inside),
        "kv_usage_ratio_max": largest(near, AT["kv_usage_ratio"], speaks),
        "kv_capacity_tokens": latest(near, AT["kv_capacity_tokens"], past),
        "running_max": latest(near, AT["running_max"], past),
        **dict(zip(COUNTERS, grown.total, strict=True)),
    }
