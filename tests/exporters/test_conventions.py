"""From a span to its two rows: names of each convention, who is billed, class, pool and status, in our units."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.conventions import is_content
from exporters.conventions_rows import Mapper, batch_of, status_of
from exporters.intake_options import IntakeOptions
from exporters.otlp import OtlpReader, Spans
from schemas.errors import SettingsError
from schemas.requests import REQUEST_ROWS
from tests.exporters.cells import as_rows
from tests.exporters.otlp_examples import CLIENT, EXAMPLES, SERVER, START_S, add_span, empty, request

Named = dict[str, Any]


def read(message: Any, headers: dict[str, str] | None = None, **options: Any) -> Spans:
    """What the reader makes of an export request, with options."""
    mapper = Mapper(IntakeOptions.of(**options), lambda wall_s: wall_s)
    return OtlpReader(mapper, 1000).protobuf(message.SerializeToString(), headers or {})


def named(spans: Spans) -> list[Named]:
    """Its rows by column, nulls left out."""
    rows = (dict(zip(REQUEST_ROWS.columns, row, strict=True)) for row in as_rows(spans.batch))
    return [{k: v for k, v in row.items() if v is not None} for row in rows]


def pair(attributes: Named, kind: int = CLIENT, headers: dict[str, str] | None = None, **options: Any) -> list[Named]:
    """The rows of one span with `chat` as operation."""
    resource = options.pop("resource", {})
    message = empty(**resource)
    add_span(message, options.pop("name", "chat"), kind, {"gen_ai.operation.name": "chat", **attributes}, number=1)
    found = read(message, headers, **({"default_pool": "chat"} | options))
    assert found.refused == []
    return named(found)


def end(attributes: Named, **more: Any) -> Named:
    """The `end` row of one span."""
    return pair(attributes, **more)[1]


SHARED = {"pool": "chat", "tenant": "unknown"}
EXPECTED: dict[str, Named] = {
    "vllm": {
        "request_id": "chatcmpl-vllm-1",
        "reporter": "engine",
        "replica": "chat-0",
        "input_tokens": 101,
        "output_tokens": 21,
        "queue_s": 0.01,
        "ttft_s": 0.25,
        "tpot_s": 1.0 / 20,
        "e2e_s": 1.25,
    },
    "genai": {
        "request_id": "chatcmpl-genai-1",
        "reporter": "gateway",
        "tenant": "tenant-1",
        "model": "llama",
        "input_tokens": 801,
        "output_tokens": 41,
        "cached_tokens": 512,
        "ttft_s": 0.25,
        "tpot_s": 1.0 / 40,
        "e2e_s": 1.25,
    },
    "openinference": {
        "request_id": "0" * 31 + "2-" + "0" * 15 + "2",
        "reporter": "gateway",
        "tenant": "tenant-1",
        "model": "llama",
        "input_tokens": 301,
        "output_tokens": 11,
        "cached_tokens": 128,
        "image_units": 2,
        "e2e_s": 1.25,
    },
    "openllmetry": {
        "request_id": "chatcmpl-loop-1",
        "reporter": "gateway",
        "tenant": "tenant-1",
        "class": "batch",
        "model": "llama",
        "input_tokens": 201,
        "output_tokens": 31,
        "cached_tokens": 64,
        "e2e_s": 1.25,
    },
}


@pytest.mark.parametrize("convention", list(EXAMPLES))
def test_each_convention_says_the_same_in_its_own_names(convention: str) -> None:
    """Every field that it has a name for is read; what it does not say is null; times are the span's."""
    found = read(request(convention, 1, service__instance__id="chat-0"), default_pool="chat")
    arrival, ended = named(found)
    expected = SHARED | EXPECTED[convention]
    assert ended == pytest.approx({**expected, "event": "end", "at_s": START_S + 2 + 1.25, "status": "ok"}, abs=1e-9)
    known_at_arrival = {k: v for k, v in expected.items() if k in ARRIVAL}
    assert arrival == {**known_at_arrival, "event": "arrival", "at_s": START_S + 2.0}


ARRIVAL = ("request_id", "reporter", "pool", "tenant", "class", "model", "replica", "input_tokens", "image_units")


def test_old_and_new_names_of_tokens() -> None:
    """The new name wins where both are there."""
    assert end({"gen_ai.usage.prompt_tokens": 7})["input_tokens"] == 7
    assert end({"gen_ai.usage.prompt_tokens": 7, "gen_ai.usage.input_tokens": 8})["input_tokens"] == 8
    assert "input_tokens" not in end({})
    assert end({"gen_ai.usage.input_tokens": 0})["input_tokens"] == 0


