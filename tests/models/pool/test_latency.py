"""Latency findings: they open, update and close with one id, name the injected cause, and their shares add up."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.pool.latency_causes import CAUSES, service
from models.pool.latency_norms import KNOWN_MIN, Norm
from models.pool.latency_steps import OBSERVATIONS_MIN, Load, Steps
from schemas.log import LogRecord
from tests.generators.latency import CAUSES as INJECTED
from tests.generators.latency import START_S
from tests.generators.latency_runs import make, records, run, score
from tests.models.law import check_law, tick
from tests.models.pool.signals import T0, engine_window, pool_config, pool_fold, request_window

SEEDS = (0, 1)
"""`fleetloop evaluate latency --seeds` takes others, and more of them."""


@pytest.mark.parametrize("cause", INJECTED)
def test_a_cause_alone_is_named_first(cause: str) -> None:
    """In every run in which it broke anything, over pools that differ in all but the cause."""
    got = score(run(seed, [cause]) for seed in SEEDS)
    assert got["runs"] >= 1
    assert got["named"] == 1.0, got["wrong"]
    assert got["unexplained"] < 0.25


@pytest.mark.parametrize("two", [("queueing", "prefill"), ("kv", "interference"), ("batch", "throttling")])
def test_two_causes_are_the_first_two(two: tuple[str, str]) -> None:
    """Injected at the same time into one pool."""
    got = score([run(3, two), run(7, two)])
    assert got["runs"] == 2
    assert got["named"] >= 0.5, got["wrong"]


def test_one_finding_opens_updates_and_closes() -> None:
    """Whatever happens in between, one subject, one beginning, one end; every share is there and they add up to 1."""
    said = [body for body in run(1, ["prefill"], tail_s=600).findings if body["at_s"] >= T0 + START_S]
    assert [body["open"] for body in said] == [True] * (len(said) - 1) + [False]
    assert len(said) > 2
    assert {body["subject"] for body in said} == {"chat"}
    assert len({body["since_s"] for body in said}) == 1
    for body in said[:-1]:
        shares = body["evidence"]["shares"]
        assert list(shares) == sorted(shares, key=list(CAUSES).index)
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-9)
        assert min(shares.values()) >= 0
        assert "% long prompts: " in body["text"]
        assert " prompt tokens a request (usually " in body["text"]
        assert any(name.startswith("request/") and "@" in name for name in body["evidence"]["windows"])
        assert any(name.startswith("engine/") for name in body["evidence"]["windows"])


def test_a_pool_that_is_well_has_none() -> None:
    """Chance is no cause: of four pools for a quarter of an hour each, at most one is said to be slow."""
    assert sum(any(body["open"] for body in run(seed, []).findings) for seed in range(20, 24)) <= 1


@given(data=st.data())
@settings(max_examples=1, deadline=None, suppress_health_check=list(HealthCheck))
def test_law_of_folds_while_latency_breaks(data: Any) -> None:
    """The same bytes whichever way the log is split, through a finding's whole life."""
    log = [record._replace(offset=offset) for offset, record in enumerate(records(make(5, ["interference"])))]
    check_law(pool_fold, log, data)


_NUMBER = st.one_of(st.none(), st.sampled_from([0.0, 1e-9, 1.0, 3.0, 1e3, 1e15]))
_COLUMNS = (
    "running_mean", "waiting_mean", "waiting_last", "kv_usage_ratio_mean", "kv_usage_ratio_max", "kv_capacity_tokens",
    "prompt_tokens", "cached_tokens", "generation_tokens", "preemptions", "iterations", "ttft_s_sum", "ttft_count",
    "tpot_s_sum", "tpot_count", "itl_s_sum", "itl_count", "queue_s_sum", "queue_count", "prefill_s_sum",
    "prefill_count", "sm_clock_ratio_mean", "throttled_s", "loading_s",
)  # fmt: skip


@given(
    rows=st.lists(st.fixed_dictionaries(dict.fromkeys(_COLUMNS, _NUMBER)), min_size=20, max_size=24),
    states=st.lists(st.sampled_from(["ready", "starting", "draining"]), min_size=24, max_size=24),
)
@settings(max_examples=25, deadline=None)
def test_any_row_is_survived(rows: list[dict[str, Any]], states: list[str]) -> None:
    """Whatever engines report or leave out, the fold goes on, and what it says adds up to 1."""
    log: list[LogRecord] = [pool_config(T0)]
    for k, row in enumerate(rows):
        start = T0 + 10 * k
        two = [{"replica": "r0", "state": states[k], **row}, {"replica": "r1", **rows[k - 1]}]
        told = {"tenant": "acme", "arrivals": 30, "ends": 30, "ttft": [9.0] * 30, "tpot": [0.01 * k] * 30}
        log += [engine_window(start + 12.2, start, k + 1, two), request_window(start + 12.4, start, k + 1, [told])]
    log.append(tick(T0 + 10 * len(rows) + 25.0))
    fold = pool_fold()
    out = fold.apply([record._replace(offset=i) for i, record in enumerate(log)])
    bodies = [json.loads(result.value) for result in out if result.topic == "findings"]
    latency = [body for body in bodies if body["finding"] == "latency" and body["open"]]
    assert latency, "a p99 of 9 s breaks a target of 2 s"
    for body in latency:
        assert sum(body["evidence"]["shares"].values()) == pytest.approx(1.0, abs=1e-9)
    assert not [result for result in out if result.topic == "dead.letters"]


