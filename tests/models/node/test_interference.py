"""Interference: who is blamed, who never is, and that a replica's rows rest on it and its pool alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.node.interference import KEEP_S, Interference, Neighbour, Observed
from models.node.interference_fit import LEARNED, SETTLE, Bank
from models.node.interference_rows import fresh, with_slot, without_slot
from models.node.interference_terms import OWN, solve
from models.state import pack, unpack
from schemas.config import LimitsSpec
from schemas.signals import INTERFERENCE_WINDOWS

START_S = 1_800_000_000
LIMITS = LimitsSpec()
few = settings(max_examples=8)  # an example is some hundred windows


def observed(key: int, tpot_s: float | None, running: float = 12.0, **changes: Any) -> Observed:
    """A window in which a replica did its work."""
    base = Observed(
        key=key,
        replica=f"r{key}",
        pool="p",
        node="n",
        covered_s=10.0,
        steps=400.0,
        tokens=4800.0,
        running=running,
        kv_tokens=1e3 * running,
        prefill_tokens=4e3,
        tpot_s=tpot_s,
        clock_ratio=1.0,
        preemptions_per_s=0.0,
        accepted=1.0,
        restarted=False,
        neighbours=(),
    )
    return base._replace(**changes)


def own_s(running: float) -> float:
    return 0.02 * (1 + running / 40)


class Story:
    """A replica beside `busy` (which slows it by `harm` when on) and `calm`, window by window."""

    def __init__(self, seed: int, harm: float = 0.3, constant: bool = False, graded: bool = True) -> None:
        self.rng = np.random.default_rng(seed)
        self.harm, self.constant, self.graded = harm, constant, graded
        self.on = 1.0

    def window(self, key: int = 0, **changes: Any) -> Observed:
        if not self.constant and self.rng.random() < 0.06:
            self.on = 1 - self.on
        u = self.on * (self.rng.uniform(0.6, 1.0) if self.graded and not self.constant else 1.0)
        running = float(np.exp(self.rng.normal(2.4, 0.4)))
        tpot_s = own_s(running) * math.exp(self.harm * u + self.rng.normal(0, 0.03))
        beside = [
            Neighbour("busy", "pb", u, self.graded),
            Neighbour("calm", "", float(self.rng.uniform(0, 0.6)) if self.graded else 1.0, self.graded),
        ]
        return observed(key, tpot_s, running, neighbours=beside)._replace(**changes)


def run(model: Interference, windows: list[list[Observed]], first: int = 0) -> list[dict[str, dict[str, Any]]]:
    return [model.step(START_S + 10.0 * (first + t), items, LIMITS) for t, items in enumerate(windows)]


def rows(out: list[dict[str, dict[str, Any]]], replica: str = "r0") -> list[dict[str, Any]]:
    """The rows of one replica."""
    found = []
    for pools in out:
        for columns in pools.values():
            for i, name in enumerate(columns["replica"]):
                if name == replica:
                    found.append({column: values[i] for column, values in columns.items()})
    return found


def dump(model: Interference) -> bytes:
    return pack("node", "t", 0, 1, model.state())


def test_a_harmful_neighbour_is_named_with_what_it_costs() -> None:
    """While it presses the replica is a victim, the right neighbour and its pool are named, and the slowdown is within
    5 %; while it rests nobody is."""
    story, told, truth = Story(1), [], []
    model = Interference()
    for t in range(900):
        item = story.window()
        told += rows(run(model, [[item]], t))
        truth.append(math.exp(0.3 * (item.neighbours[0].pressure or 0.0)))
    late = list(zip(told, truth, strict=True))[400:]
    harmed = [row for row, true in late if true > 1.1 and row["victim"]]
    assert len(harmed) > 0.85 * sum(true > 1.1 for _, true in late)
    assert {(row["antagonist"], row["antagonist_pool"]) for row in harmed} == {("busy", "pb")}
    errors = [abs(math.log(row["slowdown"] / true)) for row, true in late if row["victim"] and true > 1.1]
    assert np.median(errors) < 0.05
    assert np.mean([row["victim"] for row, true in late if true == 1.0]) < 0.3, "only the trailing edge of 3 of 6"
    assert all(row["slowdown_low"] <= row["slowdown"] <= row["slowdown_high"] for row, _ in late)


def test_rows_are_what_the_schema_says() -> None:
    """What step gives can be encoded, and decodes without a refusal."""
    story, model = Story(2), Interference()
    out = run(model, [[story.window()] for _ in range(100)])
    batch = INTERFERENCE_WINDOWS.decode(INTERFERENCE_WINDOWS.encode(out[-1]["p"], {}))
    assert batch.rows == 1
    assert batch.refused == []


@pytest.mark.parametrize("graded", [True, False])
def test_a_constant_neighbour_is_never_blamed(graded: bool) -> None:
    """What never varies cannot be told from the replica's own nature, whatever it costs."""
    story, model = Story(3, constant=True, graded=graded), Interference()
    out = rows(run(model, [[story.window()] for _ in range(600)]))
    assert not any(row["victim"] for row in out)
    assert {row["antagonist"] for row in out} == {None}


