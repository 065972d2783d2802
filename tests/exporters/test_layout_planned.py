"""Rows from values: sums, bounds, sentinels, buckets, and several engines as one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.adapters.base import Buckets, Op, Reduce, RowPlan
from exporters.planned import BOUNDS_MAX, Planned, Read, together

NAN = math.nan


def _row(plan: RowPlan, values: list[float], histograms: bool = False) -> tuple[Read, list[str]]:
    bad: list[str] = []
    return Planned(plan, {i: i for i in range(len(values))}).read(values, histograms, bad), bad


@pytest.mark.parametrize(
    ("op", "values", "expected"),
    [
        ("sum", [1, 2, 3], 6),
        ("sum", [1, NAN, 3], None),
        ("mean", [1, 2, 6], 3),
        ("mean", [1, NAN], None),
        ("max", [1, NAN, 3], 3),
        ("min", [NAN, 2, 3], 2),
        ("first", [NAN, 2, 3], 2),
        ("first", [NAN, NAN], None),
        ("sum", [1, 1e18], None),
        ("max", [1, 1e18], 1),
        ("sum", [-1, -2], None),
        ("sum", [math.inf, 1], None),
    ],
)
def test_reductions(op: Op, values: list[float], expected: float | None) -> None:
    """What is unknown, infinite or a sentinel spoils a sum or mean, and is passed over by the others."""
    plan = RowPlan({"running": Reduce(tuple(range(len(values))), op, limit=1e15)})
    read, bad = _row(plan, values)
    assert read.values == {"running": expected}
    assert bad == ([] if expected is not None else ["running"])


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("running", 5, 0.005),
        ("running", -0.001, None),
        ("running", 1e15, None),
        ("running", NAN, None),
        ("running", -math.inf, None),
        ("kv_usage_ratio", 1000, 1),
        ("kv_usage_ratio", 1100, None),
        ("start_s", 2e14, None),
        ("_input", -7, -0.007),
    ],
)
def test_one_series(column: str, value: float, expected: float | None) -> None:
    """Scaled, then within the column's bounds (time is in s, not ms), below the limit before scaling."""
    plan = RowPlan(
        {column: Reduce((0,), scale=0.001, limit=1e15)}, finish=lambda values: {"busy_s": values.get("_input")}
    )
    read, bad = _row(plan, [value])
    if column == "_input":
        assert read.values == {"busy_s": None}
        assert bad == ["busy_s"]
    else:
        assert read.values[column] == (None if expected is None else pytest.approx(expected))
        assert bad == ([column] if expected is None else [])


def test_finish_has_inputs_and_what_labels_say() -> None:
    """Inputs are not published; a column without series is absent."""
    plan = RowPlan(
        {"_blocks": Reduce((0,)), "waiting": Reduce(())},
        fixed={"_size": 16.0, "running_max": 8.0},
        finish=lambda values: {"kv_capacity_tokens": (values["_blocks"] or 0) * (values["_size"] or 0)},
    )
    read, bad = _row(plan, [100])
    assert read.values == {"running_max": 8.0, "kv_capacity_tokens": 1600.0}
    assert bad == []


def _histogram(counts: list[float]) -> tuple[Read, list[str]]:
    bounds = tuple((float(i), (i,)) for i in range(len(counts) - 1))
    plan = RowPlan({}, histograms={"ttft_s": Buckets(bounds, (len(counts) - 1,))})
    return _row(plan, counts, True)


def test_buckets() -> None:
    """Cumulative counts with their bounds and the count of all; what is not cumulative is left out and counted."""
    assert _histogram([1, 2, 4])[0].bins == {"ttft_s": [0, 1, 1, 2, 4]}
    for wrong in ([2, 1, 4], [1, 5, 4], [1, NAN, 4], [-1, 2, 4], [1, 2, math.inf]):
        read, bad = _histogram(wrong)
        assert read.bins == {}
        assert bad == ["ttft_s"]


def test_more_buckets_than_the_log_takes_are_thinned() -> None:
    """Every second one, with its true cumulative count, until they fit."""
    (bins,) = _histogram([float(i) for i in range(1101)])[0].bins.values()
    assert len(bins) <= 2 * BOUNDS_MAX + 1
    assert all(bound == count for bound, count in zip(bins[:-1:2], bins[1::2], strict=True))
    assert bins[-1] == 1100
    assert bins[-3] >= 1093


def _read(key: str, ttft: list[float] | None = None, **values: float | None) -> Read:
    return Read(RowPlan({}, key=key, texts={"model": "m"}), dict(values), {} if ttft is None else {"ttft_s": ttft})


def test_together_sums_and_knows_what_it_does_not_know() -> None:
    """Counters add, ratios are a mean, the start is the first; with an unknown part the whole is unknown."""
    a = _read("0", [1, 1, 3], running=2, kv_usage_ratio=0.2, start_s=100, waiting=None, requests=1)
    b = _read("1", [1, 2, 4], running=3, kv_usage_ratio=0.6, start_s=90, waiting=1)
    both = together([a, b])
    assert both.values == {
        "running": 5,
        "kv_usage_ratio": pytest.approx(0.4),
        "start_s": 90,
        "waiting": None,
        "requests": None,
    }
    assert both.bins == {"ttft_s": [1, 3, 7]}
    assert (both.plan.key, both.plan.texts) == ("", {"model": "m"})
    other = together([a, _read("1", [2, 2, 4])])
    assert other.bins == {}
    assert together([a, _read("1")]).bins == {}
    alone = together([a])
    assert (alone.values, alone.bins, alone.plan.key) == (a.values, a.bins, "")


@given(st.lists(st.floats(), min_size=1, max_size=5), st.sampled_from(["sum", "mean", "max", "min", "first"]))
def test_no_value_leaves_the_bounds_of_its_column(values: list[float], op: Op) -> None:
    """Whatever an engine says, a column is None or one that the log takes."""
    read, bad = _row(RowPlan({"kv_usage_ratio": Reduce(tuple(range(len(values))), op)}), values)
    found = read.values["kv_usage_ratio"]
    assert (found is None) == (bad == ["kv_usage_ratio"])
    assert found is None or 0 <= found <= 1.0001
