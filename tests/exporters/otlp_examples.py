"""Spans as instrumented engines, gateways and clients send them, with planted secrets where content stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue

SECRET = "sk-planted-secret"
START_S = 1_764_000_000
SERVER, CLIENT = 2, 3
Attributes = dict[str, Any]


def value(given: Any) -> AnyValue:
    """A Python value as OTLP has it."""
    if isinstance(given, bool):
        return AnyValue(bool_value=given)
    if isinstance(given, int):
        return AnyValue(int_value=given)
    if isinstance(given, float):
        return AnyValue(double_value=given)
    if isinstance(given, list):
        return AnyValue(array_value=ArrayValue(values=[value(v) for v in given]))
    return AnyValue(string_value=given)


def vllm(i: int) -> tuple[str, int, Attributes]:
    """A `llm_request` span of vLLM."""
    return (
        "llm_request",
        SERVER,
        {
            "gen_ai.request.id": f"chatcmpl-vllm-{i}",
            "gen_ai.request.temperature": 0.7,
            "gen_ai.request.top_p": 1.0,
            "gen_ai.request.max_tokens": 256,
            "gen_ai.request.n": 1,
            "gen_ai.usage.prompt_tokens": 100 + i % 50,
            "gen_ai.usage.completion_tokens": 21,
            "gen_ai.latency.time_in_queue": 0.01,
            "gen_ai.latency.time_to_first_token": 0.25,
            "gen_ai.latency.e2e": 1.25,
            "gen_ai.latency.time_in_model_prefill": 0.2,
            "gen_ai.latency.time_in_model_decode": 1.0,
            "gen_ai.latency.time_in_model_inference": 1.2,
        },
    )


def genai(i: int) -> tuple[str, int, Attributes]:
    """A client span of the OpenTelemetry GenAI conventions, content captured."""
    return (
        "chat llama",
        CLIENT,
        {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "openai",
            "gen_ai.request.model": "llama",
            "gen_ai.response.model": "llama-3.1-8b",
            "gen_ai.response.id": f"chatcmpl-genai-{i}",
            "gen_ai.response.finish_reasons": ["stop"],
            "gen_ai.conversation.id": f"conversation-{SECRET}",
            "gen_ai.request.max_tokens": 512,
            "gen_ai.request.stream": True,
            "gen_ai.request.temperature": 0.2,
            "gen_ai.usage.input_tokens": 800 + i % 50,
            "gen_ai.usage.output_tokens": 41,
            "gen_ai.usage.cache_read.input_tokens": 512,
            "gen_ai.response.time_to_first_chunk": 0.25,
            "gen_ai.input.messages": json.dumps([{"role": "user", "content": f"{SECRET} {'words ' * 40}"}]),
            "gen_ai.output.messages": f"{SECRET} {'words ' * 40}",
            "gen_ai.system_instructions": SECRET,
            "server.address": "gateway.internal",
            "server.port": 443,
            "tenant.id": f"tenant-{i % 20}",
        },
    )


def openinference(i: int) -> tuple[str, int, Attributes]:
    """An LLM span of OpenInference with two images in its input."""
    return (
        "ChatCompletion",
        1,
        {
            "openinference.span.kind": "LLM",
            "llm.model_name": "llama",
            "llm.provider": "openai",
            "llm.token_count.prompt": 300 + i % 50,
            "llm.token_count.completion": 11,
            "llm.token_count.total": 311 + i % 50,
            "llm.token_count.prompt_details.cache_read": 128,
            "llm.invocation_parameters": f'{{"prompt": "{SECRET}"}}',
            "llm.input_messages.0.message.role": "user",
            "llm.input_messages.0.message.contents.0.message_content.type": "text",
            "llm.input_messages.0.message.contents.0.message_content.text": SECRET,
            "llm.input_messages.0.message.contents.1.message_content.type": "image",
            "llm.input_messages.0.message.contents.1.message_content.image.image.url": f"data:{SECRET}",
            "llm.input_messages.0.message.contents.2.message_content.type": "image",
            "llm.output_messages.0.message.content": SECRET,
            "input.value": f"{SECRET} {'words ' * 40}",
            "output.value": f"{SECRET} {'words ' * 40}",
            "metadata": json.dumps({"tenant_id": f"tenant-{i % 20}", "note": SECRET}),
            "session.id": f"session-{i}",
        },
    )


def openllmetry(i: int) -> tuple[str, int, Attributes]:
    """A span of OpenLLMetry (Traceloop)."""
    return (
        "openai.chat",
        CLIENT,
        {
            "llm.request.type": "chat",
            "gen_ai.system": "openai",
            "gen_ai.request.model": "llama",
            "gen_ai.response.model": "llama-3.1-8b",
            "gen_ai.response.id": f"chatcmpl-loop-{i}",
            "gen_ai.usage.prompt_tokens": 200 + i % 50,
            "gen_ai.usage.completion_tokens": 31,
            "gen_ai.usage.cache_read_input_tokens": 64,
            "llm.usage.total_tokens": 231 + i % 50,
            "llm.is_streaming": False,
            "gen_ai.request.max_tokens": 4096,
            "gen_ai.prompt.0.role": "user",
            "gen_ai.prompt.0.content": f"{SECRET} {'words ' * 40}",
            "gen_ai.completion.0.content": f"{SECRET} {'words ' * 40}",
            "gen_ai.completion.0.finish_reason": "stop",
            "traceloop.association.properties.tenant_id": f"tenant-{i % 20}",
            "traceloop.workflow.name": "answers",
        },
    )


EXAMPLES: dict[str, Callable[[int], tuple[str, int, Attributes]]] = {
    "vllm": vllm,
    "genai": genai,
    "openinference": openinference,
    "openllmetry": openllmetry,
}


def add_span(
    message: ExportTraceServiceRequest, name: str, kind: int, attributes: Attributes, number: int, took_s: float = 1.25
) -> Any:
    """Adds a span of the message's last scope."""
    span = (
        message.resource_spans[-1]
        .scope_spans[-1]
        .spans.add(
            name=name,
            kind=kind,
            trace_id=number.to_bytes(16, "big"),
            span_id=number.to_bytes(8, "big"),
            start_time_unix_nano=(START_S + number) * 10**9,
            end_time_unix_nano=(START_S + number) * 10**9 + round(took_s * 1e9),
        )
    )
    for key, given in attributes.items():
        span.attributes.add(key=key, value=value(given))
    return span


