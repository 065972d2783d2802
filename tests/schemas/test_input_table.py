"""The input table of the design, row by row: what each kind of bad input becomes, and that nothing else is lost.

A minimal fold takes every kind from outside; the good row and the good record around each bad one must arrive.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from models.fold import BaseFold
from schemas.base import KINDS, Record
from schemas.columns import COLUMNAR, Batch, Columns
from schemas.deadletters import BYTES_MAX, DeadLetter
from schemas.log import CONTENT_ARROW, CONTENT_JSON, LogRecord
from schemas.node import ENGINE_SAMPLES, GPU_SAMPLES
from schemas.requests import REQUEST_ROWS
from schemas.signals import REQUEST_WINDOWS
from schemas.topics import DEAD_LETTERS, NODE_SAMPLES, TOPICS, ce_type
from tests.schemas import examples

NOW_S = examples.AT_S
GRACE_S = 60.0


class Taker(BaseFold):
    """Takes what can be taken and remembers it."""

    level = "test"

    def __init__(self) -> None:
        super().__init__(NODE_SAMPLES, 0, {})
        self.rows: list[float] = []
        self.records: list[Record] = []
        self.batches: list[Batch] = []
        self.handlers = dict.fromkeys(COLUMNAR, self._batch) | {t: self._record for t in KINDS if "config" not in t}

    def _batch(self, record: LogRecord, batch: Batch) -> None:
        if "at_s" in batch.numbers:
            batch = self.check_times(record, batch, GRACE_S)
        self.batches.append(batch)
        self.rows += batch.index.tolist()

    def _record(self, record: LogRecord, item: Record) -> None:
        self.records.append(item)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any], version: int) -> None:
        raise NotImplementedError


def log_record(value: bytes, kind: str, content_type: str = CONTENT_JSON, offset: int = 0) -> LogRecord:
    return LogRecord(offset, int(NOW_S * 1000), kind, "node-1", value, content_type)


def letters(fold: Taker, *records: LogRecord) -> list[DeadLetter]:
    """What went to dead.letters; nothing else may come out."""
    results = fold.apply(records)
    assert all(r.topic == DEAD_LETTERS for r in results)
    assert len({r.id for r in results}) == len(results)
    return [DeadLetter.model_validate_json(r.value) for r in results]


def table(columns: Columns, rows: list[dict[str, Any]], types: dict[str, pa.DataType] | None = None) -> bytes:
    """Rows as an Arrow stream that our own encoder would not write: NaN kept, foreign types, extra columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    own = {f.name: f.type for f in columns.arrow_schema()}
    arrays = [pa.array([r.get(n) for r in rows], (types or {}).get(n, own.get(n)), from_pandas=False) for n in names]
    batch = pa.record_batch(arrays, names=names)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema.with_metadata({"node": "node-1"})) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def as_json(columns: Columns, rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows).encode()


FORMS: list[tuple[Columns, str, Callable[..., bytes]]] = [
    (GPU_SAMPLES, CONTENT_ARROW, table),
    (ENGINE_SAMPLES, CONTENT_ARROW, table),
    (ENGINE_SAMPLES, CONTENT_JSON, as_json),
    (REQUEST_ROWS, CONTENT_ARROW, table),
    (REQUEST_ROWS, CONTENT_JSON, as_json),
]
IDS = [f"{c.kind}-{t.rpartition('/')[2].rpartition('.')[2]}" for c, t, _ in FORMS]
MEASURED = {"gpu.samples": "energy_j", "engine.samples": "generation_tokens", "request.rows": "ttft_s"}
BAD_NUMBERS = [
    (math.nan, "not_finite"),
    (math.inf, "not_finite"),
    (-math.inf, "not_finite"),
    (-1.0, "out_of_bounds"),
]
BAD_TIMES = [
    (NOW_S * 1000, "time_unit"),
    (NOW_S + 3600, "in_future"),
    (NOW_S - GRACE_S - 1, "too_late"),
    (0.0, "too_late"),
    (-NOW_S, "out_of_bounds"),
    (math.nan, "not_finite"),
    (None, "invalid"),
]


