"""The node fold: the law, any order of arrival, what windows say, money at state changes, facts, bounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.node.fold import CLOSES_MAX
from schemas.config import ConfigObject
from schemas.log import LogRecord, Result
from schemas.signals import ENGINE_WINDOWS, GPU_WINDOWS, NODE_WINDOWS
from schemas.topics import DEAD_LETTERS, ce_type
from tests.models.law import check_bounds, check_law, log, run, tick
from tests.models.node.logs import (
    T0,
    engine,
    final,
    fold,
    gpu,
    histogram,
    inventory,
    process,
    replica,
    rows,
    windows,
)

Row = dict[str, Any]


def letters(results: Sequence[Result]) -> list[Row]:
    return [json.loads(r.value) for r in results if r.topic == DEAD_LETTERS]


def limits(**spec: Any) -> LogRecord:
    item = ConfigObject(object_kind="limits", name="limits", revision=1, spec=spec)
    return LogRecord(0, T0 * 1000, ce_type("config"), item.key, item.encode())


# -- the law and the order of arrival ----------------------------------------------------------------------------


def sample(seed: int) -> tuple[str, float, Row]:
    """(node or replica's node, time, row) made from the digits of a number; 0 is the plainest."""

    def pick(count: int) -> int:
        nonlocal seed
        seed, digit = divmod(seed, count)
        return digit

    at = T0 + pick(45 * 4) / 4
    node, bad, value, null = f"n{pick(2)}", pick(8) == 7, float(pick(100)), pick(5) == 4
    kind = pick(4)
    if kind == 3:
        sm = None if null else value
        row: Row = {"gpu": pick(3), "at_s": at, "pid": pick(2), "name": "python", "sm_util_pct": sm, "mem_bytes": value}
        return (
            node,
            at,
            row | {"replica": "r1" if pick(2) else None, "cpu_s": value, "host_cpus": 8.0, "gone": int(bad)},
        )
    if kind == 2:
        bounds, counts = [[0.1, 1.0], [0.5]][pick(2)], sorted(pick(9) for _ in range(3))
        bins = [x for pair in zip(bounds, counts, strict=False) for x in pair] + [counts[-1]]
        metric = ("ttft_s", "tpot_s", "itl_s", "e2e_s")[pick(4)]
        start = T0 - 5.0 + 10 * pick(3)
        return node, at, {"replica": f"r{pick(3)}", "at_s": at, "start_s": start, "metric": metric, "bins": bins}
    if kind == 1:
        row = {"gpu": pick(3), "at_s": at, "status": "lost" if bad else "ok"}
        if not bad:
            row |= {"util_gpu_pct": value, "energy_j": None if null else value * 10, "throttle_power_ns": value * 1e8}
            row |= {"sm_active_ratio": value / 100, "xid": 13 if pick(2) else None, "xid_at_s": at - pick(20)}
        return node, at, row
    row = {"replica": f"r{pick(3)}", "at_s": at, "pool": "code", "status": "dead" if bad else "ok"}
    if not bad:
        row |= {
            "start_s": T0 - 5.0 + 10 * pick(3),
            "running": value,
            "waiting": None if null else value / 2,
            "generation_tokens": value * 7,
            "requests": None if null else value,
            "scrape": value,
            "model": f"m{pick(2)}",
            "itl_s_sum": value / 10,
            "itl_count": value,
        }
    return node, at, row


def sample_record(at_s: float, node: str, row: Row) -> LogRecord:
    make = process if "pid" in row else gpu if "gpu" in row else histogram if "bins" in row else engine
    return make(at_s, [row], node)


def name_of(node: str, at: float, row: Row) -> str:
    """What makes a sample a fact: the second of two with one name is a duplicate."""
    return str((node, at, *(row.get(key) for key in ("gpu", "pid", "replica" if "gpu" not in row else "", "metric"))))


def registered(at_s: float) -> list[LogRecord]:
    """Inventories of two nodes; r2 of n1 is in no inventory, gpu 2 in no pool."""
    shared = [replica("r0", "chat", [0]), replica("r1", "code", [0, 1], gpu_share=0.5)]
    return [inventory(at_s, shared, "n0"), inventory(at_s, [*shared, replica("r2", "chat", [1])], "n1")]


seeds = st.integers(0, 2**44)


@st.composite
def logs(draw: st.DrawFn) -> list[LogRecord]:
    """Samples of two nodes, inventories with changing states, ticks, garbage, limits, jumps in time."""
    now, found = T0 + 30.0, []
    for _ in range(draw(st.integers(0, 14))):
        now += draw(st.sampled_from([0.0, 0.25, 0.25, 1.0, 3.0, 11.0, 70.0]))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            found.append(tick(now))
        elif kind in (1, 2):
            state = draw(st.sampled_from(["ready", "starting", "failed"]))
            since_s = now - draw(st.sampled_from([0.0, 0.5, 20.0, 500.0]))
            names = draw(st.lists(st.sampled_from(["r0", "r1", "r2"]), max_size=3))
            pool = draw(st.sampled_from(["chat", "code"]))
            held = [replica(name, pool, [0], state=state, since_s=since_s) for name in names]
            found.append(inventory(now, held, draw(st.sampled_from(["n0", "n1"]))))
        elif kind == 3:
            found.append(LogRecord(0, round(now * 1000), "fleetloop.gpu.samples.v1", "n0", draw(st.binary(max_size=9))))
        else:
            node, at, row = sample(draw(seeds))
            row["at_s"] = now - (at - T0) * draw(st.sampled_from([0.0, 0.1, 1.0, 2.0]))
            found.append(sample_record(now, node, row))
    return log(*found, tick(now + 13), tick(now + 14))


@settings(max_examples=40)
@given(logs(), st.data())
def test_law(records: list[LogRecord], data: st.DataObject) -> None:
    """The law of folds holds for the node fold."""
    check_law(fold, records, data)


def test_bounds() -> None:
    """Every container of the fold has a bound, its setting and its overflow metric."""
    check_bounds(fold())


@settings(max_examples=60)
@example([0, 12_379_019_988], Random(0))  # the first of a subject comes after a window that closed without it
@given(st.lists(seeds, max_size=20), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_windows(drawn: list[int], random: Any) -> None:
    """Whatever the order in which samples and their duplicates come within the grace, the final windows are those
    of the samples in order, all at hand before the first window closes."""
    by_name = {name_of(*found): found for found in map(sample, drawn)}
    samples = sorted(by_name.values(), key=lambda x: x[1])
    calm = [*registered(T0 - 5.0), *(sample_record(at, node, row) for node, at, row in samples)]
    wanted_out = run(fold(), log(*calm, *(tick(T0 + t) for t in (46, 50, 56, 62))))

    sent = samples + [x for x in samples if random.random() < 0.3]
    random.shuffle(sent)
    wild = registered(T0 - 5.0)
    now = T0 + 45.0
    for node, _, row in sent:
        wild.append(sample_record(now, node, row))
        now += random.choice([0.0, 0.0, 0.3])
    got_out = run(fold(), log(*wild, tick(now + 1), tick(T0 + 60), tick(T0 + 62)))
    for kind in (GPU_WINDOWS, ENGINE_WINDOWS, NODE_WINDOWS):
        wanted, got = final(wanted_out, kind), final(got_out, kind)
        for key in [k for k in wanted if T0 <= k[1] < T0 + 50]:
            a = sorted(wanted[key], key=str)
            b = sorted(got[key], key=str)
            assert a == b, key


# -- engines -----------------------------------------------------------------------------------------------------


def one_engine(at: float, tokens: float | None, **more: Any) -> LogRecord:
    row = {"replica": "r1", "at_s": at, "status": "ok", "start_s": T0 - 500.0, "generation_tokens": tokens, **more}
    return engine(at, [row])


def closed_row(results: Sequence[Result], start: int, pool: str = "chat") -> Row:
    (row,) = final(results, ENGINE_WINDOWS)[(pool, start)]
    return row


def test_engine_window() -> None:
    """Counters become growth, gauges time-weighted means and last values, within the window's borders."""
    records = [inventory(T0 - 1.0, [replica()])]
    records += [one_engine(T0 - 0.5 + i, 100.0 * i, running=4.0, waiting=float(i)) for i in range(14)]
    got = closed_row(run(fold(), log(*records)), T0)
    assert got["generation_tokens"] == pytest.approx(1000)
    assert (got["samples"], got["covered_s"], got["resets"]) == (10, 10, 0)
    assert (got["running_mean"], got["running_last"], got["waiting_last"]) == (4, 4, 10)
    assert got["waiting_mean"] == pytest.approx((0.5 * 0 + sum(range(1, 10)) + 0.5 * 10) / 10)
    assert got["last_at_s"] == T0 + 9.5
    assert (got["state"], got["billed"], got["gpus"], got["gpu_type"]) == ("ready", 1, 1, "H100")
    assert got["allocated_s"] == 10
    assert got["prompt_tokens"] is None
    assert got["kv_usage_ratio_max"] is None


def test_early_rows_each_second_and_closed_after_lateness() -> None:
    """Open windows have rows each second, counted until then; the closed one comes 2 s after the end, once."""
    records = [inventory(T0 - 1.0, [replica()]), *(tick(T0 + t) for t in range(16))]
    published = windows(run(fold(), log(*records)), ENGINE_WINDOWS)
    found = [(n.start_s - T0, n.until_s - T0, n.closed, rows(b)[0]) for n, b in published]
    first = [(until, closed, row["allocated_s"]) for start, until, closed, row in found if start == 0]
    assert first == [(t, False, min(t, 10)) for t in range(11)] + [(12, True, 10)]
    assert [until for start, until, _, _ in found if start == 10] == [10, 11, 12, 13, 14, 15]


def test_replica_without_samples_has_a_row() -> None:
    """What is held and says nothing is seen: allocated, all else unknown or zero."""
    got = closed_row(run(fold(), log(inventory(T0 - 1.0, [replica()]), tick(T0 + 12))), T0)
    assert (got["samples"], got["allocated_s"], got["last_at_s"], got["waiting_last"]) == (0, 10, None, None)


def test_dead_engine_is_unknown_not_idle() -> None:
    """A scrape without answer ends what the one before said, and its growth is known when the engine answers again."""
    records = [inventory(T0 - 1.0, [replica()])]
    records += [one_engine(T0 + t, 100.0 * t, waiting=5.0) for t in (0.0, 1.0)]
    dead = {"replica": "r1", "at_s": T0 + 2.0, "status": "dead"}
    records += [engine(T0 + 2.0, [dead]), one_engine(T0 + 9.0, 900.0, waiting=1.0), tick(T0 + 12)]
    got = closed_row(run(fold(), log(*records)), T0)
    assert got["waiting_mean"] == pytest.approx((5 * 2 + 1 * 1) / 3)
    assert got["samples"] == 3
    assert got["generation_tokens"] == 900


def test_restart_counts_from_zero_and_is_seen() -> None:
    """A new start time is a reset even where the counters are greater than before."""
    records = [inventory(T0 - 1.0, [replica()]), one_engine(T0 + 1.0, 50.0), one_engine(T0 + 2.0, 60.0)]
    records += [one_engine(T0 + 6.0, 70.0, start_s=T0 + 4.0), tick(T0 + 12)]
    got = closed_row(run(fold(), log(*records)), T0)
    assert (got["generation_tokens"], got["resets"], got["covered_s"]) == (80, 1, 3)


def test_late_samples_revise_and_too_late_ones_are_refused() -> None:
    """Samples within the grace raise the window's version; later ones go to dead.letters; nothing else changes it."""
    records = [inventory(T0 - 1.0, [replica()]), one_engine(T0 + 1.0, 10.0), tick(T0 + 12), tick(T0 + 13)]
    records += [one_engine(T0 + 3.0, 30.0)._replace(at_ms=(T0 + 50) * 1000), tick(T0 + 51), tick(T0 + 52)]
    records += [one_engine(T0 + 4.0, 40.0)._replace(at_ms=(T0 + 65) * 1000), tick(T0 + 66)]
    one = fold()
    out = run(one, log(*records))
    versions = [
        (n.version, rows(b)[0]["generation_tokens"])
        for n, b in windows(out, ENGINE_WINDOWS)
        if n.closed and n.start_s == T0
    ]
    assert versions == [(2, None), (5, 20)]
    assert [x["reason"] for x in letters(out)] == ["too_late"]
    assert one.counters["late_rows_total"] == 1


def test_unknown_replica_counts_once_it_is_known() -> None:
    """Samples that came before the inventory are not lost: its window is revised when the pool is known."""
    records = [tick(T0 - 10.0), one_engine(T0 + 1.0, 10.0), one_engine(T0 + 2.0, 30.0), tick(T0 + 12)]
    records += [inventory(T0 + 20.0, [replica()]), tick(T0 + 21)]
    assert closed_row(run(fold(), log(*records)), T0)["generation_tokens"] == 20


# -- holdings ----------------------------------------------------------------------------------------------------


def test_allocated_time_is_split_at_state_changes() -> None:
    """What was billed is split exactly at `since_s`, also where the news comes after the window has closed."""
    records = [
        inventory(T0 - 1.0, [replica(state="starting", billed=False)]),
        inventory(T0 + 5.0, [replica(state="ready", since_s=T0 + 3.25)]),
        tick(T0 + 12),
        inventory(T0 + 14.0, [replica(state="asleep", billed=False, since_s=T0 + 8.5)]),
        *(tick(T0 + t) for t in (15, 22, 23)),
    ]
    out = run(fold(), log(*records))
    got = closed_row(out, T0)
    assert (got["allocated_s"], got["state"], got["billed"]) == (5.25, "asleep", 0)
    assert closed_row(out, T0 + 10)["allocated_s"] == 0


def test_allocated_windows_add_up() -> None:
    """Over all windows the billed time is the billed time."""
    records = [inventory(T0 + 2.5, [replica(since_s=T0 + 1.75)]), inventory(T0 + 33.25, [])]
    records += [tick(T0 + t) for t in range(1, 50)]
    out = run(fold(), log(*sorted(records, key=lambda r: r.at_ms)))
    total = sum(row["allocated_s"] for key, found in final(out, ENGINE_WINDOWS).items() for row in found)
    assert total == 33.25 - 1.75


def test_silent_node_is_unknown_and_still_costs() -> None:
    """Without inventory for 90 s the state is unknown; allocated time goes on; news end it."""
    records = [inventory(T0, [replica()]), *(tick(T0 + t) for t in range(1, 130))]
    records += [inventory(T0 + 130, [replica()]), tick(T0 + 142)]
    out = run(fold(), log(*records))
    assert [closed_row(out, T0 + t)["state"] for t in (80, 90, 110, 130)] == ["ready", "unknown", "unknown", "ready"]
    assert [closed_row(out, T0 + t)["allocated_s"] for t in (80, 90, 110, 130)] == [10, 10, 10, 10]


def test_replica_that_is_gone_leaves() -> None:
    """A replica that the inventory no longer names has a last row with the time it held, and none after."""
    records = [
        inventory(T0, [replica(), replica("r2", state="draining")]),
        inventory(T0 + 4.0, []),
        tick(T0 + 12),
        tick(T0 + 22),
    ]
    one = fold()
    out = run(one, log(*records))
    found = {r["replica"]: r for r in final(out, ENGINE_WINDOWS)[("chat", T0)]}
    assert [(found[n]["state"], found[n]["billed"], found[n]["allocated_s"]) for n in ("r1", "r2")] == [
        ("failed", 0, 4),
        ("draining", 0, 4),
    ]
    assert ("chat", T0 + 10) not in final(out, ENGINE_WINDOWS)
    run(one, [tick(T0 + t)._replace(offset=99 + t) for t in range(30, 400, 5)])
    assert (one.metrics()["replicas"], one.metrics()["nodes"]) == (0, 0)


def test_replica_that_changes_pool() -> None:
    """Each pool has the time that was its own; the samples count in the pool that the replica went to."""
    records = [inventory(T0, [replica()]), one_engine(T0 + 1.0, 0.0), one_engine(T0 + 5.0, 40.0)]
    records += [inventory(T0 + 6.0, [replica(pool="code")]), one_engine(T0 + 9.0, 80.0), tick(T0 + 12)]
    out = run(fold(), log(*records))
    chat, code = closed_row(out, T0), closed_row(out, T0, "code")
    assert (chat["allocated_s"], code["allocated_s"]) == (6, 4)
    assert (chat["generation_tokens"], code["generation_tokens"]) == (None, 80)


def test_old_inventory_changes_nothing() -> None:
    """An inventory read before one that is known is overtaken; the same one twice is a duplicate; another content at
    the same time a conflict."""
    old, new = inventory(T0 + 1.0, [replica("r9")]), inventory(T0 + 2.0, [replica()])
    other = inventory(T0 + 2.0, [replica("r8")])
    one = fold()
    out = run(one, log(tick(T0), new, old._replace(at_ms=(T0 + 3) * 1000), new, other, tick(T0 + 12)))
    assert [r["replica"] for r in final(out, ENGINE_WINDOWS)[("chat", T0)]] == ["r1"]
    assert [x["reason"] for x in letters(out)] == ["conflict"]
    assert (one.counters["inventory_outdated_total"], one.counters["duplicate_batches_total"]) == (1, 1)


def test_catching_up_is_bounded() -> None:
    """After an outage the windows of all the time between are closed, so many a second, and none is left out."""
    records = [inventory(T0, [replica()]), tick(T0 + 1), tick(T0 + 1001), *(tick(T0 + 1002 + t) for t in range(4))]
    one = fold()
    counts = []
    for record in log(*records):
        counts.append(sum(n.closed for n, _ in windows(one.apply([record]), ENGINE_WINDOWS)))
    # a hundred windows and one have passed by then, from the one that was open at first to [990, 1000)
    assert counts[2:] == [CLOSES_MAX, CLOSES_MAX, CLOSES_MAX, 101 - 3 * CLOSES_MAX, 0]


def test_catching_up_forgets_nothing_that_it_needs() -> None:
    """What was held during an outage is billed in full, though it ended and log time ran on before all was closed."""
    records = [inventory(T0, [replica(since_s=T0 + 0.0)]), tick(T0 + 1), inventory(T0 + 1001.0, [])]
    records += [tick(T0 + 1200 + t) for t in range(6)]
    found = final(run(fold(), log(*records)), ENGINE_WINDOWS)
    assert sum(row["allocated_s"] for rows_ in found.values() for row in rows_) == 1001


# -- GPUs --------------------------------------------------------------------------------------------------------


def test_gpu_window() -> None:
    """Means by time, maxima, energy and throttling by counters; only when the window has closed."""
    records = [inventory(T0 - 2.0, [replica()])]
    for i in range(15):
        at = T0 - 0.5 + i
        row = {
            "gpu": 0,
            "at_s": at,
            "status": "ok",
            "util_gpu_pct": 10.0 * (i % 2),
            "power_w": 300.0,
            "temp_c": 40.0 + i,
        }
        records.append(gpu(at, [{**row, "energy_j": 300.0 * i, "throttle_thermal_ns": 1e8 * i}]))
    found = windows(run(fold(), log(*records)), GPU_WINDOWS)
    assert all(n.closed for n, _ in found)
    got = next(rows(b)[0] for n, b in found if (n.pool, n.start_s) == ("chat", T0))
    assert got["util_gpu_pct_mean"] == pytest.approx(5.0)
    assert (got["power_w_mean"], got["temp_c_max"], got["samples"], got["covered_s"]) == (300, 50, 10, 10)
    assert (got["energy_j"], got["throttled_s"]) == (pytest.approx(3000), pytest.approx(1.0))
    assert (got["status"], got["gpu_type"], got["sm_active_ratio_mean"], got["mem_used_bytes_max"]) == (
        "ok",
        "H100",
        None,
        None,
    )


def test_lost_gpu_and_silent_gpu_show() -> None:
    """A lost GPU says so and has no measurements since; one that says nothing has a row of nulls."""
    records = [inventory(T0 - 2.0, [replica(gpus=(0, 1))])]
    records += [gpu(T0 + 1.0, [{"gpu": 0, "at_s": T0 + 1.0, "status": "ok", "util_gpu_pct": 50.0}])]
    records += [gpu(T0 + 2.0, [{"gpu": 0, "at_s": T0 + 2.0, "status": "lost"}]), tick(T0 + 12)]
    lost, silent = final(run(fold(), log(*records)), GPU_WINDOWS)[("chat", T0)]
    assert (lost["status"], lost["util_gpu_pct_mean"], lost["covered_s"], lost["samples"]) == ("lost", 50, 1, 2)
    assert (silent["status"], silent["util_gpu_pct_mean"], silent["covered_s"], silent["samples"]) == (None, None, 0, 0)


def test_gpus_by_pool() -> None:
    """A shared GPU is in both pools' windows, one that nobody uses under `-`."""
    held = [replica("a", "chat", [0]), replica("b", "code", [0, 1], gpu_share=0.5)]
    out = run(fold(), log(inventory(T0 - 2.0, held, gpus=3), tick(T0 + 12)))
    found = {pool: [r["gpu"] for r in r_] for (pool, start), r_ in final(out, GPU_WINDOWS).items() if start == T0}
    assert found == {"chat": [0], "code": [0, 1], "-": [2]}
    shares = {pool: r_[0]["gpus"] for (pool, start), r_ in final(out, ENGINE_WINDOWS).items() if start == T0}
    assert shares == {"chat": 1.0, "code": 1.0}


def test_one_record_holds_all_nodes_of_a_pool() -> None:
    """A pool's window is one record with the rows of every node of this partition."""
    out = run(fold(), log(*registered(T0 - 2.0), tick(T0 + 12)))
    ids = [r.id for r in out if r.type == GPU_WINDOWS.type and f"/{T0}/" in r.id]
    assert ids == [f"gpu/{pool}/{T0}/node.samples/0@2" for pool in ("chat", "code")]
    assert {r["node"] for r in final(out, ENGINE_WINDOWS)[("chat", T0)]} == {"n0", "n1"}


# -- facts and bounds --------------------------------------------------------------------------------------------


def test_batches_are_facts() -> None:
    """A batch that came before is ignored, one with its name and other content refused; both are counted."""

    def one(util: float) -> LogRecord:
        return gpu(T0 + 1.0, [{"gpu": 0, "at_s": T0 + 1.0, "util_gpu_pct": util}], start_s="7", seq="3")

    f = fold()
    out = run(f, log(one(10.0), one(10.0), one(90.0), tick(T0 + 12)))
    assert [(x["reason"], x["offset"]) for x in letters(out)] == [("conflict", 2)]
    assert f.counters["duplicate_batches_total"] == 1
    assert final(out, GPU_WINDOWS)[("-", T0)][0]["util_gpu_pct_mean"] == 10.0


@pytest.mark.parametrize(
    ("spec", "records", "metric"),
    [
        ({"nodes_max": 1}, [gpu(T0, [{"gpu": 0, "at_s": T0}], "a"), gpu(T0, [{"gpu": 0, "at_s": T0}], "b")], "nodes"),
        ({"gpus_per_node_max": 2}, [gpu(T0, [{"gpu": g, "at_s": T0} for g in range(3)])], "gpus"),
        ({"replicas_max": 1}, [engine(T0, [{"replica": r, "at_s": T0} for r in "ab"])], "replicas"),
        ({"replicas_max": 1}, [inventory(T0, [replica("a"), replica("b")])], "replicas"),
        ({"pools_max": 1}, [inventory(T0, [replica("a"), replica("b", "code")])], "pools"),
        ({"node_samples_max": 1}, [gpu(T0, [{"gpu": 0, "at_s": T0 - t} for t in range(2)])], "samples"),
        ({"node_segments_max": 1}, [inventory(T0, [replica("a"), replica("b")])], "segments"),
    ],
)
def test_overflow_is_refused_and_counted(spec: Row, records: list[LogRecord], metric: str) -> None:
    """What a bound keeps out goes to dead.letters as overflow and is counted; the rest is taken."""
    one = fold()
    out = run(one, log(limits(**spec), *records, tick(T0 + 12)))
    assert [x["reason"] for x in letters(out)] == ["overflow"]
    assert one.counters[f"overflow_{metric}_total"] >= 1


def test_batch_ids_are_bounded_and_forgotten() -> None:
    """Beyond the bound the oldest id goes; ids older than the grace allows go by themselves."""

    def one(t: float) -> LogRecord:
        return gpu(T0 + t, [{"gpu": 0, "at_s": T0 + t}], start_s="7", seq=str(int(t)))

    f = fold()
    run(f, log(limits(node_batches_max=3), *(one(float(t)) for t in range(5))))
    assert len(f.batches) == 3
    assert f.counters["overflow_batches_total"] == 2
    run(f, [tick(T0 + t)._replace(offset=99 + t) for t in range(100, 400, 10)])
    assert f.batches == {}
    assert f.gpu_samples.size == 0
    assert f.emitted == {}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (gpu(T0, [{"gpu": 0, "at_s": T0}])._replace(key="n2"), "invalid"),
        (inventory(T0, [replica()])._replace(key="n2"), "invalid"),
        (inventory(T0 + 100.0, [])._replace(at_ms=T0 * 1000), "in_future"),
        (inventory(T0, [replica("a"), replica("a", "code")]), "invalid"),
    ],
)
def test_contradictions_are_refused(record: LogRecord, reason: str) -> None:
    """A key that is not the node, a time to come, a replica named twice: refused with a reason."""
    assert [x["reason"] for x in letters(run(fold(), log(record)))] == [reason]


def test_json_engine_samples() -> None:
    """A scraper in any language may send engine samples as JSON; the node is then the key."""
    body = json.dumps([{"replica": "r1", "at_s": T0 + t, "generation_tokens": 10 * t} for t in (1.0, 2.0)]).encode()
    sent = LogRecord(0, (T0 + 2) * 1000, "fleetloop.engine.samples.v1", "n1", body)
    got = closed_row(run(fold(), log(inventory(T0, [replica()]), sent, tick(T0 + 12))), T0)
    assert got["generation_tokens"] == 10
