"""What a simulated fleet publishes: valid records that say what happened, and the configuration of its pools."""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from models.node.fold import NodeFold
from schemas.base import decode
from schemas.columns import COLUMNAR, Batch
from schemas.config import ConfigObject
from schemas.log import LogRecord
from schemas.node import NodeInventory
from schemas.signals import ENGINE_WINDOWS, INTERFERENCE_WINDOWS, NODE_WINDOWS
from simulator.fleet import Fleet
from simulator.ledger import Ledger
from simulator.publish import Publisher, ended_rows, scenario_config
from simulator.scenario import Scenario, load_scenario
from streams.clients import partition_of

Make = Callable[..., Scenario]
BASE_S = 1.7e9


class Sent(NamedTuple):
    topic: str
    key: str
    value: bytes
    type: str
    id: str
    partition: int | None
    content: str

    def batch(self) -> Batch:
        return COLUMNAR[self.type].decode(self.value)


class Recorder:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.sent: list[Sent] = []

    def send(
        self,
        topic: str,
        key: str,
        value: bytes,
        *,
        type: str,
        id: str,
        content_type: str = "",
        partition: int | None = None,
    ) -> None:
        self.sent.append(Sent(topic, key, value, type, id, partition, content_type))

    def of(self, kind: str) -> list[Sent]:
        return [s for s in self.sent if s.type == f"fleetloop.{kind}.v1"]


def run(
    scenario: Scenario, until_s: float, act: Callable[[Fleet], Any] | None = None
) -> tuple[Fleet, Ledger, Recorder, str]:
    fleet = Fleet(scenario)
    ledger, recorder, record = Ledger(fleet), Recorder(), io.StringIO()
    publisher = Publisher(fleet, recorder, BASE_S, 4, record)
    n = 0
    while fleet.now_s < until_s:
        n += 1
        if act is not None and n == 40:
            act(fleet)
        events = fleet.advance(0.25 * n)
        ledger.add(events)
        publisher.take(events)
        publisher.flush_requests()
        publisher.publish_nodes()
    return fleet, ledger, recorder, record.getvalue()


def test_request_rows_are_the_ledger(scenario: Make) -> None:
    """Every arrival and end is one valid row, in the partition of its id; the recorded lines say the same."""
    _, ledger, recorder, lines = run(scenario(), 60)
    seen: dict[tuple[str, str], int] = {}
    ends = Counter[str]()
    for sent in recorder.of("request.rows"):
        batch = sent.batch()
        assert batch.refused == []
        assert sent.key == batch.text("request_id")[0]
        for event, request_id, pool in zip(
            batch.text("event"), batch.text("request_id"), batch.text("pool"), strict=True
        ):
            assert None not in (event, request_id, pool)
            assert sent.partition == partition_of(request_id.encode(), 4)
            assert (event, request_id) not in seen
            seen[(event, request_id)] = 1
            ends[pool] += event == "end"
    report = ledger.report()
    assert sum(event == "arrival" for event, _ in seen) == report["arrivals"]
    assert ends == {name: pool["ended"] for name, pool in report["pools"].items()}
    recorded = ended_rows(lines.splitlines())
    assert len(recorded) == report["ended"]
    assert len(lines.splitlines()) == len(seen)
    assert len({s.id for s in recorder.sent}) == len(recorder.sent)


def test_ends_carry_what_the_engine_did(scenario: Make) -> None:
    """Latencies, tokens and statuses of the end rows are the requests' own, and unknown ones are null."""
    _, ledger, recorder, _ = run(scenario(lambda d: d["pools"][2].update(replicas=0, backlog_max=5)), 30)
    statuses: Counter[str] = Counter()
    for sent in recorder.of("request.rows"):
        b = sent.batch()
        for i, (event, status) in enumerate(zip(b.text("event"), b.text("status"), strict=True)):
            if event == "arrival":
                assert status is None
                assert np.isnan(b.numbers["e2e_s"][i])
                continue
            statuses[str(status)] += 1
            assert np.isnan(b.numbers["ttft_s"][i]) == (status != "ok")
            if status == "ok":
                tpot_s = b.numbers["tpot_s"][i]
                n = b.numbers["output_tokens"][i]
                expected = b.numbers["ttft_s"][i] + (0 if n < 2 else tpot_s * (n - 1))
                assert b.numbers["e2e_s"][i] == pytest.approx(expected)
                assert np.isnan(tpot_s) == (n < 2)
    assert statuses == sum((p.status for p in ledger.pools.values()), Counter())
    assert {"ok", "rejected"} <= set(statuses)


