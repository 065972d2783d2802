"""Two reporters of one request: the one that the policy names counts, the other adds what is missing, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.requests.fold import RequestsFold
from schemas.config import ConfigObject
from schemas.log import LogRecord
from schemas.signals import REQUEST_WINDOWS
from tests.models.law import check_law, log, run, tick
from tests.models.node.logs import final
from tests.models.requests.logs import T0, arrival, end, fold, pool_config, record
from tests.models.requests.oracle import Cell, Row, cells_of, deliver, oracle, plain, row, tpot_s

REPORTERS = {"chat": "gateway", "code": "engine"}
FILLED = ("priority", "status", "input_tokens", "output_tokens", "cached_tokens", "image_units", "audio_s", "video_s")
FILLED += ("ttft_s", "tpot_s", "e2e_s", "queue_s", "tenant", "class", "model")
WARM = [end(f"warm-{pool}", T0 + 0.5, pool=pool, reporter=REPORTERS[other]) for pool, other in
        (("chat", "code"), ("code", "chat"))]  # fmt: skip
"""An end of the reporter that only enriches: from then on the pool has two."""
SPARSE = (
    "status",
    "output_tokens",
    "cached_tokens",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "queue_s",
    "tenant",
    "class",
    "model",
)


def config() -> list[LogRecord]:
    return [pool_config(T0, pool, reporter=reporter, slo_tpot_s=1.0) for pool, reporter in REPORTERS.items()]


def pair(number: int, seed: int) -> list[Row]:
    """The rows of one request: by a gateway, an engine or both, at other times, each with its own gaps."""
    seed, which = divmod(seed, 6)
    made = []
    for reporter in ("gateway", "engine"):
        seed, drawn = divmod(seed, 2**62)
        seed, blank = divmod(seed, 2 ** len(SPARSE))
        one = {**row(f"q{number}", drawn), "reporter": reporter, "attempt": 1 + number % 2}
        for bit, name in enumerate(SPARSE):
            if blank >> bit & 1 and name in one:
                one[name] = None
        made.append(one)
    made[1]["pool"] = made[0]["pool"]
    return made if which < 4 else [made[which - 4]]


pairs = st.lists(st.integers(0, 2**160), max_size=16).map(
    lambda seeds: [pair(number, seed) for number, seed in enumerate(seeds)]
)


def joined(requests: Sequence[Sequence[Row]]) -> tuple[list[Row], dict[Cell, Row]]:
    """The rows that count, with what the other reporter adds, and the cells of what is left unjoined."""
    counted: list[Row] = []
    unjoined: dict[Cell, Row] = {}

    def apart(r: Row) -> None:
        cell = (r["pool"], int(r["at_s"]) // 10 * 10, "unknown", "default", None, None)
        unjoined.setdefault(cell, {"unjoined": 0})["unjoined"] += 1

    for r in WARM:
        apart(r)
    for request in requests:
        own = [r for r in request if r["reporter"] == REPORTERS[r["pool"]]]
        others = [r for r in request if r["reporter"] != REPORTERS[r["pool"]] and r["event"] == "end"]
        ends = [r for r in own if r["event"] == "end"]
        counted += [r for r in own if r["event"] == "arrival"]
        if ends and others:
            ours, theirs = {**ends[0], "tpot_s": tpot_s(ends[0])}, {**others[0], "tpot_s": tpot_s(others[0])}
            added = {name: theirs[name] for name in FILLED if ours[name] is None and theirs[name] is not None}
            counted.append({**ours, **added, "enriched": bool(added), "settled": True})
        else:
            counted += ends
            for r in others:
                apart(r)
    return counted, unjoined


@settings(max_examples=150)
@given(pairs, st.randoms(use_true_random=False), st.data())
def test_windows_equal_the_oracle_in_any_order(requests: list[list[Row]], random: Any, data: st.DataObject) -> None:
    """Whoever speaks first, however the rows are batched, repeated and late: the windows are what a plain join says."""
    sent = [r for request in requests for r in request]
    sent += [r for r in sent if random.random() < 0.3]
    random.shuffle(sent)
    out = run(fold(), log(*config(), record(T0 + 0.6, WARM), *deliver(sent, data)))
    counted, unjoined = joined(requests)
    wanted = oracle(counted, {}, (2.0, 1.0))
    for cell, values in unjoined.items():
        wanted[cell] = plain({**wanted.get(cell, {}), **values})
    assert cells_of(final(out, REQUEST_WINDOWS)) == wanted


@st.composite
def logs(draw: st.DrawFn) -> list[LogRecord]:
    """Both reporters' rows, policies that change, few places for twins, and time that passes the grace."""
    drawn = [r for request in draw(pairs) for r in request]
    limits = ConfigObject(object_kind="limits", name="limits", revision=1, spec={"request_twins_max": 4})
    found = [LogRecord(0, T0 * 1000, "fleetloop.config.v1", limits.key, limits.encode())] if draw(st.booleans()) else []
    now = T0 + 40.0
    for _ in range(draw(st.integers(0, 12))):
        now += draw(st.sampled_from([0.0, 1.0, 3.0, 12.0, 400.0]))
        if draw(st.integers(0, 5)) == 0:
            reporter = draw(st.sampled_from(["gateway", "engine"]))
            found.append(pool_config(now, "chat", draw(st.integers(1, 9)), reporter=reporter))
        elif drawn:
            found.append(record(now, draw(st.lists(st.sampled_from(drawn), min_size=1, max_size=8))))
    return log(*found)


