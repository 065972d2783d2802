"""JSON records: the pydantic base, the registry of kinds, and the codec between bytes and records."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from schemas.errors import InvalidRecord
from schemas.topics import ce_type

MS_LIMIT_S = 1e11
"""Unix seconds beyond this (the year 5138) are milliseconds sent by mistake."""

INT_MAX = 2**63 - 1

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f/]+$")]
"""A name of ours: 1 to 200 characters, no control characters, no slash (slashes join names to keys)."""
Seconds = Annotated[float, Field(ge=0, lt=MS_LIMIT_S)]
"""Unix time in seconds, or a duration in seconds."""
Ratio = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Record(BaseModel):
    """Base of every JSON record: immutable, unknown fields ignored, no NaN and no infinity."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, str_max_length=100_000)
    kind: ClassVar[str] = ""

    def encode(self) -> bytes:
        """Canonical bytes: fields in the order of the class, nulls kept, no spaces."""
        return self.model_dump_json(by_alias=True).encode()


KINDS: dict[str, type[Record]] = {}
"""`ce_type` -> record class, of every JSON kind."""

R = TypeVar("R", bound=type[Record])


def register(cls: R) -> R:
    """Class decorator: puts a record class into `KINDS` under its kind."""
    assert cls.kind, cls
    assert ce_type(cls.kind) not in KINDS, cls
    KINDS[ce_type(cls.kind)] = cls
    return cls


T = TypeVar("T", bound=Record)


_SUSPECT = re.compile(rb"NaN|Infinity|[0-9]{19}|[eE]\+?[0-9]{3}")
"""Bytes without which no JSON number is unbounded; all but a few records are spared the walk."""


def decode(cls: type[T], value: bytes) -> T:
    """Bytes to a record. Raises InvalidRecord that names field, value and remedy.

    Types are strict: "4" is no number. Numbers are finite and whole ones fit 64 bits, in free-form fields too.
    """
    try:
        if _SUSPECT.search(value):
            _refuse_unbounded("", _parsed(value))
        return cls.model_validate_json(value, strict=True)
    except ValidationError as error:
        raise refusal(cls.kind, error) from None
    except RecursionError:
        raise InvalidRecord("undecodable", "value", value[:80], "nest less deeply") from None


def _parsed(value: bytes) -> Any:
    try:
        return from_json(value)
    except ValueError:
        return None  # the validation that follows says what is wrong


def _refuse_unbounded(path: str, found: Any) -> None:
    if isinstance(found, dict):
        for key, item in found.items():
            _refuse_unbounded(f"{path}.{key}" if path else key, item)
    elif isinstance(found, list):
        for item in found:
            _refuse_unbounded(path, item)
    elif isinstance(found, float) and not math.isfinite(found):
        raise InvalidRecord("not_finite", path or "value", found, "send null for unknown, never NaN or infinity")
    elif isinstance(found, int) and abs(found) > INT_MAX:
        raise InvalidRecord("out_of_bounds", path or "value", found, f"send whole numbers up to {INT_MAX}")


_REASONS = {
    "json_invalid": "undecodable",
    "finite_number": "not_finite",
    "greater_than": "out_of_bounds",
    "greater_than_equal": "out_of_bounds",
    "less_than": "out_of_bounds",
    "less_than_equal": "out_of_bounds",
}
"""pydantic's code of an error -> ours; every other is `invalid`."""


def refusal(kind: str, error: ValidationError) -> InvalidRecord:
    """The first problem of a pydantic error as our own refusal."""
    first: Any = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "value"
    value = first.get("input")
    reason = _REASONS.get(first["type"], "invalid")
    if reason == "undecodable":
        return InvalidRecord(reason, field, value, f"send JSON of kind {kind}: {first['msg']}")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and value >= MS_LIMIT_S and field.endswith("_s"):
        return InvalidRecord("time_unit", field, value, "send seconds since 1970, not milliseconds")
    return InvalidRecord(reason, field, value, f"{first['msg']} (see the schema of {kind})")


def canonical(value: object) -> bytes:
    """Canonical JSON of plain values: keys sorted, no spaces, UTF-8, NaN refused. What is hashed and signed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
