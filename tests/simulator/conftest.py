"""A small fleet for the tests, and ways to change it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from simulator.scenario import Scenario

_BASE: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "gpus": {"H100": {"usd_per_gpu_hour": 6.88}, "A100": {"usd_per_gpu_hour": 3.4309}},
    "nodes": [
        {"prefix": "h", "gpu": "H100", "gpus": 8, "count": 2},
        {"prefix": "a", "gpu": "A100", "gpus": 4, "count": 1},
    ],
    "pools": [
        {
            "name": "big",
            "route": "chat",
            "route_weight": 0.9,
            "model": "m70",
            "gpu": "H100",
            "tp": 4,
            "replicas": 2,
            "replicas_min": 0,
            "replicas_max": 5,
            "capacity_rps": 3.5,
            "engine": {"d0_ms": 28.8, "d1_ms": 0.264, "d2_ms": 0.101, "p1_ms": 95.6, "kv_tokens_max": 450000},
            "cold_start": {"mean_s": 30},
        },
        {
            "name": "old",
            "route": "chat",
            "route_weight": 0.1,
            "model": "m70",
            "gpu": "A100",
            "tp": 4,
            "gpu_share": 0.75,
            "replicas": 1,
            "replicas_min": 0,
            "replicas_max": 1,
            "capacity_rps": 1.4,
            "engine": {"d0_ms": 44.1, "d1_ms": 0.19, "d2_ms": 0.335, "p1_ms": 166.9, "kv_tokens_max": 450000},
            "cold_start": {"mean_s": 30, "sd_s": 10},
            "interference": {"mini": 0.5},
        },
        {
            "name": "mini",
            "route": "assist",
            "model": "m1",
            "gpu": "A100",
            "tp": 1,
            "gpu_share": 0.25,
            "replicas": 1,
            "replicas_min": 0,
            "replicas_max": 4,
            "capacity_rps": 18,
            "engine": {
                "d0_ms": 4.87,
                "d1_ms": 0.199,
                "d2_ms": 0.102,
                "p1_ms": 34.7,
                "chunk_tokens": 512,
                "kv_tokens_max": 50000,
            },
            "cold_start": {"mean_s": 10},
        },
    ],
    "tenants": [{"name": "t1", "class": "interactive"}, {"name": "t2", "class": "batch"}],
    "load": [
        {
            "kind": "synthetic",
            "route": "chat",
            "tenant": "t1",
            "rate_rps": 5,
            "waves": [{"period_s": 120, "amplitude": 0.5}],
            "input_tokens": {"mean": 1000},
            "output_tokens": {"mean": 200, "max": 1000},
        },
        {
            "kind": "synthetic",
            "route": "assist",
            "tenant": "t2",
            "rate_rps": 8,
            "bursts": [{"every_s": 60, "duration_s": 10, "factor": 3}],
            "input_tokens": {"mean": 600},
            "output_tokens": {"mean": 60, "max": 500},
        },
    ],
}

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def scenario() -> Callable[..., Scenario]:
    """Makes the small scenario, changed by a function over its plain form."""

    def make(change: Change | None = None) -> Scenario:
        data = copy.deepcopy(_BASE)
        if change:
            change(data)
        return Scenario.model_validate(data)

    return make
