"""Is this a window of ours? What a batch's metadata must say before any of its rows is taken."""

from __future__ import annotations

from models.pool.windows import SIZE_S
from models.sketches import BUCKETS
from schemas.columns import Batch
from schemas.errors import InvalidRecord
from schemas.signals import WindowName

SOURCES_MAX = 4096
"""Partitions of a topic below."""


def window_name(batch: Batch, topic: str, now_s: float, future_s: float) -> WindowName:
    """The name of a window folded from `topic`. Raises InvalidRecord with the field at fault."""
    try:
        name = WindowName.of(batch.meta)
    except (KeyError, ValueError) as error:
        remedy = "name pool, source, start_s, version, until_s and closed"
        raise InvalidRecord("invalid", "schema metadata", str(error), remedy) from None
    number = name.source.removeprefix(f"{topic}/")
    if number == name.source or not number.isdecimal() or len(number) > 4 or int(number) >= SOURCES_MAX:
        raise InvalidRecord("invalid", "source", name.source, f"the source must be {topic}/<partition>")
    if not name.pool or len(name.pool) > 200 or "/" in name.pool or not name.pool.isprintable():
        raise InvalidRecord("invalid", "pool", name.pool, "1 to 200 printable characters, no slash")
    if name.start_s % SIZE_S or name.start_s < 0:
        raise InvalidRecord("invalid", "start_s", name.start_s, f"windows start at multiples of {SIZE_S} s")
    if name.version < 0:
        raise InvalidRecord("invalid", "version", name.version, "the version is an offset")
    if not name.start_s <= now_s + future_s:
        raise InvalidRecord("in_future", "start_s", name.start_s, "set the clock of the level below")
    if not 0 < name.until_s <= now_s + future_s:
        raise InvalidRecord("in_future", "until_s", name.until_s, "set the clock of the level below")
    return name


def check_histograms(batch: Batch) -> None:
    """Raises InvalidRecord for a bucket that no histogram has."""
    for column in ("ttft_s_hist", "tpot_s_hist"):
        for pairs in batch.pairs[column]:
            if pairs is not None and len(pairs) and pairs[::2].max() >= BUCKETS:
                raise InvalidRecord("out_of_bounds", column, int(pairs[::2].max()), f"buckets are below {BUCKETS}")
