"""Latencies from engines' own buckets: pools that no gateway reports are explained too."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.pool.latency_bins import BEYOND, Bins
from models.pool.windows import DETAIL
from models.sketches import Histogram
from schemas.log import LogRecord
from schemas.signals import ENGINE_WINDOWS, WindowName
from tests.models.law import tick
from tests.models.pool.signals import T0, engine_window, pool_config, pool_fold

BOUNDS = np.array([0.1, 0.25, 0.5, 1.0, 2.5, 5.0])


def bins(values: np.ndarray) -> list[float]:
    """Values as an engine reports them: bound, cumulative count, ..., count of all."""
    cumulative = (values[:, None] <= BOUNDS).sum(axis=0)
    flat = np.column_stack([BOUNDS, cumulative]).ravel().tolist()
    return [*flat, float(len(values))]


def taken(rows: list[list[float] | None], version: int = 1, start_s: int = T0, into: Bins | None = None) -> Bins:
    """One window of replicas with these TTFT buckets."""
    record = engine_window(
        start_s + 12, start_s, version, [{"replica": f"r{i}", "ttft_s_bins": row} for i, row in enumerate(rows)]
    )
    batch = ENGINE_WINDOWS.decode(record.value, record.content_type)
    held = into or Bins()
    held.take(WindowName.of(batch.meta), batch)
    return held


@given(values=st.lists(st.floats(0.01, 20), min_size=1, max_size=80), q=st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_lies_in_its_bucket(values: list[float], q: float) -> None:
    """None is lost, and a quantile is at most a bucket off: an observation is somewhere in the one that counted it."""
    array = np.array(values)
    held = taken([bins(array), None, bins(array)])
    histogram = Histogram.from_pairs(held.held[T0]["node.samples/0"][1])
    assert histogram.count == 2 * len(values)
    exact = np.sort(np.repeat(array, 2))[int(q * (2 * len(values) - 1))]
    place = int(np.searchsorted(BOUNDS, exact))
    edges = np.concatenate(([BOUNDS[0] / 2], BOUNDS, [BEYOND**2 * BOUNDS[-1]]))
    got = histogram.quantile(q)
    assert got is not None
    assert 0.98 * edges[place] <= got <= 1.02 * edges[place + 1]


def test_the_greatest_version_stays_and_old_windows_go() -> None:
    """Whatever the order in which they come."""
    few, many = bins(np.array([0.3])), bins(np.array([0.3] * 5))
    held = taken([few], version=2, into=taken([many], version=7))
    assert sum(held.held[T0]["node.samples/0"][1][1::2]) == 5
    for k in range(1, 2 * DETAIL):
        taken([few], start_s=T0 + 10 * k, into=held)
    assert len(held.held) == DETAIL
    taken([few], start_s=T0, into=held)
    assert T0 not in held.held


@pytest.mark.parametrize(("late_s", "said"), [(4.0, True), (0.4, False)])
def test_a_pool_without_a_gateway_is_explained(late_s: float, said: bool) -> None:
    """Engines alone: their p99 breaks the target, the queue is named, and nothing else comes up while it does not."""
    log: list[LogRecord] = [pool_config(T0)]
    for k in range(8):
        start = T0 + 10 * k
        row: dict[str, Any] = {
            "replica": "r0",
            "running_mean": 8.0,
            "waiting_mean": 0.9 * late_s * 4,
            "waiting_last": 0.9 * late_s * 4,
            "ttft_s_sum": 40 * late_s,
            "ttft_count": 40.0,
            "ttft_s_bins": bins(np.full(40, late_s)),
        }
        log.append(engine_window(start + 12.2, start, k + 1, [row]))
    log.append(tick(T0 + 105.0))
    out = pool_fold().apply([record._replace(offset=i) for i, record in enumerate(log)])
    bodies = [json.loads(result.value) for result in out if result.topic == "findings"]
    latency = [body for body in bodies if body["finding"] == "latency"]
    assert bool(latency) == said
    for body in latency:
        assert body["evidence"]["causes"][0] == "queueing"
        assert body["evidence"]["ttft"]["p99_s"] == pytest.approx(4.0, rel=0.4)