@pytest.mark.parametrize(("columns", "content", "encode"), FORMS, ids=IDS)
@pytest.mark.parametrize(("value", "reason"), BAD_NUMBERS)
def test_a_bad_number_costs_its_row_alone(
    columns: Columns, content: str, encode: Callable[..., bytes], value: float, reason: str
) -> None:
    """NaN, infinity, a negative counter: dead.letters says field, value, row and bytes; other rows are taken."""
    rows = examples.rows(columns, 3)
    name = MEASURED[columns.kind]
    rows[1][name] = value
    fold = Taker()
    record = log_record(encode(columns, rows), columns.type, content)
    (letter,) = letters(fold, record)
    assert (letter.reason, letter.field, letter.rows, letter.rows_refused) == (reason, name, [1], 1)
    assert repr(value) in letter.value
    assert letter.remedy.startswith("send ")
    assert base64.b64decode(letter.data_base64) == record.value
    assert fold.rows == [0, 2]


@pytest.mark.parametrize(("columns", "content", "encode"), FORMS, ids=IDS)
@pytest.mark.parametrize(("value", "reason"), BAD_TIMES)
def test_a_bad_time_costs_its_row_alone(
    columns: Columns, content: str, encode: Callable[..., bytes], value: float | None, reason: str
) -> None:
    """Milliseconds, the future, before the grace, and no time at all."""
    rows = examples.rows(columns, 3)
    rows[2]["at_s"] = value
    fold = Taker()
    (letter,) = letters(fold, log_record(encode(columns, rows), columns.type, content))
    assert (letter.reason, letter.field, letter.rows) == (reason, "at_s", [2])
    assert fold.rows == [0, 1]


@pytest.mark.parametrize(
    ("columns", "field", "value"),
    [
        (ENGINE_SAMPLES, "running", "3"),
        (ENGINE_SAMPLES, "running", True),
        (ENGINE_SAMPLES, "running", [3]),
        (ENGINE_SAMPLES, "running", 10**400),
        (ENGINE_SAMPLES, "replica", 7),
        (ENGINE_SAMPLES, "replica", ""),
        (ENGINE_SAMPLES, "replica", "a/b"),
        (ENGINE_SAMPLES, "replica", "a\nb"),
        (ENGINE_SAMPLES, "replica", "\ud800"),
        (ENGINE_SAMPLES, "replica", "x" * 201),
        (ENGINE_SAMPLES, "status", "OK"),
        (REQUEST_ROWS, "event", "begin"),
        (REQUEST_ROWS, "request_id", None),
        (REQUEST_ROWS, "pool", {"name": "x"}),
    ],
)
def test_a_wrong_cell_costs_its_row_alone(columns: Columns, field: str, value: object) -> None:
    """JSON cells of a wrong type, empty or overlong names, unknown choices."""
    rows = examples.rows(columns, 3)
    rows[0][field] = value
    fold = Taker()
    (letter,) = letters(fold, log_record(as_json(columns, rows), columns.type))
    assert (letter.reason, letter.field, letter.rows) == ("invalid", field, [0])
    assert fold.rows == [1, 2]


@pytest.mark.parametrize(
    ("name", "type", "value"),
    [
        ("energy_j", pa.utf8(), "1"),
        ("energy_j", pa.bool_(), True),
        ("energy_j", pa.timestamp("s"), 1),
        ("energy_j", pa.list_(pa.float64()), [1.0]),
        ("status", pa.int64(), 1),
        ("status", pa.binary(), b"ok"),
        ("status", pa.string_view(), "ok"),
    ],
)
def test_a_column_of_a_wrong_type_costs_its_record(name: str, type: pa.DataType, value: object) -> None:
    """Arrow columns are typed as a whole: the record is refused, the next one taken."""
    rows = examples.rows(GPU_SAMPLES, 2)
    bad = [{**row, name: value} for row in rows]
    fold = Taker()
    good = log_record(examples.batch(GPU_SAMPLES, rows), GPU_SAMPLES.type, CONTENT_ARROW, 1)
    refused = log_record(table(GPU_SAMPLES, bad, {name: type}), GPU_SAMPLES.type, CONTENT_ARROW)
    (letter,) = letters(fold, refused, good)
    assert (letter.reason, letter.field, letter.offset, letter.rows) == ("invalid", name, 0, None)
    assert fold.rows == [0, 1]


