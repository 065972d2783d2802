"""Distributions: the same windows whatever the order, quantiles that hold what they say they hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.node.histograms import Grown, quantile
from schemas.log import LogRecord
from schemas.signals import ENGINE_WINDOWS
from tests.models.law import log, run, tick
from tests.models.node.logs import T0, final, fold, histogram, inventory, replica

BOUNDS = (0.1, 0.5, 1.0, 5.0)
Row = dict[str, Any]


def bins(values: list[float], bounds: tuple[float, ...] = BOUNDS) -> list[float]:
    """Cumulative counts of observations, as an engine gives them."""
    counts = [sum(value <= bound for value in values) for bound in bounds]
    return [x for pair in zip(bounds, counts, strict=True) for x in pair] + [len(values)]


def row(
    at: float, flat: list[float], metric: str = "ttft_s", name: str = "r1", start: float | None = T0 - 500.0
) -> Row:
    return {"replica": name, "at_s": at, "start_s": start, "metric": metric, "bins": flat}


def closed(records: list[LogRecord], start: int = T0) -> Row:
    sent = [inventory(T0 - 30.0, [replica()]), *records, *(tick(T0 + t) for t in (12, 22, 32))]
    (got,) = final(run(fold(), log(*sorted(sent, key=lambda r: r.at_ms))), ENGINE_WINDOWS)[("chat", start)]
    return got


def told(*rows: Row) -> list[LogRecord]:
    return [histogram(item["at_s"], [item]) for item in rows]


def test_growth_per_bucket() -> None:
    """A window holds what each bucket grew by in it, a reading's growth spread evenly over the time since the last."""
    got = closed(
        told(row(T0 - 5.0, bins([])), row(T0 + 5.0, bins([0.05] * 4 + [0.3] * 4)), row(T0 + 9.0, bins([0.05] * 14)))
    )
    # half of the first eight; the second reading has fewer of some buckets than before: the engine has begun anew
    assert got["ttft_s_bins"] == pytest.approx([0.1, 2 + 14, 0.5, 4 + 14, 1.0, 4 + 14, 5.0, 4 + 14, 4 + 14])


def test_a_reset_is_one_of_all_buckets() -> None:
    """Where one count fell all have begun anew, also those that show more than before."""
    got = closed(told(row(T0 + 1.0, bins([0.05] * 9)), row(T0 + 5.0, bins([0.3] * 10))))
    assert got["ttft_s_bins"] == [0.1, 0, 0.5, 10, 1.0, 10, 5.0, 10, 10]


def test_a_restart_counts_from_its_start() -> None:
    """Another start of the process: what it shows has all grown since then."""
    late = row(T0 + 18.0, bins([0.3] * 8), start=T0 + 14.0)
    records = told(row(T0 + 2.0, bins([0.05] * 3)), late)
    assert closed(records)["ttft_s_bins"] is None
    assert closed(records, T0 + 10)["ttft_s_bins"][-1] == 8


def test_young_engine_counts_from_its_start() -> None:
    """The first reading of an engine that has just begun is its growth, for time counters and buckets alike."""
    assert closed(told(row(T0 + 5.0, bins([0.3] * 6), start=T0 + 2.0)))["ttft_s_bins"][-1] == 6
    assert closed(told(row(T0 + 5.0, bins([0.3] * 6))))["ttft_s_bins"] is None


def test_other_bounds_are_another_series() -> None:
    """Counts of other buckets are never subtracted from each other."""
    other = (0.2, 2.0)
    rows = [row(T0 + 1.0, bins([])), row(T0 + 2.0, bins([0.3])), row(T0 + 4.0, bins([0.3] * 50, other))]
    got = closed(told(*rows, row(T0 + 9.0, bins([0.3] * 57, other))))
    assert got["ttft_s_bins"] == [0.2, 0, 2.0, 7, 7]


def test_inter_token_times_stand_in() -> None:
    """Time per output token is what the engine gives for it, else the time between tokens."""
    itl = [row(T0 + t, bins([0.3] * n), "itl_s") for t, n in ((1.0, 0), (9.0, 5))]
    tpot = [row(T0 + t, bins([0.05] * n), "tpot_s") for t, n in ((1.0, 0), (9.0, 3))]
    assert closed(told(*itl))["tpot_s_bins"][-1] == 5
    both = closed(told(*itl, *tpot))
    assert (both["tpot_s_bins"][-1], both["tpot_s_p50_high"], both["ttft_s_bins"]) == (3, 0.1, None)


def test_other_distributions_are_not_kept() -> None:
    """What no window carries is not remembered."""
    one = fold()
    run(one, log(*told(row(T0 + 1.0, bins([0.3]), "e2e_s"), row(T0 + 1.0, bins([0.3])))))
    assert one.metrics()["histogram_samples"] == 1


