"""From what one request's span, log line or payload says to its two rows: `arrival` at its start, `end` at its end."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from exporters.conventions import (
    CLASS_INFERRED,
    FIRST_TOKEN_EVENTS,
    METADATA,
    Attributes,
    Convention,
    convention_of,
    wanted,
)
from exporters.intake_options import IntakeOptions, pairs
from schemas.columns import Batch
from schemas.requests import REQUEST_ROWS

_NAMES = list(REQUEST_ROWS.columns)
_TEXTS = frozenset(n for n, c in REQUEST_ROWS.columns.items() if c.type == "text")
ID_MAX = 200
_PLAIN = re.compile(r"[\w.:\-]{1,100}")
"""What a kind of error looks like. Anything else may be a message, which may quote a prompt."""
_COMPLETION_INDEX = re.compile(r"(cmpl-.{8,})-0")
OTHER = "_OTHER"
Cells = tuple[Any, ...]

_BY_WORD = (
    ("timeout", re.compile(r"time.?out|timed.?out|deadline", re.I)),
    ("cancelled", re.compile(r"cancel|abort|disconnect", re.I)),
    ("rejected", re.compile(r"rate.?limit|too.?many|overload|quota|reject|budget.?exceeded|unavailable", re.I)),
)
_BY_CODE = {408: "timeout", 504: "timeout", 499: "cancelled", 429: "rejected", 503: "rejected", 529: "rejected"}


class NotARequest(Exception):
    """It says that it is a request, and what it says cannot be. Holds no value of it."""

    def __init__(self, reason: str, field: str, remedy: str) -> None:
        self.reason, self.field, self.remedy = reason, field, remedy
        super().__init__(f"{field}: {remedy}")


@dataclass(slots=True)
class Span:
    """What was read of a span. Times are Unix ns."""

    name: str
    kind: int
    trace_id: str
    span_id: str
    start_ns: int
    end_ns: int
    error: bool
    """The span's status is ERROR."""
    found: dict[str, Any]
    """Attributes that are wanted."""
    first_token_ns: int | None = None
    images: int = 0
    """Parts of messages that are images."""


@dataclass(slots=True)
class Call:
    """One request, however it was reported. Times are Unix s, wall."""

    id: str
    start_s: float
    end_s: float
    status: str
    pool: str
    reporter: str
    tenant: str | None = None
    request_class: str | None = None
    model: str | None = None
    priority: int | None = None
    attempt: int | None = None
    replica: str | None = None
    error_type: str | None = None
    input_tokens: float | None = None
    output_tokens: float | None = None
    cached_tokens: float | None = None
    image_units: float | None = None
    audio_s: float | None = None
    video_s: float | None = None
    queue_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def rows(self, fleet_s: Callable[[float], float]) -> tuple[Cells, Cells]:
        """Its arrival and its end, cells in the order of REQUEST_ROWS. `fleet_s`: fleet time of a wall time."""
        cached, e2e, tpot = self.cached_tokens, self.e2e_s, self.tpot_s
        if cached is not None and self.input_tokens is not None and cached > self.input_tokens:
            cached = None  # counted apart from the input there: which share it is cannot be said
        if e2e is None:
            e2e = round(self.end_s - self.start_s, 6)
        out, ttft = self.output_tokens, self.ttft_s
        if tpot is None and ttft is not None and out is not None and out > 1 and e2e >= ttft:
            tpot = (e2e - ttft) / (out - 1)
        who = (self.pool, self.tenant, self.request_class, self.model, self.priority, self.attempt, self.reporter)
        units = (self.image_units, self.audio_s, self.video_s)
        tokens = self.input_tokens
        arrival = ("arrival", self.id, fleet_s(self.start_s), *who, self.replica, None, tokens, None, None, None)
        kind, times = self.error_type, (self.queue_s, ttft, tpot, e2e)
        end = ("end", self.id, fleet_s(self.end_s), *who, self.replica, self.status, tokens, kind, out, cached)
        return (*arrival, *units, None, None, None, None), (*end, *units, *times)


_ORDER = [
    "event",
    "request_id",
    "at_s",
    "pool",
    "tenant",
    "class",
    "model",
    "priority",
    "attempt",
    "reporter",
    "replica",
    "status",
    "input_tokens",
    "error_type",
    "output_tokens",
    "cached_tokens",
    "image_units",
    "audio_s",
    "video_s",
    "queue_s",
    "ttft_s",
    "tpot_s",
    "e2e_s",
]
_PLACES = [_ORDER.index(name) if name in _ORDER else None for name in _NAMES]
assert all(name in _NAMES for name in _ORDER)


