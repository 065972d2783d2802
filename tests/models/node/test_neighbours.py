"""Processes, who is near whom, and what replicas have of the GPUs that they share."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.node import closing
from models.node.engines import engine_table
from models.node.interference import Neighbour, Observed
from models.node.neighbours import neighbours
from schemas.log import LogRecord, Result
from schemas.signals import ENGINE_WINDOWS, INTERFERENCE_WINDOWS
from tests.models.law import log, run, tick
from tests.models.node.logs import T0, engine, final, fold, gpu, inventory, process, replica, windows

Row = dict[str, Any]


def watch(
    records: list[LogRecord], monkeypatch: pytest.MonkeyPatch, start: int = T0, **limits: int
) -> dict[str, Observed]:
    """Replica -> what the closed window at `start` says of it."""
    one = fold()
    one.limits = one.limits.model_copy(update=limits)
    told: dict[int, list[Observed]] = {}

    def step(start_s: float, seen: Any, limits: Any) -> dict[str, Any]:
        assert int(start_s) not in told, "a window is judged once"
        told[int(start_s)] = list(seen)
        return {}

    monkeypatch.setattr(one.interference, "step", step)
    run(one, log(*sorted([*records, tick(T0 + 12), tick(T0 + 22)], key=lambda r: r.at_ms)))
    return {item.replica: item for item in told.get(start, [])}


def busy(at: float, *names: str, **more: Any) -> LogRecord:
    rows = [{"replica": n, "at_s": at, "status": "ok", "start_s": T0 - 500.0, **more} for n in names]
    return engine(at, rows)


def serving(*names: str) -> list[LogRecord]:
    return [busy(T0 + t, *names, generation_tokens=100.0 * t) for t in (0.0, 5.0, 10.0)]


def taking(pid: int, sm: float | None, at: float = T0 + 10.0, **more: Any) -> Row:
    return {"gpu": 0, "at_s": at, "pid": pid, "name": "python", "sm_util_pct": sm, **more}


def shared(*names: str, **more: Any) -> LogRecord:
    return inventory(T0 - 5.0, [replica(n, gpus=[0], gpu_share=0.5, **more) for n in names])


def test_measured_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pressure of a neighbour is the larger of its shares, over its processes; its own are none."""
    rows = [taking(1, 20.0, replica="a"), taking(2, 30.0, replica="b", mem_util_pct=10.0), taking(3, 15.0, replica="b")]
    rows.append(taking(4, 5.0, mem_util_pct=70.0))
    seen = watch([shared("a", "b"), *serving("a", "b"), process(T0 + 10.0, rows)], monkeypatch)
    assert seen["a"].neighbours == [
        Neighbour("4/python", "", 0.7, True),
        Neighbour("b", "chat", pytest.approx(0.45), True),
    ]
    assert [n.name for n in seen["b"].neighbours] == ["4/python", "a"]


def test_presence_alone_says_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither processes nor the engine's own counters tell how busy it is, a neighbour is there, ungraded."""
    seen = watch([shared("a", "b"), *serving("a", "b")], monkeypatch)
    assert seen["a"].neighbours == [Neighbour("b", "chat", 1.0, False)]
    unknown = watch([shared("a"), *serving("a"), process(T0 + 10.0, [taking(4, None)])], monkeypatch)
    assert unknown["a"].neighbours == [Neighbour("4/python", "", 1.0, False)]


def test_busy_engine_stands_in_for_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes are not seen, a replica presses as much as its engine is busy, else as its batch is full."""
    records = [shared("a", "b", "c"), *serving("a")]
    for t in (0.0, 10.0):
        records += [busy(T0 + t, "b", generation_tokens=t, busy_s=t * 0.3)]
        records += [busy(T0 + t, "c", generation_tokens=t, running=4.0, running_max=16.0)]
    near = {n.name: n for n in watch(records, monkeypatch)["a"].neighbours}
    assert near == {
        "b": Neighbour("b", "chat", pytest.approx(0.3), True),
        "c": Neighbour("c", "chat", pytest.approx(0.25), True),
    }


def test_mig_instances_are_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas on two instances of one GPU are no neighbours; two on the same instance are."""
    held = [replica("a", gpus=[16]), replica("b", gpus=[17]), replica("c", gpus=[17])]
    records = [inventory(T0 - 5.0, held), *serving("a", "b", "c")]
    seen = watch([*records, process(T0 + 10.0, [taking(3, 50.0, gpu=17, replica="c")])], monkeypatch)
    assert {name: [n.name for n in item.neighbours] for name, item in seen.items()} == {"a": [], "b": ["c"], "c": ["b"]}


