"""Waste and faults at replicas, GPUs and nodes: each finding opens, stays one, and is gone when its cause is gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.pool.findings import HOLD, Findings, Found
from schemas.columns import Columns
from schemas.log import CONTENT_ARROW, LogRecord
from schemas.signals import GPU_WINDOWS, INTERFERENCE_WINDOWS, NODE_WINDOWS, WindowName
from tests.models.law import check_bounds, check_law, tick
from tests.models.pool.signals import T0, at, config, engine_window, pool_config, pool_fold, request_window

Row = dict[str, Any]
REQUEST = {"tenant": "acme", "arrivals": 30, "ends": 30, "slo_judged": 30, "slo_good": 30}
BUSY = {"running_mean": 20.0, "running_last": 20.0, "kv_usage_ratio_mean": 0.4, "running_max": 256.0}
GPU = {"node": "n0", "gpu": 3, "gpu_type": "H100", "status": "ok", "samples": 10, "covered_s": 10.0}
NODE = {"node": "n0", "gpu_type": "H100", "gpus": 8.0, "gpus_allocated": 5.0, "gpus_free": 3.0, "gpus_lost": 0.0}
NODE |= {"replicas": 1, "dropped": 4.0}
VICTIM = {"replica": "r0", "node": "n0", "victim": 1, "antagonist": "noisy", "antagonist_pool": "batch", "windows": 99}
VICTIM |= {"slowdown": 1.25, "slowdown_low": 1.2, "slowdown_high": 1.3, "pressure": 0.6, "graded": 1}


def window(
    kind: Columns, second: float, start_s: int, version: int, rows: list[Row], pool: str = "chat", partition: int = 0
) -> LogRecord:
    """A closed window of a partition of node.samples."""
    data = {name: [row.get(name) for row in rows] for name in kind.columns}
    meta = WindowName(pool, f"node.samples/{partition}", start_s, version, second, True).meta()
    return at(second, kind.type, kind.encode(data, meta), pool, CONTENT_ARROW)


class World:
    """A pool `chat`; what each window says is given as functions of its number. Silent where they give nothing."""

    def __init__(self, **spec: Any) -> None:
        self.spec = spec
        self.engines: Callable[[int], list[Row]] = lambda k: [{"replica": f"r{i}", **BUSY} for i in range(3)]
        self.requests: Callable[[int], Row] = lambda k: REQUEST
        self.gpus: Callable[[int], list[Row]] = lambda k: []
        self.free_gpus: Callable[[int], list[Row]] = lambda k: []
        self.nodes: Callable[[int], list[Row]] = lambda k: []
        self.victims: Callable[[int], list[Row]] = lambda k: []

    def records(self, windows: int) -> list[LogRecord]:
        found = [pool_config(T0, **self.spec), config(T0, "price", "H100", {"usd_per_gpu_hour": 3.6})]
        for k in range(windows):
            start = T0 + 10 * k
            found += [
                engine_window(start + 10.1, start, k + 1, self.engines(k)),
                request_window(start + 10.2, start, k + 1, [{**REQUEST, **self.requests(k)}]),
            ]
            for kind, pool, rows in (
                (GPU_WINDOWS, "chat", self.gpus(k)),
                (GPU_WINDOWS, "-", self.free_gpus(k)),
                (NODE_WINDOWS, "-", self.nodes(k)),
                (INTERFERENCE_WINDOWS, "chat", self.victims(k)),
            ):
                if rows:
                    found.append(window(kind, start + 10.3, start, k + 1, rows, pool))
            found += [tick(start + 10.4 + second) for second in range(10)]
        return [record._replace(offset=offset) for offset, record in enumerate(found)]

    def said(self, windows: int, kind: str) -> list[Row]:
        """All findings of a kind, in order."""
        out = pool_fold().apply(self.records(windows))
        bodies = [json.loads(result.value) for result in out if result.topic == "findings"]
        return [body for body in bodies if body["finding"] == kind]


def story(said: list[Row]) -> Row:
    """The first word of a finding that opened once, was never opened again and is over."""
    assert {row["subject"] for row in said} == {said[0]["subject"]}
    assert {row["since_s"] for row in said} == {said[0]["since_s"]}
    assert [row["open"] for row in said] == [True] * (len(said) - 1) + [False]
    assert len(said) <= 5
    return said[0]


def during(first: int, last: int, then: Any, otherwise: Any) -> Callable[[int], Any]:
    return lambda k: then if first <= k < last else otherwise


def test_nothing_is_wrong() -> None:
    """Busy replicas on well GPUs, whole nodes and neighbours that do no harm: no finding at all."""
    world = World()
    world.gpus = lambda k: [
        {**GPU, "throttled_s": 0.5, "mem_gone_bytes": 1e6, "ecc_uncorrected": 0.0, "remap_pending": 0}
    ]
    world.nodes = lambda k: [{**NODE, "gpus_free": 4.0}, {**NODE, "node": "n1", "gpus_free": 0.0}]
    world.victims = lambda k: [{**VICTIM, "victim": 0, "slowdown": 1.0}]
    out = pool_fold().apply(world.records(40))
    assert [json.loads(result.value) for result in out if result.topic == "findings"] == []


def test_an_idle_replica_is_told_of_alone() -> None:
    """One of three has nothing to do: it is named, with its own price, and gone once it is busy again."""
    world = World()
    nothing = {"running_mean": 0.0, "running_last": 0.0, "waiting_mean": 0.0}
    world.engines = lambda k: [
        {"replica": f"r{i}", **BUSY, **(nothing if i == 1 and 2 <= k < 20 else {})} for i in range(3)
    ]
    first = story(world.said(40, "idle_allocated"))
    assert (first["subject"], first["usd_per_hour"]) == ("r1", pytest.approx(14.4))
    assert first["text"] == "r1 is paid for and had nothing to do for 1 min (4 GPUs)"


SMALL = {"running_mean": 5.0, "waiting_mean": 9.0, "running_last": 5.0, "waiting_last": 9.0}


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        ({"kv_usage_ratio_mean": 0.97}, "KV-bound"),
        ({"kv_usage_ratio_mean": 0.6, "preemptions": 12.0}, "KV-bound"),
        ({"kv_usage_ratio_mean": 0.2, "prefill_s_sum": 40.0}, "prefill-bound"),
        (
            {"kv_usage_ratio_mean": 0.2, "prefill_s_sum": 3.0, "running_max": 5.0},
            "admission-bound: the engine admits 5",
        ),
        ({"kv_usage_ratio_mean": 0.2, "prefill_s_sum": 3.0}, "admission-bound: neither"),
        ({"kv_usage_ratio_mean": None}, "the engine does not say enough"),
    ],
)
def test_batching_collapse_by_cause(rows: Row, cause: str) -> None:
    """Requests wait while batches are a quarter of what they were: why, from what the engine says."""
    world = World()
    world.engines = lambda k: [
        {"replica": f"r{i}", **BUSY, **({**SMALL, **rows} if 5 <= k < 20 else {})} for i in range(3)
    ]
    first = story(world.said(40, "batching_collapse"))
    assert cause in first["text"]
    assert first["usd_per_hour"] == pytest.approx(3 * 14.4 * 0.75, rel=0.05)


def test_prefill_is_told_by_the_steps_model_where_that_is_known() -> None:
    """Where the step-time model has learned what a prompt token takes, it says how much of the steps prompts are."""

    def steps(k: int, prompts: float, running: float) -> Row:
        step_s = 0.02 + 0.0005 * running + 0.0001 * prompts
        count = 10.0 / step_s
        return {**BUSY, "running_mean": running, "iterations": count, "prompt_tokens": prompts * count}

    world = World()
    world.engines = lambda k: [
        {"replica": f"r{i}", **(steps(k, 20.0 + 15 * (k % 7) + i, 15.0 + k % 5) if k < 40 else steps(k, 600.0, 6.0))}
        | ({"waiting_mean": 9.0} if k >= 40 else {})
        for i in range(3)
    ]
    (first, *_) = world.said(50, "batching_collapse")
    assert "prefill-bound" in first["text"]
    assert first["evidence"]["prefill_share"] == pytest.approx(0.06 / (0.02 + 0.003 + 0.06), rel=0.1)


def test_a_batch_at_its_limit_with_an_empty_cache_is_a_collapse() -> None:
    """The largest batch is set too low: requests wait although the KV cache is mostly empty."""
    world = World()
    capped = {"running_mean": 16.0, "running_max": 16.0, "waiting_mean": 7.0, "kv_usage_ratio_mean": 0.2}
    world.engines = lambda k: [{"replica": "r0", **BUSY, **capped} if 3 <= k < 15 else {"replica": "r0", **BUSY}]
    first = story(world.said(30, "batching_collapse"))
    assert "admission-bound: the engine admits 16 together" in first["text"]


def test_few_requests_over_many_replicas_are_a_spread_collapse() -> None:
    """Ten replicas with two requests each where one has run twenty: eight could go, for their price."""
    world = World(mode="observe", reserve=0.0, capacity_rps=10.0)
    few = {"running_mean": 2.0, "running_last": 2.0}
    world.engines = lambda k: [
        {"replica": f"r{i}", **BUSY, **(few if 10 <= k < 50 else {})} for i in range(10 if k < 50 else 1)
    ]
    world.requests = lambda k: {"arrivals": 60} if k >= 10 else {"arrivals": 700}
    said = world.said(70, "spread_collapse")
    assert said[0]["text"].startswith("10 replicas run 2.0 requests each (one has run 20):")
    assert 0 < said[0]["usd_per_hour"] <= 9 * 14.4
    assert said[0]["since_s"] >= T0 + 100
    assert said[0]["at_s"] - said[0]["since_s"] >= HOLD["spread_collapse"][0]
    assert not said[-1]["open"]
    assert sum(not row["open"] for row in said) == 1


@pytest.mark.parametrize(
    ("kind", "fault", "usd", "words"),
    [
        ("gpu_lost", {"status": "lost"}, 3.6, "no longer answers"),
        ("gpu_errors", {"xid": 79}, None, "Xid 79 (the GPU has fallen off the bus)"),
        ("gpu_errors", {"remap_pending": 1}, None, "drain and reset"),
        ("gpu_errors", {"remap_failed": 1}, None, "replace the GPU"),
        ("gpu_errors", {"ecc_uncorrected": 2.0}, None, "2 memory errors that could not be corrected"),
        (
            "gpu_throttled",
            {"throttled_s": 5.0, "throttled_thermal_s": 4.0, "sm_clock_ratio_mean": 0.6},
            3.6 * 0.5 * 0.4,
            "by heat: look at its cooling, 50 % of the time; its clock was at 60 %",
        ),
        ("gpu_throttled", {"throttled_s": 5.0, "throttled_power_s": 4.0}, None, "by its power cap"),
        ("memory_held", {"mem_gone_bytes": 20 * 2**30, "mem_total_bytes": 80 * 2**30}, 0.9, "20.0 GiB (25 %)"),
    ],
)
def test_faults_of_a_gpu(kind: str, fault: Row, usd: float | None, words: str) -> None:
    """Each opens with the GPU's name and what it costs, and closes when the GPU is well."""
    world = World()
    world.gpus = during(4, 20, [{**GPU, **fault}], [GPU])
    first = story(world.said(100, kind))
    assert first["subject"] == "n0:3"
    assert first["usd_per_hour"] == (None if usd is None else pytest.approx(usd))
    assert words in first["text"]