@pytest.mark.parametrize(
    "type", [pa.float32(), pa.float16(), pa.int8(), pa.uint64(), pa.dictionary(pa.int8(), pa.int64())]
)
def test_any_number_type_is_taken_for_a_number(type: pa.DataType) -> None:
    """What another Arrow library prefers makes no difference, a null stays a null."""
    rows = examples.rows(GPU_SAMPLES, 3)
    for row, value in zip(rows, (5, None, 7), strict=True):
        row["util_gpu_pct"] = value
    fold = Taker()
    record = log_record(table(GPU_SAMPLES, rows, {"util_gpu_pct": type}), GPU_SAMPLES.type, CONTENT_ARROW)
    assert letters(fold, record) == []
    found = fold.batches[0].numbers["util_gpu_pct"].tolist()
    assert found[::2] == [5.0, 7.0]
    assert math.isnan(found[1])


@pytest.mark.parametrize(
    "type", [pa.large_utf8(), pa.dictionary(pa.int8(), pa.utf8()), pa.dictionary(pa.uint32(), pa.large_utf8())]
)
def test_any_text_type_is_taken_for_text(type: pa.DataType) -> None:
    """Plain, large and dictionary-encoded text mean the same."""
    rows = examples.rows(GPU_SAMPLES, 4)
    for row, value in zip(rows, ("ok", None, "lost", "ok"), strict=True):
        row["status"] = value
    fold = Taker()
    record = log_record(table(GPU_SAMPLES, rows, {"status": type}), GPU_SAMPLES.type, CONTENT_ARROW)
    assert letters(fold, record) == []
    assert fold.batches[0].text("status") == ["ok", None, "lost", "ok"]


def test_a_foreign_dictionary_with_null_and_repeats() -> None:
    """A dictionary that holds a null and the same value twice gives one code per value and -1 for null."""
    array = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, None], pa.int8()), pa.array(["ok", None, "ok"]))
    batch = pa.record_batch([pa.array([0, 1, 2, 3]), pa.array([NOW_S] * 4), array], names=["gpu", "at_s", "status"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    taken = GPU_SAMPLES.decode(bytes(sink.getvalue()))
    assert taken.values["status"] == ["ok"]
    assert taken.codes["status"].tolist() == [0, -1, 0, -1]


@pytest.mark.parametrize("columns", COLUMNAR.values(), ids=lambda c: c.kind)
def test_missing_optional_columns_are_null_and_extra_ones_ignored(columns: Columns) -> None:
    """A batch with only the required columns, and two that nobody knows, is taken; what is missing is unknown."""
    needed = [{n: r[n] for n, c in columns.columns.items() if c.required} for r in examples.rows(columns, 2)]
    rows = [{**row, "x_future": 1.5, "x_view": "y"} for row in needed]
    value = table(columns, rows, {"x_future": pa.float64(), "x_view": pa.string_view()})
    taken = columns.decode(value)
    assert (taken.rows, taken.refused) == (2, [])
    for name, column in columns.columns.items():
        if not column.required:
            cells = taken.text(name) if column.type == "text" else taken.pairs.get(name, taken.numbers.get(name))
            assert cells is not None
            assert all(c is None or (isinstance(c, float) and math.isnan(c)) for c in list(cells)), name
    assert not {"x_future", "x_view"} & {*taken.numbers, *taken.codes}


@pytest.mark.parametrize("columns", COLUMNAR.values(), ids=lambda c: c.kind)
def test_a_missing_required_column_refuses_every_row(columns: Columns) -> None:
    """There is nothing to take, and the letter names the column."""
    for name in [n for n, c in columns.columns.items() if c.required]:
        rows = [{n: v for n, v in row.items() if n != name} for row in examples.rows(columns, 2)]
        taken = columns.decode(table(columns, rows))
        assert taken.rows == 0
        assert [(r.field, r.rows) for r in taken.refused] == [(name, (0, 1))]


@pytest.mark.parametrize("kind", examples.JSON_KINDS)
def test_unknown_fields_are_ignored(kind: str) -> None:
    """A later version's field changes nothing."""
    fold = Taker()
    value = json.dumps(examples.record(kind) | {"x_future": {"deep": [1]}}).encode()
    assert letters(fold, log_record(value, ce_type(kind))) == []


BAD_RECORDS = [
    (b"", "undecodable"),
    (b"{", "undecodable"),
    (b"\xff\xfe", "undecodable"),
    (b"null", "invalid"),
    (b"[]", "invalid"),
    (b"{}", "invalid"),
    (b"[" * 100_000, "undecodable"),
]


@pytest.mark.parametrize("kind", examples.JSON_KINDS)
@pytest.mark.parametrize(("value", "reason"), BAD_RECORDS, ids=lambda v: str(v)[:12])
def test_undecodable_records_become_dead_letters(kind: str, value: bytes, reason: str) -> None:
    """Broken JSON and JSON of another shape; the good record after it is taken."""
    fold = Taker()
    good = log_record(examples.encoded(kind), ce_type(kind), offset=1)
    (letter,) = letters(fold, log_record(value, ce_type(kind)), good)
    assert letter.reason == reason
    assert (letter.topic, letter.partition, letter.offset, letter.rows) == (NODE_SAMPLES, 0, 0, None)
    assert letter.data_bytes == len(value)
    assert len(fold.records) + len(fold.config) == 1


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("at_s", NOW_S * 1000, "time_unit"),
        ("at_s", -1.0, "out_of_bounds"),
        ("at_s", "now", "invalid"),
        ("at_s", "1764000000", "invalid"),
        ("at_s", True, "invalid"),
        ("at_s", math.nan, "not_finite"),
        ("at_s", math.inf, "not_finite"),
        ("node", "a/b", "invalid"),
        ("node", "", "invalid"),
        ("node", "x" * 201, "invalid"),
        ("node", None, "invalid"),
        ("gpus", [{"gpu": 10**30, "gpu_type": "H100"}], "out_of_bounds"),
    ],
)
def test_a_bad_field_costs_its_record(field: str, value: object, reason: str) -> None:
    """JSON kinds are refused as a whole, with the field, its value and what to do."""
    fold = Taker()
    bad = json.dumps(examples.record("node.inventory") | {field: value}).encode()
    good = examples.encoded("node.inventory")
    kind = ce_type("node.inventory")
    (letter,) = letters(fold, log_record(bad, kind), log_record(good, kind, offset=1))
    assert letter.reason == reason
    assert letter.field.split(".")[0] == field
    assert letter.remedy
    assert len(fold.records) == 1