def test_presence_says_less_but_says_it() -> None:
    """Where only presence is known rows say so, and a neighbour that comes and goes is still named."""
    story, model = Story(4, graded=False), Interference()
    out = rows(run(model, [[story.window()] for _ in range(900)]))[400:]
    assert {row["graded"] for row in out} == {0}
    assert {row["antagonist"] for row in out if row["victim"]} == {"busy"}


def test_presence_that_changed_once_is_not_blamed() -> None:
    """A process that came once, when the replica became slower for whatever reason, is no antagonist."""
    story, model = Story(5, harm=0.0, constant=True, graded=False), Interference()
    before = [[story.window(neighbours=())] for _ in range(300)]
    slower = [story.window() for _ in range(100)]
    after = [[item._replace(tpot_s=1.3 * item.tpot_s)] for item in slower]
    out = rows(run(model, before + after))
    assert {row["antagonist"] for row in out} == {None}


@pytest.mark.parametrize("level", [1.3, 0.75])
def test_a_restart_does_not_alarm(level: float) -> None:
    """Another version at another speed is a new level: no victim, and nothing unexplained once it has settled."""
    story, model = Story(6, harm=0.0), Interference()
    run(model, [[story.window()] for _ in range(300)])
    later = [story.window(restarted=t == 0) for t in range(200)]
    out = rows(run(model, [[item._replace(tpot_s=level * item.tpot_s)] for item in later], 300))
    assert not any(row["victim"] for row in out)
    assert {row["unexplained"] for row in out[SETTLE:] if not math.isnan(row["unexplained"])} == set()


def test_slower_without_a_cause_is_told_and_blamed_on_nobody() -> None:
    """A replica that becomes 1.3 times slower without neighbours and without a restart gets rows that say by how much;
    before that it has none."""
    model, rng = Interference(), np.random.default_rng(7)
    load = np.exp(rng.normal(2.4, 0.4, 400))
    noise = np.exp(rng.normal(0, 0.03, 400))
    windows = [
        [observed(0, float(own_s(b) * n * (1.3 if t >= 250 else 1.0)), float(b))]
        for t, (b, n) in enumerate(zip(load, noise, strict=True))
    ]
    assert rows(run(model, windows[:250])) == []
    out = rows(run(model, windows[250:], 250))
    assert len(out) > 100
    assert {(row["victim"], row["antagonist"]) for row in out} == {(0, None)}
    assert out[-1]["unexplained"] == pytest.approx(1.3, rel=0.05)


def test_siblings_tell_what_a_constant_neighbour_hides() -> None:
    """A replica that is never alone and 1.25 times slower than what its pool needs alone is slower, cause unknown."""
    model, rng = Interference(), np.random.default_rng(8)
    windows = []
    for _ in range(300):
        items = []
        for key in range(4):
            running = float(np.exp(rng.normal(2.4, 0.4)))
            slow = 1.25 if key == 0 else 1.0
            beside = [Neighbour("busy", "pb", 1.0, True)] if key == 0 else []
            tpot_s = own_s(running) * slow * math.exp(rng.normal(0, 0.03))
            items.append(observed(key, tpot_s, running, neighbours=beside))
        windows.append(items)
    out = run(model, windows)
    assert rows(out)[-1]["unexplained"] == pytest.approx(1.25, rel=0.05)
    assert not any(row["victim"] for row in rows(out))
    assert all(rows(out, f"r{key}") == [] for key in (1, 2, 3))


def test_other_hardware_is_no_sibling() -> None:
    """A replica on a slower GPU is not slower than its load explains."""
    model, rng = Interference(), np.random.default_rng(9)
    windows = []
    for _ in range(200):
        running = np.exp(rng.normal(2.4, 0.4, 3)).tolist()
        windows.append(
            [
                observed(key, own_s(running[key]) * (1.5 if key == 2 else 1.0), running[key], hardware=gpu)
                for key, gpu in enumerate(("fast", "fast", "slow"))
            ]
        )
    assert all(pools == {} for pools in run(model, windows))


