"""Who is slow, what is done about it, and whether it helped."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.pool.health import Health
from models.pool.reroute import change, routing
from models.pool.windows import REPLICA, Row
from schemas.decisions import Expected, Outcome, RerouteAction
from schemas.log import LogRecord
from tests.models.pool.signals import (
    T0,
    config,
    engine_window,
    json_record,
    pool_config,
    pool_fold,
    request_window,
)

D0, D1, P1 = 0.029, 0.00026, 0.0000956  # s, s per request, s per prompt token


def step_row(batch: float, prefill: float, slow: float = 1.0, covered_s: float = 10.0) -> dict[str, Any]:
    """A ready replica's window with so many running and so many prompt tokens a step."""
    step_s = slow * (D0 + D1 * batch + P1 * prefill)
    steps = covered_s / step_s
    return {
        "running_mean": batch, "running_last": batch, "iterations": steps, "prompt_tokens": prefill * steps,
        "covered_s": covered_s, "tpot_s_sum": 20 * step_s, "tpot_count": 20.0, "ttft_s_sum": 20.0, "ttft_count": 20.0,
    }  # fmt: skip


def row(**values: Any) -> Row:
    """A row as the windows keep it."""
    base = {"gpus": 4.0, "allocated_s": 10.0, "covered_s": 10.0, "billed": 1.0, "waiting_mean": 0.0}
    known = {**base, **values}
    return [*(known.get(name) for name in REPLICA), "ready", "H100", "n0"]


def healthy(rng: np.random.Generator, n: int) -> dict[str, Row]:
    """Replicas with different loads, all as fast as the model."""
    return {f"r{i}": row(**step_row(rng.uniform(5, 80), rng.uniform(20, 150))) for i in range(n)}


def test_the_step_time_model_is_learned() -> None:
    """From windows with varied loads the coefficients come out right."""
    health, rng = Health(), np.random.default_rng(1)
    for k in range(60):
        health.look(T0 + 10 * k, healthy(rng, 8), {}, closed=True)
    assert health.coefficients() == pytest.approx((D0, D1, P1), rel=0.05)


def test_a_slow_replica_is_found_in_two_looks_whatever_its_load() -> None:
    """2 x the step time, at a small batch (where it still looks fast), is found; nobody else is."""
    health, rng = Health(), np.random.default_rng(2)
    for k in range(40):
        health.look(T0 + 10 * k, healthy(rng, 8), {}, closed=True)
    rows = healthy(rng, 8)
    rows["r3"] = row(**step_row(3, 20, slow=2.0))
    health.look(T0 + 400, rows, {}, closed=True)
    assert not health.slow
    health.look(T0 + 410, rows, {}, closed=False)
    assert list(health.slow) == ["r3"]
    assert health.slow["r3"] == pytest.approx(2.0, rel=0.1)


def test_it_is_well_only_after_six_windows() -> None:
    """With a tenth of the traffic it stays slow while it is, and is well again six closed windows after it was."""
    health, rng = Health(), np.random.default_rng(3)
    for k in range(40):
        health.look(T0 + 10 * k, healthy(rng, 8), {}, closed=True)
    for k in range(40, 60):
        rows = healthy(rng, 8)
        rows["r3"] = row(**step_row(4, 30, slow=2.5))
        health.look(T0 + 10 * k, rows, {"r3": 0.1} if k > 41 else {}, closed=True)
    assert list(health.slow) == ["r3"]
    for k in range(60, 66):
        assert "r3" in health.slow
        rows = healthy(rng, 8)
        rows["r3"] = row(**step_row(4, 30))
        health.look(T0 + 10 * k, rows, {"r3": 0.1}, closed=True)
    assert not health.slow


def test_long_requests_are_not_a_fault() -> None:
    """A replica with normal steps is not slow, however long its requests took."""
    health, rng = Health(), np.random.default_rng(4)
    for k in range(20):
        rows = healthy(rng, 8)
        rows["r5"] = row(**{**step_row(60, 100), "ttft_s_sum": 200.0, "tpot_s_sum": 20.0})
        health.look(T0 + 10 * k, rows, {}, closed=True)
    assert not health.slow


@pytest.mark.parametrize(("siblings", "found"), [(2, False), (4, True)])
def test_without_step_counts_latencies_are_compared_with_three_siblings(siblings: int, found: bool) -> None:
    """Time per token against the siblings' median; with too few of them nobody is slow."""
    health = Health()
    for k in range(3):
        rows = {f"r{i}": row(tpot_s_sum=1.0, tpot_count=20.0, running_mean=5.0) for i in range(siblings)}
        rows["r0"] = row(tpot_s_sum=2.0, tpot_count=20.0, running_mean=5.0)
        health.look(T0 + 10 * k, rows, {}, closed=True)
    assert bool(health.slow) is found


@given(
    st.integers(1, 20),
    st.dictionaries(st.integers(0, 19), st.floats(1.5, 9)),
    st.lists(st.integers(0, 19), unique=True),
)
def test_never_more_than_a_third(n: int, slow: dict[int, float], failed: list[int]) -> None:
    """Whatever is slow or failed, at most a third of the pool loses weight, failed ones first, the rest is named."""
    names = [f"r{i}" for i in range(n)]
    slow_names = {f"r{i}": v for i, v in slow.items() if i < n}
    failed_names = [f"r{i}" for i in failed if i < n]
    got = routing(names, slow_names, failed_names, {})
    assert len(got.weights) <= n // 3
    assert {*got.weights, *got.left_out} == {*slow_names, *failed_names}
    assert all(got.weights[name] == 0.0 for name in failed_names if name in got.weights)


