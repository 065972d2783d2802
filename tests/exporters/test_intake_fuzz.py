"""Whatever is sent to the intake, on every path: it is taken, or the sender is told what is wrong. Never a 500."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st

from schemas.config import Deployment
from schemas.requests import REQUEST_ROWS
from streams.settings import Settings
from streams.topics import partition_counts
from tests.exporters.otlp_examples import request
from tests.exporters.test_intake import serving

PROTOBUF, JSON = "application/x-protobuf", "application/json"
DEPLOYMENT = Deployment(origin_ms=0, partitions=partition_counts(True))

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_keys = st.sampled_from(
    [
        *(
            "gen_ai.operation.name",
            "gen_ai.usage.input_tokens",
            "gen_ai.response.id",
            "gen_ai.request.model",
            "tenant.id",
        ),
        *("gen_ai.latency.e2e", "metadata", "error.type", "http.response.status_code", "fleetloop.attempt", "odd"),
        *("openinference.span.kind", "llm.request.type", "gen_ai.request.stream", "gen_ai.request.max_tokens"),
    ]
)
_any_value = st.one_of(
    st.fixed_dictionaries({"stringValue": st.text(max_size=250) | _values}),
    st.fixed_dictionaries({"intValue": st.integers() | st.text(max_size=22) | _values}),
    st.fixed_dictionaries({"doubleValue": st.floats() | _values}),
    st.fixed_dictionaries({"boolValue": _values}),
    st.fixed_dictionaries({"arrayValue": st.fixed_dictionaries({"values": _values}) | _values}),
    _values,
)
_attributes = st.lists(st.fixed_dictionaries({"key": _keys | _values, "value": _any_value}), max_size=8) | _values
_ns = st.integers(-5, 2**65) | st.integers(0, 2**64).map(str) | _values
_span = st.fixed_dictionaries(
    {"attributes": _attributes},
    optional={
        "name": st.just("llm_request") | _values,
        "kind": st.integers(0, 5) | _values,
        "traceId": st.text(max_size=40) | _values,
        "spanId": _values,
        "startTimeUnixNano": _ns,
        "endTimeUnixNano": _ns,
        "status": st.fixed_dictionaries({"code": _values}) | _values,
        "events": _values,
    },
)
_resource = st.fixed_dictionaries({"attributes": _attributes}) | _values
_scope = st.fixed_dictionaries({"spans": st.lists(_span | _values, max_size=4) | _values})
_scopes = st.fixed_dictionaries({"resource": _resource, "scopeSpans": st.lists(_scope, max_size=2) | _values})
_bodies = st.fixed_dictionaries({"resourceSpans": st.lists(_scopes | _values, max_size=2) | _values})


def answered(path: str, bodies: list[tuple[bytes, dict[str, str]]]) -> set[int]:
    """Statuses with which bodies are answered."""

    async def send() -> set[int]:
        found = set()
        async with serving(Settings(), DEPLOYMENT, coalesce_s=0) as client:
            for body, headers in bodies:
                url = f"http://127.0.0.1:{client.intake.port}{path}"
                async with client.session.post(url, data=body, headers=headers) as answer:
                    await answer.read()
                    found.add(answer.status)
        return found

    return asyncio.run(send())


ENCODINGS = ["identity", "gzip", "deflate", "br", "zstd", "x"]
TAKEN_OR_REFUSED = {200, 207, 400, 413, 415}


@given(_bodies | _values)
@profile(max_examples=150)
def test_no_json_body_is_our_error(body: Any) -> None:
    """Whatever a sender writes, the answer is that it was taken or what is wrong with it."""
    raw = json.dumps(body).encode()
    assert answered("/v1/traces", [(raw, {"Content-Type": JSON})]) <= TAKEN_OR_REFUSED


@given(
    st.binary(max_size=300), st.integers(0, 900), st.sampled_from(["identity", "gzip", "deflate", "br", "zstd", "x"])
)
@profile(max_examples=100)
def test_no_binary_body_is_our_error(noise: bytes, at: int, encoding: str) -> None:
    """Noise, good messages with noise inside, and whatever is said of its compression; on every path."""
    good = request("genai", 2).SerializeToString()
    bodies = [
        (noise, {"Content-Type": PROTOBUF}),
        (good[:at] + noise + good[at + len(noise) :], {"Content-Type": PROTOBUF}),
        (noise, {"Content-Type": PROTOBUF, "Content-Encoding": encoding}),
        (noise, {"Content-Type": "application/vnd.apache.arrow.stream"}),
        (noise, {"Content-Type": "application/x-ndjson"}),
        (noise, {"Content-Type": JSON}),
    ]
    for path in ("/v1/traces", "/v1/requests", "/v1/litellm"):
        assert answered(path, bodies) <= TAKEN_OR_REFUSED


@given(
    st.builds(
        dict, st.dictionaries(st.sampled_from(list(REQUEST_ROWS.columns)), _values | st.text(max_size=250), max_size=10)
    )
)
@profile(max_examples=100)
def test_no_row_is_our_error(row: dict[str, Any]) -> None:
    """Of our own kind."""
    whole = {"event": "end", "request_id": "a", "at_s": 1.0, "pool": "p", **row}
    bodies = [(json.dumps(body).encode(), {"Content-Type": JSON}) for body in (row, whole, [whole, row])]
    assert answered("/v1/requests", bodies) <= TAKEN_OR_REFUSED


_times = st.floats(0, 2e9) | st.just("2026-01-01T00:00:00") | _values
FIELDS = (
    *("call_type", "status", "stream", "model", "model_group", "metadata", "model_parameters", "messages"),
    *("error_information", "end_user", "completionStartTime", "prompt_tokens", "cache_hit"),
)
_payload = st.fixed_dictionaries(
    {"id": st.text(max_size=210) | _values, "startTime": _times, "endTime": _times},
    optional=dict.fromkeys(FIELDS, _values),
)


@given(st.lists(_payload | _values, max_size=4) | _payload)
@profile(max_examples=100)
def test_no_payload_is_our_error(body: Any) -> None:
    """LiteLLM's, or what claims to be."""
    assert answered("/v1/litellm", [(json.dumps(body).encode(), {"Content-Type": JSON})]) <= TAKEN_OR_REFUSED