def test_nothing_known_but_the_p99_is_unexplained() -> None:
    """Engines that tell nothing: the break is said, with what is missing, and no cause is invented."""
    log: list[LogRecord] = [pool_config(T0)]
    for k in range(6):
        start = T0 + 10 * k
        quiet = {"replica": "r0", "running_mean": None, "waiting_mean": None, "waiting_last": None}
        told = {"tenant": "acme", "arrivals": 30, "ends": 30, "ttft": [9.0] * 30, "tpot": [0.01] * 30}
        log += [engine_window(start + 12.2, start, k + 1, [quiet]), request_window(start + 12.4, start, k + 1, [told])]
    out = pool_fold().apply([record._replace(offset=i) for i, record in enumerate([*log, tick(T0 + 85.0)])])
    bodies = [json.loads(result.value) for result in out if result.topic == "findings"]
    body = next(body for body in bodies if body["finding"] == "latency")
    assert body["evidence"]["causes"] == ["unexplained"]
    assert body["evidence"]["unknown"] == ["time in the queue", "time a token", "engine steps", "KV use", "clocks"]
    assert "TTFT p99 was 9" in body["text"]
    assert "(target 2 s)" in body["text"]


_LN = st.floats(0, 3)


@given(
    above=st.floats(1e-6, 5),
    direct=st.dictionaries(st.sampled_from(CAUSES), _LN),
    own=_LN,
    factors=st.fixed_dictionaries(dict.fromkeys(CAUSES, _LN)),
)
def test_shares_of_a_service_time_add_up(
    above: float, direct: dict[str, float], own: float, factors: dict[str, float]
) -> None:
    """None is negative; a cause that has not changed and slows nothing has none."""
    shares = service(above, direct, own, factors)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert min(shares.values()) >= 0
    for cause in ("kv", "interference", "throttling", "cold_start", "skew", "prefill"):
        if not direct.get(cause) and not factors[cause]:
            assert shares.get(cause, 0.0) == 0.0


def test_a_norm_is_not_moved_by_a_burst() -> None:
    """Ten windows at ten times the usual change the norm by less than a lasting change does."""
    norm = Norm()
    for k in range(200):
        norm.learn(1.0 + 0.1 * (k % 3 - 1))
    before = norm.mean
    for _ in range(10):
        norm.learn(10.0)
    assert before == pytest.approx(1.0, abs=0.05)
    assert norm.mean - before < 0.1
    assert norm.above(1.0) == 0.0


def test_a_norm_is_unknown_at_first() -> None:
    """It says so, and what is above it is not known, but for what stands in its place."""
    norm = Norm()
    for _ in range(int(KNOWN_MIN) - 1):
        norm.learn(1.0)
    assert norm.usual() is None
    assert norm.above(5.0) == 0.0
    assert norm.above(5.0, 2.0) == 3.0
    norm.learn(None)
    assert not norm.known
    norm.learn(1.0)
    assert norm.known


def test_the_step_model_finds_the_law_and_takes_known_slowdowns_out() -> None:
    """D0 + D1 B + D2 K + P1 p within 2 % inside of what was seen, although every third step was slowed, and said so."""
    steps = Steps()

    def law_s(load: Load) -> float:
        return 0.02 + 2e-4 * load.batch + 1e-7 * load.kv + 3e-5 * load.prefill

    for k in range(200):
        load = Load(10.0 + 37 * k % 50, 1e4 + 7919 * k % 90_000, 53 * k % 400)
        slow_ln = math.log(2) if k % 3 == 0 else 0.0
        steps.learn(load, law_s(load) * math.exp(slow_ln), slow_ln)
        steps.forget()
    assert steps.mass >= OBSERVATIONS_MIN
    for load in (Load(20, 3e4, 100), Load(55, 8e4, 350), Load(30, 6e4, 10)):
        assert steps.residual(load, law_s(load)) == pytest.approx(0.0, abs=0.02)
        assert steps.residual(load, 1.5 * law_s(load)) == pytest.approx(math.log(1.5), abs=0.02)


def test_state_is_whole() -> None:
    """A fold made from the dump holds the same of a pool's latency, in the middle of a finding."""
    fold, copy = pool_fold(), pool_fold()
    log = [record._replace(offset=offset) for offset, record in enumerate(records(make(2, ["kv"])))]
    fold.apply(log[:260])
    copy.load(fold.dump())
    held = fold.pools["chat"].latency.state()
    assert held["found"] is not None
    assert copy.pools["chat"].latency.state() == held
