"""The trace intake over HTTP: what is taken, what is refused and how, who may send, and what when it is full."""

from __future__ import annotations

import asyncio
import gzip
import json
import tempfile
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st

from exporters.edge import Edge
from exporters.intake import PATH, Intake, IntakeOptions
from exporters.rows import BATCH_BYTES_MAX, RowBatcher, partitions_of
from schemas.columns import Batch
from schemas.config import Deployment
from schemas.errors import SettingsError
from schemas.log import CONTENT_ARROW
from schemas.requests import REQUEST_ROWS
from schemas.topics import REQUEST_TRACES
from streams.clients import partition_of
from streams.settings import Settings
from tests.exporters.cells import as_rows
from tests.exporters.conftest import Producer, until
from tests.schemas import examples

TOKEN = "a-token-that-is-long-enough"
NDJSON = "application/x-ndjson"
Opened = Callable[..., AbstractAsyncContextManager["Client"]]


class Client:
    """A sender, and what the intake has handed on."""

    def __init__(self, intake: Intake, session: aiohttp.ClientSession, stop: asyncio.Event) -> None:
        self.intake, self.session, self.stop = intake, session, stop
        self.url = f"http://127.0.0.1:{intake.port}{PATH}"

    async def post(self, body: bytes, content: str = "application/json", **headers: str) -> tuple[int, Any]:
        headers = {"Content-Type": content, **{k.replace("_", "-"): v for k, v in headers.items()}}
        async with self.session.post(self.url, data=body, headers=headers) as answer:
            return answer.status, await answer.json()

    def rows(self) -> list[dict[str, Any]]:
        """Every row handed to the producer, each checked to be on the partition of its id."""
        out = []
        for record in Producer.made[0].records:
            assert record.topic == REQUEST_TRACES
            assert len(record.value) <= BATCH_BYTES_MAX
            for row in as_rows(record.batch()):
                named = dict(zip(REQUEST_ROWS.columns, row, strict=True))
                assert record.partition == partition_of(named["request_id"].encode(), 4)
                out.append(named)
        return out


