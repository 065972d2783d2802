"""Windows of replicas: what scrapes that failed, states, texts and unnamed replicas look like."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.node.engines import COUNTERS
from models.node.samples import SampleStore
from models.node.weighing import missed
from schemas.log import LogRecord
from schemas.signals import ENGINE_WINDOWS
from tests.models.law import log, run, tick
from tests.models.node.logs import T0, engine, final, fold, inventory, replica

Row = dict[str, Any]


def scraped(at: float, name: str = "r1", node: str = "n1", **more: Any) -> LogRecord:
    row = {"replica": name, "at_s": at, "status": "ok", "start_s": T0 - 500.0, **more}
    return engine(at, [row], node)


def closed(records: list[LogRecord], start: int = T0, pool: str = "chat") -> list[Row]:
    return final(run(fold(), log(*records, tick(T0 + 12), tick(T0 + 22))), ENGINE_WINDOWS).get((pool, start), [])


def test_every_counter_is_growth_and_absent_ones_stay_unknown() -> None:
    """Each counter of a sample becomes its growth in the window; one that the engine does not give is null, not 0."""
    for left_out in (None, "failed"):
        names = [name for name in COUNTERS if name != left_out]
        counters = {t: {name: 100.0 + t * (i + 1) for i, name in enumerate(names)} for t in (0, 10)}
        records = [inventory(T0 - 1.0, [replica()]), *(scraped(T0 + float(t), **c) for t, c in counters.items())]
        (got,) = closed(records)
        assert {name: got[name] for name in names} == {name: 10.0 * (i + 1) for i, name in enumerate(names)}
        assert left_out is None or got[left_out] is None


def test_capacity_and_texts_are_the_latest() -> None:
    """Capacity, largest batch, engine and model are those of the last scrape before the window's end."""
    said = [("vllm", "a", 1000.0, 8.0), ("vllm", "b", 2000.0, 16.0), ("sglang", "c", 3000.0, 32.0)]
    records = [inventory(T0 - 1.0, [replica()])]
    for t, (name, model, capacity, most) in zip((1.0, 8.0, 11.0), said, strict=True):
        records.append(scraped(T0 + t, engine=name, model=model, kv_capacity_tokens=capacity, running_max=most))
    for start, want in ((T0, said[1]), (T0 + 10, said[2])):
        (got,) = closed(records, start)
        assert (got["engine"], got["model"], got["kv_capacity_tokens"], got["running_max"]) == want


def test_states_split_the_time() -> None:
    """Time that is paid for while loading and draining is told apart from the rest."""
    records = [inventory(T0 - 5.0, [replica(state="starting", since_s=T0 - 5.0)])]
    records += [inventory(T0 + 3.0, [replica(state="ready", since_s=T0 + 3.0)])]
    records += [inventory(T0 + 8.0, [replica(state="draining", since_s=T0 + 8.0)])]
    (got,) = closed(records)
    assert (got["allocated_s"], got["loading_s"], got["draining_s"], got["state"]) == (10, 3, 2, "draining")


def test_idle_is_what_scrapes_saw() -> None:
    """Idle is the time with nothing running and nothing waiting; what nobody saw is neither idle nor busy."""
    records = [inventory(T0 - 1.0, [replica()])]
    seen = [(0.0, 0.0, 0.0), (1.0, 0.0, 1.0), (2.0, 1.0, 0.0), (3.0, 0.0, 0.0)]
    records += [scraped(T0 + t, running=running, waiting=waiting) for t, running, waiting in seen]
    (got,) = closed(records)
    assert got["idle_s"] == 1 + 3  # the last speaks for three seconds
    (unknown,) = closed([inventory(T0 - 1.0, [replica()]), scraped(T0 + 1.0, running=0.0)])
    assert unknown["idle_s"] is None


def test_a_dead_target_answers_no_more() -> None:
    """1 while the latest scrape answered, 0 once it did not, null where nobody scrapes."""
    dead = engine(T0 + 9.0, [{"replica": "r1", "at_s": T0 + 9.0, "status": "dead"}])
    held = [inventory(T0 - 1.0, [replica()])]
    assert closed([*held, scraped(T0 + 8.0)])[0]["answers"] == 1
    assert closed([*held, scraped(T0 + 8.0), dead])[0]["answers"] == 0
    assert closed(held)[0]["answers"] is None


