"""Current rows: the greatest version of everything, whatever the order and however often it comes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from schemas.columns import COLUMNAR
from schemas.config import ConfigObject
from schemas.costs import CostWindow
from schemas.decisions import AuditEntry, PoolStatus
from schemas.findings import Finding
from schemas.forecasts import LoadForecast
from schemas.log import CONTENT_ARROW, LogRecord
from schemas.signals import ENGINE_WINDOWS, GPU_WINDOWS, REQUEST_WINDOWS, WindowName
from schemas.topics import (
    AUDIT,
    COST_WINDOWS,
    DEAD_LETTERS,
    DECISION_EVENTS,
    DECISIONS,
    FINDINGS,
    FLEET_CONFIG,
    LOAD_FORECASTS,
    POOL_SIGNALS,
)
from tests.views.feed import ORIGIN_S, POOLS, Feed, record, records, windows
from views.history import HORIZONS_MAX, History
from views.records import latest
from views.rows import OLD_S, Rows

FEED = records(200)
SHORT = records(20)


def rows_of(items: list[Any], **bounds: int) -> Rows:
    rows = Rows(**bounds)
    for topic, item in items:
        rows.apply(topic, item)
    return rows


def state(rows: Rows) -> dict[str, Any]:
    return {name: dict(sorted(table.items())) for name, table in rows.tables.items()}


def test_every_table_has_rows() -> None:
    """A fleet's records fill every table."""
    rows = rows_of(FEED)
    assert all(rows.tables.values()), {n: len(t) for n, t in rows.tables.items()}
    assert set(rows.tables["pools"]) == {p.name for p in POOLS} == set(rows.history)
    assert not rows.counters


def test_twice_is_once() -> None:
    """Reading everything a second time, as after a rebalance, changes no row."""
    once, twice = rows_of(FEED), rows_of(FEED + FEED)
    assert state(once) == state(twice)
    assert once.refused == twice.refused
    assert {p: h.values() for p, h in once.history.items()} == {p: h.values() for p, h in twice.history.items()}


@pytest.mark.parametrize("seed", range(3))
def test_order_of_late_records_does_not_matter(seed: int) -> None:
    """The newest minute of records in any order leave the same rows: versions decide, not arrival."""
    cut = len(records(140))
    base, tail = FEED[:cut], FEED[cut:]
    shuffled = list(tail)
    random.Random(seed).shuffle(shuffled)
    expected, found = state(rows_of(base + tail)), state(rows_of(base + shuffled))
    for name in ("gpus", "nodes", "replicas", "interference", "pools", "findings", "forecasts"):
        keys = {k: {**v, "cost": None, "pools": None} for k, v in expected[name].items()}
        assert {k: {**v, "cost": None, "pools": None} for k, v in found[name].items()} == keys


def finding(version: int, *, open: bool = True, at_s: float = ORIGIN_S) -> tuple[str, LogRecord]:
    item = Finding(
        finding="slow_replica",
        pool="p",
        subject="p-1",
        open=open,
        since_s=1,
        at_s=at_s,
        version=version,
        text="x",
        severity=2,
    )
    return FINDINGS, record(version, at_s, item)


def test_an_older_version_is_ignored() -> None:
    """A smaller version that comes later does not replace a greater one."""
    rows = rows_of([finding(5, open=False), finding(4)])
    assert rows.tables["findings"]["p/slow_replica/p-1"]["open"] is False


def engine(
    start_s: int, version: int, replicas: list[str], *, closed: bool = True, until: float | None = None
) -> LogRecord:
    n = len(replicas)
    name = WindowName("p", "node.samples/0", start_s, version, until or start_s + 12.0, True)
    columns = {
        "replica": replicas,
        "node": ["n"] * n,
        "state": ["ready"] * n,
        "billed": [1] * n,
        "gpus": [1.0] * n,
        "allocated_s": [10.0] * n,
        "samples": [version] * n,
        "covered_s": [10.0] * n,
        "resets": [0] * n,
    }
    return windows(ENGINE_WINDOWS, version, start_s + 12, name, columns)