@pytest.mark.parametrize("number", [b"NaN", b"-Infinity", b"1e999", b"1" + b"0" * 30, b"-" + b"9" * 400])
def test_free_fields_hold_only_numbers_that_can_be_kept(number: bytes) -> None:
    """What pydantic leaves unchecked must not break a checkpoint later: NaN, infinity, whole numbers beyond 64 bits."""
    fold = Taker()
    value = examples.encoded("executor.result").replace(b'"before": {}', b'"before": {"x": [' + number + b"]}")
    (letter,) = letters(fold, log_record(value, ce_type("executor.result")))
    assert letter.reason in ("not_finite", "out_of_bounds")
    assert letter.field == "before.x"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("fleetloop.gpu.samples.v2", "unknown_version"),
        ("fleetloop.node.inventory.v9", "unknown_version"),
        ("fleetloop.weather.v1", "unknown_type"),
        ("", "unknown_type"),
        ("x" * 5000, "unknown_type"),
        ("tick ", "unknown_type"),
    ],
)
def test_unknown_versions_and_types_become_dead_letters(kind: str, reason: str) -> None:
    """A major version that we do not know is never guessed at."""
    fold = Taker()
    (letter,) = letters(fold, log_record(examples.batch(GPU_SAMPLES, examples.rows(GPU_SAMPLES, 1)), kind))
    assert (letter.reason, letter.field) == (reason, "ce_type")
    assert fold.rows == []


def test_long_values_are_cut_and_hashed() -> None:
    """A dead letter carries the first 64 KiB and the hash of the whole."""
    value = b"x" * (BYTES_MAX + 1)
    (letter,) = letters(Taker(), log_record(value, GPU_SAMPLES.type, CONTENT_ARROW))
    assert base64.b64decode(letter.data_base64) == value[:BYTES_MAX]
    assert letter.data_bytes == len(value)
    assert letter.data_sha256 == hashlib.sha256(value).hexdigest()