@pytest.mark.parametrize(
    ("name", "kind", "attributes"),
    [
        ("GET /health", SERVER, {"http.response.status_code": 200}),
        ("execute_tool search", 1, {"gen_ai.operation.name": "execute_tool"}),
        ("invoke_agent helper", 1, {"gen_ai.operation.name": "invoke_agent", "gen_ai.usage.input_tokens": 9}),
        ("chain", 1, {"openinference.span.kind": "CHAIN", "llm.token_count.prompt": 9}),
        ("answers.workflow", 1, {"traceloop.span.kind": "workflow", "gen_ai.usage.prompt_tokens": 9}),
    ],
)
def test_what_is_no_request_to_a_model_is_not_counted(name: str, kind: int, attributes: Named) -> None:
    """Agents, tools, chains and plain HTTP are taken and left out: their requests have spans of their own."""
    message = empty(service__name="app")
    add_span(message, name, kind, attributes, number=1)
    found = read(message)
    assert (found.spans, found.skipped, found.refused, found.batch.rows) == (1, 1, [], 0)


@pytest.mark.parametrize(
    ("attributes", "resource", "headers", "tenant"),
    [
        ({}, {}, {}, "unknown"),
        ({"tenant.id": "a", "gen_ai.user": "b"}, {"tenant__id": "c"}, {"x-scope-orgid": "d"}, "a"),
        ({"gen_ai.user": "b"}, {}, {"x-scope-orgid": "d"}, "b"),
        ({}, {"tenant__id": "c"}, {"x-scope-orgid": "d"}, "c"),
        ({}, {}, {"x-scope-orgid": "d"}, "d"),
        ({"tenant.id": 42}, {}, {}, "42"),
        ({"tenant.id": ""}, {}, {}, "unknown"),
        ({"http.request.header.x-fleetloop-tenant": ["h", "i"]}, {}, {}, "h"),
        ({"metadata": '{"tenant_id": "m", "x": 1}'}, {}, {}, "m"),
        ({"metadata": "no json"}, {}, {}, "unknown"),
        ({"metadata.user_api_key_team_alias": "team"}, {}, {}, "team"),
        ({"traceloop.association.properties.tenant_id": "t"}, {}, {}, "t"),
    ],
)
def test_tenant(attributes: Named, resource: Named, headers: dict[str, str], tenant: str) -> None:
    """Span before resource before header before default, the settings' first name first."""
    assert {row["tenant"] for row in pair(attributes, resource=resource, headers=headers)} == {tenant}


def test_names_of_attributes_are_settings() -> None:
    """A deployment names its own, in its own order, and the default tenant."""
    options = {
        "tenant_attributes": "acme.customer, tenant.id",
        "default_tenant": "house",
        "class_attributes": "acme.lane",
    }
    assert end({"tenant.id": "a", "acme.customer": "b", "acme.lane": "quality"}, **options)["tenant"] == "b"
    assert end({"acme.lane": "quality"}, **options)["class"] == "quality"
    assert end({"gen_ai.user": "u"}, **options)["tenant"] == "house"


@pytest.mark.parametrize(
    ("attributes", "headers", "options", "expected"),
    [
        ({}, {}, {}, None),
        ({"fleetloop.class": "quality"}, {}, {}, "quality"),
        ({}, {"x-fleetloop-class": "interactive"}, {}, "interactive"),
        ({"gen_ai.openai.request.service_tier": "flex"}, {}, {}, "batch"),
        ({"gen_ai.openai.request.service_tier": "priority"}, {}, {}, "interactive"),
        ({"gen_ai.openai.request.service_tier": "auto"}, {}, {}, None),
        ({"gen_ai.openai.request.service_tier": "gold"}, {}, {"class_map": "gold=quality"}, "quality"),
        ({"gen_ai.request.stream": False, "gen_ai.request.max_tokens": 2048}, {}, {}, "batch"),
        ({"gen_ai.request.stream": False, "gen_ai.request.max_tokens": 2047}, {}, {}, None),
        ({"gen_ai.request.stream": True, "gen_ai.request.max_tokens": 9000}, {}, {}, None),
        ({"gen_ai.request.max_tokens": 9000}, {}, {}, None),
        ({"gen_ai.request.stream": False, "gen_ai.request.max_tokens": 9000}, {}, {"infer_class": False}, None),
        ({"gen_ai.request.stream": False, "gen_ai.request.max_tokens": 9}, {}, {"batch_tokens_min": 9}, "batch"),
    ],
)
def test_class(attributes: Named, headers: dict[str, str], options: Named, expected: str | None) -> None:
    """What was said, by attribute, header or tier; else inferred where the setting allows; else none."""
    assert end(attributes, headers=headers, **options).get("class") == expected