@settings(max_examples=80)
@given(logs(), st.data())
def test_law(records: list[LogRecord], data: st.DataObject) -> None:
    """The law of folds holds where two reporters meet, policies change and rows are forgotten."""
    check_law(fold, records, data)


def told(*records: LogRecord) -> tuple[RequestsFold, list[Row]]:
    """The fold, and all rows of the final windows."""
    one = fold()
    out = run(one, log(*records))
    return one, [r for window in final(out, REQUEST_WINDOWS).values() for r in window]


@pytest.mark.parametrize("gateway_first", [True, False])
def test_the_other_reporter_only_adds_what_is_missing(gateway_first: bool) -> None:
    """What the gateway knows stays, what it does not know comes from the engine, and the request counts once."""
    gateway = end("a", T0 + 2.0, ttft_s=0.5, tpot_s=None, e2e_s=None, cached_tokens=None)
    engine = end("a", T0 + 1.9, reporter="engine", tenant=None, ttft_s=0.2, tpot_s=0.1, cached_tokens=64.0, queue_s=0.1)
    sent = [record(T0 + 3, [gateway]), record(T0 + 4, [engine])]
    warm = record(T0 + 1, [end("w", T0 + 1.0, reporter="engine")])
    _, rows = told(pool_config(T0), warm, *(sent if gateway_first else sent[::-1]), tick(T0 + 13), tick(T0 + 30))
    (got,) = [r for r in rows if r["ends"]]
    assert (got["tenant"], got["ends"], got["enriched"], got["input_tokens"]) == ("acme", 1, 1, 100)
    assert (got["ttft_s_sum"], got["cached_tokens"], got["queue_count"]) == (0.5, 64.0, 1)
    assert (got["tpot_s_sum"], got["slo_good"]) == (round(0.1 * 2**20) / 2**20, 1)
    assert sum(r["unjoined"] for r in rows) == 1  # the first of all, whose gateway never spoke


def test_the_gateway_tells_the_engine_whose_request_it_was() -> None:
    """Where the engine counts, tenant, class and tier come from the gateway's row, however late."""
    engine = end("a", T0 + 2.0, reporter="engine", tenant=None, **{"class": None})
    gateway = end("a", T0 + 2.1, tenant="acme", ttft_s=9.0)
    warm = record(T0 + 1, [end("w", T0 + 1.0)])
    policy = pool_config(T0, reporter="engine", tiers={"gold": {"slo_ttft_s": 0.1}})
    gold = ConfigObject(object_kind="tenant", name="acme", revision=1, spec={"tier": "gold"})
    acme = LogRecord(0, T0 * 1000, "fleetloop.config.v1", gold.key, gold.encode())
    late = record(T0 + 700, [gateway])
    _, rows = told(policy, acme, warm, record(T0 + 3, [engine]), tick(T0 + 20), late, tick(T0 + 702))
    got = {(r["tenant"], r["class"]): r for r in rows}
    assert (got["acme", "fast"]["ends"], got["acme", "fast"]["slo_judged"], got["acme", "fast"]["slo_good"]) == (
        1,
        1,
        0,
    )
    assert (got["unknown", "default"]["ends"], got["unknown", "default"]["ttft_s_sum"]) == (0, 0)
    assert got["unknown", "default"]["ttft_s_hist"] == []