@pytest.mark.parametrize(
    ("numbers", "want"),
    [
        ({1.0: 7, 2.0: 8, 3.0: 9}, 0),
        ({1.0: 7, 5.0: 11}, 3),
        ({1.0: 7, 3.0: None, 5.0: 9}, 1),
        ({1.0: 7, 2.0: "dead", 3.0: "dead", 4.0: 10}, 2),
        ({1.0: 7, 2.0: "dead", 3.0: "dead"}, 2),
        ({1.0: 900, 5.0: 1}, 0),
        ({1.0: None, 2.0: None}, None),
        ({1.0: None, 2.0: "dead"}, 1),
    ],
)
def test_missed_scrapes(numbers: dict[float, Any], want: int | None) -> None:
    """Gaps in the numbers and scrapes that say themselves that they failed, each counted once; a scraper that began
    anew missed nothing."""
    records = [inventory(T0 - 1.0, [replica()])]
    for t, number in numbers.items():
        row = {"replica": "r1", "at_s": T0 + t, "status": "dead" if number == "dead" else "ok"}
        records.append(engine(T0 + t, [row if number in ("dead", None) else row | {"scrape": number}]))
    assert closed(records)[0]["missed"] == want


@given(st.lists(st.tuples(st.integers(1, 200), st.booleans()), min_size=2, max_size=12, unique_by=lambda x: x[0]))
def test_missed_of_adjoining_windows_add_up(drawn: list[tuple[int, bool]]) -> None:
    """Whatever the gaps, each scrape between the first and the last that answered is missed in one window or none."""
    scrapes = sorted(drawn)
    store = SampleStore(2)
    for number, dead in scrapes:
        value = [[float(dead)], [np.nan if dead else float(number)]]
        store.add(np.ones(1), np.array([number / 4]), np.array(value), 3.0)
    s = store.series()
    parts = [missed(s, s.values[1], s.values[0] > 0, w, w + 10)[0] for w in range(0, 60, 10)]
    answered = [number for number, dead in scrapes if not dead]
    inside = sum(answered[0] < number < answered[-1] for number in range(201)) if answered else 0
    outside = sum(dead and not (answered and answered[0] < n < answered[-1]) for n, dead in scrapes)
    assert np.nansum(parts) == inside - len(answered[1:-1]) + outside


def test_replica_that_no_inventory_names() -> None:
    """Its samples count in the pool that they name, as of unknown state and without cost; without a pool nowhere."""
    records = [scraped(T0 + t, node="-", pool="chat", generation_tokens=100.0 * t) for t in (1.0, 2.0, 3.0)]
    records += [scraped(T0 + t, name="r9", node="-", generation_tokens=1.0) for t in (1.0, 2.0)]
    (got,) = closed(records)
    assert (got["replica"], got["node"], got["state"], got["billed"]) == ("r1", "-", "unknown", 0)
    assert (got["gpus"], got["allocated_s"], got["gpu_type"], got["generation_tokens"]) == (0, 0, None, 200)
    assert closed(records, T0 + 10) == []  # nothing is said any more


def test_unnamed_target_that_dies_is_seen_dead() -> None:
    """It keeps its row in its pool as long as scrapes fail, whether or not those name the pool."""
    records = [scraped(T0 + 1.0, node="-", pool="chat", model="m")]
    for t in range(2, 22):
        records.append(engine(T0 + float(t), [{"replica": "r1", "at_s": T0 + float(t), "status": "dead"}], "-"))
    for start in (T0, T0 + 10):
        (got,) = closed(records, start)
        assert (got["answers"], got["state"], got["model"], got["samples"]) == (0, "unknown", "m", int(start == T0))


def test_inventory_names_it_in_the_end() -> None:
    """Once an inventory names the replica, that is what counts, also for the windows before."""
    records = [scraped(T0 + t, pool="chat") for t in (1.0, 2.0)]
    (got,) = closed([*records, inventory(T0 + 11.0, [replica(since_s=T0 - 50.0)]), tick(T0 + 13), tick(T0 + 14)])
    assert (got["state"], got["gpus"], got["allocated_s"], got["samples"]) == ("ready", 1, 10, 2)


def test_text_beyond_the_bound_is_unknown_and_counted() -> None:
    """A name too many is left out of its row, not the row."""
    one = fold()
    one.limits = one.limits.model_copy(update={"texts_max": 1})
    records = [
        inventory(T0 - 1.0, [replica()]),
        scraped(T0 + 1.0, engine="vllm", model="m", running=1.0),
        tick(T0 + 12),
    ]
    (got,) = final(run(one, log(*records)), ENGINE_WINDOWS)[("chat", T0)]
    assert (got["engine"], got["model"], got["running_last"]) == ("vllm", None, 1)
    assert one.counters["overflow_texts_total"] == 1