@pytest.mark.parametrize(
    ("attributes", "resource", "pools", "expected"),
    [
        (
            {"gen_ai.request.model": "m", "gen_ai.response.model": "m-1"},
            {"service__name": "s"},
            "m-1=p1,m=p2,s=p3",
            "p1",
        ),
        ({"gen_ai.request.model": "m", "gen_ai.response.model": "m-1"}, {"service__name": "s"}, "m=p2,s=p3", "p2"),
        ({"gen_ai.request.model": "m"}, {"service__name": "s"}, "s=p3", "p3"),
        ({"gen_ai.request.model": "org/m"}, {"service__name": "s"}, "", "org-m"),
        ({}, {"service__name": "s"}, "", "s"),
        ({"gen_ai.request.model": "a=b"}, {}, "a=b=p", "p"),
        ({"fleetloop.pool": "named", "gen_ai.request.model": "m"}, {}, "m=p2", "named"),
    ],
)
def test_pool(attributes: Named, resource: Named, pools: str, expected: str) -> None:
    """By the map from what served, what was asked for, the service; without an entry the name itself."""
    assert end(attributes, resource=resource, pools=pools, default_pool=None)["pool"] == expected


def test_without_any_name_the_default_pool_or_a_refusal() -> None:
    """A request that could be anybody's is refused with what to do, or goes where the setting says."""
    message = empty()
    add_span(message, "chat", CLIENT, {"gen_ai.operation.name": "chat"}, number=1)
    (refused,) = read(message).refused
    assert (refused.field, "DEFAULT_POOL" in refused.remedy) == ("pool", True)
    assert named(read(message, default_pool="rest"))[0]["pool"] == "rest"


@pytest.mark.parametrize(
    ("attributes", "error", "status", "kind"),
    [
        ({}, False, "ok", None),
        ({"gen_ai.response.finish_reasons": ["length"]}, False, "ok", None),
        ({"gen_ai.response.finish_reasons": ["abort"]}, False, "cancelled", None),
        ({"gen_ai.response.finish_reasons": ["error"]}, False, "error", None),
        ({}, True, "error", None),
        ({"error.type": "timeout"}, True, "timeout", "timeout"),
        ({"error.type": "openai.APITimeoutError"}, True, "timeout", "openai.APITimeoutError"),
        ({"error.type": "asyncio.CancelledError"}, True, "cancelled", "asyncio.CancelledError"),
        ({"error.type": "RateLimitError"}, True, "rejected", "RateLimitError"),
        ({"error.type": "429"}, True, "rejected", "429"),
        ({"error.type": "500"}, True, "error", "500"),
        ({"http.response.status_code": 504}, True, "timeout", None),
        ({"http.response.status_code": 499}, True, "cancelled", None),
        ({"http.response.status_code": 503}, False, "rejected", None),
        ({"error.type": "the prompt was: tell me a secret"}, True, "error", "_OTHER"),
        ({"fleetloop.status": "rejected"}, False, "rejected", None),
    ],
)
def test_status(attributes: Named, error: bool, status: str, kind: str | None) -> None:
    """ok, error, timeout, cancelled, rejected; a kind of error that reads like a sentence is not kept."""
    message = empty(service__name="chat")
    span = add_span(message, "chat", CLIENT, {"gen_ai.operation.name": "chat", **attributes}, number=1)
    span.status.code = 2 if error else 0
    span.status.message = "prompt: my secret"
    ended = named(read(message))[1]
    assert (ended["status"], ended.get("error_type")) == (status, kind)


@given(
    st.booleans(),
    st.none() | st.text(max_size=20),
    st.none() | st.integers() | st.text(max_size=5),
    st.text(max_size=9),
)
def test_status_is_always_one_of_ours(failed: bool, kind: str | None, code: Any, finish: str) -> None:
    """Whatever is said."""
    assert status_of(failed, kind, code, finish) in ("ok", "error", "timeout", "cancelled", "rejected")


def test_reporter() -> None:
    """vLLM's spans are an engine's; others where the service is said to be one, or the span says so."""
    assert end({}, resource={"service__name": "sglang"}, engine_services="sglang,tgi")["reporter"] == "engine"
    assert end({}, resource={"service__name": "app"}, engine_services="sglang,tgi")["reporter"] == "gateway"
    assert end({"fleetloop.reporter": "engine"})["reporter"] == "engine"
    assert "replica" not in end({}, resource={"service__instance__id": "gateway-7"})


def test_units_beside_tokens() -> None:
    """Images, seconds of audio and of video."""
    ended = end({"fleetloop.image_units": 3, "gen_ai.usage.input_audio_seconds": 12.5, "fleetloop.video_s": 4})
    assert (ended["image_units"], ended["audio_s"], ended["video_s"]) == (3, 12.5, 4)


