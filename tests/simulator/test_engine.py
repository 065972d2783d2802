"""The engine: what a vLLM-like replica may and may not do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine import Engine
from simulator.request import EngineSpec, Request

SPEC = EngineSpec(28.8, 0.264, 0.101, 95.6)


def make_requests(n: int, rate_rps: float, seed: int, prompt: int = 1200, output: int = 200) -> list[Request]:
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(1 / rate_rps, n)).tolist()
    prompts = rng.integers(1, 2 * prompt, n).tolist()
    outputs = rng.integers(1, 2 * output, n).tolist()
    return [Request(i, at[i], "r", "t", "k", prompts[i], outputs[i]) for i in range(n)]


def run(spec: EngineSpec, requests: list[Request], strides: list[float], stepwise: bool = False) -> Engine:
    """Runs to the end in the given strides (repeated); checks the KV bound at every stop."""
    engine = Engine(spec, stepwise)
    queue = list(reversed(requests))
    now, i = 0.0, 0
    while queue or engine.in_flight:
        now += strides[i % len(strides)]
        i += 1
        while queue and queue[-1].arrival_s <= now:
            engine.submit(queue.pop())
        engine.advance(now)
        view = engine.view(now)
        assert 0 <= view.kv_usage <= 1
        assert view.running <= spec.seqs_max
    return engine


def fates(requests: list[Request]) -> list[tuple[object, ...]]:
    return [(r.status, r.admitted_s, r.first_token_s, r.end_s, r.generated, r.preemptions) for r in requests]


def test_lone_request_takes_the_time_of_the_formula() -> None:
    """Alone, the first token takes one prefill step and each further one a decode step over its growing KV."""
    engine = Engine(SPEC)
    request = Request(0, 1.0, "r", "t", "k", 1000, 3)
    engine.submit(request)
    engine.advance(10.0)
    first = (28.8 + 95.6) / 1000
    second = (28.8 + 0.264 + 0.101 * 1.001) / 1000
    third = (28.8 + 0.264 + 0.101 * 1.002) / 1000
    assert request.ttft_s == pytest.approx(first, abs=1e-12)
    assert request.e2e_s == pytest.approx(first + second + third, abs=1e-12)
    assert request.tpot_s == pytest.approx((second + third) / 2, abs=1e-12)
    view = engine.view(10.0)
    assert (view.prompt_tokens, view.generation_tokens, view.requests, view.iterations) == (1000, 3, 1, 3)
    assert view.busy_s == pytest.approx(first + second + third, abs=1e-12)
    assert not engine.busy


def test_prompt_longer_than_the_budget_is_read_in_chunks() -> None:
    """A prompt of 5000 tokens with a budget of 2048 takes three steps before its first token."""
    engine = Engine(SPEC)
    request = Request(0, 0.0, "r", "t", "k", 5000, 1)
    engine.submit(request)
    engine.advance(10.0)
    assert engine.iterations == 3
    assert request.e2e_s == pytest.approx((3 * 28.8 + 5 * 95.6) / 1000, abs=1e-12)


@pytest.mark.parametrize("kv_tokens", [450_000, 12_000])
@pytest.mark.parametrize("rate_rps", [0.5, 3.0, 6.0])
def test_skipping_equals_single_steps(kv_tokens: int, rate_rps: float) -> None:
    """The closed form gives what stepping one by one gives, with and without preemption, to 1e-9 s."""
    spec = EngineSpec(28.8, 0.264, 0.101, 95.6, kv_tokens_max=kv_tokens)
    skipped, stepped = make_requests(300, rate_rps, 5), make_requests(300, rate_rps, 5)
    a = run(spec, skipped, [1e6])
    b = run(spec, stepped, [1e6], stepwise=True)
    for x, y in zip(skipped, stepped, strict=True):
        assert (x.status, x.generated, x.preemptions) == (y.status, y.generated, y.preemptions)
        assert x.end_s == pytest.approx(y.end_s, abs=1e-9)
        assert x.first_token_s == pytest.approx(y.first_token_s, abs=1e-9)
    assert (a.iterations, a.generation_tokens, a.preemptions) == (
        b.iterations,
        b.generation_tokens,
        b.preemptions,
    )
    assert a.busy_s == pytest.approx(b.busy_s, abs=1e-6)
    if kv_tokens < 20_000 and rate_rps > 2:
        assert a.preemptions > 0


@settings(max_examples=40, deadline=None)
@given(
    strides=st.lists(st.floats(0.01, 20), min_size=1, max_size=5),
    kv=st.sampled_from([9_000, 60_000]),
    seqs=st.sampled_from([4, 256]),
    queue=st.sampled_from([3, 10_000]),
    timeout=st.sampled_from([5.0, float("inf")]),
    seed=st.integers(0, 1000),
)
def test_strides_do_not_matter_and_every_request_ends_once(
    strides: list[float], kv: int, seqs: int, queue: int, timeout: float, seed: int
) -> None:
    """Any split of time gives the same bits; every request ends exactly once; tokens are conserved."""
    spec = EngineSpec(28.8, 0.264, 0.101, 95.6, seqs_max=seqs, kv_tokens_max=kv, queue_max=queue, timeout_s=timeout)
    once, often = make_requests(60, 3.0, seed), make_requests(60, 3.0, seed)
    a = run(spec, once, [1e7])
    b = run(spec, often, strides)
    assert fates(once) == fates(often)
    assert sorted(r.number for r in b.ended) == list(range(60))
    assert a.busy_s == b.busy_s
    served = [r for r in once if r.status == "ok"]
    assert a.generation_tokens == sum(r.output_tokens for r in served)
    assert a.prompt_tokens == sum(r.prompt_tokens for r in served)
    assert a.requests == len(served)
    assert a.view(1e7).kv_usage == 0


def test_waiting_too_long_times_out_at_the_deadline() -> None:
    """What is not admitted within the time-out ends as `timeout`, exactly then."""
    spec = EngineSpec(28.8, 0.264, 0.101, 95.6, seqs_max=1, timeout_s=2.0)
    first, second = Request(0, 0.0, "r", "t", "k", 100, 500), Request(1, 0.5, "r", "t", "k", 100, 5)
    engine = Engine(spec)
    engine.submit(first)
    engine.submit(second)
    engine.advance(3.0)
    assert (second.status, second.end_s) == ("timeout", 2.5)
    engine.advance(100.0)
    assert first.status == "ok"


def test_full_queue_and_impossible_prompts_are_rejected_on_arrival() -> None:
    """A request beyond the queue's bound, or one that the KV cache could never hold, is rejected when it arrives."""
    spec = EngineSpec(28.8, 0.264, 0.101, 95.6, seqs_max=1, queue_max=1, kv_tokens_max=5000)
    requests = [Request(i, 0.1 * i, "r", "t", "k", 100, 100) for i in range(4)]
    requests.append(Request(4, 0.5, "r", "t", "k", 5000, 1))
    engine = Engine(spec)
    for request in requests:
        engine.submit(request)
    engine.advance(100.0)
    assert [r.status for r in requests] == ["ok", "ok", "rejected", "rejected", "rejected"]
    assert requests[2].end_s == requests[2].arrival_s