def test_a_late_revision_of_an_old_window_is_not_the_latest() -> None:
    """A window that is revised after its successor has a greater version and still is not the current row."""
    rows = rows_of(
        [
            (POOL_SIGNALS, engine(ORIGIN_S + 10, 2, ["a"])),
            (POOL_SIGNALS, engine(ORIGIN_S, 3, ["a"], until=ORIGIN_S + 60.0)),
        ]
    )
    assert rows.tables["replicas"]["p/a"]["start_s"] == ORIGIN_S + 10


def test_unknown_stays_none() -> None:
    """A measurement that a replica does not give is None in its row, never zero."""
    rows = rows_of([(POOL_SIGNALS, engine(ORIGIN_S, 1, ["a"]))])
    row = rows.tables["replicas"]["p/a"]
    assert row["kv_usage_ratio_mean"] is None
    assert row["tpot_s_mean"] is None
    assert row["resets"] == 0


def test_a_replica_that_is_no_longer_named_goes() -> None:
    """When its node's later windows do not name a replica, its row goes; while the node is silent, it stays."""
    items = [(POOL_SIGNALS, engine(ORIGIN_S, 1, ["a", "b"]))]
    for step in range(1, 5):
        items.append((POOL_SIGNALS, engine(ORIGIN_S + 10 * step, 1 + step, ["a"])))
    assert set(rows_of(items).tables["replicas"]) == {"p/a"}
    silent = [items[0], finding(1, at_s=ORIGIN_S + 120)]
    assert set(rows_of(silent).tables["replicas"]) == {"p/a", "p/b"}
    gone = [items[0], finding(1, at_s=ORIGIN_S + 1000)]
    assert not rows_of(gone).tables["replicas"]


def gpu(pool: str, start_s: int, version: int) -> tuple[str, LogRecord]:
    columns = {"node": ["n"], "gpu": [3], "samples": [1], "covered_s": [10.0]}
    name = WindowName(pool, "node.samples/0", start_s, version, start_s + 12.0, True)
    return POOL_SIGNALS, windows(GPU_WINDOWS, version, start_s + 12, name, columns)


def test_a_shared_gpu_names_its_pools() -> None:
    """A GPU that two pools share is one row that names both; a pool that leaves it is dropped."""
    both = [gpu("p", ORIGIN_S, 1), gpu("q", ORIGIN_S, 1)]
    assert rows_of(both).tables["gpus"]["n/3"]["pool"] == "p+q"
    later = both + [gpu("q", ORIGIN_S + 10 * k, 1 + k) for k in range(1, 5)]
    assert rows_of(later).tables["gpus"]["n/3"]["pool"] == "q"


def cost(
    start_s: int, version: int, requests: int, usd: float | None, tenant: str | None = "t"
) -> tuple[str, LogRecord]:
    item = CostWindow(
        pool="p",
        tenant=tenant,
        start_s=start_s,
        size_s=10,
        version=version,
        closed=True,
        requests=requests,
        input_tokens=requests * 1000.0,
        output_tokens=0.0,
        usd_direct=usd,
        usd_idle=usd,
        usd_total=None if usd is None else 2 * usd,
        usd_per_million_tokens_direct=None,
        usd_per_million_tokens=None,
    )
    return COST_WINDOWS, record(version, start_s + 12, item)


def test_tenant_sums_are_of_the_last_five_minutes() -> None:
    """A tenant's row adds up the greatest versions of the last 300 s, and cost per token is of these sums."""
    items = [cost(ORIGIN_S + 10 * k, k, 5, 0.5) for k in range(60)]
    items += [cost(ORIGIN_S + 590, 100, 7, 0.5), cost(ORIGIN_S + 590, 90, 9, 9.0)]
    row = rows_of(items).tables["tenants"]["p/t"]
    assert row["requests"] == 29 * 5 + 7
    assert row["usd_direct"] == pytest.approx(15.0)
    assert row["usd_per_million_tokens"] == pytest.approx(30.0 / (row["requests"] * 1000) * 1e6)