def test_host_cpu_makes_neighbours_across_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes a good part of the host's CPUs is near everybody on the node; who takes little is not."""
    held = [replica("a", gpus=[0]), replica("b", gpus=[1])]
    rows = [
        taking(pid, 0.0, T0 + t, gpu=1, cpu_s=share * 8 * t, host_cpus=8.0, replica="b" if pid == 2 else None)
        for t in (0.0, 10.0)
        for pid, share in ((2, 0.5), (3, 0.01))
    ]
    records = [inventory(T0 - 5.0, held), *serving("a", "b"), process(T0 + 10.0, rows)]
    assert watch(records, monkeypatch)["a"].neighbours == [Neighbour("b", "chat", pytest.approx(0.5), True)]


def test_reading_speaks_for_the_time_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading tells of the time since the one before it, at most 15 s: windows weigh it by what lies in them."""
    rows = [taking(4, 100.0, T0 + 4.0), taking(4, 20.0, T0 + 9.0), taking(4, 0.0, T0 + 19.0)]
    seen = watch([shared("a"), *serving("a"), process(T0 + 19.0, rows)], monkeypatch, T0 - 10)
    assert seen == {}  # before `a` served
    late = watch([shared("a"), *serving("a"), process(T0 + 11.0, rows[:2])], monkeypatch)
    assert late["a"].neighbours == [Neighbour("4/python", "", pytest.approx((4 * 1.0 + 5 * 0.2) / 9), True)]


def test_neighbours_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with the greatest pressure are kept."""
    rows = [taking(pid, float(pid)) for pid in range(1, 9)]
    seen = watch([shared("a"), *serving("a"), process(T0 + 10.0, rows)], monkeypatch, neighbours_max=3)
    assert [n.name for n in seen["a"].neighbours] == ["8/python", "7/python", "6/python"]


def test_processes_are_bounded_and_forgotten() -> None:
    """Processes of a node beyond the bound are refused and counted; those that are gone make room."""
    one = fold()
    one.limits = one.limits.model_copy(update={"processes_per_node_max": 2})
    run(one, log(process(T0 + 1.0, [taking(pid, 1.0, T0 + 1.0) for pid in (1, 2, 3)])))
    assert (one.counters["overflow_processes_total"], one.metrics()["processes"]) == (1, 2)
    run(one, [tick(T0 + t)._replace(offset=9 + t) for t in range(2, 200, 5)])
    assert one.metrics()["processes"] == 0
    run(one, [process(T0 + 200.0, [taking(9, 1.0, T0 + 200.0)])._replace(offset=999)])
    assert one.metrics()["processes"] == 1


def test_interference_is_judged_once() -> None:
    """A window is judged when it closes and never again, though its rows are revised."""
    rows = [taking(2, 50.0, replica="b")]
    records = [shared("a", "b"), *serving("a", "b"), process(T0 + 10.0, rows), tick(T0 + 12)]
    late = busy(T0 + 7.0, "a", generation_tokens=1.0)._replace(at_ms=(T0 + 14) * 1000)
    out = run(fold(), log(*records, late, tick(T0 + 16), tick(T0 + 17)))
    versions = [n.version for n, _ in windows(out, INTERFERENCE_WINDOWS) if n.start_s == T0]
    revised = [n.version for n, _ in windows(out, ENGINE_WINDOWS) if n.start_s == T0 and n.closed]
    assert len(versions) == 1
    assert len(revised) > 1


# -- what replicas have of their GPUs ----------------------------------------------------------------------------


def of_gpus(records: list[LogRecord]) -> dict[str, Row]:
    out: list[Result] = run(fold(), log(*sorted([*records, tick(T0 + 12)], key=lambda r: r.at_ms)))
    return {row["replica"]: row for row in final(out, ENGINE_WINDOWS)[("chat", T0)]}


def powered(*gpus: int, **more: Any) -> list[LogRecord]:
    return [
        gpu(T0 + t, [{"gpu": g, "at_s": T0 + t, "power_w": 400.0, "energy_j": 400.0 * t, **more} for g in gpus])
        for t in (0.0, 10.0)
    ]


def test_replica_has_the_means_of_its_gpus() -> None:
    """Activity and clocks are means over its GPUs, power and energy sums, throttling the longest."""
    rows = powered(0, sm_active_ratio=0.2, throttle_power_ns=0.0, sm_clock_mhz=1000.0, sm_clock_max_mhz=2000.0)
    rows += powered(1, sm_active_ratio=0.6)
    slow = [{"gpu": 0, "at_s": T0 + 9.0, "throttle_power_ns": 2e9}]
    got = of_gpus([inventory(T0 - 5.0, [replica(gpus=(0, 1))]), *rows, gpu(T0 + 9.0, slow)])["r1"]
    assert (got["sm_active_ratio_mean"], got["sm_clock_ratio_mean"], got["throttled_s"]) == (pytest.approx(0.4), 0.5, 2)
    assert (got["power_w_mean"], got["energy_j"]) == (800, 8000)


