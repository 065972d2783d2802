"""Trace intake: gateways post request rows by HTTP, validated at the door, onto request.traces.

POST /v1/requests with application/json (one row or an array), application/x-ndjson or an Arrow stream. 202: taken
into the buffer; 207: some rows refused, the others taken; 400: none taken. Each refusal names row, field, value and
remedy. 429 with Retry-After while the buffer is full, so that what was taken is never dropped.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog
from aiohttp import web
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from exporters.edge import Edge, declare, options_of
from exporters.rows import RowBatcher, as_rows, row_bytes
from schemas.base import Name
from schemas.columns import ROWS_MAX, Batch
from schemas.config import Deployment
from schemas.errors import InvalidRecord, SettingsError
from schemas.log import CONTENT_ARROW, CONTENT_JSON
from schemas.requests import REQUEST_ROWS
from streams.settings import Settings

log = structlog.get_logger(__name__)

CONTENT_NDJSON = "application/x-ndjson"
PATH = "/v1/requests"
TOKEN_LENGTH_MIN = 16
REFUSALS_SHOWN = 100
ON_LOOP_BYTES = 64 * 1024
"""Longer bodies are decoded on a thread, so that the loop goes on answering."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class IntakeOptions(BaseSettings):
    """Options of the trace intake; environment FLEETLOOP_INTAKE_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="FLEETLOOP_INTAKE_", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on; beyond loopback a token is required.")
    port: int = Field(8810, ge=0, le=65535, description="Port; 0: any free one.")
    token: SecretStr | None = Field(None, description="Bearer token that senders need; better given as a file.")
    token_file: Path | None = Field(None, description="File that holds the token; wins over the variable.")
    source: Name = Field("intake", description="Name of this intake in the batches that it sends.")
    body_bytes_max: int = Field(4 * 1024 * 1024, ge=1024, le=64 * 1024 * 1024, description="Longest body, bytes.")
    body_timeout_s: float = Field(10.0, gt=0, le=600, description="Time that a sender has for its body, s.")
    coalesce_s: float = Field(0.05, ge=0, le=5, description="Rows gathered for so long before they are sent, s.")
    requests_max: int = Field(32, ge=1, le=10_000, description="Requests handled at once; more get 429.")
    retry_after_s: int = Field(1, ge=1, le=3600, description="Retry-After of a 429, s.")
    health_port: int = Field(0, ge=-1, le=65535, description="Port of /healthz, /readyz, /metrics; 0: none, -1: any.")

    @classmethod
    def of(cls, **given: Any) -> IntakeOptions:
        """From arguments (None: not given), then the environment. Raises SettingsError."""
        return options_of(cls, given)

    def secret(self) -> str | None:
        """The token, or None where none is needed. Raises SettingsError."""
        text = self.token.get_secret_value() if self.token is not None else None
        if self.token_file is not None:
            try:
                text = self.token_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"FLEETLOOP_INTAKE_TOKEN_FILE: {self.token_file}: {error}") from None
        if text is not None and len(text) < TOKEN_LENGTH_MIN:
            raise SettingsError(f"FLEETLOOP_INTAKE_TOKEN: needs at least {TOKEN_LENGTH_MIN} characters")
        if text is None and not _loopback(self.host):
            raise SettingsError(
                f"FLEETLOOP_INTAKE_TOKEN: none, and {self.host} can be reached from elsewhere: set a token "
                "(`openssl rand -hex 24` makes one), or listen on 127.0.0.1"
            )
        return text


declare(IntakeOptions)


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def run_intake(settings: Settings, deployment: Deployment, options: IntakeOptions, stop: asyncio.Event) -> None:
    """Listens until `stop` is set. Raises SettingsError for an address or a token that cannot be used."""
    intake = Intake(settings, deployment, options)
    await intake.run(stop)


class Intake:
    """The HTTP server and the rows on their way."""

    def __init__(self, settings: Settings, deployment: Deployment, options: IntakeOptions) -> None:
        self.options = options
        self.secret = options.secret()
        self.edge = Edge(settings, deployment, "intake", options.source, options.health_port)
        self.batcher = RowBatcher(self.edge, options.source)
        self.buffer_bytes_max = settings.edge_buffer_bytes // 2
        self.port = 0
        self.listening = asyncio.Event()
        self._handled = 0
        self._flush: asyncio.TimerHandle | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; then what was taken is sent."""
        # twice the limit, as a body is measured here, with an answer that says more
        app = web.Application(middlewares=[self._guard()], client_max_size=2 * self.options.body_bytes_max)
        app.router.add_post(PATH, self._post)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
        async with self.edge:
            await runner.setup()
            try:
                site = web.TCPSite(runner, self.options.host, self.options.port)
                try:
                    await site.start()
                except OSError as error:
                    raise SettingsError(
                        f"FLEETLOOP_INTAKE_PORT: {self.options.host}:{self.options.port}: {error.strerror}: "
                        "choose an address of this host and a free port"
                    ) from None
                self.port = int(runner.addresses[0][1])
                self.listening.set()
                log.info("intake listens", address=f"http://{self.options.host}:{self.port}{PATH}")
                await stop.wait()
            finally:
                await runner.cleanup()
                self.flush()

    def _guard(self) -> Any:
        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            if not self._authorised(request.headers.get("Authorization", "")):
                return _answer(401, "send Authorization: Bearer <token>", {"WWW-Authenticate": "Bearer"})
            if self.secret is None and not _loopback(urlsplit(f"//{request.host}").hostname or ""):
                return _answer(403, "without a token this is only for loopback: use http://127.0.0.1")
            if self._handled >= self.options.requests_max or self._room() <= 0:
                return self._later()
            self._handled += 1
            try:
                return await handler(request)
            except web.HTTPException as error:
                return _answer(error.status, error.reason)
            finally:
                self._handled -= 1

        return guard

    def _authorised(self, header: str) -> bool:
        if self.secret is None:
            return True
        return hmac.compare_digest(header.encode("utf-8", "replace"), f"Bearer {self.secret}".encode())

    def _room(self) -> int:
        return self.buffer_bytes_max - self.edge.producer.buffered_bytes - self.batcher.bytes

    def _later(self) -> web.Response:
        self.edge.metrics.failed("busy")
        return _answer(429, "the buffer is full; send again later", {"Retry-After": str(self.options.retry_after_s)})

    async def _post(self, request: web.Request) -> web.StreamResponse:
        began = time.monotonic()
        limit = self.options.body_bytes_max
        try:
            async with asyncio.timeout(self.options.body_timeout_s):
                body = await request.read()
        except TimeoutError:
            return _answer(408, f"send the body within {self.options.body_timeout_s:g} s")
        except web.HTTPRequestEntityTooLarge:
            return _answer(413, f"send at most {limit} bytes at once")
        if len(body) > limit:
            return _answer(413, f"send at most {limit} bytes at once")
        decode = _DECODERS.get(request.content_type)
        if decode is None:
            return _answer(415, f"send Content-Type {', '.join(_DECODERS)}")
        try:
            taken = decode(body) if len(body) <= ON_LOOP_BYTES else await asyncio.to_thread(decode, body)
        except InvalidRecord as refused:
            self.edge.metrics.failed(refused.reason)
            return _refused_whole(refused)
        batch, refusals, count = taken
        rows = list(as_rows(batch))
        needed = sum(map(row_bytes, rows))
        if needed > self.buffer_bytes_max:
            return _answer(413, f"send fewer rows: these need {needed} bytes of a buffer of {self.buffer_bytes_max}")
        if needed > self._room():
            return self._later()
        for row in rows:
            self.batcher.add(row)
        if batch.rows and self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(self.options.coalesce_s, self.flush)
        self.edge.metrics.read(batch.rows, time.monotonic() - began)
        if count:
            self.edge.metrics.failed("rows", count)
        status = 202 if not count else 207 if batch.rows else 400
        return web.json_response(
            {"accepted": batch.rows, "refused_rows": count, "refused": refusals[:REFUSALS_SHOWN]}, status=status
        )

    def flush(self) -> None:
        """Sends the rows gathered so far."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        self.batcher.flush()


Decoded = tuple[Batch, list[dict[str, Any]], int]
"""Rows taken, refusals as they are answered (the first ones), number of rows refused."""


def _of_batch(batch: Batch, lines: list[int] | None = None) -> Decoded:
    refusals: list[dict[str, Any]] = []
    count = 0
    for bad in batch.refused:
        count += len(bad.rows)
        for row in bad.rows[:REFUSALS_SHOWN]:
            where = row if lines is None else lines[row]
            refusals.append(_refusal(where, bad.reason, bad.field, bad.value, bad.remedy))
    refusals.sort(key=lambda r: int(r["row"]))
    return batch, refusals, count


def _refusal(row: int | None, reason: str, field: str, value: str, remedy: str) -> dict[str, Any]:
    return {"row": row, "reason": reason, "field": field, "value": value, "remedy": remedy}


def _json(body: bytes) -> Decoded:
    return _of_batch(REQUEST_ROWS.decode(body, CONTENT_JSON))


def _arrow(body: bytes) -> Decoded:
    return _of_batch(REQUEST_ROWS.decode(body, CONTENT_ARROW))


def _ndjson(body: bytes) -> Decoded:
    """Lines of JSON; a line that is none is refused like a bad row. Row numbers count every line from 0."""
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    broken: list[dict[str, Any]] = []
    for number, line in enumerate(body.split(b"\n")):
        if not line.strip():
            continue
        if len(rows) + len(broken) >= ROWS_MAX:
            raise InvalidRecord("too_large", "rows", f"more than {ROWS_MAX}", f"send at most {ROWS_MAX} rows at once")
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            broken.append(
                _refusal(number, "undecodable", "value", repr(line[:80]), f"send a JSON object a line ({error})"[:300])
            )
            continue
        rows.append(found)
        lines.append(number)
    batch, refusals, count = _of_batch(REQUEST_ROWS.decode_rows(rows), lines)
    return batch, sorted([*broken, *refusals], key=lambda r: int(r["row"])), count + len(broken)


_DECODERS: dict[str, Callable[[bytes], Decoded]] = {
    CONTENT_JSON: _json,
    CONTENT_NDJSON: _ndjson,
    CONTENT_ARROW: _arrow,
}


def _refused_whole(refused: InvalidRecord) -> web.Response:
    one = _refusal(None, refused.reason, refused.field, refused.value, refused.remedy)
    return web.json_response({"accepted": 0, "refused_rows": None, "refused": [one]}, status=400)


def _answer(status: int, remedy: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"accepted": 0, "error": remedy}, status=status, headers=headers)