def test_letters_of_large_refusals_fit_their_topic() -> None:
    """A batch at the topic's limit of which every row is bad gives letters that the topic takes."""
    limit = TOPICS[NODE_SAMPLES].max_message_bytes
    row = json.dumps({"replica": "r", "at_s": 1})[1:-1].encode()
    rows = (limit - 2) // (len(row) + 3)
    value = b"[" + b",".join([b"{" + row + b"}"] * rows) + b"]"
    fold = Taker()
    results = fold.apply([log_record(value, ENGINE_SAMPLES.type)])
    assert results
    assert all(len(r.value) < TOPICS[DEAD_LETTERS].max_message_bytes - 1024 for r in results)
    assert sum(DeadLetter.model_validate_json(r.value).rows_refused for r in results) == rows


def test_a_batch_at_the_topics_limit_is_taken() -> None:
    """Records up to the size that the topic takes are decoded whole."""
    limit = TOPICS[NODE_SAMPLES].max_message_bytes
    count = 3000
    value = examples.batch(GPU_SAMPLES, [{**r, "gpu": 1, "at_s": NOW_S} for r in examples.rows(GPU_SAMPLES, count)])
    assert limit * 0.7 < len(value) < limit
    fold = Taker()
    assert letters(fold, log_record(value, GPU_SAMPLES.type, CONTENT_ARROW)) == []
    assert len(fold.rows) == count


@pytest.mark.parametrize("columns", COLUMNAR.values(), ids=lambda c: c.kind)
def test_empty_batches_do_nothing(columns: Columns) -> None:
    """No rows, no columns: neither a row nor a letter."""
    schema = columns.arrow_schema()
    for empty in (schema, pa.schema([])):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, empty):
            pass
        assert letters(Taker(), log_record(bytes(sink.getvalue()), columns.type, CONTENT_ARROW)) == []
    if columns.json_too:
        assert letters(Taker(), log_record(b"[]", columns.type)) == []


@pytest.mark.parametrize("columns", COLUMNAR.values(), ids=lambda c: c.kind)
def test_the_wrong_kind_or_encoding_is_refused(columns: Columns) -> None:
    """Metadata that names another kind, JSON where only Arrow is taken, Arrow where JSON was said."""
    other = REQUEST_WINDOWS if columns is not REQUEST_WINDOWS else GPU_SAMPLES
    foreign = examples.batch(other, examples.rows(other, 1))
    own = examples.batch(columns, examples.rows(columns, 1))
    for value, content in ((foreign, CONTENT_ARROW), (own, CONTENT_JSON), (b"{}", CONTENT_ARROW)):
        fold = Taker()
        (letter,) = letters(fold, log_record(value, columns.type, content))
        assert letter.reason in ("invalid", "undecodable")
        assert fold.rows == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("node", "a/b"), ("node", ""), ("node", "x" * 201), ("seq", "-1"), ("start_s", "nan"), ("seq", "1e3")],
)
def test_metadata_is_checked_like_columns(name: str, value: str) -> None:
    """Names that would break keys and numbers that are none refuse the record."""
    meta = examples.meta(GPU_SAMPLES) | {name: value}
    data = GPU_SAMPLES.encode({"gpu": [0], "at_s": [NOW_S]}, meta)
    (letter,) = letters(Taker(), log_record(data, GPU_SAMPLES.type, CONTENT_ARROW))
    assert (letter.reason, letter.field) == ("invalid", name)


@pytest.mark.parametrize("name", ["deployment", "fleet", "limits"])
def test_objects_of_which_there_is_one_have_its_name(name: str) -> None:
    """Limits by another name would hold until the next restart only: they are refused."""
    fold = Taker()
    value = {"object_kind": name, "name": "other", "revision": 1, "spec": examples.spec(name)}
    (letter,) = letters(fold, log_record(json.dumps(value).encode(), ce_type("config")))
    assert letter.reason == "invalid"
    assert fold.config == {}
    assert letters(fold, log_record(json.dumps({**value, "name": name}).encode(), ce_type("config"))) == []