def test_weights_are_absolute() -> None:
    """All others stay as they are, what becomes 1 again is named, gone replicas are not."""
    names = ["a", "b", "c", "d", "e", "f"]
    got = routing(names, {"b": 2.0}, [], {"a": 0.1, "c": 0.5, "gone": 0.1})
    assert got.weights == {"b": 0.1, "c": 0.5}
    assert change(got.weights, {"a": 0.1, "c": 0.5}, names).weights == {"a": 1.0, "b": 0.1, "c": 0.5}


def loop(
    weights_work: bool, silent: range = range(0)
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Nine replicas, r2 slow from 300 s to 600 s; the reroute is executed and works, or does not. `silent`: seconds in
    which nothing is heard of engines."""
    fold = pool_fold()
    records: list[LogRecord] = [pool_config(T0, reserve=4), config(T0, "price", "H100", {"usd_per_gpu_hour": 3.6})]
    proposals: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    findings: list[dict[str, Any]] = []
    weights: dict[str, float] = {}
    offset, rng = 0, np.random.default_rng(5)
    for second in range(T0 + 1, T0 + 900):
        begin = second // 10 * 10
        age = second - begin
        if age in (2, 6):
            closed = age == 2
            start, covered = (begin - 10, 10.0) if closed else (begin, 6.0)
            rows = []
            for i in range(9):
                name = f"r{i}"
                load = rng.uniform(20, 40) * (weights.get(name, 1.0) if weights_work else 1.0)
                slow = 2.5 if i == 2 and 300 <= start - T0 < 600 else 1.0
                rows.append({"replica": name, "allocated_s": covered, **step_row(load, 50, slow, covered)})
            if second - T0 not in silent:
                records.append(engine_window(second - 1.5, start, second, rows, closed=closed))
            if closed:
                row = {"tenant": "acme", "arrivals": 50, "ends": 50, "slo_judged": 50, "slo_good": 50}
                records.append(request_window(second - 1.0, start, second, [row]))
        out = fold.apply([record._replace(offset=offset + i) for i, record in enumerate(records)])
        offset += len(records)
        records = []
        for result in out:
            body = json.loads(result.value)
            if result.type == "fleetloop.decision.proposed.v1" and body["decision_kind"] == "reroute":
                proposals.append(body)
                weights = {k: v for k, v in body["action"]["weights"].items() if v != 1.0}
                records.append(_executed(second, offset, body))
            elif result.type == "fleetloop.decision.verdict.v1":
                verdicts.append(body)
            elif result.topic == "findings" and body["finding"] == "slow_replica":
                findings.append(body)
    return proposals, verdicts, findings


def _executed(second: float, version: int, proposal: dict[str, Any]) -> LogRecord:
    record = Outcome(
        decision_id=proposal["id"],
        pool="chat",
        version=version,
        state="executed",
        at_s=second,
        decision_kind="reroute",
        action=RerouteAction.model_validate(proposal["action"]),
        expected=Expected.model_validate(proposal["expected"]),
        reverts=proposal["reverts"],
    )
    return json_record(second, record)


def test_around_and_back_and_verified() -> None:
    """The slow replica loses its traffic within 25 s, gets it back within 90 s of its recovery, both verified."""
    proposals, verdicts, findings = loop(weights_work=True)
    assert [one["action"]["weights"] for one in proposals] == [{"r2": 0.1}, {"r2": 1.0}]
    around, back = proposals
    assert around["at_s"] - (T0 + 300) <= 25
    assert around["undo"]["weights"] == {"r2": 1.0}
    assert "r2 is 2." in around["reason"]
    assert 60 <= back["at_s"] - (T0 + 600) <= 90
    assert [one["verdict"] for one in verdicts] == ["verified", "verified"]
    assert "% of the requests" in verdicts[0]["text"]
    assert [one["open"] for one in findings if not one["open"] or one["since_s"] == one["at_s"]] == [True, False]


def test_silence_of_exporters_is_no_recovery() -> None:
    """While the slow replica is rerouted around nothing is heard of engines for two minutes: it gets its traffic back
    only when it was seen to be well, as without the silence."""
    proposals, _, _ = loop(weights_work=True, silent=range(380, 500))
    assert [one["action"]["weights"] for one in proposals] == [{"r2": 0.1}, {"r2": 1.0}]
    assert 60 <= proposals[1]["at_s"] - (T0 + 600) <= 90


def test_a_reroute_without_effect_is_reverted_once() -> None:
    """A router that does not obey: regressed, the revert names it, and for ten minutes nothing of the kind follows."""
    proposals, verdicts, _ = loop(weights_work=False)
    assert verdicts[0]["verdict"] == "regressed"
    assert proposals[1]["reverts"] == proposals[0]["id"]
    assert proposals[1]["action"]["weights"] == {"r2": 1.0}
    assert all(one["at_s"] > proposals[1]["at_s"] + 590 for one in proposals[2:])