def test_short_windows_say_nothing() -> None:
    """Windows with few tokens, few steps, little time or no time per token teach nothing and alarm nobody."""
    model, story = Interference(), Story(10)
    poor = ({"tokens": 10.0}, {"steps": 3.0}, {"covered_s": 1.0}, {"tpot_s": None})
    for t, changes in enumerate(poor):
        assert rows(run(model, [[story.window(**changes)]], t))[0]["windows"] == 0


def test_what_is_unknown_does_not_mislead() -> None:
    """Without KV, clock, preemptions, steps and prefill the harmful neighbour is still found."""
    nothing = dict.fromkeys(("kv_tokens", "clock_ratio", "preemptions_per_s", "steps", "prefill_tokens"))
    story, model = Story(11), Interference()
    out = rows(run(model, [[story.window(**nothing)] for _ in range(600)]))[300:]
    assert sum(row["victim"] for row in out) > 60
    assert {row["antagonist"] for row in out if row["victim"]} == {"busy"}


def test_an_alarm_ends_with_the_work() -> None:
    """A victim that falls idle is no victim for longer than six windows."""
    story, model = Story(12), Interference()
    run(model, [[story.window()] for _ in range(400)])
    out = rows(run(model, [[story.window(tokens=0.0, tpot_s=None)] for _ in range(6)], 400))
    assert out[-1]["victim"] == 0


# -- laws ------------------------------------------------------------------------------------------------------


def _mixed(seed: int, windows: int) -> list[list[Observed]]:
    """Five replicas in three pools that come, go, restart and have changing neighbours."""
    rng = np.random.default_rng(seed)
    stories = [Story(seed + key) for key in range(5)]
    found = []
    for _ in range(windows):
        items = []
        for key, story in enumerate(stories):
            item = story.window(key, pool=f"p{key // 2}", restarted=bool(rng.random() < 0.02))
            beside = [n for n in item.neighbours if rng.random() < 0.9][: int(rng.integers(0, 3))]
            if rng.random() < 0.1:
                beside = [*beside, Neighbour(f"{rng.integers(99)}/job", "", None, True)]
            if rng.random() < 0.9:
                items.append(item._replace(neighbours=beside))
        found.append(items)
    return found


@few
@given(seed=st.integers(0, 10_000), cut=st.integers(0, 60))
def test_state_makes_the_round_trip(seed: int, cut: int) -> None:
    """A model that was dumped and loaded between any two windows says and holds the same, byte for byte."""
    windows = _mixed(seed, 60)
    whole, first = Interference(), Interference()
    wanted = run(whole, windows)
    got = run(first, windows[:cut])
    again = Interference()
    again.restore(unpack("node", "t", 0, (1,), dump(first))[1])
    assert dump(again) == dump(first)
    got += run(again, windows[cut:], cut)
    assert repr(got) == repr(wanted)
    assert dump(again) == dump(whole)


@few
@given(seed=st.integers(0, 10_000))
def test_order_within_a_window_is_irrelevant(seed: int) -> None:
    """Replicas of a window in any order give the same rows."""
    windows = _mixed(seed, 80)
    rng = np.random.default_rng(seed)
    shuffled = [[items[i] for i in rng.permutation(len(items))] for items in windows]
    assert repr(run(Interference(), shuffled)) == repr(run(Interference(), windows))


@few
@given(seed=st.integers(0, 10_000))
def test_other_pools_are_irrelevant(seed: int) -> None:
    """What is said of a pool's replicas is the same, to the last bit, with and without those of other pools."""
    windows = _mixed(seed, 80)
    alone = [[item for item in items if item.pool == "p0"] for items in windows]
    both = [pools.get("p0") for pools in run(Interference(), windows)]
    assert repr([pools.get("p0") for pools in run(Interference(), alone)]) == repr(both)


@few
@given(seed=st.integers(0, 10_000))
def test_no_neighbour_is_a_help(seed: int) -> None:
    """What a neighbour costs is never negative, whatever the windows say."""
    model = Interference()
    rng = np.random.default_rng(seed)
    for t, items in enumerate(_mixed(seed, 80)):
        run(model, [[i._replace(tpot_s=float(np.exp(rng.normal(-4, 1)))) for i in items]], t)
        for bank in model.banks.values():
            assert (bank.arrays["theta"][:, OWN:] >= 0).all()


# -- bounds ----------------------------------------------------------------------------------------------------