def test_samples_are_valid_and_once_a_second(scenario: Make) -> None:
    """Every node sends valid GPU rows for all its GPUs about once a second, staggered, with numbered batches."""
    fleet, _, recorder, _ = run(scenario(), 20)
    by_node = defaultdict(list)
    for sent in recorder.of("gpu.samples"):
        batch = sent.batch()
        assert batch.refused == []
        assert batch.meta["node"] == sent.key
        by_node[sent.key].append(batch)
    assert set(by_node) == {n.name for n in fleet.cluster.nodes}
    for name, batches in by_node.items():
        assert [b.meta["seq"] for b in batches] == [str(i) for i in range(len(batches))]
        at = [b.numbers["at_s"][0] for b in batches]
        assert len(at) == pytest.approx(20, abs=1)
        assert np.diff(at) == pytest.approx(1.0, abs=0.26)
        size = len(next(n for n in fleet.cluster.nodes if n.name == name).free)
        assert {b.rows for b in batches} == {size}
        energy = np.array([b.numbers["energy_j"] for b in batches])
        assert bool((np.diff(energy, axis=0) > 0).all())
    # An idle GPU draws idle power; one that serves draws more.
    last = by_node["h-1"][-1].numbers
    assert bool((last["util_gpu_pct"] == 0).all())
    assert last["power_w"] == pytest.approx(70.0)
    assert bool((by_node["h-0"][-1].numbers["power_w"] > 150).all())


def test_engine_counters_add_up_to_what_was_served(scenario: Make) -> None:
    """The last counters of the replicas are the requests and tokens of the end rows (up to what still runs)."""
    fleet, ledger, recorder, _ = run(scenario(), 60)
    last: dict[str, dict[str, float]] = {}
    for sent in recorder.of("engine.samples"):
        batch = sent.batch()
        assert batch.refused == []
        for i, name in enumerate(batch.text("replica")):
            row = {k: float(v[i]) for k, v in batch.numbers.items()}
            before = last.get(str(name), dict.fromkeys(row, 0.0))
            for counter in ("prompt_tokens", "generation_tokens", "requests", "iterations", "e2e_s_sum"):
                assert row[counter] >= before[counter]
            assert row["running"] <= 256
            last[str(name)] = row
    assert set(last) == {r.name for p in fleet.pools.values() for r in p.replicas}
    served = sum(row["requests"] for row in last.values())
    assert served == pytest.approx(sum(p.status["ok"] for p in ledger.pools.values()), abs=30)
    assert all(row["ttft_count"] >= row["requests"] for row in last.values())


def test_latencies_are_counted_in_buckets_and_sums_alike(scenario: Make) -> None:
    """Every 5 s the buckets hold as many latencies as the counters of the same scrape, and each where it belongs; the
    time between tokens is the time per token of what was served."""
    _, _, recorder, _ = run(scenario(), 60)
    scrapes: dict[tuple[str, float], dict[str, float]] = {}
    for sent in recorder.of("engine.samples"):
        batch = sent.batch()
        for i, name in enumerate(batch.text("replica")):
            row = {k: float(v[i]) for k, v in batch.numbers.items()}
            scrapes[str(name), row["at_s"]] = row
            assert row["running"] <= row["running_max"]
            assert (row["scrape"] == 1) == np.isnan(row["since_s"])
            if row["scrape"] > 1:
                assert scrapes[str(name), row["since_s"]]["scrape"] == row["scrape"] - 1
    looked = 0
    for sent in recorder.of("engine.histograms"):
        batch = sent.batch()
        assert batch.refused == []
        at, bins = batch.numbers["at_s"], batch.pairs["bins"]
        for i, (name, metric) in enumerate(zip(batch.text("replica"), batch.text("metric"), strict=True)):
            row, flat = scrapes[str(name), float(at[i])], bins[i]
            assert flat is not None
            label = str(metric).removesuffix("_s")
            assert flat[-1] == row[f"{label}_count"]
            counts = np.diff(np.append(flat[1::2], flat[-1]), prepend=0.0)
            low, high = np.append(0.0, flat[:-1:2]), np.append(flat[:-1:2], np.inf)
            used = counts > 0
            assert (counts * low)[used].sum() <= row[f"{label}_s_sum"] <= (counts[used] * high[used]).sum() + 1e-9
            looked += used.any()
    assert looked > 20
    last = {name: row for (name, _), row in scrapes.items() if row["tpot_count"] > 30}
    assert last
    for row in last.values():
        tpot_s = row["tpot_s_sum"] / row["tpot_count"]
        assert row["itl_s_sum"] / row["itl_count"] == pytest.approx(tpot_s, rel=0.25)


def test_processes_are_the_replicas(scenario: Make) -> None:
    """One process a replica and GPU, with one pid for good; what all take of a GPU is no more than all of it."""
    fleet, _, recorder, _ = run(scenario(), 60)
    pids: dict[tuple[str, str, float], float] = {}
    busy = 0.0
    for sent in recorder.of("process.samples"):
        batch = sent.batch()
        assert batch.refused == []
        held: dict[float, float] = defaultdict(float)
        for i, name in enumerate(batch.text("replica")):
            gpu, pid = float(batch.numbers["gpu"][i]), float(batch.numbers["pid"][i])
            assert pids.setdefault((sent.key, str(name), gpu), pid) == pid
            held[gpu] += float(batch.numbers["mem_bytes"][i])
            busy = max(busy, float(batch.numbers["sm_util_pct"][i]))
        assert max(held.values()) <= 80 * 2**30
    assert busy > 10
    assert len({(node, pid) for (node, _, _), pid in pids.items()}) == len(pids)
    assert {name for _, name, _ in pids} == {r.name for p in fleet.pools.values() for r in p.replicas}


