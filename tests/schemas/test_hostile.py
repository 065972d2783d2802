"""Garbage and hostile bytes: every decoder gives rows or InvalidRecord, in bounded memory, and nothing else."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import arrow
from schemas.base import KINDS, decode
from schemas.columns import COLUMNAR, ROWS_MAX, Batch, Columns
from schemas.deadletters import DeadLetter, dead_data
from schemas.errors import InvalidRecord
from schemas.log import CONTENT_ARROW, CONTENT_JSON
from schemas.node import GPU_SAMPLES
from schemas.signals import REQUEST_WINDOWS
from schemas.topics import MIB, ce_type
from tests.schemas import examples

JSON_TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, -(2**63), 1e308, "x" * 300, "a/b", "\x00"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


def _letter(refused: InvalidRecord, value: bytes) -> DeadLetter:
    """Whatever is refused can be said in a dead letter: bounded texts, a known reason."""
    assert len(refused.field) <= 200
    assert len(refused.value) <= 120
    assert len(refused.remedy) <= 1000
    return DeadLetter(
        topic="t",
        partition=0,
        offset=0,
        at_s=0,
        type="t",
        reason=refused.reason,  # type: ignore[arg-type]
        field=refused.field,
        value=refused.value,
        remedy=refused.remedy,
        **dead_data(value),  # type: ignore[arg-type]
    )


def _take(columns: Columns, value: bytes, content_type: str = CONTENT_ARROW) -> Batch | None:
    """A batch within every bound that the codec promises, or None where it was refused."""
    try:
        batch = columns.decode(value, content_type)
    except InvalidRecord as refused:
        _letter(refused, value).encode()
        return None
    assert batch.rows == len(batch.index)
    for name, column in columns.columns.items():
        if column.type in ("f64", "i64"):
            numbers = batch.numbers[name]
            known = numbers[~np.isnan(numbers)]
            assert np.isfinite(known).all()
            assert ((known >= column.low) & (known <= column.high)).all()
            assert not column.required or len(known) == batch.rows
        elif column.type == "text":
            texts = batch.text(name)
            assert len(texts) == batch.rows
            assert all(t is None or (0 < len(t) <= 200 and t.isprintable()) for t in texts)
        else:
            kind, odd = (np.uint32, 0) if column.type == "pairs" else (np.float64, 1)
            assert all(p is None or (p.dtype == kind and len(p) % 2 == odd) for p in batch.pairs[name])
    for bad in batch.refused:
        _letter(InvalidRecord(bad.reason, bad.field, bad.value, bad.remedy), value)
    return batch


def _decode(kind: str, value: bytes) -> None:
    try:
        record = decode(KINDS[ce_type(kind)], value)
    except InvalidRecord as refused:
        _letter(refused, value).encode()
        return
    assert decode(type(record), record.encode()) == record


ALL_COLUMNS = pytest.mark.parametrize("columns", COLUMNAR.values(), ids=lambda c: c.kind)
ALL_KINDS = pytest.mark.parametrize("kind", examples.JSON_KINDS)


@ALL_COLUMNS
@given(value=st.binary(max_size=400), content=st.sampled_from([CONTENT_ARROW, CONTENT_JSON, "", "text/plain"]))
@settings(max_examples=50)
def test_bytes_to_columns(columns: Columns, value: bytes, content: str) -> None:
    """Arbitrary bytes under any content type."""
    _take(columns, value, content)


@ALL_KINDS
@given(value=st.binary(max_size=400))
@settings(max_examples=30)
def test_bytes_to_records(kind: str, value: bytes) -> None:
    """Arbitrary bytes."""
    _decode(kind, value)


def _mutated(value: bytes, draw: random.Random) -> bytes:
    data = bytearray(value)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data))
        match draw.randrange(5):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at] = draw.randrange(256)
            case 2:  # a plausible but wrong length, offset or count
                word = struct.pack("<q", draw.choice([-1, 0, 1, 8, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63)]))
                data[at : at + draw.choice([4, 8])] = word[: draw.choice([4, 8])]
            case 3:
                del data[at : at + draw.randint(1, 64)]
            case _:
                data[at:at] = data[at : at + draw.randint(1, 64)]
        if not data:
            break
    return bytes(data)


def _streams(columns: Columns) -> list[bytes]:
    """The same rows in the layouts that Arrow has: plain, compressed, dictionaries, two batches."""
    rows = examples.rows(columns, 4)
    plain = examples.batch(columns, rows)
    table = pa.ipc.open_stream(plain).read_all()
    texts = [i for i, f in enumerate(table.schema) if f.type == pa.utf8()]
    dictionary = table
    for i in texts:
        dictionary = dictionary.set_column(i, table.schema.names[i], table.column(i).dictionary_encode())
    out = [plain]
    for compression, what in (("lz4", table), ("zstd", dictionary), (None, dictionary)):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, what.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_table(what)
            writer.write_table(what)
        out.append(bytes(sink.getvalue()))
    return out


@ALL_COLUMNS
def test_layouts_of_arrow(columns: Columns) -> None:
    """Compressed and dictionary-encoded streams of several batches are taken like the plain one."""
    plain, *others = _streams(columns)
    first = columns.decode(plain)
    for value in others:
        taken = columns.decode(value)
        assert (taken.rows, taken.refused) == (2 * first.rows, [])
        for name in first.numbers:
            assert taken.numbers[name].tolist() == first.numbers[name].tolist() * 2
        for name in first.codes:
            assert taken.text(name) == first.text(name) * 2
        for name in first.pairs:
            assert [p is not None and p.tolist() for p in taken.pairs[name]] == [
                p is not None and p.tolist() for p in first.pairs[name] * 2
            ]


@ALL_COLUMNS
@given(draw=st.randoms(use_true_random=False), form=st.integers(0, 3))
@settings(max_examples=250)
def test_mutated_arrow_streams(columns: Columns, draw: random.Random, form: int) -> None:
    """Bits flipped, words replaced, parts cut out and doubled: rows within bounds, or a refusal."""
    _take(columns, _mutated(_streams(columns)[form], draw))


@ALL_COLUMNS
@given(tree=JSON_TREES)
@settings(max_examples=60)
def test_json_trees_to_columns(columns: Columns, tree: Any) -> None:
    """Any JSON where rows are expected."""
    with contextlib.suppress(UnicodeEncodeError):
        _take(columns, json.dumps(tree).encode(), CONTENT_JSON)


def _grafted(value: Any, draw: st.DataObject) -> Any:
    """The example with one part replaced by any JSON, taken away, or joined by something unknown."""
    if isinstance(value, dict) and value and draw.draw(st.integers(0, 9)):
        name = draw.draw(st.sampled_from(list(value)))
        if draw.draw(st.integers(0, 5)) == 0:
            return {k: v for k, v in value.items() if k != name}
        return value | {name: _grafted(value[name], draw)}
    if isinstance(value, list) and value and draw.draw(st.booleans()):
        return [*value[1:], _grafted(value[0], draw)]
    return draw.draw(JSON_TREES)


@ALL_KINDS
@given(data=st.data())
@settings(max_examples=60)
def test_grafted_json_records(kind: str, data: st.DataObject) -> None:
    """A valid record with any JSON grafted somewhere; what is taken survives its own encoding."""
    _decode(kind, json.dumps(_grafted(examples.record(kind), data)).encode())


@pytest.mark.parametrize("columns", [c for c in COLUMNAR.values() if c.json_too], ids=lambda c: c.kind)
@given(data=st.data())
@settings(max_examples=80)
def test_bad_rows_do_not_cost_good_ones(columns: Columns, data: st.DataObject) -> None:
    """Rows around a row with any JSON in any cell are taken, whatever that row becomes."""
    rows = examples.rows(columns, 3)
    rows[1][data.draw(st.sampled_from(list(rows[1])))] = data.draw(JSON_TREES)
    batch = _take(columns, json.dumps(rows).encode(), CONTENT_JSON)
    assert batch is not None
    kept = batch.index.tolist()
    assert kept in ([0, 2], [0, 1, 2])
    assert sorted([*kept, *(r for bad in batch.refused for r in bad.rows)]) == [0, 1, 2]


def _stream(arrays: list[Any], names: list[str], compression: str | None = None) -> bytes:
    batch = pa.record_batch(arrays, names=names)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _bomb(claim: int | None) -> bytes:
    """A compressed stream of few bytes; `claim`: the decompressed length that a buffer is made to name."""
    value = _stream([pa.array(np.zeros(50_000)), pa.array(np.ones(50_000))], ["energy_j", "power_w"], "zstd")
    if claim is None:
        return value
    return value.replace(struct.pack("<q", 400_000), struct.pack("<q", claim))


@pytest.mark.parametrize("claim", [2**31, 2**40, 2**62, arrow.DECODED_BYTES_MAX])
def test_compression_bombs_are_refused_before_they_grow(claim: int) -> None:
    """A buffer that says it decompresses to gigabytes is believed, and refused, without any allocation."""
    assert GPU_SAMPLES.decode(_bomb(None)).refused  # required columns are missing: but it decodes
    before = pa.total_allocated_bytes()
    with pytest.raises(InvalidRecord) as refused:
        GPU_SAMPLES.decode(_bomb(claim))
    assert refused.value.reason == "too_large"
    assert pa.total_allocated_bytes() - before < MIB


def test_honest_compression_beyond_the_bound_is_refused() -> None:
    """Zeros compress a thousandfold: 1 MiB of them is refused by what they would take, not by what they are."""
    zeros = pa.array(np.zeros(5_000_000))
    value = _stream([zeros], ["energy_j"], "zstd")
    assert len(value) < MIB
    with pytest.raises(InvalidRecord, match="decompressed"):
        GPU_SAMPLES.decode(value)


def test_compression_of_before_arrow_1_is_refused() -> None:
    """The old way to say that buffers are compressed is not counted, so it is not taken."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V4)
    batch = pa.record_batch([pa.array([0]), pa.array([1.0])], names=["gpu", "at_s"])
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    assert GPU_SAMPLES.decode(bytes(sink.getvalue())).rows == 1
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"})
    with pytest.raises(InvalidRecord, match=r"before 1\.0"):
        GPU_SAMPLES.decode(bytes(sink.getvalue()))


