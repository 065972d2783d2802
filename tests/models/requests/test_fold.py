"""The requests fold: the law, its windows against an oracle, duplicates, conflicts, late rows, bounds, targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.requests.window import OTHER
from models.sketches import Histogram
from schemas.config import ConfigObject
from schemas.log import LogRecord, Result
from schemas.signals import REQUEST_WINDOWS
from schemas.topics import DEAD_LETTERS, ce_type
from tests.models.law import check_bounds, check_law, log, run, tick
from tests.models.node.logs import final, windows
from tests.models.node.logs import rows as as_rows
from tests.models.requests.logs import T0, arrival, end, fold, pool_config, record, tenant_config
from tests.models.requests.oracle import Row, cells_of, deliver, oracle, rows


@st.composite
def logs(draw: st.DrawFn) -> list[LogRecord]:
    """Records with rows, duplicates, conflicts, late and future rows, config, garbage and ticks, in any times."""
    drawn = draw(rows())
    found: list[LogRecord] = []
    now = float(T0)
    for _ in range(draw(st.integers(0, 12))):
        now += draw(st.sampled_from([0.0, 0.25, 1.0, 1.0, 3.0, 12.0, 900.0]))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            found.append(tick(now))
        elif kind == 1:
            found.append(pool_config(now, draw(st.sampled_from(["chat", "code"])), draw(st.integers(1, 3))))
        elif kind == 2:
            found.append(LogRecord(0, round(now * 1000), "fleetloop.request.rows.v1", "", draw(st.binary(max_size=9))))
        elif drawn:
            found.append(record(now, draw(st.lists(st.sampled_from(drawn), min_size=1, max_size=8))))
    return log(*found)


@settings(max_examples=60)
@given(logs(), st.data())
def test_law(records: list[LogRecord], data: st.DataObject) -> None:
    """The law of folds holds for the requests fold."""
    check_law(fold, records, data)


def test_bounds() -> None:
    """Every container of the fold has a bound, its setting and its overflow metric."""
    check_bounds(fold())


@settings(max_examples=60)
@given(rows(40), st.randoms(use_true_random=False), st.data())
def test_windows_equal_the_oracle_in_any_order(given_rows: list[Row], random: Any, data: st.DataObject) -> None:
    """Whatever the order, the batches, the duplicates and the lateness within the grace, the final windows are what a
    plain count says."""
    sent = given_rows + [r for r in given_rows if random.random() < 0.3]
    random.shuffle(sent)
    tiers = {"gold": {"slo_ttft_s": 4.0}, "bronze": {"slo_tpot_s": 0.5}}
    config = [pool_config(T0, "chat", slo_tpot_s=1.0, tiers=tiers), pool_config(T0, "code", slo_tpot_s=1.0)]
    config += [tenant_config(T0, "acme", "gold"), tenant_config(T0, "zeta", "bronze")]
    found = final(run(fold(), log(*config, *deliver(sent, data))), REQUEST_WINDOWS)
    targets = {("chat", "acme"): (4.0, 1.0), ("chat", "zeta"): (2.0, 0.5)}
    assert cells_of(found) == oracle(given_rows, targets, (2.0, 1.0))


def letters(results: Sequence[Result]) -> list[Row]:
    return [json.loads(r.value) for r in results if r.topic == DEAD_LETTERS]


def test_early_rows_come_each_second_and_only_on_change() -> None:
    """An open window is published at each second in which it changed, without histograms; closed once, with them."""
    records = [record(T0 + 0.5, [arrival("a", T0 + 0.4), end("b", T0 + 0.4)])]
    records += [tick(T0 + 1 + i / 2) for i in range(4)]
    records += [record(T0 + 3.2, [arrival("c", T0 + 3.0)]), tick(T0 + 4), tick(T0 + 11.9), tick(T0 + 12), tick(T0 + 30)]
    found = windows(run(fold(), log(*records)), REQUEST_WINDOWS)
    assert [(n.until_s - T0, n.closed, as_rows(b)[0]["arrivals"]) for n, b in found] == [
        (1.0, False, 1),
        (4.0, False, 2),
        (12.0, True, 2),
    ]
    hists = [as_rows(b)[0]["ttft_s_hist"] for _, b in found]
    assert hists[:2] == [None, None]
    assert Histogram.from_pairs(hists[2]).count == 1


def test_names_of_windows() -> None:
    """Id, key and metadata name pool, window, source and version; the version is the causing record's offset."""
    out = run(fold(), log(record(T0 + 0.5, [end("b", T0 + 0.4)]), tick(T0 + 1)))
    assert [r.id for r in out] == [f"request/chat/{T0}/request.traces/0@1"]
    name, _ = windows(out, REQUEST_WINDOWS)[0]
    assert (name.pool, name.source, name.start_s, name.version) == ("chat", "request.traces/0", T0, 1)
    assert out[0].key == "chat"


