"""JSON records: the pydantic base, the registry of kinds, and the codec between bytes and records."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.errors import InvalidRecord
from schemas.topics import ce_type

MS_LIMIT_S = 1e11
"""Unix seconds beyond this (the year 5138) are milliseconds sent by mistake."""

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


def decode(cls: type[T], value: bytes) -> T:
    """Bytes to a record. Raises InvalidRecord (`undecodable` or `invalid`) that names field, value, remedy."""
    try:
        return cls.model_validate_json(value)
    except ValidationError as error:
        raise refusal(cls.kind, error) from None
    except RecursionError:
        raise InvalidRecord("undecodable", "value", value[:80], "nest less deeply") from None


def refusal(kind: str, error: ValidationError) -> InvalidRecord:
    """The first problem of a pydantic error as our own refusal."""
    first: Any = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "value"
    if first["type"] == "json_invalid":
        return InvalidRecord("undecodable", field, first.get("input"), f"send JSON of kind {kind}: {first['msg']}")
    value = first.get("input")
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= MS_LIMIT_S and field.endswith("_s"):
        return InvalidRecord("time_unit", field, value, "send seconds since 1970, not milliseconds")
    return InvalidRecord("invalid", field, value, f"{first['msg']} (see the schema of {kind})")


def canonical(value: object) -> bytes:
    """Canonical JSON of plain values: keys sorted, no spaces, UTF-8, NaN refused. What is hashed and signed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
