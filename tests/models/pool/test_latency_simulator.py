"""Latency explained in the whole loop: what the simulator does to a pool is what the pool level says of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from schemas.log import Result
from schemas.topics import FINDINGS
from simulator.inprocess import InProcessLoop
from simulator.scenario import Scenario

AT_S, FOR_S = 300.0, 120.0


def scenario(change: dict[str, Any], pool: dict[str, Any], load: dict[str, Any]) -> Scenario:
    """Four replicas of llama2-70b on 4 H100 each, at half of what they carry, that nobody scales."""
    return Scenario.model_validate(
        {
            "name": "latency",
            "seed": 5,
            "gpus": {"H100": {"usd_per_gpu_hour": 6.88}},
            "nodes": [{"prefix": "h", "gpu": "H100", "gpus": 8, "count": 2}],
            "pools": [
                {
                    "name": "big",
                    "route": "chat",
                    "model": "m70",
                    "gpu": "H100",
                    "tp": 4,
                    "replicas": 4,
                    "replicas_min": 4,
                    "replicas_max": 4,
                    "capacity_rps": 3.5,
                    "mode": "observe",
                    "engine": {"d0_ms": 28.8, "d1_ms": 0.264, "d2_ms": 0.101, "p1_ms": 95.6, "kv_tokens_max": 450000},
                    **pool,
                }
            ],
            "tenants": [{"name": "t1", "class": "interactive"}],
            "load": [
                {
                    "kind": "synthetic",
                    "route": "chat",
                    "tenant": "t1",
                    "rate_rps": 7,
                    "input_tokens": {"mean": 1000},
                    "output_tokens": {"mean": 200, "max": 1000},
                    **load,
                }
            ],
            **change,
        }
    )


def slow(replica: int) -> dict[str, Any]:
    """A fault by which a GPU runs at 40 % of its clock."""
    return {"kind": "slow", "pool": "big", "replica": replica, "at_s": AT_S, "duration_s": FOR_S, "factor": 2.5}


@pytest.mark.parametrize(
    ("change", "pool", "load", "cause", "words"),
    [
        ({"faults": [slow(1)]}, {}, {}, "throttling", "'s SM clock at 40 % of the highest (usually 100 %)"),
        (
            {"faults": [{"kind": "death", "pool": "big", "replica": i, "at_s": AT_S} for i in (0, 1)]},
            {"cold_start": {"mean_s": 90}},
            {},
            "cold_start",
            "2 of 4 replicas still load",
        ),
        (
            {},
            {"engine": {"d0_ms": 28.8, "d1_ms": 0.264, "d2_ms": 0.101, "p1_ms": 95.6, "seqs_max": 24}},
            {"bursts": [{"every_s": 1e6, "at_s": AT_S, "duration_s": FOR_S, "factor": 2.0}]},
            "queueing",
            "wait; arrivals ",
        ),
    ],
)
def test_what_was_done_is_what_is_said(
    change: dict[str, Any], pool: dict[str, Any], load: dict[str, Any], cause: str, words: str
) -> None:
    """From samples of exporters through all levels: the finding opens after it began and names it first."""
    findings: list[dict[str, Any]] = []

    def hear(result: Result) -> None:
        if result.topic == FINDINGS:
            findings.append(json.loads(result.value))

    loop = InProcessLoop(scenario(change, pool, load), on_result=hear)
    begun = loop.log_s + AT_S
    loop.run(AT_S + FOR_S + 10)
    said = [body for body in findings if body["finding"] == "latency"]
    assert said, "nothing was said"
    assert said[0]["at_s"] > begun
    assert len({body["since_s"] for body in said}) == 1
    assert said[0]["evidence"]["causes"][0] == cause, said[0]["text"]
    assert words in said[0]["text"]
