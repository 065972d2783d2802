"""OTLP over HTTP as its specification has it: encodings, compression, partial success, errors; and nothing leaks."""

from __future__ import annotations

import asyncio
import gzip
import json
from base64 import b64decode
from typing import Any

import pytest
from google.protobuf.json_format import Parse
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from schemas.base import decode
from schemas.deadletters import DeadLetter
from schemas.requests import REQUEST_ROWS
from schemas.topics import DEAD_LETTERS, REQUEST_TRACES
from tests.exporters.cells import as_rows
from tests.exporters.conftest import Producer, until
from tests.exporters.otlp_examples import CLIENT, EXAMPLES, SECRET, add_span, as_json, empty, request
from tests.exporters.test_intake import TOKEN, Client, Opened, errors, opened  # noqa: F401 - a fixture

PROTOBUF, JSON = "application/x-protobuf", "application/json"


async def post(client: Client, body: bytes, content: str = PROTOBUF, **headers: str) -> tuple[int, bytes, Any]:
    headers = {"Content-Type": content, **{k.replace("_", "-"): v for k, v in headers.items()}}
    url = f"http://127.0.0.1:{client.intake.port}/v1/traces"
    async with client.session.post(url, data=body, headers=headers) as answer:
        assert answer.status >= 400 or answer.content_type == content
        return answer.status, await answer.read(), answer.headers


def taken() -> list[dict[str, Any]]:
    """Rows handed to the producer."""
    records = [r for r in Producer.made[-1].records if r.topic == REQUEST_TRACES]
    rows = [dict(zip(REQUEST_ROWS.columns, row, strict=True)) for r in records for row in as_rows(r.batch())]
    return sorted(rows, key=lambda row: (row["request_id"], row["event"]))


@pytest.mark.parametrize("convention", list(EXAMPLES))
async def test_both_encodings_give_the_same_rows(opened: Opened, convention: str) -> None:  # noqa: F811
    """Protobuf and JSON, plain and gzip; an empty answer means that all was taken."""
    message = request(convention, 20)
    found = []
    for content, body in ((PROTOBUF, message.SerializeToString()), (JSON, as_json(message))):
        for encoding in ("identity", "gzip"):
            async with opened() as client:
                sent = gzip.compress(body) if encoding == "gzip" else body
                status, answer, _ = await post(client, sent, content, Content_Encoding=encoding)
                assert (status, answer) == (200, b"" if content == PROTOBUF else b"{}")
                found.append(taken())
            Producer.made.clear()
    assert len(found[0]) == 40
    assert all(rows == found[0] for rows in found)


async def test_an_empty_request_is_taken(opened: Opened) -> None:  # noqa: F811
    """As the specification asks."""
    async with opened() as client:
        assert (await post(client, b""))[0] == 200
        assert (await post(client, b"{}", JSON))[0] == 200


async def test_refused_spans_are_a_partial_success(opened: Opened) -> None:  # noqa: F811
    """200 with their number and what to do; the others are stored; what is left of them is in dead.letters."""
    message = request("genai", 3)
    bad = {"gen_ai.operation.name": "chat", "gen_ai.usage.output_tokens": -5, "gen_ai.input.messages": SECRET}
    for number in (10, 11):
        add_span(message, "chat", CLIENT, {**bad, f"the prompt {SECRET}": "x"}, number=number)
    async with opened() as client:
        status, body, _ = await post(client, message.SerializeToString())
        answer = ExportTraceServiceResponse.FromString(body)
        assert (status, answer.partial_success.rejected_spans) == (200, 2)
        assert "output_tokens" in answer.partial_success.error_message
        status, body, _ = await post(client, as_json(message), JSON)
        answer = Parse(body, ExportTraceServiceResponse())
        assert (status, answer.partial_success.rejected_spans) == (200, 2)
        assert errors(client)["rows"] == 4
        letters = [decode(DeadLetter, r.value) for r in Producer.made[0].records if r.topic == DEAD_LETTERS]
    assert [(r.type, r.reason, r.field, r.value, r.rows_refused) for r in letters] == [
        ("otlp.span", "out_of_bounds", "output_tokens", "", 2)
    ] * 2
    data = json.loads(b64decode(letters[0].data_base64))
    assert data == {"attributes": [*bad, "(odd)"]}
    assert len(letters[0].data_sha256 or "") == 64


async def test_dead_letters_are_bounded(opened: Opened) -> None:  # noqa: F811
    """Beyond the setting they are counted."""
    async with opened(letters_per_min_max=2) as client:
        for number in range(1, 6):
            message = empty(service__name="chat")
            add_span(message, "chat", CLIENT, {"gen_ai.operation.name": "chat", "tenant.id": "x" * 300}, number=number)
            assert (await post(client, message.SerializeToString()))[0] == 200
        assert len([r for r in Producer.made[0].records if r.topic == DEAD_LETTERS]) in (2, 3, 4)  # a minute may turn
        assert errors(client)["letters"] >= 1


