"""The whole loop in one process on a recorded trace: what it costs, what it keeps, how fast it acts.

    python -m tests.bench.closed_loop TRACE.csv [--scale 16] [--until 4000]

Prints one JSON object: SLO attainment, cost and cost at the static peak per pool, decisions by kind and state, seconds
of log time from load step to dispatched scale-up, CPU per level and log second. About 6 min on an idle core for an hour
at scale 16.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from typing import Any

import numpy as np

from schemas.log import Fold, Result
from simulator.inprocess import InProcessLoop, default_fold
from simulator.scenario import load_scenario


def run(path: str, scale: float, until_s: float) -> dict[str, Any]:
    """One run of the built-in trace scenario."""
    cpu_s: dict[str, float] = defaultdict(float)
    waits: dict[str, float] = {}

    def timed(level: str, topic: str, partition: int, partitions: dict[str, int]) -> Fold:
        fold = default_fold(level, topic, partition, partitions)
        inner = fold.apply

        def apply(records: Any) -> list[Result]:
            start = time.perf_counter()
            out = inner(records)
            cpu_s[level] += time.perf_counter() - start
            return out

        fold.apply = apply  # type: ignore[method-assign]
        return fold

    def seen(result: Result) -> None:
        if result.topic != "decisions":
            return
        decision = json.loads(result.value)
        proposal = decision["proposal"]
        grows = proposal["decision_kind"] == "scale" and proposal["action"]["replicas"] > proposal["replicas_from"]
        if decision["state"] == "dispatched" and grows:
            waits.setdefault(decision["id"], result.at_ms / 1000 - proposal["trigger_s"])

    loop = InProcessLoop(load_scenario("trace").for_trace(path, scale), make_fold=timed, on_result=seen)
    loop.run(until_s)
    report = loop.report()
    values = list(waits.values()) or [float("nan")]
    report["cost_over_static_peak"] = report["cost_usd"] / report["cost_usd_static_peak"]
    report["step_to_action_s"] = {f"p{q}": float(np.percentile(values, q)) for q in (50, 99, 100)}
    report["cpu_ms_per_log_s"] = {level: 1000 * s / loop.fleet.now_s for level, s in cpu_s.items()}
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--scale", type=float, default=16.0)
    parser.add_argument("--until", type=float, default=4000.0)
    args = parser.parse_args()
    print(json.dumps(run(args.trace, args.scale, args.until), default=str))
