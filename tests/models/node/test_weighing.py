"""What windows hold of gauges and counters, against sums written down by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.node.samples import SampleStore, Series, around
from models.node.weighing import growth, latest, mean, weights, within

NAN = float("nan")
GAP = 3.0


def series(*samples: tuple[float, ...], subject: int = 1) -> Series:
    """Samples of one subject: (time, value, ...)."""
    store = SampleStore(len(samples[0]) - 1)
    data = np.array(samples, float)
    store.add(np.full(len(data), float(subject)), data[:, 0], data[:, 1:].T, GAP)
    return store.series()


def held(s: Series, start: float, end: float, now: float = 1e9) -> float:
    return float(mean(s, 0, weights(s, start, end, now, GAP), within(s, start, end))[0])


def test_sample_speaks_until_the_next_one() -> None:
    """A mean is weighed by the time until the next sample, and a border splits a sample's time."""
    s = series((8.0, 10.0), (11.0, 40.0), (12.0, 0.0))
    assert held(s, 0, 10) == 10.0
    # 10 until 11, 40 until 12, 0 for three seconds
    assert held(s, 10, 20) == pytest.approx((10 * 1 + 40 * 1 + 0 * 3) / 5)


def test_sample_speaks_for_at_most_the_gap() -> None:
    """Silence is not the last value going on: what nobody spoke for has no weight."""
    s = series((0.0, 10.0), (9.0, 40.0))
    assert weights(s, 0, 10, 1e9, GAP).tolist() == [3.0, 1.0]
    assert held(s, 0, 10) == pytest.approx((30 + 40) / 4)


def test_unknown_has_no_weight_and_zero_has() -> None:
    """Null samples are left out of a mean; zeros are not; nothing known is unknown."""
    assert held(series((0.0, 10.0), (2.0, NAN), (4.0, 0.0)), 0, 6) == pytest.approx(10 * 2 / 4)
    assert np.isnan(held(series((0.0, NAN)), 0, 10))


def test_newest_sample_counts_at_once() -> None:
    """A sample of this very moment is the mean, though no time has passed for which it could speak."""
    assert held(series((5.0, 7.0)), 0, 10, now=5.0) == 7.0


def grown(s: Series, start: float, end: float) -> float:
    return float(growth(s, slice(0, 1), start, end).total[0, 0])


def test_counter_growth_is_split_at_borders_by_time() -> None:
    """Growth between two samples lies evenly between them."""
    s = series((8.0, 100.0), (12.0, 140.0))
    assert grown(s, 0, 10) == pytest.approx(20)
    assert grown(s, 10, 20) == pytest.approx(20)
    assert np.isnan(grown(s, 20, 30))


@pytest.mark.parametrize(
    ("samples", "total", "resets"),
    [
        ([(1.0, 100.0, NAN), (2.0, 130.0, NAN), (3.0, 10.0, NAN), (4.0, 15.0, NAN)], 30 + 10 + 5, 1),
        ([(1.0, 100.0, 0.5), (2.0, 130.0, 0.5), (3.0, 140.0, 2.5)], 100 + 30 + 140, 1),
        ([(1.0, 100.0, -99.0), (2.0, NAN, NAN), (3.0, 140.0, -99.0)], 40, 0),
        ([(1.0, 100.0, -99.0), (2.0, 100.0, -99.1)], 0, 0),
        ([(5.0, 7.0, 1.0)], 7, 0),
        ([(5.0, 7.0, -999.0)], NAN, 0),
        ([(5.0, 7.0, 5.0)], 7, 0),
    ],
)
def test_resets(samples: list[tuple[float, float, float]], total: float, resets: int) -> None:
    """A counter that fell or whose process started anew counts from zero; one that has no predecessor counts only
    if its process is young; a null in between loses nothing."""
    s = series(*samples)
    found = growth(s, slice(0, 1), 0, 10, s.values[1], 60.0)
    assert found.total[0].tolist() == pytest.approx([total], nan_ok=True)
    assert found.resets.tolist() == [resets]


