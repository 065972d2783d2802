"""Forecasts: better than `last` on real traffic, finite whatever comes, the same after a reload."""

from __future__ import annotations

import os
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.pool.forecast import Forecaster
from models.pool.linear import Linear
from simulator.trace import read_trace, scale_trace

NAMES = ("a", "b", "c")


def copy(forecaster: Forecaster) -> Forecaster:
    """Through bytes, as a checkpoint takes it."""
    fresh = Forecaster()
    fresh.restore(msgpack.unpackb(msgpack.packb(forecaster.state()), strict_map_key=False))
    return fresh


@given(st.lists(st.tuples(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), st.floats(-10, 10)), max_size=30))
def test_the_linear_model_survives_its_own_state(examples: list[tuple[list[float], float]]) -> None:
    """Predictions after a reload are identical, and stay so while both learn on."""
    model, other = Linear(NAMES), Linear(NAMES)
    for x, y in examples:
        model.learn(x, y)
        other.restore(msgpack.unpackb(msgpack.packb(model.state())))
        assert other.predict(x) == model.predict(x)
        other.learn(x, -y)
        twin = Linear(NAMES)
        twin.restore(model.state())
        twin.learn(x, -y)
        assert twin.predict(x) == other.predict(x)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.none() | st.floats(0, 1e7), min_size=1, max_size=80), st.integers(0, 80))
def test_forecasts_are_finite_bounded_and_reproducible(rates: list[float | None], cut: int) -> None:
    """Whatever the rates: 0 <= p10 <= forecast <= p90 <= 2 x the recent maximum, and the same after a reload."""
    forecaster, reloaded = Forecaster(), Forecaster()
    forecaster.horizons(120.0)
    reloaded.horizons(120.0)
    for n, rate in enumerate(rates):
        if n == cut:
            reloaded = copy(reloaded)
        for one in (forecaster, reloaded):
            one.observe(float("nan") if rate is None else rate)
        for a, b in zip(forecaster.tracks, reloaded.tracks, strict=True):
            if not a.pending:
                continue
            expected, (low, high) = a.newest()
            assert 0 <= low <= expected <= high <= 2 * max(forecaster.bins) * (1 + 1e-9)
            assert (expected, [low, high]) == b.newest()


def test_horizons_follow_the_cold_start() -> None:
    """60 s, the cold start, 60 s more; equal ones once; a horizon that stays keeps its scores."""
    forecaster = Forecaster()
    forecaster.horizons(180.0)
    assert [track.ticks for track in forecaster.tracks] == [6, 18, 24]
    forecaster.tracks[0].matured = 5
    forecaster.horizons(55.0)
    assert [track.ticks for track in forecaster.tracks] == [6, 12]
    assert forecaster.tracks[0].matured == 5


def test_a_constant_rate_is_forecast_exactly() -> None:
    """With nothing to forecast there is no error, and every interval holds."""
    forecaster = Forecaster()
    forecaster.horizons(60.0)
    for _ in range(60):
        forecaster.observe(5.0)
    track = forecaster.tracks[0]
    assert track.newest()[0] == pytest.approx(5.0)
    assert track.error / track.mass == pytest.approx(0.0, abs=1e-9)
    assert track.covered / track.mass == pytest.approx(1.0)


@pytest.mark.data
@pytest.mark.skipif("FLEETLOOP_DATA" not in os.environ, reason="set FLEETLOOP_DATA to the folder with the traces")
@pytest.mark.parametrize(
    ("name", "scale", "bounds"), [("conv", 16, (0.85, 0.9, 1.0)), ("code", 24, (0.75, 0.65, 0.65))]
)
def test_better_than_last_on_real_traffic(name: str, scale: int, bounds: tuple[float, ...]) -> None:
    """Mean absolute error of each horizon, relative to `as in the last 10 s`, after the first 10 minutes."""
    path = Path(os.environ["FLEETLOOP_DATA"]) / f"azure-llm-2023/AzureLLMInferenceTrace_{name}.csv"
    trace = scale_trace(read_trace(path), scale, 5.0, 0)
    rates = np.bincount((trace.at_s // 10).astype(int))[:-1] / 10
    forecaster = Forecaster()
    forecaster.horizons(180.0)
    made: list[dict[int, tuple[float, float]]] = [{} for _ in forecaster.tracks]
    errors = [[0.0, 0.0] for _ in made]
    for n, rate in enumerate(rates.tolist()):
        forecaster.observe(rate)
        for forecasts, error, track in zip(made, errors, forecaster.tracks, strict=True):
            forecasts[n + track.ticks] = (track.newest()[0], rate)
            if n in forecasts and n >= 60:
                error[0] += abs(forecasts[n][0] - forecaster.actual())
                error[1] += abs(forecasts[n][1] - forecaster.actual())
    for (own, last), bound in zip(errors, bounds, strict=True):
        assert own / last < bound
