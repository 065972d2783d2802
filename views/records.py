"""From a record of a result topic to its typed value: what rows and tally have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

# Imported for their registration in KINDS and COLUMNAR: what is not imported could not be decoded.
import schemas.config
import schemas.costs
import schemas.decisions
import schemas.findings
import schemas.forecasts
import schemas.signals  # noqa: F401
from schemas.base import KINDS, Record, decode
from schemas.columns import COLUMNAR, Batch
from schemas.deadletters import DeadLetter
from schemas.errors import InvalidRecord
from schemas.log import LogRecord
from schemas.topics import (
    AUDIT,
    COST_WINDOWS,
    DEAD_LETTERS,
    DECISION_EVENTS,
    DECISIONS,
    FINDINGS,
    FLEET_CONFIG,
    LOAD_FORECASTS,
    POOL_SIGNALS,
)

SOURCES = (
    FLEET_CONFIG,
    DECISIONS,
    FINDINGS,
    AUDIT,
    DECISION_EVENTS,
    LOAD_FORECASTS,
    COST_WINDOWS,
    POOL_SIGNALS,
    DEAD_LETTERS,
)
"""Topics that the views read."""
WINDOW_S = 10
"""Length of the windows that add up; longer ones are merges of these and would count twice."""


def decode_record(record: LogRecord) -> Batch | Record:
    """The typed value of a record. Raises InvalidRecord."""
    if record.type in COLUMNAR:
        return COLUMNAR[record.type].decode(record.value, record.content_type)
    if record.type not in KINDS:
        raise InvalidRecord("unknown_type", "ce_type", record.type, "see the topic registry")
    return decode(KINDS[record.type], record.value)


def latest(records: Sequence[LogRecord]) -> list[LogRecord]:
    """The records of one partition without those that a later one of them replaces.

    A window's id is `name@version` and it comes whole each time, so of a name the last is enough: who lags behind
    catches up without decoding every early look.
    """
    last = {name: r.offset for r in records if (name := _window_name(r)) is not None}
    return [r for r in records if (name := _window_name(r)) is None or last[name] == r.offset]


def _window_name(record: LogRecord) -> tuple[str, str] | None:
    if record.type not in COLUMNAR or "@" not in record.id:
        return None
    return record.type, record.id.rpartition("@")[0]


def is_early(record: LogRecord) -> bool:
    """Whether this is an early look at a window that is still open: known from its metadata, without decoding it."""
    try:
        metadata = pa.ipc.read_schema(pa.py_buffer(record.value)).metadata or {}
    except (pa.ArrowException, OSError, ValueError):
        return False  # whoever decodes it says what is wrong
    return metadata.get(b"closed") == b"0"


def batch_rows(batch: Batch) -> list[dict[str, Any]]:
    """The rows of a batch as plain values, histograms left out; unknown is None, whole numbers are int."""
    columns: dict[str, list[Any]] = {}
    for name, array in batch.numbers.items():
        columns[name] = [None if v != v else int(v) if v.is_integer() else v for v in array.tolist()]
    for name in batch.codes:
        columns[name] = list(batch.text(name))
    names = list(columns)
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def engine_means(cells: dict[str, Any]) -> dict[str, Any]:
    """Means and rates of an engine window from its sums; None where nothing was counted."""

    def ratio(above: str, below: str) -> float | None:
        a, b = cells[above], cells[below]
        return a / b if a is not None and b else None

    return {
        "ttft_s_mean": ratio("ttft_s_sum", "ttft_count"),
        "tpot_s_mean": ratio("tpot_s_sum", "tpot_count"),
        "e2e_s_mean": ratio("e2e_s_sum", "e2e_count"),
        "generation_tokens_per_s": ratio("generation_tokens", "covered_s"),
    }


def letter_id(record: LogRecord, letter: DeadLetter) -> str:
    """Names a letter, so that one that is published again counts once."""
    rows = "" if letter.rows is None else ",".join(map(str, letter.rows))
    return record.id or f"{letter.topic}/{letter.partition}/{letter.offset}/{letter.reason}/{letter.field}/{rows}"