@asynccontextmanager
async def serving(settings: Settings, deployment: Deployment, **given: Any) -> AsyncIterator[Client]:
    """An intake with options of its own, and somebody who sends to it."""
    intake = Intake(settings, deployment, IntakeOptions.of(**({"port": 0, "coalesce_s": 0.01} | given)))
    stop = asyncio.Event()
    running = asyncio.create_task(intake.run(stop))
    listening = asyncio.create_task(intake.listening.wait())
    await asyncio.wait({running, listening}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        listening.cancel()
        await running
    async with aiohttp.ClientSession() as session:
        yield Client(intake, session, stop)
    stop.set()
    await running


@pytest.fixture
def opened(settings: Settings, deployment: Deployment) -> Opened:
    """Opens an intake with options of its own."""

    def make(given_settings: Settings | None = None, **given: Any) -> AbstractAsyncContextManager[Client]:
        return serving(given_settings or settings, deployment, **given)

    return make


def example(count: int = 3) -> list[dict[str, Any]]:
    return [{**row, "request_id": f"id-{i}"} for i, row in enumerate(examples.rows(REQUEST_ROWS, count))]


def encoded(rows: list[dict[str, Any]], content: str) -> bytes:
    if content == CONTENT_ARROW:
        return REQUEST_ROWS.encode({name: [row.get(name) for row in rows] for name in REQUEST_ROWS.columns})
    if content == NDJSON:
        return b"\n".join(json.dumps(row).encode() for row in rows) + b"\n\n"
    return json.dumps(rows).encode()


@pytest.mark.parametrize("content", ["application/json", NDJSON, CONTENT_ARROW])
async def test_rows_are_taken_in_each_form(opened: Opened, content: str) -> None:
    """JSON, NDJSON and Arrow give the same rows, each on the partition of its id, none changed."""
    sent = example(50)
    async with opened() as client:
        assert await client.post(encoded(sent, content), content) == (
            200,
            {"accepted": 50, "refused_rows": 0, "refused": []},
        )
        await until(lambda: len(client.rows()) == 50)
        assert sorted(client.rows(), key=lambda r: r["at_s"]) == sent
        assert len(Producer.made[0].records) == 4
        metas = [r.batch().meta for r in Producer.made[0].records]
        assert [m["seq"] for m in metas] == ["1", "2", "3", "4"]
        assert len({r.id for r in Producer.made[0].records}) == 4


async def test_one_row_as_an_object(opened: Opened) -> None:
    """A gateway may send one row without an array; what it does not know is null."""
    row = {"event": "arrival", "request_id": "r", "at_s": 1.5, "pool": "chat", "prompt": "secret"}
    async with opened() as client:
        assert (await client.post(json.dumps(row).encode()))[0] == 200
        await until(lambda: len(client.rows()) == 1)
    (taken,) = client.rows()
    assert {k: v for k, v in taken.items() if v is not None} == {k: row[k] for k in row if k != "prompt"}


async def test_a_header_names_the_tenant_of_rows_without(opened: Opened) -> None:
    """And the class; what a row says itself stays."""
    rows = [{"event": "arrival", "request_id": str(i), "at_s": 1.5, "pool": "chat"} for i in range(3)]
    rows[1]["tenant"], rows[2]["tenant"] = "own", "acme"
    async with opened() as client:
        headers = {"X_Fleetloop_Tenant": "acme", "X_Fleetloop_Class": "batch"}
        assert (await client.post(json.dumps(rows).encode(), **headers))[0] == 200
        assert (await client.post(json.dumps(rows).encode(), X_Fleetloop_Tenant="x" * 300))[0] == 400
        found = {row["request_id"]: (row["tenant"], row["class"]) for row in client.rows()}
    assert found == {"0": ("acme", "batch"), "1": ("own", "batch"), "2": ("acme", "batch")}


async def test_rows_are_coalesced(opened: Opened) -> None:
    """Requests within the coalescing time make one batch a partition, not one each."""
    async with opened(coalesce_s=0.3) as client:
        answers = await asyncio.gather(*(client.post(json.dumps(row).encode()) for row in example(25)))
        assert {status for status, _ in answers} == {200}
        assert len(client.rows()) == 25
    assert len(Producer.made[0].records) <= 8


async def test_an_answer_waits_for_the_broker(opened: Opened) -> None:
    """No 2xx before the broker has every row; when it never will, or not in time, 503 with Retry-After."""
    async with opened(ack_timeout_s=0.2) as client:
        producer = Producer.made[0]
        producer.acknowledges = False
        posted = asyncio.create_task(client.post(encoded(example(), "application/json")))
        await until(lambda: producer.waiting)
        assert not posted.done()
        producer.settle(True)
        assert (await posted)[0] == 200
        posted = asyncio.create_task(client.post(encoded(example(), "application/json")))
        await until(lambda: producer.waiting)
        producer.settle(False)
        assert (await posted)[0] == 503
        async with client.session.post(client.url, json=example()) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        producer.connected = False
        sent = len(producer.records)
        assert (await client.post(encoded(example(), "application/json")))[0] == 503
        assert len(producer.records) == sent


async def test_one_record_that_is_lost_is_a_503(opened: Opened) -> None:
    """Of several batches all must be acknowledged."""
    async with opened() as client:
        producer = Producer.made[0]
        producer.acknowledges = False
        posted = asyncio.create_task(client.post(encoded(example(), "application/json")))
        await until(lambda: producer.waiting)
        producer.waiting.pop().set_result(False)
        producer.settle(True)
        assert (await posted)[0] == 503


async def test_a_stop_answers_who_waits(opened: Opened) -> None:
    """Rows that wait to be gathered are sent at once, and their sender learns that they are stored."""
    async with opened(coalesce_s=5) as client:
        posted = asyncio.create_task(client.post(encoded(example(), "application/json")))
        await until(lambda: client.intake.sink.batcher.bytes)
        assert Producer.made[0].records == []
        client.stop.set()
        assert (await posted)[0] == 200
    assert len(client.rows()) == 3


@pytest.mark.parametrize("content", ["application/json", NDJSON, CONTENT_ARROW])
async def test_bad_rows_are_named_and_good_ones_taken(opened: Opened, content: str) -> None:
    """207: each refusal says row, field, value and remedy; with nothing left to take it is a 400."""
    rows = example(4)
    rows[1]["ttft_s"] = -1.0
    rows[3]["pool"] = "a/b"
    async with opened() as client:
        status, answer = await client.post(encoded(rows, content), content)
        assert (status, answer["accepted"], answer["refused_rows"]) == (207, 2, 2)
        assert [(r["row"], r["field"]) for r in answer["refused"]] == [(1, "ttft_s"), (3, "pool")]
        assert answer["refused"][0]["value"] == "-1.0"
        assert "0 to 1e+06" in answer["refused"][0]["remedy"]
        status, answer = await client.post(encoded([rows[1]], content), content)
        assert (status, answer["accepted"], answer["refused_rows"]) == (400, 0, 1)
        await until(lambda: len(client.rows()) == 2)


async def test_broken_lines_cost_themselves(opened: Opened) -> None:
    """NDJSON: a line that is no JSON object is refused by its number, the lines around it are taken."""
    good = [json.dumps(row).encode() for row in example(3)]
    body = b"\n".join([good[0], b"{", b"", good[1], b"[1]", b"\xff", b"[" * 5000, good[2]])
    async with opened() as client:
        status, answer = await client.post(body, NDJSON)
        assert (status, answer["accepted"], answer["refused_rows"]) == (207, 3, 4)
        assert [r["row"] for r in answer["refused"]] == [1, 4, 5, 6]


@pytest.mark.parametrize(
    ("body", "content", "status"),
    [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"x", CONTENT_ARROW, 400),
        (b"[]", "text/plain", 415),
        (b"[]", "application/json", 200),
        (b"", NDJSON, 200),
        (b" " * 2000, "application/json", 413),
        (b" " * 9000, "application/json", 413),
    ],
)
async def test_bodies_that_cannot_be_taken(opened: Opened, body: bytes, content: str, status: int) -> None:
    """Broken, foreign, empty and too long bodies get an answer that says what to do."""
    async with opened(body_bytes_max=1024) as client:
        found, answer = await client.post(body, content)
        assert found == status
        assert answer["accepted"] == 0
        assert status == 200 or answer.get("error") or answer["refused"][0]["remedy"]
    assert Producer.made[0].records == []


