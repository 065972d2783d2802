"""Merging: the greatest version of each source, whatever the order; bounded; rates by the second."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.pool.windows import ARRIVALS, DETAIL, ENDS, KEEP_MAX, Windows
from schemas.signals import ENGINE_WINDOWS, REQUEST_WINDOWS, WindowName
from tests.models.pool.signals import T0, engine_window, request_window

Told = tuple[int, int, int, int]
"""Source, window, version, arrivals."""


def take(windows: Windows, start_s: int, version: int, n: int, source: int = 0, closed: bool = True) -> bool:
    """One source says that `n` requests of one tenant came in a window, and that all of them ended."""
    row: dict[str, Any] = {"tenant": "acme", "arrivals": n, "ends": n}
    record = request_window(start_s + 12, start_s, version, [row], source=f"request.traces/{source}", closed=closed)
    batch = REQUEST_WINDOWS.decode(record.value)
    return windows.take_requests(WindowName.of(batch.meta), batch)


told = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 9), st.integers(0, 50)),
    max_size=20,
    unique_by=lambda t: t[:3],
)


@given(told, st.randoms(use_true_random=False))
def test_any_order_and_any_repeats_give_the_same(said: list[Told], random: Any) -> None:
    """Merged sums are those of the greatest version per source and window."""
    windows = Windows()
    shuffled = [*said, *said[: len(said) // 2]]
    random.shuffle(shuffled)
    for source, k, version, n in shuffled:
        take(windows, T0 + 10 * k, version, n, source)
    newest: dict[tuple[int, int], tuple[int, int]] = {}
    for source, k, version, n in said:
        newest[source, k] = max(newest.get((source, k), (0, 0)), (version, n))
    total = windows.totals(T0, T0 + 40)
    assert total[ARRIVALS] == total[ENDS] == sum(n for _, n in newest.values())


@given(told)
def test_state_survives(said: list[Told]) -> None:
    """What is restored from plain values is the same."""
    windows, other = Windows(), Windows()
    for source, k, version, n in said:
        take(windows, T0 + 10 * k, version, n, source)
    other.restore(windows.state())
    assert other.state() == windows.state()


@pytest.mark.parametrize(
    ("until_s", "span_s", "rate"),
    [
        (T0 + 60, 60, 6.0),  # whole windows: 10 + ... + 110 of six windows
        (T0 + 55, 50, 5.0),  # half of the first window, all up to now
        (T0 + 10, 10, 1.0),
        (T0 + 200, 60, 0.0),
    ],
)
def test_rate_of_the_last_seconds(until_s: float, span_s: int, rate: float) -> None:
    """Windows count by their overlap; the open one by what it holds so far."""
    windows = Windows()
    for k, n in enumerate((10, 30, 50, 70, 90, 110)):
        take(windows, T0 + 10 * k, 1, n)
    expected = {6.0: 360 / 60, 5.0: (5 + 30 + 50 + 70 + 90 + 110) / 50, 1.0: 1.0, 0.0: 0.0}[rate]
    assert windows.rate_rps(until_s, span_s) == pytest.approx(expected)


def test_replicas_that_are_gone_are_gone() -> None:
    """The newest window of a source says who is there; a source that fell silent says nothing any more."""
    windows = Windows()
    for k, names in enumerate((["a", "b"], ["b"])):
        record = engine_window(T0 + 10 * k + 12, T0 + 10 * k, k + 1, [{"replica": name} for name in names])
        batch = ENGINE_WINDOWS.decode(record.value)
        windows.take_engines(WindowName.of(batch.meta), batch)
    assert list(windows.replicas(T0 + 25, 30)) == ["b"]
    assert windows.replicas(T0 + 100, 30) == {}


def test_what_nobody_can_revise_is_dropped_once_billed() -> None:
    """Windows older than the grace go, those not billed yet stay; detail is kept for the newest only."""
    windows = Windows()
    for k in range(200):
        take(windows, T0 + 10 * k, k + 1, 1)
        windows.by_start[T0 + 10 * k].emitted = k != 3
        windows.by_start[T0 + 10 * k].dirty = False
    assert windows.drop(T0 + 2010, 900.0) == 0
    starts = sorted(windows.by_start)
    assert starts[0] == T0 + 30
    assert starts[1] >= T0 + 2000 - 900 - 130 - 20
    assert len(windows.hists) == DETAIL
    assert not take(windows, T0, 500, 9)


def test_the_number_of_windows_is_bounded() -> None:
    """Beyond the bound the oldest go before their time, and that is counted."""
    windows = Windows()
    for k in range(KEEP_MAX + 7):
        take(windows, T0 + 10 * k, 1, 1)
    assert windows.drop(T0, 900.0) == 7
    assert len(windows.by_start) == KEEP_MAX
