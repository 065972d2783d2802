"""The fleet: requests, lifecycles, actions, money, faults."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.errors import InvalidInput
from simulator.events import Events
from simulator.fleet import Fleet
from simulator.ledger import Ledger, slo_met
from simulator.request import Request
from simulator.scenario import Scenario, Slo, load_scenario

Make = Callable[..., Scenario]


def run(fleet: Fleet, until_s: float, stride_s: float = 0.25) -> Events:
    """Advances in strides; gives all events."""
    total = Events([], [], [])
    n = 0
    start_s = fleet.now_s
    while fleet.now_s < until_s:
        n += 1
        for have, more in zip(total, fleet.advance(min(start_s + n * stride_s, until_s)), strict=True):
            have.extend(more)  # type: ignore[arg-type]
    return total


def rows(requests: list[Request]) -> list[tuple[Any, ...]]:
    return [
        (r.number, r.arrival_s, r.end_s, r.ttft_s, r.status, r.pool, r.replica, r.tenant, r.generated) for r in requests
    ]


def test_every_arrival_ends_once_with_every_kind_of_trouble(scenario: Make) -> None:
    """Through time-outs, rejections, a death, drains and a scale to zero, each arrival has exactly one end."""

    def change(data: dict[str, Any]) -> None:
        data["pools"][0]["engine"].update(timeout_s=8, queue_max=5)
        data["pools"][2]["backlog_max"] = 20
        data["faults"] = [
            {"kind": "death", "pool": "big", "at_s": 40},
            {"kind": "slow", "pool": "big", "at_s": 10, "factor": 6},
        ]

    fleet = Fleet(scenario(change))
    events = run(fleet, 60)
    fleet.scale("mini", 0, 1)
    for have, more in zip(events, run(fleet, 120), strict=True):
        have.extend(more)  # type: ignore[arg-type]
    fleet.scale("mini", 2, 2)
    fleet.load.take(300)  # the load stops: these never reach the fleet
    for have, more in zip(events, run(fleet, 290), strict=True):
        have.extend(more)  # type: ignore[arg-type]
    assert Counter(r.number for r in events.arrivals) == Counter(r.number for r in events.ends)
    assert set(Counter(r.number for r in events.ends).values()) == {1}
    assert {"ok", "error", "rejected"} <= {r.status for r in events.ends}
    assert all(r.end_s >= r.arrival_s for r in events.ends)
    assert [r.arrival_s for r in events.arrivals] == sorted(r.arrival_s for r in events.arrivals)


@settings(max_examples=8, deadline=None)
@given(stride_s=st.sampled_from([0.05, 0.17, 0.5, 3.3, 50.0]))
def test_strides_do_not_matter(stride_s: float) -> None:
    """The same actions at the same times give the same events however time is cut up."""
    results = []
    for stride in (0.25, stride_s):
        fleet = Fleet(load_scenario("demo"))
        parts = [run(fleet, 100.3, stride)]
        fleet.scale("chat-h100", 7, 1)
        fleet.set_replica_weights("chat-h100", {"chat-h100-1": 0.2}, 2)
        parts.append(run(fleet, 260, stride))
        results.append([(rows(p.arrivals), rows(p.ends), p.replicas) for p in parts] + [[fleet.cost_usd()]])
    assert results[0] == results[1]


def test_skipping_equals_single_steps_in_a_fleet(scenario: Make) -> None:
    """A fleet with neighbours that slow each other gives the same ends with and without the closed form."""
    skipped = run(Fleet(scenario()), 90).ends
    stepped = run(Fleet(scenario(), stepwise=True), 90).ends
    assert [(r.number, r.replica, r.status) for r in skipped] == [(r.number, r.replica, r.status) for r in stepped]
    assert [r.end_s for r in skipped] == pytest.approx([r.end_s for r in stepped], abs=1e-9)


def test_scale_is_absolute_idempotent_and_ordered_by_epoch(scenario: Make) -> None:
    """Said twice it changes nothing more; an older epoch, or the same with other content, changes nothing."""
    fleet = Fleet(scenario())
    assert fleet.scale("big", 3, 5).changed
    again = fleet.scale("big", 3, 5)
    assert again.applied
    assert not again.changed
    assert not fleet.scale("big", 1, 4).applied
    assert not fleet.scale("big", 1, 5).applied
    assert len(fleet.pools["big"].staying) == 3
    assert fleet.scale("old", 0, 1).applied  # epochs are counted for each pool
    assert fleet.set_replica_weights("big", {"big-0": 0.5}, 1).applied  # and each kind


def test_weights_are_ordered_by_epoch(scenario: Make) -> None:
    """An older set of weights never overwrites a newer one, for replicas and for pools."""
    fleet = Fleet(scenario())
    assert fleet.set_replica_weights("big", {"big-0": 0.0}, 7).changed
    assert not fleet.set_replica_weights("big", {"big-0": 1.0}, 6).applied
    assert not fleet.set_replica_weights("big", {"big-0": 0.0}, 7).changed
    assert fleet.set_pool_weights("chat", {"old": 0}, 3).changed
    assert not fleet.set_pool_weights("chat", {"big": 0.5, "old": 0.5}, 2).applied
    assert fleet.routes["chat"] == {"big": 1.0, "old": 0.0}
    assert {r.pool for r in run(fleet, 30).arrivals if r.route == "chat"} == {"big"}
    assert {r.replica for r in run(fleet, 60).arrivals if r.pool == "big"} == {"big-1"}


def test_dry_run_changes_nothing_and_says_what_would_be(scenario: Make) -> None:
    """A dry run tells how many replicas would start or stop, and leaves the fleet and its epochs as they are."""
    fleet = Fleet(scenario())
    outcome = fleet.scale("big", 9, 3, dry_run=True)
    assert (outcome.applied, outcome.reason) == (False, "would start 2 of 7")
    assert fleet.scale("big", 1, 3, dry_run=True).reason == "would stop 1"
    assert fleet.set_replica_weights("big", {"big-0": 0}, 3, dry_run=True).reason == "would apply"
    assert fleet.set_pool_weights("chat", {"old": 1}, 3, dry_run=True).reason == "would apply"
    assert len(fleet.pools["big"].staying) == 2
    assert fleet.pools["big"].weights == {}
    assert fleet.scale("big", 3, 1).changed


def test_cold_start_serves_only_when_ready_and_is_paid(scenario: Make) -> None:
    """A started replica costs from the start and gets its first request after the cold start."""
    fleet = Fleet(scenario())
    run(fleet, 10)
    before = fleet.cost_usd("big")
    fleet.scale("big", 3, 1)
    events = run(fleet, 60)
    changes = [(e.at_s, e.state) for e in events.replicas if e.replica == "big-2"]
    assert changes == [(10.0, "starting"), (40.0, "ready")]
    first = min(r.arrival_s for r in events.arrivals if r.replica == "big-2")
    assert first > 40.0
    assert fleet.cost_usd("big") - before == pytest.approx(3 * 4 * 6.88 * 50 / 3600)


def test_drain_loses_no_request(scenario: Make) -> None:
    """A drained replica gets nothing new, finishes what it holds, and only then is gone."""
    fleet = Fleet(scenario())
    events = run(fleet, 30)
    held = {name: r.engine.in_flight for r in fleet.pools["big"].replicas for name in [r.name]}
    fleet.scale("big", 1, 1)
    (leaving,) = [r.name for r in fleet.pools["big"].replicas if r.state == "draining"]
    assert held[leaving] == min(held.values())
    later = run(fleet, 120)
    assert not [r for r in later.arrivals if r.replica == leaving]
    sent = [r.number for r in events.arrivals if r.replica == leaving]
    done = [r.number for r in events.ends + later.ends if r.replica == leaving and r.status == "ok"]
    assert sorted(sent) == sorted(done)
    gone = [e.at_s for e in later.replicas if e.replica == leaving and e.state == "gone"]
    assert len(gone) == 1
    assert gone[0] >= max(r.end_s for r in later.ends if r.replica == leaving)


def test_starting_replicas_are_cancelled_first(scenario: Make) -> None:
    """Scaling down while some start cancels the newest of those and drains nobody."""
    fleet = Fleet(scenario())
    fleet.scale("big", 4, 1)
    run(fleet, 5)
    fleet.scale("big", 3, 2)
    assert [(r.name, r.state) for r in fleet.pools["big"].replicas] == [
        ("big-0", "ready"), ("big-1", "ready"), ("big-2", "starting"),
    ]  # fmt: skip
    assert [e.replica for e in fleet.advance(6).replicas if e.state == "cancelled"] == ["big-3"]


def test_more_than_the_gpus_is_refused_and_tried_again(scenario: Make) -> None:
    """Without GPUs a start is refused and counted; when GPUs come free the pool reaches what was asked."""

    def change(data: dict[str, Any]) -> None:
        data["pools"].append({**data["pools"][0], "name": "other", "route": "other", "replicas": 2})
        data["pools"][0]["replicas_max"] = 9

    fleet = Fleet(scenario(change))
    outcome = fleet.scale("big", 3, 1)
    assert not outcome.applied
    assert "no H100 node has 4 free GPUs" in outcome.reason
    assert fleet.pools["big"].refused_total == 1
    fleet.scale("other", 1, 1)
    run(fleet, 5)
    assert len(fleet.pools["big"].staying) == 3


def test_initial_replicas_must_fit(scenario: Make) -> None:
    """A scenario whose first replicas find no GPUs is refused with the pool, the number and the remedy."""
    with pytest.raises(InvalidInput, match=r"pools\.big\.replicas: 5: 1 of them find no H100 node"):
        Fleet(scenario(lambda d: d["pools"][0].update(replicas=5)))


def test_gpus_are_never_given_twice(scenario: Make) -> None:
    """Shares on a GPU never add up to more than 1, through any sequence of scales."""
    fleet = Fleet(scenario())
    for epoch, (big, old, mini) in enumerate([(4, 1, 4), (1, 0, 2), (3, 1, 4), (0, 1, 0), (4, 1, 4)]):
        fleet.scale("big", big, epoch)
        fleet.scale("old", old, epoch)
        fleet.scale("mini", mini, epoch)
        run(fleet, fleet.now_s + 40)
        used: Counter[tuple[int, int]] = Counter()
        for pool in fleet.pools.values():
            for replica in pool.replicas:
                for gpu in replica.slot.gpus:
                    used[(replica.slot.node, gpu)] += replica.slot.share  # type: ignore[assignment]
        assert max(used.values()) <= 1 + 1e-9
        for i, node in enumerate(fleet.cluster.nodes):
            assert node.free == pytest.approx([1 - used[(i, g)] for g in range(len(node.free))])


def test_cost_equals_the_integral(scenario: Make) -> None:
    """Cost is GPUs x share x price x allocated time, read off the events, drains and cancels and deaths included."""

    def change(data: dict[str, Any]) -> None:
        data["faults"] = [{"kind": "death", "pool": "big", "at_s": 33}]

    fleet = Fleet(scenario(change))
    parts = []
    for epoch, (until, n) in enumerate([(20.3, 4), (31.7, 2), (90.1, 3), (130, 0)]):
        parts += run(fleet, until).replicas
        fleet.scale("big", n, epoch)
    parts += run(fleet, 200).replicas
    begun: dict[str, float] = {}
    seconds = 0.0
    for event in parts:
        if event.pool != "big":
            continue
        begun.setdefault(event.replica, event.at_s)
        if event.state in ("gone", "failed", "cancelled"):
            seconds += event.at_s - begun.pop(event.replica)
    seconds += sum(fleet.now_s - at for at in begun.values())
    assert {"gone", "failed", "cancelled"} <= {e.state for e in parts}
    assert fleet.cost_usd("big") == pytest.approx(seconds * 4 * 6.88 / 3600)
    assert fleet.cost_usd("old") == pytest.approx(200 * 4 * 0.75 * 3.4309 / 3600)


def test_busy_neighbours_slow_each_other(scenario: Make) -> None:
    """A pool on shared GPUs is slower while its neighbour is busy, by its coefficient, and not without one."""

    def quiet(data: dict[str, Any]) -> None:
        data["load"][1]["rate_rps"] = 1e-6

    def median_tpot(fleet: Fleet) -> float:
        tpots = sorted(r.tpot_s for r in run(fleet, 200).ends if r.pool == "old" and r.tpot_s)
        return tpots[len(tpots) // 2]

    alone = median_tpot(Fleet(scenario(quiet)))

    def loud(data: dict[str, Any]) -> None:
        data["load"][1]["rate_rps"] = 12

    shared = Fleet(scenario(loud))
    (old,) = shared.pools["old"].replicas
    (mini,) = shared.pools["mini"].replicas
    assert set(mini.slot.gpus) <= set(old.slot.gpus)
    assert 1.25 * alone < median_tpot(shared) < 1.7 * alone


def test_a_slow_replica_is_seen_in_its_own_times_only_while_it_lasts(scenario: Make) -> None:
    """The victim's time per token rises by about the factor for the fault's duration and then returns."""

    def change(data: dict[str, Any]) -> None:
        data["pools"][0]["router"] = "round_robin"
        data["faults"] = [{"kind": "slow", "pool": "big", "replica": 1, "at_s": 60, "duration_s": 60, "factor": 3}]

    ends = run(Fleet(scenario(change)), 240).ends

    def mean(replica: str, low: float, high: float) -> float:
        tpots = [r.tpot_s for r in ends if r.replica == replica and low <= r.arrival_s and r.end_s <= high and r.tpot_s]
        return sum(tpots) / len(tpots)

    assert mean("big-1", 62, 120) > 2.5 * mean("big-0", 62, 120)
    assert mean("big-1", 160, 240) < 1.5 * mean("big-0", 160, 240)


@pytest.mark.parametrize("router", ["two_choices", "random", "round_robin", "least"])
def test_every_router_follows_the_weights(scenario: Make, router: str) -> None:
    """A quarter of the weight gets about a quarter of what the other gets; weight 0 gets nothing."""
    fleet = Fleet(scenario(lambda d: d["pools"][0].update(router=router, replicas=3)))
    fleet.set_replica_weights("big", {"big-0": 0.25, "big-2": 0.0}, 1)
    sent = Counter(r.replica for r in run(fleet, 300).arrivals if r.pool == "big")
    assert sent["big-2"] == 0
    # by load the light one gets somewhat more where few are in flight: the floor of one request
    assert 0.1 < sent["big-0"] / sent["big-1"] < 0.5


def test_all_weights_zero_serves_equally(scenario: Make) -> None:
    """A router whose replicas all have weight 0 does not drop what it could serve."""
    fleet = Fleet(scenario())
    fleet.set_replica_weights("big", {"big-0": 0.0, "big-1": 0.0}, 1)
    sent = Counter(r.replica for r in run(fleet, 60).arrivals if r.pool == "big")
    assert min(sent["big-0"], sent["big-1"]) > 0


def test_scale_from_zero_serves_what_waited(scenario: Make) -> None:
    """Requests that find no replica wait at the router and are served when one is ready."""
    fleet = Fleet(scenario(lambda d: d["pools"][2].update(replicas=0)))
    early = [r for r in run(fleet, 3).arrivals if r.pool == "mini"]
    fleet.scale("mini", 1, 1)
    run(fleet, 60)
    assert early
    assert {r.status for r in early} == {"ok"}
    assert all(r.ttft_s is not None and r.ttft_s >= 10 for r in early)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda f: f.scale("nope", 1, 1), "pool"),
        (lambda f: f.scale("big", -1, 1), "replicas"),
        (lambda f: f.set_replica_weights("big", {"big-0": math.nan}, 1), "weights.big-0"),
        (lambda f: f.set_replica_weights("big", {"big-0": -1}, 1), "weights.big-0"),
        (lambda f: f.set_pool_weights("nope", {"big": 1}, 1), "route"),
        (lambda f: f.set_pool_weights("chat", {"mini": 1}, 1), "weights"),
        (lambda f: f.set_pool_weights("chat", {"big": 0, "old": 0}, 1), "weights"),
        (lambda f: f.advance(-1), "until_s"),
    ],
)
def test_wrong_actions_are_refused_by_field(scenario: Make, call: Callable[[Fleet], Any], field: str) -> None:
    """A wrong action raises and names its field."""
    with pytest.raises(InvalidInput) as caught:
        call(Fleet(scenario()))
    assert caught.value.field == field


def test_ledger_adds_up(scenario: Make) -> None:
    """The ledger's totals are the events' own counts, the fleet's cost and the share of good requests."""
    fleet = Fleet(scenario())
    ledger = Ledger(fleet)
    arrivals: list[Request] = []
    ends: list[Request] = []
    for n in range(1, 401):
        events = fleet.advance(n * 0.25)
        ledger.add(events)
        arrivals += events.arrivals
        ends += events.ends
    report = ledger.report()
    assert report["arrivals"] == len(arrivals)
    assert report["ended"] == len(ends)
    assert report["slo_ok"] == sum(slo_met(r, fleet.pools[r.pool].spec.slo) for r in ends)
    assert report["cost_usd"] == pytest.approx(sum(p["cost_usd"] for p in report["pools"].values()))
    assert report["pools"]["mini"]["output_tokens"] == sum(
        r.generated for r in ends if r.pool == "mini" and r.status == "ok"
    )
    times = [r.arrival_s for r in arrivals if r.pool == "mini"]
    peak = max(sum(t - 60 < u <= t for u in times) for t in times) / 60
    assert report["pools"]["mini"]["peak_60s_rps"] == pytest.approx(peak)
    assert report["pools"]["mini"]["cost_usd_static_peak"] == pytest.approx(
        math.ceil(peak / 18) * 0.25 * 3.4309 * 100 / 3600
    )


