"""The folds of all levels, fed with everything that this folder knows to be bad: they refuse and go on.

What each fold computes is tested beside it; here only that no input breaks one, its results, or its checkpoints.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import make_fold
from schemas.base import KINDS, decode
from schemas.columns import COLUMNAR
from schemas.deadletters import DeadLetter
from schemas.log import CONTENT_ARROW, CONTENT_JSON, TICK, LogRecord, Result
from schemas.node import GPU_SAMPLES
from schemas.requests import REQUEST_ROWS
from schemas.topics import DEAD_LETTERS, LEVEL_TOPIC, TOPICS, ce_type
from streams.topics import partition_counts
from tests.schemas import examples
from tests.schemas.test_hostile import JSON_TREES, _grafted, _mutated, _streams

LEVELS = ("node", "requests", "pool", "fleet")
ANY_LEVEL = pytest.mark.parametrize("level", LEVELS)
TYPES = {level: [ce_type(kind) for kind in TOPICS[LEVEL_TOPIC[level]].kinds] for level in LEVELS}


def fold_of(level: str) -> Any:
    return make_fold(level, LEVEL_TOPIC[level], 0, partition_counts(True))


def _odd_json(kind: str, data: st.DataObject) -> bytes:
    example = examples.record(kind)
    if kind == "config":
        name = data.draw(st.sampled_from(["deployment", "pool", "price", "tenant", "fleet", "signer", "limits"]))
        example = {
            **example,
            "object_kind": name,
            "spec": examples.spec(name),
            "revision": data.draw(st.integers(1, 9)),
        }
    if data.draw(st.booleans()):
        example = _grafted(example, data)
    return json.dumps(example).encode()


def _record(level: str, offset: int, data: st.DataObject) -> LogRecord:
    """A record of the level's log, good or bad in some way."""
    type = data.draw(st.sampled_from([*TYPES[level], *TYPES[level], "", "fleetloop.gpu.samples.v2", "x" * 300]))
    content, value = CONTENT_JSON, b""
    draw = data.draw(st.randoms(use_true_random=False))
    if type in COLUMNAR:
        content = CONTENT_ARROW
        value = draw.choice(_streams(COLUMNAR[type]))
        if data.draw(st.booleans()):
            value = _mutated(value, draw)
        if COLUMNAR[type].json_too and data.draw(st.booleans()):
            rows = examples.rows(COLUMNAR[type], 3)
            rows[1][draw.choice(list(rows[1]))] = data.draw(JSON_TREES)
            content, value = CONTENT_JSON, json.dumps(rows).encode()
    elif type in KINDS:
        value = _odd_json(KINDS[type].kind, data)
    elif type != TICK:
        value = data.draw(st.binary(max_size=50))
    at_ms = int(examples.AT_S * 1000) + data.draw(st.sampled_from([-10_000, 0, 500, 5_000, 30_000]))
    key = data.draw(st.sampled_from(["node-1", "pool-1", "", "a/b"]))
    id = data.draw(st.sampled_from(["", "id-1", f"id-{offset}"]))
    return LogRecord(offset, at_ms, type, key, value, content, id)


def _check(results: list[Result]) -> None:
    """Every result can be published and read again."""
    for result in results:
        assert len(result.value) < TOPICS[result.topic].max_message_bytes
        if result.type in COLUMNAR:
            assert COLUMNAR[result.type].decode(result.value, result.content_type).refused == []
        else:
            decode(KINDS[result.type], result.value)


