"""Tumbling windows in event time: where they lie, when they close, and how a row of them becomes a result.

All times are Unix seconds. A window [start, start + 10) closes when log time passes its end by the lateness; it may be
revised until a row that belongs to it would be refused as too late.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.fold import BaseFold
from schemas.columns import Columns
from schemas.log import CONTENT_ARROW, Result
from schemas.signals import WindowName
from schemas.topics import POOL_SIGNALS

WINDOW_S = 10


def window_start(at_s: float) -> int:
    """Start of the window that `at_s` falls in, Unix s."""
    return int(at_s // WINDOW_S) * WINDOW_S


def window_starts(at_s: np.ndarray) -> np.ndarray:
    """As `window_start`, of an array: int64."""
    return (at_s // WINDOW_S).astype(np.int64) * WINDOW_S


def closed(start_s: int, now_s: float, lateness_s: float) -> bool:
    """Whether a window has closed at log time `now_s`."""
    return start_s + WINDOW_S + lateness_s <= now_s


def final(start_s: int, now_s: float, grace_s: float) -> bool:
    """Whether no row that is still taken can fall in a window: rows older than `now_s - grace_s` are too late."""
    return start_s + WINDOW_S <= now_s - grace_s


def overlap(from_s: np.ndarray, to_s: np.ndarray, start_s: float, end_s: float) -> np.ndarray:
    """How much of each [from, to) lies in [start, end), s."""
    held: np.ndarray = np.maximum(np.minimum(to_s, end_s) - np.maximum(from_s, start_s), 0.0)
    return held


def content_crc(data: Mapping[str, Any]) -> int:
    """CRC-32 of columns, whatever the metadata: whether a window has changed since it was last published."""
    crc = 0
    for name, values in data.items():
        if isinstance(values, np.ndarray):
            raw = values.tobytes()
        else:  # an array within is shown by its bytes: its repr leaves digits out
            raw = repr([v.tobytes() if isinstance(v, np.ndarray) else v for v in values]).encode()
        crc = zlib.crc32(raw, zlib.crc32(name.encode(), crc))
    return crc


def window_result(
    fold: BaseFold,
    kind: Columns,
    short: str,
    pool: str,
    start_s: int,
    is_closed: bool,
    data: Mapping[str, Any],
) -> Result:
    """The result for pool.signals that holds one window of one pool, as of the record that the fold applies now.

    `short`: gpu, engine or request, the first part of the result's id.
    """
    until_s = fold.log_ms / 1000
    name = WindowName(pool, fold.source, start_s, fold.offset, until_s, is_closed)
    value = kind.encode(data, name.meta(WINDOW_S))
    id = f"{short}/{pool}/{start_s}/{fold.source}@{fold.offset}"
    return Result(POOL_SIGNALS, pool, kind.type, id, fold.log_ms, value, CONTENT_ARROW)