def test_power_of_a_shared_gpu_is_split() -> None:
    """By the SM time of the processes where it is known of all who share; else by the share that is billed; whoever is
    alone draws all of it. The shares add up to the whole."""
    held = [replica("a", gpus=[0], gpu_share=0.25), replica("b", gpus=[0], gpu_share=0.75)]
    records = [inventory(T0 - 5.0, held), *powered(0)]
    by_bill = of_gpus(records)
    assert (by_bill["a"]["energy_j"], by_bill["b"]["energy_j"]) == (1000, 3000)
    both = [taking(1, 30.0, replica="a"), taking(2, 10.0, replica="b")]
    by_use = of_gpus([*records, process(T0 + 10.0, both)])
    assert [by_use[name]["energy_j"] for name in "ab"] == pytest.approx([3000, 1000])
    assert of_gpus([*records, process(T0 + 10.0, both[:1])])["a"]["energy_j"] == 1000
    alone = of_gpus([inventory(T0 - 5.0, held[:1]), *powered(0)])
    assert alone["a"]["energy_j"] == 4000


def test_power_is_not_counted_twice() -> None:
    """Where shares that are billed add up to more than a GPU, what is drawn is still drawn once."""
    both = of_gpus([inventory(T0 - 5.0, [replica("a", gpus=[0]), replica("b", gpus=[0])]), *powered(0)])
    assert [both[name]["energy_j"] for name in "ab"] == [2000, 2000]


def test_reading_after_the_end_revises() -> None:
    """A process that is first read after a window has closed speaks for that window too, and it is revised."""
    held = [replica("a", gpus=[0], gpu_share=0.25), replica("b", gpus=[0], gpu_share=0.75)]
    both = [taking(1, 30.0, T0 + 13.0, replica="a"), taking(2, 10.0, T0 + 13.0, replica="b")]
    records = [inventory(T0 - 5.0, held), *powered(0), tick(T0 + 12), process(T0 + 13.0, both), tick(T0 + 22)]
    found = final(run(fold(), log(*sorted(records, key=lambda r: r.at_ms))), ENGINE_WINDOWS)[("chat", T0)]
    assert [row["energy_j"] for row in found] == pytest.approx([3000, 1000])


def test_silent_gpus_leave_replicas_unknown() -> None:
    """Without samples of its GPUs nothing is said of them."""
    got = of_gpus([inventory(T0 - 5.0, [replica()]), busy(T0 + 1.0, "r1")])["r1"]
    assert [got[name] for name in ("sm_active_ratio_mean", "power_w_mean", "energy_j", "throttled_s")] == [None] * 4


@pytest.mark.parametrize(
    ("counters", "want"),
    [
        ({"itl_s_sum": 2.0, "itl_count": 100.0, "tpot_s_sum": 9.0, "tpot_count": 9.0}, 0.02),
        ({"tpot_s_sum": 3.0, "tpot_count": 100.0}, 0.03),
        ({"running": 5.0}, 5.0 * 10 / 1000),
        ({}, None),
    ],
)
def test_time_per_token_is_the_best_known(counters: Row, want: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between tokens, else of finished requests, else from batch and throughput; else unknown."""
    records = [inventory(T0 - 5.0, [replica()])]
    for t in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10):
        grown = {name: value if name == "running" else value * t / 10 for name, value in counters.items()}
        records.append(busy(T0 + float(t), "r1", generation_tokens=100.0 * t, **grown))
    got = watch(records, monkeypatch)["r1"]
    assert got.tpot_s == (None if want is None else pytest.approx(want))
    assert (got.tokens, got.covered_s, got.accepted) == (1000, 10, 1)


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 100)), max_size=6))
def test_pressure_is_a_share(drawn: list[tuple[int, float]]) -> None:
    """Whatever processes say, pressures lie in 0..1 and come greatest first."""
    one = fold()
    rows = [taking(pid, sm, replica=("b", "c", None)[which]) for pid, (which, sm) in enumerate(drawn)]
    records = [shared("a", "b", "c"), *serving("a", "b", "c")]
    if rows:
        records.append(process(T0 + 10.0, rows))
    run(one, log(*records))
    table = engine_table(one.engine_samples.series(), one.holdings, one.texts, T0, T0 + 12.0, one.limits)
    near, _ = neighbours(table, one.holdings, one.processes.table(one.texts, T0, one.limits), 8)
    for found in near:
        pressures = [n.pressure or 0.0 for n in found]
        assert pressures == sorted(pressures, reverse=True)
        assert all(0 <= p <= 1 for p in pressures)
    assert len(closing.observed(table, one.holdings, near)) == 3