def test_slowdown_scales_the_steps_that_begin_under_it() -> None:
    """While slow by 2.5, a decode step takes 2.5 times as long; the step in progress is not changed."""
    plain, slowed = Request(0, 0.0, "r", "t", "k", 100, 1000), Request(0, 0.0, "r", "t", "k", 100, 1000)
    a, b = Engine(SPEC), Engine(SPEC)
    a.submit(plain)
    b.submit(slowed)
    b.advance(5.0)
    before = b.view(5.0).iterations
    b.set_slow(2.5, 5.0)
    b.advance(10.0)
    during = b.view(10.0).iterations - before
    b.set_slow(1.0, 10.0)
    for engine in (a, b):
        engine.advance(1000.0)
    assert during == pytest.approx(5 / (0.0291 * 2.5), abs=2)
    assert slowed.end_s - plain.end_s == pytest.approx(5 * (1 - 1 / 2.5), abs=0.1)


def test_death_ends_everything_as_error() -> None:
    """A dying replica ends what it holds as `error`, once, and is then empty."""
    requests = make_requests(50, 10.0, 1)
    engine = Engine(SPEC)
    for request in requests:
        engine.submit(request)
    engine.advance(4.0)
    engine.kill(4.0)
    engine.advance(100.0)
    assert sorted(r.number for r in engine.ended) == list(range(50))
    assert {r.status for r in requests} <= {"ok", "error"}
    assert engine.in_flight == 0
    assert engine.view(100.0).kv_usage == 0
