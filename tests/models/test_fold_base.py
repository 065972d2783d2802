"""What all folds have in common: log time, seconds, configuration, dispatch, refusals."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.fold import BaseFold
from schemas.base import Record
from schemas.columns import Batch
from schemas.config import ConfigObject
from schemas.errors import CheckpointMismatch
from schemas.log import TICK, LogRecord, Result
from schemas.requests import REQUEST_ROWS
from schemas.topics import DEAD_LETTERS, REQUEST_TRACES, ce_type
from tests.models.law import check_bounds, check_law, log, run, tick
from tests.models.requests.logs import arrival, record

CONFIG = ce_type("config")


class Counting(BaseFold):
    """Counts rows and notes every hook."""

    level = "requests"
    BOUNDS = (("calls", "pools_max", "overflow_pools_total"),)

    def __init__(self) -> None:
        super().__init__(REQUEST_TRACES, 0, {})
        self.handlers = {REQUEST_ROWS.type: self.take}
        self.calls: list[list[Any]] = []

    def take(self, record: LogRecord, batch: Batch) -> None:
        batch = self.check_times(record, batch, 900.0)
        self.count("rows_total", batch.rows)
        self.calls.append(["take", record.offset, batch.rows])

    def on_second(self, second: int, before: int) -> None:
        self.calls.append(["second", second, before])
        self.emit("topic", "key", "kind", f"second/{second}", b"")

    def on_config(self, item: ConfigObject, spec: Record | None) -> None:
        self.calls.append(["config", item.key, item.revision, spec is None])

    def state(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def restore(self, state: dict[str, Any], version: int) -> None:
        self.calls = state["calls"]


def config(at_s: float, revision: int, *, deleted: bool = False, **limits: Any) -> LogRecord:
    item = ConfigObject(object_kind="limits", name="limits", revision=revision, deleted=deleted, spec=limits)
    return LogRecord(0, round(at_s * 1000), CONFIG, item.key, item.encode())


def letters(results: list[Result]) -> list[dict[str, Any]]:
    return [json.loads(r.value) for r in results if r.topic == DEAD_LETTERS]


steps = st.lists(
    st.one_of(
        st.builds(tick, st.integers(0, 40).map(lambda x: x / 4)),
        st.builds(lambda t, n: record(t / 4, [arrival(f"x{n}", n)]), st.integers(0, 40), st.integers(0, 100)),
        st.builds(lambda t, r: config(t / 4, r, future_s=float(r)), st.integers(0, 40), st.integers(1, 4)),
        st.builds(lambda t: LogRecord(0, t, "garbage", "", b"?"), st.integers(0, 9000)),
    ),
    max_size=25,
)


@given(steps, st.data())
def test_law(records: list[LogRecord], data: st.DataObject) -> None:
    """The law of folds holds for what the base does."""
    check_law(Counting, log(*records), data)


class Batching(Counting):
    """Breaks the law: a call leaves a trace."""

    def apply(self, records: Any) -> list[Result]:
        self.count("calls_total")
        return super().apply(records)


class Forgetting(Counting):
    """Breaks the law: a load loses state."""

    def restore(self, state: dict[str, Any], version: int) -> None:
        self.calls = []


@pytest.mark.parametrize("broken", [Batching, Forgetting])
def test_law_finds_a_fold_that_breaks_it(broken: type[Counting]) -> None:
    """The check fails for a fold whose dump depends on the calls, and for one that forgets at load."""

    @given(st.data())
    def checked(data: st.DataObject) -> None:
        check_law(broken, log(*[tick(t) for t in range(1, 9)]), data)

    with pytest.raises(AssertionError):
        checked()


def test_bounds_check_finds_what_is_not_listed() -> None:
    """The check of bounds fails for a container that is not listed, one that is gone, and an unknown setting."""
    check_bounds(Counting())
    more = Counting()
    more.extra = {}  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="without a bound"):
        check_bounds(more)

    class Gone(Counting):
        BOUNDS = (*Counting.BOUNDS, ("gone", "pools_max", "overflow_pools_total"))

    with pytest.raises(AssertionError, match="not there"):
        check_bounds(Gone())

    class Unset(Counting):
        BOUNDS = (("calls", "no_such_setting", "overflow_pools_total"),)

    with pytest.raises(AssertionError, match="no setting"):
        check_bounds(Unset())


@given(st.lists(st.integers(1, 20_000), max_size=20))
def test_log_time_is_the_running_maximum(times_ms: list[int]) -> None:
    """Log time never falls, and each second that it passes is told once, to the first record past it."""
    fold = Counting()
    run(fold, log(*[LogRecord(0, ms, TICK, "", b"") for ms in times_ms]))
    assert fold.log_ms == max(times_ms, default=0)
    seconds = [call[1] for call in fold.calls]
    wanted = sorted({max(times_ms[: i + 1]) // 1000 for i in range(len(times_ms))} - {0})
    assert seconds == wanted
    assert [call[2] for call in fold.calls] == [0, *wanted][: len(wanted)]


def test_second_comes_before_the_record_that_causes_it() -> None:
    """`on_second` sees nothing of the record that moved log time on, and its results carry that record's offset."""
    fold = Counting()
    out = run(fold, log(record(5.0, [arrival("a", 5.0)]), record(6.5, [arrival("b", 6.0)])))
    assert [call[0] for call in fold.calls] == ["second", "take", "second", "take"]
    assert [r.at_ms for r in out] == [5000, 6500]
    assert fold.offset == 1


