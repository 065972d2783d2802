"""LiteLLM's logging payload: its requests, who is billed, how they ended; and what it carries besides is left."""

from __future__ import annotations

import json
from typing import Any

import pytest

from schemas.base import decode
from schemas.deadletters import DeadLetter
from schemas.requests import REQUEST_ROWS
from schemas.topics import DEAD_LETTERS, REQUEST_TRACES
from tests.exporters.cells import as_rows
from tests.exporters.conftest import Producer
from tests.exporters.otlp_examples import SECRET, START_S
from tests.exporters.test_intake import Client, Opened, opened  # noqa: F401 - a fixture

Named = dict[str, Any]
NOBODY = dict.fromkeys(("user_api_key_team_alias", "user_api_key_team_id", "user_api_key_alias"))


def payload(**changes: Any) -> Named:
    """A streamed chat completion of the proxy, as its generic API logger posts it; `metadata` is added to."""
    metadata = {
        "user_api_key_hash": f"hash-{SECRET}",
        "user_api_key_alias": "key-of-search",
        "user_api_key_team_id": "team-7",
        "user_api_key_team_alias": "search",
        "requester_ip_address": "10.0.0.7",
        "usage_object": {"prompt_tokens": 812, "prompt_tokens_details": {"cached_tokens": 512}},
        **changes.pop("metadata", {}),
    }
    return {
        "id": "chatcmpl-lite-1",
        "trace_id": "t-1",
        "call_type": "acompletion",
        "stream": True,
        "response_cost": 0.0012,
        "status": "success",
        "custom_llm_provider": "hosted_vllm",
        "total_tokens": 976,
        "prompt_tokens": 812,
        "completion_tokens": 164,
        "startTime": START_S + 1.0,
        "completionStartTime": START_S + 1.5,
        "endTime": START_S + 4.76,
        "response_time": 0.5,
        "model": "meta-llama/Llama-3.1-8B",
        "model_group": "llama",
        "api_base": "http://vllm:8000/v1",
        "metadata": metadata,
        "cache_hit": False,
        "request_tags": ["prod"],
        "end_user": "user-9",
        "messages": [
            {"role": "system", "content": SECRET},
            {"role": "user", "content": [{"type": "text", "text": SECRET}, {"type": "image_url", "image_url": SECRET}]},
        ],
        "response": {"choices": [{"message": {"content": SECRET}}]},
        "error_str": None,
        "error_information": {"error_code": "", "error_class": "", "error_message": "", "traceback": ""},
        "model_parameters": {"stream": True, "max_tokens": 512, "user": "user-9", "tools": SECRET},
        "hidden_params": {"additional_headers": {"x": SECRET}},
        **changes,
    }


async def post(client: Client, body: Any, **headers: str) -> tuple[int, Named]:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"http://127.0.0.1:{client.intake.port}/v1/litellm"
    async with client.session.post(url, data=sent, headers={"Content-Type": "application/json", **headers}) as answer:
        return answer.status, await answer.json()


def taken() -> list[Named]:
    """Rows handed to the producer, nulls left out."""
    records = [r for r in Producer.made[-1].records if r.topic == REQUEST_TRACES]
    rows = [dict(zip(REQUEST_ROWS.columns, row, strict=True)) for r in records for row in as_rows(r.batch())]
    rows.sort(key=lambda row: (row["at_s"], row["event"]))
    return [{k: v for k, v in row.items() if v is not None} for row in rows]


async def ended(opened: Opened, body: Named, headers: dict[str, str] | None = None, **options: Any) -> Named:  # noqa: F811
    """The `end` row of one payload."""
    async with opened(**options) as client:
        status, answer = await post(client, [body], **(headers or {}))
        assert (status, answer["accepted"]) == (200, 1)
        return taken()[1]


async def test_a_payload_is_two_rows(opened: Opened) -> None:  # noqa: F811
    """Everything that it says about size and time; nothing else."""
    async with opened(pools="llama=chat-h100") as client:
        assert await post(client, [payload()]) == (200, {"accepted": 1, "skipped": 0, "refused": 0, "why": []})
        arrival, end = taken()
    who = {
        "request_id": "chatcmpl-lite-1",
        "pool": "chat-h100",
        "tenant": "search",
        "model": "llama",
        "reporter": "gateway",
        "input_tokens": 812.0,
        "image_units": 1.0,
    }
    assert arrival == {**who, "event": "arrival", "at_s": START_S + 1.0}
    times = {"ttft_s": 0.5, "tpot_s": 3.26 / 163, "e2e_s": 3.76}
    assert end == pytest.approx(
        {
            **who,
            **times,
            "event": "end",
            "at_s": START_S + 4.76,
            "status": "ok",
            "output_tokens": 164,
            "cached_tokens": 512,
        },
        abs=1e-6,
    )


async def test_each_form_of_a_batch(opened: Opened) -> None:  # noqa: F811
    """An array, one payload, one a line."""
    several = [payload(id=f"id-{i}") for i in range(3)]
    async with opened() as client:
        assert (await post(client, several))[1]["accepted"] == 3
        assert (await post(client, several[0]))[1]["accepted"] == 1
        lines = b"\n".join(json.dumps(one).encode() for one in several)
        assert (await post(client, lines))[1]["accepted"] == 3
        assert (await post(client, b"[{"))[0] == 400
        assert len(taken()) == 14


