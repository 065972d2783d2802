"""Merging: the greatest version of each source, whatever the order; bounded; rates by the second."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.pool.windows import ARRIVALS, DETAIL, ENDS, GPU_TYPE, KEEP_MAX, NODE, STATE, R, Windows
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


def _say(windows: Windows, start_s: int, rows: list[dict[str, Any]], source: str) -> None:
    record = engine_window(start_s + 12, start_s, 1, rows, source=source)
    batch = ENGINE_WINDOWS.decode(record.value)
    windows.take_engines(WindowName.of(batch.meta), batch)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_a_replica_on_several_nodes_is_one(apart: bool, turned: bool) -> None:
    """Its GPUs and GPU seconds add up, its engine speaks once, whichever node's row comes first and from where."""
    rows: list[dict[str, Any]] = [
        {"replica": "a", "node": "n0", "gpus": 8.0, "allocated_s": 10.0, "running_mean": 4.0, "last_at_s": T0 + 9.0},
        {"replica": "a", "node": "n1", "gpus": 4.0, "allocated_s": 4.0, "covered_s": 0.0, "running_mean": None},
    ]
    rows[0] |= {"throttled_s": 1.0, "billed": 1}
    rows[1] |= {"throttled_s": 3.0, "billed": 1, "last_at_s": None, "kv_usage_ratio_mean": None}
    if turned:
        rows.reverse()
    windows = Windows()
    if apart:
        for i, row in enumerate(rows):
            _say(windows, T0, [row], f"node.samples/{i}")
    else:
        _say(windows, T0, rows, "node.samples/0")
    for found in (windows.rows_of(T0), windows.replicas(T0 + 12, 30)):
        (row,) = found.values()
        assert (row[R["gpus"]], row[R["gpus"]] * row[R["allocated_s"]]) == (12.0, pytest.approx(96.0))
        assert (row[R["running_mean"]], row[R["throttled_s"]], row[NODE]) == (4.0, 3.0, "n0")
    held = [usage["H100"][0] for _, usage in windows.by_start[T0].engines.values()]
    assert sum(held) == pytest.approx(96.0)


def test_inventory_here_and_scraper_there_are_one_replica() -> None:
    """What a scraper says of a replica whose node it does not know joins the row that the inventory gives it."""
    named = {"replica": "a", "node": "n0", "gpus": 4.0, "allocated_s": 10.0, "covered_s": 0.0, "last_at_s": None}
    scraped = {"replica": "a", "node": "-", "state": "unknown", "gpus": 0.0, "allocated_s": 0.0, "gpu_type": None}
    windows = Windows()
    _say(windows, T0, [named | {"running_mean": None}], "node.samples/0")
    _say(windows, T0, [scraped | {"running_mean": 3.0}], "node.samples/1")
    (row,) = windows.rows_of(T0).values()
    assert (row[R["gpus"]], row[R["allocated_s"]], row[R["running_mean"]]) == (4.0, 10.0, 3.0)
    assert (row[STATE], row[NODE], row[GPU_TYPE]) == ("ready", "n0", "H100")


def test_a_replica_that_moved_is_where_it_is_now() -> None:
    """A row of an earlier window on another node is not added to the present one."""
    windows = Windows()
    _say(windows, T0, [{"replica": "a", "node": "n0", "gpus": 4.0}], "node.samples/0")
    _say(windows, T0 + 10, [{"replica": "a", "node": "n1", "gpus": 4.0}], "node.samples/1")
    (row,) = windows.replicas(T0 + 22, 30).values()
    assert (row[R["gpus"]], row[NODE]) == (4.0, "n1")


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