def test_late_row_revises_its_window() -> None:
    """A row within the grace changes a closed window, whose next version says so."""
    records = [record(T0 + 1, [arrival("a", T0 + 1)]), tick(T0 + 12), tick(T0 + 13)]
    records += [record(T0 + 600, [arrival("b", T0 + 2)]), tick(T0 + 601), tick(T0 + 700)]
    found = windows(run(fold(), log(*records)), REQUEST_WINDOWS)
    assert [(n.version, n.closed, as_rows(b)[0]["arrivals"]) for n, b in found] == [(1, True, 1), (4, True, 2)]


def test_future_row_waits_for_its_window() -> None:
    """A row from a clock ahead of log time is published when its window has begun, not before."""
    records = [record(T0 + 5, [arrival("a", T0 + 25.0)]), tick(T0 + 10), tick(T0 + 19), tick(T0 + 20), tick(T0 + 32)]
    found = windows(run(fold(), log(*records)), REQUEST_WINDOWS)
    assert [(n.start_s - T0, n.until_s - T0, n.closed) for n, _ in found] == [(20, 20.0, False), (20, 32.0, True)]


def test_conflict_is_refused_and_the_first_stays() -> None:
    """A known name with other content goes to dead.letters; equal content is ignored; both are counted."""
    first = end("a", T0 + 1.0)
    records = [record(T0 + 1, [first, end("a", T0 + 1.0, output_tokens=99.0)])]
    records += [record(T0 + 2, [first, end("a", T0 + 1.5), arrival("a", T0 + 1.0)]), tick(T0 + 12)]
    one = fold()
    out = run(one, log(*records))
    assert [(x["reason"], x["rows"], x["offset"]) for x in letters(out)] == [
        ("conflict", [1], 0),
        ("conflict", [1], 1),
    ]
    (got,) = final(out, REQUEST_WINDOWS)[("chat", T0)]
    assert (got["ends"], got["arrivals"], got["output_tokens"]) == (1, 1, 10)
    assert one.counters["duplicate_rows_total"] == 1
    assert one.counters["dead_conflict_total"] == 2


def test_late_end_is_billed_now_and_late_arrival_is_refused() -> None:
    """Beyond the grace an end counts in the window that is open now, without latency or judgement; an arrival is
    too late; beyond the topic's retention both are."""
    now = T0 + 100_000
    rows = [end("a", now - 901.0), arrival("b", now - 901.0), end("c", now - 90_000.0), end("d", now - 1.0)]
    one = fold()
    out = run(one, log(pool_config(T0), record(now, rows), record(now + 1, [rows[0]]), tick(now + 20)))
    assert sorted((x["reason"], x["rows"][0]) for x in letters(out)) == [("too_late", 1), ("too_late", 2)]
    found = final(out, REQUEST_WINDOWS)
    (corrected,) = found[("chat", now)]
    assert (corrected["ends"], corrected["ok"], corrected["input_tokens"]) == (1, 1, 100)
    assert (corrected["ttft_count"], corrected["slo_judged"], corrected["ttft_s_hist"]) == (0, 0, [])
    assert found[("chat", now - 10)][0]["ttft_count"] == 1
    assert one.counters["corrected_rows_total"] == 1


