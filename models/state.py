"""State to bytes and back, byte for byte: msgpack with numpy arrays, named by what it belongs to.

Dictionaries keep their order, so `pack(unpack(pack(x))) == pack(x)`. No pickle: a checkpoint topic is input.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np

from schemas.errors import CheckpointMismatch

_ARRAY = 1
_DTYPES = ("<f8", "<i8", "<i4", "<u4", "<u8", "|u1", "|b1", "<f4", "<i2", "<u2")


def _default(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        assert array.dtype.str in _DTYPES, array.dtype
        return msgpack.ExtType(_ARRAY, msgpack.packb((array.dtype.str, list(array.shape), array.tobytes())))
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    raise TypeError(f"{type(value).__name__} cannot be part of a fold's state")


def _hook(code: int, data: bytes) -> Any:
    if code != _ARRAY:
        raise CheckpointMismatch(f"unknown extension {code} in a checkpoint")
    dtype, shape, raw = msgpack.unpackb(data)
    if dtype not in _DTYPES:
        raise CheckpointMismatch(f"unknown array type {dtype!r} in a checkpoint")
    return np.frombuffer(raw, np.dtype(dtype)).reshape(shape).copy()


def packable(value: Any) -> bool:
    """Whether plain values can be part of a state: whole numbers have at most 64 bits."""
    try:
        msgpack.packb(value)
    except (OverflowError, ValueError):
        return False
    return True


def pack(level: str, topic: str, partition: int, version: int, state: dict[str, Any]) -> bytes:
    """State to bytes. `version`: of the state's format; a fold loads its own and the one before."""
    head = {"level": level, "topic": topic, "partition": partition, "format": version, "state": state}
    packed: bytes = msgpack.packb(head, default=_default, use_bin_type=True)
    return packed


def unpack(
    level: str, topic: str, partition: int, versions: tuple[int, ...], data: bytes
) -> tuple[int, dict[str, Any]]:
    """(format, state) of a dump. Raises CheckpointMismatch where it is another's or not a dump."""
    try:
        head = msgpack.unpackb(data, ext_hook=_hook, strict_map_key=False, use_list=True)
        found = (head["level"], head["topic"], head["partition"])
        version, state = head["format"], head["state"]
    except CheckpointMismatch:
        raise
    except Exception as error:  # whatever msgpack raises on foreign bytes
        raise CheckpointMismatch(f"not a checkpoint: {error}") from error
    if found != (level, topic, partition):
        raise CheckpointMismatch(f"this checkpoint is of {found}, not of {(level, topic, partition)}")
    if version not in versions:
        raise CheckpointMismatch(
            f"checkpoint format {version}; this version reads {versions}: "
            "replay from the log, or run the version that wrote it"
        )
    return version, state
