"""Refused records and rows."""

from __future__ import annotations

import base64
import hashlib
from typing import ClassVar, Literal

from pydantic import Field

from schemas.base import Record, Seconds, register

BYTES_MAX = 64 * 1024

Reason = Literal[
    "undecodable",
    "invalid",
    "not_finite",
    "out_of_bounds",
    "time_unit",
    "in_future",
    "too_late",
    "unknown_type",
    "unknown_version",
    "conflict",
    "overflow",
    "unsigned",
    "fold_error",
    "too_large",
]


@register
class DeadLetter(Record):
    """A record, or rows of one, that could not be taken: nothing else was lost with it."""

    kind: ClassVar[str] = "dead.letter"
    topic: str = Field(description="Topic (without prefix) that it came on.")
    partition: int = Field(ge=0, description="Partition.")
    offset: int = Field(ge=0, description="Offset.")
    at_s: Seconds = Field(description="Log time, Unix s.")
    type: str = Field(description="Its ce_type.")
    reason: Reason = Field(description="Why, as a code.")
    field: str = Field("", description="The field at fault.")
    value: str = Field("", description="Its value, shortened.")
    remedy: str = Field("", description="What the sender should do.")
    rows: list[int] | None = Field(None, description="Rows of the batch that were refused. Null: the whole record.")
    rows_refused: int = Field(1, ge=0, description="How many rows, or 1.")
    detail: str = Field("", max_length=20_000, description="Traceback of a fold_error.")
    data_base64: str = Field(description="The record's value: the first 64 KiB.")
    data_bytes: int = Field(ge=0, description="Its whole length, bytes.")
    data_sha256: str | None = Field(None, description="Hash of the whole value where it was cut.")


def dead_data(value: bytes) -> dict[str, str | int | None]:
    """The three `data_*` fields for a value."""
    long = len(value) > BYTES_MAX
    return {
        "data_base64": base64.b64encode(value[:BYTES_MAX]).decode(),
        "data_bytes": len(value),
        "data_sha256": hashlib.sha256(value).hexdigest() if long else None,
    }