def test_an_unknown_price_makes_the_sum_unknown() -> None:
    """One window without a price leaves the sum unknown rather than too small."""
    row = rows_of([cost(ORIGIN_S, 1, 5, 0.5), cost(ORIGIN_S + 10, 2, 5, None)]).tables["tenants"]["p/t"]
    assert row["usd_total"] is None
    assert row["requests"] == 10


def request_window(start_s: int, version: int, source: int, ends: int, good: int) -> tuple[str, LogRecord]:
    name = WindowName("p", f"request.traces/{source}", start_s, version, start_s + 12.0, True)
    zero = ("arrivals", "ok", "errors", "rejected", "ttft_count", "tpot_count", "e2e_count")
    sums = ("input_tokens", "cached_tokens", "output_tokens", "ttft_s_sum", "tpot_s_sum", "e2e_s_sum")
    columns = {"tenant": ["t"], "class": ["c"], "ends": [ends], "slo_judged": [ends], "slo_good": [good]}
    columns |= {c: [0] for c in zero} | {c: [0.0] for c in sums}
    return POOL_SIGNALS, windows(REQUEST_WINDOWS, version, start_s + 12, name, columns)


def test_requests_merge_sources_and_replace_versions() -> None:
    """Partial windows of several partitions add up; a later version of one replaces what it had said."""
    rows = rows_of(
        [
            request_window(ORIGIN_S, 1, 0, 10, 10),
            request_window(ORIGIN_S, 1, 1, 10, 5),
            request_window(ORIGIN_S, 2, 0, 20, 20),
            request_window(ORIGIN_S, 1, 0, 99, 0),
        ]
    )
    assert rows.requests.of("p", "t").ends == 30
    assert rows.requests.of("p", "t").slo_attainment == pytest.approx(25 / 30)
    rows.apply(*request_window(ORIGIN_S + 300, 3, 0, 1, 1))
    assert rows.requests.pools()["p"].ends == 1


def test_rows_of_one_tenant_add_up() -> None:
    """A tenant has a row a class, model and priority: all of them count, and a later version replaces them all."""
    name = WindowName("p", "request.traces/0", ORIGIN_S, 1, ORIGIN_S + 12.0, True)
    zero = ("arrivals", "ok", "errors", "rejected", "ttft_count", "tpot_count", "e2e_count")
    sums = ("input_tokens", "cached_tokens", "output_tokens", "ttft_s_sum", "tpot_s_sum", "e2e_s_sum")
    columns = {"tenant": ["t"] * 3, "class": ["c"] * 3, "model": ["a", "b", "b"], "priority": [None, None, 2]}
    columns |= {"ends": [3, 4, 5], "slo_judged": [3, 4, 5], "slo_good": [3, 0, 0]}
    columns |= {c: [0] * 3 for c in zero} | {c: [0.0] * 3 for c in sums}
    rows = rows_of([(POOL_SIGNALS, windows(REQUEST_WINDOWS, 1, ORIGIN_S + 12, name, columns))])
    assert rows.requests.of("p", "t").ends == 12
    rows.apply(*request_window(ORIGIN_S, 2, 0, 20, 20))
    assert rows.requests.of("p", "t").ends == 20


def test_verdict_meets_its_decision_in_either_order() -> None:
    """What decision.events tells of a decision is in its row whichever came first."""
    items = [i for i in FEED if i[0] in (DECISIONS, DECISION_EVENTS)]
    flipped = sorted(items, key=lambda i: i[0] == DECISIONS)
    for order in (items, flipped):
        found = [r for r in rows_of(order).tables["decisions"].values() if r["state"] == "verified"]
        assert found
        assert all(r["verdict"]["decision_id"] == r["id"] for r in found)


def test_decisions_are_bounded_and_what_is_open_stays() -> None:
    """Beyond the bound the oldest decision that has ended goes first."""
    feed = Feed()
    items = [i for t in range(2000) for i in feed.decisions(t, ORIGIN_S + t) if i[0] == DECISIONS]
    everything = rows_of(items)
    pending = {k for k, r in everything.tables["decisions"].items() if r["state"] == "pending"}
    bound = len(pending) + 2
    rows = rows_of(items, decisions_max=bound)
    assert len(rows.tables["decisions"]) == bound
    assert pending <= set(rows.tables["decisions"])
    assert rows.counters["decisions_dropped"] >= len(everything.tables["decisions"]) - bound > 0


