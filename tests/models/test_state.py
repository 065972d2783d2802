"""State to bytes and back."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.state import pack, unpack
from schemas.errors import CheckpointMismatch

leaf = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(max_size=5)
)
keys = st.one_of(st.text(max_size=5), st.integers(-5, 5))
plain = st.recursive(leaf, lambda x: st.lists(x, max_size=4) | st.dictionaries(keys, x, max_size=4), max_leaves=20)
NAMES = ("node", "node.samples", 3)


@given(st.dictionaries(st.text(max_size=5), plain, max_size=5))
def test_plain_state_round_trips(state: dict[str, Any]) -> None:
    """Plain values come back equal, and packing them again gives the same bytes."""
    packed = pack(*NAMES, 1, state)
    version, found = unpack(*NAMES, (1,), packed)
    assert (version, found) == (1, state)
    assert list(found) == list(state)
    assert pack(*NAMES, 1, found) == packed


@pytest.mark.parametrize("dtype", ["<f8", "<i8", "<i4", "<u4", "<u8", "|u1", "|b1", "<f4"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (4,), (2, 3)])
def test_arrays_round_trip(dtype: str, shape: tuple[int, ...]) -> None:
    """Arrays come back with dtype, shape and every bit, also empty or strided ones, and can be written to."""
    array = (np.arange(int(np.prod(shape)) * 2) % 7).astype(dtype).reshape(*shape, 2)[..., 0]
    packed = pack(*NAMES, 1, {"a": array})
    found = unpack(*NAMES, (1,), packed)[1]["a"]
    assert found.dtype == array.dtype
    assert found.shape == shape
    assert np.array_equal(found, array)
    found[...] = 0
    assert pack(*NAMES, 1, {"a": array}) == packed


def test_nan_keeps_its_bits() -> None:
    """Unknown (NaN) survives, in arrays and alone."""
    packed = pack(*NAMES, 1, {"a": np.array([np.nan, 1.0]), "b": float("nan"), "c": np.float64(2.0), "d": np.int64(3)})
    found = unpack(*NAMES, (1,), packed)[1]
    assert np.isnan(found["a"]).tolist() == [True, False]
    assert found["b"] != found["b"]
    assert (found["c"], found["d"]) == (2.0, 3)


@pytest.mark.parametrize("names", [("pool", "node.samples", 3), ("node", "other", 3), ("node", "node.samples", 4)])
def test_dump_of_another_is_refused(names: tuple[str, str, int]) -> None:
    """A dump of another level, topic or partition is refused."""
    with pytest.raises(CheckpointMismatch, match="this checkpoint is of"):
        unpack(*NAMES, (1,), pack(*names, 1, {}))


def test_other_format_is_refused() -> None:
    """A dump of a format that is not read is refused, and the text says what to do."""
    with pytest.raises(CheckpointMismatch, match="replay from the log"):
        unpack(*NAMES, (2, 3), pack(*NAMES, 1, {}))


@given(st.binary(max_size=60))
def test_garbage_is_refused(data: bytes) -> None:
    """Foreign bytes raise CheckpointMismatch and nothing else."""
    with pytest.raises(CheckpointMismatch):
        unpack(*NAMES, (1,), data)


@given(st.data())
def test_damaged_dump_never_raises_anything_else(data: st.DataObject) -> None:
    """A dump with changed or missing bytes is refused or read, never anything else."""
    good = pack(*NAMES, 1, {"a": np.arange(5.0), "b": {"x": [1, None]}})
    at = data.draw(st.integers(0, len(good) - 1))
    damaged = good[:at] + data.draw(st.binary(max_size=3)) + good[at + 1 :]
    with contextlib.suppress(CheckpointMismatch):
        unpack(*NAMES, (1,), damaged)


def test_what_cannot_be_state_is_our_bug() -> None:
    """A set or an object in the state raises at once."""
    with pytest.raises(TypeError, match="cannot be part"):
        pack(*NAMES, 1, {"a": {1, 2}})
