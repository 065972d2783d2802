"""Opens an Arrow IPC stream that a stranger sent: within bounds, or not at all.

Arrow checks a stream's structure, not its appetite: a buffer compressed by Arrow itself names the size that it
will be given, and views, dictionaries and runs stand for more bytes than they take. Here those sizes are added up
before anything is allocated, and only layouts that cannot grow are handed on.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.errors import InvalidRecord

DECODED_BYTES_MAX = 32 * 1024 * 1024
"""A stream whose buffers, decompressed, would take more is refused."""
_V5 = 4  # MetadataVersion of Arrow 1.0 and later
_FAILURES = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, struct.error)


def read_stream(value: bytes, wanted: set[str], rows_max: int) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(rows, wanted column -> Arrow array, schema metadata as text). Columns that are not wanted are not looked at.

    Raises InvalidRecord for what is no valid stream, too many rows or too many bytes.
    """
    try:
        decoded = _decoded_bytes(value)
        if decoded > DECODED_BYTES_MAX:
            raise InvalidRecord(
                "too_large", "value", decoded, f"send at most {DECODED_BYTES_MAX} bytes when decompressed"
            )
        with pa.ipc.open_stream(value) as reader:
            schema = reader.schema
            batches = list(reader)
        rows = sum(b.num_rows for b in batches)
        if rows > rows_max:
            raise InvalidRecord("too_large", "rows", rows, f"send at most {rows_max} rows in a record")
        chosen: dict[str, int] = {}
        for index, name in enumerate(schema.names):
            if name in wanted:
                chosen.setdefault(name, index)
        columns = {name: _joined([b.column(i) for b in batches], schema.field(i).type) for name, i in chosen.items()}
        metadata = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
    except _FAILURES as error:
        raise InvalidRecord("undecodable", "value", value[:40], f"send an Arrow IPC stream ({error})") from None
    return rows, columns, metadata


def _joined(arrays: list[Any], type: Any) -> Any:
    for array in arrays:
        array.validate(full=True)
    if len(arrays) == 1:
        return arrays[0]
    chunked = pa.chunked_array(arrays, type=type)
    if pa.types.is_dictionary(type):
        chunked = chunked.unify_dictionaries()
        if chunked.num_chunks:
            indices = pa.concat_arrays([c.indices for c in chunked.chunks])
            return pa.DictionaryArray.from_arrays(indices, chunked.chunk(0).dictionary)
    return pa.concat_arrays(chunked.chunks) if chunked.num_chunks else pa.array([], type)


def text_codes(array: Any) -> tuple[np.ndarray, list[str]]:
    """(code per row, -1 = null; distinct values). Raises pa.ArrowInvalid for a type that is not text."""
    if pa.types.is_dictionary(array.type):
        if not _is_text(array.type.value_type):
            raise pa.ArrowInvalid("not text")
        found = array.dictionary.to_pylist()
        indices, dictionary_nulls = array.indices, None in found
    elif _is_text(array.type):
        encoded = array.dictionary_encode()
        found, indices, dictionary_nulls = encoded.dictionary.to_pylist(), encoded.indices, False
    elif pa.types.is_null(array.type):
        return np.full(len(array), -1, np.int32), []
    else:
        raise pa.ArrowInvalid("not text")
    codes = indices.fill_null(-1) if indices.null_count and not _is_unsigned(indices) else indices
    if codes.null_count:
        codes = codes.cast(pa.int64()).fill_null(-1)
    numbers = codes.to_numpy(zero_copy_only=False).astype(np.int32)
    if dictionary_nulls or len(set(found)) < len(found):
        # a foreign dictionary may repeat a value, or hold a null: one value, one code
        distinct: dict[str, int] = {}
        remap = [-1 if v is None else distinct.setdefault(v, len(distinct)) for v in found]
        return np.array([*remap, -1], np.int32)[numbers], list(distinct)
    return numbers, found


