"""Shadow-hold against its own pseudo-code, written out tick by tick, and the properties that make it safe."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.pool.shadow_hold import HOLDS_S, MARGINS, START, ShadowHold


class Reference:
    """Shadow-hold v2 as the design states it, with plain loops; n counts ticks of 10 s."""

    def __init__(self, capacity: float, reserve: float, price: float, cold_start_s: float) -> None:
        self.capacity, self.r, self.price = capacity, reserve, price
        self.k = math.ceil(cold_start_s / 10)
        self.y: list[float] = []
        self.stay: list[float] = []
        self.d: list[float] = []
        self.dem: list[float] = []
        self.wd = 2.0
        self.base: dict[int, list[float]] = {w: [] for w in HOLDS_S}
        self.live: dict[int, list[float]] = {w: [] for w in HOLDS_S}
        self.winners: list[tuple[int, float]] = []
        self.current = START

    def mean(self, width: int) -> float:
        part = self.y[-width:]
        return sum(part) / len(part)

    def tick(self, rate: float, in_flight: float) -> int:
        n = len(self.y)
        if n % 6 == 0:
            stay, rates = sum(self.stay[-180:]), sum(self.y[-180:]) * self.capacity
            self.wd = min(max(stay / rates / 10 + 1.5, 2.0), 4.0) if rates > 0 else 2.0
        self.y.append(rate / self.capacity)
        self.stay.append(in_flight)
        self.d.append(self.mean(6))
        low = math.floor(self.wd)
        part = self.wd - low
        self.dem.append((1 - part) * self.mean(low) + part * self.mean(low + 1))
        for w in HOLDS_S:
            self.base[w].append(max(self.d[-(w // 10) :]))
            self.live[w].append(min(self.base[w][-(self.k + 1) :]))
        if (n + 1) % 6 == 0 and (n + 1) * 10 >= 600:
            self.choose(n)
        w, m = self.current
        want = math.ceil(m * self.base[w][n] + self.r - 1e-9)
        now = self.dem[n]
        if now > 0:
            e = sum(2.0 ** (-(n - i) * 10 / 1800) * self.dem[i] for i in range(max(0, n - 1079), n + 1)) / now
            if e < 60:
                top = max(self.base[600][n], self.base[w][n])
                want = max(want, math.ceil(max(m, 1.15) * top + self.r - 1e-9))
        return want

    def choose(self, n: int) -> None:
        ticks = range(self.k + 7, n + 1)
        weights = [2.0 ** (-(n - i) * 10 / 1800) for i in ticks]
        s = sum(w * self.dem[i] for w, i in zip(weights, ticks, strict=True))
        if s <= 0:
            return
        paid, score = {}, {}
        for hold in HOLDS_S:
            for m in MARGINS:
                cost = missed = 0.0
                for w, i in zip(weights, ticks, strict=True):
                    cost += w * (m * self.base[hold][i] + self.r)
                    room = m * self.live[hold][i - 1] + self.r
                    rho = self.dem[i] / room if room > 0 else (math.inf if self.dem[i] > 0 else 0.0)
                    missed += w * self.dem[i] * min(max((rho - 1) / 0.4, 0.0), 1.0)
                paid[hold, m] = cost / s
                score[hold, m] = cost / s + self.price * missed / s
        best = min(score, key=score.__getitem__)
        self.winners = [*self.winners, best][-5:]
        voters = self.winners if len(self.winners) == 5 else [*self.winners, self.current]
        self.current = max(voters, key=paid.__getitem__)


def run(rates: list[float], stays: list[float], reserve: float, cold_start_s: float) -> ShadowHold:
    """Both side by side; fails where they ask for different numbers of replicas or choose other settings."""
    own, reference = ShadowHold(), Reference(3.5, reserve, 7.0, cold_start_s)
    for n, (rate, stay) in enumerate(zip(rates, stays, strict=True)):
        wanted = reference.tick(rate, stay)
        own.push(1000 + n, rate, 0.0, stay)
        if own.count % 6 == 0 and own.count * 10 >= 600:
            own.choose(3.5, reserve, 7.0, cold_start_s)
        assert own.setting == reference.current, n
        assert own.plan(3.5, reserve).want().replicas == wanted, n
    return own


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**32 - 1),
    bursts=st.floats(0, 1),
    reserve=st.sampled_from([0.0, 1.0, 2.0]),
    cold_start_s=st.sampled_from([0.0, 60.0, 180.0]),
)
def test_equals_its_pseudo_code(seed: int, bursts: float, reserve: float, cold_start_s: float) -> None:
    """On random series the vectorised form asks for the same replicas and chooses the same settings, tick by tick."""
    rng = np.random.default_rng(seed)
    level = 40 * np.exp(np.cumsum(rng.normal(0, 0.03, 200)))
    rates = rng.poisson(level * (1 + 3 * (rng.random(200) < 0.1 * bursts)) * 10) / 10
    run(rates.tolist(), (rates * rng.uniform(3, 20)).tolist(), reserve, cold_start_s)


def test_a_bursty_pool_learns_to_hold_a_smooth_one_to_let_go() -> None:
    """Bursts every ten minutes choose a long hold window; a steady rate the shortest without margin."""
    bursty = [90.0 if n % 60 < 12 else 10.0 for n in range(400)]
    assert run(bursty, bursty, 1.0, 180.0).setting[0] >= 600
    steady = [35.0] * 200
    assert run(steady, steady, 1.0, 180.0).setting == (60, 1.0)


def test_cheaper_five_times_dearer_at_once() -> None:
    """A setting that costs less must win five choices in a row; one that costs more acts at the first."""
    series = ShadowHold()
    for n in range(200):
        series.push(n, 35.0, 0.0, 0.0)
    settings_seen = []
    for _ in range(6):
        series.choose(3.5, 1.0, 7.0, 180.0)
        settings_seen.append(series.setting)
    assert settings_seen[:4] == [START] * 4
    assert settings_seen[4:] == [(60, 1.0)] * 2
    for n in range(200, 260):
        series.push(n, 300.0 if n % 20 < 4 else 35.0, 0.0, 0.0)
    series.choose(3.5, 1.0, 7.0, 180.0)
    assert series.setting != (60, 1.0)


def test_what_the_setting_before_asks_for_is_left_for_a_minute() -> None:
    """A choice frees no replica before the next one could take it back; what is asked for beyond is not delayed."""
    series = ShadowHold()
    for n in range(200):
        series.push(n, 70.0 if n < 170 else 35.0, 0.0, 0.0)
    before = series.plan(3.5, 1.0)
    assert before.left == 0
    while series.setting == START:
        series.choose(3.5, 1.0, 7.0, 180.0)
    for n in range(200, 206):
        assert series.plan(3.5, 1.0).left == before.want().replicas
        assert series.plan(3.5, 1.0).want().replicas < before.want().replicas
        series.push(n, 35.0, 0.0, 0.0)
    assert series.plan(3.5, 1.0).left == 0


def test_unknown_is_not_zero() -> None:
    """Unknown ticks hold the value before: the plan is as if the load had gone on."""
    known, holes = ShadowHold(), ShadowHold()
    for n in range(30):
        known.push(n, 20.0, 0.0, float("nan"))
        holes.push(n, 20.0 if n < 10 else float("nan"), 0.0, float("nan"))
    assert holes.plan(1.0, 1.0) == known.plan(1.0, 1.0)


def test_a_revision_rewrites_the_past() -> None:
    """A late window counts as if it had been known in time."""
    late, timely = ShadowHold(), ShadowHold()
    for n in range(30):
        late.push(n, float("nan") if n == 20 else 5.0, 0.0, 1.0)
        timely.push(n, 50.0 if n == 20 else 5.0, 0.0, 1.0)
    late.revise(20, 50.0)
    assert late.plan(1.0, 1.0)[:5] == pytest.approx(timely.plan(1.0, 1.0)[:5])


def test_a_mix_change_does_not_rewrite_the_past() -> None:
    """The token mix of a tick stays with it: heavier requests now say nothing of the replicas needed before."""
    series = ShadowHold()
    for n in range(12):
        series.push(n, 10.0, 0.0 if n < 6 else math.log(0.5), 0.0)
    means, _ = series.demand(1.0)
    assert means[5] == pytest.approx(10.0)
    assert means[-1] == pytest.approx(20.0)


def test_the_series_is_bounded() -> None:
    """A week of ticks keeps 1200 of them and the choice still works."""
    series = ShadowHold()
    for n in range(1300):
        series.push(n, 10.0 + n % 7, 0.0, 1.0)
    assert len(series.rates) == 1200
    assert series.first_tick == 100
    assert series.replay(1.0, 1.0, 7.0, 60.0) is not None
