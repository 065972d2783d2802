"""The law of folds and the bounds of the pool level, and that bad input is refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.config import PoolSpec
from schemas.decisions import Expected, Outcome, ScaleAction
from schemas.log import LogRecord
from tests.models.law import check_bounds, check_law, tick
from tests.models.pool.signals import (
    T0,
    config,
    engine_window,
    gpu_window,
    json_record,
    pool_config,
    pool_fold,
    request_window,
    world,
)
from tests.models.pool.test_verify import World

_COUNTS = st.integers(0, 40)


@st.composite
def logs(draw: st.DrawFn) -> list[LogRecord]:
    """Records of two pools in any order, with repeats, old versions, gaps, outcomes and garbage."""
    now = float(T0)
    records = [pool_config(now), config(now, "price", "H100", {"usd_per_gpu_hour": 2.0})]
    for _ in range(draw(st.integers(5, 60))):
        now += draw(st.sampled_from([0.0, 0.2, 0.9, 1.0, 5.0, 10.0, 70.0, 400.0]))
        start = int(now) // 10 * 10 - 10 * draw(st.integers(0, 3))
        version = draw(st.integers(1, 50))
        pool = draw(st.sampled_from(["chat", "code"]))
        what = draw(st.sampled_from("rrreeegotcx"))
        if what == "r":
            n = draw(_COUNTS)
            row = {
                "tenant": "acme",
                "arrivals": n,
                "ends": n,
                "slo_judged": n,
                "slo_good": n // 2,
                "input_tokens": 10.0 * n,
                "output_tokens": 5.0 * n,
                "ttft": [0.5] * n,
                "tpot": [0.05] * n,
            }
            source = f"request.traces/{draw(st.integers(0, 1))}"
            records.append(request_window(now, start, version, [row], pool, source, closed=draw(st.booleans())))
        elif what == "e":
            tpot = draw(st.sampled_from([None, 5.0, 20.0]))
            rows: list[dict[str, Any]] = [
                {
                    "replica": f"r{i}",
                    "running_last": float(draw(_COUNTS)),
                    "iterations": 100.0,
                    "tpot_count": 10.0,
                    "tpot_s_sum": 1.0,
                }
                for i in range(draw(st.integers(1, 4)))
            ]
            rows[0]["tpot_s_sum"] = tpot
            records.append(engine_window(now, start, version, rows, pool, closed=draw(st.booleans())))
        elif what == "g":
            records.append(gpu_window(now, start, version, [50.0, None], pool, lost=draw(st.integers(0, 1))))
        elif what == "o":
            records.append(
                outcome(now, version, draw(st.sampled_from(["pending", "executed", "blocked", "failed"])), pool)
            )
        elif what == "t":
            records.append(tick(now))
        elif what == "c":
            records.append(pool_config(now, pool, revision=draw(st.integers(1, 4)), capacity_rps=2.0))
        else:
            records.append(LogRecord(0, round(now * 1000), "fleetloop.request.windows.v1", "", b"garbage"))
    return [record._replace(offset=offset) for offset, record in enumerate(records)]


def outcome(second: float, version: int, state: str, pool: str = "chat", id: str = "0123456789abcdef") -> LogRecord:
    """What became of a decision to have 7 replicas."""
    return json_record(
        second,
        Outcome(
            decision_id=id,
            pool=pool,
            version=version,
            state=state,
            at_s=second,
            decision_kind="scale",  # type: ignore[arg-type]
            action=ScaleAction(replicas=7),
            expected=Expected(slo_attainment_low=0.9),
        ),
    )


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_law_of_folds(data: Any) -> None:
    """Any split of any log, with load(dump()) anywhere, gives the same results and the same dump."""
    check_law(pool_fold, data.draw(logs()), data)


@given(data=st.data())
@settings(max_examples=1, deadline=None)
def test_law_of_folds_on_a_working_pool(data: Any) -> None:
    """The same on a log long enough for choices, forecasts and proposals."""
    check_law(pool_fold, world([3.0] * 66 + [9.0] * 4, replicas=5), data)


def test_bounds() -> None:
    """Every container of the fold has a bound, a setting and an overflow metric."""
    fold = pool_fold()
    fold.apply(world([3.0] * 3))
    check_bounds(fold)


def test_too_many_pools() -> None:
    """A pool beyond the bound is refused and counted; the others go on."""
    fold = pool_fold()
    records = [config(T0, "limits", "limits", {"pools_max": 1}), *world([1.0])[2:]]
    records.append(request_window(T0 + 14, T0, 1, [{"tenant": "a", "ends": 1}], pool="second"))
    out = fold.apply(records)
    letters = [json.loads(result.value) for result in out if result.topic == "dead.letters"]
    assert [letter["reason"] for letter in letters] == ["overflow"]
    assert fold.metrics()["pools_overflow_total"] == 1
    assert list(fold.pools) == ["chat"]


def test_a_reload_knows_the_same_configuration() -> None:
    """Policies and prices follow from the objects alone: bounds that were lowered, objects deleted or said again."""
    fold, price = pool_fold(), {"usd_per_gpu_hour": 1.0}
    records = [
        config(T0, "price", "A", price),
        config(T0, "price", "B", price),
        pool_config(T0, "chat"),
        pool_config(T0, "code"),
        config(T0, "limits", "limits", {"pools_max": 1}),
        config(T0, "price", "C", price),
        config(T0, "price", "B", price, revision=2),
        pool_config(T0, "code", revision=2),
    ]
    fold.apply([record._replace(offset=i) for i, record in enumerate(records)])
    again = pool_fold()
    again.load(fold.dump())
    assert (again.prices, again.specs) == (fold.prices, fold.specs)
    assert sorted(fold.prices) == ["A", "B", "C"]


def _extremes() -> st.SearchStrategy[dict[str, Any]]:
    """Policies of which every number is at one of its bounds, as the schema says."""
    fields = {}
    for name, schema in PoolSpec.model_json_schema()["properties"].items():
        numbers = [one for one in schema.get("anyOf", [schema]) if one.get("type") in ("number", "integer")]
        if numbers and name not in ("gpus_per_replica", "slo_target"):
            low = numbers[0].get("minimum", 1e-300)
            fields[name] = st.sampled_from([low, numbers[0].get("maximum", 10**6 if isinstance(low, int) else 1e300)])
    return st.fixed_dictionaries({}, optional=fields)


@given(spec=_extremes(), usd_per_gpu_hour=st.sampled_from([0.0, 1e6]))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_policy_that_is_accepted_breaks_the_fold(spec: dict[str, Any], usd_per_gpu_hour: float) -> None:
    """Whatever bounds a policy goes to, in proposals, bills and forecasts all numbers stay numbers."""
    world = World(5, **spec)
    world.apply([config(T0, "price", "H100", {"usd_per_gpu_hour": usd_per_gpu_hour}, revision=2)])
    world.run(3.0, 3)
    world.run(500.0, 3)
    world.run(1.0, 3)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"source": "elsewhere/0"}, "source"),
        ({"source": "request.traces/x"}, "source"),
        ({"start_s": T0 + 3}, "start_s"),
        ({"start_s": T0 + 1000}, "start_s"),
        ({"until_s": T0 + 1000.0}, "until_s"),
    ],
)
def test_a_window_that_cannot_be_named_is_refused(change: dict[str, Any], field: str) -> None:
    """Metadata that names no window of ours goes to dead.letters with the field at fault."""
    named: dict[str, Any] = {"start_s": T0, "version": 1, "rows": [{"tenant": "a", "ends": 1}], **change}
    out = pool_fold().apply([request_window(T0 + 5, **named)])
    assert [json.loads(result.value)["field"] for result in out] == [field]


def test_forecasts_are_published_every_minute() -> None:
    """Each minute of log time one row a horizon, scored once its time has come."""
    out = pool_fold().apply(world([3.0] * 50))
    rows = [json.loads(result.value) for result in out if result.topic == "load.forecasts"]
    by_horizon: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        by_horizon.setdefault(row["horizon_s"], []).append(row)
    assert sorted(by_horizon) == [60.0, 120.0]  # its cold start takes 60 s
    assert all(7 <= len(said) <= 8 for said in by_horizon.values())
    assert by_horizon[60.0][-1]["matured"] > 0