def numbers(array: Any) -> np.ndarray:
    """float64 with NaN for null (and for NaN: compare with `null_count`). Raises pa.ArrowInvalid for another type."""
    if array.type.id == pa.lib.Type_DOUBLE:  # what our own exporters send: the short way
        plain: np.ndarray = array.to_numpy(zero_copy_only=False)
        return plain
    if pa.types.is_dictionary(array.type) and _is_number(array.type.value_type):
        array = array.dictionary_decode()
    if pa.types.is_null(array.type):
        return np.full(len(array), np.nan)
    if not _is_number(array.type):
        raise pa.ArrowInvalid("not a number")
    if array.type != pa.float64():
        if not array.null_count and not pa.types.is_float16(array.type):
            out: np.ndarray = array.to_numpy().astype(np.float64)
            return out
        array = array.cast(pa.float64(), safe=False)
    out = array.to_numpy(zero_copy_only=False)
    return out


def integer_lists(array: Any) -> list[np.ndarray | None]:
    """Per row its uint32 values, None = null. Raises pa.ArrowInvalid for another type, or a null or negative inside."""
    if pa.types.is_null(array.type):
        return [None] * len(array)
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        raise pa.ArrowInvalid("not a list")  # a list *view* may name the same values for every row
    if not pa.types.is_integer(array.type.value_type):
        raise pa.ArrowInvalid("not whole numbers")
    inside = array.values
    if inside.null_count:
        raise pa.ArrowInvalid("null inside a list")
    return _split(array, inside.cast(pa.uint32()).to_numpy())


def number_lists(array: Any) -> list[np.ndarray | None]:
    """Per row its float64 values, None = null. Raises pa.ArrowInvalid for another type, or a null inside."""
    if pa.types.is_null(array.type):
        return [None] * len(array)
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        raise pa.ArrowInvalid("not a list")
    if not _is_number(array.type.value_type):
        raise pa.ArrowInvalid("not numbers")
    if array.values.null_count:
        raise pa.ArrowInvalid("null inside a list")
    return _split(array, array.values.cast(pa.float64()).to_numpy())


def _split(array: Any, flat: np.ndarray) -> list[np.ndarray | None]:
    ends = array.offsets.to_numpy()
    valid = array.is_valid().to_pylist()
    return [flat[a:b] if ok else None for a, b, ok in zip(ends[:-1].tolist(), ends[1:].tolist(), valid, strict=True)]


def _is_text(type: Any) -> bool:
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type))


def _is_number(type: Any) -> bool:
    return bool(pa.types.is_integer(type) or pa.types.is_floating(type))


def _is_unsigned(array: Any) -> bool:
    return bool(pa.types.is_unsigned_integer(array.type))


# -- how much a stream would take ----------------------------------------------------------------------------
# Message and RecordBatch are flatbuffers (Arrow: format/Message.fbs); pyarrow has verified each before we look.


def _decoded_bytes(value: bytes) -> int:
    total = 0
    for message in pa.ipc.MessageReader.open_stream(value):
        if message.type in ("record batch", "dictionary"):
            total += _message_bytes(message)
    return total


def _message_bytes(message: Any) -> int:
    data = memoryview(message.metadata)
    root = _u32(data, 0)
    at = _field(data, root, 0)
    version = struct.unpack_from("<h", data, at)[0] if at else 0
    batch = _follow(data, _field(data, root, 2))
    if message.type == "dictionary":
        batch = _follow(data, _field(data, batch, 1))
    compressed = _field(data, batch, 3)
    if version < _V5 and _field(data, root, 4):
        raise pa.ArrowInvalid("metadata on a message of a version before 1.0 (may hide compression)")
    if not compressed:
        return int(message.body.size)
    body = memoryview(message.body)
    vector = _follow(data, _field(data, batch, 2))
    total = 0
    for i in range(_u32(data, vector)):
        offset, length = struct.unpack_from("<qq", data, vector + 4 + 16 * i)
        if length >= 8:
            claimed = struct.unpack_from("<q", body, offset)[0]
            total += length if claimed < 0 else claimed  # -1: this buffer is not compressed
    return total


def _u32(data: memoryview, at: int) -> int:
    found: int = struct.unpack_from("<I", data, at)[0]
    return found


def _field(data: memoryview, table: int, index: int) -> int:
    """Where a table's field lies; 0: it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    at = 4 + 2 * index
    if at + 2 > struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset: int = struct.unpack_from("<H", data, vtable + at)[0]
    return table + offset if offset else 0


def _follow(data: memoryview, at: int) -> int:
    if not at:
        raise pa.ArrowInvalid("a message without content")
    return at + _u32(data, at)