def test_neighbours_are_bounded() -> None:
    """Beyond limits.neighbours_max the longest absent gives way; where all are there the rest is counted."""
    limits, model = LimitsSpec(neighbours_max=2), Interference()

    def with_names(*names: str) -> list[Observed]:
        return [observed(0, 0.02, neighbours=[Neighbour(name, "", 0.5, True) for name in names])]

    model.step(START_S, with_names("a", "b"), limits)
    model.step(START_S + 10, with_names("b", "c"), limits)
    assert [name for name, _ in model.slots[0]] == ["b", "c"]
    assert model.counters == {}
    model.step(START_S + 20, with_names("b", "c", "d"), limits)
    assert [name for name, _ in model.slots[0]] == ["b", "c"]
    assert model.counters == {"overflow_neighbours_total": 1}


def test_replicas_are_bounded() -> None:
    """Beyond limits.replicas_max the rest is counted, not taken."""
    model = Interference()
    model.step(START_S, [observed(key, 0.02) for key in range(5)], LimitsSpec(replicas_max=3))
    assert len(model.slots) == sum(len(bank.rows) for bank in model.banks.values()) == 3
    assert model.counters == {"overflow_replicas_total": 2}


def test_what_was_not_seen_for_long_is_forgotten() -> None:
    """Replicas, neighbours and pools go after KEEP_S; `forget` lets replicas go at once."""
    story, model = Story(13), Interference()
    run(model, [[story.window(), observed(1, 0.02, pool="q"), observed(2, 0.02)] for _ in range(5)])
    model.forget([2, 77])
    assert list(model.slots) == [0, 1]
    only = story.window(neighbours=[Neighbour("calm", "", 0.1, True)])
    for hour in range(1, 8):
        model.step(START_S + KEEP_S / 6 * hour, [only], LIMITS)
    assert list(model.slots) == [0]
    assert [name for name, _ in model.slots[0]] == ["calm"]
    assert list(model.alone) == ["p/"]
    assert sum(len(bank.rows) for bank in model.banks.values()) == 1


# -- arithmetic ------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), j=st.integers(1, 4))
def test_a_neighbour_leaves_the_rest_as_it_was(seed: int, j: int) -> None:
    """Taking a neighbour out leaves the same coefficients of all others: what it explained is not handed to them."""
    rng = np.random.default_rng(seed)
    row = fresh()
    for _ in range(j):
        row = with_slot(row)
    z = np.abs(rng.normal(1, 1, (200, OWN + j)))
    y = z @ np.abs(rng.normal(0.5, 0.1, OWN + j))
    row["a"], row["b"] = z.T @ z, z.T @ y
    slot = int(rng.integers(j))
    kept = [i for i in range(OWN + j) if i != OWN + slot]
    narrower = without_slot(row, slot)
    theta = solve(row["a"][None], row["b"][None], j)[0][0][kept]
    assert solve(narrower["a"][None], narrower["b"][None], j - 1)[0][0] == pytest.approx(theta, rel=1e-6)


def test_a_row_moves_between_banks_unchanged() -> None:
    """What is taken from a bank and put back is what it was."""
    bank, row = Bank(1), with_slot(fresh())
    row["b"][3] = 5.0
    bank.put({"x": row, "y": with_slot(fresh())})
    back = bank.take(["x"])["x"]
    assert list(bank.rows) == ["y"]
    for name, values in row.items():
        np.testing.assert_array_equal(back[name], values)


def test_nothing_is_judged_before_it_is_learned() -> None:
    """The first windows give rows without a slowdown."""
    story, model = Story(14), Interference()
    out = rows(run(model, [[story.window()] for _ in range(LEARNED)]))
    assert all(math.isnan(row["slowdown"]) and row["victim"] == 0 for row in out)


@pytest.mark.parametrize("name", ["running", "kv_tokens", "prefill_tokens", "preemptions_per_s", "accepted", "tpot_s"])
@pytest.mark.parametrize("value", [1e12, 1e60, 1e300])
def test_a_load_that_no_engine_has_spoils_nothing(name: str, value: float) -> None:
    """One such window is not learned from: what is said before and after is as if it had not told of itself."""
    said = []
    for changes in ({name: value}, {"tokens": 0.0}):
        model, story = Interference(), Story(7)
        run(model, [[story.window()] for _ in range(90)])
        run(model, [[story.window(**changes)]], 90)
        said.append(rows(run(model, [[story.window()] for _ in range(5)], 91)))
    assert repr(said[0]) == repr(said[1])
    assert all(math.isfinite(row["slowdown"]) for row in said[0])


def test_kinds_of_gpu_are_bounded() -> None:
    """A pool that names another GPU type each window cannot fill the memory: what finds no room is counted."""
    model, limits = Interference(), LIMITS.model_copy(update={"pools_max": 3})
    for t in range(9):
        model.step(START_S + 10.0 * t, [observed(0, 0.02, hardware=f"H{t}")], limits)
    assert len(model.alone) == 3
    assert model.counters == {"overflow_pools_total": 6}
