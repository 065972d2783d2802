"""LiteLLM's standard logging payload, as its generic API logger posts it, to request rows.

Of `messages` only the kinds of their parts are counted; `response`, error texts and keys are never looked at.
Source: `StandardLoggingPayload` in litellm/types/utils.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from exporters.conventions_rows import (
    ID_MAX,
    Call,
    Cells,
    Mapper,
    NotARequest,
    batch_of,
    error_kind,
    number,
    status_of,
    text,
)
from exporters.intake_letters import RefusedSpan
from schemas.columns import Batch
from schemas.errors import InvalidRecord

TENANT_FIELDS = (
    "tenant_id",
    "tenant",
    "user_api_key_team_alias",
    "user_api_key_team_id",
    "user_api_key_org_id",
    "user_api_key_alias",
    "user_api_key_user_id",
)
"""Of `metadata`, the first one there is; then `end_user`."""
CALL_TYPES = (
    "completion",
    "acompletion",
    "text_completion",
    "atext_completion",
    "embedding",
    "aembedding",
    "responses",
    "aresponses",
    "anthropic_messages",
    "generate_content",
    "agenerate_content",
    "agenerate_content_stream",
    "generate_content_stream",
    "rerank",
    "arerank",
    "transcription",
    "atranscription",
    "pass_through_endpoint",
    "allm_passthrough_route",
)
HEALTH_CHECK = "litellm-internal-health-check"
PARTS_MAX = 10_000
IMAGE_PARTS = frozenset({"image_url", "image", "input_image"})


class Payloads(NamedTuple):
    """What was made of a batch of payloads."""

    batch: Batch
    skipped: int
    """Calls that no model served: health checks, answers from the gateway's own cache, other kinds of call."""
    refused: list[RefusedSpan]


class LiteLlmReader:
    """Decodes batches of payloads. Fit for another thread."""

    def __init__(self, mapper: Mapper, payloads_max: int) -> None:
        self.mapper, self.payloads_max = mapper, payloads_max

    def read(self, body: bytes, headers: Mapping[str, str]) -> Payloads:
        """One payload, an array of them, or one a line. Raises InvalidRecord."""
        calls: list[tuple[Cells, Cells]] = []
        kept: list[Any] = []
        refused: list[RefusedSpan] = []
        skipped = 0
        for payload in self._payloads(body):
            try:
                if not isinstance(payload, dict):
                    raise NotARequest("invalid", "value", "send JSON objects")
                call = self._call(payload, headers)
            except NotARequest as why:
                refused.append(_refused(payload, why.reason, why.field, why.remedy))
                continue
            if call is None:
                skipped += 1
                continue
            calls.append(call.rows(self.mapper.fleet_s))
            kept.append(payload)
        batch, bad = batch_of(calls)
        refused += [_refused(kept[i], *why) for i, why in bad.items()]
        return Payloads(batch, skipped, refused)

    def _payloads(self, body: bytes) -> list[Any]:
        try:
            found = json.loads(body)
        except RecursionError:
            found = None
        except ValueError:
            try:
                found = [json.loads(line) for line in body.splitlines() if line.strip()]
            except (ValueError, RecursionError):
                found = None
        if found is None:
            raise InvalidRecord(
                "undecodable", "body", f"{len(body)} bytes", "send JSON: a payload, an array of them, or one a line"
            )
        payloads = found if isinstance(found, list) else [found]
        if len(payloads) > self.payloads_max:
            raise InvalidRecord("too_large", "payloads", len(payloads), f"send at most {self.payloads_max} at once")
        return payloads

    def _call(self, payload: Mapping[str, Any], headers: Mapping[str, str]) -> Call | None:
        kind = payload.get("call_type")
        if (isinstance(kind, str) and kind not in CALL_TYPES) or payload.get("cache_hit") is True:
            return None
        if _object(payload.get("metadata")).get("user_api_key_alias") == HEALTH_CHECK:
            return None
        start, end = _time(payload.get("startTime")), _time(payload.get("endTime"))
        if start is None or end is None or not 0 < start <= end:
            raise NotARequest("invalid", "startTime", "send startTime and endTime, Unix s, the end not before")
        metadata, parameters = _object(payload.get("metadata")), _object(payload.get("model_parameters"))
        # what a caller said wins over what the key says; LiteLLM keeps it one level down
        said = {
            **metadata,
            **_object(metadata.get("requester_metadata")),
            **_object(metadata.get("spend_logs_metadata")),
        }
        error = _object(payload.get("error_information"))
        failed = payload.get("status") == "failure"
        stream = payload.get("stream")
        first = _time(payload.get("completionStartTime"))
        streamed = stream is True and first is not None and start <= first <= end
        model, group = text(payload.get("model")), text(payload.get("model_group"))
        limit = number(parameters.get("max_completion_tokens") or parameters.get("max_tokens"))
        attributes = {f"metadata.{name}": value for name, value in said.items() if isinstance(value, str | int)}
        tenant = self.mapper.said_tenant(attributes, {}, headers) or next(
            (found for name in TENANT_FIELDS if (found := text(said.get(name)))), None
        )
        kind_of_error = error_kind(error.get("error_class")) if failed else None
        return Call(
            id=_id(payload),
            start_s=start,
            end_s=end,
            status=status_of(failed, kind_of_error, error.get("error_code") if failed else None, None),
            pool=self.mapper.pool(group, model),
            reporter="gateway",
            tenant=tenant or text(payload.get("end_user")) or self.mapper.options.default_tenant,
            request_class=self.mapper.class_of(
                self.mapper.said_class(attributes, {}, headers) or text(parameters.get("service_tier")),
                stream if isinstance(stream, bool) else None,
                limit,
            ),
            model=group or model,
            error_type=kind_of_error,
            input_tokens=number(payload.get("prompt_tokens")),
            output_tokens=number(payload.get("completion_tokens")),
            cached_tokens=_cached(metadata),
            image_units=_images(payload.get("messages")),
            ttft_s=first - start if streamed and first is not None else None,
        )


def _id(payload: Mapping[str, Any]) -> str:
    for name in ("id", "litellm_call_id", "call_id"):
        found = text(payload.get(name))
        if found is not None and len(found) <= ID_MAX:
            return found
    raise NotARequest("invalid", "id", f"send an id of 1 to {ID_MAX} characters")


def _time(value: Any) -> float | None:
    """Unix s, from a number or ISO 8601."""
    if isinstance(value, str):
        try:
            at = datetime.fromisoformat(value)
            return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            return None
    return number(value)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _cached(metadata: Mapping[str, Any]) -> float | None:
    usage = _object(metadata.get("usage_object"))
    details = _object(usage.get("prompt_tokens_details"))
    return next(
        (
            found
            for value in (details.get("cached_tokens"), usage.get("cache_read_input_tokens"))
            if (found := number(value)) is not None
        ),
        None,
    )


def _images(messages: Any) -> float | None:
    """How many parts of the messages are images; None where there are none to be seen."""
    kinds = [
        _object(part).get("type")
        for message in (messages if isinstance(messages, list) else [])[:PARTS_MAX]
        if isinstance(content := _object(message).get("content"), list)
        for part in content[:PARTS_MAX]
    ]
    return float(sum(isinstance(kind, str) and kind in IMAGE_PARTS for kind in kinds)) if kinds else None


def _refused(payload: Any, reason: str, field: str, remedy: str) -> RefusedSpan:
    value = json.dumps(payload, sort_keys=True).encode()
    names = tuple(payload) if isinstance(payload, dict) else ()
    return RefusedSpan(reason, field, remedy, hashlib.sha256(value).hexdigest(), len(value), names)