def test_nothing_observed_has_no_quantile() -> None:
    """No observation is a known zero, and no quantile is known of it."""
    got = closed(told(*(row(T0 + t, bins([0.3] * 4)) for t in (1.0, 9.0))))
    assert (got["ttft_s_bins"][-1], got["ttft_s_p50"], got["ttft_s_p50_low"]) == (0, None, None)


def test_beyond_the_last_bound() -> None:
    """A quantile beyond the last bound is that bound at least, and nobody knows more."""
    got = closed(told(row(T0 + 1.0, bins([])), row(T0 + 9.0, bins([0.3, 9.0]))))
    assert (got["ttft_s_p99"], got["ttft_s_p99_low"], got["ttft_s_p99_high"]) == (5.0, 5.0, None)


def test_without_bounds_no_quantile_is_known() -> None:
    """A distribution of nothing but its count says how many there were, and not that they took no time."""
    got = closed(told(row(T0 + 1.0, [0.0]), row(T0 + 9.0, [5.0])))
    assert got["ttft_s_bins"] == [pytest.approx(5.0)]
    assert [got[f"ttft_s_p99{end}"] for end in ("", "_low", "_high")] == [None] * 3


seconds = st.floats(0.0, 12.0, allow_nan=False)


@given(st.lists(seconds, min_size=1, max_size=60), st.lists(st.floats(0.01, 10.0), min_size=1, max_size=8, unique=True))
def test_quantile_and_truth_lie_in_the_bucket(values: list[float], bounds: list[float]) -> None:
    """The true quantile of what was observed lies within the bounds given, and so does the value given."""
    edges = tuple(sorted(bounds))
    flat = np.array(bins(values, edges))
    for q in (0.5, 0.99):
        got, low, high = quantile(Grown(flat[:-1:2], np.append(flat[1::2], flat[-1])), q)
        true = sorted(values)[math.ceil(q * len(values)) - 1]
        assert low <= got
        assert low < true or true == 0.0
        assert math.isnan(high) or (got <= high and true <= high)
        assert math.isnan(high) == (true > edges[-1])


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, 79), st.integers(0, 2), st.integers(0, 60)), max_size=14, unique_by=lambda x: x[:2]
    ),
    st.randoms(use_true_random=False),
)
def test_any_order_and_any_split_give_the_same(drawn: list[tuple[int, int, int]], random: Any) -> None:
    """Late, repeated, out of order, one row a record or many: the final windows are those of the readings in order."""
    rows = [row(T0 + t / 4, bins([0.3] * n), name=f"r{which}", start=None) for t, which, n in sorted(drawn)]
    held = inventory(T0 - 30.0, [replica(f"r{i}") for i in range(3)])
    ends = [tick(T0 + t) for t in (42, 52, 62)]
    calm = run(fold(), log(held, *told(*rows), *ends))
    sent = rows + [item for item in rows if random.random() < 0.4]
    random.shuffle(sent)
    wild, now = [held, tick(T0 + 21)], T0 + 22.0
    while sent:
        size = random.randint(1, 4)
        wild.append(histogram(now, sent[:size]))
        sent, now = sent[size:], now + random.choice([0.0, 0.5])
    got, wanted = (final(run(fold(), log(*wild, *ends)), ENGINE_WINDOWS), final(calm, ENGINE_WINDOWS))
    for key in [("chat", T0), ("chat", T0 + 10)]:
        for a, b in zip(got[key], wanted[key], strict=True):
            assert a == b


def test_layouts_and_readings_are_bounded() -> None:
    """Bucket bounds too many, and readings too many, are refused and counted; what was there goes on."""
    one = fold()
    one.limits = one.limits.model_copy(update={"histogram_layouts_max": 1})
    run(one, log(*told(row(T0 + 1.0, bins([0.3])), row(T0 + 2.0, bins([0.3], (7.0,))), row(T0 + 3.0, bins([0.3] * 2)))))
    assert (one.counters["overflow_histograms_total"], one.histograms.size) == (1, 2)
    one.limits = one.limits.model_copy(update={"histogram_samples_max": 2})
    run(one, [histogram(T0 + 4.0, [row(T0 + 4.0, bins([0.3] * 3))])._replace(offset=9)])
    assert (one.counters["overflow_samples_total"], one.histograms.size) == (1, 2)


def test_readings_are_forgotten() -> None:
    """Long after an engine fell silent nothing of it is held."""
    one = fold()
    run(one, log(*told(row(T0 + 1.0, bins([0.3]))), *(tick(T0 + t) for t in range(2, 200, 6))))
    assert one.histograms.stores == {}
