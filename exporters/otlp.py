"""OTLP traces, protobuf or JSON, to request rows. Knows the encoding; what attributes mean is in `conventions`.

Of an attribute that nobody asked for the name is looked at, its value never.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from pydantic_core import from_json

from exporters.conventions import PART_TYPE
from exporters.conventions_rows import Cells, Mapper, NotARequest, Span, batch_of, is_first_token
from exporters.intake_letters import RefusedSpan
from schemas.columns import Batch
from schemas.errors import InvalidRecord

ERROR = 2
"""StatusCode of OTLP."""
MESSAGE_CHARS_MAX = 1_000
Attributes = dict[str, Any]


class Spans(NamedTuple):
    """What was made of an export request."""

    batch: Batch
    spans: int
    """Spans in it."""
    skipped: int
    """Spans that are no request to a model: taken and not kept."""
    refused: list[RefusedSpan]

    def response(self) -> ExportTraceServiceResponse:
        """The answer that the protocol asks for: `partial_success` only where spans were refused."""
        answer = ExportTraceServiceResponse()
        if self.refused:
            why: dict[str, int] = {}
            for one in self.refused:
                reason = f"{one.field}: {one.remedy}"
                why[reason] = why.get(reason, 0) + 1
            answer.partial_success.rejected_spans = len(self.refused)
            text = "; ".join(f"{count} spans: {reason}" for reason, count in why.items())
            answer.partial_success.error_message = text[:MESSAGE_CHARS_MAX]
        return answer


class OtlpReader:
    """Decodes export requests. Fit for another thread. `spans_max`: of one request."""

    def __init__(self, mapper: Mapper, spans_max: int) -> None:
        self.mapper, self.spans_max = mapper, spans_max

    def protobuf(self, body: bytes, headers: Mapping[str, str]) -> Spans:
        """A binary body. Raises InvalidRecord."""
        try:
            message = ExportTraceServiceRequest.FromString(body)
        except DecodeError:
            raise InvalidRecord(
                "undecodable", "body", f"{len(body)} bytes", "send an ExportTraceServiceRequest of OTLP 1.x"
            ) from None
        return self.message(message, headers)

    def message(self, message: Any, headers: Mapping[str, str]) -> Spans:
        """A decoded message. Raises InvalidRecord."""
        self._check(sum(len(s.spans) for r in message.resource_spans for s in r.scope_spans))
        return self._taken(_of_protobuf(message, self.mapper.wanted), headers)

    def json(self, body: bytes, headers: Mapping[str, str]) -> Spans:
        """A JSON body. Raises InvalidRecord."""
        try:
            found = from_json(body)
        except ValueError:
            raise InvalidRecord(
                "undecodable", "body", f"{len(body)} bytes", "send JSON as OTLP 1.x writes it"
            ) from None
        self._check(sum(len(spans) for _, spans in _json_scopes(found)))
        return self._taken(_of_json(found, self.mapper.wanted), headers)

    def _check(self, spans: int) -> None:
        if spans > self.spans_max:
            raise InvalidRecord("too_large", "spans", spans, f"send at most {self.spans_max} spans at once")

    def _taken(self, spans: Iterator[tuple[Span, Attributes, Any]], headers: Mapping[str, str]) -> Spans:
        calls: list[tuple[Cells, Cells]] = []
        raws: list[Any] = []
        refused: list[RefusedSpan] = []
        count = 0
        of_span = self.mapper.of_span
        for span, resource, raw in spans:
            count += 1
            try:
                call = of_span(span, resource, headers)
            except NotARequest as why:
                refused.append(_refused(raw, why.reason, why.field, why.remedy))
                continue
            if call is not None:
                calls.append(call)
                raws.append(raw)
        skipped = count - len(calls) - len(refused)
        batch, bad = batch_of(calls)
        refused += [_refused(raws[i], *why) for i, why in bad.items()]
        return Spans(batch, count, skipped, refused)


def _refused(raw: Any, reason: str, field: str, remedy: str) -> RefusedSpan:
    if isinstance(raw, Message):
        value = raw.SerializeToString(deterministic=True)
        names = [a.key for a in raw.attributes]  # type: ignore[attr-defined]
    else:
        value = json.dumps(raw, sort_keys=True).encode()
        names = [str(a.get("key", "")) for a in _items(raw.get("attributes"))]
    return RefusedSpan(reason, field, remedy, hashlib.sha256(value).hexdigest(), len(value), tuple(names))


# --- protobuf -----------------------------------------------------------------------------------------------


def _of_protobuf(message: Any, wanted: frozenset[str]) -> Iterator[tuple[Span, Attributes, Any]]:
    for resource_spans in message.resource_spans:
        resource, _ = _pb_attributes(resource_spans.resource.attributes, wanted)
        for scope_spans in resource_spans.scope_spans:
            for raw in scope_spans.spans:
                found, images = _pb_attributes(raw.attributes, wanted)
                first = None
                for event in raw.events:
                    if is_first_token(event.name):
                        first = event.time_unix_nano
                        break
                yield (
                    Span(
                        raw.name,
                        raw.kind,
                        raw.trace_id.hex(),
                        raw.span_id.hex(),
                        raw.start_time_unix_nano,
                        raw.end_time_unix_nano,
                        raw.status.code == ERROR,
                        found,
                        first,
                        images,
                    ),
                    resource,
                    raw,
                )


def _pb_attributes(attributes: Any, wanted: frozenset[str]) -> tuple[Attributes, int]:
    found: Attributes = {}
    images = 0
    for attribute in attributes:
        key = attribute.key
        if key in wanted:
            value = _pb_value(attribute.value)
            if value is not None:
                found[key] = value
        elif key.endswith(PART_TYPE) and attribute.value.string_value == "image":
            images += 1
    return found, images


def _pb_value(value: Any) -> Any:
    which = value.WhichOneof("value")
    if which is None or which == "kvlist_value" or which == "bytes_value":
        return None
    if which == "array_value":
        return [_pb_value(v) for v in value.array_value.values[:1]]
    return getattr(value, which)


# --- JSON: ids are hexadecimal, 64-bit numbers may be texts, unknown fields are ignored ----------------------


def _items(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _json_scopes(found: Any) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """(resource, spans) of every scope. Raises InvalidRecord."""
    if not isinstance(found, dict) or not isinstance(found.get("resourceSpans", []), list):
        raise InvalidRecord("invalid", "resourceSpans", type(found).__name__, 'send {"resourceSpans": [...]}')
    for resource_spans in _items(found.get("resourceSpans")):
        for scope_spans in _items(resource_spans.get("scopeSpans")):
            yield resource_spans.get("resource"), _items(scope_spans.get("spans"))


def _of_json(found: Any, wanted: frozenset[str]) -> Iterator[tuple[Span, Attributes, Any]]:
    for described, spans in _json_scopes(found):
        resource, _ = _json_attributes(described, wanted)
        for raw in spans:
            attributes, images = _json_attributes(raw, wanted)
            events = (e for e in _items(raw.get("events")) if is_first_token(_text(e.get("name"))))
            first = next(events, None)
            status = raw.get("status")
            code = status.get("code") if isinstance(status, dict) else None
            yield (
                Span(
                    _text(raw.get("name")),
                    _whole(raw.get("kind")),
                    _text(raw.get("traceId"))[:32],
                    _text(raw.get("spanId"))[:16],
                    _whole(raw.get("startTimeUnixNano")),
                    _whole(raw.get("endTimeUnixNano")),
                    code in (ERROR, "STATUS_CODE_ERROR"),
                    attributes,
                    _whole(first.get("timeUnixNano")) if first else None,
                    images,
                ),
                resource,
                raw,
            )


def _json_attributes(holder: Any, wanted: frozenset[str]) -> tuple[Attributes, int]:
    found: Attributes = {}
    images = 0
    for attribute in _items(holder.get("attributes")) if isinstance(holder, dict) else []:
        key, value = attribute.get("key"), attribute.get("value")
        if not isinstance(key, str) or not isinstance(value, dict):
            continue
        if key in wanted:
            read = _json_value(value)
            if read is not None:
                found[key] = read
        elif key.endswith(PART_TYPE) and value.get("stringValue") == "image":
            images += 1
    return found, images


def _json_value(value: Mapping[str, Any]) -> Any:
    for name, read in _READ.items():
        if name in value:
            return read(value[name])
    array = value.get("arrayValue")
    items = _items(array.get("values")) if isinstance(array, dict) else []
    return [_json_value(item) for item in items[:1] if "arrayValue" not in item] if array is not None else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _whole(value: Any) -> int:
    """A 64-bit number as OTLP's JSON has it; 0 where it is none."""
    if isinstance(value, str) and len(value) < 21 and value.isascii() and value.lstrip("-").isdigit():
        value = int(value) if value.rfind("-") <= 0 else 0
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64 else 0


def _double(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 and value == value else None


_READ: dict[str, Callable[[Any], Any]] = {
    "stringValue": lambda v: v if isinstance(v, str) else None,
    "intValue": lambda v: _whole(v) if v is not None else None,
    "doubleValue": _double,
    "boolValue": lambda v: v if isinstance(v, bool) else None,
}