@pytest.mark.parametrize(
    "array",
    [
        pa.Array.from_buffers(pa.null(), 2**31 - 1, [None]),
        pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 1], pa.int64()), pa.array(["ok"])),
    ],
    ids=["nulls", "runs"],
)
def test_rows_without_bytes_are_refused_by_number(array: Any) -> None:
    """Two thousand million rows that take no bytes are too many rows."""
    with pytest.raises(InvalidRecord) as refused:
        GPU_SAMPLES.decode(_stream([array], ["status"]))
    assert refused.value.reason == "too_large"


ROWS, REPEATED = 20_000, 100_000


def _views() -> tuple[Columns, str, Any]:
    text = b"x" * REPEATED
    view = struct.pack("<i4sii", len(text), text[:4], 0, 0)
    buffers = [None, pa.py_buffer(view * ROWS), pa.py_buffer(text)]
    return GPU_SAMPLES, "status", pa.Array.from_buffers(pa.string_view(), ROWS, buffers)


def _dictionary() -> tuple[Columns, str, Any]:
    indices = pa.array(np.zeros(ROWS, np.int8))
    return GPU_SAMPLES, "status", pa.DictionaryArray.from_arrays(indices, pa.array(["x" * REPEATED]))


def _runs() -> tuple[Columns, str, Any]:
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([ROWS], pa.int32()), pa.array(["x" * REPEATED]))
    return GPU_SAMPLES, "status", runs


