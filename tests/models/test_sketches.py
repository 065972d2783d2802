"""Log-bucket histograms: their relative error, their algebra, their wire form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.sketches import (
    BUCKETS,
    HIGH,
    LOW,
    OVER,
    RELATIVE_ERROR,
    UNDER,
    ZERO,
    Histogram,
    bucket_bounds,
    bucket_of,
    bucket_value,
)

inside = st.floats(LOW * 1.0001, HIGH)
anything = st.one_of(inside, st.just(0.0), st.floats(0, LOW), st.floats(HIGH * 1.03, 1e9), st.just(math.nan))
lists = st.lists(anything, max_size=60)


def array(values: list[float]) -> np.ndarray:
    return np.array(values, np.float64)


@given(st.lists(inside, min_size=1, max_size=200), st.floats(0, 1))
def test_quantile_is_within_one_percent(values: list[float], q: float) -> None:
    """A quantile is within 1 % of the value of its rank, and that value lies within the bounds given."""
    histogram = Histogram.of(array(values))
    true = sorted(values)[int(q * (len(values) - 1))]
    found, bounds = histogram.quantile(q), histogram.quantile_bounds(q)
    assert found is not None
    assert bounds is not None
    assert abs(found - true) <= RELATIVE_ERROR * true * (1 + 1e-9)
    assert bounds[0] < true <= bounds[1]


@given(lists, lists, lists)
def test_merge_is_addition(a: list[float], b: list[float], c: list[float]) -> None:
    """Merging in any order and grouping equals one histogram of all values, and nothing is lost."""
    whole = Histogram.of(array(a + b + c))
    ha, hb, hc = (Histogram.of(array(x)) for x in (a, b, c))
    assert ha.merge(hb).merge(hc) == hc.merge(ha.merge(hb)) == ha.merge(hb, hc) == whole
    assert ha.add(array(b + c)) == whole
    assert whole.count == sum(not math.isnan(x) for x in a + b + c)


@given(lists)
def test_pairs_round_trip(values: list[float]) -> None:
    """Wire pairs give the same histogram back, in whatever order the pairs come."""
    histogram = Histogram.of(array(values))
    pairs = histogram.to_pairs()
    assert pairs.dtype == np.uint32
    assert Histogram.from_pairs(pairs) == histogram
    assert Histogram.from_pairs(pairs.reshape(-1, 2)[::-1].ravel()) == histogram


@given(lists, inside)
def test_count_above_errs_by_its_own_bucket_at_most(values: list[float], limit: float) -> None:
    """`count_above` differs from the truth by less than what lies in the limit's bucket, and is exact at a bound."""
    histogram = Histogram.of(array(values))
    true = sum(v > limit for v in values)
    bucket = int(bucket_of(array([limit]))[0])
    beside = int(histogram.counts[histogram.buckets == bucket].sum())
    assert abs(histogram.count_above(limit) - true) <= beside
    bound = bucket_bounds(bucket)[1]
    assert histogram.count_above(bound) == sum(v > bound for v in values)


def test_ends_of_the_range_have_buckets_of_their_own() -> None:
    """Zeros, values up to LOW and values beyond HIGH are kept apart and never raise."""
    assert bucket_of(array([0.0, LOW / 2, LOW, HIGH * 1.03, 1e300])).tolist() == [ZERO, UNDER, UNDER, OVER, OVER]
    assert bucket_value(ZERO) == 0.0
    assert bucket_value(UNDER) == LOW
    assert bucket_value(OVER) >= HIGH
    assert Histogram.of(array([0.0, 0.0])).quantile(0.99) == 0.0
    assert bucket_bounds(OVER)[1] == math.inf


def test_buckets_adjoin() -> None:
    """Every bucket begins where the one before ends, and its value lies within."""
    for bucket in range(UNDER, OVER):
        low, high = bucket_bounds(bucket)
        assert high == bucket_bounds(bucket + 1)[0]
        assert low < bucket_value(bucket) <= high
        assert bucket_of(array([high])).tolist() == [bucket]


def test_empty_has_no_quantile() -> None:
    """Without values a quantile is unknown, not zero; NaN is no value."""
    assert Histogram.empty().quantile(0.5) is None
    assert Histogram.of(array([math.nan])).quantile_bounds(0.5) is None
    assert Histogram.empty().count_above(1.0) == 0.0


@pytest.mark.parametrize("pairs", [[1], [BUCKETS, 1], [-1, 2]])
def test_foreign_pairs_are_refused(pairs: list[int]) -> None:
    """Pairs of odd length or with a bucket that does not exist raise ValueError."""
    with pytest.raises(ValueError, match="pairs"):
        Histogram.from_pairs(pairs)