@pytest.mark.parametrize(
    ("body", "content", "status"),
    [
        (b"\xff\xff\xff", PROTOBUF, 400),
        (b"{", JSON, 400),
        (b"[]", JSON, 400),
        (b'{"resourceSpans": 3}', JSON, 400),
        (b"{}", "text/plain", 415),
        (b" " * 3000, JSON, 413),
    ],
)
async def test_errors_are_a_status_message(opened: Opened, body: bytes, content: str, status: int) -> None:  # noqa: F811
    """In the encoding of the request."""
    async with opened(body_bytes_max=2048) as client:
        found, answer, headers = await post(client, body, content)
        assert found == status
        message = Status.FromString(answer) if content == PROTOBUF else Parse(answer, Status())
        assert message.code
        assert message.message
        assert headers["Content-Type"].startswith(PROTOBUF if content == PROTOBUF else JSON)


async def test_who_may_send_and_when(opened: Opened) -> None:  # noqa: F811
    """Without token 401; too many spans 413; not acknowledged 503 with Retry-After."""
    async with opened(token=TOKEN, rows_max=3) as client:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert (await post(client, request("vllm", 3).SerializeToString()))[0] == 401
        assert (await post(client, request("vllm", 3).SerializeToString(), **bearer))[0] == 200
        assert (await post(client, request("vllm", 4).SerializeToString(), **bearer))[0] == 413
        Producer.made[0].connected = False
        status, _, headers = await post(client, request("vllm", 1).SerializeToString(), **bearer)
        assert (status, headers["Retry-After"]) == (503, "1")


async def test_the_tenant_may_be_a_header_of_the_sender(opened: Opened) -> None:  # noqa: F811
    """A collector a tenant: its export requests say who."""
    async with opened() as client:
        await post(client, request("vllm", 1).SerializeToString(), X_Scope_OrgID="acme", X_Fleetloop_Class="batch")
        assert {(row["tenant"], row["class"]) for row in taken()} == {("acme", "batch")}


@pytest.mark.parametrize("convention", list(EXAMPLES))
async def test_nothing_that_a_user_wrote_is_stored_or_logged(
    opened: Opened,  # noqa: F811
    convention: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Secrets planted wherever content stands, in good, refused and broken spans, are in no record, answer or log."""
    caplog.set_level("DEBUG")
    message = request(convention, 3)
    for i, change in enumerate(
        ({"gen_ai.usage.output_tokens": -1, "llm.token_count.completion": -1}, {"error.type": f"{SECRET} said"})
    ):
        name, kind, attributes = EXAMPLES[convention](50 + i)
        span = add_span(message, name, kind, {**attributes, "input.value": SECRET, **change}, number=60 + i)
        span.status.message, span.status.code = SECRET, 2
        span.events.add(name="exception").attributes.add(key="exception.message").value.string_value = SECRET
        span.events.add(name=f"event {SECRET}")
    answers = []
    async with opened() as client:
        answers.append((await post(client, message.SerializeToString()))[1])
        answers.append((await post(client, as_json(message), JSON))[1])
        answers.append((await post(client, message.SerializeToString()[:-7]))[1])
        answers.append((await post(client, as_json(message)[:-7], JSON))[1])
        records = Producer.made[0].records
    assert len(records) > 4
    assert len([r for r in records if r.topic == DEAD_LETTERS]) == 2
    out = capsys.readouterr()
    everything = [out.out, out.err, caplog.text, *map(str, answers), *(f"{r.key}{r.id}{r.value!r}" for r in records)]
    assert [text for text in everything if SECRET in text] == []
    tables = [str(list(as_rows(r.batch()))) for r in records if r.topic == REQUEST_TRACES]
    letters = [str(b64decode(decode(DeadLetter, r.value).data_base64)) for r in records if r.topic == DEAD_LETTERS]
    assert [text for text in (*tables, *letters) if SECRET in text] == []


def test_messages_of_the_examples_are_what_they_claim() -> None:
    """The JSON of the examples is the protobuf's, so that tests of one speak for the other."""
    message = request("vllm", 2)
    spans = json.loads(as_json(message))["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert [s["traceId"] for s in spans] == [s.trace_id.hex() for s in message.resource_spans[0].scope_spans[0].spans]
    assert isinstance(ExportTraceServiceRequest.FromString(message.SerializeToString()), ExportTraceServiceRequest)


async def test_no_span_waits_for_the_next(opened: Opened) -> None:  # noqa: F811
    """Many senders at once are each answered."""
    async with opened(coalesce_s=0.05) as client:
        bodies = [request("genai", 5, first=100 * i).SerializeToString() for i in range(1, 21)]
        answers = await asyncio.gather(*(post(client, body) for body in bodies))
        assert [status for status, _, _ in answers] == [200] * 20
        await until(lambda: len(taken()) == 200)