@ANY_LEVEL
@given(data=st.data())
@settings(max_examples=60)
def test_no_input_breaks_a_fold(level: str, data: st.DataObject) -> None:
    """Any mixture of good and bad records: no exception, valid results, and a checkpoint that can be loaded."""
    fold = fold_of(level)
    count = data.draw(st.integers(1, 8))
    for offset in range(count):
        _check(fold.apply([_record(level, offset, data)]))
    end = LogRecord(count, int(examples.AT_S * 1000) + 120_000, TICK, "", b"")
    dump = fold.dump()
    again = fold_of(level)
    again.load(dump)
    assert again.dump() == dump
    results = fold.apply([end])
    _check(results)
    assert again.apply([end]) == results


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "fleet"])  # it takes no columns
@given(seed=st.integers(0, 2**32))
@settings(max_examples=15)
def test_bad_records_do_not_change_what_good_ones_give(level: str, seed: int) -> None:
    """Records that cannot be decoded, between good ones, change nothing but dead letters and counters."""
    draw = random.Random(seed)
    good = [t for t in TYPES[level] if t in COLUMNAR]
    at_ms = int(examples.AT_S * 1000)
    plain, mixed = [], []
    for number in range(6):
        type = draw.choice(good)
        value = examples.batch(COLUMNAR[type], examples.rows(COLUMNAR[type], 3))
        record = LogRecord(2 * number, at_ms + 1000 * number, type, "pool-1", value, CONTENT_ARROW, str(number))
        bad = LogRecord(
            2 * number + 1, at_ms + 1000 * number, type, "pool-1", value[: draw.randrange(200)], CONTENT_ARROW
        )
        plain.append(record)
        mixed += [record, bad]
    end = LogRecord(12, at_ms + 60_000, TICK, "", b"")
    clean, dirty = fold_of(level).apply([*plain, end]), fold_of(level).apply([*mixed, end])
    letters = [r for r in dirty if r.topic == DEAD_LETTERS]
    assert [r for r in dirty if r.topic != DEAD_LETTERS] == [r for r in clean if r.topic != DEAD_LETTERS]
    assert len(letters) - len([r for r in clean if r.topic == DEAD_LETTERS]) == 6


def _letters(results: list[Result]) -> list[DeadLetter]:
    return [DeadLetter.model_validate_json(r.value) for r in results if r.topic == DEAD_LETTERS]


def _ends(results: list[Result]) -> float:
    """Tokens billed by the last version of each window."""
    last: dict[str, float] = {}
    for result in results:
        if result.type in COLUMNAR:
            batch = COLUMNAR[result.type].decode(result.value)
            last[batch.meta["start_s"]] = float(batch.numbers["output_tokens"].sum())
    return sum(last.values())


def test_a_known_request_with_other_content() -> None:
    """The first content of (event, request id) wins and is billed once; the other is counted and dead-lettered; the
    same content again is neither."""
    row = {**examples.rows(REQUEST_ROWS, 1)[0], "event": "end", "request_id": "r", "output_tokens": 10.0}
    other = {**row, "output_tokens": 99.0}
    fold = fold_of("requests")
    at_ms = int(examples.AT_S * 1000)
    results = []
    for offset, content in enumerate((row, row, other)):
        value = json.dumps(content).encode()
        results += fold.apply([LogRecord(offset, at_ms, REQUEST_ROWS.type, "r", value)])
    results += fold.apply([LogRecord(3, at_ms + 60_000, TICK, "", b"")])
    assert [(x.reason, x.field, x.offset) for x in _letters(results)] == [("conflict", "request_id", 2)]
    assert _ends(results) == 10.0
    assert fold.metrics()["duplicate_rows_total"] == 1


def test_a_known_batch_with_other_content() -> None:
    """The same for a batch of samples: its exporter's start and sequence name it."""
    rows = examples.rows(GPU_SAMPLES, 2)
    first = examples.batch(GPU_SAMPLES, rows)
    other = examples.batch(GPU_SAMPLES, [{**row, "power_w": 500.0} for row in rows])
    fold = fold_of("node")
    at_ms = int(examples.AT_S * 1000)
    results = []
    for offset, value in enumerate((first, first, other)):
        record = LogRecord(offset, at_ms, GPU_SAMPLES.type, "node-1", value, CONTENT_ARROW)
        results += fold.apply([record])
    assert [(x.reason, x.offset) for x in _letters(results)] == [("conflict", 2)]