async def test_a_compressed_body_is_measured_when_decompressed(opened: Opened) -> None:
    """A bomb of zeros is refused by what it becomes."""
    async with opened(body_bytes_max=1024 * 1024) as client:
        status, _ = await client.post(gzip.compress(b" " * 50_000_000), Content_Encoding="gzip")
        assert status == 413
        good = json.dumps(example()).encode()
        assert (await client.post(gzip.compress(good), Content_Encoding="gzip"))[0] == 200
        assert (await client.post(gzip.compress(good[:9]) + gzip.compress(good[9:]), Content_Encoding="gzip"))[0] == 200
        assert (await client.post(zlib.compress(good), Content_Encoding="deflate"))[0] == 200
        assert (await client.post(gzip.compress(good)[:-9], Content_Encoding="gzip"))[0] == 400
        assert (await client.post(good, Content_Encoding="gzip"))[0] == 400
        assert (await client.post(good, Content_Encoding="snappy"))[0] == 415
        status, answer = await client.post(gzip.compress(b"") * 2_000 + gzip.compress(good), Content_Encoding="gzip")
        assert (status, "members" in answer["refused"][0]["remedy"]) == (413, True)


async def test_a_token_is_asked_for(opened: Opened) -> None:
    """With a token nothing is read without it; other paths and methods are refused."""
    body = encoded(example(), "application/json")
    async with opened(token=TOKEN) as client:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer é"}):
            assert (await client.post(body, **header))[0] == 401
        assert (await client.post(body, Authorization=f"Bearer {TOKEN}"))[0] == 200
        async with client.session.get(client.url, headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
            assert answer.status == 405


async def test_another_host_name_is_refused_without_a_token(opened: Opened) -> None:
    """A page elsewhere that has its own name point at loopback cannot send rows."""
    async with opened() as client:
        assert (await client.post(encoded(example(), "application/json"), Host="evil.example"))[0] == 403
        assert (await client.post(encoded(example(), "application/json"), Host="localhost:1"))[0] == 200


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"host": "0.0.0.0"}, "set a token"),
        ({"host": "gateway.internal"}, "set a token"),
        ({"host": "0.0.0.0", "token": "short"}, "at least 16"),
        ({"token_file": "/nowhere/token"}, "TOKEN_FILE"),
    ],
)
def test_beyond_loopback_a_token_is_needed(
    settings: Settings, deployment: Deployment, given: dict[str, str], match: str
) -> None:
    """The process does not start without one, and never shows it."""
    with pytest.raises(SettingsError, match=match):
        Intake(settings, deployment, IntakeOptions.of(**given))


def test_secrets_are_not_shown() -> None:
    """Neither options nor their errors print a token."""
    assert TOKEN not in repr(IntakeOptions.of(token=TOKEN))
    with pytest.raises(SettingsError) as refused:
        IntakeOptions.of(token=["secret-in-a-list"])
    assert "secret-in" not in str(refused.value)


async def test_a_full_buffer_is_a_429_and_drops_nothing(opened: Opened) -> None:
    """While the buffer is full, rows are refused with Retry-After, all or none of a request."""
    small = Settings(edge_buffer_bytes=128 * 1024)
    async with opened(small, coalesce_s=0) as client:
        rows = [{**row, "request_id": f"{'x' * 150}{i}"} for i, row in enumerate(example(100))]
        producer = Producer.made[0]
        assert (await client.post(encoded(rows, "application/json")))[0] == 200
        producer.buffered_bytes = 50 * 1024  # the broker has not taken them
        async with client.session.post(client.url, json=rows) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
        producer.buffered_bytes = 65 * 1024
        assert (await client.post(b"[]"))[0] == 429
        producer.buffered_bytes = 0
        assert (await client.post(encoded(rows, "application/json")))[0] == 200
        assert (await client.post(encoded(rows * 4, "application/json")))[0] == 413
        assert len(client.rows()) == 200
        assert errors(client) == {"busy": 2, "too_large": 1}


