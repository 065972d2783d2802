"""The whole loop without Kafka: the folds of all levels over lists, deciding on a simulated fleet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from schemas.log import Result
from schemas.signals import REQUEST_WINDOWS, WindowName
from schemas.topics import DEAD_LETTERS
from simulator.inprocess import InProcessLoop
from simulator.scenario import Scenario

Make = Callable[..., Scenario]


def overloaded(data: dict[str, Any]) -> None:
    """One replica where three are needed, and a short cold start."""
    data["pools"][0].update(replicas=1, cold_start={"mean_s": 20})
    data["load"][0].update(rate_rps=8, waves=[])


def run(scenario: Scenario, until_s: float) -> tuple[InProcessLoop, list[Result]]:
    results: list[Result] = []
    loop = InProcessLoop(scenario, on_result=results.append)
    loop.run(until_s)
    return loop, results


def test_the_loop_sees_every_request_and_scales(scenario: Make) -> None:
    """Windows hold every arrival and end once; an overloaded pool is scaled by a decision that was executed."""
    loop, results = run(scenario(overloaded), 90)
    windows: dict[tuple[Any, ...], tuple[int, dict[str, int]]] = {}
    for result in results:
        if result.type != REQUEST_WINDOWS.type:
            continue
        batch = REQUEST_WINDOWS.decode(result.value)
        name = WindowName.of(batch.meta)
        key = (name.pool, name.source, name.start_s)
        sums = {c: int(batch.numbers[c].sum()) for c in ("arrivals", "ends")}
        if key not in windows or windows[key][0] <= name.version:
            windows[key] = (name.version, sums)
    report = loop.report()
    seen = {c: sum(sums[c] for _, sums in windows.values()) for c in ("arrivals", "ends")}
    # The last second may not be published yet.
    assert report["arrivals"] - 40 <= seen["arrivals"] <= report["arrivals"]
    assert report["ended"] - 40 <= seen["ends"] <= report["ended"]
    assert not [r for r in results if r.topic == DEAD_LETTERS]
    states = report["decisions"]["scale"]
    assert states.get("executed", 0) + states.get("verified", 0) >= 1
    assert len(loop.fleet.pools["big"].staying) > 1


def test_the_loop_is_the_same_twice(scenario: Make) -> None:
    """Two runs publish the same records, byte for byte, decisions and their effects included."""
    digests = []
    for _ in range(2):
        _, results = run(scenario(overloaded), 45)
        digest = hashlib.sha256()
        for result in results:
            digest.update(repr(tuple(result)).encode())
        digests.append((len(results), digest.hexdigest()))
    assert digests[0] == digests[1]
