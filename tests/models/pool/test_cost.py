"""The bill: parts add up to it, every request is in it, revisions correct it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from models.pool.cost import Totals
from schemas.log import LogRecord, Result
from tests.models.law import tick
from tests.models.pool.signals import T0, config, engine_window, pool_config, pool_fold, request_window, world

PRICE = 3.6  # USD per GPU hour: 0.001 USD a GPU second


def newest(out: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Cost rows by key, the greatest version of each."""
    found: dict[str, dict[str, Any]] = {}
    for result in out:
        if result.topic == "cost.windows":
            row = json.loads(result.value)
            assert result.key not in found or row["version"] > found[result.key]["version"]
            found[result.key] = row
    return found


def billed(records: list[LogRecord], until_s: float) -> dict[str, dict[str, Any]]:
    """What a log costs once it has been silent until `until_s`."""
    fold = pool_fold()
    numbered = [record._replace(offset=i) for i, record in enumerate([*records, tick(until_s)])]
    return newest(fold.apply(numbered))


def head(**spec: Any) -> list[LogRecord]:
    """A pool with its price."""
    return [pool_config(T0, **spec), config(T0, "price", "H100", {"usd_per_gpu_hour": PRICE})]


def test_exact_figures() -> None:
    """Two replicas of 4 GPUs, one busy, one half busy; tenants share the direct cost by work, idle stays apart."""
    engines = [
        {"replica": "a", "running_mean": 3.0},
        {"replica": "b", "running_mean": 0.5},
        {"replica": "c", "state": "starting", "allocated_s": 5.0, "running_mean": None},
    ]
    # work: acme 100 - 20 + 4 x 80 = 400, zen 200 + 4 x 100 = 600
    requests = [
        {"tenant": "acme", "ends": 2, "input_tokens": 100.0, "cached_tokens": 20.0, "output_tokens": 80.0},
        {"tenant": "zen", "ends": 1, "input_tokens": 200.0, "output_tokens": 60.0},
        {"tenant": "zen", "class": "batch", "ends": 1, "input_tokens": 0.0, "output_tokens": 40.0},
    ]
    got = billed([*head(), request_window(T0 + 12, T0, 1, requests), engine_window(T0 + 12, T0, 1, engines)], T0 + 20)
    pool, acme, zen = (got[f"chat/{name}/{T0}"] for name in ("*", "acme", "zen"))
    assert pool["usd_total"] == pytest.approx(0.1, abs=1e-12)  # (40 + 40 + 20) GPU s x 0.001
    assert pool["usd_direct"] == pytest.approx(0.06, abs=1e-12)
    assert pool["usd_idle"] == pytest.approx(0.04, abs=1e-12)
    assert acme["usd_direct"] == pytest.approx(0.024, abs=1e-12)
    assert zen["usd_direct"] == pytest.approx(0.036, abs=1e-12)
    assert acme["usd_total"] + zen["usd_total"] == pytest.approx(pool["usd_total"], abs=1e-12)
    assert acme["usd_per_million_tokens_direct"] == pytest.approx(0.024e6 / 180)
    assert zen["usd_per_million_tokens"] == pytest.approx(0.06e6 / 300)
    assert (pool["requests"], acme["requests"], zen["requests"]) == (4, 2, 2)
    assert pool["usd_hour_to_date"] == pool["usd_day_to_date"] == pytest.approx(0.1)


@given(
    usage=st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=6),
    running=st.lists(st.none() | st.floats(0, 5), min_size=1, max_size=5),
)
@example(usage=[(0, 0.0, 2.2e-311)], running=[None])  # hardly a token: the price of a million would be infinite
def test_parts_add_up(usage: list[tuple[int, float, float]], running: list[float | None]) -> None:
    """Direct of all tenants + idle = the bill, whatever the load."""
    requests = [
        {"tenant": f"t{i}", "ends": ends, "input_tokens": a, "output_tokens": b} for i, (ends, a, b) in enumerate(usage)
    ]
    engines = [{"replica": f"r{i}", "running_mean": mean} for i, mean in enumerate(running)]
    got = billed([*head(), request_window(T0 + 12, T0, 1, requests), engine_window(T0 + 12, T0, 1, engines)], T0 + 20)
    pool = got.pop(f"chat/*/{T0}")
    assert pool["usd_total"] == pytest.approx(0.04 * len(running), abs=1e-9)
    assert pool["usd_direct"] + pool["usd_idle"] == pytest.approx(pool["usd_total"], abs=1e-9)
    assert sum(row["usd_direct"] for row in got.values()) + pool["usd_idle"] == pytest.approx(
        pool["usd_total"], abs=1e-9
    )
    assert sum(row["requests"] for row in got.values()) == pool["requests"]