@pytest.mark.parametrize(
    ("changes", "headers", "tenant"),
    [
        ({}, {}, "search"),
        ({"metadata": {"user_api_key_team_alias": None}}, {}, "team-7"),
        ({"metadata": {"user_api_key_team_alias": None, "user_api_key_team_id": None}}, {}, "key-of-search"),
        ({"metadata": {"requester_metadata": {"tenant_id": "said"}}}, {}, "said"),
        ({"metadata": {"spend_logs_metadata": {"tenant": "said"}}}, {}, "said"),
        (
            {"metadata": NOBODY},
            {},
            "user-9",
        ),
        (
            {"metadata": NOBODY},
            {"X-Fleetloop-Tenant": "head"},
            "head",
        ),
    ],
)
async def test_tenant(opened: Opened, changes: Named, headers: dict[str, str], tenant: str) -> None:  # noqa: F811
    """What the caller said, then the key's team, key and user, then the end user."""
    assert (await ended(opened, payload(**changes), headers))["tenant"] == tenant


async def test_class(opened: Opened) -> None:  # noqa: F811
    """Said, by service tier, or inferred."""
    assert "class" not in await ended(opened, payload())
    assert (await ended(opened, payload(metadata={"requester_metadata": {"class": "quality"}})))["class"] == "quality"
    assert (await ended(opened, payload(model_parameters={"service_tier": "flex"})))["class"] == "batch"
    whole = {"stream": False, "model_parameters": {"max_tokens": 4096}}
    assert (await ended(opened, payload(**whole)))["class"] == "batch"
    assert "class" not in await ended(opened, payload(**whole), infer_class=False)


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [
        ("429", "RateLimitError", "rejected"),
        ("408", "Timeout", "timeout"),
        ("500", "InternalServerError", "error"),
        ("400", "ContextWindowExceededError", "error"),
        ("", "CancelledError", "cancelled"),
    ],
)
async def test_failures(opened: Opened, code: str, kind: str, status: str) -> None:  # noqa: F811
    """By code and class; the message is never looked at."""
    error = {"error_code": code, "error_class": kind, "error_message": SECRET, "traceback": SECRET}
    end = await ended(opened, payload(status="failure", error_information=error, error_str=SECRET))
    assert (end["status"], end["error_type"]) == (status, kind)


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_hit": True},
        {"call_type": "aimage_generation"},
        {"metadata": {"user_api_key_alias": "litellm-internal-health-check"}},
    ],
)
async def test_what_no_model_of_the_fleet_served_is_skipped(opened: Opened, changes: Named) -> None:  # noqa: F811
    """Answers from the gateway's cache, other kinds of call, health checks."""
    async with opened() as client:
        assert (await post(client, [payload(**changes)]))[1] == {"accepted": 0, "skipped": 1, "refused": 0, "why": []}


@pytest.mark.parametrize(
    "changes",
    [{"id": None}, {"startTime": None}, {"endTime": 1.0}, {"startTime": "yesterday"}, {"prompt_tokens": -1}],
)
async def test_a_bad_payload_costs_itself(opened: Opened, changes: Named) -> None:  # noqa: F811
    """It is counted and dead-lettered by the names of its fields; the others are stored, and nobody is asked again."""
    async with opened() as client:
        status, answer = await post(client, [payload(), payload(**({"id": "b"} | changes)), 7])
        assert (status, answer["accepted"], answer["refused"]) == (200, 1, 2)
        letters = [decode(DeadLetter, r.value) for r in Producer.made[0].records if r.topic == DEAD_LETTERS]
        assert {letter.type for letter in letters} == {"litellm.payload"}
        assert len(taken()) == 2


async def test_times_may_be_texts(opened: Opened) -> None:  # noqa: F811
    """Some versions write ISO 8601."""
    texts = {
        "startTime": "2026-01-01T00:00:00Z",
        "completionStartTime": "2026-01-01T00:00:01Z",
        "endTime": "2026-01-01 00:00:02",
    }
    end = await ended(opened, payload(**texts))
    assert (end["ttft_s"], end["e2e_s"]) == (1.0, 2.0)


async def test_without_a_stream_there_is_no_first_token(opened: Opened) -> None:  # noqa: F811
    """There `completionStartTime` is when the whole answer came."""
    assert "ttft_s" not in await ended(opened, payload(stream=False, completionStartTime=START_S + 4.76))


async def test_nothing_that_a_user_wrote_is_stored_or_logged(
    opened: Opened,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Secrets in messages, answers, keys, errors and headers are in no record, answer or log."""
    caplog.set_level("DEBUG")
    failure = {"error_class": f"bad {SECRET}", "error_message": SECRET, "error_code": SECRET}
    bodies = [
        payload(),
        payload(id="b", prompt_tokens=-1),
        payload(id="c", status="failure", error_information=failure),
    ]
    async with opened() as client:
        answers = [str(await post(client, bodies)), str(await post(client, json.dumps(bodies)[:-9].encode()))]
        records = Producer.made[0].records
    assert {r.topic for r in records} == {REQUEST_TRACES, DEAD_LETTERS}
    out = capsys.readouterr()
    everything = [out.out, out.err, caplog.text, *answers, *(f"{r.key}{r.value!r}" for r in records), str(taken())]
    assert [text for text in everything if SECRET in text] == []