@pytest.mark.parametrize("fault", [{"status": "lost"}, {"xid": 79}, {"mem_gone_bytes": 2e10}])
def test_faults_of_gpus_that_left_the_pool_are_over(fault: Row) -> None:
    """When the pool's last GPU is given back no window of it comes any more: that ends what was said of it."""
    world = World()
    world.gpus = during(4, 10, [{**GPU, **fault}], [])
    kind = {"status": "gpu_lost", "xid": "gpu_errors", "mem_gone_bytes": "memory_held"}[next(iter(fault))]
    story(world.said(100, kind))


def test_a_source_that_lags_takes_nothing_back() -> None:
    """A lost GPU stays one finding while the windows of another partition's nodes come sooner than its own."""
    world = World()
    world.gpus = lambda k: [{**GPU, "node": "n1"}]
    records = world.records(20)
    for k in range(18):
        start = T0 + 10 * k
        lost = [{**GPU, "status": "lost"}]
        second = start + (12.3 if k % 2 else 18.3)
        records.append(window(GPU_WINDOWS, second, start, k + 1, lost, partition=1))
    records.sort(key=lambda record: record.at_ms)
    out = pool_fold().apply([record._replace(offset=offset) for offset, record in enumerate(records)])
    said = [json.loads(result.value) for result in out if result.topic == "findings"]
    assert [row["open"] for row in said if row["finding"] == "gpu_lost"] == [True]