def errors(client: Client) -> dict[str, float]:
    """The exporter's counts of errors."""
    samples = [s for m in client.intake.edge.metrics.collect() for s in m.samples if s.name.endswith("errors_total")]
    return {s.labels["what"]: s.value for s in samples}


async def test_a_client_has_a_rate(opened: Opened) -> None:
    """Rows beyond it wait, with the time to wait; each token is a client of its own."""
    tokens = "a=the-token-of-client-a\n\nb=the-token-of-client-b\n"
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(tokens)
        file.flush()
        async with opened(token_file=file.name, rows_per_s_max=1.0) as client:
            one, other = ({"Authorization": f"Bearer the-token-of-client-{name}"} for name in "ab")
            body = encoded(example(30), "application/json")
            assert (await client.post(body, **one))[0] == 200
            async with client.session.post(client.url, data=body, headers=one) as answer:
                assert answer.status == 429
            assert (await client.post(body, **other))[0] == 200
            assert len(client.rows()) == 60


async def test_too_many_rows_are_a_413(opened: Opened) -> None:
    """Whatever their bytes."""
    async with opened(rows_max=10) as client:
        assert (await client.post(encoded(example(10), "application/json")))[0] == 200
        assert (await client.post(encoded(example(11), "application/json")))[0] == 413


async def test_too_many_at_once_is_a_429(opened: Opened) -> None:
    """Requests beyond the bound are turned away while others are being read, and a slow sender is cut off."""
    async with opened(requests_max=1, body_timeout_s=0.5) as client:

        async def slowly() -> AsyncIterator[bytes]:
            yield b"["
            await asyncio.sleep(30)

        slow = asyncio.create_task(
            client.session.post(client.url, data=slowly(), headers={"Content-Type": "application/json"})
        )
        await until(lambda: client.intake.decoding == 1)
        assert (await client.post(b"[]"))[0] == 429
        async with await slow as answer:
            assert answer.status == 408
        assert (await client.post(b"[]"))[0] == 200


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=40), times=st.integers(1, 60), wide=st.booleans())
@profile(max_examples=30)
def test_batches_never_exceed_their_bound(lengths: list[int], times: int, wide: bool) -> None:
    """Whatever the texts, a batch is at most 512 KiB, and no row is lost or changed."""
    letter = "語" if wide else "x"
    columns = list(REQUEST_ROWS.columns)
    rows = []
    for i in range(times):
        for length in lengths:
            row = dict.fromkeys(columns, None) | {"event": "end", "at_s": 1.0, "pool": letter * length}
            row["request_id"], row["tenant"] = f"{len(rows)}-{i}", letter * length
            rows.append(row)
    found = asyncio.run(batched(rows, 1))
    assert [row for batch in found for row in as_rows(batch)] == [tuple(row.values()) for row in rows]


async def batched(rows: list[dict[str, Any]], partitions: int) -> list[Batch]:
    """What a batcher makes of rows; checks size and acknowledgements."""
    Producer.made = []
    deployment = Deployment(origin_ms=0, partitions={REQUEST_TRACES: partitions})
    batcher = RowBatcher(Edge(Settings(), deployment, "test", "source"), "source")
    split = batcher.split(REQUEST_ROWS.decode_rows(rows))
    batcher.add(split)
    assert batcher.bytes == split.bytes
    assert all(await asyncio.gather(*batcher.flush()))
    records = Producer.made[0].records
    assert all(len(r.value) <= BATCH_BYTES_MAX for r in records)
    assert batcher.sent_rows == len(rows)
    return [r.batch() for r in records]


async def test_large_requests_become_several_batches() -> None:
    """10,000 long rows are cut into batches that the topic takes, also where a few are much longer than the rest."""
    base = example(1)[0]
    long = [{**base, "request_id": f"{i:0200d}"} for i in range(10_000)]
    found = await batched(long, 1)
    assert len(found) >= 8
    assert sum(b.rows for b in found) == 10_000
    wide = dict.fromkeys(("tenant", "class", "model", "error_type"), "x" * 200)
    unlike = [{**row, **wide} if i < 700 else {**row, "request_id": str(i)} for i, row in enumerate(long)]
    assert sum(b.rows for b in await batched(unlike, 1)) == 10_000


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), min_size=1, max_size=40))
@profile(max_examples=50)
def test_partitions_are_those_of_the_ids(ids: list[str]) -> None:
    """Of many ids at once as of each."""
    assert partitions_of(ids, 16).tolist() == [partition_of(id.encode(), 16) for id in ids]
