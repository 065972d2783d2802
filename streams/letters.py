"""The substrate's own dead letters: a record at which a fold raises, a result that no topic takes."""

from __future__ import annotations

from typing import Any

from schemas.deadletters import DeadLetter, dead_data
from schemas.log import Result
from schemas.topics import DEAD_LETTERS, ce_type
from streams.partition import PartitionState

DETAIL_CHARS_MAX = 8_000
TYPE = ce_type(DeadLetter.kind)


def fold_error(state: PartitionState, record: Any, type: str, at_ms: int, detail: str) -> Result:
    """For a record at which the fold raises; `detail` is the traceback, of which the end is kept."""
    letter = DeadLetter(
        topic=state.topic,
        partition=state.partition,
        offset=record.offset,
        at_s=max(0.0, at_ms / 1000),
        type=type,
        reason="fold_error",
        remedy="our bug: report it with this traceback",
        detail=detail[-DETAIL_CHARS_MAX:],
        **dead_data(record.value or b""),  # type: ignore[arg-type]
    )
    name = f"{state.topic}/{state.partition}/{record.offset}"
    return Result(DEAD_LETTERS, name, TYPE, f"{name}#fold_error", at_ms, letter.encode())


def too_large(state: PartitionState, result: Result) -> Result:
    """For a result beyond its topic's limit, which would fail for ever: its head, length and hash."""
    letter = DeadLetter(
        topic=result.topic,
        partition=state.partition,
        offset=max(0, state.applied + 1),
        at_s=max(0.0, result.at_ms / 1000),
        type=result.type,
        reason="too_large",
        value=result.id[:200],
        remedy=f"a result larger than {result.topic} takes: our bug, report it",
        **dead_data(result.value),  # type: ignore[arg-type]
    )
    name = f"result/{result.topic}/{result.id}"
    return Result(DEAD_LETTERS, name, TYPE, name, result.at_ms, letter.encode())