def test_memory_held_on_a_gpu_that_serves_nobody() -> None:
    """A GPU that serves no pool cannot be given to one while dead processes hold it: all of it is lost."""
    world = World()
    gone = {"mem_gone_bytes": 20 * 2**30, "mem_total_bytes": 80 * 2**30}
    world.free_gpus = during(4, 20, [{**GPU, **gone}], [GPU])
    first = story(world.said(40, "memory_held"))
    assert (first["pool"], first["subject"], first["usd_per_hour"]) == ("-", "n0:3", 3.6)


def test_a_dead_engine_is_seen_at_once() -> None:
    """A target that stops answering is a finding within a second of the row that says so, and over when it answers."""
    world = World()
    world.engines = lambda k: [{"replica": "r0", **BUSY}, {"replica": "r1", **BUSY, "answers": int(not 4 <= k < 20)}]
    said = world.said(40, "engine_dead")
    first = story(said)
    assert first["at_s"] - (T0 + 52.1) <= 1.0
    assert (first["subject"], first["usd_per_hour"]) == ("r1", 14.4)
    assert said[-1]["at_s"] - (T0 + 212) <= HOLD["engine_dead"][1] + 2


@pytest.mark.parametrize("state", ["starting", "asleep", "failed"])
def test_an_engine_that_need_not_answer_is_not_dead(state: str) -> None:
    """What starts, sleeps or has failed by the inventory is not told of a second time."""
    world = World()
    world.engines = lambda k: [{"replica": "r0", **BUSY}, {"replica": "r1", "state": state, "answers": 0}]
    assert world.said(20, "engine_dead") == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"node": "-", "gpus": 0.0}, "on which node it runs nobody has said"),
        ({"state": "unknown"}, "no inventory comes"),
    ],
)
def test_a_replica_of_unknown_place(row: Row, words: str) -> None:
    """A scraped engine that no inventory names."""
    world = World()
    world.engines = lambda k: [{"replica": "r0", **BUSY}, {"replica": "r1", **BUSY, **(row if 4 <= k < 20 else {})}]
    first = story(world.said(40, "node_unknown"))
    assert first["subject"] == "r1"
    assert words in first["text"]


