"""OTLP over gRPC: the rows that HTTP gives, who may send, and the codes that say whether to try again."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub

from exporters.otlp_grpc import DETAILS
from schemas.config import Deployment
from schemas.errors import SettingsError
from streams.settings import Settings
from tests.exporters.certificates import Authority
from tests.exporters.conftest import Producer, until
from tests.exporters.otlp_examples import CLIENT, add_span, request
from tests.exporters.test_intake import TOKEN, Client, Opened, opened, serving  # noqa: F401 - a fixture
from tests.exporters.test_otlp import taken


@asynccontextmanager
async def stub(client: Client, credentials: Any = None) -> AsyncIterator[TraceServiceStub]:
    """A sender as OpenTelemetry's SDKs have it."""
    assert client.intake.grpc is not None
    address = f"127.0.0.1:{client.intake.grpc.port}"
    made = grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
    async with made as channel:
        yield TraceServiceStub(channel)  # type: ignore[no-untyped-call]


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


async def test_the_same_rows_as_over_http(opened: Opened) -> None:  # noqa: F811
    """Plain and compressed; partial success as over HTTP."""
    message = request("genai", 5)
    add_span(message, "chat", CLIENT, {"gen_ai.operation.name": "chat", "gen_ai.usage.output_tokens": -1}, number=99)
    async with opened(grpc_port=0) as client, stub(client) as sender:
        answer = await sender.Export(message, metadata=[("x-scope-orgid", "acme")])
        assert answer.partial_success.rejected_spans == 1
        rows = taken()
        assert len(rows) == 10
        assert {row["tenant"] for row in rows} == {f"tenant-{i}" for i in range(1, 6)}
        await sender.Export(request("vllm", 1), metadata=[("x-scope-orgid", "acme")], compression=grpc.Compression.Gzip)
        assert {row["tenant"] for row in taken() if row["reporter"] == "engine"} == {"acme"}


async def test_who_may_send(opened: Opened) -> None:  # noqa: F811
    """A token in the metadata; without it nothing is read."""
    async with opened(grpc_port=0, token=TOKEN) as client, stub(client) as sender:
        error = await refused(sender.Export(request("vllm", 1)))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        await sender.Export(request("vllm", 1), metadata=[("authorization", f"Bearer {TOKEN}")])
        assert len(taken()) == 2


def retry_after_s(error: grpc.aio.AioRpcError) -> int:
    """What the sender is told to wait."""
    details = dict(error.trailing_metadata() or ())[DETAILS]
    info = RetryInfo()
    assert Status.FromString(details).details[0].Unpack(info)
    return int(info.retry_delay.seconds)


async def test_codes_that_say_whether_to_try_again(opened: Opened) -> None:  # noqa: F811
    """Not stored and too fast: with the time to wait. Too much or nonsense: never again."""
    async with opened(grpc_port=0, rows_max=3, rows_per_s_max=1.0, retry_after_s=7) as client, stub(client) as sender:
        assert (await refused(sender.Export(request("vllm", 4)))).code() is grpc.StatusCode.INVALID_ARGUMENT
        Producer.made[0].connected = False
        error = await refused(sender.Export(request("vllm", 3)))
        assert (error.code(), retry_after_s(error)) == (grpc.StatusCode.UNAVAILABLE, 7)
        Producer.made[0].connected = True
        await sender.Export(request("vllm", 3))
        error = await refused(sender.Export(request("vllm", 3)))
        assert (error.code(), retry_after_s(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 7)


async def test_nonsense_is_never_sent_again(opened: Opened) -> None:  # noqa: F811
    """Bytes that are no message."""
    async with opened(grpc_port=0) as client:
        assert client.intake.grpc is not None
        async with grpc.aio.insecure_channel(f"127.0.0.1:{client.intake.grpc.port}") as channel:
            raw = channel.unary_unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export")
            assert (await refused(raw(b"\xff\xff"))).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_answer_waits_for_the_broker(opened: Opened) -> None:  # noqa: F811
    """As over HTTP."""
    async with opened(grpc_port=0) as client, stub(client) as sender:
        producer = Producer.made[0]
        producer.acknowledges = False
        exported = asyncio.ensure_future(sender.Export(request("vllm", 1)))
        await until(lambda: producer.waiting)
        assert not exported.done()
        producer.settle(True)
        await exported


async def test_a_new_connection_is_no_new_client(opened: Opened) -> None:  # noqa: F811
    """Without tokens a client is its address, so that connecting again does not get round its rate."""
    async with opened(grpc_port=0, rows_per_s_max=1e6) as client:
        for _ in range(2):
            async with stub(client) as sender:
                await sender.Export(request("vllm", 1))
        assert len(client.intake.limits._buckets) == 1


async def test_a_port_that_is_taken_is_named(settings: Settings, deployment: Deployment) -> None:
    """With its variable."""
    async with serving(settings, deployment, grpc_port=0) as client:
        assert client.intake.grpc is not None
        with pytest.raises(SettingsError, match="FLEETLOOP_INTAKE_GRPC_PORT"):
            async with serving(settings, deployment, grpc_port=client.intake.grpc.port):
                pass


async def test_mutual_tls_on_both_ports(settings: Settings, deployment: Deployment, tmp_path: Path) -> None:
    """Who has a certificate of the authority may send, and is known by its name; nobody else gets a word in."""
    ours, theirs = Authority(tmp_path), Authority(tmp_path, "stranger")
    certificate, key = ours.issue("intake")
    tls = {"tls_cert_file": certificate, "tls_key_file": key, "tls_client_ca_file": ours.file}
    async with serving(settings, deployment, grpc_port=0, rows_per_s_max=1e6, host="127.0.0.1", **tls) as client:
        url = f"https://127.0.0.1:{client.intake.port}/v1/traces"
        body = request("vllm", 1).SerializeToString()
        headers = {"Content-Type": "application/x-protobuf"}
        for authority, allowed in ((ours, True), (theirs, False), (None, False)):
            context = ssl.create_default_context(cafile=str(ours.file))
            pair = authority.issue("gateway-1") if authority else None
            if pair:
                context.load_cert_chain(*pair)
            if allowed:
                async with client.session.post(url, data=body, headers=headers, ssl=context) as answer:
                    assert answer.status == 200
            else:
                with pytest.raises((aiohttp.ClientError, ConnectionError)):
                    await client.session.post(url, data=body, headers=headers, ssl=context)
            chain = (pair[1].read_bytes(), pair[0].read_bytes()) if pair else (None, None)
            async with stub(client, grpc.ssl_channel_credentials(ours.file.read_bytes(), *chain)) as sender:
                if allowed:
                    await sender.Export(request("vllm", 1))
                else:
                    assert (await refused(sender.Export(request("vllm", 1)))).code() is grpc.StatusCode.UNAVAILABLE
        assert set(client.intake.limits._buckets) == {"cn:gateway-1"}


@pytest.mark.parametrize(
    "given",
    [
        {"tls_cert_file": "/nowhere.pem"},
        {"tls_cert_file": "/nowhere.pem", "tls_key_file": "/nowhere.key"},
        {"tls_client_ca_file": "/nowhere.pem"},
    ],
)
async def test_files_of_tls_that_are_not_there(
    settings: Settings, deployment: Deployment, given: dict[str, str]
) -> None:
    """Are named when the process starts."""
    with pytest.raises(SettingsError, match="FLEETLOOP_INTAKE_TLS"):
        async with serving(settings, deployment, **given):
            pass
