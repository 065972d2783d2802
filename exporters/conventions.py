"""What span attributes mean: for each convention a table from our fields to its attributes, the first one there wins.

Only attributes that a table or a setting names are read at all, so what a user wrote or was answered never enters.
Sources: vLLM (`vllm/tracing`), OpenTelemetry GenAI semantic conventions, OpenInference, OpenLLMetry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

Reporter = Literal["gateway", "engine"]
Fields = Mapping[str, tuple[str, ...]]
Attributes = Mapping[str, Any]

SERVER = 2
"""SpanKind of OTLP."""


class Convention:
    """One way of saying what a request was."""

    def __init__(self, name: str, reporter: Reporter, fields: Fields) -> None:
        self.name, self.reporter, self.fields = name, reporter, fields
        self.places: dict[str, list[tuple[str, int]]] = {}
        """Attribute -> the fields that it is, each with its rank: 0 wins."""
        for field, names in fields.items():
            for rank, attribute in enumerate(names):
                self.places.setdefault(attribute, []).append((field, rank))


COMMON: Fields = {
    "id": ("fleetloop.request_id",),
    "pool": ("fleetloop.pool",),
    "reporter": ("fleetloop.reporter",),
    "priority": ("fleetloop.priority",),
    "attempt": ("fleetloop.attempt",),
    "resends": ("http.request.resend_count",),
    "status": ("fleetloop.status",),
    "error_type": ("error.type", "exception.type"),
    "http_status": ("http.response.status_code", "http.status_code"),
    "image_units": ("fleetloop.image_units", "gen_ai.usage.input_images", "gen_ai.request.image.count"),
    "audio_s": ("fleetloop.audio_s", "gen_ai.usage.input_audio_seconds"),
    "video_s": ("fleetloop.video_s", "gen_ai.usage.input_video_seconds"),
}


def _with_common(fields: Fields) -> Fields:
    names = [*COMMON, *(name for name in fields if name not in COMMON)]
    return {name: (*COMMON.get(name, ()), *fields.get(name, ())) for name in names}


_GENAI: dict[str, tuple[str, ...]] = {
    "id": ("gen_ai.request.id", "gen_ai.response.id"),
    "model": ("gen_ai.request.model",),
    "model_served": ("gen_ai.response.model",),
    "input_tokens": ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"),
    "output_tokens": ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"),
    "cached_tokens": (
        "gen_ai.usage.cache_read.input_tokens",
        "gen_ai.usage.cache_read_input_tokens",
        "gen_ai.usage.cached_tokens",
    ),
    "ttft_s": ("gen_ai.response.time_to_first_chunk", "gen_ai.server.time_to_first_token"),
    "tpot_s": ("gen_ai.server.time_per_output_token",),
    "max_tokens": ("gen_ai.request.max_tokens",),
    "stream": ("gen_ai.request.stream", "gen_ai.is_streaming", "llm.is_streaming"),
    "finish": ("gen_ai.response.finish_reasons", "gen_ai.response.finish_reason"),
}
VLLM = Convention(
    "vllm",
    "engine",
    _with_common(
        {
            **_GENAI,
            "ttft_s": ("gen_ai.latency.time_to_first_token",),
            "queue_s": ("gen_ai.latency.time_in_queue",),
            "decode_s": ("gen_ai.latency.time_in_model_decode",),
            "e2e_s": ("gen_ai.latency.e2e",),
        }
    ),
)
GENAI = Convention("genai", "gateway", _with_common(_GENAI))
OPENLLMETRY = Convention(
    "openllmetry",
    "gateway",
    _with_common(
        {
            **_GENAI,
            "model": ("gen_ai.request.model", "llm.request.model"),
            "model_served": ("gen_ai.response.model", "llm.response.model"),
            "finish": ("gen_ai.response.finish_reasons", "llm.response.finish_reason", "llm.response.stop_reason"),
        }
    ),
)
OPENINFERENCE = Convention(
    "openinference",
    "gateway",
    _with_common(
        {
            "id": ("llm.response.id", "gen_ai.response.id"),
            "model": ("llm.model_name", "embedding.model_name"),
            "input_tokens": ("llm.token_count.prompt",),
            "output_tokens": ("llm.token_count.completion",),
            "cached_tokens": ("llm.token_count.prompt_details.cache_read",),
            "finish": ("llm.finish_reason",),
        }
    ),
)
CONVENTIONS = (VLLM, GENAI, OPENLLMETRY, OPENINFERENCE)

VLLM_SPAN = "llm_request"
VLLM_MARKS = ("gen_ai.latency.e2e", "gen_ai.latency.time_in_queue", "gen_ai.latency.time_in_model_inference")
OPERATION = "gen_ai.operation.name"
OPERATIONS = ("chat", "text_completion", "completion", "generate_content", "embeddings")
"""Others (agents, tools, workflows) are made of these: counting them too would count twice."""
OPENINFERENCE_KIND, OPENINFERENCE_KINDS = "openinference.span.kind", ("LLM", "EMBEDDING")
TRACELOOP_KIND, OPENLLMETRY_TYPE = "traceloop.span.kind", "llm.request.type"
OPENLLMETRY_TYPES = ("chat", "completion", "embedding", "rerank")
METADATA = "metadata"
FIRST_TOKEN_EVENTS = frozenset({"First Token Stream Event", "gen_ai.response.first_token"})
PART_TYPE = ".message_content.type"
"""End of the OpenInference attribute that says what a part of a message is: text, image, audio. No content."""

TENANT_ATTRIBUTES = (
    "fleetloop.tenant",
    "tenant.id",
    "tenant",
    "http.request.header.x-fleetloop-tenant",
    "traceloop.association.properties.tenant_id",
    "traceloop.association.properties.tenant",
    "traceloop.association.properties.organization_id",
    "metadata.tenant_id",
    "metadata.tenant",
    "metadata.user_api_key_team_alias",
    "metadata.user_api_key_team_id",
    "gen_ai.user",
    "llm.user",
    "user.id",
    "enduser.id",
)
CLASS_ATTRIBUTES = (
    "fleetloop.class",
    "http.request.header.x-fleetloop-class",
    "traceloop.association.properties.class",
    "metadata.class",
    "gen_ai.openai.request.service_tier",
    "openai.request.service_tier",
)
CLASS_MAP = ("flex=batch", "batch=batch", "priority=interactive", "default=", "auto=", "standard=")
REPLICA_ATTRIBUTES = ("fleetloop.replica", "service.instance.id", "k8s.pod.name")
CLASS_INFERRED = "batch"

_CONTENT = re.compile(
    r"gen_ai\.(prompt|completion|(input|output)\.messages|system_instructions|tool\.(call|definitions))"
    r"|(input|output)\.value|llm\.(input_messages|output_messages|prompts|prompt_template|completions|functions)"
    r"|traceloop\.entity\.(input|output)|(retrieval|reranker)\.|exception\.(message|stacktrace)"
    r"|metadata\.(messages|prompt|response)|event\.body"
)


def is_content(name: str) -> bool:
    """Whether an attribute holds what a user wrote or was answered, by the conventions that we know."""
    return _CONTENT.match(name) is not None


def convention_of(name: str, kind: int, found: Attributes) -> Convention | None:
    """The convention of a span that is one request to a model; None: the span is something else.

    Parameters: the span's name, its kind as OTLP numbers it, the attributes that were read of it.
    """
    if (name == VLLM_SPAN and kind == SERVER) or any(mark in found for mark in VLLM_MARKS):
        return VLLM
    if OPENINFERENCE_KIND in found:
        return OPENINFERENCE if found[OPENINFERENCE_KIND] in OPENINFERENCE_KINDS else None
    if TRACELOOP_KIND in found and OPENLLMETRY_TYPE not in found:
        return None
    if OPENLLMETRY_TYPE in found:
        return OPENLLMETRY if found[OPENLLMETRY_TYPE] in OPENLLMETRY_TYPES else None
    if OPERATION in found:
        return GENAI if found[OPERATION] in OPERATIONS else None
    usage = GENAI.fields["input_tokens"] + GENAI.fields["output_tokens"]
    return GENAI if any(name in found for name in usage) else None


def wanted(*configured: tuple[str, ...]) -> frozenset[str]:
    """Every attribute that is read, with those that settings name."""
    tables = [name for one in CONVENTIONS for names in one.fields.values() for name in names]
    marks = [*VLLM_MARKS, OPERATION, OPENINFERENCE_KIND, TRACELOOP_KIND, OPENLLMETRY_TYPE, "service.name"]
    named = [name for names in configured for name in names]
    metadata = [METADATA] if any(name.startswith(METADATA + ".") for name in named) else []
    return frozenset([*tables, *marks, *named, *metadata])
