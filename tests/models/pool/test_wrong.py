"""Findings: each opens once, says what it costs, closes once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from models.pool.findings import OPEN_MAX, UPDATE_S, Findings, Found
from schemas.log import LogRecord
from tests.models.law import tick
from tests.models.pool.signals import (
    T0,
    config,
    engine_window,
    gpu_window,
    pool_config,
    pool_fold,
    request_window,
)

ROW = {"tenant": "acme", "arrivals": 30, "ends": 30, "slo_judged": 30, "slo_good": 30}


def found(
    engine: dict[str, Any], request: dict[str, Any], priced: bool = True, lost: int = 0
) -> dict[str, dict[str, Any]]:
    """Findings still open after ten windows of two replicas like `engine`, with `request` in each."""
    records: list[LogRecord] = [pool_config(T0)]
    if priced:
        records.append(config(T0, "price", "H100", {"usd_per_gpu_hour": 3.6}))
    for k in range(10):
        start = T0 + 10 * k
        rows = [{"replica": f"r{i}", **engine} for i in range(2)]
        if k == 3:
            rows = [{"replica": f"r{i}", "running_mean": 40.0} for i in range(2)]
        records += [
            engine_window(start + 10.2, start, k + 1, rows),
            request_window(start + 10.4, start, k + 1, [{**ROW, **request}]),
            gpu_window(start + 10.6, start, k + 1, [50.0, 60.0], lost=lost),
        ]
    records += [tick(T0 + 101.0 + k) for k in range(12)]
    out = pool_fold().apply([record._replace(offset=i) for i, record in enumerate(records)])
    rows_by_name: dict[str, dict[str, Any]] = {}
    for result in out:
        if result.topic == "findings":
            body = json.loads(result.value)
            rows_by_name[body["finding"]] = body
    return {name: body for name, body in rows_by_name.items() if body["open"]}


@pytest.mark.parametrize(
    ("engine", "request_row", "more", "kind", "usd_per_hour"),
    [
        ({"running_mean": 0.0, "waiting_mean": 0.0}, {}, {}, "idle_allocated", 14.4),
        ({}, {"slo_good": 20}, {}, "slo_at_risk", None),
        ({"state": "failed"}, {}, {}, "replica_failed", 14.4),
        ({"running_mean": 5.0, "waiting_mean": 9.0, "kv_usage_ratio_mean": 0.97}, {}, {}, "batching_collapse", 25.2),
        ({}, {}, {"priced": False}, "price_unknown", None),
        ({}, {}, {"lost": 1}, "gpu_lost", 3.6),
    ],
)
def test_each_kind(
    engine: dict[str, Any], request_row: dict[str, Any], more: dict[str, Any], kind: str, usd_per_hour: float | None
) -> None:
    """What is wrong is found, alone, with its price where that is known."""
    got = found(engine, request_row, **more)
    assert list(got) == [kind]
    assert got[kind]["usd_per_hour"] == (None if usd_per_hour is None else pytest.approx(usd_per_hour, rel=0.01))


def test_nothing_is_wrong() -> None:
    """A healthy pool has no finding."""
    assert found({}, {}) == {}


def test_opened_once_updated_at_most_once_a_minute_closed_once() -> None:
    """However often it is looked at."""
    findings = Findings()
    said = []
    for second in range(200):
        current = {"r0": Found(f"text {second}", 1.0)} if second < 150 else {}
        said += findings.update("chat", "slow_replica", current, T0 + second, second)[0]
    assert [(one.open, one.at_s - T0) for one in said] == [
        (True, 0),
        (True, UPDATE_S),
        (True, 2 * UPDATE_S),
        (False, 150),
    ]
    assert all(one.since_s == T0 for one in said)


def test_open_findings_are_bounded() -> None:
    """Beyond the bound they are counted, not kept."""
    findings = Findings()
    current = {f"r{i}": Found("x", 1.0) for i in range(OPEN_MAX + 5)}
    said, over = findings.update("chat", "slow_replica", current, T0, 1)
    assert (len(said), over) == (OPEN_MAX, 5)