def test_one_token_is_judged_by_its_first_alone() -> None:
    """A request with fewer than two output tokens has no time per token and is judged by TTFT."""
    request = Request(0, 0.0, "r", "t", "k", 10, 1)
    request.status, request.first_token_s, request.end_s, request.generated = "ok", 1.9, 1.9, 1
    assert slo_met(request, Slo())
    request.first_token_s = request.end_s = 2.1
    assert not slo_met(request, Slo())


@pytest.mark.parametrize("name", ["demo", "trace"])
def test_built_in_scenarios_are_what_the_demo_promises(name: str) -> None:
    """At least three pools, two GPU types, three tenants, 24 GPUs, and two pools on the same GPUs."""
    scenario = load_scenario(name)
    if name == "trace":
        data = scenario.model_dump(by_alias=True)
        data["load"] = [load for load in data["load"] if load["kind"] == "synthetic"]
        scenario = Scenario.model_validate(data)
    fleet = Fleet(scenario)
    assert len(fleet.pools) >= 3
    assert len({n.gpu_type for n in fleet.cluster.nodes}) >= 2
    assert len(scenario.tenants) >= 3
    assert sum(len(n.free) for n in fleet.cluster.nodes) >= 24
    on_gpu: dict[tuple[int, int], set[str]] = {}
    for pool in fleet.pools.values():
        for replica in pool.replicas:
            for gpu in replica.slot.gpus:
                on_gpu.setdefault((replica.slot.node, gpu), set()).add(pool.spec.name)
    assert any(len(pools) >= 2 for pools in on_gpu.values())


def test_wrong_scenarios_name_the_field(tmp_path: Any) -> None:
    """A file that is missing, not YAML, or wrong is refused with the field, the value and the remedy."""
    with pytest.raises(InvalidInput, match=r"one of demo, trace"):
        load_scenario("nowhere")
    path = tmp_path / "s.yaml"
    path.write_text("name: [")
    with pytest.raises(InvalidInput, match="valid YAML"):
        load_scenario(path)
    path.write_text("name: x\nseed: -1\n")
    with pytest.raises(InvalidInput, match="seed: -1"):
        load_scenario(path)


def test_names_must_agree(scenario: Make) -> None:
    """A fault, a load or an interference that names nobody is refused."""
    with pytest.raises(ValidationError, match="'nope' is not among the pools"):
        scenario(lambda d: d.update(faults=[{"kind": "slow", "pool": "nope", "at_s": 1}]))
    with pytest.raises(ValidationError, match="'nope' is not among the routes"):
        scenario(lambda d: d["load"][0].update(route="nope"))
    with pytest.raises(ValidationError, match="have the same name"):
        scenario(lambda d: d["pools"][1].update(name="big"))