def empty(**resource: Any) -> ExportTraceServiceRequest:
    """An export request with one resource and scope, and no span. In names of attributes __ stands for a dot."""
    message = ExportTraceServiceRequest()
    described = message.resource_spans.add()
    for key, given in resource.items():
        described.resource.attributes.add(key=key.replace("__", "."), value=value(given))
    described.scope_spans.add().scope.name = "tests"
    return message


def request(convention: str, count: int, first: int = 1, **resource: Any) -> ExportTraceServiceRequest:
    """An export request with spans of one convention."""
    message = empty(**({"service__name": "chat"} | resource))
    for i in range(first, first + count):
        add_span(message, *EXAMPLES[convention](i), number=i + 1)
    return message


def as_json(message: ExportTraceServiceRequest) -> bytes:
    """As OTLP's JSON has it: ids in hexadecimal, enumerations as numbers."""
    found = MessageToDict(message, use_integers_for_enums=True)
    for pair in zip(found.get("resourceSpans", []), message.resource_spans, strict=True):
        for scope, raw_scope in zip(pair[0].get("scopeSpans", []), pair[1].scope_spans, strict=True):
            for span, raw in zip(scope.get("spans", []), raw_scope.spans, strict=True):
                span["traceId"], span["spanId"] = raw.trace_id.hex(), raw.span_id.hex()
    return json.dumps(found).encode()