def test_rows_are_bounded_and_the_overflow_counted() -> None:
    """A full table takes no new key, says so, and still updates the keys it has."""
    rows = rows_of([(POOL_SIGNALS, engine(ORIGIN_S, 1, ["a", "b", "c"]))], rows_max=2)
    rows.apply(POOL_SIGNALS, engine(ORIGIN_S + 10, 2, ["a"]))
    assert set(rows.tables["replicas"]) == {"p/a", "p/b"}
    assert rows.counters["rows_overflow"] == 1
    assert rows.tables["replicas"]["p/a"]["version"] == 2


def test_what_a_later_record_replaces_need_not_be_read() -> None:
    """Leaving out the looks that a later one of the same name replaces gives the same rows."""
    named = [
        (topic, item._replace(id=f"{item.type}/{WindowName.of(meta).source}/{meta['start_s']}@{item.offset}"))
        for topic, item in FEED
        if topic == POOL_SIGNALS
        for meta in [COLUMNAR[item.type].decode(item.value, item.content_type).meta]
    ]
    kept = latest([item for _, item in named])
    assert len(kept) < len(named) / 3
    assert state(rows_of([(POOL_SIGNALS, item) for item in kept])) == state(rows_of(named))
    other = [
        LogRecord(1, 1, "a", "", b"", id="x"),
        LogRecord(2, 1, "a", "", b"", id="x"),
        LogRecord(3, 1, "b", "", b""),
    ]
    assert latest(other) == other


def test_configuration_gives_pools_their_targets() -> None:
    """A pool's row carries its specification, follows its revisions, and goes when the pool is deleted."""
    rows = rows_of(FEED)
    row = rows.tables["pools"][POOLS[0].name]
    assert row["spec"]["slo_ttft_s"] == 2.0
    spec = {**row["spec"], "slo_ttft_s": 1.0}
    newer = ConfigObject(object_kind="pool", name=POOLS[0].name, revision=2, spec=spec)
    rows.apply(FLEET_CONFIG, record(1, ORIGIN_S, newer))
    assert rows.tables["pools"][POOLS[0].name]["spec"]["slo_ttft_s"] == 1.0
    rows.apply(
        FLEET_CONFIG,
        record(2, ORIGIN_S, ConfigObject(object_kind="pool", name=POOLS[0].name, revision=3, deleted=True)),
    )
    assert POOLS[0].name not in rows.tables["pools"]


def audit(sequence: int, event: str, pool: str | None) -> tuple[str, LogRecord]:
    entry = AuditEntry(
        sequence=sequence,
        previous="",
        hash="",
        at_s=ORIGIN_S,
        offset=1,
        decision_id=None,
        pool=pool,
        event=event,
        actor="eve",
        cause="looking",
        action=None,
    )
    return AUDIT, record(sequence, ORIGIN_S, entry)


def test_the_last_accepted_pause_or_resume_holds() -> None:
    """Pauses are per pool, and what was said last by sequence holds."""
    rows = rows_of([audit(1, "pause", "p"), audit(3, "resume", "p"), audit(2, "pause", "p"), audit(4, "pause", None)])
    assert set(rows.paused) == {None}


@pytest.mark.parametrize(
    "item",
    [
        LogRecord(1, 1, "fleetloop.finding.v1", "", b"{"),
        LogRecord(1, 1, "fleetloop.gpu.windows.v1", "", b"nonsense", CONTENT_ARROW),
        LogRecord(1, 1, "fleetloop.decision.v1", "", b'{"id": 1}'),
        LogRecord(1, 1, "fleetloop.finding.v1", "k", b""),
        LogRecord(1, 1, "something.else.v9", "", b"x"),
        LogRecord(1, 1, "", "", b""),
        LogRecord(1, 1, "tick", "", b""),
    ],
)
def test_what_cannot_be_read_changes_nothing(item: LogRecord) -> None:
    """Garbage, tombstones, unknown kinds and ticks leave every row as it was."""
    rows = rows_of(SHORT)
    before = state(rows)
    rows.apply(FINDINGS, item)
    assert state(rows) == before


