"""Where windows lie and when they close."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.windows import WINDOW_S, closed, content_crc, final, overlap, window_start, window_starts

times = st.floats(0, 4e9, allow_nan=False)


@given(times)
def test_every_time_is_in_one_window(at_s: float) -> None:
    """A time lies in the window that begins at its start, and both forms agree."""
    start = window_start(at_s)
    assert start <= at_s < start + WINDOW_S
    assert start % WINDOW_S == 0
    assert window_starts(np.array([at_s])).tolist() == [start]


@pytest.mark.parametrize(
    ("now_s", "is_closed", "is_final"),
    [(109.0, False, False), (111.999, False, False), (112.0, True, False), (169.9, True, False), (170.0, True, True)],
)
def test_life_of_a_window(now_s: float, is_closed: bool, is_final: bool) -> None:
    """[100, 110) with lateness 2 and grace 60 closes at 112 and is final at 170."""
    assert closed(100, now_s, 2.0) is is_closed
    assert final(100, now_s, 60.0) is is_final


@given(times, st.floats(0, 100), st.integers(0, 4 * 10**8))
def test_overlaps_add_up(from_s: float, length_s: float, window: int) -> None:
    """What adjoining windows hold of a span adds up to the span, however the border falls."""
    border = window * 10.0
    span = (np.array([from_s]), np.array([from_s + length_s]))
    left, right = overlap(*span, 0.0, border)[0], overlap(*span, border, 1e12)[0]
    assert left + right == pytest.approx((from_s + length_s) - from_s, abs=1e-6)
    assert left >= 0
    assert right >= 0


def test_content_crc_sees_content_alone() -> None:
    """Equal columns have equal sums; another value, null or name another one."""
    data = {"a": np.array([1.0, np.nan]), "b": ["x", None]}
    assert content_crc(data) == content_crc({"a": np.array([1.0, np.nan]), "b": ["x", None]})
    assert content_crc(data) != content_crc({**data, "b": ["x", "y"]})
    assert content_crc(data) != content_crc({**data, "a": np.array([1.0, 0.0])})
    assert content_crc({"a": [1]}) != content_crc({"b": [1]})
    close, other = np.array([1.0, 1e-12]), np.array([1.0, 2e-12])
    assert content_crc({"a": [close, None]}) != content_crc({"a": [other, None]})
    assert content_crc({"a": [close, None]}) == content_crc({"a": [close.copy(), None]})
