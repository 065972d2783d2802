"""Token buckets of clients: the average holds, a burst is possible, nobody pays for another, the table is bounded."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from exporters.intake_limits import BURST_S, Limits


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 500)), min_size=1, max_size=60))
def test_nobody_sends_more_than_its_rate(sent: list[tuple[float, int]]) -> None:
    """Over any time at most rate x time, a burst and one body go through; who waits as told may send."""
    limits, now, through, largest = Limits(10.0, 4), 100.0, 0, 1
    for gap, rows in sent:
        now += gap
        wait = limits.wait_s("a", now)
        if wait:
            now += wait
            assert limits.wait_s("a", now) == 0
        limits.spend("a", rows, now)
        through, largest = through + max(1, rows), max(largest, rows)
        assert through <= 10.0 * (now - 100.0) + 10.0 * BURST_S + largest


def test_clients_do_not_pay_for_each_other() -> None:
    """One that has overdrawn waits; the other sends."""
    limits = Limits(10.0, 4)
    limits.spend("a", 1000, 0.0)
    assert limits.wait_s("a", 0.0) == 91
    assert limits.wait_s("b", 0.0) == 0


def test_without_a_limit_nothing_is_kept() -> None:
    """0: no limit and no table."""
    limits = Limits(0.0, 4)
    limits.spend("a", 10**9, 0.0)
    assert limits.wait_s("a", 0.0) == 0
    assert limits._buckets == {}


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 20)), max_size=200))
@example([(0, 0), (1, 0), (2, 0), (3, 0), (4, 6), (5, 0), (6, 0), (7, 0), (8, 0)])  # the shared bucket is idle as well
def test_the_table_is_bounded(sent: list[tuple[int, float]]) -> None:
    """However many clients come, their table holds its bound and the shared bucket; idle ones make room."""
    limits, now = Limits(1.0, 3), 0.0
    for client, gap in sent:
        now += gap
        limits.spend(f"client-{client}", 5, now)
        assert len(limits._buckets) <= 4