def test_every_request_is_billed_however_late() -> None:
    """A source that comes 20 minutes late still brings its requests into their own windows."""
    late = request_window(T0 + 1300, T0, 9, [{"tenant": "acme", "ends": 7}], source="request.traces/1")
    records = [*world([2.0] * 6), late]
    got = billed(records, T0 + 1320)
    assert sum(row["requests"] for row in got.values() if row["tenant"] == "acme") == 6 * 10 + 7
    assert got[f"chat/acme/{T0}"]["requests"] == 17


def test_a_revision_corrects_window_and_totals() -> None:
    """A higher version of a source's window replaces what was billed for it; an older or equal one changes nothing."""
    first = engine_window(T0 + 12, T0, 5, [{"replica": "a"}])
    records = [*head(), first, tick(T0 + 20), engine_window(T0 + 30, T0, 9, [{"replica": "a"}, {"replica": "b"}])]
    got = billed([*records, engine_window(T0 + 31, T0, 7, [{"replica": "a"}]), first], T0 + 40)
    pool = got[f"chat/*/{T0}"]
    assert pool["usd_total"] == pytest.approx(0.08)
    assert pool["usd_month_to_date"] == pytest.approx(0.08)


def test_unknown_price_and_unknown_allocation_are_null_not_zero() -> None:
    """Without a price, or without word of replicas, cost is null; the requests are billed all the same."""
    row = [{"tenant": "acme", "ends": 3}]
    unpriced = billed(
        [pool_config(T0), request_window(T0 + 12, T0, 1, row), engine_window(T0 + 12, T0, 1, [{"replica": "a"}])],
        T0 + 20,
    )
    unheard = billed([*head(), request_window(T0 + 12, T0, 1, row)], T0 + 20)
    for got in (unpriced, unheard):
        assert got[f"chat/*/{T0}"]["usd_total"] is None
        assert got[f"chat/acme/{T0}"]["usd_direct"] is None
        assert got[f"chat/acme/{T0}"]["requests"] == 3


def test_a_price_that_comes_late_bills_what_is_still_known() -> None:
    """Windows without a price are billed when it comes; until then nobody knows what was spent, so no budget takes it
    for nothing."""
    fold = pool_fold()
    policy, _, *rest = world([2.0] * 6)
    out = fold.apply([policy, *rest])
    spent = [json.loads(r.value)["usd_day_to_date"] for r in out if r.type == "fleetloop.pool.status.v1"]
    assert spent[-1] is None
    records = [config(T0 + 70, "price", "H100", {"usd_per_gpu_hour": PRICE}), *(tick(T0 + s) for s in range(71, 90))]
    out = fold.apply([r._replace(offset=10_000 + i) for i, r in enumerate(records)])
    rows = newest(out)
    assert [rows[f"chat/*/{T0 + 10 * i}"]["usd_total"] for i in range(5)] == [pytest.approx(0.16)] * 5
    spent = [json.loads(r.value)["usd_day_to_date"] for r in out if r.type == "fleetloop.pool.status.v1"]
    assert spent[-1] == pytest.approx(sum(row["usd_total"] for key, row in rows.items() if "/*/" in key))


def test_a_tenant_named_like_the_pool_row_is_not_the_pool() -> None:
    """Whatever tenants are called, every row has a key of its own."""
    requests = [{"tenant": name, "ends": 1, "output_tokens": 1.0} for name in ("*", "**", "a/b")]
    got = billed(
        [*head(), request_window(T0 + 12, T0, 1, requests), engine_window(T0 + 12, T0, 1, [{"replica": "a"}])], T0 + 20
    )
    assert {row["tenant"] for row in got.values()} == {None, "*", "**", "a/b"}
    assert got[f"chat/*/{T0}"]["tenant"] is None


def test_a_new_price_does_not_rewrite_the_past() -> None:
    """A window keeps the price of its first billing when it is revised."""
    records = [
        *head(),
        engine_window(T0 + 12, T0, 1, [{"replica": "a"}]),
        tick(T0 + 20),
        config(T0 + 21, "price", "H100", {"usd_per_gpu_hour": 2 * PRICE}, revision=2),
        engine_window(T0 + 22, T0, 2, [{"replica": "a", "allocated_s": 5.0}]),
    ]
    assert billed(records, T0 + 30)[f"chat/*/{T0}"]["usd_total"] == pytest.approx(0.02)


def test_totals_by_utc_hour_day_and_month() -> None:
    """Windows count where they start; the turn of the month turns hour, day and month."""
    totals = Totals()
    turn = 1_701_388_800  # 2023-12-01 00:00:00 UTC
    totals.add(turn - 10, 1.0)
    totals.add(turn, 2.0)
    totals.add(turn + 3600, 4.0)
    assert totals.to_date(turn - 10) == {"hour": 1.0, "day": 1.0, "month": 1.0}
    assert totals.to_date(turn + 10) == {"hour": 2.0, "day": 6.0, "month": 6.0}
    totals.add(turn - 10, -0.5)
    assert totals.to_date(turn - 1)["month"] == 0.5