def test_restart_spreads_growth_from_the_start() -> None:
    """What a restarted process counted grew since its start, not since the last sample of the old one."""
    s = series((2.0, 100.0, -99.0), (18.0, 80.0, 14.0))
    found = [growth(s, slice(0, 1), start, start + 10, s.values[1], 60.0) for start in (0, 10)]
    assert found[0].total[0].tolist() == pytest.approx([NAN], nan_ok=True)
    assert found[1].total[0].tolist() == [80.0]
    assert found[1].covered_s.tolist() == [4.0]


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 50)), min_size=2, max_size=30, unique_by=lambda x: x[0]),
    st.randoms(use_true_random=False),
)
def test_adjoining_windows_add_up(drawn: list[tuple[int, int]], random: object) -> None:
    """The windows of a counter add up to what it grew, whatever the samples' times, the order of their arrival and
    the samples that a window is computed from."""
    samples = sorted((at / 4, float(value)) for at, value in drawn)
    total = sum(b[1] - a[1] if b[1] >= a[1] else b[1] for a, b in pairwise(samples))
    shuffled = samples[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    store = SampleStore(2)
    for at, value in [*shuffled, *shuffled[:5]]:
        store.add(np.ones(1), np.array([at]), np.array([[0.0], [value]]), GAP)
    assert store.size == len(samples)
    s = store.series()
    parts = [growth(s, slice(1, 2), w, w + 10).total[0, 0] for w in range(0, 110, 10)]
    assert np.nansum(parts) == pytest.approx(total)
    for w in range(0, 110, 10):
        near = around(s, w, w + 10, GAP, 0)
        if len(near.at):
            part = growth(near, slice(1, 2), w, w + 10).total[0, 0]
            assert part == pytest.approx(parts[w // 10], nan_ok=True)
            weighed = [weights(x, w, w + 10, 1e9, GAP).sum() for x in (near, s)]
            assert weighed[0] == pytest.approx(weighed[1])


def test_subjects_do_not_mix() -> None:
    """Neighbours in time of different subjects have nothing to do with each other."""
    store = SampleStore(1)
    store.add(np.array([2.0, 1.0, 2.0, 1.0]), np.array([0.0, 0.0, 5.0, 5.0]), np.array([[1.0, 100.0, 3.0, 50.0]]), GAP)
    s = store.series()
    assert s.subjects.tolist() == [1, 2]
    assert growth(s, slice(0, 1), 0, 10).total[0].tolist() == [50.0, 2.0]
    assert latest(s, 0, within(s, 0, 10)).tolist() == [50.0, 3.0]


def test_add_tells_what_may_have_changed() -> None:
    """A new sample in order matters from the one before it on, if both know the same; a late one may matter
    everywhere; one that was there before nowhere."""
    store = SampleStore(1)

    def add(at: float) -> tuple[int, float, float, int]:
        added = store.add(np.ones(1), np.array([at]), np.zeros((1, 1)), GAP)
        return added.duplicates, added.from_s, added.to_s, len(added.new)

    assert add(10.0) == (0, 10.0, 13.0, 1)
    assert add(30.0) == (0, 10.0, 33.0, 0)
    assert add(20.0) == (0, -np.inf, np.inf, 0)
    assert add(20.0) == (1, np.inf, -np.inf, 0)
    added = store.add(np.ones(1), np.array([40.0]), np.full((1, 1), NAN), GAP)
    assert (added.from_s, added.to_s) == (-np.inf, 43.0)


def test_prune_keeps_what_the_next_delta_needs() -> None:
    """Of samples before the horizon only each subject's last that answered stays, and that only so long."""
    store = SampleStore(1)
    samples = [(1, 1.0, 0.0), (1, 5.0, 0.0), (1, 8.0, 1.0), (1, 20.0, 0.0), (2, 3.0, 0.0), (3, 9.0, 0.0)]
    data = np.array(samples)
    store.add(data[:, 0], data[:, 1], data[:, 2:].T, GAP)
    store.prune(10.0, 4.0, 0, np.zeros(0))
    assert sorted(zip(store.data[0].tolist(), store.data[1].tolist(), strict=True)) == [(1, 5.0), (1, 20.0), (3, 9.0)]
    assert {subject: at for subject, (at, _) in store.last.items()} == {1: 20.0, 3: 9.0}
    store.prune(30.0, 25.0, 0, np.array([3.0]))
    assert list(store.last) == [3]