def batch_of(calls: list[tuple[Cells, Cells]]) -> tuple[Batch, dict[int, tuple[str, str, str]]]:
    """Rows of calls, checked: those of good calls, and by number of each bad call (reason, field, remedy).

    A call of which one row is bad gives neither row.
    """
    cells = list(zip(*(row for pair in calls for row in pair), strict=True)) or [()] * len(_ORDER)
    none = [None] * (2 * len(calls))
    data = {n: none if place is None else list(cells[place]) for n, place in zip(_NAMES, _PLACES, strict=True)}
    try:
        value = REQUEST_ROWS.encode(data)
    except UnicodeEncodeError:  # a lone surrogate: valid JSON, no valid text
        for name in _TEXTS:
            data[name] = [c if c is None else c.encode("utf-8", "replace").decode() for c in data[name]]
        value = REQUEST_ROWS.encode(data)
    batch = REQUEST_ROWS.decode(value)
    bad = {row // 2: (r.reason, r.field, r.remedy) for r in batch.refused for row in r.rows}
    if bad:
        batch = batch.keep(np.array([row // 2 not in bad for row in batch.index.tolist()], bool))
    return batch, bad


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def duration(value: Any) -> float | None:
    """A number from 0, or None: engines take differences of times of which one may never have come."""
    found = number(value)
    return found if found is not None and found >= 0 else None


def text(value: Any) -> str | None:
    """A text or whole number as text; of a list its first item. None where there is none."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) < 10**30 else None
    return value if isinstance(value, str) and value else None


def whole(value: Any, low: int, high: int) -> int | None:
    """A whole number within bounds, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high else None


def error_kind(value: Any) -> str | None:
    """A kind of error as it may be kept: a short word, or `_OTHER`."""
    found = text(value)
    return None if found is None else found if _PLAIN.fullmatch(found) else OTHER


def status_of(failed: bool, kind: str | None, code: Any, finish: str | None) -> str:
    """ok, error, timeout, rejected or cancelled, by finish reason, HTTP status and kind of error."""
    if finish is not None and _BY_WORD[1][1].search(finish):
        return "cancelled"
    number_ = int(code) if isinstance(code, str) and code.isascii() and code.isdigit() and len(code) < 5 else code
    if number_ is None and kind is not None and kind.isascii() and kind.isdigit() and len(kind) < 5:
        number_ = int(kind)
    bad_code = isinstance(number_, int) and number_ >= 400
    if not failed and kind is None and not bad_code:
        return "error" if finish == "error" else "ok"
    if isinstance(number_, int) and number_ in _BY_CODE:
        return _BY_CODE[number_]
    return next((status for status, word in _BY_WORD if kind is not None and word.search(kind)), "error")


class Mapper:
    """Reads spans and payloads as the settings say."""

    def __init__(self, options: IntakeOptions, fleet_s: Callable[[float], float]) -> None:
        self.options, self.fleet_s = options, fleet_s
        self.classes = pairs(options.class_map)
        self.pools = pairs(options.pools)
        self.engines = frozenset(options.engine_services)
        self.metadata = any(n.startswith(METADATA + ".") for n in options.tenant_attributes + options.class_attributes)
        self.wanted = wanted(options.tenant_attributes, options.class_attributes, options.replica_attributes)

    def of_span(self, span: Span, resource: Attributes, headers: Mapping[str, str]) -> tuple[Cells, Cells] | None:
        """The rows of a span; None where it is no request to a model. Raises NotARequest.

        `headers`: of the sender's request, names in lower case.
        """
        found = span.found
        convention = convention_of(span.name, span.kind, found)
        if convention is None:
            return None
        if not 0 < span.start_ns <= span.end_ns:
            raise NotARequest("invalid", "start_time_unix_nano", "send spans with start and end, the end not before")
        if self.metadata and METADATA in found:
            for key, inner in _metadata(found[METADATA]).items():
                found.setdefault(f"{METADATA}.{key}", inner)
        values = _values(convention, found)
        get = values.get
        call = Call(
            id=self._id(get("id"), span),
            start_s=span.start_ns // 1000 / 1e6,
            end_s=span.end_ns // 1000 / 1e6,
            status=get("status") or status_of(span.error, get("error_type"), get("http_status"), get("finish")),
            pool="",
            reporter=self._reporter(convention, get("reporter"), resource),
            tenant=self.said_tenant(found, resource, headers) or self.options.default_tenant,
            request_class=self.class_of(self.said_class(found, resource, headers), get("stream"), get("max_tokens")),
        )
        for field, value in values.items():
            if field in _AS_THEY_ARE:
                setattr(call, field, value)
        served = get("model_served")
        call.model = call.model or served
        self._derive(call, values, span)
        if call.reporter == "engine":
            call.replica = self._first(self.options.replica_attributes, found, resource)
        call.pool = get("pool") or self.pool(served, call.model, text(resource.get("service.name")))
        return call.rows(self.fleet_s)

    @staticmethod
    def _derive(call: Call, values: Mapping[str, Any], span: Span) -> None:
        """What follows from what was said."""
        out, resends, decode_s = call.output_tokens, values.get("resends"), values.get("decode_s")
        if call.attempt is None and resends:
            call.attempt = resends + 1
        if call.image_units is None and span.images:
            call.image_units = float(span.images)
        if call.ttft_s is None and span.first_token_ns is not None and span.first_token_ns >= span.start_ns:
            call.ttft_s = (span.first_token_ns - span.start_ns) / 1e9
        if call.ttft_s == 0 and not out:
            call.ttft_s = None  # vLLM's, of a request that never gave a token
        if call.tpot_s is None and decode_s is not None and out is not None and out > 1:
            call.tpot_s = decode_s / (out - 1)

    def said_tenant(self, found: Attributes, resource: Attributes, headers: Mapping[str, str]) -> str | None:
        """Who is billed, by attribute or header."""
        named = self._first(self.options.tenant_attributes, found, resource)
        return named or of_headers(self.options.tenant_headers, headers)

    def said_class(self, found: Attributes, resource: Attributes, headers: Mapping[str, str]) -> str | None:
        """The class or tier, by attribute or header, as it was said."""
        named = self._first(self.options.class_attributes, found, resource)
        return named or of_headers(self.options.class_headers, headers)

    def class_of(self, said: str | None, stream: bool | None, max_tokens: float | None) -> str | None:
        """The class: what was said, mapped; else `batch` for what does not stream and allows many tokens; else None."""
        if said is not None:
            said = self.classes.get(said, said)
        if said:
            return said
        many = max_tokens is not None and max_tokens >= self.options.batch_tokens_min
        return CLASS_INFERRED if self.options.infer_class and stream is False and many else None

    def pool(self, *names: str | None) -> str:
        """The pool of the first name that has one; else the default, else the first name itself. Raises NotARequest."""
        for name in names:
            if name is not None and name in self.pools:
                return self.pools[name]
        if self.options.default_pool is not None:
            return self.options.default_pool
        first = next((name for name in names if name), None)
        if first is None:
            raise NotARequest("invalid", "pool", "send a model or service name, or set FLEETLOOP_INTAKE_DEFAULT_POOL")
        return first.replace("/", "-")

    def _first(self, names: tuple[str, ...], found: Attributes, resource: Attributes) -> str | None:
        for attributes in (found, resource):
            if not attributes.keys().isdisjoint(names):
                value = next((v for name in names if (v := text(attributes.get(name))) is not None), None)
                if value is not None:
                    return value
        return None

    def _reporter(self, convention: Convention, said: str | None, resource: Attributes) -> str:
        if said is not None:
            return said
        return "engine" if text(resource.get("service.name")) in self.engines else convention.reporter

    @staticmethod
    def _id(said: str | None, span: Span) -> str:
        if said is None or len(said) > ID_MAX:
            return f"{span.trace_id}-{span.span_id}"
        # vLLM numbers the prompts of a completion request; its client knows the request's id alone
        numbered = _COMPLETION_INDEX.fullmatch(said)
        return numbered[1] if numbered else said


def _values(convention: Convention, found: Attributes) -> dict[str, Any]:
    """Field -> value as `_READ` reads it; of several attributes for it the first of the table that says something."""
    values: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    places = convention.places
    for name, raw in found.items():
        for field, rank in places.get(name, ()):
            if rank < ranks.get(field, rank + 1) and (value := _READ[field](raw)) is not None:
                values[field], ranks[field] = value, rank
    return values


_READ: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("id", "pool", "model", "model_served", "finish"), text),
    **dict.fromkeys(("input_tokens", "output_tokens", "cached_tokens", "max_tokens"), number),
    **dict.fromkeys(("image_units", "audio_s", "video_s"), number),
    **dict.fromkeys(("queue_s", "ttft_s", "tpot_s", "e2e_s", "decode_s"), duration),
    "error_type": error_kind,
    "http_status": lambda value: value,
    "stream": lambda value: value if isinstance(value, bool) else None,
    "reporter": lambda value: value if value in ("gateway", "engine") else None,
    "status": lambda value: value if value in REQUEST_ROWS.columns["status"].choices else None,
    "priority": lambda value: whole(value, -1_000_000, 1_000_000),
    "attempt": lambda value: whole(value, 1, 1_000),
    "resends": lambda value: whole(value, 0, 999),
}
"""Field of the tables -> how its value is read; None: it says nothing."""
_AS_THEY_ARE = frozenset(_READ) & {field.name for field in fields(Call)} - {"id", "status", "pool", "reporter"}


def of_headers(names: tuple[str, ...], headers: Mapping[str, str]) -> str | None:
    """The first of the headers that says something; their names in lower case."""
    return next((headers[name] for name in names if headers.get(name)), None)


def _metadata(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def is_first_token(event: str) -> bool:
    """Whether an event of a span is the first token's arrival."""
    return event in FIRST_TOKEN_EVENTS