@pytest.mark.parametrize(
    ("row", "judged", "good"),
    [
        (end("a", T0), 1, 1),
        (end("a", T0, ttft_s=2.0, tpot_s=0.15), 1, 1),
        (end("a", T0, ttft_s=2.001), 1, 0),
        (end("a", T0, tpot_s=0.151), 1, 0),
        (end("a", T0, ttft_s=None), 0, 0),
        (end("a", T0, ttft_s=None, status="error"), 1, 0),
        (end("a", T0, status="timeout"), 1, 0),
        (end("a", T0, status="rejected"), 1, 0),
        (end("a", T0, status="cancelled"), 0, 0),
        (end("a", T0, status=None), 0, 0),
        (end("a", T0, output_tokens=1.0, tpot_s=None, e2e_s=None), 1, 1),
        (end("a", T0, output_tokens=1.0, tpot_s=9.0), 1, 1),
        (end("a", T0, output_tokens=0.0, tpot_s=None), 1, 1),
        (end("a", T0, output_tokens=5.0, tpot_s=None, e2e_s=None), 0, 0),
        (end("a", T0, output_tokens=5.0, tpot_s=None, ttft_s=0.5, e2e_s=1.0), 1, 1),
        (end("a", T0, output_tokens=5.0, tpot_s=None, ttft_s=0.5, e2e_s=2.0), 1, 0),
        (end("a", T0, output_tokens=None, tpot_s=None, e2e_s=None), 1, 1),
        (end("a", T0, pool="unconfigured"), 0, 0),
    ],
)
def test_judgement(row: Row, judged: int, good: int) -> None:
    """An end is judged against its pool's targets if what they apply to is known, and fails closed otherwise."""
    out = run(fold(), log(pool_config(T0), record(T0 + 1, [row]), tick(T0 + 12)))
    (got,) = final(out, REQUEST_WINDOWS)[(row["pool"], T0)]
    assert (got["slo_judged"], got["slo_good"]) == (judged, good)


def test_targets_follow_the_configuration() -> None:
    """New targets hold from their record on, also after a reload; without a pool nothing is judged."""
    gone = ConfigObject(object_kind="pool", name="chat", revision=3, deleted=True)
    records = log(
        pool_config(T0),
        record(T0 + 1, [end("a", T0 + 1.0)]),
        pool_config(T0 + 2, revision=2, slo_ttft_s=0.1),
        record(T0 + 3, [end("b", T0 + 3.0)]),
        LogRecord(0, (T0 + 4) * 1000, ce_type("config"), gone.key, gone.encode()),
        record(T0 + 5, [end("c", T0 + 5.0)]),
        tick(T0 + 12),
    )
    one, out = fold(), []
    for item in records:
        out += one.apply([item])
        again = fold()
        again.load(one.dump())
        one = again
    (got,) = final(out, REQUEST_WINDOWS)[("chat", T0)]
    assert (got["ends"], got["slo_judged"], got["slo_good"]) == (3, 2, 1)


def limits(**spec: Any) -> LogRecord:
    item = ConfigObject(object_kind="limits", name="limits", revision=1, spec=spec)
    return LogRecord(0, T0 * 1000, ce_type("config"), item.key, item.encode())


def test_tenants_beyond_the_bound_are_counted_as_others() -> None:
    """Beyond tenants_max pairs per pool a tenant is `(other)`: nothing is lost, and the overflow is counted."""
    rows = [end(f"q{i}", T0 + 1.0, tenant=f"t{i % 5}") for i in range(20)]
    one = fold()
    out = run(
        one, log(limits(tenants_max=2), record(T0 + 1, rows), record(T0 + 2, [arrival("z", T0 + 2.0)]), tick(T0 + 12))
    )
    got = {r["tenant"]: r["ends"] for r in final(out, REQUEST_WINDOWS)[("chat", T0)]}
    assert got == {"t0": 4, "t1": 4, OTHER: 12}
    assert sum(Histogram.from_pairs(r["ttft_s_hist"]).count for r in final(out, REQUEST_WINDOWS)[("chat", T0)]) == 20
    assert one.counters["overflow_tenants_total"] == 13


