"""What a pool's p99 is, what it is held against, and the windows that show it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.pool.latency_norms import Norm, ln
from models.pool.windows import SIZE_S, Windows
from models.sketches import Histogram
from schemas.config import PoolSpec

METRICS = ("ttft", "tpot")
QUANTILE = 0.99
COUNT_MIN, COUNT_WANTED = 20, 200
"""Requests that a p99 must rest on; windows are merged until so many are reached, or until `SPAN` windows are."""
SPAN = 6
NORM_FACTOR, NORM_DEVIATIONS = 1.5, 4.0
NORM_SHARE = 0.1
"""A p99 below this share of its target breaks nothing, whatever was usual."""
WINDOWS_SAID = 3
NAMES_MAX = 30
"""Names of windows that a finding gives at most."""


def prior(spec: PoolSpec | None, rate_rps: float | None) -> dict[str, float]:
    """What stands for the usual until that is learned: the policy's own figures, and no wait."""
    found: dict[str, float] = {"queue_s": 0.0, "clock": 0.0}
    if spec is None:
        return found
    found["prefill"], found["token"] = math.log(spec.slo_ttft_s), math.log(spec.slo_tpot_s)
    for name, value in (
        ("pressure", rate_rps),
        ("prompt", spec.input_tokens_mean),
        ("output", spec.output_tokens_mean),
    ):
        known = ln(value)
        if known is not None:
            found[name] = known
    return found


def target_s(metric: str, spec: PoolSpec | None) -> float | None:
    """The policy's target of a metric, s; None: no policy."""
    if spec is None:
        return None
    return spec.slo_ttft_s if metric == "ttft" else spec.slo_tpot_s


def limit_s(norm: Norm, aim_s: float | None) -> float:
    """What a p99 breaks when it is above it, s: target or norm (of its ln); infinite while neither is known."""
    limit = math.inf if aim_s is None else aim_s
    if norm.known:
        own_s = math.exp(norm.mean) * max(NORM_FACTOR, math.exp(min(NORM_DEVIATIONS * norm.dev, 5.0)))
        limit = min(limit, max(own_s, NORM_SHARE * (aim_s or 0.0)))
    return limit


def p99_of(hists: Mapping[int, dict[str, list[Any]]], start_s: int, column: int) -> float | None:
    """Of the requests that ended in the window, and in those before until there are enough; None: too few. `hists`:
    start -> source -> [version, pairs, pairs], `column`: which of them."""
    merged: list[int] = []
    for k in range(SPAN):
        for entry in hists.get(start_s - k * SIZE_S, {}).values():
            merged += entry[column]
        if k == 0 and not merged:
            return None  # nothing ended in it: it says nothing
        if sum(merged[1::2]) >= COUNT_WANTED:
            break
    histogram = Histogram.from_pairs(merged)
    return histogram.quantile(QUANTILE) if histogram.count >= COUNT_MIN else None


def window_names(windows: Windows, start_s: int) -> list[str]:
    """Names and versions of the windows that show it, newest first."""
    found = []
    for k in range(WINDOWS_SAID):
        at_s = start_s - k * SIZE_S
        for kind, held in (("request", windows.hists), ("engine", windows.rows), ("interference", windows.suspects)):
            found += [f"{kind}/{at_s}/{source}@{entry[0]}" for source, entry in held.get(at_s, {}).items()]
    return found[:NAMES_MAX]
