"""Trace intake: what gateways, engines and their tracing say of requests, by HTTP, onto request.traces.

POST /v1/requests takes our own rows (JSON, NDJSON, Arrow), /v1/traces OTLP, /v1/litellm LiteLLM's logging payloads.
An answer of 2xx means that the broker has acknowledged every row that was taken. 413: too much at once; 429: slow down;
503: not acknowledged, send again; the last two with Retry-After. Sending again does no harm: rows have ids.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import structlog
from aiohttp import web

from exporters.conventions_rows import Mapper
from exporters.edge import Edge
from exporters.intake_auth import Clients
from exporters.intake_bodies import decompressed
from exporters.intake_endpoints import LiteLlm, OtlpHttp, OwnRows, Taken
from exporters.intake_letters import Letters
from exporters.intake_limits import Limits
from exporters.intake_options import IntakeOptions
from exporters.intake_sink import NotStored, Sink
from exporters.otlp_grpc import OtlpGrpc
from exporters.rows import Split
from exporters.tail import Tail
from schemas.base import MS_LIMIT_S
from schemas.columns import Batch
from schemas.config import Deployment
from schemas.errors import InvalidRecord, SettingsError
from streams.settings import Settings, is_loopback

__all__ = ["PATH", "Intake", "IntakeOptions", "run_intake"]

log = structlog.get_logger(__name__)

PATH = OwnRows.path
ON_LOOP_BYTES = 64 * 1024
"""Longer bodies are decoded on a thread, so that the loop goes on answering."""
STATUSES = {"too_large": 413, "unknown_type": 415}
"""Reason of a refused body -> HTTP status; others 400."""
COMPRESSION = 8
"""A compressed body is taken to become so much longer."""
STOP_WITHIN_S = 3.0
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Endpoint = OwnRows | OtlpHttp | LiteLlm


async def run_intake(settings: Settings, deployment: Deployment, options: IntakeOptions, stop: asyncio.Event) -> None:
    """Takes until `stop` is set. Raises SettingsError for an address, token or certificate that cannot be used."""
    intake = Intake(settings, deployment, options)
    await intake.run(stop)


class Intake:
    """The servers, and the rows on their way."""

    def __init__(self, settings: Settings, deployment: Deployment, options: IntakeOptions) -> None:
        self.options = options
        self.clients = Clients(options)
        self.tls = options.tls()
        self.edge = Edge(settings, deployment, "intake", options.source, options.health_port)
        self.sink = Sink(self.edge, options.source, options.coalesce_s, options.ack_timeout_s)
        self.limits = Limits(options.rows_per_s_max, options.clients_max)
        self.letters = Letters(self.edge, options.letters_per_min_max)
        self.mapper = Mapper(options, self._fleet_s)
        followed = (options, self.edge, self.sink, self.mapper, self.letters)
        self.tail = Tail(*followed) if options.tail_dir is not None else None
        self.grpc = OtlpGrpc(self) if options.grpc_port >= 0 else None
        self.port = 0
        self.listening = asyncio.Event()
        self.decoding = 0

    def _fleet_s(self, wall_s: float) -> float:
        # at speed 1 they are the same, and spans need not be rounded to ms
        # and what is too great for a time in s is refused by its column as it is
        return wall_s if self.edge.deployment.speed == 1 or wall_s >= MS_LIMIT_S else self.edge.fleet_s(wall_s)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; then what was taken is sent."""
        # twice the limit, as a body is measured here, with an answer that says more
        app = web.Application(client_max_size=2 * self.options.body_bytes_max)
        endpoints: list[Endpoint] = [OwnRows(self.options), OtlpHttp(self.options, self.mapper)]
        endpoints.append(LiteLlm(self.options, self.mapper))
        for endpoint in endpoints:
            app.router.add_route("*", endpoint.path, self._handler(endpoint))
        runner = web.AppRunner(app, auto_decompress=False, access_log=None, shutdown_timeout=STOP_WITHIN_S)
        async with self.edge:
            await runner.setup()
            try:
                await self._listen(runner)
                if self.grpc is not None:
                    await self.grpc.start()
                self.listening.set()
                async with asyncio.TaskGroup() as group:
                    if self.tail is not None:
                        group.create_task(self.tail.run(stop))
                    await stop.wait()
            finally:
                self.sink.close()
                if self.grpc is not None:
                    await self.grpc.stop(STOP_WITHIN_S)
                await runner.cleanup()
                self.sink.flush()

    async def _listen(self, runner: web.AppRunner) -> None:
        host, port = self.options.host, self.options.port
        try:
            await web.TCPSite(runner, host, port, ssl_context=self.tls).start()
        except OSError as error:
            raise SettingsError(
                f"FLEETLOOP_INTAKE_PORT: {host}:{port}: {error.strerror}: "
                "choose an address of this host and a free port"
            ) from None
        self.port = int(runner.addresses[0][1])
        log.info("intake listens", address=f"{'https' if self.tls else 'http'}://{host}:{self.port}")

    def _handler(self, endpoint: Endpoint) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            status, why, headers = 0, "", {}
            try:
                client = self._client(request)
                taken, took_s = await self._taken(endpoint, request)
                await self.store(taken.batch, taken.split, client)
                self.count(taken, took_s)
                return endpoint.answer(request, taken)
            except NotStored as error:
                status, why = error.status, error.why
                self.not_stored(status)
            except InvalidRecord as refused:
                self.edge.metrics.failed(refused.reason)
                return endpoint.refuse(request, STATUSES.get(refused.reason, 400), refused, {})
            except web.HTTPException as error:
                status, why = error.status, error.text or error.reason
                headers = {name: error.headers[name] for name in ("WWW-Authenticate", "Allow") if name in error.headers}
            if status in (429, 503):
                headers["Retry-After"] = str(self.options.retry_after_s)
            return endpoint.refuse(request, status, why, headers)

        return handle

    def _client(self, request: web.Request) -> str:
        """Name of the sender. Raises an HTTPException for one that may not send, or not this way."""
        if request.method != "POST":
            raise web.HTTPMethodNotAllowed(request.method, ["POST"], text="send POST")
        certificate = request.transport.get_extra_info("peercert") if request.transport else None
        client = self.clients.name(request.headers.get("Authorization", ""), certificate, request.remote or "")
        if client is None:
            raise web.HTTPUnauthorized(
                text="send Authorization: Bearer <token>", headers={"WWW-Authenticate": "Bearer"}
            )
        if self.clients.open and not is_loopback(_host(request)):
            raise web.HTTPForbidden(text="without a token this is only for loopback: use http://127.0.0.1")
        self.admit(client)
        return client

    def admit(self, client: str) -> None:
        """Raises NotStored where a client, or everybody, has to wait."""
        wait_s = self.limits.wait_s(client, time.monotonic())
        if wait_s:
            raise NotStored(429, f"more than {self.options.rows_per_s_max:g} rows a second: wait {wait_s} s")
        if self.decoding >= self.options.requests_max or self.sink.room() <= 0:
            raise NotStored(429, "the buffer is full; send again later")

    async def _taken(self, endpoint: Endpoint, request: web.Request) -> tuple[Taken, float]:
        """The body, read and decoded, and the time that took, s. What then waits for the broker is not at work."""
        began = time.monotonic()
        self.decoding += 1
        try:
            body = await self._body(request)
            decode = endpoint.decoder(request)
            encoding, limit = request.headers.get("Content-Encoding", ""), self.options.body_bytes_max
            size = len(body) * (COMPRESSION if encoding else 1)
            return await self.decoded(
                lambda: decode(decompressed(body, encoding, limit)), size
            ), time.monotonic() - began
        finally:
            self.decoding -= 1

    async def decoded(self, decode: Callable[[], Taken], size: int) -> Taken:
        """Decodes, on a thread what is long, and splits rows by partition there too."""

        def work() -> Taken:
            taken = decode()
            if taken.batch.rows > self.options.rows_max * taken.rows_each:
                raise InvalidRecord(
                    "too_large", "rows", taken.batch.rows, f"send at most {self.options.rows_max} at once"
                )
            return taken._replace(split=self.sink.batcher.split(taken.batch))

        return work() if size <= ON_LOOP_BYTES else await asyncio.to_thread(work)

    async def _body(self, request: web.Request) -> bytes:
        limit = self.options.body_bytes_max
        try:
            async with asyncio.timeout(self.options.body_timeout_s):
                body = await request.read()
        except TimeoutError:
            raise web.HTTPRequestTimeout(text=f"send the body within {self.options.body_timeout_s:g} s") from None
        except web.HTTPRequestEntityTooLarge:
            body = None
        except web.RequestPayloadError:
            raise web.HTTPBadRequest(text="the body broke off: send it again") from None
        if body is None or len(body) > limit:
            raise NotStored(413, f"send at most {limit} bytes at once")
        return body

    async def store(self, batch: Batch, rows: Split, client: str) -> None:
        """Returns when the broker has the rows. Raises NotStored."""
        self.limits.spend(client, batch.rows, time.monotonic())
        await self.sink.put(rows)

    def not_stored(self, status: int) -> None:
        """Metric of a refusal."""
        self.edge.metrics.failed({413: "too_large", 429: "busy"}.get(status, "unstored"))

    def count(self, taken: Taken, took_s: float) -> None:
        """Metrics and dead letters of what was stored; `took_s`: its decoding."""
        self.edge.metrics.read(taken.batch.rows, took_s)
        self.letters.write(taken.letters, taken.type)
        if taken.refused:
            self.edge.metrics.failed("rows", taken.refused)
        if taken.skipped:
            self.edge.metrics.failed("not_requests", taken.skipped)


def _host(request: web.Request) -> str:
    try:
        return urlsplit(f"//{request.host}").hostname or ""
    except ValueError:
        return ""
