"""The law of folds, and the rule that every container in a fold has a bound: checks for every level's tests.

@given(data=st.data())
def test_law(data):
    check_law(lambda: NodeFold("node.samples", 0, PARTITIONS), data.draw(logs()), data)

def test_bounds():
    check_bounds(fold_with_state)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from models.fold import BaseFold
from schemas.config import LimitsSpec
from schemas.log import TICK, Fold, LogRecord, Result

BASE_CONTAINERS = {
    "partitions": "one entry a topic of the registry",
    "handlers": "one entry a record kind, filled by the constructor",
    "counters": "one entry a counter named in the code",
    "config": "as large as fleet.config, which operators write",
    "_out": "handed out by the apply call that filled it",
}
"""Containers of BaseFold and why they need no setting of their own."""


def log(*records: LogRecord) -> list[LogRecord]:
    """Records with offsets 0, 1, 2, ... in the order given."""
    return [record._replace(offset=offset) for offset, record in enumerate(records)]


def tick(at_s: float) -> LogRecord:
    """A tick at log time `at_s`."""
    return LogRecord(0, round(at_s * 1000), TICK, "", b"")


def run(fold: Fold, records: Sequence[LogRecord]) -> list[Result]:
    """All results of all records, in one call."""
    return list(fold.apply(records))


def check_law(make_fold: Callable[[], Fold], records: Sequence[LogRecord], data: Any) -> None:
    """Fails unless every way of feeding `records` gives the same results and the same dump, byte for byte.

    `make_fold` gives a fresh, empty fold; `data` is hypothesis' `st.data()`. Compared with one call for all: one
    call a record; a drawn split with `load(dump())` into a fresh fold at drawn places; and the dump of a loaded
    fold with the dump that it was loaded from.
    """
    whole = make_fold()
    wanted = run(whole, records)
    dump = whole.dump()

    single = make_fold()
    got = [result for record in records for result in single.apply([record])]
    _same(wanted, got, "one call a record")
    assert single.dump() == dump, "one call a record gives another dump"

    places = st.lists(st.integers(0, len(records)), max_size=8).map(sorted)
    cuts: list[int] = [0, *data.draw(places, label="cuts"), len(records)]
    reloads = data.draw(st.lists(st.booleans(), min_size=len(cuts), max_size=len(cuts)), label="reloads")
    fold, got = make_fold(), []
    for start, end, reload in zip(cuts, cuts[1:], reloads, strict=False):
        if reload:
            before = fold.dump()
            fold = make_fold()
            fold.load(before)
            assert fold.dump() == before, "load(dump()) changes the dump"
        got += fold.apply(records[start:end])
    _same(wanted, got, f"cuts {cuts}, reloads {reloads}")
    assert fold.dump() == dump, f"cuts {cuts}, reloads {reloads} give another dump"


def _same(wanted: Sequence[Result], got: Sequence[Result], how: str) -> None:
    for i, (a, b) in enumerate(zip(wanted, got, strict=False)):
        assert a == b, f"{how}: result {i} differs: {a} / {b}"
    assert len(wanted) == len(got), f"{how}: {len(got)} results for {len(wanted)}"


def containers(fold: BaseFold) -> list[str]:
    """Names of the fold's containers: attributes that are dicts, lists, deques, sets, bytearrays or arrays,
    and those of objects of ours that it holds, as `attribute.name` (one level)."""
    found = []
    for name, value in vars(fold).items():
        if _contains(value):
            found.append(name)
        elif type(value).__module__.partition(".")[0] == "models":
            names = list(getattr(value, "__dict__", {})) + list(getattr(type(value), "__slots__", ()))
            found += [f"{name}.{inner}" for inner in names if _contains(getattr(value, inner))]
    return found


def _contains(value: object) -> bool:
    return isinstance(value, dict | list | deque | set | bytearray | np.ndarray)


def check_bounds(fold: BaseFold) -> None:
    """Fails unless every container is in the fold's `BOUNDS`: (container, LimitsSpec field, overflow metric).

    A container whose size follows from another bound names that one's field. The setting must exist, and the
    metric must end in `_total`, so that an overflow is seen.
    """
    bounds: tuple[tuple[str, str, str], ...] = fold.BOUNDS  # type: ignore[attr-defined]
    listed = {container: (setting, metric) for container, setting, metric in bounds}
    assert len(listed) == len(bounds), "a container is listed twice"
    unlisted = [name for name in containers(fold) if name not in listed and name not in BASE_CONTAINERS]
    assert not unlisted, f"containers without a bound: {unlisted}"
    gone = [name for name in listed if name not in containers(fold)]
    assert not gone, f"bounds of containers that are not there: {gone}"
    for name, (setting, metric) in listed.items():
        assert setting in LimitsSpec.model_fields, f"{name}: no setting {setting}"
        assert metric.endswith("_total"), f"{name}: {metric}"
