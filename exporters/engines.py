"""Engine exporter: scrapes `/metrics` of inference engines once a second, onto node.samples.

Every target has a slot of its own: a slow or dead one delays no other. A target that has not answered for 2 s is said
to be dead, once a second, until it answers again.
"""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import aiohttp
import structlog
from pydantic import Field, TypeAdapter, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from exporters.edge import Edge, declare, options_of, ticks
from exporters.vllm import VllmAdapter, together
from schemas.base import Name
from schemas.config import Deployment
from schemas.log import CONTENT_ARROW
from schemas.node import ENGINE_SAMPLES
from schemas.topics import NODE_SAMPLES
from streams.settings import Settings

log = structlog.get_logger(__name__)

_NAME: TypeAdapter[str] = TypeAdapter(Name)
GATHER_S = 0.05
"""Rows that come within this time of each other go into one batch."""
READ_CHUNK = 64 * 1024


class EngineOptions(BaseSettings):
    """Options of the engine exporter; environment FLEETLOOP_ENGINES_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="FLEETLOOP_ENGINES_", frozen=True)

    targets: Annotated[list[str], NoDecode] = Field(
        min_length=1, max_length=1024, description="replica=http://host:port/metrics, separated by commas."
    )
    node: Name = Field(default_factory=socket.gethostname, description="Node name (default: the host's name).")
    engines: Literal["together", "apart"] = Field(
        "together",
        description="Several engines behind one port: together as one replica, or apart as `replica:engine`.",
    )
    period_s: float = Field(1.0, ge=0.1, le=60, description="Time between two scrapes of a target, s.")
    timeout_s: float = Field(1.0, ge=0.05, le=60, description="Time that a target has to answer, s.")
    dead_after_s: float = Field(2.0, ge=0, le=600, description="Without an answer for so long a target is dead, s.")
    bytes_max: int = Field(
        4 * 1024 * 1024, ge=1024, le=64 * 1024 * 1024, description="Longest page taken from a target, bytes."
    )
    health_port: int = Field(0, ge=-1, le=65535, description="Port of /healthz, /readyz, /metrics; 0: none, -1: any.")

    @field_validator("targets", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value

    @field_validator("targets")
    @classmethod
    def _valid(cls, value: list[str]) -> list[str]:
        names = [_target(item)[0] for item in value]
        if len(set(names)) < len(names):
            raise ValueError("every replica may be named once")
        return value

    @classmethod
    def of(cls, **given: Any) -> EngineOptions:
        """From arguments (None: not given), then the environment. Raises SettingsError."""
        return options_of(cls, given)


declare(EngineOptions)


def _target(text: str) -> tuple[str, str]:
    """(replica, url) of `replica=url`. Raises ValueError."""
    name, _, url = text.partition("=")
    try:
        _NAME.validate_python(name)
    except ValidationError:
        raise ValueError(f"{text!r}: write replica=http://host:port/metrics") from None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r}: write replica=http://host:port/metrics")
    return name, url


async def run_engines(settings: Settings, deployment: Deployment, options: EngineOptions, stop: asyncio.Event) -> None:
    """Publishes until `stop` is set."""
    exporter = EngineExporter(settings, deployment, options)
    await exporter.run(stop)


class Slot:
    """One target: its adapter, and the scrape that is under way."""

    def __init__(self, replica: str, url: str, now: float) -> None:
        self.replica, self.url = replica, url
        self.adapter = VllmAdapter()
        self.engines: list[str] = []
        """Engines of the last answer."""
        self.answered_at = now
        self.failure = ""
        self.task: asyncio.Task[None] | None = None


class EngineExporter:
    """Scrapes of a node's engines."""

    def __init__(self, settings: Settings, deployment: Deployment, options: EngineOptions) -> None:
        self.options = options
        self.edge = Edge(settings, deployment, "engines", options.node, options.health_port)
        self.slots = [Slot(*_target(item), time.monotonic()) for item in options.targets]
        self._rows: list[dict[str, Any]] = []
        self._flush: asyncio.TimerHandle | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set."""
        timeout = aiohttp.ClientTimeout(total=self.options.timeout_s)
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=0)
        async with self.edge, aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            async for _ in ticks(self.options.period_s, stop):
                for slot in self.slots:
                    self.tick(slot, session)
            tasks = [slot.task for slot in self.slots if slot.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.flush()

    def tick(self, slot: Slot, session: aiohttp.ClientSession) -> None:
        """Begins a scrape unless the last one has not ended; says so where the target is dead."""
        if slot.task is not None and slot.task.done() and not slot.task.cancelled():
            slot.task.result()  # our bugs end the process
        if slot.task is None or slot.task.done():
            slot.task = asyncio.create_task(self._scrape(slot, session))
        else:
            self.edge.metrics.skipped()
        if time.monotonic() - slot.answered_at >= self.options.dead_after_s:
            self._dead(slot)

    async def _scrape(self, slot: Slot, session: aiohttp.ClientSession) -> None:
        began = time.monotonic()
        try:
            text = await self._page(slot.url, session)
            at_s = self.edge.at_s()
            found = await asyncio.to_thread(slot.adapter.columns, text)
            if not found:
                raise ValueError("no vllm: metrics on that page")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            self._failed(slot, error)
            return
        if slot.failure:
            log.info("target answers again", replica=slot.replica)
        slot.failure, slot.answered_at = "", time.monotonic()
        self.edge.metrics.read(len(found), slot.answered_at - began)
        self._take(slot, found, at_s)

    async def _page(self, url: str, session: aiohttp.ClientSession) -> str:
        async with session.get(url, allow_redirects=False) as answer:
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            data = bytearray()
            async for chunk in answer.content.iter_chunked(READ_CHUNK):
                data += chunk
                if len(data) > self.options.bytes_max:
                    raise ValueError(f"more than {self.options.bytes_max} bytes")
        return data.decode("utf-8", "replace")

    def _failed(self, slot: Slot, error: Exception) -> None:
        kind = "timeout" if isinstance(error, TimeoutError) else "page" if isinstance(error, ValueError) else "connect"
        self.edge.metrics.failed(kind)
        if slot.failure != kind:
            slot.failure = kind
            log.warning("target does not answer", replica=slot.replica, error=str(error)[:300] or kind)

    def _take(self, slot: Slot, found: dict[str, dict[str, float | None]], at_s: float) -> None:
        start = next(iter(found.values()))["start_s"]
        for column, count in slot.adapter.refused.items():
            self.edge.metrics.failed(column, count)
        slot.adapter.refused = {}
        if self.options.engines == "together":
            found = {"": together(found)}
        slot.engines = list(found)
        for engine, columns in found.items():
            row = {"replica": _replica(slot.replica, engine), "at_s": at_s, "status": "ok", **columns}
            if start is not None:
                row["start_s"] = self.edge.fleet_s(start)
            self._row(row)

    def _dead(self, slot: Slot) -> None:
        at_s = self.edge.at_s()
        for engine in slot.engines or [""]:
            self._row({"replica": _replica(slot.replica, engine), "at_s": at_s, "status": "dead"})

    def _row(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(GATHER_S, self.flush)

    def flush(self) -> None:
        """Publishes the rows gathered so far as one batch."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        rows, self._rows = self._rows, []
        if not rows:
            return
        seq, id = self.edge.next_batch()
        node = self.options.node
        meta = {"node": node, "start_s": self.edge.start_s, "seq": seq, "dropped": self.edge.dropped(NODE_SAMPLES)}
        value = ENGINE_SAMPLES.encode({name: [row.get(name) for row in rows] for name in ENGINE_SAMPLES.columns}, meta)
        self.edge.producer.send(NODE_SAMPLES, node, value, type=ENGINE_SAMPLES.type, id=id, content_type=CONTENT_ARROW)


def _replica(name: str, engine: str) -> str:
    return f"{name}:{engine}" if engine else name