def test_objects_beyond_the_bound_are_refused() -> None:
    """Beyond config_objects_max a new object is dead-lettered and a known one still changes, the limits always."""

    def tenant(at_s: float, name: str, revision: int = 1) -> LogRecord:
        item = ConfigObject(object_kind="tenant", name=name, revision=revision, spec={"tier": "a"})
        return LogRecord(0, round(at_s * 1000), CONFIG, item.key, item.encode())

    fold = Counting()
    records = (config(1, 1, config_objects_max=2), tenant(2, "a"), tenant(3, "b"), tenant(4, "a", 2))
    out = run(fold, log(*records, config(5, 2, config_objects_max=3), tenant(6, "b")))
    assert [json.loads(r.value)["reason"] for r in out if r.topic == "dead.letters"] == ["overflow"]
    assert list(fold.config) == ["limits/limits", "tenant/a", "tenant/b"]
    assert fold.config["tenant/a"]["revision"] == 2


def test_greatest_revision_counts_and_a_deletion_restores_defaults() -> None:
    """An older or equal revision changes nothing; a deleted limits object brings the defaults back."""
    fold = Counting()
    fold.apply(log(config(1, 3, future_s=7.0), config(2, 3, future_s=8.0), config(3, 2, future_s=9.0)))
    assert fold.limits.future_s == 7.0
    assert [call[2] for call in fold.calls if call[0] == "config"] == [3]
    again = Counting()
    again.load(fold.dump())
    assert again.limits.future_s == 7.0
    again.apply([config(4, 4, deleted=True)])
    assert again.limits.future_s == 60.0


@pytest.mark.parametrize(
    ("record_", "reason"),
    [
        (LogRecord(0, 1000, "", "", b""), "unknown_type"),
        (LogRecord(0, 1000, "fleetloop.other.v1", "", b""), "unknown_type"),
        (LogRecord(0, 1000, "fleetloop.request.rows.v2", "", b""), "unknown_version"),
        (LogRecord(0, 1000, REQUEST_ROWS.type, "", b"\xff"), "undecodable"),
        (LogRecord(0, 1000, CONFIG, "", b"{"), "undecodable"),
        (LogRecord(0, 1000, CONFIG, "", b'{"object_kind":"limits","name":"limits","revision":0}'), "out_of_bounds"),
        (LogRecord(0, 1000, CONFIG, "", b'{"object_kind":"limits","name":"limits"}'), "invalid"),
        (record(1000.0, [arrival("a", 1061.0)]), "in_future"),
        (record(1000.0, [arrival("a", 99.0)]), "too_late"),
        (record(1000.0, [arrival("a", 1000.0, pool="a/b")]), "invalid"),
    ],
)
def test_refusals(record_: LogRecord, reason: str) -> None:
    """What cannot be taken becomes one dead letter with its reason, coordinates and bytes, and is counted."""
    fold = Counting()
    found = letters(run(fold, [record_._replace(offset=7)]))
    assert [letter["reason"] for letter in found] == [reason]
    assert (found[0]["topic"], found[0]["partition"], found[0]["offset"]) == (REQUEST_TRACES, 0, 7)
    assert found[0]["data_bytes"] == len(record_.value)
    assert fold.counters[f"dead_{reason}_total"] == 1
    assert found[0]["remedy"]


def test_only_bad_rows_are_refused() -> None:
    """Rows out of time are refused by number and the rest of their record is taken."""
    fold = Counting()
    rows = [arrival(f"a{i}", at) for i, at in enumerate([1000.0, 2000.0, 999.0, 5.0, 2000.0])]
    found = letters(run(fold, [record(1000.0, rows)]))
    assert [(letter["reason"], letter["rows"]) for letter in found] == [("in_future", [1, 4]), ("too_late", [3])]
    assert fold.counters["rows_total"] == 2


@given(st.binary(max_size=80), st.sampled_from([REQUEST_ROWS.type, CONFIG, "x", ""]))
def test_garbage_never_raises(value: bytes, type: str) -> None:
    """Whatever the bytes, a record is taken or becomes a dead letter."""
    fold = Counting()
    out = run(fold, [LogRecord(0, 5000, type, "", value), LogRecord(1, 5000, type, "", value, "application/json")])
    assert all(letter["reason"] for letter in letters(out))


def test_dump_of_another_partition_is_refused() -> None:
    """A fold loads only dumps of its own level, topic and partition."""
    other = Counting()
    other.partition = 1
    with pytest.raises(CheckpointMismatch):
        Counting().load(other.dump())


def test_metrics_are_the_counters() -> None:
    """Every counter is a metric."""
    fold = Counting()
    fold.apply([record(1.0, [arrival("a", 1.0)])])
    assert fold.metrics() == {"rows_total": 1.0}
    assert np.isfinite(list(fold.metrics().values())).all()