def test_what_cannot_be_joined_is_not_added() -> None:
    """Ids that differ: the engine's ends count apart, and as never joined once the grace has passed."""
    rows = [end(f"g{i}", T0 + 1.0) for i in range(3)] + [end(f"e{i}", T0 + 1.0, reporter="engine") for i in range(3)]
    rows += [arrival(f"e{i}", T0 + 1.0, reporter="engine") for i in range(2)]
    one, got = told(pool_config(T0), record(T0 + 2, rows), tick(T0 + 13), tick(T0 + 14), tick(T0 + 1000))
    assert sum(r["ends"] for r in got) == 3
    assert sum(r["arrivals"] for r in got) == 0
    assert sum(r["unjoined"] for r in got) == 3
    assert one.counters["foreign_rows_total"] == 5
    assert one.counters["unjoined_rows_total"] == 3
    assert one.metrics()["request_twins"] == 0


def test_a_policy_that_changes_counts_no_request_twice() -> None:
    """The gateway's row was counted, then the policy names the engine: its row of the same request only enriches."""
    warm = record(T0 + 1, [end("w", T0 + 1.0, reporter="engine")])
    first, second = end("a", T0 + 1.0), end("a", T0 + 2.5, reporter="engine", queue_s=0.5)
    change = pool_config(T0 + 2, revision=2, reporter="engine")
    _, rows = told(pool_config(T0), warm, record(T0 + 1, [first]), change, record(T0 + 3, [second]), tick(T0 + 13))
    assert sum(r["ends"] for r in rows) == 1
    assert sum(r["enriched"] for r in rows) == 1


def test_without_a_second_reporter_nothing_is_kept() -> None:
    """A pool that one reporter alone speaks of costs no memory for twins."""
    one, _ = told(pool_config(T0), record(T0 + 2, [end(f"g{i}", T0 + 1.0) for i in range(9)]))
    assert one.metrics()["request_twins"] == 0


def test_too_many_twins_forget_the_oldest() -> None:
    """Beyond request_twins_max the oldest rows no longer wait, which is counted; none counts twice for it."""
    limits = ConfigObject(object_kind="limits", name="limits", revision=1, spec={"request_twins_max": 8})
    bound = LogRecord(0, T0 * 1000, "fleetloop.config.v1", limits.key, limits.encode())
    engine = [end(f"q{i}", T0 + 1.0, reporter="engine", queue_s=1.0) for i in range(20)]
    gateway = [end(f"q{i}", T0 + 1.0) for i in range(20)]
    sent = [record(T0 + 2, engine[i : i + 4]) for i in range(0, 20, 4)]
    one, rows = told(bound, pool_config(T0), *sent, record(T0 + 3, gateway), tick(T0 + 13))
    assert sum(r["ends"] for r in rows) == 20
    joined_ends = sum(r["enriched"] for r in rows)
    assert 0 < joined_ends <= 8
    assert one.counters["overflow_twins_total"] >= 20 - joined_ends
    assert one.metrics()["request_twins"] <= 8


def test_texts_of_forgotten_rows_are_forgotten() -> None:
    """The vocabulary of waiting rows holds no more than they use."""
    one = fold()
    warm = record(T0 + 0.5, [end("w", T0 + 0.5, reporter="engine", tenant=None, **{"class": None})])
    run(one, log(warm, *(record(T0 + 1, [end(f"q{i}", T0 + 1.0, tenant=f"t{i}")]) for i in range(50))))
    assert len(one.twins.vocabulary) == 52
    run(one, [tick(T0 + 905)._replace(offset=99), tick(T0 + 915)._replace(offset=100)])
    assert len(one.twins.vocabulary) == 0
    assert not np.any(one.twins.texts >= 0)
