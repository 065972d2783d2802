"""Bodies of our own rows: one JSON row or an array, NDJSON, or an Arrow stream; refusals name row, field and remedy."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from schemas.columns import ROWS_MAX, TEXT_MAX, Batch
from schemas.errors import InvalidRecord
from schemas.log import CONTENT_ARROW, CONTENT_JSON
from schemas.requests import REQUEST_ROWS

CONTENT_NDJSON = "application/x-ndjson"
REFUSALS_SHOWN = 100
MEMBERS_MAX = 1_000


class Rows(NamedTuple):
    """What was made of a body."""

    batch: Batch
    refusals: list[dict[str, Any]]
    """As they are answered; the first ones."""
    refused: int
    """Rows refused."""


def refusal(row: int | None, reason: str, field: str, value: str, remedy: str) -> dict[str, Any]:
    """One refusal, as it is answered."""
    return {"row": row, "reason": reason, "field": field, "value": value, "remedy": remedy}


def _of_batch(batch: Batch, lines: list[int] | None = None) -> Rows:
    refusals: list[dict[str, Any]] = []
    count = 0
    for bad in batch.refused:
        count += len(bad.rows)
        for row in bad.rows[:REFUSALS_SHOWN]:
            where = row if lines is None else lines[row]
            refusals.append(refusal(where, bad.reason, bad.field, bad.value, bad.remedy))
    refusals.sort(key=lambda r: int(r["row"]))
    return Rows(batch, refusals, count)


def _json(body: bytes) -> Rows:
    return _of_batch(REQUEST_ROWS.decode(body, CONTENT_JSON))


def _arrow(body: bytes) -> Rows:
    return _of_batch(REQUEST_ROWS.decode(body, CONTENT_ARROW))


def _ndjson(body: bytes) -> Rows:
    """Lines of JSON; a line that is none is refused like a bad row. Row numbers count every line from 0."""
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    broken: list[dict[str, Any]] = []
    for number, line in enumerate(body.split(b"\n")):
        if not line.strip():
            continue
        if len(rows) + len(broken) >= ROWS_MAX:
            raise InvalidRecord("too_large", "rows", f"more than {ROWS_MAX}", f"send at most {ROWS_MAX} rows at once")
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            broken.append(
                refusal(number, "undecodable", "value", repr(line[:80]), f"send a JSON object a line ({error})"[:300])
            )
            continue
        rows.append(found)
        lines.append(number)
    batch, refusals, count = _of_batch(REQUEST_ROWS.decode_rows(rows), lines)
    return Rows(batch, sorted([*broken, *refusals], key=lambda r: int(r["row"])), count + len(broken))


def fill(batch: Batch, column: str, value: str) -> None:
    """Gives a text to the rows that have none in a column. Raises InvalidRecord for one that no row may have."""
    if not 0 < len(value) <= TEXT_MAX or not value.isprintable():
        raise InvalidRecord("invalid", column, "a header", f"send 1 to {TEXT_MAX} printable characters")
    codes, values = batch.codes[column], batch.values[column]
    if (codes < 0).any():
        place = values.index(value) if value in values else len(values)
        batch.values[column] = [*values, value] if place == len(values) else values
        batch.codes[column] = np.where(codes < 0, place, codes).astype(codes.dtype)


def decompressed(body: bytes, encoding: str, bytes_max: int) -> bytes:
    """A body without its Content-Encoding: identity, gzip or deflate.

    Raises InvalidRecord: `too_large` for what becomes more than `bytes_max`, `unknown_type` for another encoding.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise InvalidRecord("unknown_type", "Content-Encoding", encoding, "send gzip, deflate or none")
    out: list[bytes] = []
    left = bytes_max + 1
    members = 0
    while body and left > 0:  # a gzip file may have several members
        members += 1
        if members > MEMBERS_MAX:  # each is cut from what follows it: many would cost their number times their length
            raise InvalidRecord("too_large", "body", encoding, f"send at most {MEMBERS_MAX} members of gzip at once")
        inflate = zlib.decompressobj(zlib.MAX_WBITS | 32 if encoding == "gzip" else zlib.MAX_WBITS)
        try:
            out.append(inflate.decompress(body, left))
        except zlib.error:
            raise InvalidRecord(
                "undecodable", "body", encoding, f"send what {encoding} gives, or no encoding"
            ) from None
        left -= len(out[-1])
        if left > 0 and not inflate.eof:
            raise InvalidRecord("undecodable", "body", encoding, "it ends too early: send the whole of it")
        body = inflate.unused_data
    if left <= 0:
        raise InvalidRecord("too_large", "body", encoding, f"send at most {bytes_max} bytes at once, decompressed")
    return b"".join(out)


DECODERS: dict[str, Callable[[bytes], Rows]] = {
    CONTENT_JSON: _json,
    CONTENT_NDJSON: _ndjson,
    CONTENT_ARROW: _arrow,
}
"""Content type -> decoder, which raises InvalidRecord for a body of which nothing can be taken."""