def test_the_node_level_takes_all_of_it(scenario: Make) -> None:
    """The node fold refuses nothing that is published, and its windows have what was."""
    _, _, recorder, _ = run(scenario(), 60)
    fold = NodeFold("node.samples", 0, {"node.samples": 1, "pool.signals": 1})
    records = [
        LogRecord(offset, round((BASE_S + offset * 0.01) * 1000), s.type, s.key, s.value, s.content, s.id)
        for offset, s in enumerate(s for s in recorder.sent if s.topic == "node.samples")
    ]
    step_s = 60 / len(records)
    out = fold.apply([r._replace(at_ms=round((BASE_S + 0.5 + r.offset * step_s) * 1000)) for r in records])
    assert not [r for r in out if r.topic == "dead.letters"]
    told = [ENGINE_WINDOWS.decode(r.value) for r in out if r.type == ENGINE_WINDOWS.type]
    known = {name for batch in told for name, values in batch.numbers.items() if not np.isnan(values).all()}
    assert {"kv_capacity_tokens", "busy_s", "itl_count", "idle_s", "ttft_s_p99", "power_w_mean", "throttled_s"} <= known
    assert any(r.type == NODE_WINDOWS.type for r in out)
    assert any(r.type == INTERFERENCE_WINDOWS.type for r in out)


def test_inventory_on_change_and_every_thirty_seconds(scenario: Make) -> None:
    """A node says who is on it at the start, within a publication after every change, and every 30 s."""

    def change(data: dict[str, Any]) -> None:
        data["faults"] = [{"kind": "death", "pool": "mini", "at_s": 50}]

    _, _, recorder, _ = run(scenario(change), 100, lambda fleet: fleet.scale("big", 3, 1))
    by_node = defaultdict(list)
    for sent in recorder.of("node.inventory"):
        by_node[sent.key].append(decode(NodeInventory, sent.value))
    for records in by_node.values():
        at = [r.at_s - BASE_S for r in records]
        assert at[0] <= 0.25
        assert max(np.diff([*at, 100.0])) <= 30.5
    states = [(r.at_s - BASE_S, e.state) for r in by_node["h-1"] for e in r.replicas if e.replica == "big-2"]
    assert states[0] == (pytest.approx(10.0, abs=0.5), "starting")
    assert next(at for at, state in states if state == "ready") == pytest.approx(39.75, abs=0.6)
    shown = [(r.at_s - BASE_S, e.state, e.billed) for r in by_node["a-0"] for e in r.replicas if e.replica == "mini-0"]
    assert (pytest.approx(50.0, abs=0.3), "failed", False) in shown
    assert all(e.gpu_share == 0.75 for r in by_node["a-0"] for e in r.replicas if e.pool == "old")


def test_a_slow_replica_shows_why(scenario: Make) -> None:
    """The GPUs of a replica that is slow throttle: clock down, thermal reason set, counter running."""
    change = {"kind": "slow", "pool": "big", "replica": 0, "at_s": 5, "duration_s": 60, "factor": 2.5}
    fleet, _, recorder, _ = run(scenario(lambda d: d.update(faults=[change])), 20)
    slow = fleet.pools["big"].replicas[0]
    last = (
        [s for s in recorder.of("gpu.samples") if s.key == fleet.cluster.nodes[slow.slot.node].name][-1].batch().numbers
    )
    hot = np.isin(last["gpu"], slow.slot.gpus)
    assert bool((last["throttle_mask"][hot] > 0).all())
    assert bool((last["throttle_mask"][~hot] == 0).all())
    assert last["sm_clock_mhz"][hot] == pytest.approx(1980 / 2.5)
    assert bool((last["throttle_thermal_ns"][hot] > 10e9).all())


@pytest.mark.parametrize("name", ["demo", "trace"])
def test_configuration_of_a_scenario_is_valid_and_whole(name: str) -> None:
    """Every pool, GPU type and tenant of a scenario becomes an object that its schema takes, and so does the fleet."""
    scenario = load_scenario(name)
    objects = [decode(ConfigObject, item.encode()) for item in scenario_config(scenario)]
    names = defaultdict(list)
    for item in objects:
        item.typed()
        names[item.object_kind].append(item.name)
    assert names["pool"] == [p.name for p in scenario.pools]
    assert names["price"] == list(scenario.gpus)
    assert names["tenant"] == [t.name for t in scenario.tenants]
    assert names["fleet"] == ["fleet"]
    assert json.loads(objects[-1].encode())["revision"] == 1