def test_windows_without_a_name_are_refused() -> None:
    """A columnar record without the metadata that names its window is counted, not taken."""
    value = GPU_WINDOWS.encode({"node": ["n"], "gpu": [0], "samples": [1], "covered_s": [1.0]})
    rows = rows_of([(POOL_SIGNALS, LogRecord(1, 1, GPU_WINDOWS.type, "p", value, CONTENT_ARROW))])
    assert rows.counters["undecodable"] == 1
    assert not rows.tables["gpus"]


def test_dead_letters_count_once() -> None:
    """A letter that is published again after a crash is not counted again."""
    letter = next(i for i in FEED if i[0] == DEAD_LETTERS)
    rows = rows_of([letter, letter])
    assert rows.refused == {("request.traces", "time_unit"): 2}
    assert len(rows.letters) == 1
    assert "data_base64" not in rows.letters[0]


def test_what_is_over_goes_after_an_hour() -> None:
    """Pools, tenants, forecasts and closed findings nobody spoke of for an hour are dropped; open findings stay."""
    rows = rows_of([*FEED, finding(1, open=False)])
    open_before = {k for k, r in rows.tables["findings"].items() if r["open"]}
    later = LogRecord(1, (ORIGIN_S + 200 + 300 + OLD_S) * 1000, "tick", "", b"")
    rows.apply(POOL_SIGNALS, later)
    assert not rows.tables["pools"]
    assert not rows.tables["tenants"]
    assert not rows.tables["forecasts"]
    assert not rows.history
    assert set(rows.tables["findings"]) == open_before != set()


def status(at_s: float, rate: float) -> PoolStatus:
    return PoolStatus(pool="p", at_s=at_s, version=1, requests_per_s=rate)


def forecast(horizon: float, at_s: float, value: float) -> LoadForecast:
    return LoadForecast(
        pool="p",
        horizon_s=horizon,
        at_s=at_s,
        target_s=at_s + horizon,
        version=1,
        requests_per_s=value,
        requests_per_s_p10=value,
        requests_per_s_p90=value,
        model="m",
        matured=0,
        mae=None,
        mae_last=None,
        coverage_p90=None,
    )


def test_history_is_a_bounded_ring() -> None:
    """However long it runs, a pool's history holds an hour at 10 s, and forecasts of a few horizons."""
    history = History(span_s=600)
    for t in range(0, 3000, 5):
        history.status(status(ORIGIN_S + t, float(t)))
        for horizon in range(60, 60 * (HORIZONS_MAX + 3), 60):
            history.forecast(forecast(horizon, ORIGIN_S + t, 1.0))
    values = history.values()
    assert [p["t"] for p in values["points"]] == list(range(ORIGIN_S + 2400, ORIGIN_S + 3000, 10))
    assert values["points"][-1]["requests_per_s"] == 2995.0
    assert len(values["forecasts"]) == HORIZONS_MAX
    assert all(row[0] > ORIGIN_S + 2390 for line in values["forecasts"].values() for row in line)
    assert history.values(ORIGIN_S + 2990)["points"] == values["points"][-1:]


def test_a_forecast_lies_at_the_moment_it_was_made_for() -> None:
    """A forecast is found at its target, by horizon, and the latest made for a moment stays."""
    history = History()
    history.status(status(ORIGIN_S, 1.0))
    history.forecast(forecast(60, ORIGIN_S + 5, 7.0))
    history.forecast(forecast(60, ORIGIN_S, 6.0))
    assert history.values()["forecasts"] == {"60": [[ORIGIN_S + 60, 7.0, 7.0, 7.0]]}


def test_forecast_rows_are_the_latest() -> None:
    """The forecasts table holds the newest forecast per pool and horizon."""
    rows = rows_of(FEED)
    row = rows.tables["forecasts"][f"{POOLS[0].name}/180"]
    assert row["at_s"] == ORIGIN_S + 190
    assert len(rows.tables["forecasts"]) == 3 * len(POOLS)
    assert any(topic == LOAD_FORECASTS for topic, _ in FEED)
