"""Replays a trace file into request.traces: a published trace (`trace_file_formats`), or JSON lines of request rows.

The first row of the trace is now; later ones follow at `speed` trace seconds per fleet second. What a trace does not
say (the latencies of Azure's) is unknown, not 0.
"""

from __future__ import annotations

import asyncio
import csv
import heapq
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import structlog
from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from exporters.edge import Edge, declare, options_of
from exporters.rows import RowBatcher
from exporters.trace_file_formats import FORMATS, Request, format_of, opened, scaled
from schemas.base import Name
from schemas.config import Deployment
from schemas.errors import SettingsError, UnavailableError
from schemas.requests import REQUEST_ROWS
from streams.deployment import wall_ms, wall_now_ms
from streams.settings import Settings

log = structlog.get_logger(__name__)

AHEAD_S = 0.05
"""Rows due within this wall time go out together."""
LINES_AT_ONCE = 512
"""JSON lines validated together: fewer when the trace is slow would only cost time."""
REFUSALS_LOGGED = 5
FLUSH_WITHIN_S = 30.0


class TraceFileOptions(BaseSettings):
    """Options of the trace replay; environment FLEETLOOP_TRACE_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="FLEETLOOP_TRACE_", frozen=True)

    file: Path = Field(description="The trace.")
    format: Literal["auto", "azure", "burstgpt", "burstgpt-replay", "mooncake", "servegen", "jsonl"] = Field(
        "auto", description="auto: by the file's beginning; jsonl: rows of our own. Files may be compressed (.gz)."
    )
    pool: Name | None = Field(None, description="Pool of every request; JSON lines may name their own.")
    tenant: str = Field("trace", min_length=1, max_length=200, description="Tenant of requests that name none.")
    request_class: str = Field("default", min_length=1, max_length=200, description="Class of requests that name none.")
    speed: float = Field(1.0, ge=0.001, le=100_000, description="Trace seconds per fleet second.")
    duration_s: float | None = Field(None, gt=0, description="Only the trace's first seconds.")
    scale: float = Field(
        1.0, ge=0.001, le=1000, description="Copies of each request of a published trace; the first keeps its time."
    )
    jitter_s: float = Field(5.0, ge=0, le=3600, description="Other copies come up to so much later, trace s.")
    seed: int = Field(0, ge=0, description="Of copies, and of ServeGen's arrivals.")
    input_tokens: float | None = Field(None, ge=0, le=1e8, description="Prompt tokens of requests that say none.")
    output_tokens: float | None = Field(None, ge=0, le=1e8, description="Output tokens of requests that say none.")
    ttft_s: float | None = Field(None, ge=0, le=1e6, description="Time to first token of requests that say none, s.")
    tpot_s: float | None = Field(None, ge=0, le=1e6, description="Time per output token of requests that say none, s.")
    health_port: int = Field(0, ge=-1, le=65535, description="Port of /healthz, /readyz, /metrics; 0: none, -1: any.")

    @field_validator("file")
    @classmethod
    def _there(cls, value: Path) -> Path:
        if not value.is_file():
            raise ValueError("no such file")
        return value

    @classmethod
    def of(cls, **given: Any) -> TraceFileOptions:
        """From arguments (None: not given), then the environment. Raises SettingsError."""
        options = options_of(cls, given)
        if options.kind() != "jsonl" and options.pool is None:
            raise SettingsError("FLEETLOOP_TRACE_POOL: none: name the pool that the requests are said to go to")
        return options

    def kind(self) -> str:
        """Format, decided."""
        return format_of(self.file) if self.format == "auto" else self.format


declare(TraceFileOptions)


class Replayed(NamedTuple):
    """What a replay did, in rows."""

    sent: int
    refused: int
    finished: bool
    """False: it was stopped before the end of the trace."""


class Event(NamedTuple):
    """One row and when it is due, s from the start of the trace."""

    due_s: float
    order: int
    row: dict[str, Any]


async def run_trace_file(
    settings: Settings, deployment: Deployment, options: TraceFileOptions, stop: asyncio.Event
) -> Replayed:
    """Replays until the end of the trace or `stop`.

    Raises SettingsError where the file is no such trace, UnavailableError where the broker did not take it all.
    """
    edge = Edge(settings, deployment, "trace-file", options.file.name[:100] or "trace", options.health_port)
    replay = Replay(edge, options)
    async with edge:
        replayed = await replay.run(stop)
        done = await edge.producer.flush(0.0 if stop.is_set() else FLUSH_WITHIN_S)
    log.info("trace replayed", file=str(options.file), **replayed._asdict())
    if not done and not stop.is_set():
        raise UnavailableError(
            f"FLEETLOOP_BOOTSTRAP_SERVERS: {settings.bootstrap_servers!r} did not take every row within "
            f"{FLUSH_WITHIN_S:.0f} s: is the broker up?"
        )
    return replayed


class Replay:
    """The rows of one file, each at its time."""

    def __init__(self, edge: Edge, options: TraceFileOptions) -> None:
        self.edge, self.options = edge, options
        self.batcher = RowBatcher(edge, "trace-file")
        self.refused = 0

    async def run(self, stop: asyncio.Event) -> Replayed:
        """See `run_trace_file`."""
        origin_s = self.edge.at_s()
        gathered: list[dict[str, Any]] = []
        gathered_ms = 0.0
        for event in self._events():
            at_s = origin_s + event.due_s / self.options.speed
            due_ms = wall_ms(self.edge.deployment, at_s * 1000)
            if gathered and (due_ms > gathered_ms + AHEAD_S * 1000 or len(gathered) >= LINES_AT_ONCE):
                if await self._send(gathered, gathered_ms, stop):
                    return Replayed(self.batcher.sent_rows, self.refused, False)
                gathered = []
            if not gathered:
                gathered_ms = due_ms
            gathered.append({**event.row, "at_s": round(at_s, 6)})
        stopped = bool(gathered) and await self._send(gathered, gathered_ms, stop)
        return Replayed(self.batcher.sent_rows, self.refused, not stopped)

    async def _send(self, rows: list[dict[str, Any]], due_ms: float, stop: asyncio.Event) -> bool:
        """Waits until rows are due, and for room; True where `stop` came first."""
        try:
            async with asyncio.timeout((due_ms - wall_now_ms()) / 1000 + AHEAD_S):
                await stop.wait()
            return True
        except TimeoutError:
            pass
        if not await self._room(stop):
            return True
        began = time.monotonic()
        batch = REQUEST_ROWS.decode_rows(rows)
        for bad in batch.refused:
            self._refuse(len(bad.rows), f"{bad.field}: {bad.remedy}")
        self.batcher.add(self.batcher.split(batch))
        self.edge.metrics.read(batch.rows, time.monotonic() - began)
        self.batcher.flush()
        return False

    async def _room(self, stop: asyncio.Event) -> bool:
        """Waits for room in the buffer; False where `stop` came first."""
        room, stopping = asyncio.ensure_future(self.edge.producer.room()), asyncio.ensure_future(stop.wait())
        await asyncio.wait({room, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not room.done():
            room.cancel()
            return False
        room.result()
        return True

    def _refuse(self, count: int, why: str) -> None:
        self.refused += count
        self.edge.metrics.failed("rows", count)
        if self.refused - count < REFUSALS_LOGGED:
            log.warning("row of the trace refused", why=why)

    def _events(self) -> Iterator[Event]:
        kind = self.options.kind()
        try:
            for event in self._lines() if kind == "jsonl" else self._published(kind):
                if self.options.duration_s is not None and event.due_s > self.options.duration_s:
                    return
                yield event
        except (OSError, EOFError, zlib.error, csv.Error) as error:
            raise SettingsError(f"{self.options.file}: cannot be read to its end: {error}") from None

    def _published(self, kind: str) -> Iterator[Event]:
        """Arrivals as the file has them; ends in between, by a heap, where a latency is known."""
        options = self.options
        prefix = f"{options.file.stem[:80]}-{self.edge.start_s}"
        ends: list[Event] = []
        first: float | None = None
        requests = FORMATS[kind](options.file, lambda line, why: self._refuse(1, f"line {line}: {why}"), options.seed)
        if options.scale != 1:
            requests = scaled(requests, options.scale, options.jitter_s, options.seed)
        for number, request in enumerate(requests):
            first = request.at_s if first is None else first
            due_s = request.at_s - first
            while ends and ends[0].due_s <= due_s:
                yield heapq.heappop(ends)
            arrival, end = self._pair(f"{prefix}-{number}", due_s, number, request)
            yield arrival
            heapq.heappush(ends, end)
        while ends:
            yield heapq.heappop(ends)

    def _pair(self, id: str, due_s: float, number: int, request: Request) -> tuple[Event, Event]:
        options = self.options
        output = request.output_tokens if request.output_tokens is not None else options.output_tokens
        common = {
            "request_id": id,
            "pool": options.pool,
            "tenant": request.tenant or options.tenant,
            "class": request.request_class or options.request_class,
            "model": request.model,
            "input_tokens": request.input_tokens if request.input_tokens is not None else options.input_tokens,
        }
        ttft = request.ttft_s if request.ttft_s is not None else options.ttft_s
        tpot, e2e, more = options.tpot_s, request.e2e_s, max(0.0, (output or 0.0) - 1)
        if e2e is None and ttft is not None and tpot is not None and output is not None:
            e2e = ttft + tpot * more
        elif tpot is None and None not in (e2e, ttft) and more:
            tpot = max(0.0, e2e - ttft) / more  # type: ignore[operator]
        end = {"status": request.status, "output_tokens": output, "ttft_s": ttft, "tpot_s": tpot, "e2e_s": e2e}
        # The latency is in fleet time, not sped up with the arrivals: it is what is said of the engine.
        end_s = due_s + (e2e or 0.0) * options.speed
        return (
            Event(due_s, 2 * number, {"event": "arrival", **common}),
            Event(end_s, 2 * number + 1, {"event": "end", **common, **end}),
        )

    def _lines(self) -> Iterator[Event]:
        """Rows in the order of the file, with their times moved to now and their ids made new."""
        options = self.options
        first: float | None = None
        with opened(options.file) as lines:
            for number, line in enumerate(lines):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    at, id = float(row["at_s"]), str(row["request_id"])
                    if not at < 1e11:
                        raise ValueError("milliseconds")
                except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
                    self._refuse(
                        1, f"line {number + 1}: {type(error).__name__}: a row needs request_id and at_s, Unix s"
                    )
                    continue
                first = at if first is None else first
                given = {name: row.get(name) for name in REQUEST_ROWS.columns}
                given["request_id"] = f"{id}@{self.edge.start_s}"
                given["pool"] = options.pool or given["pool"]
                given["tenant"] = given["tenant"] or options.tenant
                given["class"] = given["class"] or options.request_class
                yield Event(max(0.0, at - first), number, given)