def _list_views() -> tuple[Columns, str, Any]:
    offsets, sizes = np.zeros(ROWS, np.int32), np.full(ROWS, REPEATED, np.int32)
    inside = pa.array(np.zeros(REPEATED, np.uint32))
    return REQUEST_WINDOWS, "ttft_s_hist", pa.ListViewArray.from_arrays(pa.array(offsets), pa.array(sizes), inside)


@pytest.mark.parametrize("make", [_views, _dictionary, _runs, _list_views])
def test_layouts_that_stand_for_more_than_they_take_are_never_expanded(
    make: Callable[[], tuple[Columns, str, Any]],
) -> None:
    """20,000 rows that all name the same text or list (2 to 8 GB if written out) cost what they take."""
    columns, name, array = make()
    value = _stream([array], [name])
    assert len(value) < MIB
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    _take(columns, value)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * MIB
    assert pa.total_allocated_bytes() - before < 64 * MIB


def test_more_rows_than_allowed() -> None:
    """One row more than the bound is refused, in Arrow and in JSON; the bound itself is taken."""
    engine = COLUMNAR[ce_type("engine.samples")]
    for count, taken in ((ROWS_MAX, True), (ROWS_MAX + 1, False)):
        value = _stream([pa.array(np.zeros(count)), pa.array(np.zeros(count))], ["gpu", "at_s"])
        assert (_take(GPU_SAMPLES, value) is not None) == taken
        assert (_take(engine, b"[" + b",".join([b"{}"] * count) + b"]", CONTENT_JSON) is not None) == taken


@pytest.mark.parametrize("nested", [b"[" * 200_000, b'{"a":' * 50_000, b'[{"replica":' * 10_000])
def test_deep_nesting_is_refused(nested: bytes) -> None:
    """No decoder runs out of stack."""
    for columns in COLUMNAR.values():
        assert _take(columns, nested, CONTENT_JSON) is None
    for kind in examples.JSON_KINDS:
        with pytest.raises(InvalidRecord):
            decode(KINDS[ce_type(kind)], nested)


def test_refusals_of_hostile_texts_fit_a_dead_letter() -> None:
    """Field names, values and remedies that quote a stranger are cut and valid text."""
    long = {"type": "reroute", "weights": {"\udcff" + "k" * 300_000: 5}}
    value = json.dumps(examples.record("decision.proposed") | {"action": long}).encode("utf-8")
    with pytest.raises(InvalidRecord) as refused:
        decode(KINDS[ce_type("decision.proposed")], value)
    assert _letter(refused.value, value).encode()
    shown = InvalidRecord("invalid", "\udcff" * 300, "\udcff", "\udcff" * 2000)
    assert _letter(shown, b"").encode()