def test_pools_beyond_the_bound_are_refused() -> None:
    """Beyond pools_max rows of further pools go to dead.letters as overflow, and the others of the batch are taken."""
    rows = [end(f"q{i}", T0 + 1.0, pool=f"p{i % 3}") for i in range(6)]
    one = fold()
    out = run(one, log(limits(pools_max=2), record(T0 + 1, rows), tick(T0 + 12)))
    assert [(x["reason"], x["rows"]) for x in letters(out)] == [("overflow", [2, 5])]
    assert sorted(final(out, REQUEST_WINDOWS)) == [("p0", T0), ("p1", T0)]
    assert one.counters["overflow_pools_total"] == 2


def test_ids_beyond_the_bound_are_not_remembered() -> None:
    """Beyond request_ids_max rows still count; only their duplicates are no longer seen, and that is counted."""
    rows = [end(f"q{i}", T0 + 1.0) for i in range(8)]
    one = fold()
    run(one, log(limits(request_ids_max=5), record(T0 + 1, rows), record(T0 + 2, rows[:1])))
    assert one.counters["overflow_request_ids_total"] == 8
    assert one.metrics()["request_ids"] == 1


def test_a_longer_grace_does_not_replace_what_is_forgotten() -> None:
    """The grace is raised after a window was final: a row of it is a correction, not a window of that row alone."""
    one = fold()
    out = run(
        one,
        log(
            limits(grace_requests_s=30),
            record(T0 + 1, [end("a", T0 + 1.0), end("b", T0 + 1.0)]),
            tick(T0 + 12),
            tick(T0 + 60),
            limits(grace_requests_s=900)._replace(at_ms=(T0 + 61) * 1000, value=_limits_again(grace_requests_s=900)),
            record(T0 + 62, [end("c", T0 + 2.0)]),
            tick(T0 + 80),
        ),
    )
    got = final(out, REQUEST_WINDOWS)
    assert got[("chat", T0)][0]["ends"] == 2
    assert got[("chat", T0 + 60)][0]["ends"] == 1


def test_another_grace_keeps_what_is_known() -> None:
    """Ids that were taken under one grace are known under another, until that has passed."""
    one = fold()
    row = end("a", T0 + 100.0)
    run(
        one,
        log(
            limits(grace_requests_s=900),
            record(T0 + 101, [row]),
            limits(grace_requests_s=90)._replace(at_ms=(T0 + 102) * 1000, value=_limits_again(grace_requests_s=90)),
            tick(T0 + 103),
            record(T0 + 104, [row]),
        ),
    )
    assert one.counters["duplicate_rows_total"] == 1


def _limits_again(**spec: Any) -> bytes:
    return ConfigObject(object_kind="limits", name="limits", revision=2, spec=spec).encode()


@pytest.mark.parametrize("name", ["pool", "replica"])
def test_names_with_a_slash_are_refused(name: str) -> None:
    """A pool or replica that cannot be part of a key is refused as invalid, its row alone."""
    rows = [end("a", T0 + 1.0, **{name: "a/b"}), end("b", T0 + 1.0)]
    out = run(fold(), log(record(T0 + 1, rows), tick(T0 + 12)))
    assert [(x["reason"], x["field"], x["rows"]) for x in letters(out)] == [("invalid", name, [0])]
    assert final(out, REQUEST_WINDOWS)[("chat", T0)][0]["ends"] == 1


def test_state_shrinks_again() -> None:
    """When log time has passed the grace, windows and ids are gone."""
    one = fold()
    run(one, log(record(T0 + 1, [end("a", T0 + 1.0)]), tick(T0 + 12), tick(T0 + 1300)))
    assert one.metrics()["request_windows"] == 0
    assert one.metrics()["request_ids"] == 0
    assert one.dump() != fold().dump()