def test_free_gpus_too_few_for_any_replica_are_fragmentation() -> None:
    """By node, with the price of what stands free, until something takes it."""
    world = World()
    world.nodes = lambda k: [
        {**NODE, "gpus_free": 3.0 if 2 <= k < 20 else 0.0},
        {**NODE, "node": "n1", "gpus_free": 4.0},
    ]
    first = story(world.said(40, "fragmentation"))
    assert (first["pool"], first["subject"], first["usd_per_hour"]) == ("-", "n0 (H100)", pytest.approx(10.8))
    assert first["text"] == "3 free H100 on n0 serve nothing: the smallest replica needs 4 on one node"
    world.nodes = lambda k: [{**NODE, "node": f"n{i}", "gpus_free": 2.0} for i in range(4)]
    assert world.said(20, "fragmentation")[0]["text"].endswith(
        "8 are stranded like this on all nodes, enough for 2 if packed"
    )


def test_gpus_that_no_pool_uses_are_no_fragmentation() -> None:
    """A type of which no pool has a policy is not judged."""
    world = World()
    world.nodes = lambda k: [{**NODE, "gpu_type": "A100"}]
    assert world.said(20, "fragmentation") == []


def test_lost_telemetry() -> None:
    """A counter of dropped batches that rises, also across a restart; what was lost long ago is not told again."""
    world = World()
    world.nodes = lambda k: [{**NODE, "gpus_free": 0.0, "dropped": 4.0 if k < 5 else 9.0 if k < 8 else 2.0}]
    said = world.said(60, "telemetry_lost")
    first = story(said)
    assert (first["subject"], first["severity"]) == ("n0", 5.0)
    assert "dropped 5 batches" in first["text"]
    assert any("dropped 7 batches" in row["text"] for row in said)


