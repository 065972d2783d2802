"""Which tenants keep their names where there are too many: configured ones and heavy ones, whoever comes first."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from models.requests.fold import RequestsFold
from models.requests.heavy import Heavy
from models.requests.window import OTHER
from schemas.config import ConfigObject
from schemas.log import LogRecord, Result
from schemas.signals import REQUEST_WINDOWS
from tests.models.law import check_law, log, run, tick
from tests.models.node.logs import final
from tests.models.requests.logs import T0, arrival, end, fold, pool_config, record, tenant_config
from tests.models.requests.oracle import Row

K = 4


def limits() -> LogRecord:
    item = ConfigObject(object_kind="limits", name="limits", revision=1, spec={"tenants_max": K})
    return LogRecord(0, T0 * 1000, "fleetloop.config.v1", item.key, item.encode())


def ends_by_tenant(out: list[Result], start_s: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for row in final(out, REQUEST_WINDOWS).get(("chat", start_s), []):
        found[row["tenant"]] += row["ends"]
    return found


def crowd(start_s: float, strangers: int, names: list[str]) -> list[LogRecord]:
    """Strangers first, then the named ones, ten times each."""
    rows = [end(f"{start_s}-{i}", start_s + 1.0, tenant=f"s{start_s}-{i}") for i in range(strangers)]
    rows += [end(f"{start_s}-{name}-{i}", start_s + 2.0, tenant=name) for name in names for i in range(10)]
    return [record(start_s + 3, rows[i : i + 10]) for i in range(0, len(rows), 10)]


def test_heavy_tenants_keep_their_names() -> None:
    """Who was heavy in the windows before is named although a crowd came first; the crowd is summed and counted."""
    one = fold()
    crowds = [item for k in range(3) for item in crowd(T0 + 10 * k, 12, ["whale", "shark"])]
    out = run(one, log(pool_config(T0), limits(), *crowds, tick(T0 + 33), tick(T0 + 34)))
    first, last = ends_by_tenant(out, T0), ends_by_tenant(out, T0 + 20)
    assert (first["whale"], first[OTHER]) == (0, 12 - K + 20)
    assert (last["whale"], last["shark"], last[OTHER]) == (10, 10, 12 - K)
    assert one.counters["overflow_tenants_total"] > 0


def test_a_configured_tenant_is_always_named() -> None:
    """A tenant of fleet.config keeps its name in a full window; of its classes only the sum is kept."""
    rows = [end(f"s{i}", T0 + 1.0, tenant=f"s{i}") for i in range(9)]
    rows += [end(f"a{i}", T0 + 1.0, tenant="acme", **{"class": f"c{i}"}) for i in range(3)]
    records = [pool_config(T0), limits(), tenant_config(T0, "acme", "gold"), record(T0 + 2, rows), tick(T0 + 13)]
    out = run(fold(), log(*records, tick(T0 + 14)))
    got = {(r["tenant"], r["class"]): r["ends"] for r in final(out, REQUEST_WINDOWS)["chat", T0]}
    assert got["acme", OTHER] == 3
    assert got[OTHER, OTHER] == 9 - K
    assert len(got) == K + 2


drawn_rows = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 12), st.sampled_from(["a", "b"]), st.booleans()), max_size=60
)


def made(drawn: list[tuple[int, int, str, bool]]) -> list[Row]:
    rows = []
    for number, (window, tenant, kind, is_end) in enumerate(drawn):
        make = end if is_end else arrival
        at_s = T0 + 10.0 * window + 1
        rows.append(make(f"q{number}", at_s, tenant=f"t{tenant * tenant // 12}", **{"class": kind}))
    return rows


def told(rows: list[Row], data: Any) -> tuple[RequestsFold, list[Result]]:
    records, now, left = [pool_config(T0), limits(), tenant_config(T0, "t0", "gold")], T0 + 30.0, rows
    while left:
        size = data.draw(st.integers(1, 9))
        records.append(record(now, left[:size]))
        left, now = left[size:], now + data.draw(st.sampled_from([0.0, 5.0]))
    one = fold()
    return one, run(one, log(*records, tick(now + 13), tick(now + 30)))


@settings(max_examples=60)
@given(drawn_rows, st.randoms(use_true_random=False), st.data())
def test_no_order_loses_anything(drawn: list[tuple[int, int, str, bool]], random: Any, data: st.DataObject) -> None:
    """In any order: sums over tenants are exact, no name says more than is its own, a configured tenant has all of
    its own, rows stay within the bound, and what lost its name is counted."""
    rows = made(drawn)
    random.shuffle(rows)
    one, out = told(rows, data)
    nameless = 0
    for window in range(3):
        start_s = T0 + 10 * window
        mine = [r for r in rows if r["at_s"] // 10 * 10 == start_s]
        true = Counter(r["tenant"] for r in mine)
        got = final(out, REQUEST_WINDOWS).get(("chat", start_s), [])
        said: Counter[str] = Counter()
        for r in got:
            said[r["tenant"]] += r["arrivals"] + r["ends"]
            nameless += (r["arrivals"] + r["ends"]) * (r["class"] == OTHER)
        assert said.total() == len(mine)
        assert said["t0"] == true["t0"]
        assert all(said[tenant] <= true[tenant] for tenant in said if tenant != OTHER)
        assert len(got) <= 2 * K + 1
    assert one.counters.get("overflow_tenants_total", 0) == nameless


@settings(max_examples=40)
@given(drawn_rows, st.data())
def test_law(drawn: list[tuple[int, int, str, bool]], data: st.DataObject) -> None:
    """The law of folds holds where tenants are too many."""
    rows = made(drawn)
    records = [limits(), *(record(T0 + 30 + 3 * i, rows[i : i + 6]) for i in range(0, len(rows), 6)), tick(T0 + 300)]
    check_law(fold, log(*records), data)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=200))
def test_space_saving(said: list[tuple[int, int]]) -> None:
    """A count is never below the truth, never above by more than its error, and whoever has more than 1 / K of all rows
    for certain is kept; there are fewer than K of them and at most 2 K counters."""
    heavy, true = Heavy(), Counter[str]()
    for tenant, rows in said:
        heavy.add(f"t{tenant}", rows, K)
        true[f"t{tenant}"] += rows
        assert len(heavy.counts) <= 2 * K
    for tenant, (count, error) in heavy.counts.items():
        assert count - error <= true[tenant] <= count
    assert heavy.total == true.total()
    most, rows = (true.most_common(1) or [("", 0)])[0]
    assert most in heavy.counts or 2 * rows <= true.total()
    sure = [t for t, (count, error) in heavy.counts.items() if (count - error) * K > heavy.total]
    heavy.step(K)
    assert list(heavy.kept) == sure
    assert len(sure) < K


def test_what_was_heavy_is_forgotten() -> None:
    """A pool that no longer has too many rows keeps no counters after the grace."""
    one = fold()
    run(one, log(limits(), *crowd(T0, 12, ["whale"]), tick(T0 + 20)))
    assert one.heavy
    run(one, [tick(T0 + 1000)._replace(offset=99)])
    assert not one.heavy
