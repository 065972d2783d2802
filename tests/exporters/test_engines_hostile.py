"""Targets that are slow or mean no good: each costs its own slot at most, and is named for what it did."""

from __future__ import annotations

import asyncio
import gzip
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog

from exporters.engines import EngineExporter, EngineOptions
from exporters.exposition import PageError
from exporters.fetch import SECRET_AGE_S, Credentials, Fetcher, tls
from schemas.config import Deployment
from schemas.errors import SettingsError
from streams.settings import Settings
from tests.exporters.certificates import Authority
from tests.exporters.conftest import Producer, until

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
GOOD = b"process_start_time_seconds 100\nvllm:num_requests_running 1\n"


def http(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """A whole HTTP answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Server:
    """A TCP server that answers each request as it is told."""

    def __init__(self) -> None:
        self.say: Answer = said(http(GOOD, "Content-Type: text/plain"))
        self.requests: list[bytes] = []
        self.url = ""
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/metrics"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                self.requests.append(request)
                await self.say(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away, as it should
        finally:
            writer.close()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()


def said(answer: bytes) -> Answer:
    """Says one thing."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()

    return say


def endless(head: bytes, piece: bytes, pause_s: float = 0.0) -> Answer:
    """Never stops."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return say


def chunked(*pieces: bytes) -> bytes:
    """An answer in chunks."""
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


BOMB = gzip.compress(b"x" * 50_000_000)
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"
ENGINES = b"".join(b'vllm:num_requests_running{engine="%d"} 1\n' % i for i in range(300))
MANY = b"".join(b'vllm:num_requests_running{engine="%d"} 1\n' % i for i in range(10_001))
TEXT = "Content-Type: text/plain"
HOSTILE: dict[str, tuple[Answer, str]] = {
    "10 MB": (said(http(b"x" * 10_000_000, TEXT)), "bytes"),
    "10 MB said, nothing sent": (said(http(b"", TEXT, length=10_000_000)), "bytes"),
    "10 MB in chunks": (said(chunked(*[b"x" * 100_000] * 100)), "bytes"),
    "endless": (endless(STREAM, b"vllm:num_requests_running 1\n" * 1000), "bytes"),
    "endless, slowly": (endless(STREAM, b"v", 0.01), "timeout"),
    "slow head": (endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.02), "timeout"),
    "endless head": (endless(b"HTTP/1.1 200 OK\r\nX: ", b"y" * 1000), "connect"),
    "gzip bomb": (said(http(BOMB, TEXT, "Content-Encoding: gzip")), "bytes"),
    "broken gzip": (said(http(b"\x1f\x8bnothing of it", TEXT, "Content-Encoding: gzip")), "encoding"),
    "half a gzip": (said(http(gzip.compress(GOOD)[:-9], TEXT, "Content-Encoding: gzip")), "encoding"),
    "brotli": (said(http(GOOD, TEXT, "Content-Encoding: br")), "encoding"),
    "10,001 series": (said(http(MANY, TEXT)), "series"),
    "300 engines": (said(http(ENGINES, TEXT)), "rows"),
    "a long line": (said(http(b'vllm:num_requests_running{x="' + b"y" * 20_000 + b'"} 1\n', TEXT)), "line"),
    "no text": (said(http(bytes(range(256)) * 40, TEXT)), "unknown"),
    "another type": (said(http(GOOD, "Content-Type: text/html; charset=utf-8")), "type"),
    "redirect": (said(http(b"", "Location: http://127.0.0.1:1/", status="302 Found")), "status"),
    "breaks off": (said(http(GOOD, TEXT, length=500)), "timeout"),
    "no HTTP": (said(b"220 mail.example ESMTP\r\n"), "connect"),
}


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    one = Server()
    await one.start()
    yield one
    await one.stop()


@pytest.fixture
async def neighbour() -> AsyncIterator[Server]:
    one = Server()
    await one.start()
    yield one
    await one.stop()


def rows(column: str) -> list[tuple[str, str, float]]:
    """(replica, status, a column) of every row so far."""
    found = []
    for record in Producer.made[0].records if Producer.made else []:
        batch = record.batch()
        if batch.codes.keys() >= {"replica", "status"}:
            values = batch.numbers[column].tolist()
            found += zip(batch.text("replica"), batch.text("status"), values, strict=True)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("what", HOSTILE)
async def test_costs_its_own_slot(
    server: Server, neighbour: Server, settings: Settings, deployment: Deployment, what: str
) -> None:
    """The target is dead and counted under its reason; its neighbour answers all the time, and it again afterwards."""
    good = server.say
    server.say, reason = HOSTILE[what]
    options = EngineOptions.of(
        targets=[f"bad={server.url}", f"good={neighbour.url}"],
        period_s=0.1,
        timeout_s=1.0,
        dead_after_s=1.5,
        bytes_max=2_000_000,
    )
    exporter = EngineExporter(settings, deployment, options)
    stop = asyncio.Event()
    running = asyncio.create_task(exporter.run(stop))
    await until(lambda: ("bad", "dead") in [row[:2] for row in rows("running")])
    await until(lambda: _counted(exporter, reason) >= 1)
    assert ("bad", "ok") not in [row[:2] for row in rows("running")]
    server.say = good
    await until(lambda: ("bad", "ok") in [row[:2] for row in rows("running")])
    stop.set()
    await running
    assert {row[1] for row in rows("running") if row[0] == "good"} == {"ok"}


@pytest.mark.parametrize("host", ["a" * 70 + ".example", "chat..example"])
async def test_a_host_that_is_no_name_is_a_dead_target(settings: Settings, deployment: Deployment, host: str) -> None:
    """As a source may say it: the exporter goes on."""
    options = EngineOptions.of(targets=f"bad=http://{host}:8000/metrics", period_s=0.1, dead_after_s=0.2)
    exporter = EngineExporter(settings, deployment, options)
    stop = asyncio.Event()
    running = asyncio.create_task(exporter.run(stop))
    await until(lambda: running.done() or ("bad", "dead") in [row[:2] for row in rows("running")])
    stop.set()
    await running
    assert _counted(exporter, "connect") >= 1


def _counted(exporter: EngineExporter, reason: str) -> float:
    samples = [s for metric in exporter.edge.metrics.collect() for s in metric.samples]
    return sum(s.value for s in samples if s.name.endswith("errors_total") and s.labels["what"] == reason)


async def test_a_page_with_odd_bytes_and_many_series_is_read(server: Server) -> None:
    """Bad UTF-8 in a label or comment spoils nothing; zlib and gzip are taken within the bound on bytes."""
    page = b'# HELP \xff\xfe\nx{y="\xff"} 1\n' + GOOD
    async with Fetcher(5, 1000, Credentials("", None, None)) as fetcher:
        for answer in (
            http(page, TEXT),
            http(gzip.compress(page), TEXT, "Content-Encoding: gzip"),
            http(zlib.compress(page), TEXT, "Content-Encoding: deflate"),
            chunked(page[:10], page[10:]),
            http(page),
        ):
            server.say = said(answer)
            assert await fetcher.page(server.url) == (page, False)
        server.say = said(http(page, "Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8"))
        assert (await fetcher.page(server.url)).openmetrics
        server.say = said(http(gzip.compress(b"x" * 1001), TEXT, "Content-Encoding: gzip"))
        with pytest.raises(PageError, match="more than 1000 bytes"):
            await fetcher.page(server.url)


async def test_one_connection_is_kept(server: Server) -> None:
    """Pages come over one connection; text format is asked for, uncompressed, and no cookie is kept."""
    server.say = said(http(GOOD, TEXT, "Set-Cookie: a=b"))
    connections: set[Any] = set()
    plain = server.say

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        await plain(reader, writer)

    server.say = say
    async with Fetcher(5, 1000, Credentials("", None, None)) as fetcher:
        for _ in range(3):
            await fetcher.page(server.url)
    assert len(connections) == 1
    assert all(b"cookie" not in request.lower() for request in server.requests)
    assert b"Accept: text/plain;version=0.0.4" in server.requests[0]
    assert b"Accept-Encoding: identity" in server.requests[0]


async def test_credentials_are_shown_to_the_target_and_never_logged(server: Server, tmp_path: Path) -> None:
    """Basic or bearer, from a file that is read again; a redirect gets nothing, for it is not followed."""
    secret = tmp_path / "secret"
    secret.write_text("first\n")
    options = {"targets": f"r={server.url}", "timeout_s": 5.0}
    for credentials, expected in (
        (Credentials("", None, secret), b"Bearer first"),
        (Credentials("me", secret, None), b"Basic bWU6Zmlyc3Q="),
    ):
        async with Fetcher(5, 1000, credentials) as fetcher:
            await fetcher.page(server.url)
        assert b"Authorization: " + expected in server.requests[-1]
    credentials = Credentials("", None, secret)
    secret.write_text("second")
    assert credentials.headers(1.0)["Authorization"] == "Bearer first"
    assert credentials.headers(SECRET_AGE_S + 1)["Authorization"] == "Bearer second"
    secret.write_text("two\nlines")
    with pytest.raises(SettingsError, match="one line of printable ASCII"):
        Credentials("", None, secret)
    secret.unlink()
    with pytest.raises(SettingsError, match="secret: cannot be read"):
        credentials.headers(3 * SECRET_AGE_S)
    with pytest.raises(SettingsError, match="go together"):
        EngineOptions.of(username="me", **options)
    with pytest.raises(SettingsError, match="exclude each other"):
        EngineOptions.of(username="me", password_file=secret, token_file=secret, **options)
    with pytest.raises(SettingsError, match="no user or password in a URL") as error:
        EngineOptions.of(targets="r=http://me:hush@127.0.0.1/metrics")
    assert "hush" not in str(error.value)


async def test_a_refused_credential_is_a_state_not_an_end(
    server: Server, settings: Settings, deployment: Deployment, tmp_path: Path
) -> None:
    """Where the file with the secret goes away, targets are dead; the process lives and logs no secret."""
    secret = tmp_path / "secret"
    secret.write_text("hush")
    options = EngineOptions.of(targets=f"r={server.url}", token_file=secret, period_s=0.1, dead_after_s=0.2)
    exporter = EngineExporter(settings, deployment, options)
    exporter.fetcher.credentials._read_at = -1e9
    secret.unlink()
    stop = asyncio.Event()
    with structlog.testing.capture_logs() as logs:
        running = asyncio.create_task(exporter.run(stop))
        await until(
            lambda: _counted(exporter, "credentials") >= 1 and ("r", "dead") in [x[:2] for x in rows("running")]
        )
        stop.set()
        await running
    assert "hush" not in repr(logs)


def test_tls_files_are_checked_at_once(tmp_path: Path) -> None:
    """A missing authority or a certificate without key is named before anything runs."""
    assert tls(None, None, None) is True
    with pytest.raises(SettingsError, match="cannot be used for TLS"):
        tls(tmp_path / "none.pem", None, None)
    with pytest.raises(SettingsError, match="go together"):
        EngineOptions.of(targets="r=http://x/metrics", cert_file=tmp_path / "c.pem")


async def test_https_targets_are_verified(tmp_path: Path) -> None:
    """A certificate that the named authority signed is taken, any other is not."""
    authority = Authority(tmp_path)
    cert, key = authority.issue("engine")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    answer = said(http(GOOD, TEXT))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await answer(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/metrics"
    async with Fetcher(5, 1000, Credentials("", None, None), tls(authority.file, None, None)) as fetcher:
        assert (await fetcher.page(url)).body == GOOD
    async with Fetcher(5, 1000, Credentials("", None, None), tls(None, None, None)) as fetcher:
        with pytest.raises(aiohttp.ClientError):
            await fetcher.page(url)
    server.close()