def test_interference_names_victim_antagonist_cost_and_windows() -> None:
    """One finding a victim, however many windows show it."""
    world = World()
    world.victims = during(4, 30, [VICTIM], [{**VICTIM, "victim": 0}])
    first = story(world.said(50, "interference"))
    assert (first["subject"], first["severity"]) == ("r0", 1.25)
    assert first["usd_per_hour"] == pytest.approx(14.4 * 0.2)
    assert first["text"] == (
        "r0 is slowed by noisy of pool batch: 1.25 x (1.20 to 1.30) the time per token that its own load explains, "
        "while it takes 60 % of what they share"
    )
    assert first["evidence"]["windows"] == [f"interference/chat/{T0 + 40}/node.samples/0@5"]
    assert first["evidence"]["tenants"] == ["acme"]


def test_slowness_without_a_cause_is_blamed_on_nobody() -> None:
    """Slower than its load and its neighbours explain, in several windows: a slow replica."""
    world = World()
    odd = {**VICTIM, "victim": 0, "antagonist": None, "slowdown": None, "unexplained": 1.3}
    world.victims = during(4, 20, [odd], [{**odd, "unexplained": None}])
    first = story(world.said(40, "slow_replica"))
    assert first["text"] == "r0 takes 1.30 x the time per token that its load explains; no neighbour explains it"
    assert world.said(40, "interference") == []


def test_slowness_that_ends_without_another_word_is_over() -> None:
    """A well replica without neighbours has no row: silence ends what was said of it."""
    world = World()
    odd = {**VICTIM, "victim": 0, "antagonist": None, "slowdown": None, "unexplained": 1.3}
    world.victims = during(4, 20, [odd], [])
    story(world.said(40, "slow_replica"))


def test_requests_that_only_the_wrong_reporter_tells_of() -> None:
    """Silence of the reporter that the policy names is said with what would end it, and is no word of zero traffic."""
    world = World()
    none = {"arrivals": 0, "ends": 0, "slo_judged": 0, "slo_good": 0, "unjoined": 30}
    world.requests = lambda k: none
    said = world.said(20, "stale_data")
    assert "apply `reporter: engine`" in said[-1]["text"]
    fold = pool_fold()
    fold.apply(world.records(20))
    assert fold.pools["chat"].windows.request_until == {}


@given(st.lists(st.booleans(), max_size=60), st.sampled_from(sorted(HOLD)))
def test_hysteresis(seen: list[bool], kind: Any) -> None:
    """Whatever flaps: a finding opens only after it was seen without a break for its time, closes only after it was not
    seen for its time, and opening and closing alternate."""
    findings = Findings()
    opens_s, closes_s = HOLD[kind]
    is_open = False
    for number, present in enumerate(seen):
        now = T0 + 10.0 * number
        said, _ = findings.update("chat", kind, {"x": Found("t", 1.0)} if present else {}, now, number)
        for one in said:
            assert one.open != is_open
            is_open = one.open
            back = int((opens_s if one.open else closes_s) // 10)
            recent = (
                seen[max(0, number - back) : number + 1] if one.open else seen[max(0, number - back + 1) : number + 1]
            )
            assert all(value == one.open for value in recent)
    again = Findings()
    again.restore(findings.state())
    assert again.state() == findings.state()


@settings(max_examples=15)
@given(st.data())
def test_law(data: st.DataObject) -> None:
    """The law of folds holds with nodes, GPUs without a pool, victims and everything that is wrong."""
    world = World()
    world.gpus = during(1, 5, [{**GPU, "xid": 48, "mem_gone_bytes": 2e10, "throttled_s": 9.0}], [GPU])
    world.free_gpus = during(2, 4, [{**GPU, "status": "lost"}], [GPU])
    world.nodes = lambda k: [{**NODE, "dropped": float(k)}]
    world.victims = during(2, 6, [VICTIM], [])
    world.engines = lambda k: [{"replica": f"r{i}", **BUSY, "answers": (k + i) % 2} for i in range(2)]
    check_law(pool_fold, world.records(9), data)


def test_bounds() -> None:
    """What is held of nodes has a bound as well."""
    check_bounds(pool_fold())