def test_attempts() -> None:
    """A resend is the attempt after it."""
    assert end({"http.request.resend_count": 2})["attempt"] == 3
    assert end({"fleetloop.attempt": 2})["attempt"] == 2
    assert "attempt" not in end({"http.request.resend_count": 0})


def test_ids_of_one_request_agree() -> None:
    """vLLM numbers the prompts of a completion, its client does not; ids that are too long give way to the span's."""
    message = empty(service__name="chat")
    add_span(message, "llm_request", SERVER, {"gen_ai.request.id": "cmpl-0123456789ab-0"}, number=1)
    assert named(read(message))[0]["request_id"] == "cmpl-0123456789ab"
    assert end({"gen_ai.response.id": "x" * 201})["request_id"] == "0" * 31 + "1-" + "0" * 15 + "1"


def test_times_that_never_came_are_unknown() -> None:
    """vLLM takes differences of them: a request without a token has none or a negative one, and counts still."""
    message = empty(service__name="chat")
    times = {"gen_ai.latency.time_in_queue": -1.7e9, "gen_ai.latency.time_to_first_token": 0.0}
    add_span(message, "llm_request", SERVER, {**times, "gen_ai.usage.completion_tokens": 0}, number=1)
    ended = named(read(message))[1]
    assert (ended["output_tokens"], ended.get("queue_s"), ended.get("ttft_s")) == (0, None, None)


def test_time_to_first_token_from_an_event() -> None:
    """OpenInference says it as an event of the span."""
    message = empty(service__name="chat")
    span = add_span(message, "chat", CLIENT, {"gen_ai.operation.name": "chat"}, number=1)
    span.events.add(name="noise", time_unix_nano=span.start_time_unix_nano + 1)
    span.events.add(name="First Token Stream Event", time_unix_nano=span.start_time_unix_nano + 400_000_000)
    assert named(read(message))[1]["ttft_s"] == pytest.approx(0.4)


def test_cached_tokens_that_are_not_part_of_the_input_are_unknown() -> None:
    """Where a provider counts them apart nobody can say which share they are."""
    counts = {"gen_ai.usage.input_tokens": 10, "gen_ai.usage.cache_read.input_tokens": 90}
    assert "cached_tokens" not in end(counts)


@pytest.mark.parametrize(
    ("attributes", "times", "field"),
    [
        ({"gen_ai.usage.output_tokens": -1}, None, "output_tokens"),
        ({"tenant.id": "x" * 201}, None, "tenant"),
        ({"gen_ai.request.model": "a\nb"}, None, "model"),
        ({}, (5, 4), "start_time_unix_nano"),
        ({}, (0, 4), "start_time_unix_nano"),
        ({}, (2**64 - 2, 2**64 - 1), None),
    ],
)
def test_a_refused_span_costs_both_of_its_rows_and_no_other(
    attributes: Named, times: tuple[int, int] | None, field: str | None
) -> None:
    """Neither an arrival without end nor an end without arrival is left; the neighbours are taken."""
    message = request("genai", 2)
    span = add_span(message, "chat", CLIENT, {"gen_ai.operation.name": "chat", **attributes}, number=9)
    if times:
        span.start_time_unix_nano, span.end_time_unix_nano = times
    found = read(message, default_pool="chat")
    assert found.batch.rows == (4 if field else 6)
    assert [one.field for one in found.refused] == ([field] if field else [])
    assert found.response().partial_success.rejected_spans == (1 if field else 0)


def test_content_is_never_configured_in() -> None:
    """No setting can name an attribute that holds what a user wrote."""
    for name in (
        "gen_ai.prompt.0.content",
        "gen_ai.input.messages",
        "input.value",
        "llm.input_messages.0.message.content",
    ):
        assert is_content(name)
        with pytest.raises(SettingsError, match="never read"):
            IntakeOptions.of(tenant_attributes=f"tenant.id,{name}")
    assert not is_content("gen_ai.usage.prompt_tokens")


@pytest.mark.parametrize(
    ("given_", "match"),
    [({"pools": "x"}, "name=name"), ({"pools": "x=a/b"}, "no name of a pool"), ({"class_map": "=x"}, "name=name")],
)
def test_wrong_maps_are_named(given_: dict[str, str], match: str) -> None:
    """With variable and remedy."""
    with pytest.raises(SettingsError, match=match):
        IntakeOptions.of(**given_)


def test_lone_surrogates_become_question_marks() -> None:
    """JSON can write them, no other encoding can."""
    rows = [("end", "a\ud800", 1.0, "p") + (None,) * (len(REQUEST_ROWS.columns) - 4)] * 2
    batch, bad = batch_of([(rows[0], rows[1])])
    assert (batch.rows, bad, batch.values["request_id"]) == (2, {}, ["a?"])
